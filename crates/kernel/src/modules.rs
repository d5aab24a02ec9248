//! Which modules a guest needs, in which order and when: a plan, made from what the kernel has.
//!
//! ```text
//! /modules/order             what every boot loads, before anything is mounted
//! /modules/order.<group>     what the agent loads when a device of that kind is there
//! /modules/<name>.ko         uncompressed
//! ```
//!
//! A group's list holds all that the group needs beyond `order`; groups may share modules. The rule for each group is
//! [`ModuleGroup`], and the contract with the agent is in `docs/formats/kernel.md`.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::decompress::DecompressError;
use crate::manifest::KernelFeatures;
use crate::modinfo::Modinfo;
use crate::module_tree::{Lookup, ModuleTree};

/// Why no plan can be made.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// A folder or file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A compressed module does not unpack.
    #[error("cannot unpack the module {}", path.display())]
    Unpack {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: DecompressError,
    },
    /// A `.ko` that is none.
    #[error("{} is not a kernel module for x86-64", path.display())]
    NotAModule {
        /// Which.
        path: PathBuf,
    },
    /// More files or deeper folders than any kernel has.
    #[error("{} is not a tree of kernel modules: it has more than {entries} entries or {depth} levels", path.display())]
    TreeTooLarge {
        /// Where it was noticed.
        path: PathBuf,
        /// The most entries.
        entries: usize,
        /// The most levels.
        depth: usize,
    },
    /// No folder of modules where one was named.
    #[error("{} holds no kernel modules for Linux {release}", path.display())]
    NoTree {
        /// The folder that was named.
        path: PathBuf,
        /// The release of the kernel.
        release: String,
    },
    /// The kernel has something a guest needs neither built in nor as a module.
    #[error("the kernel has no `{name}`, neither built in nor as a module")]
    Missing {
        /// The module.
        name: String,
    },
    /// Neither of two.
    #[error("the kernel has neither `{first}` nor `{second}`, not built in and not as modules")]
    MissingBoth {
        /// The one module.
        first: &'static str,
        /// The other module.
        second: &'static str,
    },
    /// A module was built for another kernel.
    #[error("the module `{name}` is for Linux {found}, the kernel is {expected}")]
    OtherKernel {
        /// The module.
        name: String,
        /// What it was built for.
        found: String,
        /// The kernel's release.
        expected: String,
    },
}

/// When modules are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModuleGroup {
    /// At every boot.
    Base,
    /// When virtio-mmio transports are there (`/sys/bus/acpi/devices/LNRO0005:*`, or `virtio_mmio.device=` in the
    /// kernel's command line): loaded before virtio devices are looked for.
    Mmio,
    /// For virtio device 0x0001.
    Net,
    /// For virtio device 0x0004.
    Rng,
    /// For virtio device 0x0005.
    Balloon,
    /// For virtio device 0x0013.
    Vsock,
    /// For virtio device 0x001a.
    Virtiofs,
    /// For virtio device 0x001b.
    Pmem,
}

impl ModuleGroup {
    /// Every group, in the order in which they are planned.
    pub const ALL: [Self; 8] = [
        Self::Base,
        Self::Mmio,
        Self::Net,
        Self::Rng,
        Self::Balloon,
        Self::Vsock,
        Self::Virtiofs,
        Self::Pmem,
    ];

    /// The name of its list in the initramfs.
    pub fn list_path(self) -> &'static str {
        match self {
            Self::Base => "modules/order",
            Self::Mmio => "modules/order.mmio",
            Self::Net => "modules/order.net",
            Self::Rng => "modules/order.rng",
            Self::Balloon => "modules/order.balloon",
            Self::Vsock => "modules/order.vsock",
            Self::Virtiofs => "modules/order.virtiofs",
            Self::Pmem => "modules/order.pmem",
        }
    }
}

/// How much a module is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// No VM without it.
    Required,
    /// A virtio transport: one of them must be there.
    Transport,
    /// Its group's feature is there only with it.
    Feature,
    /// Faster or more with it.
    Wanted,
}

