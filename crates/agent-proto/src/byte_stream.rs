//! A plain stream of bytes whose pieces travel in messages.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures::stream::{BoxStream, Stream, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

use crate::limits::MAX_CHUNK;

/// Both directions of a call whose messages are pieces of bytes. Dropping it ends the call; shutting down its writing
/// side ends the messages that go out.
pub struct ByteStream<T> {
    received: BoxStream<'static, io::Result<Bytes>>,
    sent: PollSender<T>,
    message: fn(Bytes) -> T,
    /// What was received and not read yet.
    rest: Bytes,
}

impl<T: Send + 'static> ByteStream<T> {
    /// Goes on where the messages are; `message` makes one of a piece, which is at most [`MAX_CHUNK`] bytes.
    pub fn new(
        received: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
        sent: mpsc::Sender<T>,
        message: fn(Bytes) -> T,
    ) -> Self {
        Self {
            received: received.boxed(),
            sent: PollSender::new(sent),
            message,
            rest: Bytes::new(),
        }
    }
}

impl<T: Send + 'static> AsyncRead for ByteStream<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.received.poll_next_unpin(cx)) {
                Some(piece) => self.rest = piece?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = out.remaining().min(self.rest.len());
        out.put_slice(&self.rest[..count]);
        self.rest.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<T: Send + 'static> AsyncWrite for ByteStream<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.sent.poll_reserve(cx)).map_err(gone)?;
        let count = data.len().min(MAX_CHUNK);
        let message = (self.message)(Bytes::copy_from_slice(&data[..count]));
        self.sent.send_item(message).map_err(gone)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.sent.close();
        Poll::Ready(Ok(()))
    }
}
