//! One running process: input to it, output from it, and its status.
//!
//! One task does all of it, so output keeps its order and a slow reader holds exactly this process back.

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use offshoot_agent_proto::limits::MAX_CHUNK;
use offshoot_agent_proto::v1;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use rustix::termios::{tcgetpgrp, tcsetwinsize};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use crate::fd::{self, Fd};
use crate::spawn::{Ends, Spawned, winsize};

/// How long output must be quiet after the process ended when somebody else keeps its pipes open: a background child
/// may hold them for ever.
const QUIET: Duration = Duration::from_millis(100);

/// Input that waits for the process; more is left with the host.
const MAX_WAITING_INPUT: usize = 256 << 10;

/// Output is read in pieces that fit into one message.
const READ_SIZE: usize = MAX_CHUNK;

/// The byte that ends a terminal's input (VEOF, Ctrl-D).
const END_OF_TRANSMISSION: u8 = 4;

/// Where output goes.
pub(crate) trait Sink: Send {
    /// Takes output, in order, when there is room.
    fn output(&mut self, stream: v1::Stream, data: Bytes) -> impl Future<Output = ()> + Send;

    /// Answers when nobody will ever read again.
    fn gone(&self) -> impl Future<Output = ()> + Send;

    /// Whether a process whose reader is gone loses its pipes, and with them its life when it writes (SIGPIPE). Else it
    /// lives on, its output dropped.
    const TAKES_PIPES_ALONG: bool;
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself, with a status.
    Exited(i32),
    /// By a signal.
    Signaled(i32),
}

impl End {
    /// The status as a shell counts it.
    pub(crate) fn status(self) -> i32 {
        match self {
            Self::Exited(status) => status,
            Self::Signaled(signal) => 128 + signal,
        }
    }
}

/// How a process ended whose status cannot be known.
const UNKNOWN: End = End::Exited(125);

