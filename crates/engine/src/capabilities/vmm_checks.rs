//! What this host offers for VMMs: their programs, and `/dev/kvm`. The judging is pure.

use std::path::Path;

use offshoot_model::{Explain as _, Finding, Severity};
use offshoot_sys::kvm::KvmProbe;
use offshoot_sys::programs::is_executable;
use offshoot_vmm::plan::Accel;
use offshoot_vmm::{Driver, ProbeError, VmmFacts, VmmFeature};

use super::finding;
use super::vmm::Accelerator;

const CAPABILITY: &str = "vmm";

/// What one driver's program is.
pub(super) struct Asked {
    kind: &'static str,
    answer: Result<VmmFacts, ProbeError>,
    /// The answer is kept from the first time; the program is not there any more.
    gone: bool,
}

/// Asks a driver what its program is.
pub(super) async fn ask(driver: &dyn Driver) -> Asked {
    let answer = driver.probe().await;
    Asked {
        kind: driver.kind(),
        gone: answer.as_ref().is_ok_and(|facts| !is_executable(&facts.program)),
        answer,
    }
}

/// One finding for each VMM. What is wrong with one is a failure only where no other can do its work.
pub(super) fn judge_vmms(asked: &[Asked], accel: Accel) -> Vec<Finding> {
    let any = asked.iter().any(|vmm| why_not(vmm, accel).is_none());
    let optional = |vmm: &Asked, id: &str| {
        // Nobody has to have all three, and none is to blame for the host's KVM.
        let found = any && id == "vmm-unusable" && vmm.answer.is_ok();
        vmm.kind != "qemu" && (id == "vmm-missing" || found)
    };
    let severity = if any { Severity::Warning } else { Severity::Failure };
    let findings = asked.iter().map(|vmm| match why_not(vmm, accel) {
        None => well(vmm),
        Some((id, message, _)) if optional(vmm, id) => {
            let message = match id {
                "vmm-missing" => format!("{message}; it is needed for `--vmm {}` alone", vmm.kind),
                _ => format!(
                    "{}, which is used when `--vmm` asks for it: KVM is not native here",
                    said(vmm)
                ),
            };
            let state = if id == "vmm-missing" { "absent" } else { "found" };
            Finding::ok(CAPABILITY, message).id(format!("{}-{state}", vmm.kind))
        }
        Some((id, message, hint)) => {
            let cost = if any {
                format!("no VM can be started with {}", vmm.kind)
            } else {
                "no VM can be created or started".to_owned()
            };
            finding(CAPABILITY, severity, message, hint).id(id).cost(cost)
        }
    });
    findings.collect()
}

fn well(vmm: &Asked) -> Finding {
    Finding::ok(CAPABILITY, said(vmm)).id(format!("{}-found", vmm.kind))
}

fn said(vmm: &Asked) -> String {
    vmm.answer.as_ref().map_or_else(
        |_| vmm.kind.to_owned(),
        |facts| format!("{} {} at {}", facts.kind, facts.version, facts.program.display()),
    )
}

/// A device node that unprivileged VMMs open by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// `/dev/kvm`.
    Kvm,
    /// `/dev/net/tun`, where a VMM opens its TAP itself.
    Tun,
}

/// What keeps unprivileged VMMs from a device now, and what mends it.
pub fn closed(device: Device, accelerator: &Accelerator) -> Option<(String, String)> {
    let (path, gid) = match device {
        Device::Kvm => ("/dev/kvm", accelerator.kvm_gid.filter(|gid| *gid != 0)),
        Device::Tun => ("/dev/net/tun", None),
    };
    let probe = &accelerator.probe;
    let Some(node) = KvmNode::of(Path::new(path)) else {
        let hint = match device {
            Device::Kvm => why_emulated(probe).1,
            Device::Tun => "load the module with `modprobe tun`",
        };
        return Some((format!("there is no {path}"), hint.to_owned()));
    };
    if !node.is_open_to(gid) {
        let hint = match device {
            Device::Kvm => "chgrp kvm /dev/kvm && chmod 0660 /dev/kvm, then restart offshootd",
            Device::Tun => "chmod 0666 /dev/net/tun: a TAP is opened by its owner alone",
        };
        let message = format!(
            "unprivileged VMMs cannot open {path} (mode {:04o}, group {})",
            node.mode & 0o7777,
            node.gid
        );
        return Some((message, hint.to_owned()));
    }
    let broken = device == Device::Kvm && !probe.native && probe.loops_per_s <= 0.0;
    broken.then(|| (probe.explanation.clone(), why_emulated(probe).1.to_owned()))
}

