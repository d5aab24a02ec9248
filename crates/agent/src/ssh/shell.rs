//! One session channel with a process: a shell, a command or the file server.

use std::mem::discriminant;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use offshoot_agent_proto::v1;
use russh::server::{Handle, Msg};
use russh::{ChannelWriteHalf, Sig};
use rustix::termios::tcsetwinsize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::handler::Terminal;
use super::inbox::Inbox;
use super::login::{self, Order, Request};
use super::modes;
use crate::process::{self, End, Sink, signal_group};
use crate::session::QUEUE;
use crate::spawn::{Ends, Spawned, Standard, TerminalPlan, failure, start, winsize};
use crate::users::Login;
use crate::workload::Workload;

/// The type of extended data that is standard error (RFC 4254, section 5.2).
const STDERR: u32 = 1;

/// What a client does to a process that runs.
pub(super) enum Control {
    /// Its terminal has another size.
    Window(v1::WindowSize),
    /// A signal.
    Signal(Sig),
}

/// Everything about a session whose process is about to start.
pub(super) struct Shell {
    pub(super) request: Request,
    pub(super) login: Login,
    pub(super) environment: Vec<String>,
    pub(super) terminal: Option<Terminal>,
    pub(super) sftp_program: PathBuf,
    pub(super) workload: Arc<Workload>,
    pub(super) inbox: Inbox,
    pub(super) out: ChannelWriteHalf<Msg>,
    pub(super) handle: Handle,
    pub(super) controls: mpsc::Receiver<Control>,
}

/// A process writes to its client.
struct ChannelSink<'a> {
    out: &'a ChannelWriteHalf<Msg>,
    closed: CancellationToken,
}

impl Sink for ChannelSink<'_> {
    async fn output(&mut self, stream: v1::Stream, data: Bytes) {
        let sent = async {
            match stream {
                v1::Stream::Stdout => self.out.data_bytes(data).await,
                v1::Stream::Stderr => self.out.extended_data_bytes(STDERR, data).await,
            }
        };
        tokio::select! {
            // A connection that is gone closes the channel.
            _ = sent => {}
            () = self.closed.cancelled() => {}
        }
    }

    async fn gone(&self) {
        self.closed.cancelled().await;
    }

    /// As with sshd: what writes to nobody ends.
    const TAKES_PIPES_ALONG: bool = true;
}

/// The signals that RFC 4254 has names for, and their numbers.
const SIGNALS: [(Sig, i32); 12] = [
    (Sig::ABRT, libc::SIGABRT),
    (Sig::ALRM, libc::SIGALRM),
    (Sig::FPE, libc::SIGFPE),
    (Sig::HUP, libc::SIGHUP),
    (Sig::ILL, libc::SIGILL),
    (Sig::INT, libc::SIGINT),
    (Sig::KILL, libc::SIGKILL),
    (Sig::PIPE, libc::SIGPIPE),
    (Sig::QUIT, libc::SIGQUIT),
    (Sig::SEGV, libc::SIGSEGV),
    (Sig::TERM, libc::SIGTERM),
    (Sig::USR1, libc::SIGUSR1),
];

fn signal_name(number: i32) -> Sig {
    match number {
        libc::SIGUSR2 => Sig::Custom("USR2".to_owned()),
        _ => SIGNALS
            .into_iter()
            .find(|(_, known)| *known == number)
            .map_or_else(|| Sig::Custom(format!("SIG{number}@offshoot")), |(name, _)| name),
    }
}

fn signal_number(name: &Sig) -> Option<u32> {
    let number = match name {
        Sig::Custom(name) if name == "USR2" => Some(libc::SIGUSR2),
        Sig::Custom(_) => None,
        name => SIGNALS
            .iter()
            .find(|(known, _)| discriminant(known) == discriminant(name))
            .map(|(_, number)| *number),
    };
    number.map(i32::unsigned_abs)
}

