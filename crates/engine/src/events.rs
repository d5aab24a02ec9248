//! What happened, as a history that can be followed.
//!
//! Events are written in the transaction of the change they tell of ([`offshoot_store::db::VmWrite`]); the database is
//! the one source. A follower reads on from the number it has, so it misses nothing, sees nothing twice, and cannot
//! hold anybody up.

use offshoot_model::Event;
use offshoot_store::db::{Db, DbError, EventFilter, NewEvent};
use tokio::sync::watch;

use crate::measure;

/// How many events a follower reads at once.
const BATCH: u32 = 256;

/// The history of all VMs. Cheap to clone.
#[derive(Clone)]
pub struct EventLog {
    db: Db,
    /// The highest number that was announced.
    newest: std::sync::Arc<watch::Sender<u64>>,
}

impl EventLog {
    /// The history in `db`.
    pub fn new(db: Db) -> Self {
        Self {
            db,
            newest: std::sync::Arc::new(watch::Sender::new(0)),
        }
    }

    /// Says that these were written.
    pub(crate) fn announce(&self, events: &[Event]) {
        for event in events {
            measure::event(event.action);
            tracing::info!(
                op = event.operation.as_ref().map(tracing::field::display),
                vm = event.vm_name.as_ref().map(tracing::field::display),
                id = event.vm_id.as_ref().map(tracing::field::display),
                reason = event.reason,
                "{}",
                event.action
            );
        }
        if let Some(last) = events.last() {
            self.newest.send_if_modified(|newest| {
                let higher = last.seq > *newest;
                *newest = (*newest).max(last.seq);
                higher
            });
        }
    }

    /// Writes and announces an event that goes with no change of a VM's row.
    pub async fn record(&self, event: NewEvent) -> Result<(), DbError> {
        let written = self.db.call(move |db| db.put_event(&event)).await?;
        self.announce(&[written]);
        Ok(())
    }

    /// The number of the newest event; following from it shows only what happens from now on.
    pub async fn last(&self) -> Result<u64, DbError> {
        self.db.call(Db::last_event).await
    }

    /// Follows the history from `filter` on.
    pub fn follow(&self, filter: EventFilter) -> EventFollower {
        EventFollower {
            db: self.db.clone(),
            newest: self.newest.subscribe(),
            filter,
        }
    }
}

/// A reader of the history.
pub struct EventFollower {
    db: Db,
    newest: watch::Receiver<u64>,
    filter: EventFilter,
}

impl EventFollower {
    /// The next events that are there already, oldest first; none when all were read.
    pub async fn ready(&mut self) -> Result<Vec<Event>, DbError> {
        // Before the look, so that what comes after it wakes `next`.
        self.newest.mark_unchanged();
        let filter = self.filter.clone();
        let events = self.db.call(move |db| db.events(&filter, BATCH)).await?;
        if let Some(last) = events.last() {
            self.filter.after_seq = last.seq;
        }
        Ok(events)
    }

    /// The next events; waits until there is one. Safe to drop.
    pub async fn next(&mut self) -> Result<Vec<Event>, DbError> {
        loop {
            let events = self.ready().await?;
            if !events.is_empty() {
                return Ok(events);
            }
            if self.newest.changed().await.is_err() {
                return Err(DbError::Closed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::EventAction;

    fn event(reason: &str) -> NewEvent {
        NewEvent {
            time_ms: 1,
            action: EventAction::Repair,
            vm_id: None,
            vm_name: None,
            operation: None,
            reason: reason.into(),
        }
    }

    #[tokio::test]
    async fn a_follower_misses_nothing_and_waits_for_more() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::new(Db::open(dir.path()).unwrap());
        log.record(event("before")).await.unwrap();
        let mut from_now = log.follow(EventFilter {
            after_seq: log.last().await.unwrap(),
            ..EventFilter::default()
        });
        let mut all = log.follow(EventFilter::default());
        assert_eq!(all.next().await.unwrap()[0].reason, "before");
        assert_eq!(all.ready().await.unwrap(), []);
        let waiting = tokio::spawn(async move { all.next().await.unwrap() });
        tokio::task::yield_now().await;
        for n in 0..300 {
            log.record(event(&n.to_string())).await.unwrap();
        }
        assert_eq!(waiting.await.unwrap()[0].reason, "0");
        let mut seen = Vec::new();
        while seen.len() < 300 {
            seen.extend(
                from_now
                    .next()
                    .await
                    .unwrap()
                    .into_iter()
                    .map(|event| event.reason),
            );
        }
        assert_eq!(seen, (0..300).map(|n| n.to_string()).collect::<Vec<_>>());
    }
}