/// Why a VMM cannot be used: the finding's id, its message, and what mends it.
fn why_not(vmm: &Asked, accel: Accel) -> Option<(&'static str, String, String)> {
    let key = vmm.kind.replace('-', "_");
    let config = format!("or set `{key}` in the daemon's config (docs/config.md)");
    let facts = match &vmm.answer {
        Ok(facts) => facts,
        Err(error) => {
            let hint = error.hints().into_iter().next().unwrap_or_default();
            let (id, hint) = match error {
                ProbeError::Missing { .. } | ProbeError::NoneOf { .. } => {
                    ("vmm-missing", format!("{hint}, {config}"))
                }
                ProbeError::TooOld { .. } => {
                    ("vmm-old", format!("use the one of Debian 12 or later, {config}"))
                }
                ProbeError::Run { .. } | ProbeError::Timeout { .. } | ProbeError::Answer { .. } => {
                    ("vmm-unusable", format!("run it with `-version`, {config}"))
                }
            };
            return Some((id, super::chain(error), hint));
        }
    };
    let program = facts.program.display();
    if vmm.gone {
        let message = format!("`{program}` is not installed any more");
        return Some((
            "vmm-missing",
            message,
            format!("install {} again, {config}", vmm.kind),
        ));
    }
    let needed = match accel {
        Accel::Kvm => VmmFeature::Kvm,
        Accel::Tcg => VmmFeature::Tcg,
    };
    (!facts.features.contains(&needed)).then(|| {
        let message = match accel {
            Accel::Kvm => format!("`{program}` was built without KVM"),
            Accel::Tcg => format!("`{program}` was built without emulation, and there is no KVM to use"),
        };
        (
            "vmm-unusable",
            message,
            format!("use the distribution's {}, {config}", vmm.kind),
        )
    })
}

/// The device node `/dev/kvm` as it is now.
#[derive(Clone, Copy, Debug)]
pub(super) struct KvmNode {
    pub(super) mode: u32,
    pub(super) gid: u32,
}

impl KvmNode {
    /// Looks at it.
    pub(super) fn look() -> Option<Self> {
        Self::of(Path::new("/dev/kvm"))
    }

    fn of(path: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let meta = std::fs::metadata(path).ok()?;
        Some(Self {
            mode: meta.mode(),
            gid: meta.gid(),
        })
    }

    /// Whether a VMM, whose user is its own, may open it for reading and writing.
    fn is_open_to(self, gid: Option<u32>) -> bool {
        self.mode & 0o006 == 0o006 || (gid == Some(self.gid) && self.mode & 0o060 == 0o060)
    }
}

/// What emulation costs: a boot of a few seconds is what `bench` measures with it.
const EMULATED: &str =
    "guests are emulated in software: they take seconds to boot, and compute many times more slowly";
const NO_START: &str = "no VM can be started";

