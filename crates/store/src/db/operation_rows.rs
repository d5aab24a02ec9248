//! Where the time of operations went: one row an operation, one a stage. Bounded; a VM's last operations stay longer than
//! those of a daemon with many VMs would let them.

use offshoot_model::{OperationId, OperationOutcome, OperationTiming, StageOutcome, StageTiming, VmId};
use rusqlite::{Connection, Transaction, params};

use super::vm_rows::{parse_word, unreadable, word};
use super::{Db, DbError};

/// So many operations are kept in all: 20 MB at most, of which a start with its forty stages takes four KiB.
pub const OPERATIONS_KEPT: u64 = 5000;
/// So many of one kind are kept of one VM: a VM that is started again and again shall not push out the others.
pub const OPERATIONS_KEPT_OF_A_KIND: u32 = 4;

/// Which operations to read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperationFilter {
    /// Only those on this VM.
    pub vm_id: Option<VmId>,
    /// Only those of this kind.
    pub kind: Option<String>,
    /// Only those with this id.
    pub operation: Option<OperationId>,
}

/// An operation as SQLite gives it, before anything is believed.
type RawOperation = (i64, String, String, Option<String>, String, i64, i64, String);

/// A stage as SQLite gives it.
type RawStage = (String, Option<String>, i64, i64, String);

fn insert(transaction: &Transaction<'_>, operation: &OperationTiming) -> rusqlite::Result<()> {
    let vm_id = operation.vm_id.as_ref().map(VmId::as_str);
    transaction
        .prepare_cached(
            "INSERT INTO operations (operation, kind, vm_id, subject, began_us, duration_us, outcome)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            operation.operation.as_str(),
            operation.kind,
            vm_id,
            operation.subject,
            operation.began_us.cast_signed(),
            operation.duration_us.cast_signed(),
            operation.outcome.as_str(),
        ])?;
    let seq = transaction.last_insert_rowid();
    for (position, stage) in operation.stages.iter().enumerate() {
        transaction
            .prepare_cached("INSERT INTO stages VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?
            .execute(params![
                seq,
                position as i64,
                stage.stage,
                stage.within,
                stage.start_us.cast_signed(),
                stage.duration_us.cast_signed(),
                word(&stage.outcome),
            ])?;
    }
    if vm_id.is_some() {
        transaction
            .prepare_cached(
                "DELETE FROM operations WHERE vm_id = ?1 AND kind = ?2 AND seq <= (
                     SELECT seq FROM operations WHERE vm_id = ?1 AND kind = ?2 ORDER BY seq DESC LIMIT 1 OFFSET ?3)",
            )?
            .execute(params![vm_id, operation.kind, OPERATIONS_KEPT_OF_A_KIND])?;
    }
    transaction
        .prepare_cached("DELETE FROM operations WHERE seq <= ?1")?
        .execute([seq - OPERATIONS_KEPT.cast_signed()])?;
    Ok(())
}

fn stages_of(connection: &Connection, seq: i64) -> rusqlite::Result<Vec<RawStage>> {
    connection
        .prepare_cached(
            "SELECT stage, within, start_us, duration_us, outcome FROM stages WHERE seq = ?1 ORDER BY position",
        )?
        .query_map([seq], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?))
        })?
        .collect()
}

fn parse(raw: RawOperation, stages: Vec<RawStage>) -> Result<OperationTiming, DbError> {
    let (_, operation, kind, vm_id, subject, began_us, duration_us, outcome) = raw;
    let stages = stages
        .into_iter()
        .map(|(stage, within, start_us, duration_us, outcome)| {
            let outcome: StageOutcome = parse_word(&outcome)?;
            Ok(StageTiming {
                operation: kind.clone(),
                stage,
                within,
                start_us: start_us.unsigned_abs(),
                duration_us: duration_us.unsigned_abs(),
                outcome,
            })
        })
        .collect::<Result<_, DbError>>()?;
    Ok(OperationTiming {
        operation: operation.parse().map_err(unreadable)?,
        vm_id: vm_id.map(|id| id.parse().map_err(unreadable)).transpose()?,
        subject,
        began_us: began_us.unsigned_abs(),
        duration_us: duration_us.unsigned_abs(),
        outcome: parse_word::<OperationOutcome>(&outcome)?,
        stages,
        kind,
    })
}

impl Db {
    /// Writes operations that are over, all or none, and forgets the oldest.
    pub fn put_operations(&self, operations: &[OperationTiming]) -> Result<(), DbError> {
        self.with("write timings", |connection| {
            let transaction = connection.transaction()?;
            for operation in operations {
                insert(&transaction, operation)?;
            }
            transaction.commit()
        })
    }

