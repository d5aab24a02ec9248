//! Pretend processes: what they said so far, and the task that goes through their steps.

use std::sync::Arc;

use bytes::Bytes;
use offshoot_agent_proto::limits::MAX_CHUNK;
use offshoot_agent_proto::v1;
use tokio::sync::{mpsc, watch};

use crate::machine::Machine;
use crate::program::Step;

/// Signals that a program may ignore, and that stop or continue one: SIGCHLD to SIGTTOU, SIGURG and SIGWINCH of
/// signal(7). A pretend process takes no notice of them, nor of 0.
const HARMLESS: [u32; 9] = [0, 17, 18, 19, 20, 21, 22, 23, 28];

/// What a process wrote, and its status once it ended.
#[derive(Default)]
struct Written {
    pieces: Vec<Piece>,
    length: u64,
    exited: Option<i32>,
}

struct Piece {
    stream: v1::Stream,
    offset: u64,
    data: Bytes,
}

/// What one process says, for whoever reads it, from its first word on. All of it is kept: it is no longer than an
/// argument list.
#[derive(Clone)]
pub(crate) struct Transcript(Arc<watch::Sender<Written>>);

/// What a reader gets.
pub(crate) enum Said {
    /// The next output.
    Output(v1::Output),
    /// The process has ended, and everything before was read.
    Exited(i32),
}

impl Transcript {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Written::default())))
    }

    fn write(&self, stream: v1::Stream, data: &[u8]) {
        self.0.send_modify(|written| {
            for chunk in data.chunks(MAX_CHUNK) {
                written.pieces.push(Piece {
                    stream,
                    offset: written.length,
                    data: Bytes::copy_from_slice(chunk),
                });
                written.length += chunk.len() as u64;
            }
        });
    }

    fn finish(&self, status: i32) {
        self.0.send_modify(|written| written.exited = Some(status));
    }

    /// Whether the process has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.0.borrow().exited.is_some()
    }

    /// Waits until the process has ended.
    pub(crate) async fn over(&self) {
        // The sender lives as long as we.
        let _ = self
            .0
            .subscribe()
            .wait_for(|written| written.exited.is_some())
            .await;
    }

    /// A reader from byte `offset` on.
    pub(crate) fn reader(&self, offset: u64) -> Reader {
        Reader {
            written: self.0.subscribe(),
            transcript: self.clone(),
            offset,
        }
    }
}

/// Somebody who reads a transcript.
pub(crate) struct Reader {
    written: watch::Receiver<Written>,
    /// Keeps the sender alive.
    transcript: Transcript,
    offset: u64,
}

impl Reader {
    /// What comes next; waits for it. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Said {
        let from = self.offset;
        let news = self
            .written
            .wait_for(|written| written.length > from || written.exited.is_some())
            .await;
        let written = match news {
            Ok(written) => written,
            // Cannot be while the transcript is held; then its last state is the end.
            Err(_) => self.transcript.0.borrow(),
        };
        let at = written
            .pieces
            .partition_point(|piece| piece.offset + piece.data.len() as u64 <= from);
        let Some(piece) = written.pieces.get(at) else {
            return Said::Exited(written.exited.unwrap_or_default());
        };
        // Within a piece, which is in memory.
        let data = piece.data.slice((from - piece.offset) as usize..);
        self.offset = from + data.len() as u64;
        Said::Output(v1::Output {
            stream: piece.stream.into(),
            data,
            offset: from,
        })
    }
}

/// A process that was started.
pub(crate) struct Process {
    /// Its id in the guest.
    pub(crate) pid: u32,
    /// What it says.
    pub(crate) transcript: Transcript,
    signals: mpsc::UnboundedSender<u32>,
}

impl Process {
    /// Starts one.
    pub(crate) fn start(pid: u32, steps: Vec<Step>, transcript: Transcript, machine: Arc<Machine>) -> Self {
        let (signals, received) = mpsc::unbounded_channel();
        tokio::spawn(run(steps, transcript.clone(), received, machine));
        Self {
            pid,
            transcript,
            signals,
        }
    }

