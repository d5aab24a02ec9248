//! The database: one SQLite file that says what should be.
//!
//! WAL, `synchronous=FULL`, foreign keys, a busy timeout. The schema's version is `user_version`; before a migration
//! the file is copied beside itself, and a file from a newer version is refused. Calls are synchronous and take
//! well under a millisecond plus one fsync; async callers go through [`Db::call`].

mod base_rows;
mod event_rows;
mod image_rows;
mod network_rows;
mod object_rows;
mod operation_rows;
mod vm_rows;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use offshoot_model::{ErrorKind, Explain};
use rusqlite::Connection;
use rusqlite_migration::{M, Migrations};

pub use base_rows::{BaseChanges, BaseRow};
pub use event_rows::{EVENTS_KEPT, EventFilter, NewEvent};
pub use image_rows::ImageRow;
pub use network_rows::{AddressRow, TakenAddresses};
pub use object_rows::ObjectRow;
pub use operation_rows::{OPERATIONS_KEPT, OPERATIONS_KEPT_OF_A_KIND, OperationFilter};
pub use vm_rows::{VmRow, VmRunUpdate, VmWrite};

const MIGRATIONS: [M<'static>; 6] = [
    M::up(include_str!("../../migrations/0001-start.sql")),
    M::up(include_str!("../../migrations/0002-operations.sql")),
    M::up(include_str!("../../migrations/0003-networks.sql")),
    M::up(include_str!("../../migrations/0004-bases.sql")),
    M::up(include_str!("../../migrations/0005-timings.sql")),
    M::up(include_str!("../../migrations/0006-boot.sql")),
];

/// How long a call waits for another process's transaction before it fails: `offshoot` never holds one longer than
/// an fsync, so five seconds mean a stuck disk or a stuck outsider.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the database could not be opened or asked.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// It could not be opened.
    #[error("cannot open the database {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// SQLite's words.
        #[source]
        source: rusqlite::Error,
    },
    /// The file could not be made.
    #[error("cannot make the database {}", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It was written by a newer version.
    #[error("the database {} has schema {found}, newer than {known}, the newest this version knows", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its `user_version`.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The copy before a migration could not be made.
    #[error("cannot copy the database to {} before migrating it", path.display())]
    BackUp {
        /// The copy.
        path: PathBuf,
        /// SQLite's words.
        #[source]
        source: rusqlite::Error,
    },
    /// A migration failed; the old file is as it was.
    #[error("cannot migrate the database {}", path.display())]
    Migrate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite_migration::Error,
    },
    /// A statement failed.
    #[error("cannot {what} in the database")]
    Statement {
        /// What was being done.
        what: &'static str,
        /// SQLite's words.
        #[source]
        source: rusqlite::Error,
    },
    /// A row holds what this version cannot read.
    #[error("the database holds a {what} that cannot be read")]
    Row {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The name is taken.
    #[error("a VM named `{name}` exists already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The thread that runs statements was cut off: the daemon is shutting down.
    #[error("the database is closed")]
    Closed,
}

impl Explain for DbError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NameTaken { .. } => ErrorKind::Conflict,
            Self::Newer { .. } => ErrorKind::NotPossible,
            Self::Statement { source, .. } if is_full(source) => ErrorKind::NoSpace,
            _ => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::NameTaken { name } => {
                vec![format!(
                    "choose another name, or remove that VM with `offshoot rm {name}`"
                )]
            }
            Self::Newer { .. } => vec!["use the newer offshootd, or another --data-dir".into()],
            Self::Statement { source, .. } if is_full(source) => {
                vec!["free some space in the data directory, for example with `offshoot image rm`".into()]
            }
            _ => Vec::new(),
        }
    }
}

/// Makes the file unless it is there, for us alone: VMMs pass through the folder and must not read it.
fn make_private(path: &Path) -> Result<(), DbError> {
    let made = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path);
    made.map(drop).map_err(|source| DbError::Create {
        path: path.to_owned(),
        source,
    })
}

fn is_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
}

/// The open database. Cheap to clone.
#[derive(Clone)]
pub struct Db {
    connection: Arc<Mutex<Connection>>,
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Db")
    }
}

impl Db {
    /// Opens or makes `<data_dir>/offshoot.db` and brings its schema up to date.
    pub fn open(data_dir: &Path) -> Result<Self, DbError> {
        Self::open_with(&data_dir.join("offshoot.db"), &MIGRATIONS)
    }

