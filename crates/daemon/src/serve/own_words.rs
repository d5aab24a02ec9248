//! A connection on which HTTP's own refusals have the one error shape.
//!
//! What is no HTTP at all never reaches a handler: hyper answers it by itself, with a status and an empty body. Such an
//! answer is known by its form, by its place (at the start of a write, after everything before it was flushed), and by
//! that nobody is answering a request just then. It is swallowed, and a refusal with the same status is sent instead.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;

use crate::refusal::Refusal;

/// The longest refusal of hyper's own: a status line and three headers.
const MAX_BARE: usize = 256;

/// A connection to a client.
pub(super) struct OwnWords<S> {
    stream: S,
    /// Requests that are being answered: 0 or 1.
    answering: Arc<AtomicUsize>,
    /// Whether everything that was written so far was flushed, so that a write now begins a message.
    fresh: bool,
    /// What is still to be sent in place of something else.
    instead: Bytes,
    /// Its place among the connections.
    _permit: OwnedSemaphorePermit,
}

impl<S> OwnWords<S> {
    pub(super) fn new(stream: S, permit: OwnedSemaphorePermit) -> Self {
        Self {
            stream,
            answering: Arc::default(),
            fresh: true,
            instead: Bytes::new(),
            _permit: permit,
        }
    }

    /// How many requests are being answered; [`Answering`] counts.
    pub(super) fn answering(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.answering)
    }

    /// Whether `written` is to be replaced; then what replaces it waits to be sent.
    fn swallow(&mut self, written: &[u8]) -> bool {
        if !self.fresh || self.answering.load(Ordering::Relaxed) > 0 {
            return false;
        }
        let Some(status) = bare_refusal(written) else {
            return false;
        };
        self.instead = refusal(status).to_http().into();
        true
    }
}

impl<S: AsyncWrite + Unpin> OwnWords<S> {
    fn poll_instead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.instead.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.instead))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let _ = self.instead.split_to(written);
        }
        Poll::Ready(Ok(()))
    }
}

/// The status of an answer that hyper made by itself: a 4xx with nothing in it, and nothing else in the buffer.
fn bare_refusal(written: &[u8]) -> Option<StatusCode> {
    if written.len() > MAX_BARE {
        return None;
    }
    let text = std::str::from_utf8(written).ok()?;
    let head = text
        .strip_suffix("\r\n\r\n")
        .filter(|head| !head.contains("\r\n\r\n"))?;
    let mut lines = head.split("\r\n");
    let rest = lines.next()?.strip_prefix("HTTP/1.")?;
    let status: StatusCode = rest.get(2..5)?.parse().ok()?;
    let empty = lines.any(|line| line.eq_ignore_ascii_case("content-length: 0"));
    (status.is_client_error() && empty).then_some(status)
}

/// A refusal in our words for a status in hyper's.
fn refusal(status: StatusCode) -> Refusal {
    let message = match status {
        StatusCode::URI_TOO_LONG => "the request's path is too long",
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            "the request's head is too long: 64 KiB and 100 headers at most"
        }
        _ => "the request is not HTTP/1.1",
    };
    Refusal::new(status, message, "see GET /openapi.json, or use `offshoot`")
}

impl<S: AsyncRead + Unpin> AsyncRead for OwnWords<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for OwnWords<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_instead(cx))?;
        if self.swallow(buf) {
            return Poll::Ready(Ok(buf.len()));
        }
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        self.fresh &= written == 0;
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_instead(cx))?;
        if let [only] = bufs
            && self.swallow(only)
        {
            return Poll::Ready(Ok(only.len()));
        }
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs))?;
        self.fresh &= written == 0;
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_instead(cx))?;
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.fresh = true;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_instead(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A request that is being answered, from its head to the end of its answer.
pub(super) struct Answering(Arc<AtomicUsize>);

impl Answering {
    pub(super) fn begin(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counter))
    }

    /// The body of the answer, with which the answering ends.
    pub(super) fn until_the_end_of(self, body: Body) -> AnswerBody {
        AnswerBody { body, _turn: self }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The body of an answer.
pub(super) struct AnswerBody {
    body: Body,
    _turn: Answering,
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hypers_own_refusals_are_taken_for_that() {
        let check = |written: &str, expected: Option<u16>| {
            assert_eq!(
                bare_refusal(written.as_bytes()).map(|s| s.as_u16()),
                expected,
                "{written:?}"
            );
        };
        let bare = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        check(bare, Some(400));
        check(
            "HTTP/1.0 431 X\r\nContent-Length: 0\r\ndate: x\r\n\r\n",
            Some(431),
        );
        check("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", None);
        check("HTTP/1.1 404 X\r\ncontent-length: 2\r\n\r\n{}", None);
        check(&format!("{bare}{bare}"), None);
        check("{\"a\":1}", None);
        check("", None);
        check("HTTP/1.", None);
        check("HTTP/1.1 4é\r\ncontent-length: 0\r\n\r\n", None);
        check(
            &format!("HTTP/1.1 400 {}\r\ncontent-length: 0\r\n\r\n", "x".repeat(300)),
            None,
        );
    }
}
