//! Requests to the daemon as the CLI makes them: a connection for each.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// How long an answer may take; more is a daemon that hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// The daemon at a socket.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    socket: PathBuf,
}

impl Api {
    pub(crate) fn at(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Sends a request and reads the whole answer, which must be a success; gives its body.
    pub(crate) fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Vec<u8>> {
        let body = body.map(ToString::to_string).unwrap_or_default();
        let content_type = if body.is_empty() {
            ""
        } else {
            "Content-Type: application/json\r\n"
        };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: offshoot\r\n{content_type}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        let mut stream = UnixStream::connect(&self.socket).context("cannot connect to offshootd")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let end_of_head = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
        let body = answer.split_off(end_of_head.context("not an HTTP answer")? + 4);
        let head = String::from_utf8_lossy(&answer);
        if !head.starts_with("HTTP/1.1 2") {
            bail!(
                "{method} {path}: {} {}",
                head.lines().next().unwrap_or_default(),
                String::from_utf8_lossy(&body)
            );
        }
        Ok(body)
    }

    /// The same, read as JSON.
    pub(crate) fn json(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        Ok(serde_json::from_slice(&self.call(method, path, body)?)?)
    }
}
