//! The client's side of a WebSocket's opening handshake (RFC 6455, section 4.1).

use http::{Method, StatusCode, header};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use super::connection::{Upload, exchange};
use super::error::{ClientError, ProtocolError};

/// A WebSocket to the daemon.
pub(super) type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Asks for a WebSocket at `target`; gives it with the request, for errors.
pub(super) async fn upgrade(
    socket: &std::path::Path,
    target: &str,
    subprotocol: Option<&'static str>,
    config: WebSocketConfig,
) -> Result<(String, Socket), ClientError> {
    let key = generate_key();
    let mut headers = vec![
        (header::CONNECTION, "Upgrade"),
        (header::UPGRADE, "websocket"),
        (header::SEC_WEBSOCKET_VERSION, "13"),
        (header::SEC_WEBSOCKET_KEY, key.as_str()),
    ];
    headers.extend(subprotocol.map(|name| (header::SEC_WEBSOCKET_PROTOCOL, name)));
    let answer = exchange(socket, Method::GET, target, Upload::none(), &headers).await?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(answer.broken(ProtocolError::Status {
            status: answer.status().as_u16(),
        }));
    }
    let accept = derive_accept_key(key.as_bytes());
    let accept = ("sec-websocket-accept", accept.as_str());
    let protocol = subprotocol.map(|name| ("sec-websocket-protocol", name));
    for (name, expected) in std::iter::once(accept).chain(protocol) {
        if answer.header(name) != Some(expected) {
            return Err(answer.broken(ProtocolError::Header { name }));
        }
    }
    let (request, upgraded) = answer.upgrade().await?;
    let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, Some(config)).await;
    Ok((request, socket))
}
