//! PID 1: reaps orphans and does what the agent orders. One thread, no runtime.
//!
//! The agent's standard input is one end of a socket pair; PID 1 holds the other:
//!
//! ```text
//!   agent ── "init <fd>" ──► PID 1   join the mount namespace behind that descriptor of the agent's, execute /sbin/init
//!         ◄── error text ──          it could not; PID 1 is what it was
//!         ◄── end of file ──         PID 1 is the image's init now
//!         ◄── "shutdown" ──          the guest's own tools asked PID 1 to end
//! ```

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use rustix::process::{Pid, WaitOptions, wait};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::power;

/// The order to become the image's init, followed by a descriptor's number.
pub(crate) const INIT_ORDER: &str = "init ";

/// What PID 1 sends when the guest's own tools asked it to end.
pub(crate) const SHUTDOWN_NOTE: &[u8] = b"shutdown";

/// The image's init.
pub(crate) const INIT_PROGRAM: &str = "/sbin/init";

/// How the agent is called: systemd spares processes whose name starts with `@` (systemd.io/ROOT_STORAGE_DAEMONS).
const AGENT_NAME: &str = "@offshoot-agent";

/// Signals that mean "end": from the kernel (Ctrl-Alt-Del, power failure) and from the tools of several inits.
const END_SIGNALS: [libc::c_int; 5] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGPWR,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// PID 1's whole life.
pub(crate) fn run() -> ! {
    if let Err(error) = crate::boot::prepare() {
        power::fail(error);
    }
    // Ctrl-Alt-Del becomes SIGINT.
    let _ = rustix::system::reboot(rustix::system::RebootCommand::CadOff);
    match start() {
        Ok(mut supervisor) => supervisor.supervise(),
        Err(error) => power::fail(format_args!("cannot start the agent: {error}")),
    }
}

struct Supervisor {
    signals: OwnedFd,
    orders: OwnedFd,
    agent: Pid,
}

fn start() -> io::Result<Supervisor> {
    let (orders, agents) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let child = Command::new("/proc/self/exe")
        .arg0(AGENT_NAME)
        .arg(crate::AGENT_ARGUMENT)
        .stdin(Stdio::from(agents))
        .spawn()?;
    let agent = Pid::from_child(&child);
    // Not before: children inherit what is blocked.
    let signals = signal_fd()?;
    Ok(Supervisor {
        signals,
        orders,
        agent,
    })
}

/// The signals that PID 1 listens to.
fn end_signals() -> libc::sigset_t {
    // SAFETY: an all-zero sigset_t is a valid place for sigemptyset to fill.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in END_SIGNALS.into_iter().chain([libc::SIGCHLD]) {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// Blocks the signals that PID 1 listens to, or lets them through. A program that is executed inherits this.
fn block_signals(block: bool) {
    let how = if block { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    let set = end_signals();
    // SAFETY: the set lives through the call. It cannot fail for these arguments.
    unsafe { libc::sigprocmask(how, &raw const set, std::ptr::null_mut()) };
}

/// Blocks every signal that PID 1 listens to and makes a descriptor of them.
fn signal_fd() -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let set = end_signals();
    block_signals(true);
    // SAFETY: the set lives through the call; the descriptor is new and ours.
    unsafe {
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }
}

impl Supervisor {
    fn supervise(&mut self) -> ! {
        // What ended before its signal was listened to.
        self.reap();
        loop {
            let mut ready = [
                PollFd::new(&self.signals, PollFlags::IN),
                PollFd::new(&self.orders, PollFlags::IN),
            ];
            if let Err(error) = poll(&mut ready, None)
                && error != rustix::io::Errno::INTR
            {
                power::fail(format_args!("PID 1 cannot wait: {error}"));
            }
            let ordered = !ready[1].revents().is_empty();
            self.take_signals();
            self.reap();
            if ordered {
                self.obey();
            }
        }
    }

    fn take_signals(&self) {
        // ssi_signo is the first field of signalfd_siginfo, which is 128 bytes.
        let mut info = [0_u8; 128];
        while let Ok(128) = rustix::io::read(&self.signals, &mut info) {
            let signal = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            if END_SIGNALS.iter().any(|end| u32::try_from(*end) == Ok(signal)) {
                let _ = send(
                    &self.orders,
                    SHUTDOWN_NOTE,
                    SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
                );
            }
        }
    }

    fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid == self.agent {
                power::fail(format_args!("the agent ended: {status:?}"));
            }
        }
    }

    /// Reads one order; the only one there is does not return when it succeeds.
    fn obey(&self) {
        let mut order = [0_u8; 64];
        let Ok((_, length)) = recv(&self.orders, &mut order[..], RecvFlags::DONTWAIT) else {
            return;
        };
        if length == 0 {
            power::fail("the agent closed its end of PID 1's socket");
        }
        let fd = std::str::from_utf8(&order[..length])
            .ok()
            .and_then(|order| order.strip_prefix(INIT_ORDER))
            .and_then(|fd| fd.parse().ok());
        let answer = match fd {
            Some(fd) => self.become_init(fd).to_string(),
            None => "PID 1 does not know that order".to_owned(),
        };
        let _ = send(&self.orders, answer.as_bytes(), SendFlags::NOSIGNAL);
    }

    /// Executes the image's init in its namespace; returns only with the reason why it could not, in our own.
    fn become_init(&self, fd: i32) -> io::Error {
        let agent = self.agent.as_raw_nonzero();
        let enter = |path: &str| -> io::Result<File> {
            let ours = File::open("/proc/self/ns/mnt")?;
            let theirs = File::open(path)?;
            // The kernel starts PID 1 sharing its root and working directory with kernel threads, and lets nobody who
            // shares them change the namespace.
            // SAFETY: PID 1 has one thread; nothing else relies on sharing these with it.
            unsafe { unshare_unsafe(UnshareFlags::FS) }?;
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&theirs), Some(LinkNameSpaceType::Mount))?;
            Ok(ours)
        };
        let ours = match enter(&format!("/proc/{agent}/fd/{fd}")) {
            Ok(ours) => ours,
            Err(error) => return error,
        };
        let error = execute_init();
        if move_into_link_name_space(std::os::fd::AsFd::as_fd(&ours), Some(LinkNameSpaceType::Mount)).is_err()
        {
            power::fail(format_args!(
                "PID 1 cannot leave the image's namespace {}",
                ours.as_raw_fd()
            ));
        }
        error
    }
}

fn execute_init() -> io::Error {
    let console = || OpenOptions::new().read(true).write(true).open("/dev/console");
    let mut command = Command::new(INIT_PROGRAM);
    command
        .env_clear()
        .env("PATH", crate::spawn::DEFAULT_PATH)
        .env("TERM", "linux")
        .current_dir("/");
    if let (Ok(input), Ok(output), Ok(error)) = (console(), console(), console()) {
        command.stdin(input).stdout(output).stderr(error);
    }
    block_signals(false);
    let error = command.exec();
    block_signals(true);
    error
}
