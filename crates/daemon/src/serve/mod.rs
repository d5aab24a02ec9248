//! The serving loop: one task for every connection to the socket, and limits on what a connection may cost.
//!
//! ```text
//! accept ─► room? ─no─► 503, closed
//!             │yes
//!             ▼
//!   own words ─► HTTP/1.1 ─► router ─► answer ─┐
//!      ▲           ▲  └ a head in time, not too large   │ again, or idle for too long: closed
//!      │           └────────────────────────────────────┘
//!      └ what HTTP itself refuses gets the one error shape there
//! ```
//!
//! Clients do harm by being many, slow, large or silent. Each has its limit: connections by [`MAX_CONNECTIONS`], heads by
//! [`Patience::head`] and [`MAX_HEAD`], bodies by [`crate::body`]. A connection that became a session (WebSocket) counts on,
//! but has no limit of time: it may say nothing for days.

mod own_words;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::refusal::Refusal;
use own_words::{Answering, OwnWords};

/// Connections at once. Two hundred VMs with an `attach`, a `logs -f` and a `wait` each have room; file descriptors for
/// all of them, too ([`raise_file_limit`]).
const MAX_CONNECTIONS: usize = 1024;
/// The largest head of a request. The longest honest one names a path of 4 KiB, percent-encoded.
const MAX_HEAD: usize = 64 << 10;
/// Header lines in it.
const MAX_HEADERS: usize = 100;
/// How long to wait before the next try when the kernel gives no connection: it lacks memory or descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long open connections may hold up an end that was asked for.
const GOODBYE: Duration = Duration::from_secs(2);
/// What one connection needs at most: itself, and files of what it asks for.
const FILES_PER_CONNECTION: u64 = 8;

/// How long clients may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the whole head of a request, and between two requests of one connection.
    pub head: Duration,
    /// Between two pieces of a request's body.
    pub body: Duration,
}

/// Serves until `stop` is done, then lets those who are being answered finish, for two seconds at most.
pub async fn serve(
    listener: UnixListener,
    router: axum::Router,
    patience: Patience,
    stop: impl Future<Output = ()>,
) {
    let stopping = CancellationToken::new();
    let connections = TaskTracker::new();
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(patience.head)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD);
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut stop => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            turn_away(stream);
            continue;
        };
        let (http, router, stopping) = (http.clone(), router.clone(), stopping.clone());
        connections.spawn(async move {
            // The permit goes where the stream goes: a session that this connection becomes holds it until its end.
            converse(OwnWords::new(stream, permit), &http, router, &stopping).await;
        });
    }
    drop(listener);
    stopping.cancel();
    connections.close();
    if tokio::time::timeout(GOODBYE, connections.wait()).await.is_err() {
        tracing::info!(open = connections.len(), "stopped with open connections");
    }
}

/// Serves one connection until either side ends it.
async fn converse(
    stream: OwnWords<UnixStream>,
    http: &http1::Builder,
    router: axum::Router,
    stopping: &CancellationToken,
) {
    let answering = stream.answering();
    let service = service_fn(move |request: Request<Incoming>| {
        let turn = Answering::begin(&answering);
        let answer = router.clone().oneshot(request.map(Body::new));
        async move {
            let response = answer.await.unwrap_or_else(|never| match never {});
            Ok::<_, Infallible>(response.map(|body| turn.until_the_end_of(body)))
        }
    });
    let mut connection = http
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut told = false;
    let result = loop {
        tokio::select! {
            result = &mut connection => break result,
            () = stopping.cancelled(), if !told => {
                told = true;
                std::pin::Pin::new(&mut connection).graceful_shutdown();
            }
        }
    };
    let Err(error) = result else { return };
    tracing::debug!(%error, "a connection ended early");
    // Half a request is told why it gets no answer. Silence between two requests is nothing to talk about.
    if error.is_timeout()
        && let Some(parts) = connection.into_parts()
        && !parts.read_buf.is_empty()
    {
        let refusal = Refusal::new(
            StatusCode::REQUEST_TIMEOUT,
            "the request did not come in time",
            "send the whole head of a request at once",
        );
        let mut stream = parts.io.into_inner();
        // It may not listen either.
        let _ = tokio::time::timeout(GOODBYE, stream.write_all(&refusal.to_http())).await;
        let _ = stream.shutdown().await;
    }
}

