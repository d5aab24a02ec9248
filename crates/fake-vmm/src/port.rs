//! The agent's virtio-serial port: one host at a time, and silence while the machine's processor stands.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use offshoot_agent_proto::link::GuestLink;
use offshoot_agent_proto::serve::{serve as serve_calls, service};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};

use crate::guest::Guest;
use crate::machine::Machine;
use crate::service::Service;

/// Answers every host that comes, for as long as the socket lives.
pub(crate) async fn serve(socket: UnixListener, machine: Arc<Machine>, guest: Arc<Guest>) {
    let service = service(Arc::new(Service::new(guest)));
    while let Ok((stream, _)) = socket.accept().await {
        let mut link = GuestLink::new(Port::new(stream, Arc::clone(&machine)));
        // Until this host closes the port. How a conversation ended is the host's business.
        while link.accept().await.is_ok() {
            let _ = serve_calls(&mut link, service.clone()).await;
        }
    }
}

/// The guest's end of the port.
pub(crate) struct Port {
    stream: UnixStream,
    machine: Arc<Machine>,
}

impl Port {
    pub(crate) fn new(stream: UnixStream, machine: Arc<Machine>) -> Self {
        Self { stream, machine }
    }
}

impl AsyncRead for Port {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.machine.poll_running(cx));
        Pin::new(&mut self.stream).poll_read(cx, out)
    }
}

impl AsyncWrite for Port {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.machine.poll_running(cx));
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
