//! Makes the guest a VM: clock, entropy, host name, root, disks and network.
//!
//! ```text
//!   kind       /lower                  /overlay         /sysroot, then / of the VM's namespace
//!   block      erofs, read-only        ext4, the disk   overlay(lower, overlay/upper, overlay/work)
//!   pmem       erofs with DAX          same             same
//!   virtiofs   virtiofs, read-only     same             same
//!   copy       -                       -                ext4, the disk
//! ```
//!
//! First the *plan*, which is pure and refuses what makes no sense; then the steps, each timed.

mod disk;
mod guest_files;
mod machine;
mod names;
mod network;
mod root;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) use disk::Disk;
use offshoot_agent_proto::v1;

use crate::workload::Workload;

/// Why the guest did not become a VM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigureError {
    /// The request makes no sense.
    #[error("cannot configure the guest: {what}")]
    Request {
        /// What is wrong with it.
        what: String,
    },
    /// A device did not appear.
    #[error("cannot find {what} in the guest after {} s", waited.as_secs())]
    NoDevice {
        /// Which.
        what: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A mount failed.
    #[error("cannot mount {what} on {target}: {source}")]
    Mount {
        /// File system and source.
        what: String,
        /// Where.
        target: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Anything else the kernel refused.
    #[error("cannot {action}: {source}")]
    Step {
        /// What was tried.
        action: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its timer is one that stops for good now and then.
    #[error("the guest's timer is `{device}`: it took the processor's own for broken")]
    Timer {
        /// What the kernel calls it.
        device: String,
    },
    /// The thread of the namespace failed.
    #[error("cannot make the VM's namespace: {0}")]
    Namespace(#[from] io::Error),
}

impl ConfigureError {
    /// For `map_err` on a step.
    fn step(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Step {
            action: action.into(),
            source,
        }
    }
}

/// How the root is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Lower {
    Block { serial: String },
    Pmem { index: u32 },
    Virtiofs { tag: String },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum RootPlan {
    Overlay { lower: Lower, overlay_serial: String },
    Copy { serial: String },
}

/// Everything decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConfigurePlan {
    hostname: String,
    realtime: Duration,
    entropy: Vec<u8>,
    root: RootPlan,
    work_serial: Option<String>,
    mounts: Vec<v1::SharedMount>,
    network: Option<network::NetworkPlan>,
    machine_id: String,
    /// It goes on from where another was saved.
    restored: bool,
}

/// The longest host name that Linux takes.
const MAX_HOSTNAME: usize = 64;

/// Decides what to do, or refuses.
pub(crate) fn plan(request: v1::ConfigureRequest) -> Result<ConfigurePlan, ConfigureError> {
    use v1::configure_request::Root;
    let refuse = |what: &str| {
        Err(ConfigureError::Request {
            what: what.to_owned(),
        })
    };
    let named = |name: &str| !name.is_empty() && !name.contains(['\0', '/', ',']);
    if request.hostname.is_empty()
        || request.hostname.len() > MAX_HOSTNAME
        || request
            .hostname
            .contains(|c: char| c.is_whitespace() || c.is_control())
    {
        return refuse("the host name has 1 to 64 characters without spaces");
    }
    let lower = match request.root {
        None => return refuse("no root"),
        Some(Root::RootCopySerial(serial)) if named(&serial) => {
            if !request.overlay_serial.is_empty() {
                return refuse("a root that is a private copy takes no overlay disk");
            }
            Err(serial)
        }
        Some(Root::RootBlockSerial(serial)) if named(&serial) => Ok(Lower::Block { serial }),
        Some(Root::RootVirtiofsTag(tag)) if named(&tag) => Ok(Lower::Virtiofs { tag }),
        Some(Root::RootPmemIndex(index)) => Ok(Lower::Pmem { index }),
        Some(_) => return refuse("the root's name is no serial or tag"),
    };
    let root = match lower {
        Ok(_) if !named(&request.overlay_serial) => return refuse("the overlay disk's name is no serial"),
        Ok(lower) => RootPlan::Overlay {
            lower,
            overlay_serial: request.overlay_serial,
        },
        Err(serial) => RootPlan::Copy { serial },
    };
    for mount in &request.mounts {
        let goes_up = mount.target.split('/').any(|part| part == "..");
        if !named(&mount.tag) || !mount.target.starts_with('/') || mount.target.contains('\0') || goes_up {
            return refuse(&format!(
                "cannot mount share {:?} on {:?}",
                mount.tag, mount.target
            ));
        }
    }
    let network = request.network.as_ref().map(network::plan).transpose();
    let mut network = network.map_err(|what| ConfigureError::Request { what })?;
    if let (Some(network), Some(restored)) = (&mut network, &request.restored) {
        network.mac_before = restored.mac.parse().map_err(|error| ConfigureError::Request {
            what: format!("the network's saved device: {error}"),
        })?;
    }
    let hex = |c: char| matches!(c, '0'..='9' | 'a'..='f');
    if !matches!(request.machine_id.len(), 0 | 32) || !request.machine_id.chars().all(hex) {
        return refuse("a machine id has 32 lower-case hex digits");
    }
    Ok(ConfigurePlan {
        hostname: request.hostname,
        realtime: Duration::from_nanos(request.realtime_ns),
        entropy: request.entropy.to_vec(),
        root,
        work_serial: Some(request.work_serial).filter(|serial| !serial.is_empty()),
        mounts: request.mounts,
        network,
        machine_id: request.machine_id,
        restored: request.restored.is_some(),
    })
}

/// A guest that is a VM.
#[derive(Debug)]
pub(crate) struct Configured {
    /// What the VM's processes see.
    pub(crate) workload: Workload,
    /// Disks that are written to, to be clean in the end.
    pub(crate) disks: Vec<Disk>,
    /// Timed steps.
    pub(crate) stages: Vec<v1::GuestStage>,
}

/// A stop-watch for stages.
struct Stages {
    done: Vec<v1::GuestStage>,
    last: Instant,
}

impl Stages {
    fn new() -> Self {
        Self {
            done: Vec::new(),
            last: Instant::now(),
        }
    }

    /// Everything since the last stage was this one.
    fn end(&mut self, name: &str) {
        self.done.push(stage(name, self.last.elapsed()));
        self.last = Instant::now();
    }
}

/// One timed step.
pub(crate) fn stage(name: &str, took: Duration) -> v1::GuestStage {
    v1::GuestStage {
        name: name.to_owned(),
        duration_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
    }
}

/// Does what every VM of this kind does before it is one. What it did, `apply` finds done. Blocks.
pub(crate) fn rehearse(request: &v1::RehearseRequest) -> Result<(), ConfigureError> {
    use v1::rehearse_request::Root;
    machine::check_timer()?;
    let lower = match &request.root {
        Some(Root::RootBlockSerial(serial)) => Some(Lower::Block {
            serial: serial.clone(),
        }),
        Some(Root::RootPmemIndex(index)) => Some(Lower::Pmem { index: *index }),
        None => None,
    };
    if let Some(lower) = lower {
        root::mount_lower(&lower)?;
    }
    machine::open_to_everybody();
    if request.network {
        network::rehearse()?;
    }
    if matches!(request.root, Some(Root::RootBlockSerial(_))) {
        root::read_ahead();
    }
    Ok(())
}

/// Sets the clock of a VM that is configured, where the host says what it is.
pub(crate) fn set_clock_again(realtime: Duration) {
    if let Err(error) = machine::set_clock(realtime) {
        crate::log::warning(format_args!("cannot set the clock: {error}"));
    }
}

/// Does what was decided, the network last. Blocks.
pub(crate) fn apply(plan: &ConfigurePlan) -> Result<Configured, ConfigureError> {
    let mut configured = apply_rest(plan)?;
    if let Some(network) = &plan.network {
        configured.stages.extend(network::set_up(network)?);
    }
    Ok(configured)
}

fn apply_rest(plan: &ConfigurePlan) -> Result<Configured, ConfigureError> {
    let mut stages = Stages::new();
    machine::set_up(&plan.hostname, plan.realtime, &plan.entropy)?;
    if !plan.restored {
        machine::open_to_everybody();
    }
    stages.end("machine");
    let own = own_plan(plan);
    let (workload, disks) = mount_all(plan, &mut stages, move |stages| {
        guest_files::make_own(&own, stages)
    })?;
    Ok(Configured {
        workload,
        disks,
        stages: stages.done,
    })
}

fn own_plan(plan: &ConfigurePlan) -> guest_files::OwnPlan {
    guest_files::OwnPlan {
        names: names::Names::new(&plan.hostname, plan.network.as_ref()),
        machine_id: plan.machine_id.clone(),
        new_boot_id: plan.restored,
        mounts: plan.mounts.clone(),
    }
}

/// Mounts root and disks, makes the namespace with the tree, and lets `own` work in it; gives the disks that are written to.
fn mount_all(
    plan: &ConfigurePlan,
    stages: &mut Stages,
    own: impl FnOnce(&mut Stages) -> Result<(), ConfigureError> + Send + 'static,
) -> Result<(Workload, Vec<Disk>), ConfigureError> {
    let mut disks = root::mount_root(&plan.root, stages)?;
    let work = plan.work_serial.as_deref().map(disk::find).transpose()?;
    let device = work.clone();
    let (workload, guest_stages) = Workload::create(root::SYSROOT, move || {
        let mut stages = Stages::new();
        guest_files::prepare(device.as_deref(), &mut stages)?;
        own(&mut stages)?;
        Ok::<_, ConfigureError>(stages.done)
    })?;
    stages.done.extend(guest_stages);
    stages.last = Instant::now();
    // The guest's namespace holds it; here it would only be in the way at the end.
    rustix::mount::unmount(root::SYSROOT, rustix::mount::UnmountFlags::DETACH)
        .map_err(|error| ConfigureError::step("leave the new root")(error.into()))?;
    disks.extend(work.map(|device| Disk {
        device,
        mounted_on: None,
    }));
    stages.end("namespace");
    Ok((workload, disks))
}

/// A guest that is about to be a VM: its disks are mounted, and nothing says yet who it is.
#[derive(Debug)]
pub(crate) struct Warmed {
    /// What the VM's processes will see.
    pub(crate) workload: Arc<Workload>,
    /// Disks that are written to.
    pub(crate) disks: Vec<Disk>,
    root: RootPlan,
    work_serial: Option<String>,
}

/// Mounts what a VM like this one needs. Blocks.
pub(crate) fn warm(plan: ConfigurePlan) -> Result<Warmed, ConfigureError> {
    machine::begin(plan.realtime, &plan.entropy)?;
    let (workload, disks) = mount_all(&plan, &mut Stages::new(), |_| Ok(()))?;
    if let Err(error) = network::warm() {
        crate::log::warning(format_args!("cannot warm the network device: {error}"));
    }
    Ok(Warmed {
        workload: Arc::new(workload),
        disks,
        root: plan.root,
        work_serial: plan.work_serial,
    })
}

/// Does the rest of what was decided in a guest that is warm; gives the timed steps.
pub(crate) async fn apply_to(
    warmed: &Warmed,
    plan: ConfigurePlan,
) -> Result<Vec<v1::GuestStage>, ConfigureError> {
    if (&plan.root, &plan.work_serial) != (&warmed.root, &warmed.work_serial) {
        return Err(ConfigureError::Request {
            what: "the guest is warm for a VM with other disks".into(),
        });
    }
    let mut stages = Stages::new();
    machine::set_up(&plan.hostname, plan.realtime, &plan.entropy)?;
    stages.end("machine");
    let mut work = None;
    for disk in &warmed.disks {
        match disk.mounted_on {
            Some(target) => disk::ensure_grown(&disk.device, target),
            None => work = Some(disk.device.clone()),
        }
    }
    let own = own_plan(&plan);
    let in_guest = warmed.workload.run(move || {
        let mut stages = Stages::new();
        if let Some(device) = work {
            disk::ensure_grown(&device, "/root");
        }
        guest_files::make_own(&own, &mut stages)?;
        Ok::<_, ConfigureError>(stages.done)
    });
    stages.done.extend(in_guest.await??);
    if let Some(network) = plan.network {
        let set_up = tokio::task::spawn_blocking(move || network::set_up(&network));
        let set_up = set_up.await.map_err(io::Error::other)?;
        stages.done.extend(set_up?);
    }
    Ok(stages.done)
}

/// Where a device of a name is expected to show up.
fn device(name: &str) -> PathBuf {
    PathBuf::from("/dev").join(name)
}

#[cfg(test)]
mod tests {
    use v1::configure_request::Root;

    use super::*;

    fn request(root: Option<Root>, overlay: &str) -> v1::ConfigureRequest {
        v1::ConfigureRequest {
            vm_id: "id".into(),
            hostname: "vm".into(),
            root,
            overlay_serial: overlay.into(),
            ..v1::ConfigureRequest::default()
        }
    }

    #[test]
    fn roots_and_overlays_go_together() {
        let check = |root, overlay, expected: Option<RootPlan>| {
            assert_eq!(plan(request(root, overlay)).ok().map(|plan| plan.root), expected);
        };
        let overlay = |lower| {
            Some(RootPlan::Overlay {
                lower,
                overlay_serial: "o".into(),
            })
        };
        check(
            Some(Root::RootBlockSerial("r".into())),
            "o",
            overlay(Lower::Block { serial: "r".into() }),
        );
        check(
            Some(Root::RootPmemIndex(1)),
            "o",
            overlay(Lower::Pmem { index: 1 }),
        );
        check(
            Some(Root::RootVirtiofsTag("t".into())),
            "o",
            overlay(Lower::Virtiofs { tag: "t".into() }),
        );
        check(
            Some(Root::RootCopySerial("c".into())),
            "",
            Some(RootPlan::Copy { serial: "c".into() }),
        );
        check(Some(Root::RootCopySerial("c".into())), "o", None);
        check(Some(Root::RootBlockSerial("r".into())), "", None);
        check(Some(Root::RootBlockSerial(String::new())), "o", None);
        check(Some(Root::RootVirtiofsTag("a/b".into())), "o", None);
        check(None, "o", None);
    }

    #[test]
    fn names_and_paths_are_checked() {
        let check = |change: fn(&mut v1::ConfigureRequest), fine: bool| {
            let mut request = request(Some(Root::RootBlockSerial("r".into())), "o");
            change(&mut request);
            assert_eq!(plan(request).is_ok(), fine);
        };
        let share = |target: &str| v1::SharedMount {
            tag: "t".into(),
            target: target.into(),
            read_only: true,
        };
        check(|_| (), true);
        check(|request| request.hostname = String::new(), false);
        check(|request| request.hostname = "x".repeat(65), false);
        check(|request| request.hostname = "a b".into(), false);
        for (target, fine) in [
            ("/mnt", true),
            ("mnt", false),
            ("/mnt/../etc", false),
            ("/a\0b", false),
        ] {
            let mut request = request(Some(Root::RootBlockSerial("r".into())), "o");
            request.mounts.push(share(target));
            assert_eq!(plan(request).is_ok(), fine, "{target:?}");
        }
    }
}
