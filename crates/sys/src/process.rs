//! Long-lived children that outlive us, and processes of an earlier daemon that are found again.
//!
//! A pid alone names nobody: it is reused. A [`ProcessIdentity`] (pid, start time, boot) can be stored and read back
//! after a restart of the daemon or of the host; a [`PidFd`] then holds exactly that process, so a signal never hits
//! a stranger.
//!
//! ```text
//! spawn_detached ─► (ProcessIdentity, PidFd) ─ store the identity ─► daemon restarts ─► PidFd::open ─► PidFd | gone
//! ```
//!
//! Starting one is in `process/detached.rs`. For short commands whose output is wanted, use `tokio::process` instead.

mod bound_folder;
mod confinement;
mod detached;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

pub use bound_folder::BoundFolder;
pub use confinement::{Access, ConfinedNetwork, Confinement, ConfinementError, Visible};
pub use detached::{
    DetachedCommand, Identity, InheritedFd, ResourceLimit, SpawnError, inherited_fd, share_fd, spawn_detached,
};
pub use rustix::process::Signal;

/// `/proc/<pid>/stat` is one line of 52 short fields; a program's name in it has at most 15 characters.
const MAX_STAT: u64 = 4096;

/// One process of one boot of this host: what is stored to find it again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: u32,
    /// When it started, in clock ticks since boot: field 22 of `/proc/<pid>/stat` (proc(5)).
    pub start_ticks: u64,
    /// Which boot: `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

impl ProcessIdentity {
    /// The identity of the process that has this pid now; `None` when there is none, or only its zombie.
    pub fn of(pid: u32) -> io::Result<Option<Self>> {
        match read_stat(pid)? {
            Some(stat) if !stat.is_dead() => Ok(Some(Self {
                pid,
                start_ticks: stat.start_ticks,
                boot_id: boot_id()?.to_owned(),
            })),
            _ => Ok(None),
        }
    }

    /// Whether that very process still runs. A zombie does not.
    pub fn is_alive(&self) -> bool {
        matches!(Self::of(self.pid), Ok(Some(now)) if now == *self)
    }
}

struct Stat {
    state: u8,
    session: u32,
    start_ticks: u64,
}

impl Stat {
    fn is_dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

/// Fields 3, 6 and 22 of a stat line. Field 2, the name in parentheses, may itself hold spaces and parentheses.
fn parse_stat(text: &[u8]) -> Option<Stat> {
    let end_of_name = text.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(&text[end_of_name + 1..]).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    // The third after field 3, and the 16th after that.
    let session = fields.nth(2)?.parse().ok()?;
    let start_ticks = fields.nth(15)?.parse().ok()?;
    Some(Stat {
        state,
        session,
        start_ticks,
    })
}

fn read_stat(pid: u32) -> io::Result<Option<Stat>> {
    let mut text = Vec::new();
    let read =
        File::open(format!("/proc/{pid}/stat")).and_then(|file| file.take(MAX_STAT).read_to_end(&mut text));
    match read {
        Ok(_) => parse_stat(&text)
            .map(Some)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData)),
        Err(e) if e.kind() == io::ErrorKind::NotFound || is_errno(&e, libc::ESRCH) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The other processes in the session of `leader`, which started it: its children, and theirs. Zombies excepted.
///
/// Nobody else when the leader is gone: its number may lead another session by then.
pub fn session_members(leader: &ProcessIdentity) -> io::Result<Vec<ProcessIdentity>> {
    let mut members = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if pid == leader.pid {
            continue;
        }
        match read_stat(pid)? {
            Some(stat) if stat.session == leader.pid && !stat.is_dead() => members.push(ProcessIdentity {
                pid,
                start_ticks: stat.start_ticks,
                boot_id: boot_id()?.to_owned(),
            }),
            _ => {}
        }
    }
    if !leader.is_alive() {
        members.clear();
    }
    Ok(members)
}

/// Ends this process at once, as SIGKILL from elsewhere does: nothing is flushed, dropped or told.
pub fn kill_self() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    // Not reached: a process cannot outlive its own SIGKILL.
    std::process::abort()
}

