//! One virtiofsd for one share of one VM: started, waited for, found again, ended.
//!
//! ```text
//! serve ─► socket bound ─► process ─► VMM connects ─► VMM gone ─► process gone ─► files removed, words saved
//!                             └─ kill(), crash ────────────────────────┘
//! ```
//!
//! When its client has connected, the program forks into its namespaces; the process that we know waits for the other,
//! and takes it along when it dies. Ending by force looks for both.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use offshoot_model::{ErrorKind, Explain};
use offshoot_sys::process::{
    BoundFolder, DetachedCommand, Exit, Identity, InheritedFd, PidFd, ProcessIdentity, ResourceLimit, Signal,
    SpawnError, session_members, spawn_detached,
};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use tokio::sync::{OnceCell, watch};
use tokio_util::task::AbortOnDropHandle;

use super::args::{ArgumentsError, SOCKET_FD, arguments};
use super::probe::{VirtiofsdFacts, probe};
use crate::driver::ProbeError;
use crate::words::Words;

/// How long a virtiofsd may take to leave when asked: it has nothing to flush.
const TERM_PATIENCE: Duration = Duration::from_secs(2);
/// How long a killed process may take to go: it may wait for a disk or a network file system.
const KILL_PATIENCE: Duration = Duration::from_secs(30);
/// The most files that one virtiofsd keeps open. It has one open for every file that the guest's kernel remembers.
pub const MAX_OPEN_FILES: u64 = 1 << 18;
/// So many shares together may open at most what the host can (`fs.file-max`).
const SHARES_PER_HOST: u64 = 64;

/// Which virtiofsd.
#[derive(Clone, Debug, Default)]
pub struct VirtiofsdConfig {
    /// The program, an absolute path; `None` takes the first that exists of [`super::DEFAULT_PROGRAMS`].
    pub program: Option<PathBuf>,
}

/// The installed virtiofsd. The daemon makes one and shares it.
#[derive(Debug)]
pub struct Virtiofsd {
    config: VirtiofsdConfig,
    facts: OnceCell<VirtiofsdFacts>,
}

/// A folder to share with one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareConfig {
    /// The name under which the guest mounts it, as in [`crate::plan::SharePlan`].
    pub tag: String,
    /// The folder. Symbolic links are followed once, now.
    pub source: PathBuf,
    /// Whether writing is refused on the host, whatever the guest does.
    pub read_only: bool,
    /// What the guest may remember.
    pub cache: ShareCache,
    /// Where the VMM connects; at most 107 bytes.
    pub socket: PathBuf,
    /// The user and group that may connect: the VMM's.
    pub socket_owner: (u32, u32),
    /// The log that gets its words when it has ended; several shares may have one log.
    pub log: PathBuf,
    /// The folders of the control group that it is in, as in [`crate::plan::LaunchPlan`].
    pub cgroups: Vec<PathBuf>,
}

/// What a guest may remember of a share without asking again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShareCache {
    /// File content until the file is opened again, names and sizes for a second: others may change the folder.
    #[default]
    Auto,
    /// Everything, for good: for a folder that nobody changes.
    Always,
}

/// What is stored of a share's server to find it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareState {
    /// [`ShareConfig::tag`].
    pub tag: String,
    /// The folder, without symbolic links.
    pub source: PathBuf,
    /// Its process.
    pub process: ProcessIdentity,
    /// Where the VMM connects.
    pub socket: PathBuf,
    /// The log that gets its words when it has ended; several shares may have one log.
    pub log: PathBuf,
}

impl ShareState {
    /// A state has a few paths, each at most 4 KiB.
    const MAX_FILE: u64 = 64 << 10;

    /// The file beside the socket that holds the state from the moment the process exists until it is gone.
    pub fn file(socket: &Path) -> PathBuf {
        let mut name = socket.as_os_str().to_owned();
        name.push(".json");
        name.into()
    }

