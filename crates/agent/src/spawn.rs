//! Starts one process in the guest: who, where, with which environment, and what its descriptors are.
//!
//! Everything here runs in a thread of [`crate::workload`], so paths are the guest's and the child is born in its
//! namespace. Messages and statuses are those people know from Docker.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use offshoot_agent_proto::v1;
use rustix::fs::{Gid, Mode, Uid};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, pidfd_open};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

use crate::users::{self, Identity};

/// What a process without a `PATH` of its own gets, as Docker gives it.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Status for what could not even be tried.
const CANNOT_TRY: i32 = 125;
/// Status for a program that cannot be executed.
const CANNOT_EXECUTE: i32 = 126;
/// Status for a program that does not exist.
pub(crate) const NOT_FOUND: i32 = 127;

/// More than this of `/etc/passwd` or `/etc/group` is not read; the largest in use are some hundred KiB.
const MAX_USER_FILE: u64 = 8 << 20;

/// Open files: systemd's defaults for services, which are what programs are tested with.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(1024),
    maximum: Some(524_288),
};

/// Room in the pipes from a process: fewer switches between it and the agent.
const PIPE_SIZE: usize = 256 << 10;

/// The group `tty` in every distribution, whose members may write to terminals.
const TTY_GROUP: u32 = 5;

/// A process that was just started. Its status must be waited for.
#[derive(Debug)]
pub(crate) struct Spawned {
    /// Its process id; also its session and its process group.
    pub(crate) pid: Pid,
    /// A stable handle on it.
    pub(crate) pidfd: OwnedFd,
    /// The agent's ends of its descriptors.
    pub(crate) ends: Ends,
}

