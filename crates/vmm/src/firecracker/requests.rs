//! From a plan to the requests that make a Firecracker this VM. Pure.
//!
//! Shapes are those of its `src/firecracker/swagger/firecracker.yaml`; `OFFSHOOT_FIRECRACKER_API` names that file for the
//! test that compares them.

use std::path::PathBuf;

use serde::Serialize;

use super::probe::FirecrackerFacts;
use crate::driver::LaunchError;
use crate::plan::{Accel, AgentChannel, ConsoleDevice, LaunchPlan};
use crate::saved::{MEMORY_FD, STATE_FD, inherited_path};

/// The kernel parameter by which the agent knows that the machine can be reset and not switched off.
pub const OFF_BY_RESET: &str = "offshoot.off=reset";
/// The kernel parameter that tells the serials of the disks in their order, `offshoot.disks=root,overlay`.
pub const DISKS: &str = "offshoot.disks=";
/// What every kernel here is told besides: reset by the keyboard controller, which this machine has and ends with; there
/// is no PCI; and no time is lost on looking for a mouse and for keys.
const PARAMETERS: [&str; 6] = [
    "reboot=k",
    "pci=off",
    "i8042.noaux",
    "i8042.nomux",
    "i8042.dumbkbd",
    OFF_BY_RESET,
];
/// The agent's socket in the VMM's own folder, which is where it runs. It is saved with the VM: as it is relative, each VM that
/// goes on from there makes its own.
pub const AGENT_SOCKET: &str = "agent.sock";
/// Where it writes what it saves of the devices, in its own folder.
pub const STATE_FILE: &str = "state";
/// Its API's own limit.
const MAX_CPUS: u32 = 32;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it is for, as in "the VMM refused to …".
    pub doing: &'static str,
    /// Where it goes.
    pub path: String,
    /// What it says.
    pub body: serde_json::Value,
}

/// `PUT /machine-config`.
#[derive(Clone, Debug, Serialize)]
pub struct MachineConfig {
    /// vCPUs.
    pub vcpu_count: u32,
    /// Memory, MiB.
    pub mem_size_mib: u64,
}

/// `PUT /boot-source`.
#[derive(Clone, Debug, Serialize)]
pub struct BootSource {
    /// The kernel, an ELF.
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line.
    pub boot_args: String,
}

/// `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, Serialize)]
pub struct Drive {
    /// Its name in the API.
    pub drive_id: String,
    /// The file.
    pub path_on_host: PathBuf,
    /// Whether the kernel is to take it as its root: never, the agent mounts it.
    pub is_root_device: bool,
    /// Whether the guest may only read.
    pub is_read_only: bool,
    /// `Writeback`, so that what a guest flushes is on disk.
    pub cache_type: &'static str,
}

/// `PATCH /drives/{drive_id}`: the file is looked at again.
#[derive(Clone, Debug, Serialize)]
pub struct DrivePath {
    /// Its name in the API.
    pub drive_id: String,
    /// The file.
    pub path_on_host: PathBuf,
}

/// `PUT /pmem/{id}`.
#[derive(Clone, Debug, Serialize)]
pub struct Pmem {
    /// Its name in the API.
    pub id: String,
    /// The file.
    pub path_on_host: PathBuf,
    /// Whether the kernel is to take it as its root: never.
    pub root_device: bool,
    /// Whether the guest may only read.
    pub read_only: bool,
}

/// `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, Serialize)]
pub struct NetworkInterface {
    /// Its name in the API.
    pub iface_id: String,
    /// The TAP.
    pub host_dev_name: String,
    /// The guest's address.
    pub guest_mac: String,
}

/// `PUT /vsock`.
#[derive(Clone, Debug, Serialize)]
pub struct Vsock {
    /// The guest's context id.
    pub guest_cid: u32,
    /// The socket, which it makes.
    pub uds_path: PathBuf,
}

/// `PUT /balloon`.
#[derive(Clone, Debug, Serialize)]
pub struct Balloon {
    /// What is taken from the guest: nothing.
    pub amount_mib: u32,
    /// Whether the guest may take it back when it has too little.
    pub deflate_on_oom: bool,
    /// Whether pages that the guest does not use go back to the host.
    pub free_page_reporting: bool,
}

/// `PUT /entropy`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Nothing {}

/// `PUT /actions`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Action {
    /// Which.
    pub action_type: ActionType,
}

