//! Starting a child that outlives us: fork, a fixed list of steps, exec.
//!
//! ```text
//! us                                    the child
//! prepare everything (allocations)
//! block signals, fork ────────────────► control groups, session, its root, descriptors, limits, mounts, groups,
//! read the report pipe                  gid, uid, no_new_privs, umask, folder, default signals, filter
//!   five bytes: step and errno  ◄────── a step failed: tell, _exit
//!   end of file                 ◄────── execve closed the pipe
//! pidfd, task that reaps
//! ```
//!
//! Our own fork instead of `std::process::Command`: that one keeps a report pipe of its own at a number it chooses,
//! which descriptors with fixed numbers could overwrite.

use std::ffi::{CString, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::process::Pid;

use super::bound_folder::{self, BoundFolder};
use super::confinement::{self, Confinement, ConfinementError};
use super::{PidFd, ProcessIdentity, Signal, hold};

/// Who a child becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User; other than 0 it also drops every capability.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups, exactly these.
    pub groups: Vec<u32>,
}

/// A file descriptor that a child gets under a number that its arguments can name.
#[derive(Debug)]
pub struct InheritedFd {
    /// What it gets; our copy is closed with the command.
    pub fd: OwnedFd,
    /// Its number in the child, at least 3.
    pub number: RawFd,
}

/// A resource limit of a child (setrlimit(2)), soft and hard alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResourceLimit {
    /// Core dumps, bytes. 0 keeps a guest's memory out of them.
    Core(u64),
    /// The largest file it may write, bytes.
    FileSize(u64),
    /// Open file descriptors.
    OpenFiles(u64),
    /// Locked memory, bytes.
    LockedMemory(u64),
}

impl ResourceLimit {
    fn raw(self) -> (libc::__rlimit_resource_t, u64) {
        match self {
            Self::Core(n) => (libc::RLIMIT_CORE, n),
            Self::FileSize(n) => (libc::RLIMIT_FSIZE, n),
            Self::OpenFiles(n) => (libc::RLIMIT_NOFILE, n),
            Self::LockedMemory(n) => (libc::RLIMIT_MEMLOCK, n),
        }
    }
}

/// A child that outlives us: its own session, standard input from `/dev/null`, nothing inherited but what is named.
#[derive(Debug)]
pub struct DetachedCommand {
    /// Absolute path of the program; `PATH` is not searched.
    pub program: PathBuf,
    /// Arguments after the program's name.
    pub args: Vec<OsString>,
    /// The whole environment, `(name, value)`.
    pub env: Vec<(OsString, OsString)>,
    /// Working directory.
    pub cwd: PathBuf,
    /// Who it becomes; `None` keeps who we are.
    pub identity: Option<Identity>,
    /// Where standard output and error are appended (made with mode 0600); `None` is `/dev/null`.
    pub log: Option<PathBuf>,
    /// What standard output and error are instead of a log.
    pub output: Option<OwnedFd>,
    /// What standard output is, where it is not the same as standard error.
    pub stdout: Option<OwnedFd>,
    /// The network namespace that it enters; `None` stays in ours. Needs `CAP_SYS_ADMIN`.
    pub network: Option<OwnedFd>,
    /// The folders of the control group that it enters before anything else, one for each hierarchy; none leaves it in
    /// ours.
    pub cgroups: Vec<PathBuf>,
    /// A folder that it sees with fewer rights, by mounts of its own; `None` shares our mounts. Needs `CAP_SYS_ADMIN`.
    pub bound_folder: Option<BoundFolder>,
    /// What it sees and may do, in namespaces of its own; `None` leaves it in ours. Needs `CAP_SYS_ADMIN`.
    pub confinement: Option<Confinement>,
    /// File descriptors it gets.
    pub inherit: Vec<InheritedFd>,
    /// Resource limits.
    pub limits: Vec<ResourceLimit>,
    /// Its umask.
    pub umask: u32,
}