    /// Reads the state that [`Virtiofsd::serve`] left beside a socket; `None` when there is none, or it is no state.
    ///
    /// For a daemon that was killed between the start and its own record of it.
    pub fn load(socket: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(Self::file(socket)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut text = Vec::new();
        file.take(Self::MAX_FILE).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text).ok())
    }

    /// Writes the state beside the socket, whole or not at all. No fsync: processes do not outlive a power cut.
    fn save(&self) -> io::Result<()> {
        let file = Self::file(&self.socket);
        let unfinished = file.with_extension("tmp");
        std::fs::write(&unfinished, serde_json::to_vec(self)?)?;
        std::fs::rename(unfinished, file)
    }
}

/// How a share's server ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareExit {
    /// With what; `None` when it was not our child. Status 0 follows the end of the VMM's connection.
    pub process: Option<Exit>,
    /// The end of what it said, in one line of at most 2 KiB.
    pub said: String,
}

/// Why a folder cannot be shared. No process and no socket is left.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// There is no virtiofsd, or none that works.
    #[error("cannot share folders")]
    Probe {
        /// Why.
        #[source]
        source: ProbeError,
    },
    /// The folder cannot be looked at.
    #[error("cannot share `{}`", path.display())]
    Source {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no folder.
    #[error("cannot share `{}`: it is not a folder", path.display())]
    NotFolder {
        /// What was to be shared.
        path: PathBuf,
    },
    /// It is the root of the host, which neither program can be kept to.
    #[error("cannot share `/`")]
    Root,
    /// The program cannot be told of it.
    #[error("cannot share this folder")]
    Arguments {
        /// Why.
        #[source]
        source: ArgumentsError,
    },
    /// The socket or the log cannot be made.
    #[error("cannot make `{}`", path.display())]
    Prepare {
        /// The socket or log.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process cannot be started.
    #[error("cannot start virtiofsd")]
    Spawn {
        /// Why.
        #[source]
        source: SpawnError,
    },
}

impl Explain for ShareError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Probe { source } => source.kind(),
            Self::Source { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::NotFolder { .. } | Self::Root => ErrorKind::InvalidRequest,
            Self::Arguments { source } => source.kind(),
            Self::Source { .. } | Self::Prepare { .. } | Self::Spawn { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Probe { source } => source.hints(),
            Self::Source { source, path } if source.kind() == io::ErrorKind::NotFound => {
                vec![format!("make it first: mkdir -p {}", path.display())]
            }
            Self::NotFolder { .. } => vec!["share the folder that it is in".into()],
            Self::Root => vec!["share the folders below it that are needed, such as /srv".into()],
            Self::Arguments { source } => source.hints(),
            Self::Source { .. } => Vec::new(),
            Self::Prepare { .. } | Self::Spawn { .. } => vec!["run `offshoot doctor`".into()],
        }
    }
}

/// Why a share's server could not be ended.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    /// It could not be looked for, or a signal could not be sent.
    #[error("cannot end virtiofsd, process {pid}")]
    Signal {
        /// Its id.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It did not go.
    #[error("virtiofsd, process {pid}, is still there after {limit:?}")]
    StillThere {
        /// Its id.
        pid: u32,
        /// How long it had.
        limit: Duration,
    },
}

impl Explain for KillError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Signal { .. } => Vec::new(),
            Self::StillThere { pid, .. } => vec![format!("look at what it waits for in /proc/{pid}/stack")],
        }
    }
}

impl Virtiofsd {
    /// One that has not been looked for yet.
    pub fn new(config: VirtiofsdConfig) -> Self {
        Self {
            config,
            facts: OnceCell::new(),
        }
    }

    /// What is installed; asked once, until it answers. Dropping the future is safe.
    pub async fn probe(&self) -> Result<VirtiofsdFacts, ProbeError> {
        let facts = self
            .facts
            .get_or_try_init(|| probe(self.config.program.as_deref()))
            .await?;
        Ok(facts.clone())
    }

