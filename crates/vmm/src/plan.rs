//! What one VM needs from its VMM, decided: plain values, the same for every VMM.
//!
//! A plan says nothing about how a VMM spells it. [`LaunchPlan::validate`] refuses what no VMM can do; what one VMM
//! cannot do, its driver refuses.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use offshoot_model::{ByteSize, ErrorKind, Explain, Mac, VmId};
use serde::{Deserialize, Serialize};

/// Everything that a VMM process is started with.
#[derive(Clone, Debug)]
pub struct LaunchPlan {
    /// Whose VM it is; the process is named after it.
    pub vm: VmId,
    /// A folder of this VM alone, for sockets. It exists, and only we can write it.
    pub run_dir: PathBuf,
    /// Where the VMM's own words are appended.
    pub log: PathBuf,
    /// Where the end of what the guest's console said is kept.
    pub console: PathBuf,
    /// vCPUs.
    pub cpus: u32,
    /// Guest memory.
    pub memory: ByteSize,
    /// How guest instructions are run.
    pub accel: Accel,
    /// The kernel: a `vmlinux` (PVH) or `bzImage`.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line, word by word.
    pub cmdline: Vec<String>,
    /// The console device that the command line names.
    pub console_device: ConsoleDevice,
    /// Block devices; guests find them by serial.
    pub disks: Vec<DiskPlan>,
    /// Persistent-memory devices, in the order of the guest's `/dev/pmem0`, `/dev/pmem1` …
    pub pmems: Vec<PmemPlan>,
    /// Shared folders.
    pub shares: Vec<SharePlan>,
    /// Network devices.
    pub nets: Vec<NetPlan>,
    /// How the host reaches the agent.
    pub agent: AgentChannel,
    /// Who the process becomes; `None` keeps who we are. The files that it writes belong to that user already.
    pub identity: Option<VmmIdentity>,
    /// Where the guest comes from.
    pub origin: Origin,
    /// The folders of the control group that the process is in from its first instruction on, one for each hierarchy;
    /// none leaves it in ours.
    pub cgroups: Vec<PathBuf>,
}

/// Where a guest comes from.
#[derive(Clone, Debug, Default)]
pub enum Origin {
    /// It boots its kernel.
    #[default]
    Kernel,
    /// It boots its kernel, and once it was saved ([`crate::Snapshots`]), all of its memory is in this file, which has the
    /// plan's size. A VMM may write it from the start on.
    KernelInto(Arc<File>),
    /// It goes on as a VM of the same shape ([`crate::Driver::shape`]) that was saved. The launch returns when it could: it
    /// stands until [`crate::Machine::resume`].
    Template(SavedGuest),
}

/// A VM that was saved. Both files are sealed (`offshoot_sys::memory_file`): a VMM reads them and can do nothing else.
#[derive(Clone, Debug)]
pub struct SavedGuest {
    /// Its memory, mapped privately.
    pub memory: Arc<File>,
    /// What its VMM saved of its devices.
    pub state: Arc<File>,
    /// Its writable disks by serial, with the sizes that the guest knows of.
    pub disks: Vec<(String, ByteSize)>,
}

/// How guest instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// By the processor, through `/dev/kvm`.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

/// Which device is the guest's console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleDevice {
    /// An ISA serial port: works from the kernel's first word on; each byte is an exit of the guest.
    #[default]
    Serial,
    /// A virtio console: fast, but words come only when the kernel has found it.
    Virtio,
}

impl ConsoleDevice {
    /// What the kernel calls it: the value of `console=`.
    pub fn kernel_name(self) -> &'static str {
        match self {
            Self::Serial => "ttyS0",
            Self::Virtio => "hvc0",
        }
    }
}

/// One block device, raw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlan {
    /// The name under which the guest finds it (`/dev/disk/by-id/virtio-<serial>`): 1 to 20 of `a-z A-Z 0-9 _ -`,
    /// starting with a letter.
    pub serial: String,
    /// The file.
    pub path: PathBuf,
    /// Whether the guest may only read. What is deleted on a writable disk is given back to the host.
    pub read_only: bool,
}