/// How guests are run, by what was measured when the daemon started, and whether that still stands.
pub(super) fn judge_kvm(accelerator: &Accelerator, node: Option<KvmNode>) -> Finding {
    let probe = &accelerator.probe;
    let measured = probe.explanation.clone();
    let bad = |severity, id, message: String, cost: &str, hint: &str| {
        finding(CAPABILITY, severity, message, hint).id(id).cost(cost)
    };
    match (accelerator.accel, node) {
        (Accel::Kvm, None) => bad(
            Severity::Failure,
            "kvm-gone",
            "/dev/kvm is gone since offshootd started".into(),
            NO_START,
            "load the module again with `modprobe kvm_intel` or `modprobe kvm_amd`, or restart offshootd",
        ),
        (Accel::Kvm, Some(node)) if !node.is_open_to(accelerator.kvm_gid) => bad(
            Severity::Failure,
            "kvm-closed",
            format!(
                "unprivileged VMMs cannot open /dev/kvm (mode {:04o}, group {})",
                node.mode & 0o7777,
                node.gid
            ),
            NO_START,
            "chgrp kvm /dev/kvm && chmod 0660 /dev/kvm, then restart offshootd",
        ),
        (Accel::Kvm, Some(_)) => Finding::ok(CAPABILITY, measured).id("kvm-native"),
        (Accel::Tcg, Some(_)) if !probe.present => bad(
            Severity::Warning,
            "kvm-appeared",
            "there is a /dev/kvm now, which was absent when offshootd started".into(),
            EMULATED,
            "restart offshootd, which then tries it; VMs run on meanwhile",
        ),
        (Accel::Tcg, _) => {
            let (id, hint) = why_emulated(probe);
            bad(Severity::Warning, id, measured, EMULATED, hint)
        }
    }
}