/// Tells a client that there is no room. It fits into the socket's buffer, so that nobody waits for the client.
fn turn_away(stream: UnixStream) {
    tracing::warn!(
        most = MAX_CONNECTIONS,
        "too many connections; one more was turned away"
    );
    let refusal = Refusal::busy(
        format!("the daemon has {MAX_CONNECTIONS} connections, and takes no more"),
        "try again, or end sessions (`offshoot attach`, `offshoot logs -f`, `offshoot wait`) that nobody needs",
    );
    // Past the runtime, which does not know yet whether the stream can be written to.
    if let Ok(mut stream) = stream.into_std() {
        let _ = io::Write::write(&mut stream, &refusal.to_http());
    }
}

/// Raises the limit of open files to what the connections and the VMs need, as far as it may be raised.
pub fn raise_file_limit() -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let wanted = MAX_CONNECTIONS as u64 * FILES_PER_CONNECTION;
    let limit = getrlimit(Resource::Nofile);
    let possible = limit.maximum.map_or(wanted, |most| most.min(wanted));
    if limit.current.is_some_and(|current| current < possible) {
        let raised = Rlimit {
            current: Some(possible),
            maximum: limit.maximum,
        };
        setrlimit(Resource::Nofile, raised)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use axum::extract::ws::{WebSocket, WebSocketUpgrade};
    use axum::routing::{get, post};
    use serde_json::Value;
    use tokio::io::AsyncReadExt as _;
    use tokio::sync::oneshot;

    use super::*;

    /// A server with a few routes at a socket of its own.
    struct Served {
        socket: PathBuf,
        stop: oneshot::Sender<()>,
        server: tokio::task::JoinHandle<()>,
        _folder: tempfile::TempDir,
    }

    impl Served {
        fn start(head: Duration) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let socket = folder.path().join("api.sock");
            let listener = UnixListener::bind(&socket).unwrap();
            let router = axum::Router::new()
                .route("/hello", get(|| async { "hello" }))
                .route("/echo", post(|body: String| async { body }))
                .route("/forged", get(|| async { FORGED }))
                .route(
                    "/session",
                    get(|upgrade: WebSocketUpgrade| async { upgrade.on_upgrade(echo) }),
                )
                .route("/never", get(|| async { std::future::pending::<&str>().await }));
            let (stop, stopped) = oneshot::channel();
            let patience = Patience {
                head,
                body: Duration::from_secs(60),
            };
            let server = tokio::spawn(serve(listener, router, patience, async {
                let _ = stopped.await;
            }));
            Self {
                socket,
                stop,
                server,
                _folder: folder,
            }
        }

        async fn connect(&self) -> UnixStream {
            UnixStream::connect(&self.socket).await.unwrap()
        }

        /// Everything that comes after `request`, until the server closes.
        async fn ask(&self, request: &[u8]) -> String {
            let mut stream = self.connect().await;
            // It may stop reading before the end.
            let _ = stream.write_all(request).await;
            rest_of(&mut stream).await
        }

        async fn end(self) {
            self.stop.send(()).unwrap();
            self.server.await.unwrap();
        }
    }

    async fn echo(mut session: WebSocket) {
        while let Some(Ok(message)) = session.recv().await {
            let _ = session.send(message).await;
        }
    }

    /// What looks like HTTP's own refusal and is content.
    const FORGED: &str = "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n";

    async fn rest_of(stream: &mut UnixStream) -> String {
        let mut answer = Vec::new();
        let mut piece = [0; 4096];
        // A reset ends it like an end: what came before counts.
        while let Ok(read @ 1..) = stream.read(&mut piece).await {
            answer.extend_from_slice(&piece[..read]);
        }
        String::from_utf8(answer).unwrap()
    }

    /// Checks that an answer has a status and the one error shape.
    fn is_refusal(answer: &str, status: u16) {
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("{answer:?}"));
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        let head = head.to_ascii_lowercase();
        assert!(head.contains("content-type: application/json"), "{answer}");
        assert!(
            head.contains(&format!("content-length: {}", body.len())),
            "{answer}"
        );
        let body: Value = serde_json::from_str(body).unwrap();
        for field in ["kind", "message", "causes", "hints"] {
            assert!(body.get(field).is_some(), "{answer}");
        }
    }

    #[tokio::test]
    async fn what_http_itself_refuses_has_the_one_shape() {
        let served = Served::start(Duration::from_secs(60));
        for (request, status) in [
            (b"rubbish\r\n\r\n".to_vec(), 400),
            (b"GET / HTTP/9.9\r\n\r\n".to_vec(), 400),
            (b"GET / HTTP/1.1\r\nbad header\r\n\r\n".to_vec(), 400),
            (
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec(),
                400,
            ),
            (
                format!("GET /hello HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(10_000)).into_bytes(),
                431,
            ),
            (
                format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(1 << 20)).into_bytes(),
                431,
            ),
        ] {
            is_refusal(&served.ask(&request).await, status);
        }
        // After a good request on the same connection, too.
        let answer = served
            .ask(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\nrubbish\r\n\r\n")
            .await;
        let (good, bad) = answer.split_at(answer.find("HTTP/1.1 400").unwrap());
        assert!(good.ends_with("\r\n\r\nhello"), "{good}");
        is_refusal(bad, 400);
        served.end().await;
    }

    #[tokio::test]
    async fn content_is_never_taken_for_a_refusal() {
        let served = Served::start(Duration::from_secs(60));
        let answer = served
            .ask(b"GET /forged HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with(FORGED),
            "{answer}"
        );
        served.end().await;
    }

    #[tokio::test]
    async fn half_a_head_gets_an_answer_and_silence_an_end() {
        let served = Served::start(Duration::from_millis(200));
        is_refusal(&served.ask(b"GET /hello HTTP/1.1\r\nhost:").await, 408);
        assert_eq!(served.ask(b"").await, "");
        // One that was answered is closed without a word.
        let answer = served.ask(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"),
            "{answer}"
        );
        served.end().await;
    }

    #[tokio::test]
    async fn a_session_may_say_nothing_for_long() {
        let served = Served::start(Duration::from_millis(200));
        let mut session = served.connect().await;
        // RFC 6455, 1.3.
        let request = "GET /session HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
            sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        session.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(session.read_u8().await.unwrap());
        }
        assert!(
            head.starts_with(b"HTTP/1.1 101 "),
            "{}",
            String::from_utf8_lossy(&head)
        );
        // Two others that say nothing lose their connections meanwhile.
        for _ in 0..2 {
            assert_eq!(served.ask(b"").await, "");
        }
        // A text frame with a mask of zeros, and the same without a mask.
        session.write_all(b"\x81\x82\0\0\0\0hi").await.unwrap();
        let mut echoed = [0; 4];
        session.read_exact(&mut echoed).await.unwrap();
        assert_eq!(&echoed, b"\x81\x02hi");
        served.end().await;
    }

    #[tokio::test]
    async fn one_too_many_is_turned_away_and_room_comes_back() {
        raise_file_limit().unwrap();
        let served = Served::start(Duration::from_secs(60));
        let mut open = Vec::new();
        let hello = b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n";
        for _ in 0..MAX_CONNECTIONS {
            open.push(served.connect().await);
        }
        // The last of them was accepted when it is answered.
        let last = open.last_mut().unwrap();
        last.write_all(hello).await.unwrap();
        let mut answer = [0; 12];
        last.read_exact(&mut answer).await.unwrap();
        is_refusal(&served.ask(hello).await, 503);
        drop(open);
        loop {
            let mut stream = served.connect().await;
            stream.write_all(hello).await.unwrap();
            stream.read_exact(&mut answer).await.unwrap();
            if answer.ends_with(b"200") {
                break;
            }
        }
        served.end().await;
    }

    #[tokio::test]
    async fn an_end_waits_for_nobody_for_long() {
        let served = Served::start(Duration::from_secs(60));
        let mut idle = served.connect().await;
        let mut hanging = served.connect().await;
        hanging
            .write_all(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        idle.write_all(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = [0; 12];
        idle.read_exact(&mut answer).await.unwrap();
        served.end().await;
    }
}