    /// The newest `limit` operations that fit, oldest first.
    pub fn operations(&self, filter: &OperationFilter, limit: u32) -> Result<Vec<OperationTiming>, DbError> {
        let mut rows = self.with("read timings", |connection| {
            let rows: Vec<RawOperation> = connection
                .prepare_cached(
                    "SELECT seq, operation, kind, vm_id, subject, began_us, duration_us, outcome FROM operations
                     WHERE (?1 IS NULL OR vm_id = ?1) AND (?2 IS NULL OR kind = ?2)
                       AND (?3 IS NULL OR operation = ?3)
                     ORDER BY seq DESC LIMIT ?4",
                )?
                .query_map(
                    params![
                        filter.vm_id.as_ref().map(VmId::as_str),
                        filter.kind,
                        filter.operation.as_ref().map(OperationId::as_str),
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
                            row.get(7)?,
                        ))
                    },
                )?
                .collect::<Result<_, _>>()?;
            rows.into_iter()
                .map(|row| Ok((stages_of(connection, row.0)?, row)))
                .collect::<rusqlite::Result<Vec<_>>>()
        })?;
        rows.reverse();
        rows.into_iter().map(|(stages, row)| parse(row, stages)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(n: u64, vm: Option<u8>, kind: &str) -> OperationTiming {
        let stage = |stage: &str, within: Option<&str>| StageTiming {
            operation: kind.into(),
            stage: stage.into(),
            within: within.map(str::to_owned),
            start_us: 1,
            duration_us: 2,
            outcome: StageOutcome::Undone,
        };
        OperationTiming {
            operation: OperationId::from_bytes(&[u8::try_from(n % 256).unwrap(); 4]),
            kind: kind.into(),
            vm_id: vm.map(|vm| VmId::from_bytes(&[vm; 6])),
            subject: "web".into(),
            began_us: n,
            duration_us: 5,
            outcome: OperationOutcome::Failed,
            stages: vec![
                stage("agent.after_boot", None),
                stage("guest.boot", Some("agent.after_boot")),
            ],
        }
    }

    #[test]
    fn operations_come_back_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let all = [
            operation(1, Some(1), "create"),
            operation(2, Some(1), "start"),
            operation(3, None, "pull"),
            operation(4, Some(2), "create"),
        ];
        db.put_operations(&all).unwrap();
        let any = OperationFilter::default;
        let check = |filter: OperationFilter, limit, expected: &[OperationTiming]| {
            assert_eq!(db.operations(&filter, limit).unwrap(), expected, "{filter:?}");
        };
        check(any(), 10, &all);
        check(any(), 2, &all[2..]);
        let of_one = OperationFilter {
            vm_id: all[0].vm_id.clone(),
            ..any()
        };
        check(of_one, 10, &all[..2]);
        let pulls = OperationFilter {
            kind: Some("pull".into()),
            ..any()
        };
        check(pulls, 10, &all[2..3]);
        let by_id = OperationFilter {
            operation: Some(all[3].operation.clone()),
            ..any()
        };
        check(by_id, 10, &all[3..]);
    }

    #[test]
    fn they_are_bounded_for_each_vm_and_in_all() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let kept = u64::from(OPERATIONS_KEPT_OF_A_KIND);
        let mut many = vec![operation(0, Some(1), "create")];
        many.extend((1..=kept + 3).map(|n| operation(n, Some(1), "start")));
        db.put_operations(&many).unwrap();
        let found = db.operations(&OperationFilter::default(), 100).unwrap();
        let began: Vec<_> = found.iter().map(|operation| operation.began_us).collect();
        assert_eq!(began, [0, 4, 5, 6, 7], "the creation stays, and the last starts");

        let many: Vec<_> = (0..OPERATIONS_KEPT + 10)
            .map(|n| operation(n, None, "pull"))
            .collect();
        db.put_operations(&many).unwrap();
        let found = db.operations(&OperationFilter::default(), u32::MAX).unwrap();
        assert_eq!(found.len() as u64, OPERATIONS_KEPT);
        assert_eq!(found[0].began_us, 10, "the oldest went");
        let stages = db
            .with("count", |connection| {
                connection.query_row("SELECT count(*) FROM stages", [], |row| row.get::<_, i64>(0))
            })
            .unwrap();
        assert_eq!(
            stages.unsigned_abs(),
            2 * OPERATIONS_KEPT,
            "and their stages with them"
        );
    }
}
