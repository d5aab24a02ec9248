//! What the main process wrote, kept until the host has it.
//!
//! ```text
//!   dropped      kept for a host that comes back        not read yet
//!   ├───────────┼──────────────────────────────────────┼──────────────────┤ end
//!   0           start                                   slowest reader
//!               └──────────── at most LIMIT bytes ────────────────────────┘
//! ```
//!
//! While somebody reads, the process waits when nothing can be dropped: nothing is lost. What the reader was given may
//! still be on its way when the connection breaks, so that much is kept behind it. While nobody reads, the oldest
//! output makes room for the newest, and the next reader is told how much it missed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use offshoot_agent_proto::limits::{MAX_CHUNK, STREAM_WINDOW};
use offshoot_agent_proto::v1;
use tokio::sync::watch;

/// What is kept at most, bytes with their bookkeeping.
const LIMIT: usize = 4 << 20;

/// What may have been given to a reader without having reached the host: the HTTP/2 window, the buffers before it and
/// those of the link, generously.
const IN_FLIGHT: u64 = 2 * STREAM_WINDOW as u64;

/// What a chunk costs besides its bytes, so that a process that writes single bytes in turns cannot use it.
const CHUNK_COST: usize = 128;

/// Small writes are collected up to this.
const MERGE: usize = 16 << 10;

struct Chunk {
    stream: v1::Stream,
    offset: u64,
    data: BytesMut,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }

    fn cost(&self) -> usize {
        self.data.capacity() + CHUNK_COST
    }
}

#[derive(Default)]
struct State {
    chunks: VecDeque<Chunk>,
    /// What the chunks cost.
    cost: usize,
    end: u64,
    /// Where every reader is.
    readers: BTreeMap<u64, u64>,
    next_reader: u64,
    exited: Option<i32>,
}

impl State {
    /// Drops old output for `need` more bytes, as far as it may be dropped.
    fn make_room(&mut self, need: usize) -> bool {
        let slowest = self.readers.values().min().copied();
        while self.cost + need + CHUNK_COST > LIMIT {
            let Some(oldest) = self.chunks.front() else {
                return true;
            };
            if slowest.is_some_and(|position| oldest.end() + IN_FLIGHT > position) {
                return false;
            }
            self.cost -= oldest.cost();
            self.chunks.pop_front();
        }
        true
    }

    fn push(&mut self, stream: v1::Stream, data: &[u8]) {
        match self.chunks.back_mut() {
            Some(last) if last.stream == stream && last.data.len() + data.len() <= MERGE => {
                self.cost -= last.cost();
                last.data.extend_from_slice(data);
                self.cost += last.cost();
            }
            _ => {
                let chunk = Chunk {
                    stream,
                    offset: self.end,
                    data: BytesMut::from(data),
                };
                self.cost += chunk.cost();
                self.chunks.push_back(chunk);
            }
        }
        self.end += data.len() as u64;
    }

    /// What a reader at `position` gets next, and where it is then.
    fn read(&self, position: u64) -> Option<(Piece, u64)> {
        let start = self.chunks.front().map_or(self.end, |chunk| chunk.offset);
        if position < start {
            return Some((Piece::Lost(start - position), start));
        }
        let index = self.chunks.partition_point(|chunk| chunk.end() <= position);
        let Some(chunk) = self.chunks.get(index) else {
            return self.exited.map(|status| (Piece::Exited(status), position));
        };
        // Within a chunk, which is in memory.
        let from = (position - chunk.offset) as usize;
        let data = &chunk.data[from..chunk.data.len().min(from + MAX_CHUNK)];
        let piece = Piece::Output {
            stream: chunk.stream,
            offset: position,
            data: Bytes::copy_from_slice(data),
        };
        Some((piece, position + data.len() as u64))
    }
}

/// What a reader gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// So many bytes were dropped.
    Lost(u64),
    /// Output.
    Output {
        stream: v1::Stream,
        offset: u64,
        data: Bytes,
    },
    /// The process has ended, and everything before was read.
    Exited(i32),
}

/// The log of one process's output.
pub(crate) struct OutputLog {
    state: Mutex<State>,
    /// Something was written.
    written: watch::Sender<()>,
    /// Something was read, or a reader left.
    read: watch::Sender<()>,
}

impl OutputLog {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            written: watch::Sender::new(()),
            read: watch::Sender::new(()),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends output, when there is room for it.
    pub(crate) async fn append(&self, stream: v1::Stream, data: &[u8]) {
        let mut read = self.read.subscribe();
        loop {
            read.mark_unchanged();
            {
                let mut state = self.state();
                if state.make_room(data.len()) {
                    state.push(stream, data);
                    break;
                }
            }
            // The sender lives as long as we.
            drop(read.changed().await);
        }
        self.written.send_replace(());
    }

    /// Nothing more comes.
    pub(crate) fn finish(&self, status: i32) {
        self.state().exited = Some(status);
        self.written.send_replace(());
    }