/// The agent's ends of a process's descriptors.
#[derive(Debug)]
pub(crate) enum Ends {
    /// Three pipes; no first one when standard input is `/dev/null`.
    Pipes {
        stdin: Option<OwnedFd>,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    /// The master side of a terminal.
    Terminal(OwnedFd),
}

pub(crate) fn failure(status: i32, message: impl Into<String>) -> v1::StartFailure {
    v1::StartFailure {
        status,
        message: message.into(),
    }
}

/// A program that is to be started, everything about it decided.
pub(crate) struct Program {
    /// The file.
    pub(crate) executable: PathBuf,
    /// What it is told it is called.
    pub(crate) name: String,
    /// Its other arguments.
    pub(crate) arguments: Vec<String>,
    /// The whole environment.
    pub(crate) environment: Vec<(String, String)>,
    /// Where it starts; must exist.
    pub(crate) directory: PathBuf,
    /// Who it runs as.
    pub(crate) identity: Identity,
    /// Its standard descriptors.
    pub(crate) standard: Standard,
}

/// What a process's standard descriptors are.
pub(crate) enum Standard {
    /// Pipes; standard input is `/dev/null` unless it is wanted.
    Pipes { stdin: bool },
    /// A new terminal.
    Terminal(TerminalPlan),
}

/// Changes the settings of a terminal.
pub(crate) type TerminalSettings = Box<dyn FnOnce(&mut Termios) + Send>;

/// How a new terminal is set up.
#[derive(Default)]
pub(crate) struct TerminalPlan {
    /// Its size.
    pub(crate) window: Option<v1::WindowSize>,
    /// What changes its settings, if anything does.
    pub(crate) settings: Option<TerminalSettings>,
    /// The environment variable that gets its path.
    pub(crate) variable: Option<&'static str>,
}

/// Starts `process`.
pub(crate) fn spawn(process: &v1::Process) -> Result<Spawned, v1::StartFailure> {
    let program = process.argv.first().filter(|program| !program.is_empty());
    let program = program.ok_or_else(|| failure(CANNOT_TRY, "no command specified"))?;
    if process
        .argv
        .iter()
        .chain(&process.env)
        .chain([&process.working_dir])
        .any(|text| text.contains('\0'))
    {
        return Err(failure(CANNOT_TRY, "an argument holds a NUL byte"));
    }
    let (passwd, group) = user_files();
    let identity = users::lookup(&process.user, &passwd, &group)
        .map_err(|error| failure(CANNOT_EXECUTE, error.to_string()))?;
    let environment = environment(&process.env, &identity.home, &hostname(), process.tty);
    let directory = working_directory(&process.working_dir)?;
    let executable = resolve(program, path_of(&environment), &directory)?;
    start(Program {
        executable,
        name: program.clone(),
        arguments: process.argv[1..].to_vec(),
        environment,
        directory,
        identity,
        standard: if process.tty {
            Standard::Terminal(TerminalPlan {
                window: process.window,
                ..TerminalPlan::default()
            })
        } else {
            Standard::Pipes { stdin: process.stdin }
        },
    })
}

/// Starts a program.
pub(crate) fn start(program: Program) -> Result<Spawned, v1::StartFailure> {
    let mut command = Command::new(&program.executable);
    command
        .arg0(&program.name)
        .args(&program.arguments)
        .env_clear()
        .envs(program.environment)
        .current_dir(&program.directory);
    let cannot_connect =
        |error: io::Error| failure(CANNOT_TRY, format!("cannot make the process's files: {error}"));
    let tty = matches!(program.standard, Standard::Terminal(_));
    let ends = match program.standard {
        Standard::Terminal(plan) => terminal(&mut command, plan, &program.identity),
        Standard::Pipes { stdin } => pipes(&mut command, stdin),
    };
    let ends = ends.map_err(cannot_connect)?;
    become_identity(&mut command, program.identity, tty);
    let child = command
        .spawn()
        .map_err(|error| exec_failure(&program.name, &error))?;
    let pid = Pid::from_child(&child);
    // The child is not reaped before somebody waits, so the id is still its own.
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(|error| cannot_connect(error.into()))?;
    Ok(Spawned { pid, pidfd, ends })
}

/// The guest's passwd(5) and group(5).
pub(crate) fn user_files() -> (String, String) {
    (read_user_file("/etc/passwd"), read_user_file("/etc/group"))
}

/// The guest's name.
pub(crate) fn hostname() -> String {
    String::from_utf8_lossy(rustix::system::uname().nodename().to_bytes()).into_owned()
}

/// The path that programs are looked for in.
pub(crate) fn path_of(environment: &[(String, String)]) -> &str {
    environment
        .iter()
        .rev()
        .find(|(name, _)| name == "PATH")
        .map_or("", |(_, value)| value)
}

fn read_user_file(path: &str) -> String {
    let mut bytes = Vec::new();
    // An image without users is one where numbers are names.
    if let Ok(file) = File::open(path) {
        drop(file.take(MAX_USER_FILE).read_to_end(&mut bytes));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The whole environment: what was asked for, the last of a name winning, and what every process has.
pub(crate) fn environment(asked: &[String], home: &str, hostname: &str, tty: bool) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    for (name, value) in asked
        .iter()
        .filter_map(|pair| pair.split_once('='))
        .filter(|(name, _)| !name.is_empty())
    {
        match all.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => value.clone_into(known),
            None => all.push((name.to_owned(), value.to_owned())),
        }
    }
    let defaults = [("PATH", DEFAULT_PATH), ("HOSTNAME", hostname), ("HOME", home)];
    for (name, value) in defaults.into_iter().chain(tty.then_some(("TERM", "xterm"))) {
        if !all.iter().any(|(known, _)| known == name) {
            all.push((name.to_owned(), value.to_owned()));
        }
    }
    all
}

/// The working directory, made if it is missing.
fn working_directory(asked: &str) -> Result<PathBuf, v1::StartFailure> {
    let directory = Path::new("/").join(asked);
    let refuse = |what: String| {
        failure(
            CANNOT_EXECUTE,
            format!("cannot use working directory {asked:?}: {what}"),
        )
    };
    match fs::metadata(&directory) {
        Ok(metadata) if metadata.is_dir() => Ok(directory),
        Ok(_) => Err(refuse("not a directory".to_owned())),
        Err(_) => match fs::create_dir_all(&directory) {
            Ok(()) => Ok(directory),
            Err(error) => Err(refuse(reason(&error))),
        },
    }
}

/// Finds a program as execvp(3) does, but says what is wrong with it.
pub(crate) fn resolve(program: &str, path: &str, directory: &Path) -> Result<PathBuf, v1::StartFailure> {
    let refuse = |status, what: &str| failure(status, format!("exec: {program:?}: {what}"));
    if program.contains('/') {
        let executable = directory.join(program);
        return match executable_kind(&executable) {
            Ok(Executable::Yes) => Ok(executable),
            Ok(Executable::Directory) => Err(refuse(CANNOT_EXECUTE, "is a directory")),
            Ok(Executable::No) => Err(refuse(CANNOT_EXECUTE, "permission denied")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(refuse(
                NOT_FOUND,
                &format!("stat {program}: no such file or directory"),
            )),
            Err(error) => Err(refuse(
                CANNOT_EXECUTE,
                &format!("stat {program}: {}", reason(&error)),
            )),
        };
    }
    let mut denied = false;
    for folder in path.split(':') {
        // An empty entry is the working directory.
        let executable = directory.join(folder).join(program);
        match executable_kind(&executable) {
            Ok(Executable::Yes) => return Ok(executable),
            Ok(Executable::No) => denied = true,
            Ok(Executable::Directory) | Err(_) => {}
        }
    }
    if denied {
        return Err(refuse(CANNOT_EXECUTE, "permission denied"));
    }
    Err(refuse(NOT_FOUND, "executable file not found in $PATH"))
}

enum Executable {
    Yes,
    No,
    Directory,
}

fn executable_kind(path: &Path) -> io::Result<Executable> {
    let metadata = fs::metadata(path)?;
    Ok(match (metadata.is_dir(), metadata.mode() & 0o111) {
        (true, _) => Executable::Directory,
        (false, 0) => Executable::No,
        (false, _) => Executable::Yes,
    })
}

/// The kernel's word for an error, without Rust's decoration.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

/// The program was there, yet did not start.
fn exec_failure(program: &str, error: &io::Error) -> v1::StartFailure {
    let status = match error.raw_os_error() {
        // The interpreter of a script or the dynamic linker is missing.
        Some(libc::ENOENT) => NOT_FOUND,
        Some(libc::EAGAIN | libc::ENOMEM) => CANNOT_TRY,
        _ => CANNOT_EXECUTE,
    };
    failure(status, format!("exec {program}: {}", reason(error)))
}

fn pipes(command: &mut Command, stdin: bool) -> io::Result<Ends> {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let (stdout, their_stdout) = pipe()?;
    let (stderr, their_stderr) = pipe()?;
    // The kernel's own size does as well.
    let _ = rustix::pipe::fcntl_setpipe_size(&stdout, PIPE_SIZE);
    command.stdout(their_stdout).stderr(their_stderr);
    let stdin = if stdin {
        let (their_stdin, stdin) = pipe()?;
        let _ = rustix::pipe::fcntl_setpipe_size(&stdin, PIPE_SIZE);
        command.stdin(their_stdin);
        Some(stdin)
    } else {
        command.stdin(Stdio::null());
        None
    };
    Ok(Ends::Pipes {
        stdin,
        stdout,
        stderr,
    })
}

fn terminal(command: &mut Command, plan: TerminalPlan, identity: &Identity) -> io::Result<Ends> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    // Its user may open it again by name.
    rustix::fs::fchown(
        &slave,
        Some(Uid::from_raw(identity.uid)),
        Some(Gid::from_raw(TTY_GROUP)),
    )?;
    if let Some(window) = &plan.window {
        tcsetwinsize(&master, winsize(window))?;
    }
    if let Some(settings) = plan.settings {
        let mut termios = tcgetattr(&slave)?;
        settings(&mut termios);
        tcsetattr(&slave, OptionalActions::Now, &termios)?;
    }
    if let Some(variable) = plan.variable {
        let name = ptsname(&master, Vec::new())?;
        command.env(variable, name.to_string_lossy().as_ref());
    }
    command
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave);
    Ok(Ends::Terminal(master))
}