/// What can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ActionType {
    /// Starts the vCPUs.
    InstanceStart,
    /// Presses three keys.
    SendCtrlAltDel,
}

/// `PUT /snapshot/create`.
#[derive(Clone, Debug, Serialize)]
pub struct SnapshotCreate {
    /// All of the memory.
    pub snapshot_type: &'static str,
    /// Where the devices go.
    pub snapshot_path: PathBuf,
    /// Where the memory goes.
    pub mem_file_path: PathBuf,
}

impl SnapshotCreate {
    /// Into the memory that it was launched with, and its own folder.
    pub fn here() -> Self {
        Self {
            snapshot_type: "Full",
            snapshot_path: STATE_FILE.into(),
            mem_file_path: inherited_path(MEMORY_FD),
        }
    }

    /// Into nothing: it resets the guest's vsock, writes the devices, and is refused, as a folder cannot hold the memory.
    pub fn for_its_reset_alone() -> Self {
        Self {
            mem_file_path: ".".into(),
            ..Self::here()
        }
    }
}

/// `PUT /snapshot/load`. Disks and the agent's socket need no word: their paths are relative to its own folder.
#[derive(Clone, Debug, Serialize)]
pub struct SnapshotLoad {
    /// What was saved of the devices.
    pub snapshot_path: PathBuf,
    /// The memory.
    pub mem_backend: MemoryBackend,
    /// The TAPs of this VM.
    pub network_overrides: Vec<NetworkOverride>,
    /// Whether the guest goes on at once.
    pub resume_vm: bool,
}

/// Where a guest's memory comes from.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryBackend {
    /// `File`, which is mapped privately: nothing is copied before the guest touches it.
    pub backend_type: &'static str,
    /// The file.
    pub backend_path: PathBuf,
}

/// The TAP of one network device that was saved with another.
#[derive(Clone, Debug, Serialize)]
pub struct NetworkOverride {
    /// Its name in the API.
    pub iface_id: String,
    /// The TAP.
    pub host_dev_name: String,
}

/// `PATCH /vm`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct VmState {
    /// `Paused` or `Resumed`.
    pub state: &'static str,
}

/// Every request that makes a Firecracker the VM of a valid plan, in order, but for the start; or what it cannot do of it.
/// `taps` are the names of the plan's network devices. Files that are saved with a VM by their paths are named by links in
/// the VMM's own folder ([`links`]).
pub fn requests(
    plan: &LaunchPlan,
    facts: &FirecrackerFacts,
    taps: &[String],
) -> Result<Vec<Request>, LaunchError> {
    refuse_the_impossible(plan, facts)?;
    let mut list = Vec::new();
    list.push(request(
        "set up the machine",
        "/machine-config".into(),
        &MachineConfig {
            vcpu_count: plan.cpus,
            mem_size_mib: plan.memory.mib(),
        },
    ));
    list.push(request(
        "load the kernel",
        "/boot-source".into(),
        &BootSource {
            kernel_image_path: plan.kernel.clone(),
            initrd_path: plan.initramfs.clone(),
            boot_args: boot_args(plan),
        },
    ));
    for disk in &plan.disks {
        let drive = Drive {
            drive_id: drive_id(&disk.serial),
            path_on_host: drive_link(&disk.serial),
            is_root_device: false,
            is_read_only: disk.read_only,
            cache_type: "Writeback",
        };
        list.push(request(
            "open a disk",
            format!("/drives/{}", drive.drive_id),
            &drive,
        ));
    }
    for (n, pmem) in plan.pmems.iter().enumerate() {
        let pmem = Pmem {
            id: pmem_id(n),
            path_on_host: pmem_id(n).into(),
            root_device: false,
            read_only: pmem.read_only,
        };
        list.push(request(
            "map persistent memory",
            format!("/pmem/{}", pmem.id),
            &pmem,
        ));
    }
    for (n, (net, tap)) in plan.nets.iter().zip(taps).enumerate() {
        let interface = NetworkInterface {
            iface_id: net_id(n),
            host_dev_name: tap.clone(),
            guest_mac: net.mac.to_string(),
        };
        let path = format!("/network-interfaces/{}", interface.iface_id);
        list.push(request("open a TAP", path, &interface));
    }
    if let AgentChannel::HybridVsock { cid, port: _ } = plan.agent {
        let vsock = Vsock {
            guest_cid: cid,
            uds_path: AGENT_SOCKET.into(),
        };
        list.push(request("offer vsock", "/vsock".into(), &vsock));
    }
    list.push(request("offer entropy", "/entropy".into(), &Nothing {}));
    if facts.page_reporting {
        let balloon = Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            free_page_reporting: true,
        };
        list.push(request("offer a balloon", "/balloon".into(), &balloon));
    }
    Ok(list)
}

