//! The fakes' HTTP APIs over Unix sockets: requests in, answers out, and faults at any of them.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};

use crate::Behaviour;

/// What the real ones take (Firecracker's `--http-api-max-payload-size`).
const MAX_BODY: usize = 51_200;

/// What is answered: a status, and JSON where there is something to say.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Value,
}

impl Answer {
    /// Done, and nothing to say.
    pub(crate) fn done() -> Self {
        Self {
            status: StatusCode::NO_CONTENT,
            body: Value::Null,
        }
    }

    /// What was asked for.
    pub(crate) fn of(body: Value) -> Self {
        Self {
            status: StatusCode::OK,
            body,
        }
    }

    fn response(self) -> Response<Full<Bytes>> {
        let text = if self.body.is_null() {
            String::new()
        } else {
            self.body.to_string()
        };
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = self.status;
        response
    }
}

/// One of the two APIs.
pub(crate) trait Api: Send + Sync + 'static {
    /// Carries out a request; `path` is without what every path begins with.
    fn answer(&self, method: &Method, path: &str, body: Option<Value>) -> Answer;

    /// Says no, as this VMM says it.
    fn refuse(&self, words: String) -> Answer;

    /// What every path begins with.
    fn prefix(&self) -> &'static str;
}

/// Answers whoever comes, for as long as the socket lives.
pub(crate) async fn serve(
    socket: UnixListener,
    api: Arc<impl Api>,
    behaviour: Arc<Behaviour>,
) -> io::Result<()> {
    loop {
        let (stream, _) = socket.accept().await?;
        // A client that leaves in the middle is its own business.
        tokio::spawn(talk(stream, Arc::clone(&api), Arc::clone(&behaviour)));
    }
}

async fn talk(mut stream: UnixStream, api: Arc<impl Api>, behaviour: Arc<Behaviour>) {
    if behaviour.garbage {
        let _ = stream.write_all(b"\x01\x02 220 this is no HTTP\r\n\r\n").await;
        return;
    }
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        respond(request, Arc::clone(&api), Arc::clone(&behaviour))
    });
    let served = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let _ = served.await;
}

async fn respond(
    request: Request<Incoming>,
    api: Arc<impl Api>,
    behaviour: Arc<Behaviour>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let Some(path) = path.strip_prefix(api.prefix()).map(str::to_owned) else {
        return Ok(api.refuse("there is no such path".into()).response());
    };
    let is = |list: &[String]| list.contains(&path);
    if behaviour.hang || is(&behaviour.silent) {
        return std::future::pending().await;
    }
    if is(&behaviour.die) {
        // As after a crash.
        std::process::abort();
    }
    let body = match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return Ok(api.refuse(error.to_string()).response()),
    };
    let body = match body.is_empty() {
        true => None,
        false => match serde_json::from_slice(&body) {
            Ok(body) => Some(body),
            Err(error) => return Ok(api.refuse(error.to_string()).response()),
        },
    };
    if is(&behaviour.refuse) {
        return Ok(api.refuse(format!("this fake refuses {path}")).response());
    }
    Ok(api.answer(&method, &path, body).response())
}
