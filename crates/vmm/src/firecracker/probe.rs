//! What a Firecracker can do follows from its version. Pure.

use std::collections::BTreeSet;
use std::path::Path;

use crate::ask::{not_understood, version_numbers};
use crate::driver::{ProbeError, VmmFacts, VmmFeature};

/// The oldest whose API knows everything that every VM needs, and lets a saved one go on with another TAP.
const LEAST: (u32, u32) = (1, 12);
const LEAST_TEXT: &str = "1.12";
/// The first with virtio-pmem and with free page reporting in its balloon.
const PMEM: (u32, u32) = (1, 14);

/// From the first on that keeps everything from a guest's vsock after a pause until the guest has taken note of a reset, to the
/// last that does so also where there was none to take note of (its issue 6074, mended by its change 6100).
const DEAF: ((u32, u32), u32) = ((1, 16), 1);

/// What a Firecracker can do, as far as requests depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirecrackerFacts {
    /// Its version, such as `1.16.1`.
    pub version: String,
    /// It has virtio-pmem.
    pub pmem: bool,
    /// Guests can give pages back.
    pub page_reporting: bool,
    /// Its guest hears nothing over vsock after a pause in which it was not saved.
    pub deaf_after_pause: bool,
}

impl FirecrackerFacts {
    /// Reads what `program` says to `--version`: `Firecracker v1.16.1`.
    pub fn read(program: &Path, said: &str) -> Result<Self, ProbeError> {
        let mut words = said.lines().next().unwrap_or_default().split_ascii_whitespace();
        let (name, version) = (words.next(), words.next());
        let numbers = version.and_then(version_numbers);
        let (Some("Firecracker"), Some(version), Some(numbers)) = (name, version, numbers) else {
            return Err(not_understood(program, said));
        };
        let version = version.strip_prefix('v').unwrap_or(version).to_owned();
        if numbers < LEAST {
            return Err(ProbeError::TooOld {
                program: program.to_owned(),
                version,
                least: LEAST_TEXT,
            });
        }
        Ok(Self {
            pmem: numbers >= PMEM,
            page_reporting: numbers >= PMEM,
            deaf_after_pause: numbers == DEAF.0 && third_number(&version) <= DEAF.1,
            version,
        })
    }

    /// The same in the words that all VMMs share.
    pub fn to_vmm_facts(&self, program: &Path) -> VmmFacts {
        let mut features = BTreeSet::from([
            VmmFeature::Kvm,
            VmmFeature::HybridVsock,
            VmmFeature::ResizeDisk,
            VmmFeature::Snapshots,
        ]);
        if self.pmem {
            features.insert(VmmFeature::Pmem);
        }
        VmmFacts {
            kind: super::driver::KIND.into(),
            version: self.version.clone(),
            program: program.to_owned(),
            features,
        }
    }
}

/// The `1` of `1.16.1`; 0 where it says none.
fn third_number(version: &str) -> u32 {
    let third = version.split('.').nth(2).unwrap_or_default();
    let end = third.find(|c: char| !c.is_ascii_digit()).unwrap_or(third.len());
    third[..end].parse().unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn newest() -> FirecrackerFacts {
        FirecrackerFacts {
            version: "1.16.1".into(),
            pmem: true,
            page_reporting: true,
            deaf_after_pause: true,
        }
    }

    #[test]
    fn versions_tell_what_there_is() {
        let read = |said: &str| FirecrackerFacts::read(Path::new("/fc"), said);
        let said = "Firecracker v1.16.1\n\n2026-11-21T20:57:00 [anonymous-instance:main] Firecracker exiting successfully.";
        assert_eq!(read(said).unwrap(), newest());
        let old = read("Firecracker v1.13.2\n").unwrap();
        assert!(!old.pmem && !old.page_reporting && !old.deaf_after_pause);
        for (version, deaf) in [
            ("1.15.1", false),
            ("1.16.0", true),
            ("1.16.2", false),
            ("1.17.0-dev", false),
        ] {
            let facts = read(&format!("Firecracker v{version}\n")).unwrap();
            assert_eq!(facts.deaf_after_pause, deaf, "{version}");
        }
        assert!(matches!(
            read("Firecracker v1.11.0\n"),
            Err(ProbeError::TooOld { .. })
        ));
        for bad in ["", "Firecracker", "Firecracker vX", "cloud-hypervisor v53.0"] {
            assert!(matches!(read(bad), Err(ProbeError::Answer { .. })), "{bad}");
        }
        let features = |facts: &FirecrackerFacts| facts.to_vmm_facts(Path::new("/fc")).features;
        assert!(features(&newest()).contains(&VmmFeature::Pmem));
        assert!(!features(&old).contains(&VmmFeature::Pmem));
        assert!(!features(&newest()).contains(&VmmFeature::Virtiofs));
    }
}
