//! The first half of the seam: a VMM that can be asked what it can do, and that starts machines.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use offshoot_model::{ErrorKind, Explain, Mac};
use offshoot_sys::process::{Exit, SpawnError};
use serde::{Deserialize, Serialize};

use crate::machine::{Machine, MachineError, MachineState};
use crate::plan::{LaunchPlan, PlanError};

/// One VMM on this host. The daemon makes each driver once and shares it.
#[async_trait]
pub trait Driver: Send + Sync {
    /// The name that is stored with every VM and by which its driver is found again: `qemu`, `cloud-hypervisor` …
    fn kind(&self) -> &'static str;

    /// Asks the VMM what it is and what it can do. It starts the program a few times (about 100 ms), so callers keep
    /// the answer. Dropping the future is safe; nothing is ever left behind.
    async fn probe(&self) -> Result<VmmFacts, ProbeError>;

    /// Starts a VM. Once per plan; a second VM in the same run folder is a mistake of the caller.
    ///
    /// Returns when the VMM answers on its control socket; the guest boots meanwhile. On failure nothing is left: no
    /// process, no socket; only the log. As soon as the process exists, [`MachineState::FILE`] in the run folder says
    /// so, for a daemon that dies in here. Dropping the future is safe and ends the process.
    async fn launch(&self, plan: &LaunchPlan) -> Result<Box<dyn Machine>, LaunchError>;

    /// Names the machine of a plan without what differs from VM to VM (ids, paths, addresses, descriptors): a VM can go on
    /// from one that was saved when both plans have the same shape, on the same version of the VMM. `None` where this VMM
    /// cannot save. Asks the VMM at most once, as [`Driver::probe`].
    async fn shape(&self, plan: &LaunchPlan) -> Result<Option<String>, LaunchError>;

    /// Finds a VM that an earlier daemon launched; `None` when its process is gone, and then its sockets are too.
    ///
    /// Once per VM after a restart; while another handle of the same VM is held, a VMM with one control connection
    /// does not answer. Dropping the future is safe and changes nothing.
    async fn reopen(&self, state: &MachineState) -> Result<Option<Box<dyn Machine>>, ReopenError>;
}

/// What a VMM is and can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmFacts {
    /// [`Driver::kind`].
    pub kind: String,
    /// Its version, as it says it.
    pub version: String,
    /// Its program.
    pub program: PathBuf,
    /// What it can do.
    pub features: BTreeSet<VmmFeature>,
}

/// Something that not every VMM can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmFeature {
    /// It was built with KVM.
    Kvm,
    /// It can run guests without KVM.
    Tcg,
    /// virtio-pmem.
    Pmem,
    /// virtiofs shares.
    Virtiofs,
    /// The agent over virtio-serial.
    VirtioSerial,
    /// The agent over vsock, offered as a Unix socket.
    HybridVsock,
    /// Disks that grow while the guest runs.
    ResizeDisk,
    /// Templates: `Machine::snapshots` is `Some`.
    Snapshots,
}

/// Why a VMM could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no such program.
    #[error("`{}` is not installed", program.display())]
    Missing {
        /// The program.
        program: PathBuf,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// There is none of the programs that would do.
    #[error("{what} is not installed: there is no {}", listed(programs))]
    NoneOf {
        /// What was looked for.
        what: &'static str,
        /// Where.
        programs: Vec<PathBuf>,
        /// The Debian packages that have it, with the release where it matters.
        packages: &'static [&'static str],
    },
    /// It did not run.
    #[error("cannot run `{}`", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ran for longer than such a question takes.
    #[error("`{}` did not say what it can do within {limit:?}", program.display())]
    Timeout {
        /// The program.
        program: PathBuf,
        /// How long it had.
        limit: Duration,
    },
    /// It said something else than a VMM says.
    #[error("`{}` does not answer as expected: {said:?}", program.display())]
    Answer {
        /// The program.
        program: PathBuf,
        /// The start of what it said.
        said: String,
    },
    /// It is too old.
    #[error("`{}` is version {version}; at least {least} is needed", program.display())]
    TooOld {
        /// The program.
        program: PathBuf,
        /// Its version.
        version: String,
        /// The least that works.
        least: &'static str,
    },
}

fn listed(programs: &[PathBuf]) -> String {
    let quoted = programs.iter().map(|program| format!("`{}`", program.display()));
    quoted.collect::<Vec<_>>().join(", ")
}

impl Explain for ProbeError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::NotPossible
    }

    fn hints(&self) -> Vec<String> {
        match self {
            // No distribution that we know has these.
            Self::Missing {
                package: "firecracker" | "cloud-hypervisor",
                program,
            } => vec![format!(
                "put a release of the project at {}, or name it in the daemon's config (docs/config.md)",
                program.display()
            )],
            Self::Missing { package, .. } => vec![format!("apt install {package}")],
            Self::NoneOf { packages, .. } => packages
                .iter()
                .map(|name| format!("apt install {name}"))
                .collect(),
            Self::TooOld { .. } => vec!["use the one of Debian 12 or later, or run `offshoot doctor`".into()],
            Self::Run { .. } | Self::Timeout { .. } | Self::Answer { .. } => {
                vec!["run `offshoot doctor`".into()]
            }
        }
    }
}