/// One driver a guest uses: module, option that builds it in, need.
pub(crate) const DRIVERS: [(ModuleGroup, &str, &str, Need); 16] = [
    // Before erofs and ext4, which take the best crc32c there is when they start.
    (
        ModuleGroup::Base,
        "crc32c_generic",
        "CONFIG_CRYPTO_CRC32C",
        Need::Wanted,
    ),
    (
        ModuleGroup::Base,
        "crc32c_intel",
        "CONFIG_CRYPTO_CRC32C_INTEL",
        Need::Wanted,
    ),
    (
        ModuleGroup::Base,
        "virtio_pci",
        "CONFIG_VIRTIO_PCI",
        Need::Transport,
    ),
    (
        ModuleGroup::Base,
        "virtio_blk",
        "CONFIG_VIRTIO_BLK",
        Need::Required,
    ),
    (
        ModuleGroup::Base,
        "virtio_console",
        "CONFIG_VIRTIO_CONSOLE",
        Need::Required,
    ),
    (ModuleGroup::Base, "erofs", "CONFIG_EROFS_FS", Need::Required),
    (ModuleGroup::Base, "overlay", "CONFIG_OVERLAY_FS", Need::Required),
    (ModuleGroup::Base, "ext4", "CONFIG_EXT4_FS", Need::Required),
    (
        ModuleGroup::Mmio,
        "virtio_mmio",
        "CONFIG_VIRTIO_MMIO",
        Need::Transport,
    ),
    (ModuleGroup::Net, "virtio_net", "CONFIG_VIRTIO_NET", Need::Feature),
    (
        ModuleGroup::Rng,
        "virtio_rng",
        "CONFIG_HW_RANDOM_VIRTIO",
        Need::Feature,
    ),
    (
        ModuleGroup::Balloon,
        "virtio_balloon",
        "CONFIG_VIRTIO_BALLOON",
        Need::Feature,
    ),
    (
        ModuleGroup::Vsock,
        "vmw_vsock_virtio_transport",
        "CONFIG_VIRTIO_VSOCKETS",
        Need::Feature,
    ),
    (
        ModuleGroup::Virtiofs,
        "virtiofs",
        "CONFIG_VIRTIO_FS",
        Need::Feature,
    ),
    // The namespace's driver first: the device is usable as soon as virtio_pmem has found it.
    (ModuleGroup::Pmem, "nd_pmem", "CONFIG_BLK_DEV_PMEM", Need::Feature),
    (
        ModuleGroup::Pmem,
        "virtio_pmem",
        "CONFIG_VIRTIO_PMEM",
        Need::Feature,
    ),
];

/// What to load, when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ModulePlan {
    /// Groups with something to load; names in load order.
    pub(crate) groups: Vec<(ModuleGroup, Vec<String>)>,
    /// What works with this kernel.
    pub(crate) features: KernelFeatures,
}

impl ModulePlan {
    /// Every module once, in the order of its first use.
    pub(crate) fn modules(&self) -> Vec<String> {
        let mut seen = BTreeSet::new();
        self.groups
            .iter()
            .flat_map(|(_, names)| names)
            .filter(|name| seen.insert(*name))
            .cloned()
            .collect()
    }
}

