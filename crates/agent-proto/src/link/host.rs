//! The host's end: it starts the conversation.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use offshoot_model::{ErrorKind, Explain};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::LINK_VERSION;
use super::frame::{Found, Kind};
use super::pipe::Pipe;

/// How long the first HELLO waits for its answer before it is said again. It is not lost while the guest boots: the
/// VMM keeps it until the guest opens its port. Repeating is for bytes that were damaged on the way.
const HELLO_REPEAT: Duration = Duration::from_millis(500);

/// The wait doubles up to this, so that a guest that never answers does not fill the queue.
const HELLO_REPEAT_MAX: Duration = Duration::from_secs(8);

/// Why no conversation with a guest could be started.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The VMM closed the stream, usually because the VM is gone.
    #[error("cannot reach the agent: the VM closed its port")]
    Closed,
    /// The stream failed.
    #[error("cannot reach the agent over the VM's port")]
    Io {
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The guest's agent is of another time.
    #[error(
        "cannot talk with the agent: it speaks version {theirs} of the link, this program version {ours}"
    )]
    Version {
        /// The guest's.
        theirs: u8,
        /// Ours.
        ours: u8,
    },
}

impl Explain for LinkError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Closed => ErrorKind::WrongState,
            Self::Io { .. } => ErrorKind::Internal,
            Self::Version { .. } => ErrorKind::NotPossible,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Closed | Self::Io { .. } => {
                vec!["see the guest's console and the VMM's log in `offshoot inspect`".to_owned()]
            }
            Self::Version { .. } => {
                vec![
                    "make a kernel bundle with this version's agent: `offshoot kernel add --distro`"
                        .to_owned(),
                ]
            }
        }
    }
}

/// The host's end of a conversation, a plain stream.
pub struct HostLink<S> {
    pipe: Pipe<S>,
    session: u64,
    over: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> HostLink<S> {
    /// Starts a new conversation on `io` and waits for the guest's answer, however long it takes to boot. Dropping
    /// the future is safe: the next HELLO starts over.
    ///
    /// # Errors
    /// When the stream ends or fails, or the guest speaks another version.
    pub async fn connect(io: S) -> Result<Self, LinkError> {
        let session = RandomState::new().hash_one((std::process::id(), SystemTime::now()));
        let mut link = Self {
            pipe: Pipe::new(io),
            session,
            over: false,
        };
        let mut wait = HELLO_REPEAT;
        loop {
            link.pipe.queue(Kind::Hello, session, &[LINK_VERSION]);
            match tokio::time::timeout(wait, link.greet()).await {
                Ok(result) => return result.map(|()| link),
                Err(_) => wait = (wait * 2).min(HELLO_REPEAT_MAX),
            }
        }
    }

    /// The stream itself, in the middle of whatever was being said.
    pub fn into_inner(self) -> S {
        self.pipe.into_io()
    }

    /// Sends what is queued and reads up to READY. Nothing is lost when it is dropped half-way.
    async fn greet(&mut self) -> Result<(), LinkError> {
        let broken = |source| LinkError::Io { source };
        std::future::poll_fn(|cx| self.pipe.poll_flush(cx))
            .await
            .map_err(broken)?;
        loop {
            match std::future::poll_fn(|cx| self.pipe.poll_found(cx))
                .await
                .map_err(broken)?
            {
                None => return Err(LinkError::Closed),
                Some(Found::Frame {
                    kind: Kind::Ready,
                    session,
                    data,
                }) if session == self.session => {
                    return match self.pipe.bytes(data).first() {
                        Some(&LINK_VERSION) => Ok(()),
                        theirs => Err(LinkError::Version {
                            theirs: theirs.copied().unwrap_or_default(),
                            ours: LINK_VERSION,
                        }),
                    };
                }
                // The old conversation, or the rest of one of its frames.
                Some(Found::Frame { .. } | Found::Damaged) => {}
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for HostLink<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if out.remaining() == 0 || this.pipe.take_unread(out) || this.over {
                return Poll::Ready(Ok(()));
            }
            match ready!(this.pipe.poll_found(cx))? {
                None => this.over = true,
                Some(Found::Frame {
                    kind: Kind::Data,
                    session,
                    data,
                }) if session == this.session => {
                    this.pipe.keep(data);
                }
                Some(Found::Frame {
                    kind: Kind::Bye,
                    session,
                    ..
                }) if session == this.session => this.over = true,
                // A second READY for a repeated HELLO, or something older.
                Some(Found::Frame { .. }) => {}
                Some(Found::Damaged) => {
                    this.over = true;
                    return Poll::Ready(Err(damaged()));
                }
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for HostLink<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let session = this.session;
        this.pipe
            .poll_send(cx, session, pieces.iter().map(|piece| &**piece))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().pipe.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.over {
            this.over = true;
            let session = this.session;
            this.pipe.forget();
            this.pipe.queue(Kind::Bye, session, &[]);
        }
        ready!(this.pipe.poll_flush(cx))?;
        Pin::new(this.pipe.io()).poll_shutdown(cx)
    }
}

/// A frame of a conversation did not arrive whole.
pub(super) fn damaged() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "a frame on the agent's port is damaged",
    )
}
