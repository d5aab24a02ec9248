//! A client of QEMU's control protocol, QMP (QEMU's `docs/interop/qmp-spec.txt`): one JSON object a line.
//!
//! ```text
//! QEMU                                             we
//! {"QMP": {"version": …}}            ─ greeting ─►
//!                                    ◄───────────  {"execute": "qmp_capabilities"}
//! {"return": {}}                     ───────────►
//!                                    ◄───────────  {"execute": "stop", "id": 7}
//! {"event": "STOP", …}               ───────────►  (at any time)
//! {"return": {}, "id": 7}            ───────────►
//! ```
//!
//! A guest that broke out speaks here with QEMU's voice, so lines are limited and every wait ends. Two tasks own the
//! two halves of the socket: a caller that gives up in the middle never leaves half a line behind. Events are kept as
//! what they mean ([`Seen`]), not as a queue that could overflow or be missed.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::machine::ControlError;

/// The longest answer we ask for is the whole console ring: 64 KiB in base64, 88 KiB. Anything longer is an attack.
pub(crate) const MAX_LINE: usize = 256 << 10;
/// How many commands may wait for the writer; each caller has one.
const QUEUE: usize = 16;

/// One connection. QEMU serves one client at a time.
#[derive(Debug)]
pub(crate) struct Qmp {
    lines: mpsc::Sender<Vec<u8>>,
    waiting: Arc<Waiting>,
    next_id: AtomicU64,
    patience: Duration,
    seen: watch::Receiver<Seen>,
    _reader: AbortOnDropHandle<()>,
    _writer: AbortOnDropHandle<()>,
}

/// What the events so far mean.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The first `SHUTDOWN`.
    pub(crate) shutdown: Option<Shutdown>,
    /// How often the guest was made to stand still because a disk could not be written (`BLOCK_IO_ERROR`).
    pub(crate) halts: u64,
    /// How saving or restoring ended (`MIGRATION`, which comes when the capability `events` is on).
    pub(crate) migration: Option<Migration>,
    /// The connection is over.
    pub(crate) closed: bool,
}

/// How saving or restoring ended (QEMU's `qapi/migration.json`, `MigrationStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Migration {
    Completed,
    Failed,
}

impl Migration {
    /// `None` while it goes on.
    fn read(status: &str) -> Option<Self> {
        match status {
            "completed" => Some(Self::Completed),
            "failed" | "cancelled" => Some(Self::Failed),
            _ => None,
        }
    }
}

/// `SHUTDOWN`'s reason (QEMU's `qapi/run-state.json`, `ShutdownCause`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shutdown {
    GuestPowerOff,
    GuestReset,
    GuestPanic,
    /// `quit`.
    HostQuit,
    /// A signal or the user interface.
    Host,
}

impl Shutdown {
    fn read(guest: bool, reason: &str) -> Self {
        match reason {
            "guest-reset" => Self::GuestReset,
            "guest-panic" => Self::GuestPanic,
            "host-qmp-quit" => Self::HostQuit,
            _ if guest => Self::GuestPowerOff,
            _ => Self::Host,
        }
    }
}

/// The answers that are waited for, by id; `None` once the connection is over.
#[derive(Debug)]
struct Waiting(Mutex<Option<HashMap<u64, oneshot::Sender<Reply>>>>);

type Reply = Result<Value, ControlError>;