/// The kernel counts rows and columns in 16 bits.
pub(crate) fn winsize(window: &v1::WindowSize) -> Winsize {
    let clip = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    Winsize {
        ws_row: clip(window.rows),
        ws_col: clip(window.cols),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Adds what happens in the child between fork and exec.
fn become_identity(command: &mut Command, identity: Identity, tty: bool) {
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    let groups: Vec<Gid> = identity.groups.into_iter().map(Gid::from_raw).collect();
    let child = move || -> io::Result<()> {
        // The agent must not run out of memory; its children may.
        if let Ok(file) = rustix::fs::open(
            "/proc/self/oom_score_adj",
            rustix::fs::OFlags::WRONLY,
            Mode::empty(),
        ) {
            let _ = rustix::io::write(&file, b"0");
        }
        default_signals();
        rustix::process::setsid()?;
        if tty {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        // Without the right to raise it, what there is must do.
        let _ = rustix::process::setrlimit(Resource::Nofile, OPEN_FILES);
        rustix::process::umask(Mode::from_raw_mode(0o022));
        rustix::thread::set_thread_groups(&groups)?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    };
    // SAFETY: the closure makes system calls only; it allocates nothing and takes no lock. The descriptor it opens is
    // closed again.
    unsafe { command.pre_exec(child) };
}

/// Lets every signal through with its usual effect, whatever the agent blocks or was started with: std leaves that as
/// it is.
fn default_signals() {
    /// The last one (signal(7)).
    const LAST: libc::c_int = 64;
    // SAFETY: an all-zero sigset_t is a valid place for sigemptyset to fill, and lives through the calls; the default
    // action needs no handler. What cannot be set (SIGKILL, SIGSTOP, glibc's own two) is refused and stays.
    unsafe {
        for number in 1..=LAST {
            libc::signal(number, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Whether the image has an init that can be executed, and why not.
pub(crate) fn check_init(program: &str) -> Result<(), v1::StartFailure> {
    resolve(program, "", Path::new("/")).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_environment_has_the_last_of_each_name_and_the_defaults() {
        let check = |asked: &[&str], tty, expected: &[&str]| {
            let pairs = environment(&strings(asked), "/home/u", "vm", tty);
            let joined: Vec<String> = pairs
                .into_iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            assert_eq!(joined, strings(expected), "{asked:?}");
        };
        let path = format!("PATH={DEFAULT_PATH}");
        check(&[], false, &[&path, "HOSTNAME=vm", "HOME=/home/u"]);
        check(&[], true, &[&path, "HOSTNAME=vm", "HOME=/home/u", "TERM=xterm"]);
        check(
            &["A=1", "PATH=/x", "A=2=3", "nonsense", "=x", "HOME=", "TERM=vt100"],
            true,
            &["A=2=3", "PATH=/x", "HOME=", "TERM=vt100", "HOSTNAME=vm"],
        );
    }

    #[test]
    fn programs_are_found_or_refused_as_docker_words_it() {
        let folder = tempfile::tempdir().unwrap();
        let bin = folder.path().join("bin");
        fs::create_dir(&bin).unwrap();
        for (name, mode) in [("yes", 0o755), ("no", 0o644)] {
            fs::write(bin.join(name), "").unwrap();
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let check = |program: &str, path: &str, expected: Result<&str, (i32, &str)>| {
            let found =
                resolve(program, path, folder.path()).map_err(|failure| (failure.status, failure.message));
            let expected = expected
                .map(|rest| folder.path().join(rest))
                .map_err(|(s, m)| (s, m.to_owned()));
            assert_eq!(found, expected, "{program} in {path}");
        };
        check("yes", "/nonexistent:bin", Ok("bin/yes"));
        check("bin/yes", "", Ok("bin/yes"));
        check("./bin/yes", "", Ok("./bin/yes"));
        check("no", "bin", Err((126, "exec: \"no\": permission denied")));
        check("bin/no", "", Err((126, "exec: \"bin/no\": permission denied")));
        check("./bin", "", Err((126, "exec: \"./bin\": is a directory")));
        check(
            "nope",
            "bin",
            Err((127, "exec: \"nope\": executable file not found in $PATH")),
        );
        check(
            "bin/nope",
            "",
            Err((
                127,
                "exec: \"bin/nope\": stat bin/nope: no such file or directory",
            )),
        );
    }

    #[test]
    fn window_sizes_fit_into_16_bits() {
        let size = winsize(&v1::WindowSize {
            rows: 24,
            cols: 70_000,
        });
        assert_eq!((size.ws_row, size.ws_col), (24, u16::MAX));
    }
}
