//! The guest's end: it answers whoever says HELLO last.
//!
//! ```text
//!             accept() ◄── HELLO(s) ── any state
//!   silent ───────────────────────────► talking(s) ── BYE(s), damage ──► silent
//!                                           │
//!                                           └── HELLO(t) ──► silent, t waits for accept()
//! ```

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::LINK_VERSION;
use super::frame::{Found, Kind};
use super::host::damaged;
use super::pipe::Pipe;

/// The guest's end of a port. It is one conversation's stream at a time: [`GuestLink::accept`] waits for the next.
pub struct GuestLink<S> {
    pipe: Pipe<S>,
    /// The conversation that reads and writes belong to.
    current: Option<u64>,
    /// A newer conversation, to be answered by `accept`.
    waiting: Option<u64>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> GuestLink<S> {
    /// A link on a port, with no conversation yet.
    pub fn new(io: S) -> Self {
        Self {
            pipe: Pipe::new(io),
            current: None,
            waiting: None,
        }
    }

    /// Ends the conversation there is, waits for the next and answers READY. Dropping the future is safe.
    ///
    /// # Errors
    /// `UnexpectedEof` when the host closed its side of the port; else what the port says.
    pub async fn accept(&mut self) -> io::Result<()> {
        self.pipe.forget();
        if let Some(session) = self.current.take() {
            self.pipe.queue(Kind::Bye, session, &[]);
        }
        loop {
            if let Some(session) = self.waiting.take() {
                self.pipe.queue(Kind::Ready, session, &[LINK_VERSION]);
                self.current = Some(session);
                return std::future::poll_fn(|cx| self.pipe.poll_flush(cx)).await;
            }
            let found = std::future::poll_fn(|cx| {
                // What is left to say to the last host may go out meanwhile, or never.
                let _ = self.pipe.poll_drain(cx)?;
                self.pipe.poll_found(cx)
            });
            match found.await? {
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(Found::Frame {
                    kind: Kind::Hello,
                    session,
                    ..
                }) => self.waiting = Some(session),
                Some(Found::Frame { .. } | Found::Damaged) => {}
            }
        }
    }

    /// The port itself.
    pub fn into_inner(self) -> S {
        self.pipe.into_io()
    }

    /// Whether a HELLO belongs to the conversation that is open: the host repeats itself until it has seen READY.
    fn greet_again(&mut self, session: u64) -> bool {
        let same = self.current == Some(session);
        if same {
            self.pipe.queue(Kind::Ready, session, &[LINK_VERSION]);
        } else {
            self.waiting = Some(session);
            self.current = None;
        }
        same
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for GuestLink<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if out.remaining() == 0 || this.pipe.take_unread(out) {
                return Poll::Ready(Ok(()));
            }
            let Some(current) = this.current else {
                return Poll::Ready(Ok(()));
            };
            match ready!(this.pipe.poll_found(cx))? {
                None => this.current = None,
                Some(Found::Frame {
                    kind: Kind::Data,
                    session,
                    data,
                }) if session == current => this.pipe.keep(data),
                Some(Found::Frame {
                    kind: Kind::Bye,
                    session,
                    ..
                }) if session == current => this.current = None,
                Some(Found::Frame {
                    kind: Kind::Hello,
                    session,
                    ..
                }) => {
                    if this.greet_again(session) {
                        // The host waits for this READY; when the port is full, the next flush sends it.
                        let _ = this.pipe.poll_drain(cx)?;
                    } else {
                        return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                    }
                }
                Some(Found::Frame { .. }) => {}
                Some(Found::Damaged) => {
                    this.current = None;
                    this.pipe.queue(Kind::Bye, current, &[]);
                    return Poll::Ready(Err(damaged()));
                }
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for GuestLink<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match this.current {
            Some(session) => this
                .pipe
                .poll_send(cx, session, pieces.iter().map(|piece| &**piece)),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().pipe.poll_flush(cx)
    }

    /// Ends the conversation; the port stays open for the next.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(session) = this.current.take() {
            this.pipe.forget();
            this.pipe.queue(Kind::Bye, session, &[]);
        }
        this.pipe.poll_flush(cx)
    }
}