impl Waiting {
    fn with<T>(&self, act: impl FnOnce(&mut Option<HashMap<u64, oneshot::Sender<Reply>>>) -> T) -> T {
        // Nothing panics while it is held; a map is whole at any time.
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A line from QEMU.
#[derive(Debug, Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    id: Option<u64>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

impl Message {
    /// Whether it is an answer to a command, or an event.
    fn is_of_a_conversation(&self) -> bool {
        let answers = self.returned.is_some() || self.error.is_some();
        (self.id.is_some() && answers) || self.event.is_some()
    }
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

#[derive(Serialize)]
struct Command<'a> {
    execute: &'a str,
    #[serde(skip_serializing_if = "Value::is_null")]
    arguments: Value,
    id: u64,
}

impl Qmp {
    /// Connects, reads the greeting and negotiates nothing. Dropping the future closes the connection. No wait, here
    /// or for an answer, is longer than `patience`.
    pub(crate) async fn connect(path: &Path, patience: Duration) -> Result<Self, ControlError> {
        let greet = async {
            let stream = UnixStream::connect(path)
                .await
                .map_err(|source| ControlError::Connect {
                    path: path.to_owned(),
                    source,
                })?;
            let (reader, writer) = stream.into_split();
            let mut reader = BufReader::new(reader);
            loop {
                let message = read_message(&mut reader).await?;
                if message.greeting.is_some() {
                    break;
                }
                // What a client before us was still owed when it left comes first.
                if !message.is_of_a_conversation() {
                    return Err(ControlError::Malformed {
                        said: format!("{message:?}").chars().take(200).collect(),
                    });
                }
            }
            let qmp = Self::start(reader, writer, patience);
            qmp.execute("qmp_capabilities", Value::Null).await?;
            Ok(qmp)
        };
        tokio::time::timeout(patience, greet)
            .await
            .map_err(|_| ControlError::Timeout { limit: patience })?
    }

    fn start(reader: BufReader<OwnedReadHalf>, writer: OwnedWriteHalf, patience: Duration) -> Self {
        let (lines, to_write) = mpsc::channel(QUEUE);
        let (seen_by_reader, seen) = watch::channel(Seen::default());
        let waiting = Arc::new(Waiting(Mutex::new(Some(HashMap::new()))));
        let reader = tokio::spawn(read_all(reader, Arc::clone(&waiting), seen_by_reader));
        let writer = tokio::spawn(write_all(writer, to_write));
        Self {
            lines,
            waiting,
            next_id: AtomicU64::new(1),
            patience,
            seen,
            _reader: AbortOnDropHandle::new(reader),
            _writer: AbortOnDropHandle::new(writer),
        }
    }

    /// Runs a command. Dropping the future is safe; the command may still be carried out.
    pub(crate) async fn execute(&self, command: &str, arguments: Value) -> Reply {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let line = Command {
            execute: command,
            arguments,
            id,
        };
        let mut line =
            serde_json::to_vec(&line).map_err(|e| ControlError::Malformed { said: e.to_string() })?;
        line.push(b'\n');
        let (sender, answer) = oneshot::channel();
        let open = self
            .waiting
            .with(|waiting| waiting.as_mut().map(|map| map.insert(id, sender)).is_some());
        if !open {
            return Err(ControlError::Closed);
        }
        let exchange = async {
            self.lines.send(line).await.map_err(|_| ControlError::Closed)?;
            answer.await.unwrap_or(Err(ControlError::Closed))
        };
        let reply = tokio::time::timeout(self.patience, exchange).await;
        if reply.is_err() {
            self.waiting
                .with(|waiting| waiting.as_mut().map(|map| map.remove(&id)));
        }
        reply.unwrap_or(Err(ControlError::Timeout { limit: self.patience }))
    }

    /// What the events so far mean; may be waited on.
    pub(crate) fn seen(&self) -> watch::Receiver<Seen> {
        self.seen.clone()
    }

    /// Whether the connection is over.
    pub(crate) fn is_closed(&self) -> bool {
        self.seen.borrow().closed
    }

    /// `query-status`: the word for what the VM does (`RunState`).
    pub(crate) async fn run_state(&self) -> Result<String, ControlError> {
        let answer = self.execute("query-status", Value::Null).await?;
        text_at(&answer, "/status").map(str::to_owned)
    }

    /// Prepares for saving or restoring: memory that is a shared file stays where it is, and the end is told.
    pub(crate) async fn prepare_migration(&self) -> Result<(), ControlError> {
        let on = |name: &str| json!({"capability": name, "state": true});
        let capabilities = json!({"capabilities": [on("x-ignore-shared"), on("events")]});
        self.execute("migrate-set-capabilities", capabilities)
            .await
            .map(drop)
    }

    /// Waits until saving or restoring has ended.
    pub(crate) async fn migrated(&self) -> Result<Migration, ControlError> {
        let mut seen = self.seen();
        let ended = seen.wait_for(|seen| seen.migration.is_some() || seen.closed);
        let ended = tokio::time::timeout(self.patience, ended)
            .await
            .map_err(|_| ControlError::Timeout { limit: self.patience })?;
        let ended = ended.ok().and_then(|seen| seen.migration);
        ended.ok_or(ControlError::Closed)
    }

    /// Empties the console ring, which holds at most `size` bytes.
    pub(crate) async fn read_ring(&self, chardev: &str, size: usize) -> Result<Vec<u8>, ControlError> {
        use base64::Engine;
        let arguments = json!({"device": chardev, "size": size, "format": "base64"});
        let answer = self.execute("ringbuf-read", arguments).await?;
        let text = text_at(&answer, "")?;
        base64::engine::general_purpose::STANDARD
            .decode(text)
            .map_err(|e| ControlError::Malformed { said: e.to_string() })
    }

    /// The size of a block device, bytes; `None` when there is no such node.
    pub(crate) async fn block_size(&self, node: &str) -> Result<Option<u64>, ControlError> {
        let answer = self
            .execute("query-named-block-nodes", json!({"flat": true}))
            .await?;
        let nodes = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        let found = nodes
            .iter()
            .find(|entry| entry.pointer("/node-name").and_then(Value::as_str) == Some(node));
        Ok(found
            .and_then(|entry| entry.pointer("/image/virtual-size"))
            .and_then(Value::as_u64))
    }
}

fn text_at<'a>(answer: &'a Value, pointer: &str) -> Result<&'a str, ControlError> {
    let text = answer.pointer(pointer).and_then(Value::as_str);
    text.ok_or_else(|| ControlError::Malformed {
        said: answer.to_string().chars().take(200).collect(),
    })
}

