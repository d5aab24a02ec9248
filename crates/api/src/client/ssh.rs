//! The bytes of one SSH connection over a WebSocket.

use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use http::{Method, StatusCode, header};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};

use super::connection::{Upload, exchange};
use super::error::{ClientError, ProtocolError};
use super::session::{Socket, is_end};
use crate::ssh::MAX_MESSAGE;
use hyper_util::rt::TokioIo;

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
        let key = generate_key();
        let headers = [
            (header::CONNECTION, "Upgrade"),
            (header::UPGRADE, "websocket"),
            (header::SEC_WEBSOCKET_VERSION, "13"),
            (header::SEC_WEBSOCKET_KEY, key.as_str()),
        ];
        let answer = exchange(socket, Method::GET, target, Upload::none(), &headers).await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(answer.broken(ProtocolError::Status {
                status: answer.status().as_u16(),
            }));
        }
        let name = "sec-websocket-accept";
        if answer.header(name) != Some(derive_accept_key(key.as_bytes()).as_str()) {
            return Err(answer.broken(ProtocolError::Header { name }));
        }
        let (request, upgraded) = answer.upgrade().await?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE))
            .write_buffer_size(0);
        let socket =
            WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, Some(config)).await;
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