fn boot_id() -> io::Result<&'static str> {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    if let Some(id) = BOOT_ID.get() {
        return Ok(id);
    }
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BOOT_ID.get_or_init(|| text.trim().to_owned()))
}

fn is_errno(error: &io::Error, errno: i32) -> bool {
    error.raw_os_error() == Some(errno)
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// It called exit with this status.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "status {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// A handle on one process that no later process can take over. Cheap to clone; dropping it does nothing to the process.
#[derive(Clone, Debug)]
pub struct PidFd {
    fd: Arc<AsyncFd<OwnedFd>>,
    /// Fed by the task that reaps the process; `None` when it is not our child.
    exit: Option<watch::Receiver<Option<Exit>>>,
}

impl PidFd {
    /// Takes hold of a process that was found again; `None` when it is gone.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn open(identity: &ProcessIdentity) -> io::Result<Option<Self>> {
        let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let fd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // Only now is the pid held; before, it could have been given to another process.
        if !identity.is_alive() {
            return Ok(None);
        }
        Ok(Some(Self {
            fd: watch_readable(fd)?,
            exit: None,
        }))
    }

    /// Returns when the process has ended, with how it ended where it is our child (else nobody can know).
    ///
    /// May be called any number of times, also after the end; dropping the future is safe.
    pub async fn wait_exit(&self) -> Option<Exit> {
        if let Some(exit) = &self.exit
            && let Ok(exit) = exit.clone().wait_for(Option::is_some).await
        {
            return *exit;
        }
        // The readiness is never cleared: a pidfd that became readable stays so. An error means that the runtime
        // shuts down; nothing can be awaited then.
        if self.fd.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
        None
    }

    /// Whether the process still runs.
    pub fn is_alive(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(
            self.fd.get_ref(),
            rustix::event::PollFlags::IN,
        )];
        let zero = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        !matches!(rustix::event::poll(&mut fds, Some(&zero)), Ok(n) if n > 0)
    }

    /// A copy of a descriptor that the process has. Needs the rights of whoever may trace it (pidfd_getfd(2)).
    pub fn descriptor(&self, number: i32) -> io::Result<OwnedFd> {
        Ok(rustix::process::pidfd_getfd(
            self.fd.get_ref(),
            number,
            rustix::process::PidfdGetfdFlags::empty(),
        )?)
    }

    /// Sends a signal. A process that is already gone is no error.
    pub fn send_signal(&self, signal: Signal) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(self.fd.get_ref(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// Takes hold of our new child and starts the task that reaps it.
fn hold(pid: Pid) -> io::Result<(ProcessIdentity, PidFd)> {
    let number = pid.as_raw_nonzero().get().unsigned_abs();
    // The pid cannot have been reused: a dead child keeps it until it is reaped, and only the task below reaps.
    let stat = read_stat(number)?.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    let identity = ProcessIdentity {
        pid: number,
        start_ticks: stat.start_ticks,
        boot_id: boot_id()?.to_owned(),
    };
    let fd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let fd = watch_readable(fd)?;
    let (sender, receiver) = watch::channel(None);
    let reaped = Arc::clone(&fd);
    tokio::spawn(async move {
        if reaped.readable().await.is_ok() {
            match reap(&reaped) {
                Ok(exit) => {
                    sender.send_replace(exit);
                }
                Err(error) => tracing::warn!(pid = number, %error, "cannot reap a child"),
            }
        }
    });
    Ok((
        identity,
        PidFd {
            fd,
            exit: Some(receiver),
        },
    ))
}

/// Lets the runtime watch a pidfd.
fn watch_readable(fd: OwnedFd) -> io::Result<Arc<AsyncFd<OwnedFd>>> {
    // SAFETY: the runtime's registration must not outlive the open descriptor, nor may the descriptor change under it.
    // An `OwnedFd` moved in here is closed by `AsyncFd` alone, after it deregistered.
    let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? };
    Ok(Arc::new(watched))
}

fn reap(fd: &AsyncFd<OwnedFd>) -> io::Result<Option<Exit>> {
    let status = rustix::process::waitid(WaitId::PidFd(fd.get_ref().as_fd()), WaitIdOptions::EXITED)?;
    Ok(status.and_then(|status| {
        let code = status.exit_status().map(Exit::Code);
        code.or_else(|| status.terminating_signal().map(Exit::Signal))
    }))
}

/// Whether a test may make namespaces and mounts; it says when it is skipped.
#[cfg(test)]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root");
    }
    root
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn shell(script: &str) -> DetachedCommand {
        DetachedCommand {
            args: vec!["-c".into(), script.into()],
            ..DetachedCommand::new("/bin/sh")
        }
    }

    #[test]
    fn a_stat_line_is_read_whatever_the_program_is_called() {
        let fields = (4..22).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        for name in ["sh", "a b", ") R 1 (", "((", "é"] {
            let stat = parse_stat(format!("17 ({name}) S {fields} 4711 23").as_bytes()).unwrap();
            assert_eq!(
                (stat.state, stat.session, stat.start_ticks),
                (b'S', 6, 4711),
                "{name}"
            );
        }
        for bad in ["", "17 (sh", "17 (sh) S 1 2", "17 (sh)"] {
            assert!(parse_stat(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_child_ends_and_says_how_and_leaves_no_zombie() {
        for (script, expected) in [
            ("exit 7", Exit::Code(7)),
            ("kill -9 $$", Exit::Signal(9)),
            ("true", Exit::Code(0)),
        ] {
            let (identity, process) = spawn_detached(shell(script)).unwrap();
            assert_eq!(process.wait_exit().await, Some(expected), "{script}");
            assert_eq!(process.wait_exit().await, Some(expected), "asked again");
            assert!(!process.is_alive());
            assert!(!identity.is_alive());
            assert!(PidFd::open(&identity).unwrap().is_none());
            assert!(
                !Path::new(&format!("/proc/{}", identity.pid)).exists(),
                "a zombie is left"
            );
            process.send_signal(Signal::TERM).unwrap();
        }
    }

    #[tokio::test]
    async fn a_process_is_found_again_and_a_stranger_is_not() {
        let (identity, process) = spawn_detached(shell("exec sleep 600")).unwrap();
        assert!(identity.is_alive() && process.is_alive());
        assert_eq!(
            ProcessIdentity::of(identity.pid).unwrap().as_ref(),
            Some(&identity)
        );
        let stored: ProcessIdentity =
            serde_json::from_str(&serde_json::to_string(&identity).unwrap()).unwrap();
        let again = PidFd::open(&stored).unwrap().expect("it runs");
        for stranger in [
            ProcessIdentity {
                start_ticks: identity.start_ticks + 1,
                ..identity.clone()
            },
            ProcessIdentity {
                boot_id: "another".into(),
                ..identity.clone()
            },
            ProcessIdentity {
                pid: 0,
                ..identity.clone()
            },
            ProcessIdentity {
                pid: u32::MAX,
                ..identity.clone()
            },
        ] {
            assert!(!stranger.is_alive());
            assert!(PidFd::open(&stranger).unwrap().is_none(), "{stranger:?}");
        }
        again.send_signal(Signal::TERM).unwrap();
        assert_eq!(process.wait_exit().await, Some(Exit::Signal(15)));
        again.wait_exit().await;
    }

    #[tokio::test]
    async fn the_children_of_a_session_are_found_and_a_stranger_has_none() {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let mut command = shell("sleep 600 & echo $! >&9; wait");
        command.inherit = vec![InheritedFd {
            fd: writer,
            number: 9,
        }];
        let (leader, process) = spawn_detached(command).unwrap();
        let mut line = [0; 16];
        let length = rustix::io::read(&reader, &mut line).unwrap();
        let child: u32 = std::str::from_utf8(&line[..length])
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let members = session_members(&leader).unwrap();
        assert_eq!(members, [ProcessIdentity::of(child).unwrap().unwrap()]);
        let stranger = ProcessIdentity {
            start_ticks: leader.start_ticks + 1,
            ..leader.clone()
        };
        assert_eq!(session_members(&stranger).unwrap(), []);
        let child = PidFd::open(&members[0]).unwrap().unwrap();
        child.send_signal(Signal::KILL).unwrap();
        process.wait_exit().await;
        assert_eq!(session_members(&leader).unwrap(), []);
    }
}
