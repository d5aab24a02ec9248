//! The calls of the contract (`proto/agent.proto`), each on the guest's state.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use offshoot_agent_proto::v1;
use offshoot_agent_proto::v1::agent_server::Agent;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status, Streaming};

use crate::guest::Guest;
use crate::output_log::{Piece, Reader};
use crate::session::QUEUE;
use crate::{files, shutdown, ssh};

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

/// Runs what must not be given up half-way when the connection breaks.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    let result = tokio::spawn(work).await;
    result.unwrap_or_else(|error| Err(Status::internal(format!("the agent failed: {error}"))))
}

/// The next answer of `MainOutput`; the status is the last.
async fn next_output(
    reader: Option<Reader>,
) -> Option<(Result<v1::MainOutputReply, Status>, Option<Reader>)> {
    use v1::main_output_reply::What;
    let mut reader = reader?;
    let (what, more) = match reader.next().await {
        Piece::Lost(bytes) => (What::Lost(bytes), Some(reader)),
        Piece::Exited(status) => (What::Exited(status), None),
        Piece::Output { stream, offset, data } => (
            What::Output(v1::Output {
                stream: stream.into(),
                data,
                offset,
            }),
            Some(reader),
        ),
    };
    Some((Ok(v1::MainOutputReply { what: Some(what) }), more))
}

/// Passes the tar of a copy on to the thread that unpacks it. A stream that breaks is not the end of the tar.
async fn feed_tar(
    mut messages: Streaming<v1::CopyInRequest>,
    chunks: mpsc::Sender<io::Result<bytes::Bytes>>,
) {
    loop {
        let chunk = match messages.message().await {
            Ok(None) => return,
            Ok(Some(v1::CopyInRequest {
                what: Some(v1::copy_in_request::What::Tar(bytes)),
            })) => Ok(bytes),
            Ok(Some(_)) | Err(_) => Err(io::ErrorKind::ConnectionAborted.into()),
        };
        let last = chunk.is_err();
        if chunks.send(chunk).await.is_err() || last {
            return;
        }
    }
}

#[tonic::async_trait]
impl Agent for Service {
    type MainOutputStream = Replies<v1::MainOutputReply>;
    type ExecStream = ReceiverStream<Result<v1::ExecReply, Status>>;
    type CopyOutStream = ReceiverStream<Result<v1::CopyOutReply, Status>>;
    type SshStream = ReceiverStream<Result<v1::SshBytes, Status>>;
    type SessionsStream = Replies<v1::SessionsReply>;

    async fn hello(&self, _: Request<v1::HelloRequest>) -> Result<Response<v1::HelloReply>, Status> {
        Ok(Response::new(v1::HelloReply {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
            vm_id: self.guest.vm_id(),
            ready_uptime_us: self.guest.ready_uptime_us(),
            main: self.guest.main_state().await.into(),
            sessions: self.guest.count.watch().borrow().exec,
        }))
    }

    async fn configure(
        &self,
        request: Request<v1::ConfigureRequest>,
    ) -> Result<Response<v1::ConfigureReply>, Status> {
        let guest = Arc::clone(&self.guest);
        to_the_end(async move { guest.configure(request.into_inner()).await })
            .await
            .map(Response::new)
    }

    async fn rehearse(
        &self,
        request: Request<v1::RehearseRequest>,
    ) -> Result<Response<v1::RehearseReply>, Status> {
        let guest = Arc::clone(&self.guest);
        to_the_end(async move { guest.rehearse(request.into_inner()).await })
            .await
            .map(Response::new)
    }

    async fn warm(&self, request: Request<v1::WarmRequest>) -> Result<Response<v1::WarmReply>, Status> {
        let like = request.into_inner().like;
        let like = like.ok_or_else(|| Status::invalid_argument("no VM to be like"))?;
        let guest = Arc::clone(&self.guest);
        to_the_end(async move { guest.warm(like).await })
            .await
            .map(Response::new)
    }

    async fn start_main(
        &self,
        request: Request<v1::StartMainRequest>,
    ) -> Result<Response<v1::StartMainReply>, Status> {
        let request = request.into_inner();
        crate::configure::set_clock_again(Duration::from_nanos(request.realtime_ns));
        let what = request
            .what
            .ok_or_else(|| Status::invalid_argument("nothing to start"))?;
        let guest = Arc::clone(&self.guest);
        to_the_end(async move { guest.start_main(what).await })
            .await
            .map(Response::new)
    }

