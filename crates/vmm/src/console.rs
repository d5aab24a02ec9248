//! The guest's console, where it comes out of a VMM's standard output.
//!
//! ```text
//! guest ─► VMM ─ fd 1 ─► pipe, 64 KiB ─► a task of ours ─► console log, 1 MiB
//!            └── holds both ends, never blocks
//! ```
//!
//! A file would be the guest's to fill. The VMM itself holds the reading end, too: while no daemon reads, the pipe keeps the
//! first 64 KiB and the VMM drops the rest instead of failing. The next daemon finds the pipe through `/proc` and goes on.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::OFlags;
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, Notify};
use tokio_util::task::AbortOnDropHandle;

use crate::bounded_log;

/// A panic's message, registers and trace take about 4 KiB.
const PANIC_WINDOW: usize = 8 << 10;
/// So much is written at once.
const PIECE: usize = 16 << 10;
/// Nothing lies in memory longer: a guest says its words byte by byte.
const LINGER: Duration = Duration::from_millis(100);

/// The end of a pipe that a VMM writes to, which holds it open for reading as well; and our end.
pub(crate) fn pipe_that_lasts() -> io::Result<(OwnedFd, pipe::Receiver)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let both = reopen(&format!("/proc/self/fd/{}", fd_number(&writer)), OFlags::RDWR)?;
    Ok((both.into(), pipe::Receiver::from_owned_fd(reader)?))
}

fn fd_number(fd: &OwnedFd) -> i32 {
    use std::os::fd::AsRawFd as _;
    fd.as_raw_fd()
}

/// Our end of such a pipe of a process that an earlier daemon started.
///
/// A program that was taken over may have put something else in its place: only a pipe is read.
pub(crate) fn pipe_of_process(pid: u32, fd: i32) -> io::Result<pipe::Receiver> {
    let file = reopen(&format!("/proc/{pid}/fd/{fd}"), OFlags::RDONLY)?;
    pipe::Receiver::from_owned_fd(file.into())
}

fn reopen(path: &str, how: OFlags) -> io::Result<File> {
    // Looked at before it is opened: to open some devices does something.
    if !std::fs::metadata(path)?.file_type().is_fifo() {
        return Err(io::Error::other(
            "it is not the pipe that the process was started with",
        ));
    }
    File::options()
        .read(true)
        .write(how == OFlags::RDWR)
        .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed())
        .open(path)
}

/// Keeps what a console says.
#[derive(Debug)]
pub(crate) struct Console {
    inside: Arc<Inside>,
    _reader: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Inside {
    pipe: pipe::Receiver,
    log: PathBuf,
    /// Read and not written yet. Whoever holds it may read and write.
    pending: Mutex<Vec<u8>>,
    /// The guest's kernel halted, and this machine knows no other end.
    halted: Notify,
}

impl Console {
    /// Reads `pipe` from now on.
    pub(crate) fn start(pipe: pipe::Receiver, log: PathBuf) -> Self {
        let inside = Arc::new(Inside {
            pipe,
            log,
            pending: Mutex::default(),
            halted: Notify::new(),
        });
        let reader = tokio::spawn(read(Arc::clone(&inside)));
        Self {
            inside,
            _reader: AbortOnDropHandle::new(reader),
        }
    }

    /// Brings the log up to date.
    pub(crate) async fn save(&self) -> io::Result<()> {
        let mut pending = self.inside.pending.lock().await;
        loop {
            self.inside.take(&mut pending);
            let all = pending.len() < PIECE;
            self.inside.write(&mut pending).await?;
            if all {
                return Ok(());
            }
        }
    }

    /// The last bytes that were said, after they were saved.
    pub(crate) async fn tail(&self, limit: usize) -> io::Result<Vec<u8>> {
        self.save().await?;
        let log = self.inside.log.clone();
        on_disk(move || bounded_log::tail(&log, limit)).await
    }

    /// Returns when the guest's kernel says that it halted for good.
    pub(crate) async fn halted(&self) {
        self.inside.halted.notified().await;
    }

    /// Whether the last words are those of a kernel that panicked. It then asks for a reset, as one that was told to
    /// reboot does.
    pub(crate) async fn tells_of_panic(&self) -> bool {
        let said = self.tail(PANIC_WINDOW).await;
        said.is_ok_and(|said| contains(&said, b"Kernel panic - not syncing"))
    }

