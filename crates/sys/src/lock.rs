//! Locks between processes: `flock(2)` on a file of their own.
//!
//! The kernel drops such a lock when its holder dies, however it dies, so a lock file that lies around says
//! nothing and never has to be cleaned up. The file may be removed while nobody holds it: whoever waits for a
//! removed file notices and takes the new one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// An exclusive lock, held until it is dropped or the process dies.
#[derive(Debug)]
pub struct FileLock {
    _file: File,
}

impl FileLock {
    /// Waits for the lock on `path`, making the file (mode 0600) where there is none. Blocks the thread.
    pub fn exclusive(path: &Path) -> io::Result<Self> {
        loop {
            let file = open(path)?;
            lock(&file, FlockOperation::LockExclusive)?;
            if is_still_at(&file, path)? {
                return Ok(Self { _file: file });
            }
        }
    }

    /// Takes the lock on `path` if nobody has it; `None` when somebody has.
    pub fn try_exclusive(path: &Path) -> io::Result<Option<Self>> {
        loop {
            let file = open(path)?;
            match lock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
            if is_still_at(&file, path)? {
                return Ok(Some(Self { _file: file }));
            }
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

fn lock(file: &File, operation: FlockOperation) -> io::Result<()> {
    loop {
        match flock(file, operation) {
            Err(Errno::INTR) => {}
            done => return Ok(done?),
        }
    }
}

/// Whether `path` still names the locked file: it may have been removed while we waited.
fn is_still_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn one_holder_at_a_time_and_a_drop_lets_the_next_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.lock");
        let held = FileLock::exclusive(&path).unwrap();
        assert!(FileLock::try_exclusive(&path).unwrap().is_none());
        let (sender, receiver) = mpsc::channel();
        let waiter = std::thread::spawn({
            let path = path.clone();
            move || {
                let lock = FileLock::exclusive(&path).unwrap();
                sender.send(()).unwrap();
                lock
            }
        });
        assert!(receiver.try_recv().is_err());
        drop(held);
        receiver.recv().unwrap();
        let second = waiter.join().unwrap();
        assert!(FileLock::try_exclusive(&path).unwrap().is_none());
        drop(second);
        assert!(FileLock::try_exclusive(&path).unwrap().is_some());
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_removed_lock_file_is_not_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.lock");
        let old = FileLock::exclusive(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let new = FileLock::try_exclusive(&path).unwrap();
        assert!(new.is_some());
        drop(old);
        assert!(FileLock::try_exclusive(&path).unwrap().is_none());
    }
}
