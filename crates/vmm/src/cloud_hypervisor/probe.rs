//! What a Cloud Hypervisor can do follows from its version. Pure.

use std::collections::BTreeSet;
use std::path::Path;

use crate::ask::{not_understood, version_numbers};
use crate::driver::{ProbeError, VmmFacts, VmmFeature};

/// The first with `--disk image_type=`. Before, it looks at the first bytes of a disk, which are its guest's to write,
/// for whether it is a QCOW2 image that names other files of the host.
const LEAST: (u32, u32) = (51, 0);
const LEAST_TEXT: &str = "51.0";

/// What a Cloud Hypervisor can do, as far as command lines depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudHypervisorFacts {
    /// Its version, such as `53.0`.
    pub version: String,
}

impl CloudHypervisorFacts {
    /// Reads what `program` says to `--version`: `cloud-hypervisor v53.0`.
    pub fn read(program: &Path, said: &str) -> Result<Self, ProbeError> {
        let mut words = said.lines().next().unwrap_or_default().split_ascii_whitespace();
        let (name, version) = (words.next(), words.next());
        let numbers = version.and_then(version_numbers);
        let (Some("cloud-hypervisor"), Some(version), Some(numbers)) = (name, version, numbers) else {
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
        Ok(Self { version })
    }

    /// The same in the words that all VMMs share.
    pub fn to_vmm_facts(&self, program: &Path) -> VmmFacts {
        VmmFacts {
            kind: super::driver::KIND.into(),
            version: self.version.clone(),
            program: program.to_owned(),
            features: BTreeSet::from([
                VmmFeature::Kvm,
                VmmFeature::Pmem,
                VmmFeature::Virtiofs,
                VmmFeature::HybridVsock,
                VmmFeature::ResizeDisk,
                VmmFeature::Snapshots,
            ]),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn newest() -> CloudHypervisorFacts {
        CloudHypervisorFacts {
            version: "53.0".into(),
        }
    }

    #[test]
    fn versions_tell_what_there_is() {
        let read = |said: &str| CloudHypervisorFacts::read(Path::new("/ch"), said);
        assert_eq!(read("cloud-hypervisor v53.0\n").unwrap(), newest());
        let of_51 = read("cloud-hypervisor v51.1-12-gabc\n").unwrap();
        assert_eq!(of_51.version, "51.1-12-gabc");
        assert!(matches!(
            read("cloud-hypervisor v50.0\n"),
            Err(ProbeError::TooOld { .. })
        ));
        for bad in [
            "",
            "cloud-hypervisor",
            "cloud-hypervisor vX",
            "QEMU emulator version 7.2",
        ] {
            assert!(matches!(read(bad), Err(ProbeError::Answer { .. })), "{bad}");
        }
        let features = newest().to_vmm_facts(Path::new("/ch")).features;
        assert!(!features.contains(&VmmFeature::Tcg) && !features.contains(&VmmFeature::VirtioSerial));
    }
}