/// One persistent-memory device over a file, mapped by the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PmemPlan {
    /// The file, at least `size` long.
    pub path: PathBuf,
    /// How much of it is shown: a multiple of [`PmemPlan::ALIGNMENT`].
    pub size: ByteSize,
    /// Whether the guest may only read.
    pub read_only: bool,
}

impl PmemPlan {
    /// The guest's kernel maps persistent memory for DAX in units of 2 MiB.
    pub const ALIGNMENT: ByteSize = ByteSize::from_mib(2);
}

/// One shared folder, served by a virtiofsd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharePlan {
    /// The name under which the guest mounts it: 1 to 36 of `a-z A-Z 0-9 _ . -`.
    pub tag: String,
    /// Where the virtiofsd listens.
    pub socket: PathBuf,
}

/// One network device.
#[derive(Clone, Debug)]
pub struct NetPlan {
    /// The host's side.
    pub backend: NetBackend,
    /// The guest's address.
    pub mac: Mac,
}

/// The host's side of a network device.
#[derive(Clone, Debug)]
pub enum NetBackend {
    /// A TAP device by name; the plan's identity owns it.
    Tap(String),
    /// An open TAP: its `/dev/net/tun` descriptor, which the VMM inherits.
    TapFd(TapSlot),
}

/// Where an open TAP is put after it was planned and before the VMM is launched. The launch takes it out: from then on the
/// VMM alone has it, and the TAP ends with the VMM. Cheap to clone; every clone is the same slot.
#[derive(Clone, Debug, Default)]
pub struct TapSlot(Arc<Mutex<Option<OwnedFd>>>);

impl TapSlot {
    /// Puts it in.
    pub fn fill(&self, tap: OwnedFd) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(tap);
    }

    /// Takes it out.
    pub fn take(&self) -> Option<OwnedFd> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// How the host reaches the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentChannel {
    /// A virtio-serial port named [`AgentChannel::PORT_NAME`], a Unix socket on the host.
    VirtioSerial,
    /// vsock, offered on the host as a Unix socket that is told a port.
    HybridVsock {
        /// The guest's context id, at least 3.
        cid: u32,
        /// The port on which the agent listens.
        port: u32,
    },
}

impl AgentChannel {
    /// The name of the agent's virtio-serial port: `/dev/virtio-ports/offshoot.agent` with udev,
    /// `/sys/class/virtio-ports/*/name` without.
    pub const PORT_NAME: &str = "offshoot.agent";

    /// The vsock port on which agents listen.
    pub const VSOCK_PORT: u32 = 1024;
}

/// Who a VMM process becomes: nobody who owns anything else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmIdentity {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups, exactly these (`kvm`, where `/dev/kvm` needs it).
    pub groups: Vec<u32>,
}

