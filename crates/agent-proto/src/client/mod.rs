//! The host's side of the conversation: one agent, typed calls, nothing of protobuf's optional fields.
//!
//! One [`AgentClient`] is one HTTP/2 connection over one stream. It never reconnects by itself: when the stream ends,
//! every open and every later call fails with [`CallError::Gone`], and whoever owns the VM decides what that means.
//!
//! Guests are hostile until shown otherwise: messages are bounded ([`limits`]), so is the wait for an answer to begin;
//! a message that makes no sense is
//! [`CallError::BadReply`], and texts for people are shortened and freed of control characters.

mod copy;
mod error;
mod process;
mod ssh;
mod vsock;

use std::io;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

pub use self::copy::{CopiedOut, CopyInError, CopyOutStream};
pub use self::error::{CallError, ConnectError};
pub use self::process::{
    ExecSession, InputSender, MainInput, MainStart, ProcessEvent, ProcessEvents, StartRefusal,
    Stream as OutputStream,
};
pub use self::ssh::{SessionCount, SessionCounts, SshConnection};
use crate::limits;
use crate::link::HostLink;
use crate::v1;

/// Between bind(2) and listen(2) of a VMM that starts, its socket exists and refuses. A socket that refuses for longer
/// belongs to nobody any more.
const NOT_LISTENING_YET: Duration = Duration::from_millis(100);

type Stub = v1::agent_client::AgentClient<Channel>;

/// What happens when the answer to a shutdown does not come: the guest takes this long beyond its grace at most, for
/// SIGKILL, sync and unmounting.
const SHUTDOWN_SLACK: Duration = Duration::from_secs(30);

/// How long an agent may take to begin to answer. An emulated guest on a busy host takes seconds at worst; one whose
/// agent was stopped by its own guest takes for ever.
const ANSWER: Duration = Duration::from_secs(30);
/// How long an agent may take to greet over vsock before it is called again; more where it has been called for long.
const GREETING: Duration = Duration::from_secs(10);

/// Gives a call up whose answer does not begin in time.
async fn in_time<T>(
    call: &'static str,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(ANSWER, answer).await {
        Ok(answer) => answer.map_err(|status| CallError::of(call, &status)),
        Err(_) => Err(CallError::Late { call }),
    }
}

/// A connection to the agent of one guest. Clones share it.
#[derive(Clone, Debug)]
pub struct AgentClient {
    stub: Stub,
}

/// What the agent says about itself and its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Version of the agent's crate.
    pub agent_version: String,
    /// `uname -r` of the guest.
    pub kernel_release: String,
    /// Which VM the guest was made; empty until it was.
    pub vm_id: String,
    /// Guest uptime when the agent was ready for the host.
    pub ready_uptime: Duration,
    /// How the main process is.
    pub main: v1::MainState,
    /// Open exec sessions.
    pub sessions: u32,
}

