//! The history: what happened to which VM. Bounded; written in one transaction with what it tells of.

use offshoot_model::{Event, EventAction, OperationId, VmId, VmName};
use rusqlite::{Transaction, params};

use super::vm_rows::{parse_word, unreadable};
use super::{Db, DbError};

/// So many events are kept: about 2 MB, weeks of a busy host.
pub const EVENTS_KEPT: u64 = 20_000;

/// An event that is about to be written; the database gives it its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewEvent {
    /// See [`Event::time_ms`].
    pub time_ms: u64,
    /// See [`Event::action`].
    pub action: EventAction,
    /// See [`Event::vm_id`].
    pub vm_id: Option<VmId>,
    /// See [`Event::vm_name`].
    pub vm_name: Option<VmName>,
    /// See [`Event::operation`].
    pub operation: Option<OperationId>,
    /// See [`Event::reason`].
    pub reason: String,
}

/// Which events to read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Only those with a higher number.
    pub after_seq: u64,
    /// Only those at or after this time, milliseconds since the epoch.
    pub since_ms: u64,
    /// Only those before this time.
    pub until_ms: Option<u64>,
}

/// An event as SQLite gives it, before anything is believed.
type RawEvent = (
    i64,
    i64,
    String,
    Option<String>,
    Option<String>,
    Option<String>,
    String,
);

fn parse(raw: RawEvent) -> Result<Event, DbError> {
    let (seq, time_ms, action, vm_id, vm_name, operation, reason) = raw;
    Ok(Event {
        seq: seq.unsigned_abs(),
        time_ms: time_ms.unsigned_abs(),
        action: parse_word(&action)?,
        vm_id: vm_id.map(|id| id.parse().map_err(unreadable)).transpose()?,
        vm_name: vm_name.map(|name| name.parse().map_err(unreadable)).transpose()?,
        operation: operation.map(|id| id.parse().map_err(unreadable)).transpose()?,
        reason,
    })
}

/// Writes events within a transaction and gives them their numbers.
pub(super) fn insert(transaction: &Transaction<'_>, events: &[NewEvent]) -> rusqlite::Result<Vec<Event>> {
    let mut written = Vec::with_capacity(events.len());
    for event in events {
        transaction
            .prepare_cached(
                "INSERT INTO events (time_ms, action, vm_id, vm_name, operation, reason)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![
                event.time_ms as i64,
                event.action.as_str(),
                event.vm_id.as_ref().map(VmId::as_str),
                event.vm_name.as_ref().map(VmName::as_str),
                event.operation.as_ref().map(OperationId::as_str),
                event.reason,
            ])?;
        let seq = transaction.last_insert_rowid().unsigned_abs();
        written.push(Event {
            seq,
            time_ms: event.time_ms,
            action: event.action,
            vm_id: event.vm_id.clone(),
            vm_name: event.vm_name.clone(),
            operation: event.operation.clone(),
            reason: event.reason.clone(),
        });
    }
    if let Some(last) = written.last() {
        transaction
            .prepare_cached("DELETE FROM events WHERE seq <= ?1")?
            .execute([last.seq.saturating_sub(EVENTS_KEPT) as i64])?;
    }
    Ok(written)
}

impl Db {
    /// Writes one event that goes with no change of a row.
    pub fn put_event(&self, event: &NewEvent) -> Result<Event, DbError> {
        let written = self.with("write an event", |connection| {
            let transaction = connection.transaction()?;
            let written = insert(&transaction, std::slice::from_ref(event))?;
            transaction.commit()?;
            Ok(written)
        })?;
        let mut written = written;
        Ok(written.remove(0))
    }

    /// The oldest `limit` events that fit, oldest first.
    pub fn events(&self, filter: &EventFilter, limit: u32) -> Result<Vec<Event>, DbError> {
        let until = filter.until_ms.map_or(i64::MAX, u64::cast_signed);
        let rows: Vec<RawEvent> = self.with("read events", |connection| {
            connection
                .prepare_cached(
                    "SELECT seq, time_ms, action, vm_id, vm_name, operation, reason FROM events
                     WHERE seq > ?1 AND time_ms >= ?2 AND time_ms < ?3 ORDER BY seq LIMIT ?4",
                )?
                .query_map(
                    params![
                        filter.after_seq.cast_signed(),
                        filter.since_ms.cast_signed(),
                        until,
                        limit
                    ],
                    |row| {
                        Ok((
                            row.get(0)?,
                            row.get(1)?,
                            row.get(2)?,
                            row.get(3)?,
                            row.get(4)?,
                            row.get(5)?,
                            row.get(6)?,
                        ))
                    },
                )?
                .collect()
        })?;
        rows.into_iter().map(parse).collect()
    }

    /// The number of the newest event; 0 when there was none.
    pub fn last_event(&self) -> Result<u64, DbError> {
        self.with("read events", |connection| {
            connection.query_row("SELECT coalesce(max(seq), 0) FROM events", [], |row| {
                row.get::<_, i64>(0).map(i64::unsigned_abs)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(time_ms: u64, action: EventAction) -> NewEvent {
        NewEvent {
            time_ms,
            action,
            vm_id: Some(VmId::from_bytes(&[1; 6])),
            vm_name: Some("web".parse().unwrap()),
            operation: Some(OperationId::from_bytes(&[2; 4])),
            reason: "because".into(),
        }
    }

    #[test]
    fn events_come_back_in_order_and_by_time() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        assert_eq!(db.last_event().unwrap(), 0);
        let first = db.put_event(&event(10, EventAction::Create)).unwrap();
        // A clock that was set back does not reorder what happened.
        let second = db.put_event(&event(5, EventAction::Start)).unwrap();
        assert!(second.seq > first.seq);
        let all = db.events(&EventFilter::default(), 10).unwrap();
        assert_eq!(all, [first.clone(), second.clone()]);
        let check = |filter: EventFilter, expected: &Event| {
            let found = db.events(&filter, 10).unwrap();
            assert_eq!(found, std::slice::from_ref(expected), "{filter:?}");
        };
        let all = EventFilter::default;
        check(
            EventFilter {
                after_seq: first.seq,
                ..all()
            },
            &second,
        );
        check(EventFilter { since_ms: 6, ..all() }, &first);
        check(
            EventFilter {
                until_ms: Some(10),
                ..all()
            },
            &second,
        );
        assert_eq!(db.events(&EventFilter::default(), 1).unwrap(), [first]);
        assert_eq!(db.last_event().unwrap(), second.seq);
    }

    #[test]
    fn the_history_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let many = vec![event(1, EventAction::Pause); usize::try_from(EVENTS_KEPT).unwrap() + 7];
        db.with("fill", |connection| {
            let transaction = connection.transaction()?;
            insert(&transaction, &many)?;
            transaction.commit()
        })
        .unwrap();
        let kept = db.events(&EventFilter::default(), u32::MAX).unwrap();
        assert_eq!(kept.len() as u64, EVENTS_KEPT);
        assert_eq!(kept[0].seq, 8, "the oldest went");
    }
}
