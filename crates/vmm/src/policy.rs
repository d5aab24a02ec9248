//! Which VMM a VM gets: a pure function of what is known and what is asked.
//!
//! ```text
//! asked for by name   it, or a refusal that says what is missing and how to get it
//! auto                the first of the configured order that can do it; whatever stands before it is passed over, with a reason
//! ```
//!
//! Where KVM is not native (absent, or it interprets its guests), `auto` takes one that emulates. One that needs KVM can still
//! be asked for by name as long as there is any KVM: the reasons then say what that costs.

use offshoot_model::{ErrorKind, Explain, VmmRequest};

use crate::driver::{VmmFacts, VmmFeature};
use crate::plan::{Accel, AgentChannel};

/// The name of the driver that a request names; `None` for one that names none.
pub fn name_of(request: VmmRequest) -> Option<&'static str> {
    match request {
        VmmRequest::Auto => None,
        VmmRequest::Qemu => Some("qemu"),
        VmmRequest::CloudHypervisor => Some("cloud-hypervisor"),
        VmmRequest::Firecracker => Some("firecracker"),
    }
}

/// How the driver `kind` runs guests and reaches their agents, where `host` is how this host runs guests best.
pub fn ways(kind: &str, host: Accel) -> (Accel, AgentChannel) {
    // Their vsock is a Unix socket of each VM's own, so every guest may have the same address.
    let vsock = AgentChannel::HybridVsock {
        cid: 3,
        port: AgentChannel::VSOCK_PORT,
    };
    match kind {
        "cloud-hypervisor" | "firecracker" => (Accel::Kvm, vsock),
        _ => (host, AgentChannel::VirtioSerial),
    }
}

/// What a driver's program is, or why it cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// [`crate::Driver::kind`].
    pub kind: &'static str,
    /// What it can do.
    pub facts: Result<VmmFacts, Missing>,
}

/// Something that is not there, and how to get it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What is missing.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

/// What this host offers for running guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// KVM runs guests on the processor itself.
    pub kvm_native: bool,
    /// What keeps unprivileged VMMs from any KVM.
    pub no_kvm: Option<Missing>,
    /// What keeps unprivileged VMMs from opening their own TAPs.
    pub no_tun: Option<Missing>,
    /// What the probe of KVM saw.
    pub kvm_explanation: String,
}

/// What the guest's kernel can do, as far as VMMs depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelVmmFacts {
    /// `uname -r`.
    pub release: String,
    /// Sockets to the host.
    pub vsock: bool,
    /// virtio devices on MMIO.
    pub mmio: bool,
}

/// What a VM needs of its VMM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Shared folders, or a root that is one.
    pub virtiofs: bool,
    /// A root on persistent memory.
    pub pmem: bool,
    /// A place on a network.
    pub network: bool,
}

/// What was decided, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmmDecision {
    /// The driver's name.
    pub chosen: &'static str,
    /// How it runs guests.
    pub accel: Accel,
    /// Why this one; and what it costs, where it costs something.
    pub reasons: Vec<String>,
    /// The others in their order, each with the reason why not.
    pub passed_over: Vec<(&'static str, String)>,
}

/// A VMM that was asked for by name and cannot work here, or none that can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VmmRefusal {
    /// The one that was asked for.
    #[error("the VM cannot run on {asked}: {missing}")]
    Asked {
        /// Its name.
        asked: &'static str,
        /// What is missing.
        missing: String,
        /// What to do about it.
        remedy: String,
    },
    /// All of them.
    #[error("no VMM can run this VM: {}", passed_over.iter().map(|(kind, why)| format!("{kind}: {why}")).collect::<Vec<_>>().join("; "))]
    None {
        /// Each with the reason why not.
        passed_over: Vec<(&'static str, String)>,
        /// What to do about the first.
        remedy: String,
    },
}

impl Explain for VmmRefusal {
    fn kind(&self) -> ErrorKind {
        ErrorKind::NotPossible
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Asked { remedy, .. } | Self::None { remedy, .. } => vec![remedy.clone()],
        }
    }
}