impl AgentClient {
    /// Starts HTTP/2 on a stream that is connected with an agent. Does not wait for the agent: call
    /// [`AgentClient::hello`] for that.
    ///
    /// # Errors
    /// When the stream takes nothing.
    pub async fn connect<S>(stream: S) -> Result<Self, ConnectError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut stream = Some(TokioIo::new(stream));
        // Asked for a second time when the connection is lost: there is no second stream.
        let connector = tower::service_fn(move |_| {
            let stream = stream
                .take()
                .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
            async move { stream }
        });
        let channel = Endpoint::from_static("http://agent")
            .initial_stream_window_size(limits::STREAM_WINDOW)
            .initial_connection_window_size(limits::CONNECTION_WINDOW)
            .max_frame_size(limits::MAX_HTTP_FRAME)
            .http2_max_header_list_size(limits::MAX_HEADER_LIST)
            .connect_with_connector(connector)
            .await
            .map_err(|source| ConnectError::Http { source })?;
        let stub = Stub::new(channel)
            .max_decoding_message_size(limits::MAX_REPLY)
            .max_encoding_message_size(limits::MAX_REQUEST);
        Ok(Self { stub })
    }

    /// Connects to an agent behind a virtio-serial port whose host side is the Unix socket `path`. Waits for a guest
    /// that is still booting, and returns the moment its agent answers. Dropping the future is safe.
    ///
    /// # Errors
    /// When the socket cannot be opened or closes, or the guest speaks another version.
    pub async fn connect_unix_link(path: &Path) -> Result<Self, ConnectError> {
        let stream = open(path).await.map_err(|source| ConnectError::Socket {
            path: path.to_owned(),
            source,
        })?;
        let link = HostLink::connect(stream)
            .await
            .map_err(|source| ConnectError::Link { source })?;
        Self::connect(link).await
    }

    /// Connects to an agent that listens on a vsock port of its guest, which the VMM offers as the Unix socket `path`
    /// (`CONNECT port`). Waits for a guest that is still booting. `maker`, where it is known, is the process that must
    /// have made the socket. Dropping the future is safe.
    ///
    /// # Errors
    /// When the socket cannot be opened, or is another process's.
    pub async fn connect_hybrid_vsock(
        path: &Path,
        port: u32,
        maker: Option<u32>,
    ) -> Result<Self, ConnectError> {
        let began = Instant::now();
        loop {
            let stream = vsock::connect(path, port, maker)
                .await
                .map_err(|source| ConnectError::Socket {
                    path: path.to_owned(),
                    source,
                })?;
            // A guest whose vsock was reset meanwhile says nothing more, and nobody says that it is so.
            let patience = GREETING.max(began.elapsed() / 4);
            if let Ok(connected) = tokio::time::timeout(patience, Self::connect(stream)).await {
                return connected;
            }
        }
    }

    /// Who is there.
    ///
    /// # Errors
    /// When the agent is gone or does not answer.
    pub async fn hello(&self) -> Result<Hello, CallError> {
        const CALL: &str = "hello";
        let mut stub = self.stub.clone();
        let reply = in_time(CALL, stub.hello(v1::HelloRequest {})).await?;
        let reply = reply.into_inner();
        let main = v1::MainState::try_from(reply.main).map_err(|_| CallError::BadReply {
            call: CALL,
            what: "an unknown state of the main process",
        })?;
        Ok(Hello {
            agent_version: error::printable(&reply.agent_version),
            kernel_release: error::printable(&reply.kernel_release),
            vm_id: error::printable(&reply.vm_id),
            ready_uptime: Duration::from_micros(reply.ready_uptime_us),
            main,
            sessions: reply.sessions,
        })
    }

    /// Makes the guest a VM: clock, host name, root and disks. Returns the timed steps in the guest.
    ///
    /// # Errors
    /// `Refused` when a disk is missing or cannot be mounted; then the guest is of no use.
    pub async fn configure(
        &self,
        request: v1::ConfigureRequest,
    ) -> Result<Vec<(String, Duration)>, CallError> {
        let reply = self
            .stub
            .clone()
            .configure(request)
            .await
            .map_err(|status| CallError::of("configure", &status))?;
        let stages = reply.into_inner().stages.into_iter().take(limits::MAX_STAGES);
        Ok(stages
            .map(|stage| {
                (
                    error::printable(&stage.name),
                    Duration::from_micros(stage.duration_us),
                )
            })
            .collect())
    }

    /// Makes a guest that is no VM yet do what every VM of its kind does first, before it is saved.
    ///
    /// # Errors
    /// `Refused` when it is a VM already, or a device is missing.
    pub async fn rehearse(&self, request: v1::RehearseRequest) -> Result<(), CallError> {
        let mut stub = self.stub.clone();
        in_time("rehearse", stub.rehearse(request)).await.map(drop)
    }

    /// Makes a guest ready to become a VM with these root and disks; what else the request says is not looked at. Then
    /// [`exec`](Self::exec) works.
    ///
    /// # Errors
    /// `Refused` when it is a VM already, or a disk is missing or cannot be mounted; then the guest is of no use.
    pub async fn warm(&self, like: v1::ConfigureRequest) -> Result<(), CallError> {
        let mut stub = self.stub.clone();
        in_time("warm", stub.warm(v1::WarmRequest { like: Some(like) }))
            .await
            .map(drop)
    }

    /// Starts the main process or the image's init, once per boot; a second call answers like the first.
    ///
    /// # Errors
    /// When the guest is not configured or the agent is gone. A process that could not be started is no error of the
    /// call: see [`MainStart::Refused`].
    pub async fn start_main(&self, what: v1::start_main_request::What) -> Result<MainStart, CallError> {
        const CALL: &str = "start_main";
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = v1::StartMainRequest {
            what: Some(what),
            realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        };
        let reply = self
            .stub
            .clone()
            .start_main(request)
            .await
            .map_err(|status| CallError::of(CALL, &status))?;
        match reply.into_inner().what {
            Some(v1::start_main_reply::What::Pid(pid)) => Ok(MainStart::Started { pid }),
            Some(v1::start_main_reply::What::Failed(failure)) => Ok(MainStart::Refused(failure.into())),
            None => Err(CallError::BadReply {
                call: CALL,
                what: "an empty answer",
            }),
        }
    }

    /// Sends a signal to the main process, by number.
    ///
    /// # Errors
    /// `Refused` when there is no such process.
    pub async fn signal_main(&self, signal: u32) -> Result<(), CallError> {
        let request = v1::SignalRequest { signal };
        let mut stub = self.stub.clone();
        in_time("signal_main", stub.signal_main(request)).await.map(drop)
    }

    /// Ends every process, syncs and unmounts. Returns whether the disks are clean; the VMM may be killed then, and
    /// the guest powers itself off soon.
    ///
    /// # Errors
    /// When the agent is gone or does not answer in time.
    pub async fn shutdown(&self, grace: Duration) -> Result<bool, CallError> {
        const CALL: &str = "shutdown";
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let mut stub = self.stub.clone();
        let call = stub.shutdown(v1::ShutdownRequest { grace_ms });
        match tokio::time::timeout(grace.saturating_add(SHUTDOWN_SLACK), call).await {
            Ok(reply) => Ok(reply
                .map_err(|status| CallError::of(CALL, &status))?
                .into_inner()
                .clean),
            Err(_) => Err(CallError::Late { call: CALL }),
        }
    }
}

/// Opens a VMM's socket.
async fn open(path: &Path) -> io::Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path).await {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused
                    && start.elapsed() < NOT_LISTENING_YET =>
            {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            result => return result,
        }
    }
}
