//! Which root back end a VM gets: a pure function of what is known and what is asked.
//!
//! ```text
//! asked for by name   it, or a refusal that says what is missing and how to get it
//! auto                the first that works; whatever stands before it is passed over, with a reason
//!
//!   pmem      one copy of the root in the host's memory for all VMs
//!   block     one copy on disk; each guest caches what it reads once more
//!   virtiofs  as block, and every look-up asks a process on the host
//!   copy      a private disk: the last resort
//! ```
//!
//! A shared root is never given up silently, and nobody gets a copy by accident.

use std::fmt;
use std::str::FromStr;

use offshoot_model::{ByteSize, ErrorKind, Explain, RootRequest};

/// How a guest sees its root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RootKind {
    /// `root.erofs` as virtio-pmem, mounted with DAX.
    Pmem,
    /// `root.erofs` as a read-only virtio-blk disk.
    Block,
    /// The base's tree, shared read-only by a virtiofsd.
    Virtiofs,
    /// A private ext4 with the whole tree.
    Copy,
}

impl RootKind {
    /// Every kind, best first.
    pub const ALL: [Self; 4] = [Self::Pmem, Self::Block, Self::Virtiofs, Self::Copy];

    /// Its name, as users write it and as it is stored with a VM.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pmem => "pmem",
            Self::Block => "block",
            Self::Virtiofs => "virtiofs",
            Self::Copy => "copy",
        }
    }

    /// Whether it needs the base's tree on disk.
    pub fn needs_tree(self) -> bool {
        matches!(self, Self::Virtiofs | Self::Copy)
    }
}

impl fmt::Display for RootKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A name that is no root back end's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no root back end")]
pub struct UnknownRootKind {
    /// The name.
    pub name: String,
}

impl FromStr for RootKind {
    type Err = UnknownRootKind;

    fn from_str(name: &str) -> Result<Self, UnknownRootKind> {
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == name);
        found.ok_or_else(|| UnknownRootKind {
            name: name.to_owned(),
        })
    }
}

/// Something that is not there, and how to get it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What is missing.
    pub what: String,
    /// What to do about it.
    pub remedy: String,
}

/// What the VMM can do, as far as roots depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmmRootFacts {
    /// Its name and version, for people.
    pub name: String,
    /// It has virtio-pmem.
    pub pmem: bool,
    /// It has virtiofs.
    pub virtiofs: bool,
    /// Why a machine with persistent memory boots notably slower than one without, where it does.
    pub pmem_slows_boot: Option<String>,
}

/// What the guest's kernel can do, as far as roots depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRootFacts {
    /// `uname -r`.
    pub release: String,
    /// It has drivers for virtio-pmem.
    pub pmem: bool,
    /// It has virtiofs.
    pub virtiofs: bool,
}

/// Everything that the decision depends on but the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootFacts {
    /// The VMM that will run the VM.
    pub vmm: VmmRootFacts,
    /// The kernel it will boot.
    pub kernel: KernelRootFacts,
    /// What the host lacks to run a virtiofsd; nothing when it has one.
    pub no_virtiofsd: Option<Missing>,
    /// The length of `root.erofs`, where the base is there already.
    pub root_size: Option<ByteSize>,
    /// The guest's memory.
    pub memory: ByteSize,
    /// Whether the VM must be restored from a template, whose memory is private to each copy.
    pub from_template: bool,
}

/// What was decided, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootDecision {
    /// The back end.
    pub chosen: RootKind,
    /// Why this one.
    pub reason: String,
    /// The others, best first, each with the reason why not.
    pub passed_over: Vec<(RootKind, String)>,
}

/// A back end that was asked for by name and cannot work here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the root cannot be shown as `{asked}`: {missing}")]
pub struct RootRefusal {
    /// What was asked for.
    pub asked: RootKind,
    /// What is missing.
    pub missing: String,
    /// What to do about it.
    pub remedy: String,
}

impl Explain for RootRefusal {
    fn kind(&self) -> ErrorKind {
        ErrorKind::NotPossible
    }

    fn hints(&self) -> Vec<String> {
        vec![self.remedy.clone()]
    }
}

/// The guest's kernel describes every page of persistent memory in 64 bytes of its own memory (`struct page`).
const BYTES_PER_BYTE_OF_MAP: u64 = 4096 / 64;
/// The share of a guest's memory that may go into that description.
const MAP_SHARE: u64 = 8;

