//! Serves one connection: HTTP/2 straight on the stream, no router and no listener.

use std::sync::Arc;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::limits;
use crate::v1::agent_server::{Agent, AgentServer};

/// The service with this crate's limits, ready to be cloned for every connection.
pub fn service<A: Agent>(agent: Arc<A>) -> AgentServer<A> {
    AgentServer::from_arc(agent)
        .max_decoding_message_size(limits::MAX_REQUEST)
        .max_encoding_message_size(limits::MAX_REPLY)
}

/// Answers calls on `stream` until the peer closes it or it breaks. Dropping the future ends the connection and every
/// call on it.
///
/// # Errors
/// When the peer breaks HTTP/2's rules or the stream fails.
pub async fn serve<S, A>(stream: S, service: AgentServer<A>) -> Result<(), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
    A: Agent,
{
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_frame_size(limits::MAX_HTTP_FRAME)
        .max_header_list_size(limits::MAX_HEADER_LIST)
        .max_concurrent_streams(limits::MAX_STREAMS)
        .max_send_buf_size(limits::STREAM_WINDOW as usize)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .await
}
