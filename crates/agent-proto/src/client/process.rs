//! Processes in a guest: input going in, events coming out.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use offshoot_model::ProcessConfig;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::error::{CallError, printable};
use super::{AgentClient, in_time, v1};
use crate::limits::MAX_CHUNK;

/// How many messages of input wait for the connection; a chunk each, so this is what a fast client buffers.
const INPUT_QUEUE: usize = 4;

impl From<&ProcessConfig> for v1::Process {
    fn from(config: &ProcessConfig) -> Self {
        Self {
            argv: config.argv.clone(),
            env: config.env.iter().map(ToString::to_string).collect(),
            working_dir: config.working_dir.clone(),
            user: config.user.clone(),
            tty: config.tty,
            stdin: config.stdin,
            window: None,
        }
    }
}

/// Which of its two outputs a process wrote to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Why a process could not be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartRefusal {
    /// As a shell counts it: 127 not found, 126 cannot be run, 125 anything else.
    pub status: i32,
    /// For the user, as Docker words it.
    pub message: String,
}

impl From<v1::StartFailure> for StartRefusal {
    fn from(failure: v1::StartFailure) -> Self {
        Self {
            status: failure.status,
            message: printable(&failure.message),
        }
    }
}

/// What became of the main process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MainStart {
    /// It runs, or ran.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// It could not be started.
    Refused(StartRefusal),
}

/// What a process did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProcessEvent {
    /// It runs (exec only).
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// It wrote something.
    Output {
        /// Where to.
        stream: Stream,
        /// Position of the first byte in all output of the process; the next call of `main_output` may start at
        /// `offset + data.len()`.
        offset: u64,
        /// What it wrote.
        data: Bytes,
    },
    /// Output was dropped because nobody read it, before the next output.
    Lost {
        /// How many bytes.
        bytes: u64,
    },
    /// It ended; nothing follows.
    Exited {
        /// As a shell counts it: 128 and the signal's number for a process that a signal ended.
        status: i32,
    },
    /// It could not be started; nothing follows (exec only).
    Refused(StartRefusal),
}

enum Source {
    Main(Streaming<v1::MainOutputReply>),
    Exec(Streaming<v1::ExecReply>),
}

/// The events of one process. Ends after the exit status; ending before is an error. Dropping it gives the call up.
pub struct ProcessEvents {
    source: Source,
    over: bool,
}

impl ProcessEvents {
    /// The next event; nothing after the last. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Result<ProcessEvent, CallError>> {
        std::future::poll_fn(|cx| futures::Stream::poll_next(Pin::new(self), cx)).await
    }

    fn call(&self) -> &'static str {
        match self.source {
            Source::Main(_) => "main_output",
            Source::Exec(_) => "exec",
        }
    }

    fn output(&self, output: v1::Output) -> Result<ProcessEvent, CallError> {
        let stream = match v1::Stream::try_from(output.stream) {
            Ok(v1::Stream::Stdout) => Stream::Stdout,
            Ok(v1::Stream::Stderr) => Stream::Stderr,
            Err(_) => {
                return Err(CallError::BadReply {
                    call: self.call(),
                    what: "an unknown stream",
                });
            }
        };
        Ok(ProcessEvent::Output {
            stream,
            offset: output.offset,
            data: output.data,
        })
    }
}

impl futures::Stream for ProcessEvents {
    type Item = Result<ProcessEvent, CallError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        use v1::exec_reply::What as Exec;
        use v1::main_output_reply::What as Main;
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        let call = this.call();
        let early = CallError::Gone {
            call,
            message: "the stream ended before the process".to_owned(),
        };
        let empty = CallError::BadReply {
            call,
            what: "an empty message",
        };
        let event = match &mut this.source {
            Source::Main(stream) => match ready!(Pin::new(stream).poll_next(cx)) {
                None => Err(early),
                Some(Err(status)) => Err(CallError::of(call, &status)),
                Some(Ok(reply)) => match reply.what {
                    Some(Main::Output(output)) => this.output(output),
                    Some(Main::Lost(bytes)) => Ok(ProcessEvent::Lost { bytes }),
                    Some(Main::Exited(status)) => Ok(ProcessEvent::Exited { status }),
                    None => Err(empty),
                },
            },
            Source::Exec(stream) => match ready!(Pin::new(stream).poll_next(cx)) {
                None => Err(early),
                Some(Err(status)) => Err(CallError::of(call, &status)),
                Some(Ok(reply)) => match reply.what {
                    Some(Exec::StartedPid(pid)) => Ok(ProcessEvent::Started { pid }),
                    Some(Exec::Output(output)) => this.output(output),
                    Some(Exec::Exited(status)) => Ok(ProcessEvent::Exited { status }),
                    Some(Exec::Failed(failure)) => Ok(ProcessEvent::Refused(failure.into())),
                    None => Err(empty),
                },
            },
        };
        this.over = matches!(
            event,
            Err(_) | Ok(ProcessEvent::Exited { .. } | ProcessEvent::Refused(_))
        );
        Poll::Ready(Some(event))
    }
}

