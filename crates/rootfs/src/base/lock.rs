//! The lock of a base between processes, held by whoever makes, unpacks, checks or removes it.
//!
//! The kernel frees it when its holder dies, however it dies. Those who wait tell somebody once that they do.

use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use offshoot_sys::lock::FileLock;

/// How often a lock that another process holds is tried again. A blocking wait could not be cancelled.
const POLL: Duration = Duration::from_millis(50);

/// Waits for the lock on `path`; `None` when `cancelled` says so. `waits` is called once, if there is something to wait for.
pub(super) fn lock(
    path: &Path,
    cancelled: &dyn Fn() -> bool,
    waits: &dyn Fn(),
) -> io::Result<Option<FileLock>> {
    let mut told = false;
    loop {
        if cancelled() {
            return Ok(None);
        }
        if let Some(lock) = FileLock::try_exclusive(path)? {
            return Ok(Some(lock));
        }
        if !told {
            waits();
            told = true;
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "nobody is told when a file lock becomes free"
        )]
        thread::sleep(POLL);
    }
}