/// What keeps a VMM from running the VM, if anything.
fn obstacle(
    candidate: &Candidate,
    needs: Needs,
    host: &HostFacts,
    kernel: &KernelVmmFacts,
) -> Option<Missing> {
    let facts = match &candidate.facts {
        Ok(facts) => facts,
        Err(missing) => return Some(missing.clone()),
    };
    let has = |feature| facts.features.contains(&feature);
    let name = format!("{} {}", facts.kind, facts.version);
    let missing = |what: String, remedy: &str| {
        Some(Missing {
            what,
            remedy: remedy.to_owned(),
        })
    };
    const OTHER: &str = "choose another VMM with `--vmm`, or leave `--vmm` out";
    const OTHER_KERNEL: &str = "add one that has it with `offshoot kernel add --distro`, or use `--vmm qemu`";
    if needs.virtiofs && !has(VmmFeature::Virtiofs) {
        return missing(
            format!("{name} has no virtiofs, which `-v` and `--root virtiofs` need"),
            OTHER,
        );
    }
    if needs.pmem && !has(VmmFeature::Pmem) {
        return missing(
            format!("{name} has no virtio-pmem, which `--root pmem` needs"),
            OTHER,
        );
    }
    if !has(VmmFeature::VirtioSerial) {
        if !has(VmmFeature::HybridVsock) {
            return missing(format!("{name} has no way to the agent"), OTHER);
        }
        if !kernel.vsock {
            return missing(format!("kernel {} has no vsock", kernel.release), OTHER_KERNEL);
        }
    }
    if candidate.kind == "firecracker" && !kernel.mmio {
        return missing(
            format!("kernel {} has no virtio on MMIO", kernel.release),
            OTHER_KERNEL,
        );
    }
    // It opens its TAP by name; the others inherit theirs.
    if candidate.kind == "firecracker"
        && needs.network
        && let Some(no_tun) = &host.no_tun
    {
        return Some(no_tun.clone());
    }
    if !has(VmmFeature::Tcg)
        && let Some(no_kvm) = &host.no_kvm
    {
        return Some(Missing {
            what: format!("it needs KVM, and {}", no_kvm.what),
            remedy: no_kvm.remedy.clone(),
        });
    }
    if !has(VmmFeature::Kvm) && !has(VmmFeature::Tcg) {
        return missing(
            format!("{name} was built without KVM and without emulation"),
            OTHER,
        );
    }
    None
}

/// How a VMM that can run the VM runs it.
fn accel(candidate: &Candidate, host: &HostFacts) -> Accel {
    let has = |feature| matches!(&candidate.facts, Ok(facts) if facts.features.contains(&feature));
    if has(VmmFeature::Kvm) && (host.kvm_native && host.no_kvm.is_none() || !has(VmmFeature::Tcg)) {
        Accel::Kvm
    } else {
        Accel::Tcg
    }
}

/// Decides which VMM a VM gets. `candidates` stand in the order of their preference.
pub fn decide(
    request: VmmRequest,
    candidates: &[Candidate],
    needs: Needs,
    host: &HostFacts,
    kernel: &KernelVmmFacts,
) -> Result<VmmDecision, VmmRefusal> {
    if let Some(asked) = name_of(request) {
        let candidate = candidates.iter().find(|candidate| candidate.kind == asked);
        let candidate = candidate.ok_or_else(|| VmmRefusal::Asked {
            asked,
            missing: "this offshootd has no driver for it".to_owned(),
            remedy: "see `offshoot system info` for those it has".to_owned(),
        })?;
        if let Some(Missing { what, remedy }) = obstacle(candidate, needs, host, kernel) {
            return Err(VmmRefusal::Asked {
                asked,
                missing: what,
                remedy,
            });
        }
        let accel = accel(candidate, host);
        let mut reasons = vec!["asked for".to_owned(), how(accel, host)];
        if accel == Accel::Kvm && !host.kvm_native {
            reasons.push("KVM here is far slower than a processor: good for trying, not for work".to_owned());
        }
        return Ok(VmmDecision {
            chosen: candidate.kind,
            accel,
            reasons,
            passed_over: Vec::new(),
        });
    }
    let against = |candidate: &Candidate| {
        obstacle(candidate, needs, host, kernel).or_else(|| {
            let slow = accel(candidate, host) == Accel::Kvm && !host.kvm_native;
            slow.then(|| Missing {
                what: "it needs KVM, which is not native here".to_owned(),
                remedy: "ask for it with `--vmm` all the same, or run `offshoot doctor`".to_owned(),
            })
        })
    };
    let passed_over = |chosen: Option<&str>| {
        let others = candidates.iter().filter(|other| Some(other.kind) != chosen);
        let why = |other: &Candidate| {
            against(other).map_or_else(|| "it comes later in the order".to_owned(), |m| m.what)
        };
        others.map(|other| (other.kind, why(other))).collect()
    };
    match candidates.iter().find(|candidate| against(candidate).is_none()) {
        Some(candidate) => {
            let accel = accel(candidate, host);
            Ok(VmmDecision {
                chosen: candidate.kind,
                accel,
                reasons: vec![
                    "the first in the order that can run it".to_owned(),
                    how(accel, host),
                ],
                passed_over: passed_over(Some(candidate.kind)),
            })
        }
        None => Err(VmmRefusal::None {
            passed_over: passed_over(None),
            remedy: candidates
                .iter()
                .find_map(against)
                .map_or_else(|| "run `offshoot doctor`".to_owned(), |missing| missing.remedy),
        }),
    }
}

