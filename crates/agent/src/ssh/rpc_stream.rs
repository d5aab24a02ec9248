//! A connection that comes over the agent's channel, as the stream of bytes that it is.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures::Stream;
use offshoot_agent_proto::limits::MAX_CHUNK;
use offshoot_agent_proto::v1;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;
use tonic::{Status, Streaming};

/// Both directions of one `Ssh` call.
pub(crate) struct RpcStream {
    from_host: Streaming<v1::SshRequest>,
    to_host: PollSender<Result<v1::SshBytes, Status>>,
    /// What was received and not read yet.
    rest: Bytes,
}

impl RpcStream {
    /// A stream that goes on where the messages are.
    pub(crate) fn new(
        from_host: Streaming<v1::SshRequest>,
        to_host: mpsc::Sender<Result<v1::SshBytes, Status>>,
    ) -> Self {
        Self {
            from_host,
            to_host: PollSender::new(to_host),
            rest: Bytes::new(),
        }
    }
}

impl AsyncRead for RpcStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.from_host).poll_next(cx)) {
                Some(Ok(v1::SshRequest {
                    what: Some(v1::ssh_request::What::Data(data)),
                })) => self.rest = data,
                Some(Ok(_)) => return Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
                Some(Err(_)) => return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = out.remaining().min(self.rest.len());
        out.put_slice(&self.rest[..count]);
        self.rest.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for RpcStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.to_host.poll_reserve(cx)).map_err(gone)?;
        let count = data.len().min(MAX_CHUNK);
        let data = Bytes::copy_from_slice(&data[..count]);
        self.to_host.send_item(Ok(v1::SshBytes { data })).map_err(gone)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.to_host.close();
        Poll::Ready(Ok(()))
    }
}
