//! A daemon for tests: real HTTP and WebSockets over a real socket, and answers that each test chooses.

use std::io::Write;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use offshoot_api::channel;
use serde_json::{Value, json};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Message, Role};

pub(crate) type Body = BoxBody<Bytes, std::io::Error>;
pub(crate) type Answer = Pin<Box<dyn Future<Output = Response<Body>> + Send>>;
pub(crate) type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// How long a request may take to come on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon that answers until it is dropped.
pub(crate) struct Fake {
    dir: tempfile::TempDir,
    requests: Arc<(Mutex<Vec<String>>, Condvar)>,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    /// Answers every request with what `answer` makes of its method and target, such as `GET /v1/vms?all=true`.
    pub(crate) fn start(answer: impl Fn(&str, Request<Incoming>) -> Answer + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let requests: Arc<(Mutex<Vec<String>>, Condvar)> = Arc::default();
        let (seen, answer) = (Arc::clone(&requests), Arc::new(answer));
        let _guard = runtime.enter();
        let listener = tokio::net::UnixListener::bind(dir.path().join("api.sock")).unwrap();
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                let service = service_fn(move |request: Request<Incoming>| {
                    let line = format!("{} {}", request.method(), request.uri());
                    seen.0.lock().unwrap().push(line.clone());
                    seen.1.notify_all();
                    let answer = answer(&line, request);
                    async move { Ok::<_, std::convert::Infallible>(answer.await) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades(),
                );
            }
        });
        Self {
            dir,
            requests,
            _runtime: runtime,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.0.lock().unwrap().clone()
    }

    /// `offshoot` with these words, talking to this daemon.
    pub(crate) fn offshoot(&self, words: &[&str]) -> Command {
        let mut command = offshoot(words);
        command
            .env("OFFSHOOT_SOCKET", self.path("api.sock"))
            .env("HOME", self.path("home"))
            .env("DOCKER_CONFIG", self.path("docker"));
        command.current_dir(self.dir.path());
        command
    }

    pub(crate) fn run(&self, words: &[&str]) -> Output {
        self.offshoot(words).stdin(Stdio::null()).output().unwrap()
    }

    pub(crate) fn run_with_input(&self, words: &[&str], input: &[u8]) -> Output {
        let mut command = self.offshoot(words);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        output
    }

    /// Waits until a request like this came.
    pub(crate) fn wait_for(&self, beginning: &str) {
        let (seen, came) = &*self.requests;
        let missing = |seen: &mut Vec<String>| !seen.iter().any(|request| request.starts_with(beginning));
        let (seen, _) = came
            .wait_timeout_while(seen.lock().unwrap(), PATIENCE, missing)
            .unwrap();
        assert!(
            seen.iter().any(|request| request.starts_with(beginning)),
            "no request `{beginning}` in {seen:?}"
        );
    }
}

pub(crate) fn offshoot(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_offshoot"));
    // What is made on first use is not made for whoever runs the tests.
    command
        .args(words)
        .env_remove("HOME")
        .env_remove("XDG_CONFIG_HOME");
    command
}

pub(crate) fn signal(child: &Child, name: &str) {
    assert!(
        Command::new("kill")
            .args(["-s", name, &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
}

pub(crate) fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

pub(crate) fn now(answer: Response<Body>) -> Answer {
    Box::pin(std::future::ready(answer))
}

pub(crate) fn answer(status: u16, body: &Value) -> Answer {
    now(response(status, body.to_string()))
}

pub(crate) fn response(status: u16, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::from(body.into()).map_err(|never| match never {}).boxed());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

pub(crate) fn not_found(message: &str) -> Answer {
    answer(
        404,
        &json!({"kind": "not-found", "message": message, "causes": [], "hints": ["run `offshoot ps -a`"]}),
    )
}

/// Lines of long work.
pub(crate) fn lines(lines: &[Value]) -> Answer {
    let frames: Vec<_> = lines
        .iter()
        .map(|line| Ok(Frame::data(Bytes::from(format!("{line}\n")))))
        .collect();
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(futures::stream::iter(frames))));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/x-ndjson"),
    );
    now(response)
}

pub(crate) fn vm(state: &str) -> Value {
    json!({"id": "abababababab", "name": "web", "image": "img", "command": "sh", "state": state, "created_ms": 0,
        "started_ms": null, "finished_ms": null, "exit": null})
}

pub(crate) fn image(reference: &str) -> Value {
    json!({"reference": reference, "digest": format!("sha256:{}", "0a".repeat(32)), "created_ms": 0, "size": 1,
        "prepared": true, "problem": null, "seeds": null})
}

/// Accepts a WebSocket and lets `talk` have it.
pub(crate) fn session<F>(
    request: Request<Incoming>,
    talk: impl FnOnce(Socket) -> F + Send + 'static,
) -> Answer
where
    F: Future<Output = ()> + Send,
{
    assert_eq!(request.headers()["sec-websocket-protocol"], channel::SUBPROTOCOL);
    let mut response = upgraded(request, talk);
    response.headers_mut().insert(
        "sec-websocket-protocol",
        HeaderValue::from_static(channel::SUBPROTOCOL),
    );
    now(response)
}

/// The same for one that carries nothing but bytes.
pub(crate) fn tunnel<F>(request: Request<Incoming>, talk: impl FnOnce(Socket) -> F + Send + 'static) -> Answer
where
    F: Future<Output = ()> + Send,
{
    assert!(!request.headers().contains_key("sec-websocket-protocol"));
    now(upgraded(request, talk))
}

fn upgraded<F>(request: Request<Incoming>, talk: impl FnOnce(Socket) -> F + Send + 'static) -> Response<Body>
where
    F: Future<Output = ()> + Send,
{
    let key = request.headers()["sec-websocket-key"].clone();
    tokio::spawn(async move {
        let upgraded = hyper::upgrade::on(request).await.unwrap();
        talk(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await).await;
    });
    let mut response = response(101, "");
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(
        "sec-websocket-accept",
        derive_accept_key(key.as_bytes()).parse().unwrap(),
    );
    response
}

pub(crate) async fn say(socket: &mut Socket, channel: u8, data: &[u8]) {
    let message = [&[channel], data].concat();
    socket.send(Message::Binary(message.into())).await.unwrap();
}

pub(crate) async fn exited(socket: &mut Socket, code: i32) {
    say(
        socket,
        channel::STATUS,
        json!({"status": "exited", "code": code}).to_string().as_bytes(),
    )
    .await;
}

/// The next message of the client: its channel and data.
pub(crate) async fn hear(socket: &mut Socket) -> Option<(u8, Vec<u8>)> {
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Binary(bytes) => return Some((bytes[0], bytes[1..].to_vec())),
            Message::Text(text) => return Some((u8::MAX - 1, text.as_bytes().to_vec())),
            Message::Close(_) => return None,
            _ => {}
        }
    }
    None
}
