//! One HTTP exchange with a VMM over its Unix socket: typed in, bounded out.
//!
//! A connection per exchange: connecting costs next to nothing, and a VMM that was asked for something long does not keep
//! others waiting. Whoever answers must be the VMM itself, where it made the socket: one that was taken over could have put
//! a link to another's in its place.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::machine::ControlError;
use crate::said::plain_lines;

/// The longest answer, a whole configuration with all devices, has some 20 KiB.
const MAX_ANSWER: usize = 1 << 20;
/// How much of a refusal is repeated.
const MAX_SAID: usize = 400;

/// A VMM's API.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    /// Its socket.
    pub(crate) socket: PathBuf,
    /// What every path begins with.
    pub(crate) prefix: &'static str,
    /// The process that must have made the socket; `None` where we made it.
    pub(crate) maker: Option<u32>,
    /// How long an exchange may take.
    pub(crate) patience: Duration,
}

impl Api {
    /// Asks without a body.
    pub(crate) async fn get(&self, path: &str) -> Result<Value, ControlError> {
        self.exchange(Method::GET, path, None).await
    }

    /// Tells without a body.
    pub(crate) async fn put_nothing(&self, path: &str) -> Result<Value, ControlError> {
        self.exchange(Method::PUT, path, None).await
    }

    /// Tells something.
    pub(crate) async fn put(&self, path: &str, body: &impl Serialize) -> Result<Value, ControlError> {
        self.exchange(Method::PUT, path, Some(encoded(body)?)).await
    }

    /// Changes something.
    pub(crate) async fn patch(&self, path: &str, body: &impl Serialize) -> Result<Value, ControlError> {
        self.exchange(Method::PATCH, path, Some(encoded(body)?)).await
    }

    /// The answer's JSON; `Null` when it is empty.
    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Value, ControlError> {
        let exchanged = tokio::time::timeout(self.patience, self.exchange_at_leisure(method, path, body));
        let (status, said) = exchanged
            .await
            .map_err(|_| ControlError::Timeout { limit: self.patience })??;
        if !status.is_success() {
            return Err(ControlError::Refused {
                said: refusal(status, &said),
            });
        }
        if said.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&said).map_err(|_| ControlError::Malformed {
            said: shortened(&said),
        })
    }

    async fn exchange_at_leisure(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<(StatusCode, Bytes), ControlError> {
        let stream = self.connect().await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        let has_body = body.is_some();
        let mut request = Request::new(Full::<Bytes>::from(body.unwrap_or_default()));
        *request.method_mut() = method;
        let uri = format!("{}{path}", self.prefix);
        *request.uri_mut() = uri
            .parse()
            .map_err(|_| ControlError::Malformed { said: uri.clone() })?;
        let headers = request.headers_mut();
        headers.insert(header::HOST, header::HeaderValue::from_static("localhost"));
        headers.insert(
            header::ACCEPT,
            header::HeaderValue::from_static("application/json"),
        );
        if has_body {
            let json = header::HeaderValue::from_static("application/json");
            headers.insert(header::CONTENT_TYPE, json);
        }
        let answer = async {
            let answer = sender.send_request(request).await.map_err(broken)?;
            let status = answer.status();
            match Limited::new(answer.into_body(), MAX_ANSWER).collect().await {
                Ok(said) => Ok((status, said.to_bytes())),
                Err(error) => Err(match error.downcast::<hyper::Error>() {
                    Ok(error) => broken(*error),
                    Err(_) => ControlError::TooLong { limit: MAX_ANSWER },
                }),
            }
        };
        // The connection carries the answer, and ends with it.
        let mut connection = std::pin::pin!(connection);
        let mut answer = std::pin::pin!(answer);
        tokio::select! {
            biased;
            answer = &mut answer => answer,
            ended = &mut connection => {
                if let Err(error) = ended {
                    return Err(broken(error));
                }
                answer.await
            }
        }
    }

    async fn connect(&self) -> Result<UnixStream, ControlError> {
        let failed = |source| ControlError::Connect {
            path: self.socket.clone(),
            source,
        };
        let stream = UnixStream::connect(&self.socket).await.map_err(failed)?;
        if let Some(maker) = self.maker {
            let peer = stream.peer_cred().map_err(failed)?.pid();
            if peer.map(i32::cast_unsigned) != Some(maker) {
                return Err(failed(std::io::Error::other("another process listens there")));
            }
        }
        Ok(stream)
    }
}

fn encoded(body: &impl Serialize) -> Result<Vec<u8>, ControlError> {
    serde_json::to_vec(body).map_err(|error| ControlError::Malformed {
        said: error.to_string(),
    })
}