    /// A reader from byte `offset` on; one that nobody wrote yet means the end.
    pub(crate) fn reader(self: &Arc<Self>, offset: u64) -> Reader {
        let mut state = self.state();
        let id = state.next_reader;
        state.next_reader += 1;
        let position = offset.min(state.end);
        state.readers.insert(id, position);
        drop(state);
        Reader {
            log: Arc::clone(self),
            id,
            written: self.written.subscribe(),
        }
    }
}

/// One host that reads. The process waits for it until it is dropped.
pub(crate) struct Reader {
    log: Arc<OutputLog>,
    id: u64,
    written: watch::Receiver<()>,
}

impl Reader {
    /// What comes next. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Piece {
        loop {
            self.written.mark_unchanged();
            let next = {
                let mut state = self.log.state();
                let position = state.readers.get(&self.id).copied().unwrap_or(state.end);
                let next = state.read(position);
                if let Some((_, position)) = &next {
                    state.readers.insert(self.id, *position);
                }
                next
            };
            if let Some((piece, _)) = next {
                self.log.read.send_replace(());
                return piece;
            }
            drop(self.written.changed().await);
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.log.state().readers.remove(&self.id);
        self.log.read.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const OUT: v1::Stream = v1::Stream::Stdout;
    const ERR: v1::Stream = v1::Stream::Stderr;

    fn is_output(piece: &Piece, at: u64, bytes: &[u8]) -> bool {
        matches!(piece, Piece::Output { offset, data, .. } if *offset == at && data == bytes)
    }

    #[tokio::test]
    async fn small_writes_are_merged_and_streams_kept_apart() {
        let log = OutputLog::new();
        for (stream, data) in [(OUT, "a"), (OUT, "b"), (ERR, "c"), (OUT, "d")] {
            log.append(stream, data.as_bytes()).await;
        }
        log.finish(7);
        let mut reader = log.reader(0);
        assert!(is_output(&reader.next().await, 0, b"ab"));
        assert_eq!(
            reader.next().await,
            Piece::Output {
                stream: ERR,
                offset: 2,
                data: Bytes::from_static(b"c")
            }
        );
        assert!(is_output(&reader.next().await, 3, b"d"));
        assert_eq!(reader.next().await, Piece::Exited(7));
        assert_eq!(reader.next().await, Piece::Exited(7));
        assert!(is_output(&log.reader(1).next().await, 1, b"b"));
        assert_eq!(log.reader(99).next().await, Piece::Exited(7));
    }

    #[tokio::test]
    async fn without_a_reader_the_oldest_is_dropped_and_counted() {
        let log = OutputLog::new();
        let block = vec![1; 60_000];
        for _ in 0..200 {
            log.append(OUT, &block).await;
        }
        assert!(log.state().cost <= LIMIT);
        let mut reader = log.reader(0);
        let Piece::Lost(lost) = reader.next().await else {
            panic!("nothing lost")
        };
        assert!(is_output(&reader.next().await, lost, &block));
        let kept = 200 * 60_000 - lost;
        assert!(kept > 3_000_000 && kept <= LIMIT as u64, "{kept}");
    }

    #[tokio::test]
    async fn single_bytes_in_turns_stay_within_the_limit() {
        let log = OutputLog::new();
        for n in 0..200_000 {
            log.append(if n % 2 == 0 { OUT } else { ERR }, b"x").await;
        }
        let state = log.state();
        assert!(state.chunks.len() * CHUNK_COST <= LIMIT && state.end == 200_000);
    }

    #[tokio::test]
    async fn a_reader_holds_the_process_back_and_loses_nothing() {
        let log = OutputLog::new();
        let mut reader = log.reader(0);
        let writer = tokio::spawn({
            let log = Arc::clone(&log);
            async move {
                for n in 0..200_u8 {
                    log.append(OUT, &vec![n; 60_000]).await;
                }
                log.finish(0);
            }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!writer.is_finished());
        let (mut expected, mut blocks) = (0, 0);
        loop {
            match reader.next().await {
                Piece::Output { offset, data, .. } => {
                    assert_eq!(offset, expected);
                    assert!(data.iter().all(|byte| *byte == blocks));
                    expected += data.len() as u64;
                    blocks += 1;
                }
                Piece::Exited(status) => break assert_eq!(status, 0),
                Piece::Lost(bytes) => panic!("lost {bytes}"),
            }
        }
        assert_eq!(expected, 200 * 60_000);
        // What may have been under way can be read again.
        assert!(matches!(
            log.reader(expected - IN_FLIGHT).next().await,
            Piece::Output { .. }
        ));
    }

    #[tokio::test]
    async fn a_reader_that_leaves_lets_the_process_go_on() {
        let log = OutputLog::new();
        let reader = log.reader(0);
        let writer = tokio::spawn({
            let log = Arc::clone(&log);
            async move {
                for _ in 0..100 {
                    log.append(OUT, &[0; 60_000]).await;
                }
            }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!writer.is_finished());
        drop(reader);
        tokio::time::timeout(Duration::from_secs(5), writer)
            .await
            .expect("stuck")
            .unwrap();
    }
}
