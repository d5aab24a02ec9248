//! One connection from its first byte to its last.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use russh::Disconnect;
use russh::keys::PublicKey;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::Server;
use super::handler::Handler;

/// How long a client may take to log in; a person may have to type the passphrase of a key, or touch it.
const LOGIN_TIME: Duration = Duration::from_secs(60);

/// How long a client may take to hear that the VM ends.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Who is at the other end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Peer {
    /// Somebody on the network.
    Network {
        /// Their address.
        client: SocketAddr,
        /// The guest's.
        server: SocketAddr,
    },
    /// Somebody on the host, over the agent's channel.
    Host,
}

impl Peer {
    /// `SSH_CLIENT` and `SSH_CONNECTION` (ssh(1)), in sshd's words for what is no socket.
    pub(super) fn variables(self) -> [(&'static str, String); 2] {
        let (client, connection) = match self {
            Self::Network { client, server } => {
                let (from, to) = (client.ip().to_canonical(), server.ip().to_canonical());
                (
                    format!("{from} {} {}", client.port(), server.port()),
                    format!("{from} {} {to} {}", client.port(), server.port()),
                )
            }
            Self::Host => (
                "UNKNOWN 65535 65535".to_owned(),
                "UNKNOWN 65535 UNKNOWN 65535".to_owned(),
            ),
        };
        [("SSH_CLIENT", client), ("SSH_CONNECTION", connection)]
    }
}

/// Serves a connection until it ends. `more_keys` let in beside the server's; `unknown` is given back as soon as the
/// client has logged in.
pub(crate) async fn serve<S>(
    server: Arc<Server>,
    stream: S,
    peer: Peer,
    more_keys: Vec<PublicKey>,
    unknown: Option<OwnedSemaphorePermit>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let cut = CancellationToken::new();
    let logged_in = CancellationToken::new();
    let handler = Handler::new(Arc::clone(&server), peer, more_keys, logged_in.clone());
    let config = Arc::clone(&server.plan.config);
    let deadline = Instant::now() + LOGIN_TIME;
    let started = russh::server::run_stream(config, Cuttable::new(stream, cut.clone()), handler);
    let running = tokio::select! {
        started = timeout_at(deadline, started) => started,
        () = server.closing.cancelled() => return,
    };
    // Whoever speaks no SSH, or nothing at all, is not worth a line in the log.
    let Ok(Ok(running)) = running else { return };
    let handle = running.handle();
    let mut running = pin!(running);
    tokio::select! {
        _ = &mut running => return,
        () = logged_in.cancelled() => {}
        () = tokio::time::sleep_until(deadline) => cut.cancel(),
        () = server.closing.cancelled() => cut.cancel(),
    }
    drop(unknown);
    tokio::select! {
        _ = &mut running => return,
        () = server.closing.cancelled() => {}
    }
    let good_bye = async {
        // Its processes have ended; their last words are on the way already.
        let text = "the VM ends".to_owned();
        let _ = handle
            .disconnect(Disconnect::ByApplication, text, String::new())
            .await;
        let _ = (&mut running).await;
    };
    if timeout(LAST_WORDS, good_bye).await.is_err() {
        cut.cancel();
        let _ = running.await;
    }
}

/// A stream that can be ended from outside: the library runs a connection by itself.
struct Cuttable<S> {
    stream: S,
    cut: CancellationToken,
    was_cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> Cuttable<S> {
    fn new(stream: S, cut: CancellationToken) -> Self {
        Self {
            stream,
            was_cut: Box::pin(cut.clone().cancelled_owned()),
            cut,
        }
    }

    fn is_cut(&mut self, cx: &mut Context<'_>) -> bool {
        self.cut.is_cancelled() || self.was_cut.as_mut().poll(cx).is_ready()
    }
}

fn gone<T>() -> Poll<io::Result<T>> {
    Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()))
}

impl<S: AsyncRead + Unpin> AsyncRead for Cuttable<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Reading always goes on, so it is what waits for the cut.
        if self.is_cut(cx) {
            return gone();
        }
        Pin::new(&mut self.stream).poll_read(cx, out)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Cuttable<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_cut(cx) {
            return gone();
        }
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_cut(cx) {
            return gone();
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_cut(cx) {
            return gone();
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn clients_are_told_as_sshd_tells_them() {
        let peer = Peer::Network {
            client: "[::ffff:10.0.0.1]:4321".parse().unwrap(),
            server: "[::ffff:10.0.0.2]:22".parse().unwrap(),
        };
        let [(_, client), (_, connection)] = peer.variables();
        assert_eq!(client, "10.0.0.1 4321 22");
        assert_eq!(connection, "10.0.0.1 4321 10.0.0.2 22");
    }
}
