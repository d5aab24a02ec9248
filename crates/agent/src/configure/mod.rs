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
    let network = network.map_err(|what| ConfigureError::Request { what })?;
    Ok(ConfigurePlan {
        hostname: request.hostname,
        realtime: Duration::from_nanos(request.realtime_ns),
        entropy: request.entropy.to_vec(),
        root,
        work_serial: Some(request.work_serial).filter(|serial| !serial.is_empty()),
        mounts: request.mounts,
        network,
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
        let duration_us = u64::try_from(self.last.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.done.push(v1::GuestStage {
            name: name.to_owned(),
            duration_us,
        });
        self.last = Instant::now();
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
    stages.end("machine");
    let mut disks = root::mount_root(&plan.root, &mut stages)?;
    let work = plan.work_serial.as_deref().map(disk::find).transpose()?;
    let guest = guest_files::GuestPlan {
        names: names::Names::new(&plan.hostname, plan.network.as_ref()),
        work: work.clone(),
        mounts: plan.mounts.clone(),
    };
    let (workload, guest_stages) = Workload::create(root::SYSROOT, move || guest_files::prepare(&guest))?;
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
    Ok(Configured {
        workload,
        disks,
        stages: stages.done,
    })
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
