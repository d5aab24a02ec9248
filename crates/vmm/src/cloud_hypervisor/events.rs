//! What Cloud Hypervisor says of its machine, out of its event monitor's pipe: JSON objects, one after another with white
//! space between them, `{"source": "vm", "event": "booted", …}` (its `docs/event-monitor.md`).

use std::io;

use serde::Deserialize;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// An event has some 100 bytes; one that says more is no Cloud Hypervisor's.
const MAX_EVENT: usize = 64 << 10;

/// What was seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// The guest's processors run, or did; or it was restored, and they stand ready.
    pub(super) booted: bool,
    /// The guest asked for a reset, which is being granted.
    pub(super) reset: bool,
    /// The guest switched itself off.
    pub(super) off: bool,
}

#[derive(Deserialize)]
struct Event {
    source: String,
    event: String,
}

impl Seen {
    fn note(&mut self, event: &Event) {
        match (event.source.as_str(), event.event.as_str()) {
            ("vm", "booted" | "restored") => self.booted = true,
            ("vm", "rebooting") => self.reset = true,
            ("vm", "shutdown") => self.off = true,
            _ => {}
        }
    }
}

/// Follows the events of one process.
#[derive(Debug)]
pub(super) struct Events {
    pub(super) seen: watch::Receiver<Seen>,
    _reader: AbortOnDropHandle<()>,
}

impl Events {
    /// Reads `pipe` from now on. `seen` is what is known from before.
    pub(super) fn follow(pipe: pipe::Receiver, seen: Seen) -> Self {
        let (sender, receiver) = watch::channel(seen);
        let reader = tokio::spawn(async move {
            if let Err(error) = read(&pipe, &sender).await {
                tracing::warn!(%error, "cannot follow a VMM's events any more");
            }
        });
        Self {
            seen: receiver,
            _reader: AbortOnDropHandle::new(reader),
        }
    }
}

async fn read(pipe: &pipe::Receiver, seen: &watch::Sender<Seen>) -> io::Result<()> {
    let mut text = Vec::new();
    let mut piece = [0; 4096];
    loop {
        pipe.readable().await?;
        match pipe.try_read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(length) => text.extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        let read = note_all(&text, seen)?;
        text.drain(..read);
        if text.len() > MAX_EVENT {
            return Err(io::Error::other("an event has no end"));
        }
    }
}

/// Notes every whole event; says how much of the text they were.
fn note_all(text: &[u8], seen: &watch::Sender<Seen>) -> io::Result<usize> {
    let mut events = serde_json::Deserializer::from_slice(text).into_iter::<Event>();
    loop {
        let read = events.byte_offset();
        match events.next() {
            Some(Ok(event)) => {
                tracing::trace!(source = event.source, event = event.event, "an event");
                seen.send_modify(|seen| seen.note(&event));
            }
            Some(Err(error)) if error.is_eof() => return Ok(read),
            Some(Err(error)) => return Err(error.into()),
            None => return Ok(text.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::pipe_that_lasts;

    fn event(source: &str, event: &str) -> String {
        let value = serde_json::json!({"timestamp": {"secs": 0, "nanos": 1}, "source": source, "event": event, "properties": null});
        format!("{value:#}\n\n")
    }

    #[tokio::test]
    async fn events_are_read_in_pieces() {
        let (theirs, ours) = pipe_that_lasts().unwrap();
        let mut events = Events::follow(ours, Seen::default());
        let said = [
            event("vmm", "starting"),
            event("vm", "booting"),
            event("vm", "booted"),
        ]
        .concat();
        for piece in said.as_bytes().chunks(7) {
            rustix::io::write(&theirs, piece).unwrap();
            tokio::task::yield_now().await;
        }
        events.seen.wait_for(|seen| seen.booted).await.unwrap();
        rustix::io::write(&theirs, event("vm", "rebooting").as_bytes()).unwrap();
        let seen = *events.seen.wait_for(|seen| seen.reset).await.unwrap();
        assert!(seen.booted && !seen.off);
        rustix::io::write(&theirs, event("vmm", "shutdown").as_bytes()).unwrap();
        rustix::io::write(&theirs, event("vm", "shutdown").as_bytes()).unwrap();
        events.seen.wait_for(|seen| seen.off).await.unwrap();
    }

    #[tokio::test]
    async fn rubbish_ends_it() {
        for rubbish in ["rubbish", "{\"source\": 1}", &"{\"source\": \"".repeat(20_000)] {
            let (theirs, ours) = pipe_that_lasts().unwrap();
            let mut events = Events::follow(ours, Seen::default());
            for piece in rubbish.as_bytes().chunks(4000) {
                let _ = rustix::io::write(&theirs, piece);
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            assert!(events.seen.wait_for(|seen| seen.booted).await.is_err());
        }
    }
}
