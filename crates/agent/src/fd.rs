//! A descriptor that tokio waits for: ports, pipes and terminals, which tokio has no one type for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Registers a descriptor with the runtime, in which this must be called.
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays the same and open for as long as the registration owns it.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// A descriptor that can be read and written without blocking. At most one task reads and one writes.
pub(crate) struct Fd {
    inner: AsyncFd<OwnedFd>,
}

impl Fd {
    /// Takes a descriptor over and makes it non-blocking. Must be called in the runtime.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd, true)?;
        Ok(Self { inner: register(fd)? })
    }

    /// The descriptor, still non-blocking.
    pub(crate) fn into_inner(self) -> OwnedFd {
        self.inner.into_inner()
    }

    /// Reads what is there; 0 is the end. A terminal whose last user is gone has ended.
    pub(crate) fn poll_read_into(&self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.inner.poll_read_ready(cx))?;
            let closed = guard.ready().is_read_closed();
            let read = guard.try_io(|fd| {
                // SAFETY: nothing is written into the buffer but by the kernel, which initialises what it says it did.
                let room = unsafe { out.unfilled_mut() };
                Ok(rustix::io::read(fd.get_ref(), room)?.0.len())
            });
            match read {
                Ok(Ok(count)) => {
                    // SAFETY: the kernel just filled so many bytes.
                    unsafe { out.assume_init(count) };
                    out.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                // tokio never forgets that a descriptor was closed, and would wait no more. What can be opened again
                // by the other side needs a new registration.
                Err(_would_block) if closed => return Poll::Ready(Ok(())),
                Err(_would_block) => {}
            }
        }
    }

    /// Writes what fits.
    pub(crate) fn poll_write_from(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.inner.poll_write_ready(cx))?;
            let closed = guard.ready().is_write_closed();
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) if closed => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                Err(_would_block) => {}
            }
        }
    }

    /// Appends what is there to `buffer`, at most its spare capacity and `most` bytes; 0 is the end.
    pub(crate) async fn read(&self, buffer: &mut BytesMut, most: usize) -> io::Result<usize> {
        std::future::poll_fn(|cx| {
            let room = buffer.spare_capacity_mut();
            let most = most.min(room.len());
            let mut room = ReadBuf::uninit(&mut room[..most]);
            ready!(self.poll_read_into(cx, &mut room))?;
            let count = room.filled().len();
            // SAFETY: so many bytes of the spare capacity were filled.
            unsafe { buffer.set_len(buffer.len() + count) };
            Poll::Ready(Ok(count))
        })
        .await
    }

    /// Writes what fits.
    pub(crate) async fn write(&self, data: &[u8]) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_write_from(cx, data)).await
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// Makes a descriptor block or not.
pub(crate) fn set_nonblocking(fd: impl AsFd, nonblocking: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(&fd)?;
    flags.set(OFlags::NONBLOCK, nonblocking);
    Ok(fcntl_setfl(fd, flags)?)
}

impl AsyncRead for Fd {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_read_into(cx, out)
    }
}

impl AsyncWrite for Fd {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_from(cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pipe_carries_bytes_and_ends() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (read, write) = (Fd::new(read).unwrap(), Fd::new(write).unwrap());
        assert_eq!(write.write(b"abc").await.unwrap(), 3);
        let mut buffer = BytesMut::with_capacity(2);
        assert_eq!(read.read(&mut buffer, 100).await.unwrap(), 2);
        drop(write);
        buffer.reserve(10);
        assert_eq!(read.read(&mut buffer, 100).await.unwrap(), 1);
        assert_eq!(&buffer[..], b"abc");
        buffer.reserve(10);
        assert_eq!(read.read(&mut buffer, 100).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn writing_to_nobody_is_an_error_and_not_a_loop() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let write = Fd::new(write).unwrap();
        drop(read);
        assert_eq!(
            write.write(b"abc").await.unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }
}
