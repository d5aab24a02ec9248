//! Operations that are over, as they are kept: in memory for a moment, then in the database.
//!
//! Timings are for people, so nothing waits for them: what an operation took is written by a task of its own, several at
//! once where there are many, and a full disk costs timings, not operations. Whoever reads them has those written first that
//! wait, so that an operation whose answer came is there.
//!
//! ```text
//! Stages, dropped ─► waiting ─► (a task, or a reader) ─► table `operations`
//! ```

use std::sync::{Arc, Mutex, PoisonError, Weak};

use offshoot_model::OperationTiming;
use offshoot_store::db::{Db, DbError, OperationFilter};
use tokio::sync::Notify;

use crate::operation::{Stages, Subject};

/// So many may wait for a database that does not answer; more are lost, the oldest first.
const MAX_WAITING: usize = 1024;

/// All operations that are over. Cheap to clone.
#[derive(Clone)]
pub struct OperationLog(Arc<Inner>);

struct Inner {
    db: Db,
    waiting: Mutex<Vec<OperationTiming>>,
    /// Held while what waited is written: a reader must not overtake it.
    writing: tokio::sync::Mutex<()>,
    wake: Arc<Notify>,
}

impl std::fmt::Debug for OperationLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OperationLog")
    }
}

impl OperationLog {
    /// The log in `db`, with the task that writes it; the task ends with the last clone. Within a runtime.
    pub fn new(db: Db) -> Self {
        let wake = Arc::new(Notify::new());
        let inner = Arc::new(Inner {
            db,
            waiting: Mutex::default(),
            writing: tokio::sync::Mutex::default(),
            wake: Arc::clone(&wake),
        });
        tokio::spawn(write_on(Arc::downgrade(&inner), wake));
        Self(inner)
    }

    /// An operation begins now, as a part of the current one where there is one.
    pub fn begin(&self, operation: &'static str, subject: Subject) -> Stages {
        Stages::begin_in(Some(self.clone()), operation, subject)
    }

    /// Keeps an operation that is over. Returns at once.
    pub fn keep(&self, operation: OperationTiming) {
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MAX_WAITING {
            waiting.remove(0);
        }
        waiting.push(operation);
        drop(waiting);
        self.0.wake.notify_one();
    }

    /// Writes what waits.
    pub async fn flush(&self) {
        self.0.write().await;
    }

    /// The newest `limit` operations that fit, oldest first.
    pub async fn read(&self, filter: OperationFilter, limit: u32) -> Result<Vec<OperationTiming>, DbError> {
        self.flush().await;
        self.0.db.call(move |db| db.operations(&filter, limit)).await
    }
}

impl Inner {
    async fn write(&self) {
        let _turn = self.writing.lock().await;
        let batch = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        if batch.is_empty() {
            return;
        }
        if let Err(error) = self.db.call(move |db| db.put_operations(&batch)).await {
            tracing::warn!(%error, "cannot keep the timings of operations");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

async fn write_on(log: Weak<Inner>, wake: Arc<Notify>) {
    loop {
        wake.notified().await;
        match log.upgrade() {
            Some(log) => log.write().await,
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::OperationOutcome;

    #[tokio::test]
    async fn what_is_over_is_there_for_whoever_asks_next() {
        let dir = tempfile::tempdir().unwrap();
        let log = OperationLog::new(Db::open(dir.path()).unwrap());
        let mut stages = log.begin("pull", Subject::named("debian"));
        stages.stage("fetch", async { Ok::<_, ()>(()) }).await.unwrap();
        let began = log.read(OperationFilter::default(), 10).await.unwrap();
        assert_eq!(began, [], "it is not over yet");
        drop(stages);
        let mut failed = log.begin("prepare", Subject::named("debian"));
        failed
            .stage("base", async { Err::<(), _>(()) })
            .await
            .unwrap_err();
        drop(failed);
        let found = log.read(OperationFilter::default(), 10).await.unwrap();
        let seen: Vec<_> = found
            .iter()
            .map(|operation| (operation.kind.as_str(), operation.outcome, operation.stages.len()))
            .collect();
        use OperationOutcome as O;
        assert_eq!(seen, [("pull", O::Done, 1), ("prepare", O::Failed, 1)]);
        assert!(found[0].duration_us >= found[0].stages[0].end_us());
        assert_eq!(found[0].subject, "debian");
    }

    #[tokio::test]
    async fn it_is_written_without_anybody_asking() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let log = OperationLog::new(db.clone());
        drop(log.begin("pull", Subject::named("debian")));
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while db.operations(&OperationFilter::default(), 1).unwrap().is_empty() {
            assert!(std::time::Instant::now() < deadline, "nothing was written");
            tokio::task::yield_now().await;
        }
    }
}
