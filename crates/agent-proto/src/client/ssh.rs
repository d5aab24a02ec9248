//! SSH connections to the agent's own server, and how many sessions a guest has.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::StreamExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::error::CallError;
use super::{AgentClient, in_time, v1};
use crate::byte_stream::ByteStream;

/// How many messages wait for the connection; a chunk each, so this is what a fast client buffers.
const QUEUE: usize = 4;

/// One SSH connection (RFC 4253) to a guest's agent, as a plain stream of bytes. Its end from either side ends the
/// connection; so does dropping it.
pub type SshConnection = ByteStream<v1::SshRequest>;

fn request(what: v1::ssh_request::What) -> v1::SshRequest {
    v1::SshRequest { what: Some(what) }
}

/// How many sessions are open in a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionCount {
    /// SSH connections that were authenticated, over the network and over the channel.
    pub ssh: u32,
    /// Exec sessions.
    pub exec: u32,
}

/// The number of sessions, now and whenever it changes. Ends with the connection, which is an error.
pub struct SessionCounts {
    stream: Streaming<v1::SessionsReply>,
    over: bool,
}

impl SessionCounts {
    /// The next number; nothing after an error. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Result<SessionCount, CallError>> {
        std::future::poll_fn(|cx| futures::Stream::poll_next(Pin::new(self), cx)).await
    }
}

impl futures::Stream for SessionCounts {
    type Item = Result<SessionCount, CallError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        const CALL: &str = "sessions";
        if self.over {
            return Poll::Ready(None);
        }
        let item = match ready!(Pin::new(&mut self.stream).poll_next(cx)) {
            Some(Ok(v1::SessionsReply { ssh, exec })) => Ok(SessionCount { ssh, exec }),
            Some(Err(status)) => Err(CallError::of(CALL, &status)),
            None => Err(CallError::Gone {
                call: CALL,
                message: "the stream ended".to_owned(),
            }),
        };
        self.over = item.is_err();
        Poll::Ready(Some(item))
    }
}

impl AgentClient {
    /// Opens one SSH connection to the agent's own server. `authorized_keys` are more lines of an authorized_keys that
    /// are good on this connection alone.
    ///
    /// # Errors
    /// `Refused` when the guest has no SSH server, or the agent is gone or does not answer.
    pub async fn ssh(&self, authorized_keys: Vec<String>) -> Result<SshConnection, CallError> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        sender
            .try_send(request(v1::ssh_request::What::Open(v1::SshOpen {
                authorized_keys,
            })))
            .expect("a new channel has room and a receiver");
        let mut stub = self.stub.clone();
        let answer = stub.ssh(ReceiverStream::new(receiver));
        let from_guest = in_time("ssh", answer).await?.into_inner();
        let received = from_guest.map(|message| match message {
            Ok(bytes) => Ok(bytes.data),
            Err(status) => Err(io::Error::other(CallError::of("ssh", &status))),
        });
        Ok(ByteStream::new(received, sender, |data| {
            request(v1::ssh_request::What::Data(data))
        }))
    }

    /// How many sessions the guest has, at once and whenever that changes.
    ///
    /// # Errors
    /// When the agent is gone or does not answer.
    pub async fn sessions(&self) -> Result<SessionCounts, CallError> {
        let mut stub = self.stub.clone();
        let answer = stub.sessions(v1::SessionsRequest {});
        let stream = in_time("sessions", answer).await?.into_inner();
        Ok(SessionCounts { stream, over: false })
    }
}