/// What keeps `kind` from working, if anything.
fn obstacle(kind: RootKind, facts: &RootFacts) -> Option<Missing> {
    let missing = |what: String, remedy: &str| {
        Some(Missing {
            what,
            remedy: remedy.to_owned(),
        })
    };
    let (vmm, kernel) = (&facts.vmm, &facts.kernel);
    const OTHER_VMM: &str = "choose another VMM with `--vmm`, or leave `--root` out";
    const OTHER_KERNEL: &str =
        "add one that has it with `offshoot kernel add --distro`, or leave `--root` out";
    match kind {
        RootKind::Block | RootKind::Copy => None,
        RootKind::Pmem => {
            if !vmm.pmem {
                return missing(format!("{} has no virtio-pmem", vmm.name), OTHER_VMM);
            }
            if !kernel.pmem {
                return missing(
                    format!("kernel {} has no driver for virtio-pmem", kernel.release),
                    OTHER_KERNEL,
                );
            }
            let map = facts.root_size?.bytes() / BYTES_PER_BYTE_OF_MAP;
            if map > facts.memory.bytes() / MAP_SHARE {
                return missing(
                    format!(
                        "to describe its pages takes {} of the guest's {}",
                        ByteSize::from_bytes(map),
                        facts.memory
                    ),
                    "give the VM more with `--memory`, or leave `--root` out",
                );
            }
            None
        }
        RootKind::Virtiofs => {
            if !vmm.virtiofs {
                return missing(format!("{} has no virtiofs", vmm.name), OTHER_VMM);
            }
            if !kernel.virtiofs {
                return missing(format!("kernel {} has no virtiofs", kernel.release), OTHER_KERNEL);
            }
            if facts.from_template {
                return missing(
                    "a VM with a shared folder cannot be restored from a template".to_owned(),
                    "use `--boot cold`, or leave `--root` out",
                );
            }
            facts.no_virtiofsd.clone()
        }
    }
}

/// What speaks for a back end, and what against it beside one that stands higher.
fn character(kind: RootKind) -> (&'static str, &'static str) {
    match kind {
        RootKind::Pmem => (
            "one copy of the root in the host's memory for all its VMs",
            "each guest would map the host's copy",
        ),
        RootKind::Block => (
            "one copy of the root on disk for all its VMs, on any VMM",
            "each guest would cache what it reads once more",
        ),
        RootKind::Virtiofs => (
            "one tree on disk for all its VMs",
            "every look-up would ask a process on the host",
        ),
        RootKind::Copy => (
            "no shared root works here",
            "a private copy is the last resort, and a shared root works",
        ),
    }
}