/// Input for one process, in order. Every method waits while the guest takes nothing, and says whether the guest
/// still listens; when it doesn't, the process has ended or the connection is lost, and the events say which.
#[derive(Clone, Debug)]
pub struct InputSender {
    sender: Sender,
}

#[derive(Clone, Debug)]
enum Sender {
    Main(mpsc::Sender<v1::ProcessInput>),
    Exec(mpsc::Sender<v1::ExecRequest>),
}

impl InputSender {
    async fn send(&self, what: v1::process_input::What) -> bool {
        let input = v1::ProcessInput { what: Some(what) };
        match &self.sender {
            Sender::Main(sender) => sender.send(input).await.is_ok(),
            Sender::Exec(sender) => {
                let what = Some(v1::exec_request::What::Input(input));
                sender.send(v1::ExecRequest { what }).await.is_ok()
            }
        }
    }

    /// Bytes for standard input or the terminal.
    pub async fn stdin(&self, mut data: Bytes) -> bool {
        while !data.is_empty() {
            let chunk = data.split_to(data.len().min(MAX_CHUNK));
            if !self.send(v1::process_input::What::Stdin(chunk)).await {
                return false;
            }
        }
        true
    }

    /// The end of standard input.
    pub async fn close_stdin(&self) -> bool {
        self.send(v1::process_input::What::CloseStdin(true)).await
    }

    /// The terminal's new size.
    pub async fn resize(&self, rows: u32, cols: u32) -> bool {
        self.send(v1::process_input::What::Window(v1::WindowSize { rows, cols }))
            .await
    }

    /// A signal, by number, for the terminal's foreground group or the process's group.
    pub async fn signal(&self, signal: u32) -> bool {
        self.send(v1::process_input::What::Signal(signal)).await
    }
}

/// One more process in the guest.
pub struct ExecSession {
    /// What goes in. Dropping it neither closes standard input nor ends the process.
    pub input: InputSender,
    /// What comes out: `Started` or `Refused` first. Dropping it gives the process up.
    pub events: ProcessEvents,
}

/// Input for the main process. When dropped the call ends; standard input stays open for the next client.
pub struct MainInput {
    /// What goes in.
    pub input: InputSender,
    done: JoinHandle<Result<(), CallError>>,
}

impl MainInput {
    /// Waits until the guest has taken everything that was sent before.
    ///
    /// # Errors
    /// When the guest refused, or the connection was lost.
    pub async fn finish(self) -> Result<(), CallError> {
        drop(self.input);
        // The task is never aborted and holds nothing that panics.
        self.done.await.unwrap_or(Ok(()))
    }
}

impl AgentClient {
    /// What the main process writes, from byte `offset` on. May be called before it is started; while the stream is
    /// read nothing is lost.
    ///
    /// # Errors
    /// When the agent is gone.
    pub async fn main_output(&self, offset: u64) -> Result<ProcessEvents, CallError> {
        let mut stub = self.stub.clone();
        let answer = stub.main_output(v1::MainOutputRequest { offset });
        let stream = in_time("main_output", answer).await?.into_inner();
        Ok(ProcessEvents {
            source: Source::Main(stream),
            over: false,
        })
    }

    /// Opens the main process's standard input. Must be called in a tokio runtime.
    pub fn main_input(&self) -> MainInput {
        let (sender, receiver) = mpsc::channel(INPUT_QUEUE);
        let mut stub = self.stub.clone();
        let done = tokio::spawn(async move {
            let reply = stub.main_input(ReceiverStream::new(receiver)).await;
            reply
                .map(drop)
                .map_err(|status| CallError::of("main_input", &status))
        });
        MainInput {
            input: InputSender {
                sender: Sender::Main(sender),
            },
            done,
        }
    }

    /// Starts one more process. A process that cannot be started is the first event, not an error.
    ///
    /// # Errors
    /// When the guest is not configured, or the agent is gone or does not answer.
    pub async fn exec(&self, process: v1::Process) -> Result<ExecSession, CallError> {
        let (sender, receiver) = mpsc::channel(INPUT_QUEUE);
        let start = v1::ExecRequest {
            what: Some(v1::exec_request::What::Start(process)),
        };
        sender
            .try_send(start)
            .expect("a new channel has room and a receiver");
        let mut stub = self.stub.clone();
        let answer = stub.exec(ReceiverStream::new(receiver));
        let stream = in_time("exec", answer).await?.into_inner();
        Ok(ExecSession {
            input: InputSender {
                sender: Sender::Exec(sender),
            },
            events: ProcessEvents {
                source: Source::Exec(stream),
                over: false,
            },
        })
    }
}