impl DetachedCommand {
    /// A command with no arguments, an empty environment, `/` as its working directory and umask 077.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: PathBuf::from("/"),
            identity: None,
            log: None,
            output: None,
            stdout: None,
            network: None,
            cgroups: Vec::new(),
            bound_folder: None,
            confinement: None,
            inherit: Vec::new(),
            limits: Vec::new(),
            umask: 0o077,
        }
    }
}

/// Why a child could not be started. Nothing is left behind but perhaps its empty log.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// An argument, variable or path holds a NUL byte.
    #[error("a program's argument, environment or path holds a NUL byte")]
    Nul,
    /// Two inherited descriptors want one number, or a number below 3.
    #[error("file descriptor number {number} cannot be given to a child")]
    FdNumber {
        /// The number.
        number: RawFd,
    },
    /// Binding this folder would have no effect on what the child sees.
    #[error("`{}` cannot be bound on itself: it is not a folder below the root", path.display())]
    BoundFolder {
        /// The folder.
        path: PathBuf,
    },
    /// What it is to see cannot be laid out.
    #[error("cannot confine `{}`", program.display())]
    Confinement {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: ConfinementError,
    },
    /// The log cannot be opened.
    #[error("cannot open log `{}`", path.display())]
    Log {
        /// The log.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control group that it is to enter is not there, or not ours to fill.
    #[error("cannot enter control group `{}`", path.display())]
    Cgroup {
        /// The group.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A step in the new process failed, the last one being to execute the program.
    #[error("cannot {step} to start `{}`", program.display())]
    Child {
        /// What was tried.
        step: &'static str,
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process could not be made or taken hold of.
    #[error("cannot make a process for `{}`", program.display())]
    Process {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The steps of a child between fork and exec, in order; their index travels through the pipe when one fails.
const STEPS: [&str; 29] = [
    "enter its control group",
    "start a session",
    "move its file descriptors",
    "close other file descriptors",
    "set a resource limit",
    bound_folder::STEPS[0],
    bound_folder::STEPS[1],
    bound_folder::STEPS[2],
    bound_folder::STEPS[3],
    bound_folder::STEPS[4],
    "set the groups",
    "set the group id",
    "set the user id",
    "set no_new_privs",
    "enter the working directory",
    "execute the program",
    "enter its network namespace",
    "filter its system calls",
    confinement::STEPS[0],
    confinement::STEPS[1],
    confinement::STEPS[2],
    confinement::STEPS[3],
    confinement::STEPS[4],
    confinement::STEPS[5],
    confinement::STEPS[6],
    confinement::STEPS[7],
    confinement::STEPS[8],
    confinement::STEPS[9],
    confinement::STEPS[10],
];
/// Where the steps of [`bound_folder`] start.
const FIRST_BIND_STEP: u8 = 5;
/// Where the steps of [`confinement`] start.
const FIRST_CONFINEMENT_STEP: u8 = 18;

/// Everything a child needs, laid out before the fork: after it, nothing may allocate.
struct Prepared {
    program: CString,
    cwd: CString,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    /// `(ours, the child's)`, with the standard three.
    fds: Vec<(RawFd, RawFd)>,
    /// Room for the copies that are made on the way.
    copies: Vec<RawFd>,
    /// One above every number that is given out.
    above: RawFd,
    limits: Vec<(libc::__rlimit_resource_t, u64)>,
    /// The open `cgroup.procs` of its control groups.
    cgroups: Vec<File>,
    /// The network namespace to enter.
    network: Option<RawFd>,
    /// The folder to bind, and whether it is to be read-only.
    bound_folder: Option<(CString, bool)>,
    confinement: Option<confinement::Prepared>,
    identity: Option<Identity>,
    umask: u32,
    /// Own what `argv` and `envp` point to.
    _texts: Vec<CString>,
}

/// Starts a child that outlives us and is reaped as long as we live.
///
/// The child has its own session and process group, no_new_privs, default signal handlers and exactly the named
/// descriptors. Blocks until the program is executed or has failed to (a few milliseconds at most).
///
/// # Panics
/// Outside a Tokio runtime.
pub fn spawn_detached(command: DetachedCommand) -> Result<(ProcessIdentity, PidFd), SpawnError> {
    let process_error = |source| SpawnError::Process {
        program: command.program.clone(),
        source,
    };
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(process_error)?;
    let log = command.log.as_deref().map(open_log).transpose()?;
    let output = match (&command.output, &log) {
        (Some(output), _) => output.as_raw_fd(),
        (None, Some(log)) => log.as_raw_fd(),
        (None, None) => null.as_raw_fd(),
    };
    let mut prepared = prepare(&command, null.as_raw_fd(), output)?;
    let (report_reader, report_writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| process_error(e.into()))?;

    let pid = fork_with_signals_blocked(&mut prepared, report_writer.as_raw_fd()).map_err(process_error)?;
    drop(report_writer);

    let mut report = [0; 5];
    let failed = matches!(File::from(report_reader).read_exact(&mut report), Ok(()));
    let held = if failed {
        Err(child_failure(&command.program, report))
    } else {
        hold(pid).map_err(process_error)
    };
    // Closes our copies of what the child inherited: of a socket, only the child may hold the listening end now.
    drop(command);
    held.inspect_err(|_| abandon(pid))
}

fn child_failure(program: &Path, report: [u8; 5]) -> SpawnError {
    let [step, errno @ ..] = report;
    SpawnError::Child {
        step: STEPS.get(usize::from(step)).copied().unwrap_or("prepare"),
        program: program.to_owned(),
        source: io::Error::from_raw_os_error(i32::from_ne_bytes(errno)),
    }
}

/// Opens a log for appending; a symbolic link in its place is refused.
fn open_log(path: &Path) -> Result<File, SpawnError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|source| SpawnError::Log {
            path: path.to_owned(),
            source,
        })
}

/// Opens the file through which a process enters a control group.
fn open_procs(group: &Path) -> Result<File, SpawnError> {
    OpenOptions::new()
        .write(true)
        .open(group.join("cgroup.procs"))
        .map_err(|source| SpawnError::Cgroup {
            path: group.to_owned(),
            source,
        })
}

fn prepare(command: &DetachedCommand, null: RawFd, output: RawFd) -> Result<Prepared, SpawnError> {
    let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| SpawnError::Nul);
    let program = text(command.program.as_os_str().as_bytes())?;
    let mut texts = vec![program.clone()];
    for arg in &command.args {
        texts.push(text(arg.as_bytes())?);
    }
    let argc = texts.len();
    for (name, value) in &command.env {
        texts.push(text(&[name.as_bytes(), b"=", value.as_bytes()].concat())?);
    }
    let pointers = |texts: &[CString]| -> Vec<_> {
        texts
            .iter()
            .map(|t| t.as_ptr())
            .chain(std::iter::once(std::ptr::null()))
            .collect()
    };
    let stdout = command.stdout.as_ref().map_or(output, AsRawFd::as_raw_fd);
    let mut fds = vec![(null, 0), (stdout, 1), (output, 2)];
    for inherited in &command.inherit {
        if inherited.number < 3 || fds.iter().any(|(_, number)| *number == inherited.number) {
            return Err(SpawnError::FdNumber {
                number: inherited.number,
            });
        }
        fds.push((inherited.fd.as_raw_fd(), inherited.number));
    }
    Ok(Prepared {
        argv: pointers(&texts[..argc]),
        envp: pointers(&texts[argc..]),
        program,
        cwd: text(command.cwd.as_os_str().as_bytes())?,
        copies: Vec::with_capacity(fds.len()),
        above: fds.iter().map(|(_, number)| number + 1).max().unwrap_or(3),
        fds,
        limits: command.limits.iter().map(|limit| limit.raw()).collect(),
        cgroups: command
            .cgroups
            .iter()
            .map(|group| open_procs(group))
            .collect::<Result<_, _>>()?,
        network: command.network.as_ref().map(AsRawFd::as_raw_fd),
        bound_folder: match &command.bound_folder {
            Some(folder) if !folder.is_possible() => {
                return Err(SpawnError::BoundFolder {
                    path: folder.path.clone(),
                });
            }
            Some(folder) => Some((text(folder.path.as_os_str().as_bytes())?, folder.read_only)),
            None => None,
        },
        confinement: command
            .confinement
            .as_ref()
            .map(|confinement| {
                confinement::prepare(confinement).map_err(|source| SpawnError::Confinement {
                    program: command.program.clone(),
                    source,
                })
            })
            .transpose()?,
        identity: command.identity.clone(),
        umask: command.umask,
        _texts: texts,
    })
}

/// Forks with every signal blocked, so that no handler of ours runs in the child.
fn fork_with_signals_blocked(prepared: &mut Prepared, report: RawFd) -> io::Result<Pid> {
    // SAFETY: plain libc calls on valid, initialised signal sets; the child only calls `run_child`, which keeps to
    // what is allowed after a fork of a process with threads.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let pid = match &prepared.confinement {
            None => libc::fork(),
            // As fork(2), with namespaces: only a new process can be the first of a process namespace.
            Some(confinement) => {
                let flags = libc::c_long::from(confinement.namespaces | libc::SIGCHLD);
                let none: libc::c_long = 0;
                libc::syscall(libc::SYS_clone, flags, none, none, none, none) as libc::pid_t
            }
        };
        if pid == 0 {
            run_child(prepared, report);
        }
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        Pid::from_raw(pid).filter(|_| pid > 0).ok_or(error)
    }
}

