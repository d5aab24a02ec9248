//! Keeps a disk from filling up: whoever writes much asks first, and is refused before the host has nothing left.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use offshoot_sys::space;

/// How much is written between two looks at the room on the disk. Less than any sensible reserve.
const CHECK_EVERY: u64 = 32 << 20;

/// Keeps a disk from filling up: below this reserve, writing is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceGuard {
    /// The bytes that must stay available.
    pub reserve: u64,
}

impl SpaceGuard {
    /// A reserve for the disk that holds `dir`: 512 MiB, what a host needs to go on working and the database to record what
    /// happened, but no more than a twentieth of a small disk.
    pub fn of_disk(dir: &Path) -> io::Result<Self> {
        Ok(Self {
            reserve: (space::size(dir)? / 20).min(512 << 20),
        })
    }
}

/// What a full disk is told as, so that it is known for what it is by its kind.
#[derive(Debug, thiserror::Error)]
#[error("the disk has {available} bytes left, and {reserve} are kept free")]
struct NoRoom {
    available: u64,
    reserve: u64,
}

/// The room on one disk, asked for by any number of threads.
#[derive(Debug)]
pub(crate) struct Room {
    dir: PathBuf,
    guard: SpaceGuard,
    /// Bytes that may be written before the next look at the disk.
    unchecked: Mutex<u64>,
}

impl Room {
    /// The room on the disk that holds `dir`.
    pub(crate) fn new(dir: &Path, guard: SpaceGuard) -> Self {
        Self {
            dir: dir.to_owned(),
            guard,
            unchecked: Mutex::new(0),
        }
    }

    /// Refuses, with [`io::ErrorKind::StorageFull`], when the disk would come below its reserve with `more` bytes.
    pub(crate) fn take(&self, more: u64) -> io::Result<()> {
        let mut unchecked = self.unchecked.lock().unwrap_or_else(PoisonError::into_inner);
        if more <= *unchecked && *unchecked > 0 {
            *unchecked -= more;
            return Ok(());
        }
        let available = space::available(&self.dir)?;
        let reserve = self.guard.reserve;
        // All that may be written until the next look counts as written.
        if more > available || available.saturating_sub(more.max(CHECK_EVERY)) < reserve {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                NoRoom { available, reserve },
            ));
        }
        *unchecked = CHECK_EVERY.saturating_sub(more);
        Ok(())
    }
}

/// Whether an error means that a disk, or what somebody may use of it, is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_touch_the_reserve_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let room = Room::new(dir.path(), SpaceGuard { reserve: 0 });
        room.take(1).unwrap();
        assert_eq!(*room.unchecked.lock().unwrap(), CHECK_EVERY - 1);
        room.take(CHECK_EVERY - 1).unwrap();
        assert!(is_full(&room.take(u64::MAX).unwrap_err()));
        let none = Room::new(dir.path(), SpaceGuard { reserve: u64::MAX });
        assert!(is_full(&none.take(0).unwrap_err()));
    }
}
