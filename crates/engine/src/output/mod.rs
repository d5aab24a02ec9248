//! What a VM's main process wrote: one bounded file per VM, appended by the run, followed by any number of readers.
//!
//! The file is the one source: `logs`, `logs -f`, `attach` and a foreground `run` all read it, so nobody can miss or
//! hold up what another one sees. Format: `docs/formats/output-log.md`. When it grows over [`MAX_FILE`] it becomes
//! `output.log.1` (replacing an older one) and a new file is begun: at most twice that much of a guest's
//! chatter is kept. A rotation waits for readers that asked to miss nothing ([`Follow::Everything`]).

mod follow;
mod record;

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

pub use follow::{Follow, Follower};
pub use record::{MAX_DATA, Record, RecordKind};

/// The largest file before it is rotated. Two of them bound what a guest can write to the host's disk by talking.
pub const MAX_FILE: u64 = 32 << 20;

/// Where the end of the output is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct End {
    /// How often the file was rotated since it was opened.
    generation: u64,
    /// Bytes in the current file.
    length: u64,
}

struct Writer {
    file: Option<File>,
    /// Position in the current run's output that comes next.
    next_offset: u64,
}

struct Shared {
    path: PathBuf,
    max_file: u64,
    writer: Mutex<Writer>,
    end: watch::Sender<End>,
    /// Readers that must not miss anything: they hold rotation up.
    pinned: AtomicUsize,
}

/// The output of one VM. Cheap to clone; all clones write and follow the same file.
#[derive(Clone)]
pub struct OutputLog {
    shared: Arc<Shared>,
}

impl OutputLog {
    /// The output kept at `path`; the file need not exist yet. A record that a crash cut in half is cut off.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::open_with(path, MAX_FILE)
    }

    fn open_with(path: &Path, max_file: u64) -> io::Result<Self> {
        let (length, next_offset) = match File::open(path) {
            Ok(mut file) => {
                let scanned = record::scan(&mut file)?;
                if scanned.good_length < file.metadata()?.len() {
                    OpenOptions::new()
                        .write(true)
                        .open(path)?
                        .set_len(scanned.good_length)?;
                }
                (scanned.good_length, scanned.next_offset)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => (0, 0),
            Err(error) => return Err(error),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                path: path.to_owned(),
                max_file,
                writer: Mutex::new(Writer {
                    file: None,
                    next_offset,
                }),
                end: watch::Sender::new(End {
                    generation: 0,
                    length,
                }),
                pinned: AtomicUsize::new(0),
            }),
        })
    }

    /// Marks the beginning of a run: positions count from 0 again.
    pub fn begin_run(&self, now_ms: u64) -> io::Result<()> {
        self.append(&Record {
            kind: RecordKind::Begin,
            time_ms: now_ms,
            offset: 0,
            data: Default::default(),
        })
    }

    /// Position in the current run's output from which the agent should send.
    pub fn next_offset(&self) -> u64 {
        self.shared
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next_offset
    }

    /// Appends one record. Blocks for a write to the page cache; never for a disk or a reader.
    pub fn append(&self, record: &Record) -> io::Result<()> {
        let mut writer = self.shared.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut end = *self.shared.end.borrow();
        if end.length >= self.shared.max_file && self.shared.pinned.load(Ordering::Acquire) == 0 {
            std::fs::rename(&self.shared.path, rotated(&self.shared.path))?;
            writer.file = None;
            end = End {
                generation: end.generation + 1,
                length: 0,
            };
        }
        let file = match &mut writer.file {
            Some(file) => file,
            slot => slot.insert(
                OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(0o600)
                    .open(&self.shared.path)?,
            ),
        };
        let bytes = record.encode();
        file.write_all(&bytes)?;
        writer.next_offset = record.next_offset(writer.next_offset);
        end.length += bytes.len() as u64;
        self.shared.end.send_replace(end);
        Ok(())
    }

    /// Reads from the end on, or all there is and then on.
    pub fn follow(&self, what: Follow) -> Follower {
        Follower::new(Arc::clone(&self.shared), what)
    }
}

/// Where the older half lies.
fn rotated(path: &Path) -> PathBuf {
    path.with_extension("log.1")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out(data: &'static [u8], offset: u64) -> Record {
        Record {
            kind: RecordKind::Stdout,
            time_ms: 1,
            offset,
            data: data.into(),
        }
    }

    async fn read_all(follower: &mut Follower) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(record) = follower.try_next().unwrap() {
            all.extend_from_slice(&record.data);
        }
        all
    }

    #[tokio::test]
    async fn readers_see_what_was_written_and_a_torn_tail_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let log = OutputLog::open(&path).unwrap();
        log.begin_run(1).unwrap();
        log.append(&out(b"one ", 0)).unwrap();
        let mut late = log.follow(Follow::FromEnd);
        log.append(&out(b"two", 4)).unwrap();
        assert_eq!(read_all(&mut log.follow(Follow::Everything)).await, b"one two");
        assert_eq!(read_all(&mut late).await, b"two");
        assert_eq!(log.next_offset(), 7);
        drop(log);

        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let log = OutputLog::open(&path).unwrap();
        assert_eq!(log.next_offset(), 4);
        log.append(&out(b"two!", 4)).unwrap();
        assert_eq!(read_all(&mut log.follow(Follow::Everything)).await, b"one two!");
    }

    #[tokio::test]
    async fn the_file_is_bounded_and_a_pinned_reader_misses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let log = OutputLog::open_with(&path, 100).unwrap();
        let mut pinned = log.follow(Follow::Everything);
        for n in 0..50 {
            log.append(&out(b"0123456789", n * 10)).unwrap();
        }
        assert_eq!(read_all(&mut pinned).await.len(), 500);
        drop(pinned);
        for n in 50..100 {
            log.append(&out(b"0123456789", n * 10)).unwrap();
        }
        let kept = std::fs::metadata(&path).unwrap().len() + std::fs::metadata(rotated(&path)).unwrap().len();
        assert!(kept < 400, "{kept}");
        assert!(!read_all(&mut log.follow(Follow::Kept)).await.is_empty());
    }

    #[tokio::test]
    async fn a_reader_wakes_when_something_comes() {
        let dir = tempfile::tempdir().unwrap();
        let log = OutputLog::open(&dir.path().join("output.log")).unwrap();
        let mut follower = log.follow(Follow::FromEnd);
        let waiting = tokio::spawn(async move { follower.next().await.unwrap() });
        tokio::task::yield_now().await;
        log.append(&out(b"hello", 0)).unwrap();
        assert_eq!(&waiting.await.unwrap().data[..], b"hello");
    }
}