    fn open_with(path: &Path, migrations: &[M<'static>]) -> Result<Self, DbError> {
        let open_error = |source| DbError::Open {
            path: path.to_owned(),
            source,
        };
        // SQLite gives its log and its lock file the mode of this one.
        make_private(path)?;
        let mut connection = Connection::open(path).map_err(open_error)?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(open_error)?;
        let version: i64 = connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(open_error)?;
        let known = migrations.len() as i64;
        if version > known {
            return Err(DbError::Newer {
                path: path.to_owned(),
                found: version,
                known,
            });
        }
        for (pragma, value) in [
            ("journal_mode", "WAL"),
            ("synchronous", "FULL"),
            ("foreign_keys", "ON"),
        ] {
            connection
                .pragma_update(None, pragma, value)
                .map_err(open_error)?;
        }
        let migrations = Migrations::from_slice(migrations);
        for from in version..known {
            // Before each one, so that whatever goes wrong can be gone back from. Nothing is lost with an empty file.
            if from > 0 {
                let copy = path.with_extension(format!("db.v{from}"));
                make_private(&copy)?;
                connection
                    .backup("main", &copy, None)
                    .map_err(|source| DbError::BackUp {
                        path: copy.clone(),
                        source,
                    })?;
            }
            migrations
                .to_version(&mut connection, usize::try_from(from + 1).unwrap_or(usize::MAX))
                .map_err(|source| DbError::Migrate {
                    path: path.to_owned(),
                    source,
                })?;
        }
        Ok(Self {
            connection: Arc::new(Mutex::new(connection)),
        })
    }

    /// Runs `work` on a thread that may block, and gives its answer. Once begun it runs to its end, also when the
    /// caller is dropped: a transaction is never cut in half.
    pub async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Db) -> Result<T, DbError> + Send + 'static,
    ) -> Result<T, DbError> {
        let db = self.clone();
        tokio::task::spawn_blocking(move || work(&db))
            .await
            .map_err(|_| DbError::Closed)?
    }

    /// What SQLite's `integrity_check` says: `ok`, or what is wrong.
    pub fn integrity(&self) -> Result<String, DbError> {
        self.with("check the integrity", |connection| {
            connection.pragma_query_value(None, "integrity_check", |row| row.get(0))
        })
    }

    /// Writes the log into the database file and cuts the log off, as far as nobody else reads it.
    pub fn checkpoint(&self) -> Result<(), DbError> {
        self.with("write the log back", |connection| {
            connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        })
    }

    fn with<T>(
        &self,
        what: &'static str,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<T, DbError> {
        // A panic while the lock was held rolled its transaction back; the connection is sound.
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        work(&mut connection).map_err(|source| DbError::Statement { what, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_schema_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        drop(Db::open(dir.path()).unwrap());
        let path = dir.path().join("offshoot.db");
        Connection::open(&path)
            .unwrap()
            .pragma_update(None, "user_version", 99)
            .unwrap();
        assert!(matches!(
            Db::open(dir.path()),
            Err(DbError::Newer { found: 99, .. })
        ));
    }

    #[test]
    fn a_migration_keeps_a_copy_of_what_was() {
        let dir = tempfile::tempdir().unwrap();
        drop(Db::open(dir.path()).unwrap());
        let path = dir.path().join("offshoot.db");
        let mut longer = MIGRATIONS.to_vec();
        longer.push(M::up("CREATE TABLE later (x INTEGER) STRICT;"));
        longer.push(M::up("CREATE TABLE latest (x INTEGER) STRICT;"));
        let db = Db::open_with(&path, &longer).unwrap();
        assert_eq!(db.integrity().unwrap(), "ok");
        for version in MIGRATIONS.len()..longer.len() {
            let copy = dir.path().join(format!("offshoot.db.v{version}"));
            let found: i64 = Connection::open(copy)
                .unwrap()
                .pragma_query_value(None, "user_version", |row| row.get(0))
                .unwrap();
            assert_eq!(found, version as i64);
            let copy = dir.path().join(format!("offshoot.db.v{version}"));
            assert_eq!(
                std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(copy).unwrap().permissions())
                    & 0o777,
                0o600
            );
        }
    }

    #[test]
    fn a_migration_that_fails_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(Db::open(dir.path()).unwrap());
        let path = dir.path().join("offshoot.db");
        let mut bad = MIGRATIONS.to_vec();
        bad.push(M::up(
            "CREATE TABLE later (x INTEGER) STRICT; CREATE TABLE vms (x INTEGER);",
        ));
        assert!(matches!(Db::open_with(&path, &bad), Err(DbError::Migrate { .. })));
        assert_eq!(Db::open(dir.path()).unwrap().integrity().unwrap(), "ok");
    }

    #[test]
    fn the_file_survives_being_opened_twice() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (Db::open(dir.path()).unwrap(), Db::open(dir.path()).unwrap());
        assert_eq!(one.integrity().unwrap(), "ok");
        assert_eq!(two.integrity().unwrap(), "ok");
    }
}