    /// Sends a signal; whether there was somebody to get it.
    pub(crate) fn signal(&self, signal: u32) -> bool {
        !self.transcript.is_over() && self.signals.send(signal).is_ok()
    }
}

async fn run(
    steps: Vec<Step>,
    transcript: Transcript,
    mut signals: mpsc::UnboundedReceiver<u32>,
    machine: Arc<Machine>,
) {
    let all = async {
        for step in steps {
            // A processor that stands makes no step.
            std::future::poll_fn(|cx| machine.poll_running(cx)).await;
            match step {
                Step::Write(stream, data) => transcript.write(stream, &data),
                Step::Sleep(time) => tokio::time::sleep(time).await,
                Step::Forever => std::future::pending().await,
                Step::EndGuest(end) => {
                    machine.end(end);
                    std::future::pending::<()>().await;
                }
                Step::Exit(status) => return status,
            }
        }
        0
    };
    let status = tokio::select! {
        biased;
        signal = deadly(&mut signals) => 128 + signal.cast_signed(),
        status = all => status,
    };
    transcript.finish(status);
}

/// Waits for a signal that ends a process.
async fn deadly(signals: &mut mpsc::UnboundedReceiver<u32>) -> u32 {
    loop {
        match signals.recv().await {
            Some(signal) if !HARMLESS.contains(&signal) => return signal,
            Some(_) => {}
            None => return std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::program::steps;

    fn start(script: &str) -> Process {
        let steps = steps(&["sh".into(), "-c".into(), script.into()]).unwrap();
        let machine = Arc::new(Machine::new("", HashMap::new()));
        Process::start(2, steps, Transcript::new(), machine)
    }

    async fn all(process: &Process, offset: u64) -> (String, i32) {
        let mut reader = process.transcript.reader(offset);
        let mut text = String::new();
        loop {
            match reader.next().await {
                Said::Output(output) => {
                    text.push_str(&format!("{}@{}", output.stream, output.offset));
                    text.push_str(std::str::from_utf8(&output.data).unwrap());
                }
                Said::Exited(status) => return (text, status),
            }
        }
    }

    #[tokio::test]
    async fn output_is_read_from_any_byte_and_then_the_status() {
        let process = start("echo ab; echo c >&2; exit 3");
        assert_eq!(all(&process, 0).await, ("0@0ab\n1@3c\n".into(), 3));
        assert_eq!(all(&process, 1).await, ("0@1b\n1@3c\n".into(), 3));
        assert_eq!(all(&process, 5).await, (String::new(), 3));
        assert_eq!(all(&process, 99).await, (String::new(), 3));
        assert!(!process.signal(15), "it is gone");
    }

    #[tokio::test]
    async fn a_signal_ends_it_unless_it_is_harmless() {
        let process = start("exec nginx");
        assert!(process.signal(28) && process.signal(0) && process.signal(15));
        assert_eq!(all(&process, 0).await, (String::new(), 143));
    }

    #[tokio::test]
    async fn nothing_goes_on_while_the_machine_is_paused() {
        let machine = Arc::new(Machine::new("", HashMap::new()));
        let qmp = |command| {
            machine
                .carry_out(command, &serde_json::Value::Null, false)
                .unwrap()
        };
        qmp("stop");
        let steps = vec![Step::EndGuest(crate::machine::End::PowerOff)];
        let _process = Process::start(2, steps, Transcript::new(), Arc::clone(&machine));
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(qmp("query-status")["status"], "paused");
        qmp("cont");
        while machine.is_running() {
            tokio::task::yield_now().await;
        }
        assert_eq!(qmp("query-status")["status"], "shutdown");
    }

    #[tokio::test]
    async fn long_output_comes_in_chunks() {
        let process = start(&format!("echo {}", "x".repeat(3 * MAX_CHUNK)));
        let mut reader = process.transcript.reader(0);
        let (mut length, mut pieces) = (0, 0);
        while let Said::Output(output) = reader.next().await {
            assert!(output.data.len() <= MAX_CHUNK);
            (length, pieces) = (length + output.data.len(), pieces + 1);
        }
        assert_eq!((length, pieces), (3 * MAX_CHUNK + 1, 4));
    }
}