    /// Whether a kernel said lately that it ends by a reset.
    pub(crate) async fn tells_of_restart(&self) -> bool {
        let said = self.tail(PANIC_WINDOW).await;
        said.is_ok_and(|said| contains(&said, b"reboot: Restarting system"))
    }
}

/// Reads and writes until nobody can say anything any more.
async fn read(inside: Arc<Inside>) {
    while inside.pipe.readable().await.is_ok() {
        // The words of one moment are written together.
        tokio::time::sleep(LINGER).await;
        let mut pending = inside.pending.lock().await;
        let over = inside.take(&mut pending);
        if contains(&pending, b"reboot: System halted") {
            inside.halted.notify_one();
        }
        if let Err(error) = inside.write(&mut pending).await {
            tracing::warn!(log = %inside.log.display(), %error, "cannot keep what a console says");
            pending.clear();
        }
        if over {
            return;
        }
    }
}

impl Inside {
    /// Takes what is in the pipe, a piece at most; says whether nothing more can come.
    fn take(&self, pending: &mut Vec<u8>) -> bool {
        let mut piece = [0; PIECE];
        while pending.len() < PIECE {
            // Asked of the pipe itself: the runtime may not have heard yet that there is something.
            match rustix::io::read(&self.pipe, &mut piece) {
                Ok(0) => return true,
                Ok(length) => pending.extend_from_slice(&piece[..length]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    // Now the runtime hears that there is nothing.
                    if let Ok(length @ 1..) = self.pipe.try_read(&mut piece) {
                        pending.extend_from_slice(&piece[..length]);
                        continue;
                    }
                    return false;
                }
                Err(_) => return true,
            }
        }
        false
    }

    async fn write(&self, pending: &mut Vec<u8>) -> io::Result<()> {
        if pending.is_empty() {
            return Ok(());
        }
        let (log, said) = (self.log.clone(), std::mem::take(pending));
        on_disk(move || bounded_log::append(&log, &said)).await
    }
}

/// Reads or writes a log off the runtime's threads.
async fn on_disk<T: Send + 'static>(act: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(act)
        .await
        .map_err(io::Error::from)
        .flatten()
}

fn contains(said: &[u8], words: &[u8]) -> bool {
    said.windows(words.len()).any(|window| window == words)
}

/// The log of a console whose process is gone.
pub(crate) async fn tail_of_log(log: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let log = log.to_owned();
    on_disk(move || bounded_log::tail(&log, limit)).await
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn words_reach_the_log_and_the_end_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("console.log");
        let (theirs, ours) = pipe_that_lasts().unwrap();
        let console = Console::start(ours, log.clone());
        let mut theirs = File::from(theirs);
        theirs.write_all(b"hello ").unwrap();
        assert_eq!(console.tail(100).await.unwrap(), b"hello ");
        assert!(!console.tells_of_panic().await);
        theirs.write_all(b"[ 1.0] reboot: System halted\r\n").unwrap();
        console.halted().await;
        theirs
            .write_all(b"Kernel panic - not syncing: sysrq triggered crash\r\n")
            .unwrap();
        assert!(console.tells_of_panic().await);
        assert_eq!(std::fs::read(&log).unwrap(), console.tail(1000).await.unwrap());
    }

    #[tokio::test]
    async fn nobody_blocks_and_nothing_breaks_while_nobody_reads() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("console.log");
        let (theirs, ours) = pipe_that_lasts().unwrap();
        drop(ours);
        let mut theirs = File::from(theirs);
        theirs.write_all(b"first").unwrap();
        let mut refused = None;
        for _ in 0..1000 {
            if let Err(error) = theirs.write_all(&[b'x'; 1000]) {
                refused = Some(error.kind());
                break;
            }
        }
        assert_eq!(refused, Some(io::ErrorKind::WouldBlock));
        // The next daemon goes on where the pipe stands.
        let (theirs, ours) = pipe_that_lasts().unwrap();
        drop(ours);
        rustix::io::write(&theirs, b"for the next").unwrap();
        let ours = pipe_of_process(std::process::id(), fd_number(&theirs)).unwrap();
        let console = Console::start(ours, log);
        assert_eq!(console.tail(100).await.unwrap(), b"for the next");
    }

    #[tokio::test]
    async fn what_is_no_pipe_is_not_read() {
        let file = tempfile::tempfile().unwrap();
        assert!(pipe_of_process(std::process::id(), fd_number(&file.into())).is_err());
    }
}
