//! The second half of the seam: one VMM process with one VM in it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use offshoot_model::{ByteSize, ErrorKind, Explain, VmId};
use offshoot_sys::process::{Exit, ProcessIdentity};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// A running VMM with its VM. Dropping it lets go of the control connection and leaves the VM running.
///
/// Unless said otherwise, methods may be called in any order, any number of times and at the same time; dropping a
/// future is safe, and what it asked for may still happen.
#[async_trait]
pub trait Machine: Send + Sync {
    /// What is stored to find the VM again. It does not change while the VM runs.
    fn state(&self) -> &MachineState;

    /// Where the agent is reached.
    fn agent_endpoint(&self) -> &AgentEndpoint {
        &self.state().agent
    }

    /// What the VM does now.
    async fn status(&self) -> Result<MachineStatus, MachineError>;

    /// Stops the vCPUs; nothing if they stand already.
    async fn pause(&self) -> Result<(), MachineError>;

    /// Lets the vCPUs run on; nothing if they run.
    async fn resume(&self) -> Result<(), MachineError>;

    /// Presses the power button. Returns at once; a guest may ignore it.
    async fn power_button(&self) -> Result<(), MachineError>;

    /// Ends the VMM in an orderly way, at once, without asking the guest: its disks are flushed as far as the guest
    /// wrote. Returns when the process is gone. After an error it may still run, and `kill` is next.
    async fn quit(&self) -> Result<(), MachineError>;

    /// Ends the VMM by force. Returns when the process is gone; its sockets are then gone too.
    async fn kill(&self) -> Result<(), MachineError>;

    /// Returns when the process is gone and nothing of it is left but its logs.
    async fn wait_exit(&self) -> VmmExit;

    /// Whether the guest stands still because the host has no room for what it writes. It goes on by itself once there
    /// is some, and has not noticed.
    fn waits_for_room(&self) -> watch::Receiver<bool>;

    /// Grows a disk, of a file that may have grown already. Never shrinks one.
    async fn resize_disk(&self, serial: &str, size: ByteSize) -> Result<(), MachineError>;

    /// The last bytes that the guest's console said, at most `limit`, saved to the console log first. They come from
    /// the guest: escape them before they are shown.
    async fn console_tail(&self, limit: usize) -> Result<Vec<u8>, MachineError>;

    /// Saving to a template, where this VMM can. Some can only when they were launched for it
    /// ([`crate::plan::Origin::KernelInto`]).
    fn snapshots(&self) -> Option<&dyn Snapshots>;
}

/// Saving a VM so that copies of it can be started.
#[async_trait]
pub trait Snapshots: Send + Sync {
    /// Saves the devices of the paused VM into a new file, at most `limit` of them; its memory is then in the file that its
    /// plan was launched with ([`crate::plan::Origin::KernelInto`]). Once per VM; the VM stays paused. On failure the files
    /// hold rubbish, which the caller removes. Dropping the future leaves the same.
    async fn save(&self, state: &Path, limit: ByteSize) -> Result<(), MachineError>;
}

/// What is stored of a machine to find it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// The driver that launched it ([`crate::Driver::kind`]).
    pub driver: String,
    /// Whose VM it is.
    pub vm: VmId,
    /// Its process.
    pub process: ProcessIdentity,
    /// Its folder of sockets.
    pub run_dir: PathBuf,
    /// Its control socket.
    pub control: PathBuf,
    /// Where the agent is reached.
    pub agent: AgentEndpoint,
    /// Where the end of the guest's console is kept.
    pub console: PathBuf,
    /// The log that gets the VMM's words when it has ended.
    #[serde(default)]
    pub log: PathBuf,
    /// The files of its disks by serial, where the driver needs them after the launch.
    #[serde(default)]
    pub disks: BTreeMap<String, PathBuf>,
}

impl MachineState {
    /// The file in the run folder that holds the state from the moment the process exists until it is gone.
    pub const FILE: &str = "machine.json";

    /// A state has a few paths, each at most 4 KiB.
    const MAX_FILE: u64 = 64 << 10;

    /// Reads the state that a launch left in a run folder; `None` when there is none, or it is no state.
    ///
    /// For a daemon that was killed between the launch and its own record of it.
    pub fn load(run_dir: &Path) -> io::Result<Option<Self>> {
        use std::io::Read;
        let file = match std::fs::File::open(run_dir.join(Self::FILE)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut text = Vec::new();
        file.take(Self::MAX_FILE).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text).ok())
    }

    /// Writes the state into its run folder, whole or not at all. No fsync: processes do not outlive a power cut.
    pub(crate) fn save(&self) -> io::Result<()> {
        let unfinished = self.run_dir.join(".machine.json");
        std::fs::write(&unfinished, serde_json::to_vec(self)?)?;
        std::fs::rename(unfinished, self.run_dir.join(Self::FILE))
    }

    /// Removes sockets and state of a process that is gone.
    pub(crate) fn remove_files(&self) {
        let agent = match &self.agent {
            AgentEndpoint::UnixLink(path) | AgentEndpoint::HybridVsock { path, .. } => path,
        };
        for path in [&self.control, agent, &self.run_dir.join(Self::FILE)] {
            if let Err(error) = std::fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(vm = %self.vm, path = %path.display(), %error, "cannot remove a file of a VMM that is gone");
            }
        }
    }
}

