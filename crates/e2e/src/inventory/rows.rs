//! The daemon's database, read from outside while the daemon has it open.

use std::path::Path;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Row};

/// Tables that outlive what they tell of: the history, where the time went, networks, which stay when their last VM is
/// gone, and what bases were found when it was looked, which is at times of the daemon's own.
const HISTORY: [&str; 5] = ["bases", "events", "networks", "operations", "stages"];

/// A connection that changes nothing.
pub struct Database(Connection);

impl Database {
    pub fn open(data: &Path) -> Self {
        let path = data.join("offshoot.db");
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&path, flags);
        Self(connection.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    /// The ids of every VM that any row speaks of, the history's too.
    pub fn vm_ids(&self) -> Vec<String> {
        let mut ids = Vec::new();
        for table in self.tables() {
            if let Some(column) = self.id_column(&table) {
                let query = format!("SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL");
                ids.extend(self.rows(&query));
            }
        }
        ids.sort();
        ids.dedup();
        ids
    }

    /// The rows that speak of VMs, without the history.
    pub fn rows_of_vms(&self) -> Vec<String> {
        let mut tables = self.present();
        tables.retain(|table| self.id_column(table).is_some());
        self.rows_in(&tables)
    }

    /// Every row of every table, without the history.
    pub fn all_rows(&self) -> Vec<String> {
        self.rows_in(&self.present())
    }

    /// What happened to a VM, oldest first: action and reason.
    pub fn history(&self, vm_id: &str) -> Vec<String> {
        self.rows(&format!(
            "SELECT action, reason FROM events WHERE vm_id = '{vm_id}' ORDER BY seq"
        ))
    }

    /// Every stage that is kept: operation's id, kind, stage, start and time in microseconds.
    pub fn stages(&self) -> Vec<(String, String, String, u64, u64)> {
        let query = "SELECT operation, kind, stage, start_us, stages.duration_us FROM stages JOIN operations USING (seq)";
        let read = || -> rusqlite::Result<Vec<_>> {
            let mut statement = self.0.prepare(query)?;
            let number = |row: &Row<'_>, at| row.get::<_, i64>(at).map(i64::unsigned_abs);
            let rows = statement.query_map([], |row| {
                Ok((
                    row.get(0)?,
                    row.get(1)?,
                    row.get(2)?,
                    number(row, 3)?,
                    number(row, 4)?,
                ))
            })?;
            rows.collect()
        };
        read().unwrap_or_else(|error| panic!("{query}: {error}"))
    }

    /// The state that a VM's row has; `None` without a row.
    pub fn state(&self, vm_id: &str) -> Option<String> {
        self.rows(&format!("SELECT state FROM vms WHERE id = '{vm_id}'"))
            .pop()
    }

    /// What `PRAGMA integrity_check` says.
    pub fn integrity(&self) -> String {
        self.rows("PRAGMA integrity_check").join("\n")
    }

    fn tables(&self) -> Vec<String> {
        self.rows("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    }

    fn present(&self) -> Vec<String> {
        let mut tables = self.tables();
        tables.retain(|table| !HISTORY.contains(&table.as_str()));
        tables
    }

    /// The column of a table that holds the id of a VM.
    fn id_column(&self, table: &str) -> Option<&'static str> {
        if table == "vms" {
            return Some("id");
        }
        let columns = self.rows(&format!("SELECT name FROM pragma_table_info('{table}')"));
        columns.contains(&"vm_id".to_owned()).then_some("vm_id")
    }

    fn rows_in(&self, tables: &[String]) -> Vec<String> {
        let rows = tables.iter().flat_map(|table| {
            let rows = self.rows(&format!("SELECT * FROM {table}"));
            rows.into_iter().map(move |row| format!("{table}: {row}"))
        });
        rows.collect()
    }

    /// What a query gives, a line for each row.
    fn rows(&self, query: &str) -> Vec<String> {
        let read = || -> rusqlite::Result<Vec<String>> {
            let mut statement = self.0.prepare(query)?;
            let columns = statement.column_count();
            let rows = statement.query_map([], |row| {
                let values = (0..columns).map(|n| row.get_ref(n).map(shown));
                Ok(values.collect::<Result<Vec<_>, _>>()?.join(" "))
            })?;
            rows.collect()
        };
        read().unwrap_or_else(|error| panic!("{query}: {error}"))
    }
}

fn shown(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Null => "NULL".to_owned(),
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Real(number) => number.to_string(),
        ValueRef::Text(text) | ValueRef::Blob(text) => String::from_utf8_lossy(text).into_owned(),
    }
}