/// Why a plan cannot be carried out by any VMM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No vCPU, or more than there can be.
    #[error("{given} vCPUs is not possible: a VM has 1 to {most}")]
    Cpus {
        /// What was planned.
        given: u32,
        /// The most.
        most: u32,
    },
    /// Memory that is not whole MiB, or too little for any kernel.
    #[error("memory of {} bytes is not possible: it is a whole number of MiB, at least {least}", given.bytes())]
    Memory {
        /// What was planned.
        given: ByteSize,
        /// The least.
        least: ByteSize,
    },
    /// A path that is relative, empty or holds control characters.
    #[error("{what} `{}` is not an absolute path without control characters", path.display())]
    Path {
        /// Which path of the plan.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A run folder whose sockets could not be addressed.
    #[error("run folder `{}` is too long for sockets: at most {most} bytes", path.display())]
    RunDirLength {
        /// The folder.
        path: PathBuf,
        /// The most.
        most: usize,
    },
    /// A kernel parameter that would be read as several or as none.
    #[error("kernel parameter {word:?} holds white space, quotes or control characters, or is empty")]
    Word {
        /// The parameter.
        word: String,
    },
    /// More kernel parameters than a kernel keeps.
    #[error("the kernel command line has {length} bytes; it has room for at most {most}")]
    CommandLine {
        /// Its length.
        length: usize,
        /// The most.
        most: usize,
    },
    /// A name that a device cannot have.
    #[error("{what} {name:?} is not possible: {rule}")]
    Name {
        /// Which name.
        what: &'static str,
        /// The name.
        name: String,
        /// What it must be.
        rule: &'static str,
    },
    /// Two devices with one name.
    #[error("two devices have the {what} {name:?}")]
    Twice {
        /// Which name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A persistent-memory size that a guest cannot map.
    #[error("persistent memory of {} bytes is not possible: it is a multiple of {unit}", given.bytes())]
    PmemSize {
        /// What was planned.
        given: ByteSize,
        /// The unit.
        unit: ByteSize,
    },
    /// More devices than a machine has room for.
    #[error("{given} devices are too many for one VM: at most {most}")]
    Devices {
        /// What was planned.
        given: usize,
        /// The most.
        most: usize,
    },
    /// A group address as a network device's own.
    #[error("{mac} is not the address of one network device")]
    Mac {
        /// What was planned.
        mac: Mac,
    },
}

impl Explain for PlanError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::RunDirLength { .. } => ErrorKind::NotPossible,
            _ => ErrorKind::InvalidRequest,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Cpus { .. } => vec!["choose another number with `--cpus`".into()],
            Self::Memory { .. } => vec!["choose another size with `--memory`, such as 512m".into()],
            Self::RunDirLength { .. } => vec!["start offshootd with a shorter `--run-dir`".into()],
            Self::Devices { .. } => vec!["use fewer `-v` mounts".into()],
            _ => Vec::new(),
        }
    }
}

/// The most vCPUs that QEMU's `microvm` and `q35` both take.
const MAX_CPUS: u32 = 255;
/// Less, and no kernel with an initial RAM disk unpacks itself.
const MIN_MEMORY: ByteSize = ByteSize::from_mib(16);
/// `COMMAND_LINE_SIZE` of x86 kernels is 2048 with its NUL; a driver may add a word or two of its own.
const MAX_CMDLINE: usize = 1983;
/// A PCI bus has 32 slots; a few belong to the machine, the console, the agent and the entropy source.
const MAX_DEVICES: usize = 24;
/// `sun_path` has 108 bytes with a NUL (unix(7)); the longest socket name of a VM is `/own/agent.sock`.
const MAX_RUN_DIR: usize = 107 - "/own/agent.sock".len();
/// `VIRTIO_BLK_ID_BYTES`.
const MAX_SERIAL: usize = 20;
/// `virtio_fs_config.tag`.
const MAX_TAG: usize = 36;
/// `IFNAMSIZ` with its NUL.
const MAX_IFNAME: usize = 15;