/// The child from fork to exec.
///
/// # Safety
/// Only in a freshly forked child: replaces its descriptors, its identity and its program. Nothing here allocates,
/// locks or unwinds, because another thread may have held any lock at the time of the fork. Raw system calls are used
/// for the identity because glibc's wrappers talk to threads that are not there.
unsafe fn run_child(prepared: &mut Prepared, report: RawFd) -> ! {
    // SAFETY: every pointer comes from `prepared`, which the fork copied whole.
    unsafe {
        let report = match libc::fcntl(report, libc::F_DUPFD_CLOEXEC, prepared.above) {
            -1 => report,
            copy => copy,
        };
        let step = child_steps(prepared);
        let errno = *libc::__errno_location();
        let mut message = [step, 0, 0, 0, 0];
        message[1..].copy_from_slice(&errno.to_ne_bytes());
        libc::write(report, message.as_ptr().cast(), message.len());
        libc::_exit(127)
    }
}

/// Runs the steps of [`STEPS`]; returns the index of the one that failed, and not at all when all went well.
///
/// # Safety
/// As for [`run_child`].
unsafe fn child_steps(prepared: &mut Prepared) -> u8 {
    // SAFETY: as for `run_child`; `copies` has room for every descriptor, so pushing does not allocate.
    unsafe {
        for procs in &prepared.cgroups {
            // 0 is whoever writes.
            if libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) != 1 {
                return 0;
            }
        }
        if libc::setsid() < 0 {
            return 1;
        }
        if let Some(network) = prepared.network
            && libc::setns(network, libc::CLONE_NEWNET) < 0
        {
            return 16;
        }
        if let Some(confinement) = &prepared.confinement
            && let Err(step) = confinement.enter()
        {
            return FIRST_CONFINEMENT_STEP + step;
        }
        // First out of the way of every number, then into place: one target may be another's source.
        for (source, _) in &prepared.fds {
            let copy = libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, prepared.above);
            if copy < 0 {
                return 2;
            }
            prepared.copies.push(copy);
        }
        if libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        ) < 0
        {
            return 3;
        }
        for (copy, (_, number)) in prepared.copies.iter().zip(&prepared.fds) {
            if libc::dup2(*copy, *number) < 0 {
                return 2;
            }
        }
        for (resource, value) in &prepared.limits {
            let limit = libc::rlimit {
                rlim_cur: *value,
                rlim_max: *value,
            };
            if libc::setrlimit(*resource, &raw const limit) < 0 {
                return 4;
            }
        }
        if let Some((path, read_only)) = &prepared.bound_folder
            && let Err(step) = bound_folder::bind(path, *read_only)
        {
            return FIRST_BIND_STEP + step;
        }
        if let Some(confinement) = &prepared.confinement
            && let Err(step) = confinement.drop_bounding_set()
        {
            return FIRST_CONFINEMENT_STEP + step;
        }
        if let Some(identity) = &prepared.identity {
            if libc::syscall(
                libc::SYS_setgroups,
                identity.groups.len(),
                identity.groups.as_ptr(),
            ) < 0
            {
                return 10;
            }
            if libc::syscall(libc::SYS_setresgid, identity.gid, identity.gid, identity.gid) < 0 {
                return 11;
            }
            if libc::syscall(libc::SYS_setresuid, identity.uid, identity.uid, identity.uid) < 0 {
                return 12;
            }
        }
        if let Some(confinement) = &prepared.confinement
            && let Err(step) = confinement.drop_capabilities()
        {
            return FIRST_CONFINEMENT_STEP + step;
        }
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 {
            return 13;
        }
        libc::umask(prepared.umask);
        if libc::chdir(prepared.cwd.as_ptr()) < 0 {
            return 14;
        }
        // Ignored signals (SIGPIPE, for one) would stay ignored in the program.
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        if let Some(confinement) = &prepared.confinement
            && !confinement.filter_calls()
        {
            return 17;
        }
        libc::execve(
            prepared.program.as_ptr(),
            prepared.argv.as_ptr(),
            prepared.envp.as_ptr(),
        );
        15
    }
}