/// The request that makes a fresh Firecracker go on as the saved VM that its descriptors hold; it then stands.
pub fn restore(taps: &[String]) -> Request {
    let overrides = taps.iter().enumerate().map(|(n, tap)| NetworkOverride {
        iface_id: net_id(n),
        host_dev_name: tap.clone(),
    });
    let load = SnapshotLoad {
        snapshot_path: inherited_path(STATE_FD),
        mem_backend: MemoryBackend {
            backend_type: "File",
            backend_path: inherited_path(MEMORY_FD),
        },
        network_overrides: overrides.collect(),
        resume_vm: false,
    };
    request("restore the VM", "/snapshot/load".into(), &load)
}

/// The links in the VMM's own folder, by which it knows the files of a plan.
pub fn links(plan: &LaunchPlan) -> Vec<(PathBuf, PathBuf)> {
    let disks = plan.disks.iter();
    let disks = disks.map(|disk| (drive_link(&disk.serial), disk.path.clone()));
    let pmems = plan.pmems.iter().enumerate();
    let pmems = pmems.map(|(n, pmem)| (pmem_id(n).into(), pmem.path.clone()));
    disks.chain(pmems).collect()
}

/// What two VMs must have in common so that one can go on from where the other was saved.
pub(super) fn shape(plan: &LaunchPlan, facts: &FirecrackerFacts) -> Result<String, LaunchError> {
    let same = plan.without_its_own();
    let list = requests(&same, facts, &vec![String::new(); same.nets.len()])?;
    let lines = list
        .iter()
        .map(|request| format!("{} {}", request.path, request.body));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

pub(super) fn request(doing: &'static str, path: String, body: &impl Serialize) -> Request {
    Request {
        doing,
        path,
        // Plain structs; a path that is no UTF-8 was refused before.
        body: serde_json::to_value(body).unwrap_or_default(),
    }
}

/// The name of a disk in the API, which takes letters, digits and underscores.
pub(super) fn drive_id(serial: &str) -> String {
    serial.replace('-', "_")
}

/// The link to a disk.
pub(super) fn drive_link(serial: &str) -> PathBuf {
    format!("disk-{}", drive_id(serial)).into()
}

fn pmem_id(n: usize) -> String {
    format!("pmem{n}")
}

fn net_id(n: usize) -> String {
    format!("net{n}")
}

fn boot_args(plan: &LaunchPlan) -> String {
    let mut words: Vec<_> = plan.cmdline.iter().map(String::as_str).collect();
    words.extend(PARAMETERS);
    let serials: Vec<_> = plan.disks.iter().map(|disk| disk.serial.as_str()).collect();
    let disks = format!("{DISKS}{}", serials.join(","));
    if !serials.is_empty() {
        words.push(&disks);
    }
    words.join(" ")
}

fn refuse_the_impossible(plan: &LaunchPlan, facts: &FirecrackerFacts) -> Result<(), LaunchError> {
    let paths = [&plan.kernel].into_iter().chain(&plan.initramfs);
    let mut paths = paths
        .chain(plan.disks.iter().map(|disk| &disk.path))
        .chain(plan.pmems.iter().map(|pmem| &pmem.path))
        .chain([&plan.run_dir]);
    let wants = [
        (plan.accel == Accel::Tcg, "run without KVM"),
        (plan.cpus > MAX_CPUS, "give a guest more than 32 vCPUs"),
        (
            plan.agent == AgentChannel::VirtioSerial,
            "reach the agent over virtio-serial: it has no such device",
        ),
        (
            plan.console_device == ConsoleDevice::Virtio,
            "offer a virtio console: it has none",
        ),
        (!plan.shares.is_empty(), "share folders: it has no virtiofs"),
        (
            !plan.pmems.is_empty() && !facts.pmem,
            "offer persistent memory: it is older than version 1.14",
        ),
        (
            paths.any(|path| path.to_str().is_none()),
            "be told of a file whose name is not UTF-8",
        ),
        (
            plan.disks.iter().enumerate().any(|(n, disk)| {
                let same = |other: &crate::plan::DiskPlan| drive_id(&other.serial) == drive_id(&disk.serial);
                plan.disks[..n].iter().any(same)
            }),
            "tell disks apart whose serials differ in `-` and `_` alone",
        ),
    ];
    match wants.into_iter().find(|(impossible, _)| *impossible) {
        Some((_, what)) => Err(LaunchError::Unsupported {
            vmm: "Firecracker",
            what,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use offshoot_model::{ByteSize, Mac};
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::probe::tests::newest;
    use super::*;
    use crate::plan::tests::{any_plan, bare_plan};
    use crate::plan::{NetBackend, NetPlan, PmemPlan, SharePlan};

    fn possible() -> LaunchPlan {
        LaunchPlan {
            accel: Accel::Kvm,
            agent: AgentChannel::HybridVsock { cid: 3, port: 1024 },
            ..bare_plan()
        }
    }

    fn list(plan: &LaunchPlan) -> Vec<(String, serde_json::Value)> {
        let taps: Vec<_> = (0..plan.nets.len()).map(|n| format!("tap{n}")).collect();
        let requests = requests(plan, &newest(), &taps).unwrap();
        requests
            .into_iter()
            .map(|request| (request.path, request.body))
            .collect()
    }

    #[test]
    fn a_plan_becomes_requests() {
        let mut plan = possible();
        plan.pmems.push(PmemPlan {
            path: "/b/root.erofs".into(),
            size: ByteSize::from_mib(2),
            read_only: true,
        });
        plan.nets.push(NetPlan {
            backend: NetBackend::Tap("t".into()),
            mac: Mac([2, 0, 0, 0, 0, 1]),
        });
        let expected = [
            ("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 256})),
            (
                "/boot-source",
                json!({"kernel_image_path": "/k/vmlinux", "initrd_path": "/k/initramfs", "boot_args":
                    "quiet console=ttyS0 reboot=k pci=off i8042.noaux i8042.nomux i8042.dumbkbd offshoot.off=reset offshoot.disks=root"}),
            ),
            (
                "/drives/root",
                json!({"drive_id": "root", "path_on_host": "disk-root", "is_root_device": false,
                    "is_read_only": true, "cache_type": "Writeback"}),
            ),
            (
                "/pmem/pmem0",
                json!({"id": "pmem0", "path_on_host": "pmem0", "root_device": false, "read_only": true}),
            ),
            (
                "/network-interfaces/net0",
                json!({"iface_id": "net0", "host_dev_name": "tap0", "guest_mac": "02:00:00:00:00:01"}),
            ),
            ("/vsock", json!({"guest_cid": 3, "uds_path": "agent.sock"})),
            ("/entropy", json!({})),
            (
                "/balloon",
                json!({"amount_mib": 0, "deflate_on_oom": true, "free_page_reporting": true}),
            ),
        ];
        assert_eq!(list(&plan), expected.map(|(path, body)| (path.to_owned(), body)));
    }

    proptest! {
        #[test]
        fn every_device_is_asked_for_once(plan in any_plan(
            (3u32..u32::MAX, any::<u32>()).prop_map(|(cid, port)| AgentChannel::HybridVsock { cid, port }),
            Accel::Kvm,
        )) {
            let plan = LaunchPlan {
                cpus: plan.cpus.min(MAX_CPUS), shares: Vec::new(), console_device: ConsoleDevice::Serial, ..plan
            };
            let list = list(&plan);
            let mut paths = HashSet::new();
            prop_assert!(list.iter().all(|(path, _)| paths.insert(path.clone())), "twice: {:?}", list);
            let of = |kind: &str| list.iter().filter(|(path, _)| path.starts_with(kind)).count();
            prop_assert_eq!(of("/drives/"), plan.disks.len());
            prop_assert_eq!(of("/pmem/"), plan.pmems.len());
            prop_assert_eq!(of("/network-interfaces/"), plan.nets.len());
            // The last part of each path is the name in its body (upstream refuses others).
            for (path, body) in &list {
                let id = ["drive_id", "id", "iface_id"].iter().find_map(|key| body.get(*key));
                if let Some(id) = id {
                    prop_assert_eq!(path.rsplit('/').next(), id.as_str());
                }
            }
            let order: Vec<_> = plan.disks.iter().map(|disk| disk.serial.clone()).collect();
            let args = list[1].1["boot_args"].as_str().unwrap().to_owned();
            let told = args.split(' ').find_map(|word| word.strip_prefix(DISKS));
            prop_assert_eq!(told.map(str::to_owned), (!order.is_empty()).then(|| order.join(",")));
        }
    }

    #[test]
    fn a_saved_vm_goes_on_with_its_own_taps_and_relative_files() {
        let request = restore(&["a".into(), "b".into()]);
        let expected = json!({
            "snapshot_path": "/proc/self/fd/15",
            "mem_backend": {"backend_type": "File", "backend_path": "/proc/self/fd/14"},
            "network_overrides": [
                {"iface_id": "net0", "host_dev_name": "a"}, {"iface_id": "net1", "host_dev_name": "b"},
            ],
            "resume_vm": false,
        });
        assert_eq!(
            (request.path.as_str(), request.body),
            ("/snapshot/load", expected)
        );
        let mut plan = possible();
        plan.pmems.push(PmemPlan {
            path: "/b/root".into(),
            size: ByteSize::from_mib(2),
            read_only: true,
        });
        let links = links(&plan);
        let expected = [("disk-root", "/b/root.erofs"), ("pmem0", "/b/root")];
        assert_eq!(links, expected.map(|(link, path)| (link.into(), path.into())));
        assert!(list(&plan).iter().all(|(_, body)| {
            let path = body.get("path_on_host").and_then(|path| path.as_str());
            path.is_none_or(|path| links.iter().any(|(link, _)| link.as_os_str() == path))
        }));
    }

    #[test]
    fn what_is_a_vms_own_makes_no_difference_to_its_shape() {
        let shape = |change: &dyn Fn(&mut LaunchPlan)| {
            let mut plan = possible();
            plan.nets.push(NetPlan {
                backend: NetBackend::Tap("t".into()),
                mac: Mac([2, 0, 0, 0, 0, 1]),
            });
            change(&mut plan);
            shape(&plan, &newest()).unwrap()
        };
        let same = shape(&|_| {});
        let own: [&dyn Fn(&mut LaunchPlan); 4] = [
            &|plan| plan.run_dir = "/other".into(),
            &|plan| plan.disks[0].path = "/other".into(),
            &|plan| plan.nets[0].mac = Mac([2, 0, 0, 0, 0, 8]),
            &|plan| plan.kernel = "/other".into(),
        ];
        assert!(own.iter().all(|change| shape(change) == same));
        let others: [&dyn Fn(&mut LaunchPlan); 5] = [
            &|plan| plan.cpus += 1,
            &|plan| plan.memory = ByteSize::from_mib(plan.memory.mib() + 1),
            &|plan| plan.cmdline.push("more".into()),
            &|plan| plan.nets.clear(),
            &|plan| plan.disks[0].serial.push('x'),
        ];
        assert!(others.iter().all(|change| shape(change) != same));
    }

    #[test]
    fn what_it_lacks_is_refused() {
        let refuse = |change: &dyn Fn(&mut LaunchPlan, &mut FirecrackerFacts), expected: &str| {
            let (mut plan, mut facts) = (possible(), newest());
            requests(&plan, &facts, &[]).unwrap();
            change(&mut plan, &mut facts);
            let error = requests(&plan, &facts, &[]).unwrap_err().to_string();
            assert!(
                error.starts_with("Firecracker cannot") && error.contains(expected),
                "{error}"
            );
        };
        refuse(&|plan, _| plan.accel = Accel::Tcg, "without KVM");
        refuse(&|plan, _| plan.cpus = 33, "32 vCPUs");
        refuse(
            &|plan, _| plan.agent = AgentChannel::VirtioSerial,
            "virtio-serial",
        );
        refuse(
            &|plan, _| plan.console_device = ConsoleDevice::Virtio,
            "virtio console",
        );
        let share = SharePlan {
            tag: "t".into(),
            socket: "/s".into(),
        };
        refuse(&|plan, _| plan.shares = vec![share.clone()], "virtiofs");
        let pmem = PmemPlan {
            path: "/p".into(),
            size: ByteSize::from_mib(2),
            read_only: true,
        };
        refuse(
            &|plan, facts| (plan.pmems, facts.pmem) = (vec![pmem.clone()], false),
            "1.14",
        );
        refuse(
            &|plan, _| {
                plan.disks.push(crate::plan::DiskPlan {
                    serial: "a-b".into(),
                    ..plan.disks[0].clone()
                });
                plan.disks.push(crate::plan::DiskPlan {
                    serial: "a_b".into(),
                    ..plan.disks[0].clone()
                });
            },
            "tell disks apart",
        );
    }
}
