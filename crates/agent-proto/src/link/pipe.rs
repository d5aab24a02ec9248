//! The stream under a link with its two buffers: what both ends share.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frame::{self, Deframer, Found, Kind, MAX_DATA};

/// What may wait for a stream that takes nothing: some data frames' worth.
const MAX_QUEUED: usize = 128 << 10;

/// A byte stream with whole frames going in and out.
pub(super) struct Pipe<S> {
    io: S,
    input: Deframer,
    /// Data of the current frame that the reader has not taken yet.
    unread: Range<usize>,
    output: Vec<u8>,
    /// How much of `output` is written.
    written: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Pipe<S> {
    pub(super) fn new(io: S) -> Self {
        Self {
            io,
            input: Deframer::new(),
            unread: 0..0,
            output: Vec::new(),
            written: 0,
        }
    }

    pub(super) fn io(&mut self) -> &mut S {
        &mut self.io
    }

    pub(super) fn into_io(self) -> S {
        self.io
    }

    /// Queues a frame that is not DATA. Dropped when the stream takes nothing for long: whoever needs the answer asks
    /// again.
    pub(super) fn queue(&mut self, kind: Kind, session: u64, data: &[u8]) {
        if self.output.len() - self.written > MAX_QUEUED {
            return;
        }
        // A delimiter of its own first: the receiver may be in the middle of an older frame.
        self.output.push(0);
        frame::append(&mut self.output, kind, session, [data]);
    }

    /// Writes everything that is queued to the stream.
    pub(super) fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.output.len() {
            let count = ready!(Pin::new(&mut self.io).poll_write(cx, &self.output[self.written..]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count;
        }
        self.output.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    /// Takes data for one frame as soon as the frame before it is gone, and says how much it took.
    pub(super) fn poll_send<'a>(
        &mut self,
        cx: &mut Context<'_>,
        session: u64,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_drain(cx))?;
        let mut taken = 0;
        let pieces = pieces.into_iter().map_while(|piece| {
            let room = MAX_DATA - taken;
            let piece = &piece[..piece.len().min(room)];
            taken += piece.len();
            (room > 0).then_some(piece)
        });
        frame::append(&mut self.output, Kind::Data, session, pieces);
        if taken == 0 {
            self.output.clear();
            return Poll::Ready(Ok(0));
        }
        if let Poll::Ready(Err(error)) = self.poll_drain(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(taken))
    }

    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    /// Hands over data that was announced with [`Pipe::keep`]; says whether there was any.
    pub(super) fn take_unread(&mut self, out: &mut ReadBuf<'_>) -> bool {
        let count = self.unread.len().min(out.remaining());
        let range = self.unread.start..self.unread.start + count;
        self.unread.start = range.end;
        out.put_slice(self.input.bytes(range));
        count > 0
    }

    /// Keeps the data of the frame just found for [`Pipe::take_unread`].
    pub(super) fn keep(&mut self, data: Range<usize>) {
        self.unread = data;
    }

    /// Forgets data of a conversation that is over.
    pub(super) fn forget(&mut self) {
        self.unread = 0..0;
    }

    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.input.bytes(range)
    }

    /// The next frame or damage; nothing at the end of the stream. Only while nothing is unread.
    pub(super) fn poll_found(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Found>>> {
        debug_assert!(self.unread.is_empty());
        loop {
            if let Some(found) = self.input.next() {
                return Poll::Ready(Ok(Some(found)));
            }
            let mut room = ReadBuf::new(self.input.room());
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut room))?;
            let count = room.filled().len();
            if count == 0 {
                return Poll::Ready(Ok(None));
            }
            self.input.filled(count);
        }
    }
}