impl Shell {
    /// Runs to the end, and closes the channel.
    pub(super) async fn run(mut self) {
        let tty = self.terminal.is_some();
        let end = match self.spawn().await {
            Ok(spawned) => self.attend(spawned).await,
            Err(failure) => {
                let line = format!("{}{}", failure.message, if tty { "\r\n" } else { "\n" });
                let mut sink = self.sink();
                sink.output(v1::Stream::Stderr, line.into()).await;
                End::Exited(failure.status)
            }
        };
        // A client that is gone needs no answer.
        let _ = match end {
            End::Exited(status) => self.out.exit_status(status.cast_unsigned()).await.is_ok(),
            End::Signaled(signal) => {
                let (name, text) = (signal_name(signal), String::new());
                let id = self.out.id();
                let told = self
                    .handle
                    .exit_signal_request(id, name, false, text.clone(), text);
                told.await.is_ok()
            }
        };
        let _ = self.out.eof().await;
        let _ = self.out.close().await;
    }

    fn sink(&self) -> ChannelSink<'_> {
        ChannelSink {
            out: &self.out,
            closed: self.inbox.closed(),
        }
    }

    async fn spawn(&mut self) -> Result<Spawned, v1::StartFailure> {
        let terminal = self.terminal.take();
        let term = terminal.as_ref().map(|terminal| terminal.term.clone());
        let order = Order {
            request: self.request.clone(),
            login: self.login.clone(),
            environment: std::mem::take(&mut self.environment),
            terminal: term,
            standard: match terminal {
                Some(Terminal { window, modes, .. }) => Standard::Terminal(TerminalPlan {
                    window: Some(window),
                    settings: Some(Box::new(move |termios| modes::apply(&modes, termios))),
                    variable: Some("SSH_TTY"),
                }),
                None => Standard::Pipes { stdin: true },
            },
            sftp_program: self.sftp_program.clone(),
        };
        let started = self.workload.run(move || login::program(order).and_then(start));
        started
            .await
            .unwrap_or_else(|error| Err(failure(125, format!("cannot enter the VM's namespace: {error}"))))
    }

    async fn attend(&mut self, spawned: Spawned) -> End {
        let pid = spawned.pid;
        let mut terminal = match &spawned.ends {
            Ends::Terminal(master) => master.try_clone().ok(),
            Ends::Pipes { .. } => None,
        };
        let tty = matches!(spawned.ends, Ends::Terminal(_));
        let (input, process_input) = mpsc::channel(QUEUE);
        let closed = self.inbox.closed();
        let mut sink = ChannelSink {
            out: &self.out,
            closed: closed.clone(),
        };
        let mut running = pin!(process::run(spawned, process_input, &mut sink));
        let mut feeding = pin!(feed(&self.inbox, &input, tty));
        let mut fed = false;
        loop {
            tokio::select! {
                end = &mut running => return end,
                () = &mut feeding, if !fed => fed = true,
                // The last handle on a terminal is what hangs it up.
                () = closed.cancelled(), if terminal.is_some() => terminal = None,
                Some(control) = self.controls.recv() => match control {
                    Control::Window(window) => {
                        if let Some(terminal) = &terminal {
                            let _ = tcsetwinsize(terminal, winsize(&window));
                        }
                    }
                    Control::Signal(signal) => {
                        if let Some(signal) = signal_number(&signal) {
                            signal_group(pid, terminal.as_ref().map(AsFd::as_fd), signal);
                        }
                    }
                },
            }
        }
    }
}

/// Hands what the client sends to the process. A terminal has no end of input but the one that is typed.
async fn feed(inbox: &Inbox, input: &mpsc::Sender<v1::ProcessInput>, tty: bool) {
    use v1::process_input::What;
    while let Some(data) = inbox.next().await {
        let what = Some(What::Stdin(data));
        if input.send(v1::ProcessInput { what }).await.is_err() {
            return;
        }
    }
    if !tty {
        let what = Some(What::CloseStdin(true));
        // A process that is gone needs no end.
        let _ = input.send(v1::ProcessInput { what }).await;
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn signals_have_names_both_ways() {
        for (name, number) in SIGNALS {
            assert_eq!(signal_number(&name), Some(number.unsigned_abs()));
            assert_eq!(discriminant(&signal_name(number)), discriminant(&name));
        }
        assert_eq!(signal_number(&signal_name(libc::SIGUSR2)), Some(12));
        assert_eq!(signal_number(&Sig::Custom("NONSENSE".into())), None);
    }
}
