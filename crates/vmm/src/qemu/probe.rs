//! What the installed QEMU is: it is asked, and what it says is read. The reading is pure.

use std::collections::BTreeSet;
use std::path::Path;

use crate::ask::{ask, not_understood, version_numbers};
use crate::driver::{ProbeError, VmmFacts, VmmFeature};

/// What a QEMU can do, as far as command lines depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuFacts {
    /// Its version, such as `7.2.22`.
    pub version: String,
    /// It has the `microvm` machine.
    pub microvm: bool,
    /// It was built with KVM (which says nothing about `/dev/kvm`).
    pub kvm: bool,
    /// It was built with its translator.
    pub tcg: bool,
    /// It has `virtio-pmem-pci`.
    pub pmem: bool,
    /// It has `vhost-user-fs-pci`.
    pub virtiofs: bool,
    /// The rate of the host's time-stamp counter, which is the guest's without KVM.
    pub tsc_khz: Option<u64>,
}

/// The first version with seccomp, `microvm,pcie=on` and `-blockdev` as the command line uses them that we test.
const LEAST: (u32, u32) = (7, 2);
const LEAST_TEXT: &str = "7.2";
const PACKAGE: &str = "qemu-system-x86";

/// Asks a QEMU four questions at the same time.
pub(crate) async fn probe(program: &Path, env: &[(String, String)]) -> Result<QemuFacts, ProbeError> {
    let ask = |words: &'static [&'static str]| ask(program, PACKAGE, env, words);
    let tsc = tokio::task::spawn_blocking(offshoot_sys::tsc::khz);
    let (version, machines, accels, devices) = tokio::try_join!(
        ask(&["-version"]),
        ask(&["-machine", "help"]),
        ask(&["-accel", "help"]),
        ask(&["-device", "help"]),
    )?;
    let version = read_version(&version).ok_or_else(|| not_understood(program, &version))?;
    if !new_enough(&version) {
        return Err(ProbeError::TooOld {
            program: program.to_owned(),
            version,
            least: LEAST_TEXT,
        });
    }
    Ok(QemuFacts {
        version,
        microvm: has_first_word(&machines, "microvm"),
        kvm: has_first_word(&accels, "kvm"),
        tcg: has_first_word(&accels, "tcg"),
        pmem: has_device(&devices, "virtio-pmem-pci"),
        virtiofs: has_device(&devices, "vhost-user-fs-pci"),
        // Not measured is not known.
        tsc_khz: tsc.await.ok().flatten(),
    })
}

/// `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)`.
fn read_version(said: &str) -> Option<String> {
    let (_, rest) = said.lines().next()?.split_once(" version ")?;
    let version = rest.split_ascii_whitespace().next()?;
    version_numbers(version).map(|_| version.to_owned())
}

fn new_enough(version: &str) -> bool {
    version_numbers(version).is_some_and(|found| found >= LEAST)
}

fn has_first_word(list: &str, word: &str) -> bool {
    list.lines()
        .any(|line| line.split_ascii_whitespace().next() == Some(word))
}

/// Lines such as `name "virtio-pmem-pci", bus PCI, alias "virtio-pmem"`.
fn has_device(list: &str, device: &str) -> bool {
    let start = format!("name \"{device}\",");
    list.lines().any(|line| line.starts_with(&start))
}

impl QemuFacts {
    /// The same in the words that all VMMs share.
    pub(crate) fn to_vmm_facts(&self, program: &Path) -> VmmFacts {
        let features = [
            (self.kvm, VmmFeature::Kvm),
            (self.tcg, VmmFeature::Tcg),
            (self.pmem, VmmFeature::Pmem),
            (self.virtiofs, VmmFeature::Virtiofs),
            (true, VmmFeature::VirtioSerial),
            (true, VmmFeature::ResizeDisk),
            (true, VmmFeature::Snapshots),
        ];
        let features: BTreeSet<_> = features
            .into_iter()
            .filter(|(has, _)| *has)
            .map(|(_, f)| f)
            .collect();
        VmmFacts {
            kind: super::driver::KIND.into(),
            version: self.version.clone(),
            program: program.to_owned(),
            features,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Debian 12's QEMU.
    pub(crate) fn debian_12() -> QemuFacts {
        QemuFacts {
            version: "7.2.22".into(),
            microvm: true,
            kvm: true,
            tcg: true,
            pmem: true,
            virtiofs: true,
            tsc_khz: Some(2_445_424),
        }
    }

    #[test]
    fn versions_are_read() {
        let check = |said: &str, expected: Option<(&str, bool)>| {
            let found = read_version(said);
            assert_eq!(found.as_deref().map(|v| (v, new_enough(v))), expected, "{said}");
        };
        check(
            "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright",
            Some(("7.2.22", true)),
        );
        check("QEMU emulator version 10.0.2", Some(("10.0.2", true)));
        check("QEMU emulator version 5.2.0 (x)", Some(("5.2.0", false)));
        check("QEMU emulator version x", None);
        check("hello", None);
        check("", None);
    }

    #[test]
    fn lists_are_read() {
        let devices =
            "Storage devices:\nname \"virtio-pmem-pci\", bus PCI, alias \"virtio-pmem\"\nname \"x\"\n";
        assert!(has_device(devices, "virtio-pmem-pci"));
        assert!(!has_device(devices, "virtio-pmem"));
        assert!(has_first_word(
            "Supported machines are:\nmicrovm              microvm (i386)\n",
            "microvm"
        ));
        assert!(!has_first_word("q35   microvm", "microvm"));
    }

    #[tokio::test]
    async fn a_program_that_is_no_qemu_is_called_so() {
        let probe = |program: &'static str| async move { probe(Path::new(program), &[]).await.unwrap_err() };
        assert!(matches!(probe("/no/such/qemu").await, ProbeError::Missing { .. }));
        assert!(matches!(probe("/bin/echo").await, ProbeError::Answer { .. }));
        assert!(matches!(probe("/bin/false").await, ProbeError::Answer { .. }));
        assert!(matches!(probe("/etc/passwd").await, ProbeError::Run { .. }));
    }
}