fn broken(error: hyper::Error) -> ControlError {
    if error.is_incomplete_message() || error.is_canceled() || error.is_closed() {
        return ControlError::Closed;
    }
    if error.is_parse() {
        return ControlError::Malformed {
            said: error.to_string(),
        };
    }
    ControlError::Io {
        source: std::io::Error::other(error),
    }
}

/// Why a VMM said no, in its own words: Firecracker's `{"fault_message": …}`, Cloud Hypervisor's list of causes, or what
/// else there is.
fn refusal(status: StatusCode, said: &[u8]) -> String {
    let text = match serde_json::from_slice::<Value>(said) {
        Ok(Value::Object(fields)) => fields
            .get("fault_message")
            .and_then(Value::as_str)
            .map(str::to_owned),
        Ok(Value::Array(causes)) => {
            let causes: Vec<_> = causes.iter().filter_map(Value::as_str).collect();
            Some(causes.join(": "))
        }
        Ok(Value::String(text)) => Some(text),
        _ => None,
    };
    let text = text.map_or_else(|| shortened(said), |text| shortened(text.as_bytes()));
    if text.is_empty() { status.to_string() } else { text }
}

fn shortened(said: &[u8]) -> String {
    let lines = plain_lines(&said[..said.len().min(4 * MAX_SAID)]).join("; ");
    lines.chars().take(MAX_SAID).collect()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixListener;

    use super::*;

    /// What an exchange with somebody who says `answer`, and then nothing, comes to; and what they were asked.
    async fn exchange(answer: &'static [u8]) -> (Result<Value, ControlError>, String) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let api = Api {
            socket,
            prefix: "/api/v1",
            maker: Some(std::process::id()),
            patience: Duration::from_secs(1),
        };
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; 4096];
            let length = stream.read(&mut asked).await.unwrap();
            asked.truncate(length);
            stream.write_all(answer).await.unwrap();
            String::from_utf8(asked).unwrap()
        };
        let body = serde_json::json!({"a": 1});
        tokio::join!(api.put("/x", &body), serve)
    }

    #[tokio::test]
    async fn an_answer_is_read_and_a_refusal_quoted() {
        let (answer, asked) = exchange(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{\"b\":2}").await;
        assert_eq!(answer.unwrap(), serde_json::json!({"b": 2}));
        assert!(asked.starts_with("PUT /api/v1/x HTTP/1.1\r\n"), "{asked}");
        assert!(asked.ends_with("\r\n\r\n{\"a\":1}"), "{asked}");
        assert!(asked.contains("content-length: 7\r\n"), "{asked}");
        let (answer, _) = exchange(b"HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(answer.unwrap(), Value::Null);
        for (answer, expected) in [
            (
                &b"HTTP/1.1 400 Bad Request\r\nContent-Length: 24\r\n\r\n{\"fault_message\":\"a\\nb\"}"[..],
                "the VMM refused: a; b",
            ),
            (
                b"HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\n[\"a\",\"b\"]",
                "the VMM refused: a: b",
            ),
            (
                b"HTTP/1.1 500 No\r\nContent-Length: 3\r\n\r\n\x1bxy",
                "the VMM refused: xy",
            ),
            (
                b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
                "the VMM refused: 404 Not Found",
            ),
        ] {
            let (answer, _) = exchange(answer).await;
            assert_eq!(answer.unwrap_err().to_string(), expected);
        }
    }

    #[tokio::test]
    async fn rubbish_is_told_from_an_end() {
        let (answer, _) = exchange(b"SSH-2.0-x\r\n\r\n").await;
        assert!(
            matches!(answer, Err(ControlError::Malformed { .. })),
            "{answer:?}"
        );
        let (answer, _) = exchange(b"").await;
        assert!(matches!(answer, Err(ControlError::Closed)), "{answer:?}");
        let (answer, _) = exchange(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{{{").await;
        assert!(
            matches!(answer, Err(ControlError::Malformed { .. })),
            "{answer:?}"
        );
        let (answer, _) = exchange(b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{").await;
        assert!(
            matches!(answer, Err(ControlError::Closed | ControlError::Io { .. })),
            "{answer:?}"
        );
        let long = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n{";
        let (answer, _) = exchange(long).await;
        assert!(answer.is_err(), "{answer:?}");
    }

    #[tokio::test]
    async fn silence_and_strangers_are_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        let mut api = Api {
            socket,
            prefix: "",
            maker: None,
            patience: Duration::from_millis(50),
        };
        assert!(matches!(api.get("/").await, Err(ControlError::Timeout { .. })));
        api.maker = Some(1);
        let error = api.get("/").await.unwrap_err();
        assert!(matches!(error, ControlError::Connect { .. }), "{error:?}");
    }
}
