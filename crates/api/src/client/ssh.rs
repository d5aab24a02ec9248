//! The bytes of one SSH connection over a WebSocket.

use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::protocol::{Message, WebSocketConfig};

use super::error::{ClientError, ProtocolError};
use super::session::is_end;
use super::websocket::{Socket, upgrade};
use crate::ssh::MAX_MESSAGE;

/// One connection to the SSH server of a VM's agent. Dropping it ends the connection.
pub struct SshTunnel {
    request: String,
    socket: Socket,
}

impl std::fmt::Debug for SshTunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SshTunnel")
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}

impl SshTunnel {
    pub(super) async fn open(socket: &std::path::Path, target: &str) -> Result<Self, ClientError> {
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE))
            .write_buffer_size(0);
        let (request, socket) = upgrade(socket, target, None, config).await?;
        Ok(Self { request, socket })
    }

    /// The two directions, for two tasks.
    pub fn split(self) -> (SshSink, SshStream) {
        let (sink, stream) = self.socket.split();
        (
            SshSink {
                request: self.request.clone(),
                sink,
            },
            SshStream {
                request: self.request,
                stream,
            },
        )
    }
}

/// Client to VM.
#[derive(Debug)]
pub struct SshSink {
    request: String,
    sink: SplitSink<Socket, Message>,
}

impl SshSink {
    /// Sends bytes, of any length. Dropping the future half-way may lose some.
    pub async fn send(&mut self, mut data: Bytes) -> Result<(), ClientError> {
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(MAX_MESSAGE));
            let sent = self.sink.send(Message::Binary(piece)).await;
            sent.map_err(|e| ClientError::Protocol {
                request: self.request.clone(),
                source: ProtocolError::WebSocket(Box::new(e)),
            })?;
        }
        Ok(())
    }
}

/// VM to client.
#[derive(Debug)]
pub struct SshStream {
    request: String,
    stream: SplitStream<Socket>,
}

impl SshStream {
    /// The next bytes; `None` when the VM ended the connection. Safe to drop: nothing is lost.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(message) = self.stream.next().await {
            match message {
                Ok(Message::Binary(bytes)) => return Ok(Some(bytes)),
                Ok(Message::Close(_)) => return Ok(None),
                Ok(Message::Text(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
                Err(e) if is_end(&e) => return Ok(None),
                Err(e) => {
                    return Err(ClientError::Protocol {
                        request: self.request.clone(),
                        source: ProtocolError::WebSocket(Box::new(e)),
                    });
                }
            }
        }
        Ok(None)
    }
}
