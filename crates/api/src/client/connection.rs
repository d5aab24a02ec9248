//! One HTTP exchange over one connection to the daemon's socket.
//!
//! Connecting to a Unix socket costs next to nothing, so connections are not kept: dropping an answer closes its
//! connection, and that is how the daemon learns that nobody wants it any more.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::io::ReaderStream;

use super::error::{ClientError, ProtocolError};
use super::reach;
use crate::error::ApiError;

/// The longest plain JSON answer: some ten thousand VMs with long command lines.
const MAX_ANSWER: usize = 64 << 20;
/// How much of a file is read at once to be sent.
const UPLOAD_CHUNK: usize = 256 << 10;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What is sent as the body of a request.
pub struct Upload {
    body: Body,
    content_type: Option<&'static str>,
    length: Option<u64>,
}

impl Upload {
    pub(super) fn none() -> Self {
        Self {
            body: Full::default().map_err(|never| match never {}).boxed_unsync(),
            content_type: None,
            length: None,
        }
    }

    pub(super) fn json(value: &impl Serialize) -> Result<Self, ProtocolError> {
        let text = serde_json::to_vec(value).map_err(ProtocolError::Json)?;
        let body = Full::from(text).map_err(|never| match never {}).boxed_unsync();
        Ok(Self {
            body,
            content_type: Some("application/json"),
            length: None,
        })
    }

    /// A tar or another archive, as it comes. When the stream fails, the request fails.
    pub fn from_stream(stream: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Self {
        let body = StreamBody::new(stream.map_ok(Frame::data)).boxed_unsync();
        Self {
            body,
            content_type: Some("application/x-tar"),
            length: None,
        }
    }

    /// An archive out of a file or a pipe; `length` where it is known, so that the daemon can say how far it is.
    pub fn from_reader(reader: impl AsyncRead + Send + 'static, length: Option<u64>) -> Self {
        Self {
            length,
            ..Self::from_stream(ReaderStream::with_capacity(reader, UPLOAD_CHUNK))
        }
    }
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upload")
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

/// Ends the task that drives a connection, and with it the connection.
#[derive(Debug)]
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The head of an answer that is no error, its body still to be read.
pub(super) struct Answer {
    request: String,
    response: Response<Incoming>,
    driver: Driver,
}

/// Sends one request and waits for the head of its answer. An error answer becomes [`ClientError::Api`].
///
/// Safe to drop: the connection closes.
pub(super) async fn exchange(
    socket: &std::path::Path,
    method: Method,
    target: &str,
    upload: Upload,
    headers: &[(header::HeaderName, &str)],
) -> Result<Answer, ClientError> {
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    let request_name = format!("{method} {path}");
    let broken = |source| ClientError::Protocol {
        request: request_name.clone(),
        source,
    };
    let stream = reach::connect(socket).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(HearingOut {
        stream,
        deaf_peer: false,
    }))
    .await
    .map_err(|e| broken(ProtocolError::Connection(e)))?;
    let driver = Driver(tokio::spawn(async move {
        // Its error is also the answer's error, and told there.
        let _ = connection.with_upgrades().await;
    }));

    let mut builder = Request::builder()
        .method(method)
        .uri(target)
        .header(header::HOST, "offshoot")
        .header(
            header::USER_AGENT,
            concat!("offshoot/", env!("CARGO_PKG_VERSION")),
        );
    if let Some(content_type) = upload.content_type {
        builder = builder.header(header::CONTENT_TYPE, content_type);
    }
    if let Some(length) = upload.length {
        builder = builder.header(header::CONTENT_LENGTH, length);
    }
    for (name, value) in headers {
        builder = builder.header(name, *value);
    }
    let request = builder
        .body(upload.body)
        .map_err(|e| broken(ProtocolError::Request(e)))?;
    let response = sender.send_request(request).await.map_err(|e| {
        broken(if e.is_user() {
            ProtocolError::Upload(e)
        } else {
            ProtocolError::Connection(e)
        })
    })?;

    let status = response.status();
    let answer = Answer {
        request: request_name.clone(),
        response,
        driver,
    };
    if status.is_client_error() || status.is_server_error() {
        let status = status.as_u16();
        return Err(match answer.json::<ApiError>().await {
            Ok(error) => ClientError::Api(error),
            Err(ClientError::Protocol {
                source: ProtocolError::Json(_),
                request,
            }) => ClientError::Protocol {
                request,
                source: ProtocolError::Status { status },
            },
            Err(other) => other,
        });
    }
    Ok(answer)
}

impl Answer {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    pub(super) fn broken(&self, source: ProtocolError) -> ClientError {
        ClientError::Protocol {
            request: self.request.clone(),
            source,
        }
    }

    /// The whole body as one JSON value.
    pub(super) async fn json<T: DeserializeOwned>(self) -> Result<T, ClientError> {
        let Self {
            request,
            response,
            driver: _driver,
        } = self;
        let broken = |source| ClientError::Protocol {
            request: request.clone(),
            source,
        };
        let whole = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|e| {
                broken(match e.downcast::<hyper::Error>() {
                    Ok(e) => ProtocolError::Connection(*e),
                    Err(_) => ProtocolError::TooLong { limit: MAX_ANSWER },
                })
            })?;
        serde_json::from_slice(&whole.to_bytes()).map_err(|e| broken(ProtocolError::Json(e)))
    }

    /// The body piece by piece.
    pub(super) fn into_body(self) -> AnswerBody {
        AnswerBody {
            request: self.request,
            incoming: self.response.into_body(),
            _driver: self.driver,
        }
    }

    /// The connection itself, after `101 Switching Protocols`.
    pub(super) async fn upgrade(self) -> Result<(String, hyper::upgrade::Upgraded), ClientError> {
        let Self {
            request,
            response,
            driver: _driver,
        } = self;
        match hyper::upgrade::on(response).await {
            Ok(upgraded) => Ok((request, upgraded)),
            Err(e) => Err(ClientError::Protocol {
                request,
                source: ProtocolError::Connection(e),
            }),
        }
    }
}

/// The body of an answer, piece by piece. Dropping it closes the connection.
#[derive(Debug)]
pub struct AnswerBody {
    request: String,
    incoming: Incoming,
    _driver: Driver,
}

impl AnswerBody {
    /// The next piece; `None` at the end. Safe to drop: nothing is lost.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.incoming.frame().await {
            let frame = frame.map_err(|e| self.broken(ProtocolError::Connection(e)))?;
            if let Ok(data) = frame.into_data()
                && !data.is_empty()
            {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    pub(super) fn broken(&self, source: ProtocolError) -> ClientError {
        ClientError::Protocol {
            request: self.request.clone(),
            source,
        }
    }
}

/// A connection that goes on reading when the daemon stopped listening.
///
/// The daemon may refuse an upload before it has read all of it, and close. Then a write fails although the answer,
/// which says why, is already there to be read. So failed writes count as done, and reading finds the answer or the end.
struct HearingOut {
    stream: UnixStream,
    deaf_peer: bool,
}

impl AsyncRead for HearingOut {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for HearingOut {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.deaf_peer {
            return Poll::Pending; // Nothing is worth writing any more; the read side ends the exchange.
        }
        match Pin::new(&mut self.stream).poll_write(cx, buf) {
            Poll::Ready(Err(e))
                if matches!(
                    e.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                self.deaf_peer = true;
                Poll::Ready(Ok(buf.len()))
            }
            other => other,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