/// Why a VM could not be started. Its process and its sockets are gone.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// No VMM can do it.
    #[error("this VM is not possible")]
    Plan {
        /// Why.
        #[source]
        source: PlanError,
    },
    /// This VMM cannot do it.
    #[error("{vmm} cannot {what}")]
    Unsupported {
        /// The VMM.
        vmm: &'static str,
        /// What it cannot do.
        what: &'static str,
    },
    /// The VMM could not be asked what it can do.
    #[error("cannot tell what the VMM can do")]
    Probe {
        /// Why.
        #[source]
        source: ProbeError,
    },
    /// A socket or file of the VM could not be made.
    #[error("cannot make `{}`", path.display())]
    Prepare {
        /// The socket or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody serves a shared folder of the plan.
    #[error("nobody serves the share `{tag}` at `{}`", path.display())]
    NoShare {
        /// The share.
        tag: String,
        /// Where its virtiofsd should listen.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM runs and refused a part of the plan, in its own words.
    #[error("the VMM refused to {doing}: {said}")]
    Refused {
        /// What it was asked for.
        doing: &'static str,
        /// Why not.
        said: String,
        /// Its whole log.
        log: PathBuf,
    },
    /// Nobody opened the TAP that the plan speaks of.
    #[error("the TAP of the network device {mac} was not opened")]
    NoTap {
        /// The device.
        mac: Mac,
    },
    /// The VMM did not take a saved VM.
    #[error("cannot restore the VM{}", said_text(said))]
    Restore {
        /// The end of what it said, at most 2 KiB.
        said: String,
        /// Its whole log.
        log: PathBuf,
        /// Why.
        #[source]
        source: MachineError,
    },
    /// The process could not be started.
    #[error("cannot start the VMM")]
    Spawn {
        /// Why.
        #[source]
        source: SpawnError,
    },
    /// The VMM ended before it answered. Its own words are the reason.
    #[error("the VMM ended at once with {}{}", exit_text(*exit), said_text(said))]
    Exited {
        /// How it ended, where that is known.
        exit: Option<Exit>,
        /// The end of what it said, at most 2 KiB.
        said: String,
        /// Its whole log.
        log: PathBuf,
    },
    /// The VMM runs but its control socket does not answer as it must.
    #[error("the VMM does not answer{}", said_text(said))]
    Control {
        /// The end of what it said, at most 2 KiB.
        said: String,
        /// Its whole log.
        log: PathBuf,
        /// Why.
        #[source]
        source: MachineError,
    },
}

fn exit_text(exit: Option<Exit>) -> String {
    exit.map_or_else(|| "unknown status".into(), |exit| exit.to_string())
}

fn said_text(said: &str) -> String {
    if said.is_empty() {
        String::new()
    } else {
        format!(": {said}")
    }
}

impl Explain for LaunchError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Plan { source } => source.kind(),
            Self::Probe { source } => source.kind(),
            Self::Unsupported { .. } => ErrorKind::NotPossible,
            Self::Control { source, .. } | Self::Restore { source, .. } => source.kind(),
            Self::NoShare { .. }
            | Self::Refused { .. }
            | Self::NoTap { .. }
            | Self::Prepare { .. }
            | Self::Spawn { .. }
            | Self::Exited { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Plan { source } => source.hints(),
            Self::Probe { source } => source.hints(),
            Self::Unsupported { .. } => vec!["choose another VMM with `--vmm`".into()],
            Self::NoShare { .. } | Self::NoTap { .. } | Self::Prepare { .. } | Self::Spawn { .. } => {
                vec!["run `offshoot doctor`".into()]
            }
            Self::Exited { log, .. }
            | Self::Refused { log, .. }
            | Self::Control { log, .. }
            | Self::Restore { log, .. } => {
                vec![format!("its whole log is {}", log.display())]
            }
        }
    }
}

/// Why a VM of an earlier daemon could not be taken over. Its process still runs.
#[derive(Debug, thiserror::Error)]
pub enum ReopenError {
    /// The state was written by another driver.
    #[error("the state of VMM `{found}` was given to the driver of `{wanted}`")]
    Driver {
        /// The driver that was asked.
        wanted: &'static str,
        /// The driver that wrote it.
        found: String,
    },
    /// The process could not be looked at.
    #[error("cannot look for process {pid}")]
    Process {
        /// Its id.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It runs, but its control socket does not answer.
    #[error("process {pid} runs but does not answer")]
    Control {
        /// Its id.
        pid: u32,
        /// Why.
        #[source]
        source: MachineError,
    },
}

impl Explain for ReopenError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Driver { .. } => Vec::new(),
            Self::Process { pid, .. } => vec![format!("look at /proc/{pid}")],
            Self::Control { .. } => vec!["end the VM with `offshoot rm -f`".into()],
        }
    }
}