fn how(accel: Accel, host: &HostFacts) -> String {
    let how = match accel {
        Accel::Kvm => "on KVM",
        Accel::Tcg => "emulated in software",
    };
    format!("{how}: {}", host.kvm_explanation)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn candidate(kind: &'static str, features: &[VmmFeature]) -> Candidate {
        Candidate {
            kind,
            facts: Ok(VmmFacts {
                kind: kind.into(),
                version: "1".into(),
                program: "/p".into(),
                features: features.iter().copied().collect(),
            }),
        }
    }

    fn all() -> Vec<Candidate> {
        use VmmFeature::{HybridVsock, Kvm, Pmem, Tcg, VirtioSerial, Virtiofs};
        vec![
            candidate("firecracker", &[Kvm, HybridVsock, Pmem]),
            candidate("cloud-hypervisor", &[Kvm, HybridVsock, Pmem, Virtiofs]),
            candidate("qemu", &[Kvm, Tcg, VirtioSerial, Pmem, Virtiofs]),
        ]
    }

    fn native() -> HostFacts {
        HostFacts {
            kvm_native: true,
            no_kvm: None,
            no_tun: None,
            kvm_explanation: "measured".into(),
        }
    }

    fn interpreting() -> HostFacts {
        HostFacts {
            kvm_native: false,
            ..native()
        }
    }

    fn absent() -> HostFacts {
        HostFacts {
            kvm_native: false,
            no_kvm: Some(Missing {
                what: "there is no /dev/kvm".into(),
                remedy: "load the module".into(),
            }),
            ..native()
        }
    }

    fn kernel() -> KernelVmmFacts {
        KernelVmmFacts {
            release: "6.12".into(),
            vsock: true,
            mmio: true,
        }
    }

    const VIRTIOFS: Needs = Needs {
        virtiofs: true,
        pmem: false,
        network: false,
    };

    #[test]
    fn auto_takes_the_first_that_can_and_says_why_not_the_others() {
        let check = |host: &HostFacts, needs, kernel: &KernelVmmFacts, expected: &[(&str, &str)], accel| {
            let decision = decide(VmmRequest::Auto, &all(), needs, host, kernel).unwrap();
            let (chosen, others) = expected.split_first().unwrap();
            assert_eq!((decision.chosen, decision.accel), (chosen.0, accel));
            let said: Vec<_> = decision.passed_over.iter().map(|(kind, _)| *kind).collect();
            assert_eq!(said, others.iter().map(|(kind, _)| *kind).collect::<Vec<_>>());
            for ((_, why), (_, words)) in decision.passed_over.iter().zip(others) {
                assert!(why.contains(words), "{why}");
            }
        };
        let none = Needs::default();
        check(
            &native(),
            none,
            &kernel(),
            &[
                ("firecracker", ""),
                ("cloud-hypervisor", "later"),
                ("qemu", "later"),
            ],
            Accel::Kvm,
        );
        check(
            &native(),
            VIRTIOFS,
            &kernel(),
            &[
                ("cloud-hypervisor", ""),
                ("firecracker", "virtiofs"),
                ("qemu", "later"),
            ],
            Accel::Kvm,
        );
        check(
            &interpreting(),
            none,
            &kernel(),
            &[
                ("qemu", ""),
                ("firecracker", "not native"),
                ("cloud-hypervisor", "not native"),
            ],
            Accel::Tcg,
        );
        check(
            &absent(),
            none,
            &kernel(),
            &[
                ("qemu", ""),
                ("firecracker", "there is no /dev/kvm"),
                ("cloud-hypervisor", "there is no /dev/kvm"),
            ],
            Accel::Tcg,
        );
        let plain = KernelVmmFacts {
            vsock: false,
            ..kernel()
        };
        check(
            &native(),
            none,
            &plain,
            &[
                ("qemu", ""),
                ("firecracker", "vsock"),
                ("cloud-hypervisor", "vsock"),
            ],
            Accel::Kvm,
        );
    }

    #[test]
    fn what_is_asked_for_is_done_or_refused() {
        let ask = |request, needs, host: &HostFacts| decide(request, &all(), needs, host, &kernel());
        let decision = ask(VmmRequest::Firecracker, Needs::default(), &interpreting()).unwrap();
        assert_eq!((decision.chosen, decision.accel), ("firecracker", Accel::Kvm));
        assert!(
            decision.reasons.iter().any(|reason| reason.contains("slower")),
            "{decision:?}"
        );
        let decision = ask(VmmRequest::Qemu, VIRTIOFS, &interpreting()).unwrap();
        assert_eq!((decision.chosen, decision.accel), ("qemu", Accel::Tcg));
        let error = ask(VmmRequest::Firecracker, VIRTIOFS, &native()).unwrap_err();
        assert!(
            error.to_string().contains("firecracker 1 has no virtiofs"),
            "{error}"
        );
        let error = ask(VmmRequest::CloudHypervisor, Needs::default(), &absent()).unwrap_err();
        assert_eq!(error.hints(), ["load the module"]);
        let error = decide(VmmRequest::CloudHypervisor, &[], VIRTIOFS, &native(), &kernel()).unwrap_err();
        assert!(error.to_string().contains("no driver"), "{error}");
        let closed = HostFacts {
            no_tun: absent().no_kvm,
            ..native()
        };
        let network = Needs {
            network: true,
            ..Needs::default()
        };
        assert!(ask(VmmRequest::Firecracker, network, &closed).is_err());
        assert!(ask(VmmRequest::Firecracker, Needs::default(), &closed).is_ok());
        assert!(ask(VmmRequest::CloudHypervisor, network, &closed).is_ok());
        let missing = Missing {
            what: "`/f` is not installed".into(),
            remedy: "set `firecracker`".into(),
        };
        let gone = [Candidate {
            kind: "firecracker",
            facts: Err(missing),
        }];
        let error = decide(
            VmmRequest::Firecracker,
            &gone,
            Needs::default(),
            &native(),
            &kernel(),
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the VM cannot run on firecracker: `/f` is not installed"
        );
        let error = decide(VmmRequest::Auto, &gone, Needs::default(), &native(), &kernel()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no VMM can run this VM: firecracker: `/f` is not installed"
        );
        assert_eq!(error.hints(), ["set `firecracker`"]);
    }

    fn any_features() -> impl Strategy<Value = BTreeSet<VmmFeature>> {
        use VmmFeature::{HybridVsock, Kvm, Pmem, Tcg, VirtioSerial, Virtiofs};
        prop::collection::btree_set(
            prop::sample::select(vec![Kvm, Tcg, Pmem, Virtiofs, VirtioSerial, HybridVsock]),
            0..7,
        )
    }

    proptest! {
        #[test]
        fn nobody_gets_what_cannot_do_it(
            features in prop::collection::vec(any_features(), 3),
            (virtiofs, pmem, kvm_native, kvm, vsock, mmio) in any::<(bool, bool, bool, bool, bool, bool)>(),
            request in prop::sample::select(vec![
                VmmRequest::Auto, VmmRequest::Qemu, VmmRequest::CloudHypervisor, VmmRequest::Firecracker,
            ]),
        ) {
            let kinds = ["firecracker", "cloud-hypervisor", "qemu"];
            let candidates: Vec<_> = kinds.into_iter().zip(&features)
                .map(|(kind, features)| candidate(kind, &features.iter().copied().collect::<Vec<_>>())).collect();
            let host = HostFacts { kvm_native: kvm_native && kvm, no_kvm: if kvm { None } else { absent().no_kvm }, ..native() };
            let kernel = KernelVmmFacts { vsock, mmio, ..kernel() };
            let needs = Needs { virtiofs, pmem, network: false };
            match decide(request, &candidates, needs, &host, &kernel) {
                Ok(decision) => {
                    let at = kinds.iter().position(|kind| *kind == decision.chosen).unwrap();
                    let has = |feature| features[at].contains(&feature);
                    prop_assert!(!virtiofs || has(VmmFeature::Virtiofs));
                    prop_assert!(!pmem || has(VmmFeature::Pmem));
                    prop_assert!(has(VmmFeature::VirtioSerial) || (vsock && has(VmmFeature::HybridVsock)));
                    match decision.accel {
                        Accel::Kvm => prop_assert!(kvm && has(VmmFeature::Kvm)),
                        Accel::Tcg => prop_assert!(has(VmmFeature::Tcg)),
                    }
                    if request == VmmRequest::Auto {
                        prop_assert_eq!(decision.passed_over.len(), 2);
                        prop_assert!(decision.accel == Accel::Tcg || host.kvm_native);
                    }
                }
                Err(error) => prop_assert!(!error.hints()[0].is_empty()),
            }
        }
    }
}