impl LaunchPlan {
    /// Refuses what no VMM can do. Pure: it looks at no file.
    pub fn validate(&self) -> Result<(), PlanError> {
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return Err(PlanError::Cpus {
                given: self.cpus,
                most: MAX_CPUS,
            });
        }
        if self.memory < MIN_MEMORY || !self.memory.bytes().is_multiple_of(1 << 20) {
            return Err(PlanError::Memory {
                given: self.memory,
                least: MIN_MEMORY,
            });
        }
        self.validate_paths()?;
        self.validate_cmdline()?;
        self.validate_devices()
    }

    fn validate_paths(&self) -> Result<(), PlanError> {
        let own = [
            ("run folder", &self.run_dir),
            ("log", &self.log),
            ("console log", &self.console),
            ("kernel", &self.kernel),
        ];
        let paths = own
            .into_iter()
            .chain(self.initramfs.iter().map(|path| ("initramfs", path)))
            .chain(self.disks.iter().map(|disk| ("disk", &disk.path)))
            .chain(self.pmems.iter().map(|pmem| ("persistent memory", &pmem.path)))
            .chain(self.shares.iter().map(|share| ("share socket", &share.socket)))
            .chain(self.cgroups.iter().map(|path| ("control group", path)));
        for (what, path) in paths {
            if !is_plain_absolute(path) {
                return Err(PlanError::Path {
                    what,
                    path: path.clone(),
                });
            }
        }
        if self.run_dir.as_os_str().len() > MAX_RUN_DIR {
            return Err(PlanError::RunDirLength {
                path: self.run_dir.clone(),
                most: MAX_RUN_DIR,
            });
        }
        Ok(())
    }

    fn validate_cmdline(&self) -> Result<(), PlanError> {
        let odd = |c: char| c.is_whitespace() || c.is_control() || c == '"';
        for word in &self.cmdline {
            if word.is_empty() || word.contains(odd) {
                return Err(PlanError::Word { word: word.clone() });
            }
        }
        let length = self.cmdline_text().len();
        if length > MAX_CMDLINE {
            return Err(PlanError::CommandLine {
                length,
                most: MAX_CMDLINE,
            });
        }
        Ok(())
    }

    fn validate_devices(&self) -> Result<(), PlanError> {
        let given = self.disks.len() + self.pmems.len() + self.shares.len() + self.nets.len();
        if given > MAX_DEVICES {
            return Err(PlanError::Devices {
                given,
                most: MAX_DEVICES,
            });
        }
        let name_chars = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-');
        let mut serials = HashSet::new();
        for DiskPlan { serial, .. } in &self.disks {
            let letter_first = serial.starts_with(|c: char| c.is_ascii_alphabetic());
            if !letter_first || serial.len() > MAX_SERIAL || !serial.bytes().all(name_chars) {
                let rule = "1 to 20 letters, digits, `_` and `-`, a letter first";
                return Err(PlanError::Name {
                    what: "disk serial",
                    name: serial.clone(),
                    rule,
                });
            }
            if !serials.insert(serial) {
                return Err(PlanError::Twice {
                    what: "disk serial",
                    name: serial.clone(),
                });
            }
        }
        let mut tags = HashSet::new();
        for SharePlan { tag, .. } in &self.shares {
            if tag.is_empty() || tag.len() > MAX_TAG || !tag.bytes().all(|c| name_chars(c) || c == b'.') {
                let rule = "1 to 36 letters, digits, `_`, `.` and `-`";
                return Err(PlanError::Name {
                    what: "share tag",
                    name: tag.clone(),
                    rule,
                });
            }
            if !tags.insert(tag) {
                return Err(PlanError::Twice {
                    what: "share tag",
                    name: tag.clone(),
                });
            }
        }
        for PmemPlan { size, .. } in &self.pmems {
            if size.bytes() == 0 || !size.bytes().is_multiple_of(PmemPlan::ALIGNMENT.bytes()) {
                return Err(PlanError::PmemSize {
                    given: *size,
                    unit: PmemPlan::ALIGNMENT,
                });
            }
        }
        for NetPlan { backend, mac } in &self.nets {
            // The lowest bit of the first byte marks a group (IEEE 802).
            if mac.0[0] & 1 != 0 || mac.0 == [0; 6] {
                return Err(PlanError::Mac { mac: *mac });
            }
            if let NetBackend::Tap(name) = backend
                && (name.is_empty()
                    || name.len() > MAX_IFNAME
                    || !name.bytes().all(|c| name_chars(c) || c == b'.'))
            {
                let rule = "1 to 15 letters, digits, `_`, `.` and `-`";
                return Err(PlanError::Name {
                    what: "network device",
                    name: name.clone(),
                    rule,
                });
            }
        }
        Ok(())
    }

    /// The same VM without what differs from VM to VM: ids, paths, addresses, descriptors, and where it comes from. What two
    /// VMs then have in common is what [`crate::Driver::shape`] names.
    pub(crate) fn without_its_own(&self) -> Self {
        let place = |name: &str| PathBuf::from("/").join(name);
        let mut same = Self {
            vm: VmId::from_bytes(&[0; 6]),
            run_dir: place("run"),
            log: place("log"),
            console: place("console"),
            kernel: place("kernel"),
            initramfs: self.initramfs.as_ref().map(|_| place("initramfs")),
            origin: Origin::Kernel,
            identity: None,
            cgroups: Vec::new(),
            ..self.clone()
        };
        for disk in &mut same.disks {
            disk.path = place("disk");
        }
        for pmem in &mut same.pmems {
            pmem.path = place("pmem");
        }
        let net = || NetPlan {
            backend: NetBackend::TapFd(TapSlot::default()),
            mac: Mac([2, 0, 0, 0, 0, 0]),
        };
        same.nets = same.nets.iter().map(|_| net()).collect();
        same
    }

    /// The kernel's command line as one text.
    pub fn cmdline_text(&self) -> String {
        self.cmdline.join(" ")
    }
}

