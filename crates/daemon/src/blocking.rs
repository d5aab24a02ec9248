//! Work that reads or writes files, on threads that may wait for a disk.

use crate::error::{Answer, Failure};

/// Runs `work` where it holds nobody up. `what` names it for the message when it panics. Dropping the future does not stop
/// work that has begun.
pub async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Answer<T> + Send + 'static,
) -> Answer<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Failure::broken(what))?
}