/// Plans for a kernel of `release` with the drivers of `tree`.
pub(crate) fn plan(tree: &ModuleTree, release: &str) -> Result<ModulePlan, ModuleError> {
    let mut plan = ModulePlan::default();
    let mut base = Vec::new();
    let mut transports = 0;
    for group in ModuleGroup::ALL {
        let mut names = Vec::new();
        let mut complete = true;
        for (_, name, config, need) in DRIVERS.into_iter().filter(|driver| driver.0 == group) {
            let mut order = Order {
                tree,
                release,
                base: &base,
                names: names.clone(),
                visiting: BTreeSet::new(),
            };
            match order.add(name, Some(config)) {
                Ok(()) => {
                    names = order.names;
                    transports += usize::from(need == Need::Transport);
                    plan.features.pci |= name == "virtio_pci";
                }
                Err(ModuleError::Missing { name: missing }) if need != Need::Required => {
                    tracing::debug!(driver = name, missing, "the kernel lacks an optional driver");
                    complete &= !matches!(need, Need::Feature | Need::Transport);
                }
                Err(error) => return Err(error),
            }
        }
        match group {
            ModuleGroup::Base => base.clone_from(&names),
            ModuleGroup::Mmio => plan.features.mmio = complete,
            ModuleGroup::Net => plan.features.net = complete,
            ModuleGroup::Rng => plan.features.rng = complete,
            ModuleGroup::Balloon => plan.features.balloon = complete,
            ModuleGroup::Vsock => plan.features.vsock = complete,
            ModuleGroup::Virtiofs => plan.features.virtiofs = complete,
            ModuleGroup::Pmem => plan.features.pmem = complete,
        }
        // Half a feature is none.
        if !names.is_empty() && (complete || group == ModuleGroup::Base) {
            plan.groups.push((group, names));
        }
    }
    if transports == 0 {
        return Err(ModuleError::MissingBoth {
            first: "virtio_pci",
            second: "virtio_mmio",
        });
    }
    // Required drivers: the loop has returned without them.
    plan.features.block = true;
    Ok(plan)
}

/// A load order that grows, dependencies first.
struct Order<'a> {
    tree: &'a ModuleTree,
    release: &'a str,
    base: &'a [String],
    names: Vec<String>,
    visiting: BTreeSet<String>,
}