fn is_plain_absolute(path: &Path) -> bool {
    path.is_absolute() && !path.as_os_str().as_bytes().iter().any(u8::is_ascii_control)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A plan with nothing but what it must have.
    pub(crate) fn bare_plan() -> LaunchPlan {
        LaunchPlan {
            vm: VmId::from_bytes(&[7; 6]),
            run_dir: "/run/offshoot/x".into(),
            log: "/var/lib/offshoot/vms/x/vmm.log".into(),
            console: "/var/lib/offshoot/vms/x/console.log".into(),
            cpus: 2,
            memory: ByteSize::from_mib(256),
            accel: Accel::Tcg,
            kernel: "/k/vmlinux".into(),
            initramfs: Some("/k/initramfs".into()),
            cmdline: vec!["quiet".into(), "console=ttyS0".into()],
            console_device: ConsoleDevice::Serial,
            disks: vec![DiskPlan {
                serial: "root".into(),
                path: "/b/root.erofs".into(),
                read_only: true,
            }],
            pmems: Vec::new(),
            shares: Vec::new(),
            nets: Vec::new(),
            agent: AgentChannel::VirtioSerial,
            identity: None,
            origin: Origin::Kernel,
            cgroups: Vec::new(),
        }
    }

    /// Absolute paths with what command lines trip over.
    fn path() -> impl Strategy<Value = PathBuf> {
        let odd = prop::sample::select(r#",,==::[]@"'\ -%$#"#.chars().collect::<Vec<_>>());
        let piece = prop_oneof![
            odd.prop_map(String::from),
            "[^\\x00-\\x1f\\x7f]",
            "[a-z]{1,8}",
            "/"
        ];
        prop::collection::vec(piece, 0..12).prop_map(|pieces| format!("/{}", pieces.concat()).into())
    }

    /// Valid plans with all kinds of devices, for a VMM with this channel to the agent.
    pub(crate) fn any_plan(
        agent: impl Strategy<Value = AgentChannel>,
        accel: Accel,
    ) -> impl Strategy<Value = LaunchPlan> {
        let boot = (
            path(),
            prop::option::of(path()),
            prop::collection::vec("[!#-~]{1,8}", 0..6),
        );
        let size = (1u32..=MAX_CPUS, 16u64..100_000, any::<bool>());
        let disks = prop::collection::vec((path(), any::<bool>()), 0..7);
        let pmems = prop::collection::vec((path(), 1u64..3000, any::<bool>()), 0..4);
        let shares = prop::collection::vec((path(), "[a-zA-Z0-9_.-]{0,20}"), 0..7);
        let nets = prop::collection::vec((prop::option::of("[a-zA-Z0-9_.-]{1,15}"), any::<u16>()), 0..4);
        (agent, boot, size, disks, pmems, shares, nets).prop_map(
            move |(agent, (kernel, initramfs, cmdline), (cpus, mib, virtio), disks, pmems, shares, nets)| {
                let tap = || {
                    let (slot, null) = (TapSlot::default(), std::fs::File::open("/dev/null"));
                    slot.fill(null.expect("it is there").into());
                    NetBackend::TapFd(slot)
                };
                let plan = LaunchPlan {
                    cpus,
                    memory: ByteSize::from_mib(mib),
                    accel,
                    kernel,
                    initramfs,
                    cmdline,
                    console_device: if virtio {
                        ConsoleDevice::Virtio
                    } else {
                        ConsoleDevice::Serial
                    },
                    disks: disks
                        .into_iter()
                        .enumerate()
                        .map(|(n, (path, read_only))| DiskPlan {
                            serial: format!("disk-{n}"),
                            path,
                            read_only,
                        })
                        .collect(),
                    pmems: pmems
                        .into_iter()
                        .map(|(path, units, read_only)| PmemPlan {
                            path,
                            size: ByteSize::from_mib(2 * units),
                            read_only,
                        })
                        .collect(),
                    shares: shares
                        .into_iter()
                        .enumerate()
                        .map(|(n, (socket, tag))| SharePlan {
                            tag: format!("{tag}{n}"),
                            socket,
                        })
                        .collect(),
                    nets: nets
                        .into_iter()
                        .map(|(name, low)| NetPlan {
                            backend: name.map_or_else(tap, NetBackend::Tap),
                            mac: Mac([2, 0, 0, 0, low.to_be_bytes()[0], low.to_be_bytes()[1]]),
                        })
                        .collect(),
                    agent,
                    ..bare_plan()
                };
                plan.validate().expect("the strategy makes valid plans");
                plan
            },
        )
    }

    #[test]
    fn what_no_vmm_can_do_is_refused() {
        let check = |change: &dyn Fn(&mut LaunchPlan), expected: &str| {
            let mut plan = bare_plan();
            plan.validate().unwrap();
            change(&mut plan);
            let error = plan.validate().expect_err(expected).to_string();
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
        };
        let disk = |serial: &str| DiskPlan {
            serial: serial.into(),
            path: "/d".into(),
            read_only: false,
        };
        let net = |name: &str, first| NetPlan {
            backend: NetBackend::Tap(name.into()),
            mac: Mac([first, 0, 0, 0, 0, 1]),
        };
        let pmem = |size| PmemPlan {
            path: "/p".into(),
            size: ByteSize::from_bytes(size),
            read_only: true,
        };
        check(&|p| p.cpus = 0, "0 vCPUs");
        check(&|p| p.cpus = 256, "256 vCPUs");
        check(&|p| p.memory = ByteSize::from_mib(15), "memory of");
        check(
            &|p| p.memory = ByteSize::from_bytes((64 << 20) + 1),
            "whole number of MiB",
        );
        check(&|p| p.kernel = "vmlinux".into(), "kernel `vmlinux`");
        check(&|p| p.initramfs = Some("".into()), "initramfs ``");
        check(&|p| p.disks[0].path = "/a\nb".into(), "disk `/a");
        check(&|p| p.log = "/a\0b".into(), "log `/a");
        check(&|p| p.cgroups.push("g".into()), "control group `g`");
        check(
            &|p| p.run_dir = format!("/{}", "x".repeat(96)).into(),
            "too long for sockets",
        );
        check(&|p| p.cmdline.push("a b".into()), "\"a b\"");
        check(&|p| p.cmdline.push(String::new()), "kernel parameter \"\"");
        check(&|p| p.cmdline.push("x=\"y\"".into()), "quotes");
        check(&|p| p.cmdline.push("x".repeat(2048)), "at most 1983");
        check(&|p| p.disks.push(disk("root")), "two devices");
        check(&|p| p.disks.push(disk("1root")), "disk serial");
        check(&|p| p.disks.push(disk("")), "disk serial");
        check(&|p| p.disks.push(disk(&"x".repeat(21))), "disk serial");
        check(&|p| p.disks.push(disk("a,b")), "disk serial");
        check(
            &|p| {
                p.shares.push(SharePlan {
                    tag: "a b".into(),
                    socket: "/s".into(),
                });
            },
            "share tag",
        );
        check(
            &|p| {
                p.shares.push(SharePlan {
                    tag: "a".into(),
                    socket: "s".into(),
                });
            },
            "share socket",
        );
        check(&|p| p.pmems.push(pmem(0)), "persistent memory of 0");
        check(&|p| p.pmems.push(pmem((2 << 20) + 4096)), "multiple of 2MiB");
        check(&|p| p.nets.push(net("tap0", 1)), "not the address of one");
        check(&|p| p.nets.push(net("a-name-too-long-x", 2)), "network device");
        check(
            &|p| p.disks = (0..25).map(|n| disk(&format!("d{n}"))).collect(),
            "25 devices",
        );
    }
}
