//! `attach` and `exec` sessions: WebSockets whose messages are those of [`crate::channel`].

use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite;
use tokio_tungstenite::tungstenite::protocol::{Message, WebSocketConfig};

use super::error::{ClientError, ProtocolError};
use super::websocket::{Socket, upgrade};
use crate::channel::{self, ExecStart, Status, WindowSize};

/// What a client says in a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientMessage {
    /// Bytes for standard input, of any length.
    Stdin(Bytes),
    /// The end of standard input.
    CloseStdin,
    /// The terminal has this size now.
    Resize(WindowSize),
    /// A signal's number, for the process.
    Signal(i32),
}

/// What the daemon says in a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DaemonMessage {
    /// Bytes of standard output; everything, with a terminal.
    Stdout(Bytes),
    /// Bytes of standard error.
    Stderr(Bytes),
    /// The end; comes once and last.
    Status(Status),
}

/// An open session. Dropping it detaches: the process of an `attach` runs on.
pub struct Session {
    request: String,
    socket: Socket,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}

impl Session {
    pub(super) async fn open(socket: &std::path::Path, target: &str) -> Result<Self, ClientError> {
        let config = WebSocketConfig::default()
            .max_message_size(Some(channel::MAX_MESSAGE))
            .max_frame_size(Some(channel::MAX_MESSAGE));
        let (request, socket) = upgrade(socket, target, Some(channel::SUBPROTOCOL), config).await?;
        Ok(Self { request, socket })
    }

    pub(super) async fn start(&mut self, start: &ExecStart) -> Result<(), ClientError> {
        let broken = |source| ClientError::Protocol {
            request: self.request.clone(),
            source,
        };
        let text = serde_json::to_string(start).map_err(|e| broken(ProtocolError::Json(e)))?;
        self.socket
            .send(Message::text(text))
            .await
            .map_err(|e| broken(ProtocolError::WebSocket(Box::new(e))))
    }

    /// The two directions, for two tasks.
    pub fn split(self) -> (SessionSink, SessionStream) {
        let (sink, stream) = self.socket.split();
        (
            SessionSink {
                request: self.request.clone(),
                sink,
            },
            SessionStream {
                request: self.request,
                stream,
            },
        )
    }
}

/// Client to daemon.
#[derive(Debug)]
pub struct SessionSink {
    request: String,
    sink: SplitSink<Socket, Message>,
}

impl SessionSink {
    /// Sends one message. Dropping the future half-way may lose the message.
    pub async fn send(&mut self, message: ClientMessage) -> Result<(), ClientError> {
        let messages = encode(message).map_err(|source| self.broken(source))?;
        for bytes in messages {
            let sent = self.sink.send(Message::Binary(bytes)).await;
            sent.map_err(|e| self.broken(ProtocolError::WebSocket(Box::new(e))))?;
        }
        Ok(())
    }

    fn broken(&self, source: ProtocolError) -> ClientError {
        ClientError::Protocol {
            request: self.request.clone(),
            source,
        }
    }
}

/// Daemon to client.
#[derive(Debug)]
pub struct SessionStream {
    request: String,
    stream: SplitStream<Socket>,
}

impl SessionStream {
    /// The next message; `None` when the daemon closed the session. Safe to drop: nothing is lost.
    pub async fn next(&mut self) -> Result<Option<DaemonMessage>, ClientError> {
        let broken = |source| ClientError::Protocol {
            request: self.request.clone(),
            source,
        };
        while let Some(message) = self.stream.next().await {
            let message = match message {
                Ok(message) => message,
                Err(e) if is_end(&e) => return Ok(None),
                Err(e) => return Err(broken(ProtocolError::WebSocket(Box::new(e)))),
            };
            match message {
                Message::Binary(bytes) => return decode(bytes).map(Some).map_err(broken),
                Message::Close(_) => return Ok(None),
                Message::Text(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
        Ok(None)
    }
}

/// Whether this is how a session ends. A daemon that is killed closes none; that is an end all the same.
pub(super) fn is_end(error: &tungstenite::Error) -> bool {
    matches!(
        error,
        tungstenite::Error::ConnectionClosed
            | tungstenite::Error::AlreadyClosed
            | tungstenite::Error::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake)
    )
}

/// The binary messages for one thing to say: more than one only for long input.
fn encode(message: ClientMessage) -> Result<Vec<Bytes>, ProtocolError> {
    let one = |channel: u8, data: &[u8]| {
        let mut bytes = BytesMut::with_capacity(data.len() + 1);
        bytes.put_u8(channel);
        bytes.put_slice(data);
        bytes.freeze()
    };
    Ok(match message {
        ClientMessage::Stdin(data) => data
            .chunks(channel::MAX_MESSAGE - 1)
            .map(|chunk| one(channel::STDIN, chunk))
            .collect(),
        ClientMessage::CloseStdin => vec![one(channel::CLOSE, &[channel::STDIN])],
        ClientMessage::Resize(size) => {
            vec![one(
                channel::RESIZE,
                &serde_json::to_vec(&size).map_err(ProtocolError::Json)?,
            )]
        }
        ClientMessage::Signal(number) => vec![one(channel::SIGNAL, number.to_string().as_bytes())],
    })
}

fn decode(mut bytes: Bytes) -> Result<DaemonMessage, ProtocolError> {
    if bytes.is_empty() {
        return Err(ProtocolError::CutOff);
    }
    let data = bytes.split_off(1);
    match bytes[0] {
        channel::STDOUT => Ok(DaemonMessage::Stdout(data)),
        channel::STDERR => Ok(DaemonMessage::Stderr(data)),
        channel::STATUS => serde_json::from_slice(&data)
            .map(DaemonMessage::Status)
            .map_err(ProtocolError::Json),
        channel => Err(ProtocolError::Channel { channel }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_their_channel() {
        let check = |message, expected: &[&[u8]]| assert_eq!(encode(message).unwrap(), expected);
        check(ClientMessage::Stdin(Bytes::from("hi")), &[b"\0hi"]);
        check(ClientMessage::Stdin(Bytes::new()), &[]);
        check(ClientMessage::CloseStdin, &[b"\xff\0"]);
        check(ClientMessage::Signal(15), &[b"\x0515"]);
        check(
            ClientMessage::Resize(WindowSize {
                width: 80,
                height: 24,
            }),
            &[b"\x04{\"Width\":80,\"Height\":24}"],
        );
        let long = encode(ClientMessage::Stdin(Bytes::from(vec![7; 150_000]))).unwrap();
        assert_eq!(
            long.iter().map(Bytes::len).collect::<Vec<_>>(),
            [65537, 65537, 18929]
        );
    }

    #[test]
    fn what_the_daemon_says_is_told_apart() {
        assert_eq!(
            decode(Bytes::from("\x01x")).unwrap(),
            DaemonMessage::Stdout(Bytes::from("x"))
        );
        assert_eq!(
            decode(Bytes::from("\x02")).unwrap(),
            DaemonMessage::Stderr(Bytes::new())
        );
        let status = decode(Bytes::from("\x03{\"status\":\"exited\",\"code\":7}")).unwrap();
        assert_eq!(status, DaemonMessage::Status(Status::Exited { code: 7 }));
        for bad in ["", "\0in", "\x03{}", "\x09"] {
            assert!(decode(Bytes::from(bad)).is_err(), "{bad:?}");
        }
    }
}