async fn read_message(reader: &mut BufReader<OwnedReadHalf>) -> Result<Message, ControlError> {
    let mut line = Vec::new();
    let limit = MAX_LINE as u64 + 1;
    let read = reader.take(limit).read_until(b'\n', &mut line).await;
    read.map_err(|source| ControlError::Io { source })?;
    if line.is_empty() {
        return Err(ControlError::Closed);
    }
    if line.len() > MAX_LINE {
        return Err(ControlError::TooLong { limit: MAX_LINE });
    }
    serde_json::from_slice(&line).map_err(|_| {
        let said = String::from_utf8_lossy(&line[..line.len().min(200)]).into_owned();
        ControlError::Malformed { said }
    })
}

/// Hands answers to those who wait and keeps what events mean, until the connection is over.
async fn read_all(mut reader: BufReader<OwnedReadHalf>, waiting: Arc<Waiting>, seen: watch::Sender<Seen>) {
    loop {
        let message = match read_message(&mut reader).await {
            Ok(message) => message,
            Err(error) => {
                if !matches!(error, ControlError::Closed) {
                    tracing::debug!(%error, "a QMP connection ends");
                }
                break;
            }
        };
        if message.event.as_deref() == Some("SHUTDOWN") {
            let guest = message
                .data
                .get("guest")
                .and_then(Value::as_bool)
                .unwrap_or_default();
            let reason = message
                .data
                .get("reason")
                .and_then(Value::as_str)
                .unwrap_or_default();
            let shutdown = Shutdown::read(guest, reason);
            // Our own quit follows the guest's end: the first reason is the true one.
            seen.send_modify(|seen| {
                seen.shutdown.get_or_insert(shutdown);
            });
        }
        if message.event.as_deref() == Some("MIGRATION") {
            let status = message.data.get("status").and_then(Value::as_str);
            if let Some(end) = status.and_then(Migration::read) {
                seen.send_modify(|seen| seen.migration = Some(end));
            }
        }
        if message.event.as_deref() == Some("BLOCK_IO_ERROR")
            && message.data.get("action").and_then(Value::as_str) == Some("stop")
        {
            seen.send_modify(|seen| seen.halts += 1);
        }
        let sender = message
            .id
            .and_then(|id| waiting.with(|waiting| waiting.as_mut()?.remove(&id)));
        if let Some(sender) = sender {
            let reply = match (message.returned, message.error) {
                (_, Some(refusal)) => Err(ControlError::Refused {
                    said: refusal.desc.chars().take(500).collect(),
                }),
                (returned, None) => Ok(returned.unwrap_or_default()),
            };
            // The caller may have given up.
            let _ = sender.send(reply);
        }
    }
    // Dropping the senders tells everybody who waits.
    waiting.with(Option::take);
    seen.send_modify(|seen| seen.closed = true);
}

