//! The database: whether it is sound, and what lies beside it.

use std::path::{Path, PathBuf};

use offshoot_model::{ByteSize, Finding, Fix, Severity};
use offshoot_store::db::{Db, DbError};

const PART: &str = "database";
/// The database file in the data directory.
const FILE: &str = "offshoot.db";
/// SQLite writes its log back after 4 MiB; when it is so much longer, something kept it from doing so for long.
const LONG_LOG: u64 = 64 << 20;

/// Integrity, the length of its log, and the copies from before migrations.
pub(super) async fn check(db: &Db, data_dir: &Path) -> Vec<Finding> {
    let integrity = db.call(Db::integrity).await;
    let backups = backups(data_dir);
    let log = log_bytes(data_dir);
    let mut findings = vec![judge_integrity(integrity, &backups, data_dir), judge_log(log)];
    if let Some(newest) = backups.last() {
        let message = format!(
            "{} of an older database lie beside it, the newest at {}",
            match backups.len() {
                1 => "1 copy".to_owned(),
                count => format!("{count} copies"),
            },
            newest.display()
        );
        findings.push(Finding::ok(PART, message).id("database-copies"));
    }
    findings
}

/// How long SQLite's log is.
pub(super) fn log_bytes(data_dir: &Path) -> u64 {
    std::fs::metadata(data_dir.join(format!("{FILE}-wal"))).map_or(0, |meta| meta.len())
}

/// Every file that SQLite or a migration made of the database.
pub(super) fn files(data_dir: &Path) -> Vec<PathBuf> {
    let plain = ["", "-wal", "-shm"].map(|end| data_dir.join(format!("{FILE}{end}")));
    plain.into_iter().chain(backups(data_dir)).collect()
}

/// The copies from before migrations (`offshoot.db.v3`), the oldest first.
fn backups(data_dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(data_dir).into_iter().flatten().flatten();
    let version = |path: &Path| -> Option<u64> {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix(FILE)?.strip_prefix(".v")?.parse().ok()
    };
    let mut found: Vec<_> = entries
        .filter_map(|entry| Some((version(&entry.path())?, entry.path())))
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

fn judge_integrity(integrity: Result<String, DbError>, backups: &[PathBuf], data_dir: &Path) -> Finding {
    let wrong = match integrity {
        Ok(said) if said == "ok" => return Finding::ok(PART, "the database is sound").id("database"),
        Ok(said) => format!("the database is damaged: {said}"),
        Err(error) => crate::error::chain(&error),
    };
    let file = data_dir.join(FILE);
    let hint = match backups.last() {
        Some(backup) => format!(
            "stop offshootd, keep a copy of {}, then put {} in its place",
            file.display(),
            backup.display()
        ),
        None => format!(
            "stop offshootd, keep a copy of {0}, then `sqlite3 {0} .recover | sqlite3 new.db` and put new.db in its place",
            file.display()
        ),
    };
    Finding::new(PART, Severity::Failure, wrong, hint)
        .id("database-damaged")
        .cost("what VMs and images there are may be forgotten or wrong; do not create more")
}

fn judge_log(bytes: u64) -> Finding {
    let size = ByteSize::from_bytes(bytes);
    if bytes < LONG_LOG {
        return Finding::ok(PART, format!("the database's log takes {size}")).id("database-log");
    }
    Finding::new(
        PART,
        Severity::Warning,
        format!("the database's log has grown to {size}"),
        "offshoot doctor --fix",
    )
    .id("database-log-long")
    .cost("disk space, and a slower start of offshootd")
    .fix(Fix::CheckpointDatabase)
}

/// Writes the log into the database and cuts it off; gives its length before and after.
pub(super) async fn checkpoint(db: &Db, data_dir: &Path) -> Result<(u64, u64), DbError> {
    let before = log_bytes(data_dir);
    db.call(Db::checkpoint).await?;
    Ok((before, log_bytes(data_dir)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_a_failure_that_names_the_newest_copy() {
        let data = Path::new("/data");
        let copies = [
            PathBuf::from("/data/offshoot.db.v2"),
            "/data/offshoot.db.v10".into(),
        ];
        let well = judge_integrity(Ok("ok".into()), &copies, data);
        assert_eq!((well.severity, well.id.as_str()), (Severity::Ok, "database"));
        let bad = judge_integrity(Ok("row 3 missing from index".into()), &copies, data);
        assert_eq!(
            (bad.severity, bad.id.as_str()),
            (Severity::Failure, "database-damaged")
        );
        assert!(
            bad.message.contains("row 3") && bad.hint.contains("offshoot.db.v10"),
            "{bad:?}"
        );
        let closed = judge_integrity(Err(DbError::Closed), &[], data);
        assert_eq!(closed.severity, Severity::Failure);
        assert!(closed.hint.contains(".recover") && !closed.cost.is_empty());
    }

    #[test]
    fn only_a_log_that_grew_for_long_is_told() {
        assert_eq!(judge_log(4 << 20).severity, Severity::Ok);
        let long = judge_log(LONG_LOG);
        assert_eq!(
            (long.severity, long.fix),
            (Severity::Warning, Some(Fix::CheckpointDatabase))
        );
    }

    #[test]
    fn copies_are_ordered_by_version() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "offshoot.db",
            "offshoot.db.v10",
            "offshoot.db.v9",
            "offshoot.db.vx",
            "other.v1",
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let names = ["offshoot.db.v9", "offshoot.db.v10"].map(|name| dir.path().join(name));
        assert_eq!(backups(dir.path()), names);
    }

    #[tokio::test]
    async fn a_checkpoint_cuts_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        assert!(log_bytes(dir.path()) > 0, "the first migration is in the log");
        let (before, after) = checkpoint(&db, dir.path()).await.unwrap();
        assert!(before > 0 && after == 0, "{before} {after}");
        let found = check(&db, dir.path()).await;
        assert!(
            found.iter().all(|found| found.severity == Severity::Ok),
            "{found:?}"
        );
    }
}