/// Sends a signal, by number.
pub(crate) fn kill(target: i32, signal: u32) -> io::Result<()> {
    let signal = i32::try_from(signal).unwrap_or(i32::MAX);
    // SAFETY: no memory is involved.
    if unsafe { libc::kill(target, signal) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sends a signal to exactly this process, however its number is used meanwhile.
pub(crate) fn kill_pidfd(pidfd: &OwnedFd, signal: u32) -> io::Result<()> {
    let signal = i32::try_from(signal).unwrap_or(i32::MAX);
    // SAFETY: no memory is involved; the information about the sender is left to the kernel.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The descriptors of a process, registered with the runtime.
struct Live {
    pid: Pid,
    exit: AsyncFd<OwnedFd>,
    stdin: Option<Arc<Fd>>,
    stdout: Option<Arc<Fd>>,
    stderr: Option<Arc<Fd>>,
    tty: bool,
}

impl Live {
    fn new(spawned: Spawned) -> io::Result<Self> {
        let register = |fd| Fd::new(fd).map(Arc::new);
        let (stdin, stdout, stderr, tty) = match spawned.ends {
            Ends::Pipes {
                stdin,
                stdout,
                stderr,
            } => (
                stdin.map(register).transpose()?,
                register(stdout)?,
                Some(register(stderr)?),
                false,
            ),
            Ends::Terminal(master) => {
                let master = register(master)?;
                (Some(Arc::clone(&master)), master, None, true)
            }
        };
        Ok(Self {
            pid: spawned.pid,
            exit: fd::register(spawned.pidfd)?,
            stdin,
            stdout: Some(stdout),
            stderr,
            tty,
        })
    }
}

/// Runs a process to its end.
pub(crate) async fn run<S: Sink>(
    spawned: Spawned,
    input: mpsc::Receiver<v1::ProcessInput>,
    sink: &mut S,
) -> End {
    match Live::new(spawned) {
        Ok(live) => attend(live, input, sink).await,
        // Without its descriptors the process cannot be attended; closing them lets it end.
        Err(_) => UNKNOWN,
    }
}

async fn attend<S: Sink>(mut live: Live, input: mpsc::Receiver<v1::ProcessInput>, sink: &mut S) -> End {
    let feeding = feed(live.pid, live.stdin.take(), live.tty, input);
    let mut feeding = std::pin::pin!(feeding);
    let (mut fed, mut listening, mut status) = (false, true, None);
    let (mut out, mut err) = (BytesMut::new(), BytesMut::new());
    while status.is_none() || live.stdout.is_some() || live.stderr.is_some() {
        make_room(&mut out);
        make_room(&mut err);
        tokio::select! {
            () = &mut feeding, if !fed => fed = true,
            read = read(live.stdout.as_deref(), &mut out) => {
                if read.is_ok_and(|count| count > 0) {
                    sink.output(v1::Stream::Stdout, out.split().freeze()).await;
                } else {
                    live.stdout = None;
                }
            }
            read = read(live.stderr.as_deref(), &mut err) => {
                if read.is_ok_and(|count| count > 0) {
                    sink.output(v1::Stream::Stderr, err.split().freeze()).await;
                } else {
                    live.stderr = None;
                }
            }
            ended = wait(&live.exit), if status.is_none() => status = Some(ended),
            () = sink.gone(), if listening => {
                listening = false;
                // Its terminal, or its standard input, ends; with pipes the process lives on, its output dropped.
                fed = true;
                feeding.set(feed(live.pid, None, live.tty, mpsc::channel(1).1));
                if live.tty || S::TAKES_PIPES_ALONG {
                    live.stdout = None;
                    live.stderr = None;
                }
            }
            () = tokio::time::sleep(QUIET), if status.is_some() => break,
        }
    }
    status.unwrap_or(UNKNOWN)
}

/// Room for one more read, in what is left of the last buffer when that is worth it.
fn make_room(buffer: &mut BytesMut) {
    if buffer.capacity() - buffer.len() < READ_SIZE / 4 {
        buffer.reserve(READ_SIZE);
    }
}

async fn read(fd: Option<&Fd>, buffer: &mut BytesMut) -> io::Result<usize> {
    match fd {
        Some(fd) => fd.read(buffer, READ_SIZE).await,
        None => pending().await,
    }
}

/// Waits for the process and reaps it.
async fn wait(pidfd: &AsyncFd<OwnedFd>) -> End {
    loop {
        // Without a pidfd there is no status; the runtime is at its end then.
        let Ok(mut guard) = pidfd.readable().await else {
            return UNKNOWN;
        };
        match waitid(
            WaitId::PidFd(pidfd.as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        ) {
            Ok(Some(ended)) => {
                return match (ended.exit_status(), ended.terminating_signal()) {
                    (Some(status), _) => End::Exited(status),
                    (None, Some(signal)) => End::Signaled(signal),
                    (None, None) => UNKNOWN,
                };
            }
            Ok(None) => guard.clear_ready(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return UNKNOWN,
        }
    }
}

/// Hands input to the process, in order, while it takes it. Signals and window sizes don't wait for bytes before them
/// that the process does not read.
async fn feed(pid: Pid, mut stdin: Option<Arc<Fd>>, tty: bool, mut input: mpsc::Receiver<v1::ProcessInput>) {
    use v1::process_input::What;
    let mut waiting: VecDeque<Bytes> = VecDeque::new();
    let mut bytes = 0;
    let mut closing = false;
    let mut open = true;
    while open || !waiting.is_empty() {
        let next = async {
            match (&stdin, waiting.front()) {
                (Some(stdin), Some(data)) => stdin.write(data).await,
                _ => pending().await,
            }
        };
        tokio::select! {
            written = next => match (written, waiting.front_mut()) {
                (Ok(count), Some(data)) => {
                    data.advance(count);
                    bytes -= count;
                    if data.is_empty() {
                        waiting.pop_front();
                    }
                }
                // The process closed its standard input.
                _ => {
                    stdin = None;
                    waiting.clear();
                    bytes = 0;
                }
            },
            message = input.recv(), if open && bytes < MAX_WAITING_INPUT => match message.map(|message| message.what) {
                Some(Some(What::Stdin(data))) if stdin.is_some() && !closing && !data.is_empty() => {
                    bytes += data.len();
                    waiting.push_back(data);
                }
                Some(Some(What::CloseStdin(true))) if tty && stdin.is_some() => {
                    bytes += 1;
                    waiting.push_back(Bytes::from_static(&[END_OF_TRANSMISSION]));
                }
                Some(Some(What::CloseStdin(true))) => closing = true,
                Some(Some(What::Window(window))) if tty => {
                    if let Some(terminal) = &stdin {
                        let _ = tcsetwinsize(terminal.as_fd(), winsize(&window));
                    }
                }
                Some(Some(What::Signal(signal))) => signal_group(pid, tty.then_some(stdin.as_deref()).flatten(), signal),
                Some(_) => {}
                // The host may come back with more, for the main process; this call is over for an exec.
                None => open = false,
            },
        }
        if closing && waiting.is_empty() {
            stdin = None;
        }
    }
    // What is still open stays open until the process ends.
    pending::<()>().await;
}

/// Signals who is in the foreground of the terminal, or the process's whole group.
pub(crate) fn signal_group(pid: Pid, terminal: Option<impl AsFd>, signal: u32) {
    let group = terminal
        .and_then(|terminal| tcgetpgrp(terminal).ok())
        .unwrap_or(pid);
    drop(kill(-group.as_raw_nonzero().get(), signal));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spawn::spawn;

    #[derive(Default)]
    struct Collected {
        out: Vec<u8>,
        err: Vec<u8>,
        gone: bool,
        /// Sent when the process has written something.
        answer: Option<(mpsc::Sender<v1::ProcessInput>, v1::process_input::What)>,
    }

    impl Sink for Collected {
        async fn output(&mut self, stream: v1::Stream, data: Bytes) {
            match stream {
                v1::Stream::Stdout => self.out.extend_from_slice(&data),
                v1::Stream::Stderr => self.err.extend_from_slice(&data),
            }
            if let Some((sender, what)) = self.answer.take() {
                sender.try_send(v1::ProcessInput { what: Some(what) }).unwrap();
            }
        }

        async fn gone(&self) {
            if !self.gone {
                pending::<()>().await;
            }
        }

        const TAKES_PIPES_ALONG: bool = false;
    }

    #[expect(clippy::print_stderr, reason = "a test that cannot run says so")]
    fn root() -> bool {
        let root = rustix::process::getuid().is_root();
        if !root {
            eprintln!("SKIPPED: needs root, because every process gets its groups set");
        }
        root
    }

    fn shell(script: &str, tty: bool, stdin: bool) -> Spawned {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        let window = Some(v1::WindowSize { rows: 11, cols: 22 });
        spawn(&v1::Process {
            argv,
            tty,
            stdin,
            window,
            ..v1::Process::default()
        })
        .unwrap()
    }

    async fn check(script: &str, tty: bool, inputs: Vec<v1::process_input::What>) -> (i32, String, String) {
        let (sender, receiver) = mpsc::channel(inputs.len().max(1));
        for what in inputs {
            sender.try_send(v1::ProcessInput { what: Some(what) }).unwrap();
        }
        let mut sink = Collected::default();
        let run = run(shell(script, tty, true), receiver, &mut sink);
        let status = tokio::time::timeout(Duration::from_secs(20), run)
            .await
            .expect("stuck");
        drop(sender);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (status.status(), text(&sink.out), text(&sink.err))
    }

    #[tokio::test]
    async fn streams_status_and_signals() {
        use v1::process_input::What;
        if !root() {
            return;
        }
        assert_eq!(
            check("echo a; echo b >&2; exit 7", false, vec![]).await,
            (7, "a\n".into(), "b\n".into())
        );
        assert_eq!(check("kill -9 $$", false, vec![]).await.0, 137);
        let input = vec![What::Stdin(Bytes::from_static(b"hello")), What::CloseStdin(true)];
        assert_eq!(
            check("cat", false, input).await,
            (0, "hello".into(), String::new())
        );
        assert_eq!(
            check("sleep 50 & wait", false, vec![What::Signal(15)]).await.0,
            143
        );
        // A background child that keeps the pipes does not keep the session.
        assert_eq!(check("sleep 2 & echo $!", false, vec![]).await.0, 0);
    }

    #[tokio::test]
    async fn large_output_is_whole() {
        if !root() {
            return;
        }
        let (status, out, err) = check(
            "head -c 3000000 /dev/zero | tr '\\0' x; head -c 100000 /dev/zero >&2",
            false,
            vec![],
        )
        .await;
        assert_eq!((status, out.len(), err.len()), (0, 3_000_000, 100_000));
    }

    #[tokio::test]
    async fn a_terminal_has_a_size_and_a_foreground() {
        use v1::process_input::What;
        if !root() {
            return;
        }
        assert_eq!(
            check("stty size; tty >/dev/null && echo t", true, vec![]).await,
            (0, "11 22\r\nt\r\n".into(), String::new())
        );
        let resized = check(
            "read x; stty size",
            true,
            vec![
                What::Window(v1::WindowSize { rows: 33, cols: 44 }),
                What::Stdin(Bytes::from_static(b"\n")),
            ],
        );
        assert!(resized.await.1.ends_with("33 44\r\n"));
        // Ctrl-C through the terminal, once the program is ready for it.
        let (sender, receiver) = mpsc::channel(1);
        let interrupt = What::Stdin(Bytes::from_static(b"\x03"));
        let mut sink = Collected {
            answer: Some((sender, interrupt)),
            ..Collected::default()
        };
        let script = "trap 'echo int; exit 3' INT; echo ready; read x";
        let run = run(shell(script, true, true), receiver, &mut sink);
        assert_eq!(
            tokio::time::timeout(Duration::from_secs(20), run).await,
            Ok(End::Exited(3))
        );
        let ended = check("cat", true, vec![What::CloseStdin(true)]);
        assert_eq!(ended.await.0, 0);
    }

    #[tokio::test]
    async fn who_hangs_up_takes_the_terminal_but_not_the_process() {
        if !root() {
            return;
        }
        let mut sink = Collected {
            gone: true,
            ..Collected::default()
        };
        let (_sender, receiver) = mpsc::channel(1);
        assert_eq!(
            run(shell("sleep 50", true, false), receiver, &mut sink).await,
            End::Signaled(1)
        );
        let (_sender, receiver) = mpsc::channel(1);
        let script = "cat; head -c 1000000 /dev/zero; exit 5";
        let end = run(shell(script, false, true), receiver, &mut sink).await;
        assert_eq!(end, End::Exited(5));
    }
}