async fn write_all(mut writer: OwnedWriteHalf, mut lines: mpsc::Receiver<Vec<u8>>) {
    while let Some(line) = lines.recv().await {
        if writer.write_all(&line).await.is_err() {
            // The reader sees the end of the connection, too, and tells.
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;

    use tokio::net::UnixListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);
    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}"#;

    /// Serves one client with `serve`, which gets its socket after the greeting and the negotiation.
    async fn with_server<F: Future<Output = ()> + Send + 'static>(
        serve: impl FnOnce(BufReader<UnixStream>) -> F + Send + 'static,
    ) -> (Result<Qmp, ControlError>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            stream
                .write_all(format!("{GREETING}\r\n").as_bytes())
                .await
                .unwrap();
            let id = next_id(&mut stream).await;
            answer(&mut stream, &format!(r#"{{"return": {{}}, "id": {id}}}"#)).await;
            serve(stream).await;
        });
        (Qmp::connect(&path, PATIENCE).await, folder)
    }

    async fn next_id(stream: &mut BufReader<UnixStream>) -> u64 {
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        let command: Value = serde_json::from_str(&line).unwrap();
        command["id"].as_u64().unwrap()
    }

    async fn answer(stream: &mut BufReader<UnixStream>, line: &str) {
        stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    #[tokio::test]
    async fn answers_find_those_who_wait_whatever_their_order() {
        let (qmp, _folder) = with_server(|mut stream| async move {
            let (first, second) = (next_id(&mut stream).await, next_id(&mut stream).await);
            answer(&mut stream, r#"{"event": "STOP", "timestamp": {}}"#).await;
            answer(&mut stream, &format!(r#"{{"return": 2, "id": {second}}}"#)).await;
            answer(&mut stream, r#"{"return": 0, "id": 999}"#).await;
            answer(
                &mut stream,
                &format!(r#"{{"error": {{"class": "X", "desc": "no"}}, "id": {first}}}"#),
            )
            .await;
            next_id(&mut stream).await;
        })
        .await;
        let qmp = qmp.unwrap();
        let (first, second) = tokio::join!(qmp.execute("a", Value::Null), qmp.execute("b", json!({"x": 1})));
        assert_eq!(first.unwrap_err().to_string(), "the VMM refused: no");
        assert_eq!(second.unwrap(), 2);
        // The server reads this one and hangs up.
        assert!(matches!(
            qmp.execute("c", Value::Null).await,
            Err(ControlError::Closed)
        ));
        assert!(qmp.is_closed());
        assert!(matches!(
            qmp.execute("d", Value::Null).await,
            Err(ControlError::Closed)
        ));
    }

    #[tokio::test]
    async fn what_a_client_before_was_owed_comes_before_the_greeting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            for last in [GREETING, r#"{"hello": "you"}"#] {
                let mut stream = BufReader::new(listener.accept().await.unwrap().0);
                answer(&mut stream, r#"{"return": {"status": "paused"}, "id": 1}"#).await;
                answer(&mut stream, r#"{"event": "STOP", "timestamp": {}}"#).await;
                answer(&mut stream, last).await;
                if last == GREETING {
                    let id = next_id(&mut stream).await;
                    answer(&mut stream, &format!(r#"{{"return": {{}}, "id": {id}}}"#)).await;
                }
            }
        });
        Qmp::connect(&path, PATIENCE).await.unwrap();
        let refused = Qmp::connect(&path, PATIENCE).await.unwrap_err();
        assert!(matches!(refused, ControlError::Malformed { .. }), "{refused}");
        server.await.unwrap();
    }

    #[tokio::test]
    async fn the_first_shutdown_is_the_reason() {
        let (qmp, _folder) = with_server(|mut stream| async move {
            for (guest, reason) in [(true, "guest-reset"), (false, "host-qmp-quit")] {
                let data = format!(r#"{{"guest": {guest}, "reason": "{reason}"}}"#);
                answer(
                    &mut stream,
                    &format!(r#"{{"event": "SHUTDOWN", "data": {data}}}"#),
                )
                .await;
            }
        })
        .await;
        let mut seen = qmp.as_ref().unwrap().seen();
        let seen = seen.wait_for(|seen| seen.closed).await.unwrap().clone();
        assert_eq!(seen.shutdown, Some(Shutdown::GuestReset));
    }

    #[tokio::test]
    async fn only_errors_that_halt_the_guest_count() {
        let (qmp, _folder) = with_server(|mut stream| async move {
            for action in ["report", "stop", "ignore", "stop"] {
                let data = format!(r#"{{"operation": "write", "action": "{action}", "nospace": true}}"#);
                answer(
                    &mut stream,
                    &format!(r#"{{"event": "BLOCK_IO_ERROR", "data": {data}}}"#),
                )
                .await;
            }
        })
        .await;
        let mut seen = qmp.as_ref().unwrap().seen();
        let seen = seen.wait_for(|seen| seen.closed).await.unwrap().clone();
        assert_eq!(seen.halts, 2);
    }

    #[tokio::test]
    async fn reasons_are_read() {
        for (guest, reason, expected) in [
            (true, "guest-shutdown", Shutdown::GuestPowerOff),
            (true, "something new", Shutdown::GuestPowerOff),
            (true, "guest-panic", Shutdown::GuestPanic),
            (false, "host-qmp-quit", Shutdown::HostQuit),
            (false, "host-signal", Shutdown::Host),
            (false, "", Shutdown::Host),
        ] {
            assert_eq!(Shutdown::read(guest, reason), expected, "{reason}");
        }
    }

    #[tokio::test]
    async fn rubbish_ends_the_connection_and_the_wait() {
        for rubbish in [
            "hello\n".to_owned(),
            "\u{1}\n".into(),
            "[".repeat(100_000) + "\n",
            "x".repeat(MAX_LINE + 10),
        ] {
            let (qmp, _folder) = with_server(|mut stream| async move {
                next_id(&mut stream).await;
                let _ = stream.write_all(rubbish.as_bytes()).await;
                std::future::pending::<()>().await;
            })
            .await;
            let error = qmp.unwrap().execute("x", Value::Null).await.unwrap_err();
            assert!(matches!(error, ControlError::Closed), "{error}");
        }
    }

    #[tokio::test]
    async fn what_is_no_qmp_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        assert!(matches!(
            Qmp::connect(&path, PATIENCE).await,
            Err(ControlError::Connect { .. })
        ));
        let listener = UnixListener::bind(&path).unwrap();
        for (said, malformed) in [
            ("{}\n", true),
            ("220 hello\n", true),
            ("", false),
            ("{\"QMP\": {}}", false),
        ] {
            let serve = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(said.as_bytes()).await.unwrap();
            };
            let (qmp, ()) = tokio::join!(Qmp::connect(&path, PATIENCE), serve);
            let error = qmp.unwrap_err();
            assert_eq!(
                matches!(error, ControlError::Malformed { .. }),
                malformed,
                "{said:?}: {error}"
            );
        }
    }

    #[tokio::test]
    async fn a_silent_vmm_is_given_up() {
        let (qmp, _folder) = with_server(|stream| async move {
            let _open = stream;
            std::future::pending::<()>().await;
        })
        .await;
        let mut qmp = qmp.unwrap();
        qmp.patience = Duration::from_millis(20);
        assert!(matches!(
            qmp.execute("x", Value::Null).await,
            Err(ControlError::Timeout { .. })
        ));
        assert!(
            qmp.waiting.with(|waiting| waiting.as_ref().unwrap().is_empty()),
            "nothing is left of it"
        );
    }
}