    /// Starts a virtiofsd for one share of one VM. When it returns, the VMM can connect.
    ///
    /// As soon as the process exists, [`ShareState::load`] finds it, for a daemon that dies in here. What the program
    /// dislikes it says a moment later: [`ShareServer::wait_exit`] then returns. As root only, and
    /// once per socket. On failure nothing is left. Dropping the future is safe and leaves nothing.
    pub async fn serve(&self, share: &ShareConfig) -> Result<ShareServer, ShareError> {
        let facts = self
            .probe()
            .await
            .map_err(|source| ShareError::Probe { source })?;
        let unreadable = |source| ShareError::Source {
            path: share.source.clone(),
            source,
        };
        let source = tokio::fs::canonicalize(&share.source).await.map_err(unreadable)?;
        if !tokio::fs::metadata(&source).await.map_err(unreadable)?.is_dir() {
            return Err(ShareError::NotFolder { path: source });
        }
        if source == Path::new("/") {
            return Err(ShareError::Root);
        }
        let args = arguments(&source, share.read_only, share.cache, &facts)
            .map_err(|source| ShareError::Arguments { source })?;
        let words = Words::new("virtiofsd-words");
        let output = words.and_then(|words| Ok((words.writer()?, words)));
        let (output, words) = output.map_err(|source| ShareError::Prepare {
            path: share.log.clone(),
            source,
        })?;
        let socket = listen(&share.socket, share.socket_owner).map_err(|source| ShareError::Prepare {
            path: share.socket.clone(),
            source,
        })?;
        let command = DetachedCommand {
            args,
            identity: Some(Identity {
                uid: 0,
                gid: 0,
                groups: Vec::new(),
            }),
            output: Some(output),
            cgroups: share.cgroups.clone(),
            bound_folder: Some(BoundFolder {
                path: source.clone(),
                read_only: share.read_only,
            }),
            inherit: vec![InheritedFd {
                fd: socket,
                number: SOCKET_FD,
            }],
            limits: vec![ResourceLimit::Core(0), ResourceLimit::OpenFiles(open_files())],
            // The guest's kernel has applied its users' umasks.
            umask: 0,
            ..DetachedCommand::new(&facts.program)
        };
        let (process, pidfd) = spawn_detached(command).map_err(|source| {
            remove_files(&share.socket);
            ShareError::Spawn { source }
        })?;
        tracing::debug!(tag = share.tag, pid = process.pid, source = %source.display(), "virtiofsd started");
        let state = ShareState {
            tag: share.tag.clone(),
            source,
            process,
            socket: share.socket.clone(),
            log: share.log.clone(),
        };
        if let Err(source) = state.save() {
            if let Err(error) = pidfd.send_signal(Signal::KILL) {
                tracing::warn!(tag = share.tag, %error, "cannot kill a virtiofsd that cannot be recorded");
            }
            remove_files(&share.socket);
            return Err(ShareError::Prepare {
                path: ShareState::file(&share.socket),
                source,
            });
        }
        Ok(ShareServer::start(state, pidfd, Some(words)))
    }

    /// Finds a server that an earlier daemon started; `None` when its process is gone, and then its socket is too.
    pub fn reopen(state: &ShareState) -> io::Result<Option<ShareServer>> {
        let Some(process) = PidFd::open(&state.process)? else {
            remove_files(&state.socket);
            return Ok(None);
        };
        let words = Words::of_process(state.process.pid)
            .inspect_err(|error| tracing::warn!(tag = state.tag, %error, "cannot reach what virtiofsd says"));
        Ok(Some(ShareServer::start(state.clone(), process, words.ok())))
    }
}

/// The limit of open files: ours, unless that is more than one share may have.
fn open_files() -> u64 {
    let ours = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let host: Option<u64> = std::fs::read_to_string("/proc/sys/fs/file-max")
        .ok()
        .and_then(|text| text.trim().parse().ok());
    MAX_OPEN_FILES
        .min(ours.unwrap_or(MAX_OPEN_FILES))
        .min(host.map_or(MAX_OPEN_FILES, |host| host / SHARES_PER_HOST))
}