    async fn main_output(
        &self,
        request: Request<v1::MainOutputRequest>,
    ) -> Result<Response<Self::MainOutputStream>, Status> {
        let reader = self.guest.output.reader(request.into_inner().offset);
        Ok(Response::new(Box::pin(stream::unfold(Some(reader), next_output))))
    }

    async fn main_input(
        &self,
        request: Request<Streaming<v1::ProcessInput>>,
    ) -> Result<Response<v1::MainInputReply>, Status> {
        let input = self.guest.main_input().await?;
        let mut messages = request.into_inner();
        while let Some(message) = messages.message().await? {
            if input.send(message).await.is_err() {
                // The process has ended; its status says the rest.
                break;
            }
        }
        Ok(Response::new(v1::MainInputReply {}))
    }

    async fn exec(
        &self,
        request: Request<Streaming<v1::ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|message| message.what);
        let Some(v1::exec_request::What::Start(process)) = first else {
            return Err(Status::invalid_argument(
                "the first message of an exec says what to start",
            ));
        };
        let (replies, receiver) = mpsc::channel(QUEUE);
        let guest = Arc::clone(&self.guest);
        let input = to_the_end(async move { guest.exec(process, replies).await }).await?;
        if let Some(input) = input {
            tokio::spawn(async move {
                while let Ok(Some(message)) = messages.message().await {
                    if let Some(v1::exec_request::What::Input(message)) = message.what
                        && input.send(message).await.is_err()
                    {
                        break;
                    }
                }
            });
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn signal_main(
        &self,
        request: Request<v1::SignalRequest>,
    ) -> Result<Response<v1::SignalReply>, Status> {
        self.guest.signal_main(request.into_inner().signal).await?;
        Ok(Response::new(v1::SignalReply {}))
    }

    async fn copy_in(
        &self,
        request: Request<Streaming<v1::CopyInRequest>>,
    ) -> Result<Response<v1::CopyInReply>, Status> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|message| message.what);
        let Some(v1::copy_in_request::What::Directory(directory)) = first else {
            return Err(Status::invalid_argument(
                "the first message of a copy says where to",
            ));
        };
        let (chunks, receiver) = mpsc::channel(QUEUE);
        let unpack = self
            .guest
            .in_guest(move || files::unpack(&directory, files::TarSource::new(receiver)));
        let (files, ()) = futures::future::join(unpack, feed_tar(messages, chunks)).await;
        Ok(Response::new(v1::CopyInReply { files: files?? }))
    }

    async fn copy_out(
        &self,
        request: Request<v1::CopyOutRequest>,
    ) -> Result<Response<Self::CopyOutStream>, Status> {
        let path = request.into_inner().path;
        let workload = self.guest.workload()?;
        let (chunks, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let failed = chunks.clone();
            if let Err(error) = workload.run(move || files::pack(&path, &chunks)).await {
                let error = Status::internal(format!("cannot enter the VM's namespace: {error}"));
                // A caller that is gone needs no error.
                drop(failed.send(Err(error)).await);
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn shutdown(
        &self,
        request: Request<v1::ShutdownRequest>,
    ) -> Result<Response<v1::ShutdownReply>, Status> {
        let grace = Duration::from_millis(u64::from(request.into_inner().grace_ms));
        let guest = Arc::clone(&self.guest);
        let shut_down = to_the_end(async move {
            let clean = guest.shut_down(grace).await;
            shutdown::power_off_soon();
            Ok(clean)
        });
        Ok(Response::new(v1::ShutdownReply {
            clean: shut_down.await?,
        }))
    }

    async fn ssh(
        &self,
        request: Request<Streaming<v1::SshRequest>>,
    ) -> Result<Response<Self::SshStream>, Status> {
        let server = self.guest.ssh();
        let server = server.ok_or_else(|| Status::failed_precondition("the VM has no SSH server"))?;
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|message| message.what);
        let Some(v1::ssh_request::What::Open(open)) = first else {
            return Err(Status::invalid_argument(
                "the first message of an SSH connection opens it",
            ));
        };
        let keys = ssh::parse_keys(&open.authorized_keys);
        let (replies, receiver) = mpsc::channel(QUEUE);
        let stream = ssh::rpc_stream(messages, replies);
        server.accept(stream, ssh::Peer::Host, keys);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn sessions(
        &self,
        _: Request<v1::SessionsRequest>,
    ) -> Result<Response<Self::SessionsStream>, Status> {
        let counts = WatchStream::new(self.guest.count.watch());
        Ok(Response::new(Box::pin(counts.map(Ok))))
    }
}