impl Order<'_> {
    fn add(&mut self, name: &str, config: Option<&str>) -> Result<(), ModuleError> {
        let is_there = |names: &[String]| names.iter().any(|there| there == name);
        // Soft dependencies may form circles; hard ones cannot, as the kernel could not load them.
        if is_there(self.base) || is_there(&self.names) || !self.visiting.insert(name.to_owned()) {
            return Ok(());
        }
        match self.tree.lookup(name, config)? {
            Lookup::Builtin => Ok(()),
            Lookup::Missing => Err(ModuleError::Missing {
                name: name.to_owned(),
            }),
            Lookup::Module(info) => {
                self.check_release(name, &info)?;
                for soft in &info.soft_before {
                    match self.add(soft, None) {
                        // Often an alias, such as `crc32c`; then some driver of that kind is in the table above.
                        Ok(()) | Err(ModuleError::Missing { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                for dependency in &info.depends {
                    self.add(dependency, None)?;
                }
                self.names.push(name.to_owned());
                Ok(())
            }
        }
    }

    fn check_release(&self, name: &str, info: &Modinfo) -> Result<(), ModuleError> {
        match &info.release {
            Some(found) if found != self.release => Err(ModuleError::OtherKernel {
                name: name.to_owned(),
                found: found.clone(),
                expected: self.release.to_owned(),
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module_tree::tests::write_tree;

    /// The shape of Debian's cloud kernel.
    const CLOUD: &[(&str, &str)] = &[
        ("crc32c-intel.ko.xz", "depends="),
        ("virtio_blk.ko.xz", "depends="),
        ("erofs.ko.xz", "depends=libcrc32c,netfs"),
        ("netfs.ko.xz", ""),
        ("libcrc32c.ko.xz", "softdep=pre: crc32c"),
        ("overlay.ko.xz", ""),
        ("virtio_mmio.ko.xz", ""),
        ("virtio_net.ko.xz", "depends=net_failover"),
        ("net_failover.ko.xz", "depends=failover"),
        ("failover.ko.xz", ""),
        ("nd_pmem.ko", "depends=libnvdimm,nd_btt"),
        ("nd_btt.ko", "depends=libnvdimm"),
        ("libnvdimm.ko", ""),
        ("virtio_pmem.ko", "depends=nd_virtio,libnvdimm"),
        ("nd_virtio.ko", ""),
    ];
    const CLOUD_BUILTIN: &str =
        "kernel/virtio_pci.ko\nkernel/virtio_console.ko\nkernel/ext4.ko\nkernel/virtiofs.ko\n";

    fn plan_of(modules: &[(&str, &str)], builtin: &str) -> Result<ModulePlan, ModuleError> {
        let dir = tempfile::tempdir().unwrap();
        write_tree(dir.path(), modules, Some(builtin));
        plan(&ModuleTree::open(Some(dir.path()), None).unwrap(), "6.1")
    }

    #[test]
    fn dependencies_come_first_and_groups_hold_the_rest() {
        let plan = plan_of(CLOUD, CLOUD_BUILTIN).unwrap();
        let expected: &[(ModuleGroup, &[&str])] = &[
            (
                ModuleGroup::Base,
                &[
                    "crc32c_intel",
                    "virtio_blk",
                    "libcrc32c",
                    "netfs",
                    "erofs",
                    "overlay",
                ],
            ),
            (ModuleGroup::Mmio, &["virtio_mmio"]),
            (ModuleGroup::Net, &["failover", "net_failover", "virtio_net"]),
            (
                ModuleGroup::Pmem,
                &["libnvdimm", "nd_btt", "nd_pmem", "nd_virtio", "virtio_pmem"],
            ),
        ];
        let found: Vec<(ModuleGroup, Vec<&str>)> = plan
            .groups
            .iter()
            .map(|(group, names)| (*group, names.iter().map(String::as_str).collect()))
            .collect();
        assert_eq!(
            found,
            expected
                .iter()
                .map(|(group, names)| (*group, names.to_vec()))
                .collect::<Vec<_>>()
        );
        let features = KernelFeatures {
            block: true,
            pci: true,
            mmio: true,
            net: true,
            virtiofs: true,
            pmem: true,
            ..KernelFeatures::default()
        };
        assert_eq!(plan.features, features);
        assert_eq!(plan.modules().len(), 15);
    }

    #[test]
    fn what_no_vm_can_do_without_is_named() {
        let check = |without: &[&str], expected: &str| {
            let keep = |path: &str| !without.iter().any(|name| path.contains(name));
            let modules: Vec<_> = CLOUD.iter().copied().filter(|(path, _)| keep(path)).collect();
            let builtin: Vec<_> = CLOUD_BUILTIN.lines().filter(|line| keep(line)).collect();
            assert_eq!(
                plan_of(&modules, &builtin.join("\n")).unwrap_err().to_string(),
                expected
            );
        };
        let missing = |name| format!("the kernel has no `{name}`, neither built in nor as a module");
        for name in [
            "virtio_blk",
            "erofs",
            "overlay",
            "ext4",
            "virtio_console",
            "netfs",
        ] {
            check(&[name], &missing(name));
        }
        check(
            &["virtio_pci", "virtio_mmio"],
            "the kernel has neither `virtio_pci` nor `virtio_mmio`, not built in and not as modules",
        );
    }

    #[test]
    fn half_a_feature_is_none() {
        let modules: Vec<_> = CLOUD
            .iter()
            .copied()
            .filter(|(path, _)| *path != "nd_btt.ko")
            .collect();
        let plan = plan_of(&modules, CLOUD_BUILTIN).unwrap();
        assert!(!plan.features.pmem && plan.features.net);
        assert!(plan.groups.iter().all(|(group, _)| *group != ModuleGroup::Pmem));
    }

    #[test]
    fn modules_of_another_kernel_and_circles() {
        let mut modules = CLOUD.to_vec();
        modules[1].1 = "vermagic=6.2 SMP";
        let error = plan_of(&modules, CLOUD_BUILTIN).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the module `virtio_blk` is for Linux 6.2, the kernel is 6.1"
        );
        let mut modules = CLOUD.to_vec();
        modules[5].1 = "softdep=pre: virtio_blk";
        modules[1].1 = "softdep=pre: overlay\nvermagic=6.1 SMP";
        assert_eq!(
            plan_of(&modules, CLOUD_BUILTIN).unwrap().groups[0].1[1..3],
            ["overlay", "virtio_blk"]
        );
    }
}