/// Decides how the root is shown.
pub fn decide(request: RootRequest, facts: &RootFacts) -> Result<RootDecision, RootRefusal> {
    let asked = match request {
        RootRequest::Auto => None,
        RootRequest::Pmem => Some(RootKind::Pmem),
        RootRequest::Block => Some(RootKind::Block),
        RootRequest::Virtiofs => Some(RootKind::Virtiofs),
        RootRequest::Copy => Some(RootKind::Copy),
    };
    if let Some(asked) = asked {
        return match obstacle(asked, facts) {
            None => Ok(RootDecision {
                chosen: asked,
                reason: "asked for".to_owned(),
                passed_over: Vec::new(),
            }),
            Some(Missing { what, remedy }) => Err(RootRefusal {
                asked,
                missing: what,
                remedy,
            }),
        };
    }
    let against = |kind| {
        let reserve = match kind {
            RootKind::Pmem => facts.vmm.pmem_slows_boot.clone(),
            _ => None,
        };
        obstacle(kind, facts).map(|missing| missing.what).or(reserve)
    };
    // `block` and `copy` have no obstacle, so there always is one.
    let chosen = RootKind::ALL
        .into_iter()
        .find(|kind| against(*kind).is_none())
        .unwrap_or(RootKind::Copy);
    let others = RootKind::ALL.into_iter().filter(|kind| *kind != chosen);
    Ok(RootDecision {
        chosen,
        reason: character(chosen).0.to_owned(),
        passed_over: others
            .map(|kind| {
                (
                    kind,
                    against(kind).unwrap_or_else(|| character(kind).1.to_owned()),
                )
            })
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn facts() -> RootFacts {
        RootFacts {
            vmm: VmmRootFacts {
                name: "qemu 7.2".into(),
                pmem: true,
                virtiofs: true,
                pmem_slows_boot: None,
            },
            kernel: KernelRootFacts {
                release: "6.12".into(),
                pmem: true,
                virtiofs: true,
            },
            no_virtiofsd: None,
            root_size: Some(ByteSize::from_mib(180)),
            memory: ByteSize::from_mib(512),
            from_template: false,
        }
    }

    type Change = fn(&mut RootFacts);

    #[test]
    fn auto_takes_the_best_that_works_and_says_why_not_the_others() {
        let check = |change: Change, expected: RootKind, said: &str| {
            let mut facts = facts();
            change(&mut facts);
            let decision = decide(RootRequest::Auto, &facts).unwrap();
            assert_eq!(decision.chosen, expected);
            let others: Vec<_> = decision.passed_over.iter().map(|(kind, _)| *kind).collect();
            let rest: Vec<_> = RootKind::ALL
                .into_iter()
                .filter(|kind| *kind != expected)
                .collect();
            assert_eq!(others, rest);
            let reasons: Vec<_> = decision.passed_over.iter().map(|(_, why)| why.as_str()).collect();
            assert!(
                reasons.iter().any(|why| why.contains(said)),
                "{reasons:?} do not say {said:?}"
            );
        };
        check(|_| (), RootKind::Pmem, "cache what it reads once more");
        check(
            |f| f.vmm.pmem = false,
            RootKind::Block,
            "qemu 7.2 has no virtio-pmem",
        );
        check(
            |f| f.kernel.pmem = false,
            RootKind::Block,
            "kernel 6.12 has no driver",
        );
        check(
            |f| f.vmm.pmem_slows_boot = Some("it boots slower".into()),
            RootKind::Block,
            "it boots slower",
        );
        check(
            |f| f.root_size = Some(ByteSize::from_mib(16 << 10)),
            RootKind::Block,
            "256MiB of the guest's 512MiB",
        );
        check(
            |f| (f.vmm.pmem, f.vmm.virtiofs) = (false, false),
            RootKind::Block,
            "has no virtiofs",
        );
    }

    #[test]
    fn what_is_asked_for_is_done_or_refused_with_a_remedy() {
        let check = |request, change: Change, expected: Result<RootKind, (&str, &str)>| {
            let mut facts = facts();
            change(&mut facts);
            let found = decide(request, &facts);
            match expected {
                Ok(kind) => assert_eq!(found.unwrap().chosen, kind),
                Err((what, remedy)) => {
                    let refusal = found.unwrap_err();
                    assert!(
                        refusal.to_string().contains(what),
                        "{refusal} does not say {what:?}"
                    );
                    assert!(
                        refusal.remedy.contains(remedy),
                        "{} does not say {remedy:?}",
                        refusal.remedy
                    );
                }
            }
        };
        use RootRequest as R;
        check(R::Copy, |_| (), Ok(RootKind::Copy));
        check(R::Block, |_| (), Ok(RootKind::Block));
        check(R::Virtiofs, |_| (), Ok(RootKind::Virtiofs));
        // Slower is no obstacle for who asks for it.
        check(
            R::Pmem,
            |f| f.vmm.pmem_slows_boot = Some("slow".into()),
            Ok(RootKind::Pmem),
        );
        check(R::Pmem, |f| f.root_size = None, Ok(RootKind::Pmem));
        check(
            R::Pmem,
            |f| f.vmm.pmem = false,
            Err(("no virtio-pmem", "`--vmm`")),
        );
        check(
            R::Pmem,
            |f| f.kernel.pmem = false,
            Err(("no driver", "kernel add")),
        );
        check(
            R::Pmem,
            |f| f.root_size = Some(ByteSize::from_mib(16 << 10)),
            Err(("256MiB", "--memory")),
        );
        check(
            R::Virtiofs,
            |f| f.vmm.virtiofs = false,
            Err(("no virtiofs", "`--vmm`")),
        );
        check(
            R::Virtiofs,
            |f| f.kernel.virtiofs = false,
            Err(("no virtiofs", "kernel add")),
        );
        check(
            R::Virtiofs,
            |f| f.from_template = true,
            Err(("template", "--boot cold")),
        );
        check(
            R::Virtiofs,
            |f| {
                f.no_virtiofsd = Some(Missing {
                    what: "`virtiofsd` is not installed".into(),
                    remedy: "apt install virtiofsd".into(),
                });
            },
            Err(("not installed", "apt install virtiofsd")),
        );
    }

    proptest! {
        #[test]
        fn a_copy_is_never_chosen_by_itself_and_a_request_never_replaced(
            bits in prop::array::uniform7(any::<bool>()),
            size in prop::option::of(0u64..1 << 40),
            asked in 0usize..5,
        ) {
            let [pmem, virtiofs, slow, kernel_pmem, kernel_virtiofs, no_virtiofsd, from_template] = bits;
            let facts = RootFacts {
                vmm: VmmRootFacts {
                    name: "v".into(), pmem, virtiofs, pmem_slows_boot: slow.then(|| "slow".into()),
                },
                kernel: KernelRootFacts { release: "k".into(), pmem: kernel_pmem, virtiofs: kernel_virtiofs },
                no_virtiofsd: no_virtiofsd.then(|| Missing { what: "w".into(), remedy: "r".into() }),
                root_size: size.map(ByteSize::from_bytes),
                memory: ByteSize::from_mib(512),
                from_template,
            };
            let requests = [
                RootRequest::Auto, RootRequest::Pmem, RootRequest::Block, RootRequest::Virtiofs, RootRequest::Copy,
            ];
            match (asked.checked_sub(1).map(|n| RootKind::ALL[n]), decide(requests[asked], &facts)) {
                (None, found) => prop_assert!(matches!(found.unwrap().chosen, RootKind::Pmem | RootKind::Block)),
                (Some(kind), Ok(found)) => prop_assert_eq!(found.chosen, kind),
                (Some(kind), Err(refusal)) => {
                    prop_assert_eq!(refusal.asked, kind);
                    prop_assert!(!refusal.missing.is_empty() && !refusal.remedy.is_empty());
                }
            }
        }
    }

    #[test]
    fn names_are_read_back() {
        for kind in RootKind::ALL {
            assert_eq!(kind.as_str().parse::<RootKind>(), Ok(kind));
        }
        assert!("floppy".parse::<RootKind>().is_err());
    }
}
