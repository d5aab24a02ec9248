//! The agent's virtio-serial port: a stream whose other end comes and goes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::fd::{Fd, set_nonblocking};

/// An open port. The end of what can be read is that no host is there now.
///
/// tokio never forgets that a descriptor was closed. A host that leaves and another that comes, while the guest is too busy to
/// look or is restored somewhere else, would be one that leaves in the middle of the second one's conversation: what tokio
/// remembers is held against what is.
pub(crate) struct Port {
    /// Always there, but for the moment of a new registration.
    fd: Option<Fd>,
}

impl Port {
    /// Takes a port over. Must be called in the runtime.
    pub(crate) fn new(port: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            fd: Some(Fd::new(port)?),
        })
    }

    fn fd(&self) -> io::Result<&Fd> {
        self.fd.as_ref().ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    /// Whether another host has come since tokio saw one leave; it is then registered anew.
    fn came_back(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        if !host_is_there(self.fd()?)? {
            return Ok(false);
        }
        self.fd = match self.fd.take() {
            Some(fd) => Some(Fd::new(fd.into_inner())?),
            None => None,
        };
        // Whoever waited for the other direction waited for the old registration.
        cx.waker().wake_by_ref();
        Ok(true)
    }

    /// Waits until a host has opened its end.
    ///
    /// While none has, poll(2) answers "hang up" at once, always, and reading gives the end of the file. Writing is what
    /// waits for the host: a delimiter, which means nothing to either side.
    ///
    /// # Errors
    /// What the port says.
    pub(crate) async fn wait_for_host(&mut self) -> io::Result<()> {
        if host_is_there(self.fd()?)? {
            return Ok(());
        }
        let Some(fd) = self.fd.take() else { return Ok(()) };
        let port = fd.into_inner();
        let waited = tokio::task::spawn_blocking(move || {
            set_nonblocking(&port, false)?;
            rustix::io::retry_on_intr(|| rustix::io::write(&port, &[0]))?;
            Ok(port)
        });
        // The task is never aborted and cannot panic.
        let port = waited
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))?;
        self.fd = Some(Fd::new(port)?);
        Ok(())
    }
}

/// Whether a host has opened its end now.
fn host_is_there(port: impl AsFd) -> io::Result<bool> {
    let mut state = [PollFd::new(&port, PollFlags::IN | PollFlags::OUT)];
    poll(&mut state, Some(&Timespec::default()))?;
    Ok(!state[0].revents().contains(PollFlags::HUP))
}

impl AsyncRead for Port {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        loop {
            ready!(self.fd()?.poll_read_into(cx, out))?;
            if out.filled().len() > before || out.remaining() == 0 || !self.came_back(cx)? {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match ready!(self.fd()?.poll_write_from(cx, data)) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe && self.came_back(cx)? => {}
                result => return Poll::Ready(result),
            }
        }
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
    use std::time::Duration;

    use rustix::fs::{Mode, OFlags, mkfifoat, open};
    use tokio::io::AsyncReadExt;

    use super::*;

    /// A FIFO's hang-up ends like a port's: when somebody opens the other end again.
    #[tokio::test]
    async fn a_host_that_left_before_does_not_end_the_next_ones_conversation() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("port");
        mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        let end = |flags| open(&path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let mut port = Port::new(end(OFlags::RDONLY | OFlags::NONBLOCK)).unwrap();

        let first = end(OFlags::WRONLY);
        rustix::io::write(&first, b"1").unwrap();
        assert_eq!(port.read_u8().await.unwrap(), b'1');
        drop(first);
        // The runtime sees it leave; nobody reads.
        tokio::time::sleep(Duration::from_millis(10)).await;
        let second = end(OFlags::WRONLY);
        let read = tokio::spawn(async move {
            let byte = port.read_u8().await;
            (byte.unwrap(), port)
        });
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(!read.is_finished(), "the second one has not left");
        rustix::io::write(&second, b"2").unwrap();
        let (byte, mut port) = read.await.unwrap();
        assert_eq!(byte, b'2');
        drop(second);
        let ended = port.read_u8().await.unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
    }
}
