//! The same text over TCP, for a Prometheus on this machine: it cannot scrape a Unix socket.
//!
//! Any user of this machine can connect, so a connection is cheap and short: a few at once, one request each, a time
//! limit. Nothing is served but the numbers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tower::ServiceExt as _;

/// Connections at once: a Prometheus or two, and somebody who looks by hand. More wait in the kernel's queue.
const AT_ONCE: usize = 8;
/// How long a connection may last: longer than a count of everything takes, and than Prometheus waits by default.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long to wait when the kernel gives no connection: it lacks memory or descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The largest head of a request.
const MAX_HEAD: usize = 16 << 10;

/// An address that only this machine can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "SocketAddr")]
pub struct LoopbackAddress(SocketAddr);

impl TryFrom<SocketAddr> for LoopbackAddress {
    type Error = String;

    fn try_from(address: SocketAddr) -> Result<Self, String> {
        if address.ip().is_loopback() {
            Ok(Self(address))
        } else {
            Err(format!(
                "{address} can be reached from elsewhere, and there is no password; write `127.0.0.1:{}`, and let a \
                 proxy with a password pass it on if need be",
                address.port()
            ))
        }
    }
}

/// Serves `router` at `address` from now on.
pub async fn listen(address: LoopbackAddress, router: Router) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address.0)
        .await
        .with_context(|| format!("cannot listen at {} (metrics_listen)", address.0))?;
    tracing::info!(address = %listener.local_addr().unwrap_or(address.0), "metrics");
    tokio::spawn(serve(listener, router, PATIENCE));
    Ok(())
}

async fn serve(listener: TcpListener, router: Router, patience: Duration) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    // It is never closed.
    while let Ok(permit) = Arc::clone(&room).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    if tokio::time::timeout(patience, answer(stream, router))
                        .await
                        .is_err()
                    {
                        tracing::debug!("a connection for metrics took too long");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn answer(stream: TcpStream, router: Router) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let request: Request = request.map(Body::new);
        router.clone().oneshot(request)
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection for metrics ended early");
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn only_this_machine_may_look() {
        for (text, fits) in [
            ("127.0.0.1:9464", true),
            ("127.9.9.9:1", true),
            ("[::1]:9464", true),
            ("0.0.0.0:9464", false),
            ("[::]:9464", false),
            ("192.168.1.1:9464", false),
        ] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(LoopbackAddress::try_from(address).is_ok(), fits, "{text}");
        }
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // One that is cut off has no answer.
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    #[tokio::test]
    async fn who_says_nothing_keeps_nobody_out_for_long() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/metrics", get(|| async { "up 1\n" }));
        tokio::spawn(serve(listener, router, Duration::from_secs(1)));
        let mut silent = Vec::new();
        for _ in 0..AT_ONCE {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        while !ask(address, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .ends_with("\r\n\r\nup 1\n")
        {}
        let other = ask(address, "GET /v1/vms HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(other.starts_with("HTTP/1.1 404"), "{other}");
        // They were cut off, each of them.
        for mut stream in silent {
            assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
        }
    }
}
