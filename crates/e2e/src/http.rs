//! Requests by hand: for what the CLI would not send, and where a process per request would take too long.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use serde_json::Value;

use crate::{Daemon, PATIENCE};

/// What a daemon answered: status, head in lower case, body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    /// The body as JSON; null where it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// Fails unless it is a refusal with this status in the one error shape; gives the message.
    pub fn refused(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{self:?}");
        assert!(self.head.contains("content-type: application/json"), "{self:?}");
        let error = self.json();
        let message = error["message"].as_str().unwrap_or_default().to_owned();
        let hints = error["hints"].as_array().map_or(0, Vec::len);
        assert!(
            error["kind"].is_string() && error["causes"].is_array(),
            "{self:?}"
        );
        assert!(!message.is_empty() && hints > 0, "{self:?}");
        assert!(!message.contains(char::is_control), "{self:?}");
        message
    }
}

/// Reads until the daemon closes; nothing where it said nothing.
pub fn read_answer(stream: &mut UnixStream) -> Option<Answer> {
    answer_of(&read_all(stream))
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let (mut bytes, mut piece) = (Vec::new(), [0; 64 << 10]);
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return bytes,
            Ok(read) => bytes.extend_from_slice(&piece[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return bytes,
            // A process that was stopped and goes on is told so where its wait has a limit (signal(7)).
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => panic!("the daemon neither answers nor closes: {error}"),
        }
    }
}

/// The last answer in what a daemon said on one connection.
pub fn answer_of(bytes: &[u8]) -> Option<Answer> {
    let text = String::from_utf8_lossy(bytes);
    let last = &text[text.rfind("HTTP/1.1 ")?..];
    let (head, body) = last.split_once("\r\n\r\n")?;
    Some(Answer {
        status: head.split(' ').nth(1)?.parse().ok()?,
        head: head.to_ascii_lowercase(),
        body: body.to_owned(),
    })
}

/// Everything but letters and digits as `%XX`.
pub fn encoded(text: impl AsRef<[u8]>) -> String {
    let bytes = text.as_ref().iter();
    bytes.map(|byte| format!("%{byte:02X}")).collect()
}

impl Daemon {
    /// A connection to its socket.
    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).expect("the daemon listens")
    }

    /// Sends bytes as they are; gives what came back until the daemon closed.
    pub fn send(&self, bytes: &[u8]) -> Option<Answer> {
        let mut stream = self.connect();
        // It may refuse before it has read everything.
        let _ = stream.write_all(bytes);
        read_answer(&mut stream)
    }

    /// One request with a body.
    pub fn request(&self, method: &str, path: &str, content_type: &str, body: &[u8]) -> Answer {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: offshoot\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        self.send(&[head.as_bytes(), body].concat())
            .expect("an HTTP answer")
    }

    /// `GET PATH`.
    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "application/json", b"")
    }

    /// `POST PATH`; gives status and JSON body (null where there is none).
    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self.request("POST", path, "application/json", body.to_string().as_bytes());
        (answer.status, answer.json())
    }

    /// The same with any method, and a body only where there is one to send.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let body = body.map(ToString::to_string).unwrap_or_default();
        let answer = self.request(method, path, "application/json", body.as_bytes());
        (answer.status, answer.json())
    }

    /// `GET PATH`, which must succeed; gives the JSON.
    pub fn get_json(&self, path: &str) -> Value {
        let answer = self.get(path);
        assert_eq!(answer.status, 200, "GET {path}: {answer:?}");
        answer.json()
    }
}
