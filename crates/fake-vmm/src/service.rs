//! The calls of the contract (`agent-proto/proto/agent.proto`), each on the pretend guest.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt as _, stream};
use offshoot_agent_proto::v1;
use offshoot_agent_proto::v1::agent_server::Agent;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status, Streaming};

use crate::guest::Guest;
use crate::process::{Reader, Said};

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service: a connection's view of the guest.
pub(crate) struct Service {
    guest: Arc<Guest>,
}

impl Service {
    pub(crate) fn new(guest: Arc<Guest>) -> Self {
        Self { guest }
    }
}

/// What a reader gets up to the status, which is the last.
fn said(reader: Reader) -> impl Stream<Item = Said> + Send {
    stream::unfold(Some(reader), async |reader| {
        let mut reader = reader?;
        let said = reader.next().await;
        let more = matches!(said, Said::Output(_)).then_some(reader);
        Some((said, more))
    })
}

fn no_files() -> Status {
    Status::failed_precondition("a fake guest has no files")
}

#[tonic::async_trait]
impl Agent for Service {
    type MainOutputStream = Replies<v1::MainOutputReply>;
    type ExecStream = Replies<v1::ExecReply>;
    type CopyOutStream = stream::Empty<Result<v1::CopyOutReply, Status>>;
    type SshStream = stream::Empty<Result<v1::SshBytes, Status>>;
    type SessionsStream = Replies<v1::SessionsReply>;

    async fn ssh(&self, _: Request<Streaming<v1::SshRequest>>) -> Result<Response<Self::SshStream>, Status> {
        Err(Status::failed_precondition("a fake guest has no SSH server"))
    }

    async fn sessions(
        &self,
        _: Request<v1::SessionsRequest>,
    ) -> Result<Response<Self::SessionsStream>, Status> {
        let counts = WatchStream::new(self.guest.exec_sessions());
        let replies = counts.map(|exec| Ok(v1::SessionsReply { ssh: 0, exec }));
        Ok(Response::new(Box::pin(replies)))
    }

    async fn hello(&self, _: Request<v1::HelloRequest>) -> Result<Response<v1::HelloReply>, Status> {
        Ok(Response::new(self.guest.describe()))
    }

    async fn configure(
        &self,
        request: Request<v1::ConfigureRequest>,
    ) -> Result<Response<v1::ConfigureReply>, Status> {
        self.guest.configure(request.get_ref())?;
        // Nothing was mounted, so nothing was timed.
        Ok(Response::new(v1::ConfigureReply { stages: Vec::new() }))
    }

    async fn rehearse(&self, _: Request<v1::RehearseRequest>) -> Result<Response<v1::RehearseReply>, Status> {
        Err(Status::failed_precondition("a fake guest cannot be saved"))
    }

    async fn warm(&self, _: Request<v1::WarmRequest>) -> Result<Response<v1::WarmReply>, Status> {
        Err(Status::failed_precondition("a fake guest cannot be saved"))
    }

    async fn start_main(
        &self,
        request: Request<v1::StartMainRequest>,
    ) -> Result<Response<v1::StartMainReply>, Status> {
        let what = request.into_inner().what;
        let what = what.ok_or_else(|| Status::invalid_argument("nothing to start"))?;
        self.guest.start_main(&what).map(Response::new)
    }

    async fn main_output(
        &self,
        request: Request<v1::MainOutputRequest>,
    ) -> Result<Response<Self::MainOutputStream>, Status> {
        use v1::main_output_reply::What;
        let reader = self.guest.main_transcript().reader(request.get_ref().offset);
        let replies = said(reader).map(|said| {
            let what = match said {
                Said::Output(output) => What::Output(output),
                Said::Exited(status) => What::Exited(status),
            };
            Ok(v1::MainOutputReply { what: Some(what) })
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn main_input(
        &self,
        request: Request<Streaming<v1::ProcessInput>>,
    ) -> Result<Response<v1::MainInputReply>, Status> {
        let mut messages = request.into_inner();
        while let Some(message) = messages.message().await? {
            if let Some(v1::process_input::What::Signal(signal)) = message.what {
                self.guest.signal_main(signal)?;
            }
        }
        Ok(Response::new(v1::MainInputReply {}))
    }

    async fn exec(
        &self,
        request: Request<Streaming<v1::ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        use v1::exec_reply::What;
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|message| message.what);
        let Some(v1::exec_request::What::Start(process)) = first else {
            return Err(Status::invalid_argument(
                "the first message of an exec says what to start",
            ));
        };
        let answer = |what| Ok(v1::ExecReply { what: Some(what) });
        let process = match self.guest.exec(&process)? {
            Ok(process) => process,
            Err(failure) => {
                let refused = stream::iter([answer(What::Failed(failure))]);
                return Ok(Response::new(Box::pin(refused)));
            }
        };
        let started = stream::iter([answer(What::StartedPid(process.pid))]);
        let replies = said(process.transcript.reader(0)).map(move |said| {
            answer(match said {
                Said::Output(output) => What::Output(output),
                Said::Exited(status) => What::Exited(status),
            })
        });
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                // It reads nothing and has no window; of input, only signals reach it.
                if let Some(v1::exec_request::What::Input(input)) = message.what
                    && let Some(v1::process_input::What::Signal(signal)) = input.what
                {
                    // One that has ended needs none.
                    let _ = process.signal(signal);
                }
            }
        });
        Ok(Response::new(Box::pin(started.chain(replies))))
    }

    async fn signal_main(
        &self,
        request: Request<v1::SignalRequest>,
    ) -> Result<Response<v1::SignalReply>, Status> {
        self.guest.signal_main(request.get_ref().signal)?;
        Ok(Response::new(v1::SignalReply {}))
    }

    async fn copy_in(
        &self,
        _: Request<Streaming<v1::CopyInRequest>>,
    ) -> Result<Response<v1::CopyInReply>, Status> {
        Err(no_files())
    }

    async fn copy_out(
        &self,
        _: Request<v1::CopyOutRequest>,
    ) -> Result<Response<Self::CopyOutStream>, Status> {
        Err(no_files())
    }

    async fn shutdown(&self, _: Request<v1::ShutdownRequest>) -> Result<Response<v1::ShutdownReply>, Status> {
        self.guest.shut_down().await;
        // Nothing was ever written.
        Ok(Response::new(v1::ShutdownReply { clean: true }))
    }
}