fn why_emulated(probe: &KvmProbe) -> (&'static str, &'static str) {
    if !probe.present {
        return (
            "kvm-absent",
            "turn on virtualisation in the firmware and `modprobe kvm_intel` or `modprobe kvm_amd`; in a cloud, choose a \
             machine with nested virtualisation",
        );
    }
    if !probe.permitted {
        return (
            "kvm-denied",
            "let offshootd open /dev/kvm: run it as root, and in a container with `--device /dev/kvm`",
        );
    }
    if probe.loops_per_s > 0.0 {
        return (
            "kvm-emulated",
            "use a host whose processor offers virtualisation to Linux (`grep -E 'vmx|svm' /proc/cpuinfo`)",
        );
    }
    (
        "kvm-broken",
        "look for what KVM says with `dmesg`, and restart offshootd when it is mended",
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn asked(answer: Result<VmmFacts, ProbeError>, gone: bool) -> Asked {
        Asked {
            kind: "qemu",
            answer,
            gone,
        }
    }

    fn facts(features: &[VmmFeature]) -> VmmFacts {
        VmmFacts {
            kind: "qemu".into(),
            version: "7.2.22".into(),
            program: "/usr/bin/qemu".into(),
            features: features.iter().copied().collect(),
        }
    }

    #[test]
    fn nobody_has_to_have_all_three() {
        let both = [VmmFeature::Kvm, VmmFeature::Tcg];
        let of = |kind, answer| Asked {
            kind,
            ..asked(answer, false)
        };
        let vmms = [
            of("cloud-hypervisor", Err(missing())),
            of("firecracker", Ok(facts(&[VmmFeature::Kvm]))),
            of("qemu", Ok(facts(&both))),
        ];
        let said: Vec<_> = judge_vmms(&vmms, Accel::Tcg)
            .into_iter()
            .map(|found| (found.id, found.severity))
            .collect();
        let expected = ["cloud-hypervisor-absent", "firecracker-found", "qemu-found"];
        assert_eq!(said, expected.map(|id| (id.to_owned(), Severity::Ok)));
        let alone = [of("firecracker", Ok(facts(&[VmmFeature::Kvm])))];
        assert_eq!(judge_vmms(&alone, Accel::Tcg)[0].severity, Severity::Failure);
    }

    fn missing() -> ProbeError {
        ProbeError::Missing {
            program: "/no/such/qemu".into(),
            package: "qemu-system-x86",
        }
    }

    #[test]
    fn each_way_to_have_no_vmm_is_told() {
        let both = [VmmFeature::Kvm, VmmFeature::Tcg];
        let check = |vmms: &[Asked], accel, expected: &[(&str, Severity)]| {
            let findings = judge_vmms(vmms, accel);
            let said: Vec<_> = findings
                .iter()
                .map(|found| (found.id.as_str(), found.severity))
                .collect();
            assert_eq!(said, expected);
            for found in findings.iter().filter(|found| found.severity != Severity::Ok) {
                assert!(!found.cost.is_empty() && !found.hint.is_empty(), "{found:?}");
            }
        };
        use Severity::{Failure, Ok as Well, Warning};
        let well = || asked(Ok(facts(&both)), false);
        check(&[well()], Accel::Tcg, &[("qemu-found", Well)]);
        check(
            &[asked(Err(missing()), false)],
            Accel::Tcg,
            &[("vmm-missing", Failure)],
        );
        check(
            &[asked(Ok(facts(&both)), true)],
            Accel::Tcg,
            &[("vmm-missing", Failure)],
        );
        check(
            &[asked(Ok(facts(&[VmmFeature::Kvm])), false)],
            Accel::Tcg,
            &[("vmm-unusable", Failure)],
        );
        check(
            &[asked(Ok(facts(&[VmmFeature::Tcg])), false)],
            Accel::Kvm,
            &[("vmm-unusable", Failure)],
        );
        let old = ProbeError::TooOld {
            program: PathBuf::from("/q"),
            version: "5.2".into(),
            least: "7.2",
        };
        check(&[asked(Err(old), false)], Accel::Tcg, &[("vmm-old", Failure)]);
        // Where another VMM does its work, one that is missing is no failure.
        check(
            &[well(), asked(Err(missing()), false)],
            Accel::Kvm,
            &[("qemu-found", Well), ("vmm-missing", Warning)],
        );
    }

    #[test]
    fn kvm_is_native_or_costs_something() {
        let probe = |present, permitted, native, loops_per_s| KvmProbe {
            present,
            permitted,
            native,
            loops_per_s,
            explanation: "/dev/kvm makes 1.0 million loops a second".into(),
        };
        let node = |mode, gid| Some(KvmNode { mode, gid });
        let check = |accel, probe: KvmProbe, node, severity, id: &str| {
            let accelerator = Accelerator {
                accel,
                probe,
                kvm_gid: Some(104),
            };
            let found = judge_kvm(&accelerator, node);
            assert_eq!((found.severity, found.id.as_str()), (severity, id));
            let explained = !found.cost.is_empty() && !found.hint.is_empty();
            assert_eq!(explained, severity != Severity::Ok, "{found:?}");
        };
        let native = || probe(true, true, true, 1e9);
        check(
            Accel::Kvm,
            native(),
            node(0o20660, 104),
            Severity::Ok,
            "kvm-native",
        );
        check(Accel::Kvm, native(), node(0o20666, 0), Severity::Ok, "kvm-native");
        check(
            Accel::Kvm,
            native(),
            node(0o20600, 104),
            Severity::Failure,
            "kvm-closed",
        );
        check(
            Accel::Kvm,
            native(),
            node(0o20660, 105),
            Severity::Failure,
            "kvm-closed",
        );
        check(Accel::Kvm, native(), None, Severity::Failure, "kvm-gone");
        let absent = || probe(false, false, false, 0.0);
        check(Accel::Tcg, absent(), None, Severity::Warning, "kvm-absent");
        check(
            Accel::Tcg,
            absent(),
            node(0o20660, 104),
            Severity::Warning,
            "kvm-appeared",
        );
        let denied = probe(true, false, false, 0.0);
        check(
            Accel::Tcg,
            denied,
            node(0o20600, 0),
            Severity::Warning,
            "kvm-denied",
        );
        let emulated = probe(true, true, false, 1e6);
        check(
            Accel::Tcg,
            emulated,
            node(0o20600, 0),
            Severity::Warning,
            "kvm-emulated",
        );
        let broken = probe(true, true, false, 0.0);
        check(
            Accel::Tcg,
            broken,
            node(0o20600, 0),
            Severity::Warning,
            "kvm-broken",
        );
    }
}