/// Gets rid of a child that could not be taken hold of.
fn abandon(pid: Pid) {
    // It is our unreaped child, so the pid is still its own.
    if let Err(error) = rustix::process::kill_process(pid, Signal::KILL)
        .and_then(|()| rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()))
    {
        tracing::warn!(?pid, %error, "cannot get rid of a child that failed to start");
    }
}

/// A copy of a descriptor that will be given to a child, made safe against being leaked to others.
pub fn share_fd(fd: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}

/// A copy of a descriptor that our parent gave us under a number: the other side of [`InheritedFd`].
///
/// For programs that are told numbers by their arguments, as the first thing they do; the original stays open.
pub fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the number is borrowed for one call that copies it; one that is not open makes that call fail.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    share_fd(borrowed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::Exit;
    use super::*;

    fn shell(script: &str) -> DetachedCommand {
        DetachedCommand {
            args: vec!["-c".into(), script.into()],
            ..DetachedCommand::new("/bin/sh")
        }
    }

    /// Runs a script to its end and returns what it said.
    async fn output(mut command: DetachedCommand) -> (Option<Exit>, String) {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        command.log = Some(log.clone());
        let (_, process) = spawn_detached(command).unwrap();
        let exit = process.wait_exit().await;
        assert_eq!(
            std::fs::metadata(&log).unwrap().permissions().mode() & 0o777,
            0o600
        );
        (exit, std::fs::read_to_string(log).unwrap())
    }

    #[tokio::test]
    async fn a_child_gets_what_was_named_and_nothing_else() {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        // A descriptor that some other code forgot to mark.
        let leak = share_fd(&reader).unwrap();
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
        let mut command = shell("ls /proc/$$/fd; echo $A; umask; pwd; ulimit -c; cat; echo hi >&9");
        command.env = vec![
            ("A".into(), "b c".into()),
            ("PATH".into(), "/usr/bin:/bin".into()),
        ];
        command.cwd = "/usr".into();
        command.limits = vec![ResourceLimit::Core(0)];
        command.inherit = vec![InheritedFd {
            fd: writer,
            number: 9,
        }];
        let (exit, said) = output(command).await;
        assert_eq!(said, "0\n1\n2\n9\nb c\n0077\n/usr\n0\n");
        assert_eq!(exit, Some(Exit::Code(0)));
        let mut word = String::new();
        File::from(reader).read_to_string(&mut word).unwrap();
        assert_eq!(word, "hi\n");
    }

    #[tokio::test]
    async fn descriptors_may_swap_their_numbers() {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let ((first, to_first), (second, to_second)) = (pipe(), pipe());
        let (a, b) = (to_first.as_raw_fd(), to_second.as_raw_fd());
        let mut command = shell(&format!("echo first >/dev/fd/{b}; echo second >/dev/fd/{a}"));
        command.inherit = vec![
            InheritedFd {
                fd: to_first,
                number: b,
            },
            InheritedFd {
                fd: to_second,
                number: a,
            },
        ];
        assert_eq!(output(command).await, (Some(Exit::Code(0)), String::new()));
        for (fd, expected) in [(first, "first\n"), (second, "second\n")] {
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            assert_eq!(text, expected);
        }
    }

    #[tokio::test]
    async fn an_unprivileged_child_has_no_capabilities_and_no_way_back() {
        if !rustix::process::geteuid().is_root() {
            #[expect(clippy::print_stderr, reason = "a skipped test says so")]
            {
                eprintln!("SKIPPED: needs root");
            }
            return;
        }
        let mut command = shell(
            "id -u; id -g; id -G; grep -E '^(CapPrm|CapEff|CapAmb|NoNewPrivs)' /proc/self/status; ps -o sid= -p $$ | tr -d ' '; echo $$",
        );
        command.env = vec![("PATH".into(), "/usr/bin:/bin".into())];
        command.identity = Some(Identity {
            uid: 65534,
            gid: 65533,
            groups: vec![7, 65533],
        });
        let (exit, said) = output(command).await;
        assert_eq!(exit, Some(Exit::Code(0)), "{said}");
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(&lines[..2], ["65534", "65533"]);
        assert_eq!(
            lines[2].split(' ').collect::<std::collections::BTreeSet<_>>(),
            ["65533", "7"].into()
        );
        for line in &lines[3..6] {
            assert!(line.ends_with("\t0000000000000000"), "{line}");
        }
        assert_eq!(lines[6], "NoNewPrivs:\t1");
        assert_eq!(lines[7], lines[8], "it leads its own session");
    }

    #[tokio::test]
    async fn a_child_that_cannot_start_says_at_which_step() {
        let check = |command: DetachedCommand, expected: &str| {
            let error = spawn_detached(command).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
        };
        check(
            DetachedCommand::new("/no/such/program"),
            "cannot execute the program to start",
        );
        check(
            DetachedCommand {
                cwd: "/no/such/folder".into(),
                ..shell("true")
            },
            "cannot enter the working directory",
        );
        check(shell("a\0b"), "a program's argument");
        let fd = share_fd(File::open("/dev/null").unwrap()).unwrap();
        check(
            DetachedCommand {
                inherit: vec![InheritedFd { fd, number: 2 }],
                ..shell("true")
            },
            "file descriptor number 2",
        );
        check(
            DetachedCommand {
                cgroups: vec!["/no/such/group".into()],
                ..shell("true")
            },
            "cannot enter control group `/no/such/group`",
        );
        // A file that takes no process: the child itself finds out.
        let group = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/full", group.path().join("cgroup.procs")).unwrap();
        check(
            DetachedCommand {
                cgroups: vec![group.path().to_owned()],
                ..shell("true")
            },
            "cannot enter its control group to start `/bin/sh`",
        );
        check(
            DetachedCommand {
                log: Some("/no/such/log".into()),
                ..shell("true")
            },
            "cannot open log",
        );
    }
}