/// A listening socket for one user, in place of whatever an earlier run left there.
fn listen(path: &Path, (uid, gid): (u32, u32)) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let open = || -> io::Result<()> {
        // Nobody can connect before it listens, so the mode is right before it matters.
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
        std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
        // One VMM connects, once.
        Ok(rustix::net::listen(&socket, 1)?)
    };
    open().inspect_err(|_| remove_files(path))?;
    Ok(socket)
}

/// Removes socket and state of a process that is gone.
fn remove_files(socket: &Path) {
    for path in [socket, &ShareState::file(socket)] {
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove a file of a virtiofsd that is gone");
        }
    }
}

/// A running virtiofsd. Dropping it lets go of it and leaves it running.
///
/// Methods may be called any number of times and at the same time; dropping a future is safe.
#[derive(Debug)]
pub struct ShareServer {
    shared: Arc<Shared>,
    _watcher: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Shared {
    state: ShareState,
    process: PidFd,
    words: Option<Words>,
    exit: watch::Sender<Option<ShareExit>>,
}

impl ShareServer {
    fn start(state: ShareState, process: PidFd, words: Option<Words>) -> Self {
        let shared = Arc::new(Shared {
            state,
            process,
            words,
            exit: watch::Sender::new(None),
        });
        let watcher = tokio::spawn(watch_until_gone(Arc::clone(&shared)));
        Self {
            shared,
            _watcher: AbortOnDropHandle::new(watcher),
        }
    }

    /// What is stored to find it again. It does not change.
    pub fn state(&self) -> &ShareState {
        &self.shared.state
    }

    /// Returns when the process is gone: its VMM has closed the connection, or it could not start, or it died. Its
    /// socket is then gone and its words are in the log.
    pub async fn wait_exit(&self) -> ShareExit {
        let mut exit = self.shared.exit.subscribe();
        // The sender lives in `self`, so waiting cannot fail; the value is there when it returns.
        let exit = exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| exit.clone());
        exit.unwrap_or(ShareExit {
            process: None,
            said: String::new(),
        })
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<ShareExit> {
        self.shared.exit.borrow().clone()
    }

    /// Ends it: asks, and after two seconds insists. Returns when its processes and its socket are gone.
    pub async fn kill(&self) -> Result<(), KillError> {
        let pid = self.shared.state.process.pid;
        let failed = |source| KillError::Signal { pid, source };
        let members = session_members(&self.shared.state.process).map_err(failed)?;
        let mut processes = vec![self.shared.process.clone()];
        for member in &members {
            processes.extend(PidFd::open(member).map_err(failed)?);
        }
        let all_gone = async {
            for process in &processes {
                process.wait_exit().await;
            }
        };
        tokio::pin!(all_gone);
        self.shared.process.send_signal(Signal::TERM).map_err(failed)?;
        if tokio::time::timeout(TERM_PATIENCE, &mut all_gone).await.is_err() {
            for process in &processes {
                process.send_signal(Signal::KILL).map_err(failed)?;
            }
            tokio::time::timeout(KILL_PATIENCE, &mut all_gone)
                .await
                .map_err(|_| KillError::StillThere {
                    pid,
                    limit: KILL_PATIENCE,
                })?;
        }
        self.wait_exit().await;
        Ok(())
    }
}

async fn watch_until_gone(shared: Arc<Shared>) {
    let process = shared.process.wait_exit().await;
    remove_files(&shared.state.socket);
    let said = shared
        .words
        .as_ref()
        .map(Words::said)
        .unwrap_or_default()
        .join("; ");
    if let Some(words) = &shared.words
        && let Err(error) = words.save(&shared.state.log)
    {
        let log = shared.state.log.display();
        tracing::warn!(tag = shared.state.tag, %log, %error, "cannot keep what virtiofsd said");
    }
    tracing::debug!(tag = shared.state.tag, ?process, said, "virtiofsd is gone");
    shared.exit.send_replace(Some(ShareExit { process, said }));
}