/// How a connection to the agent is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentEndpoint {
    /// A Unix socket that is one end of a byte stream (virtio-serial). It takes one client at a time, and what an
    /// earlier client left unread may still come.
    UnixLink(PathBuf),
    /// A Unix socket that is told `CONNECT <port>` and then is a vsock connection.
    HybridVsock {
        /// The socket.
        path: PathBuf,
        /// The agent's port.
        port: u32,
    },
}

/// What a VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineStatus {
    /// Made, and its vCPUs have not run yet.
    Prepared,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand.
    Paused,
    /// The guest switched itself off or panicked; the process is about to go.
    Ended,
}

/// How a VMM process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmExit {
    /// Why.
    pub cause: ExitCause,
    /// With what; `None` when it was not our child.
    pub process: Option<Exit>,
}

/// Why a VMM process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitCause {
    /// The guest switched itself off.
    GuestPowerOff,
    /// The guest asked for a reset, which is not granted. A guest kernel that panics and reboots is one, too.
    GuestReset,
    /// The guest's kernel said that it panicked.
    GuestPanic,
    /// [`Machine::quit`].
    Quit,
    /// [`Machine::kill`].
    Killed,
    /// Without anybody asking: a crash, or a signal from elsewhere.
    Died,
}

impl fmt::Display for ExitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GuestPowerOff => "the guest switched itself off",
            Self::GuestReset => "the guest asked for a reset",
            Self::GuestPanic => "the guest's kernel panicked",
            Self::Quit => "the VMM was told to quit",
            Self::Killed => "the VMM was killed",
            Self::Died => "the VMM died",
        })
    }
}

/// Why a machine did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The process is gone.
    #[error("the VMM is gone")]
    Gone,
    /// The control connection failed or the VMM refused.
    #[error("cannot {doing}")]
    Control {
        /// What was asked for.
        doing: &'static str,
        /// Why.
        #[source]
        source: ControlError,
    },
    /// A signal could not be sent.
    #[error("cannot kill process {pid}")]
    Kill {
        /// Its id.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process did not go.
    #[error("process {pid} is still there after {limit:?}")]
    StillThere {
        /// Its id.
        pid: u32,
        /// How long it had.
        limit: Duration,
    },
    /// There is no such disk.
    #[error("the VM has no disk with serial `{serial}`")]
    NoDisk {
        /// The serial.
        serial: String,
    },
    /// A disk would lose what it holds.
    #[error("cannot shrink disk `{serial}` from {from} to {to}")]
    Shrink {
        /// The serial.
        serial: String,
        /// Its size.
        from: ByteSize,
        /// The size asked for.
        to: ByteSize,
    },
    /// What was to be saved could not be.
    #[error("cannot save the VM to `{}`", path.display())]
    Save {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM gave up while it saved or restored a VM.
    #[error("the VMM could not {doing}")]
    Migration {
        /// What was asked for.
        doing: &'static str,
    },
    /// The file of a disk could not be looked at or grown.
    #[error("cannot grow `{}`", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The console log could not be written or read.
    #[error("cannot keep the console log `{}`", path.display())]
    Console {
        /// The log.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What went wrong on a control connection.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nothing listens.
    #[error("cannot connect to `{}`", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the control connection broke")]
    Io {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM closed it.
    #[error("the VMM closed the control connection")]
    Closed,
    /// No answer in time.
    #[error("no answer within {limit:?}")]
    Timeout {
        /// How long it had.
        limit: Duration,
    },
    /// An answer longer than any that is expected.
    #[error("the answer is longer than {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// An answer that is not the protocol's.
    #[error("the answer is not one: {said:?}")]
    Malformed {
        /// The start of what came.
        said: String,
    },
    /// The VMM said no.
    #[error("the VMM refused: {said}")]
    Refused {
        /// Its reason.
        said: String,
    },
}

impl Explain for MachineError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Gone => ErrorKind::WrongState,
            Self::NoDisk { .. } => ErrorKind::NotFound,
            Self::Shrink { .. } => ErrorKind::InvalidRequest,
            Self::Control { .. }
            | Self::Kill { .. }
            | Self::StillThere { .. }
            | Self::Disk { .. }
            | Self::Console { .. }
            | Self::Save { .. }
            | Self::Migration { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Control { .. } => {
                vec!["end the VM with `offshoot kill` if it does not answer any more".into()]
            }
            Self::StillThere { pid, .. } => vec![format!("look at what it waits for in /proc/{pid}/stack")],
            _ => Vec::new(),
        }
    }
}
