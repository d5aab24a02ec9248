//! Whether a daemon's database, what it tells its clients, and the host's processes say the same.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};

use crate::{Daemon, PATIENCE, Process};

/// What the database and `ps` both know of a VM.
const SHARED: [&str; 6] = ["id", "name", "state", "started_ms", "finished_ms", "exit"];

/// One row, in the words of `ps`, and the VMM that it names.
struct Row {
    shown: Value,
    vmm: Option<i64>,
}

impl Daemon {
    /// Every VMM of this daemon, by the id of its VM.
    pub fn vmms(&self) -> Vec<(String, Process)> {
        let all = Process::all().into_iter();
        all.filter(|process| process.concerns(self.root()))
            .filter_map(|process| {
                let (_, rest) = process.line.split_once(" guest=offshoot-")?;
                let id = rest.split([',', ' ']).next()?.to_owned();
                Some((id, process))
            })
            .collect()
    }

    /// What does not agree, a line each; nothing when all is well. For a moment in which nothing is under way.
    pub fn disagreements(&self) -> Vec<String> {
        let listed = by_id(self.get_json("/v1/vms?all=true").as_array().expect("a list"));
        let rows = self.rows();
        let mut vmms: BTreeMap<String, Vec<Process>> = BTreeMap::new();
        for (id, process) in self.vmms() {
            vmms.entry(id).or_default().push(process);
        }
        let mut found = Vec::new();
        let ids: BTreeSet<_> = listed.keys().chain(rows.keys()).chain(vmms.keys()).collect();
        for id in ids {
            let (shown, row) = (listed.get(id), rows.get(id));
            if shown != row.map(|row| &row.shown) {
                let row = row.map(|row| &row.shown);
                found.push(format!("{id}: `ps` says {shown:?}, the database {row:?}"));
            }
            let state = shown.and_then(|vm| vm["state"].as_str()).unwrap_or("gone");
            let should_run = matches!(state, "starting" | "running" | "paused" | "stopping");
            let pids: Vec<_> = vmms
                .get(id)
                .into_iter()
                .flatten()
                .map(|process| i64::from(process.pid))
                .collect();
            let expected: Vec<_> = row
                .and_then(|row| row.vmm)
                .filter(|_| should_run)
                .into_iter()
                .collect();
            if pids != expected || pids.len() != usize::from(should_run) {
                found.push(format!(
                    "{id} is {state}, its VMM should be {expected:?}, and there is {pids:?}"
                ));
            }
        }
        found
    }

    /// Waits until all agree, and fails with what does not.
    pub fn wait_until_all_agree(&self) {
        let began = Instant::now();
        loop {
            let found = self.disagreements();
            if found.is_empty() {
                return;
            }
            assert!(
                began.elapsed() < PATIENCE,
                "database, `ps` and processes do not agree:\n{}",
                found.join("\n")
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Every row of the database, read beside the daemon.
    fn rows(&self) -> BTreeMap<String, Row> {
        let path = self.data().join("offshoot.db");
        let database =
            Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).expect("the database");
        let mut statement = database
            .prepare(
                "SELECT id, name, state, started_ms, finished_ms, exit_code, exit_reason, machine FROM vms",
            )
            .expect("the table of VMs");
        let rows = statement.query_map([], |row| {
            let id: String = row.get(0)?;
            let exit = match (row.get::<_, Option<i64>>(5)?, row.get::<_, Option<String>>(6)?) {
                (Some(code), Some(reason)) => json!({"code": code, "reason": reason}),
                _ => Value::Null,
            };
            let shown = json!({
                "id": id,
                "name": row.get::<_, String>(1)?,
                "state": row.get::<_, String>(2)?,
                "started_ms": row.get::<_, Option<i64>>(3)?,
                "finished_ms": row.get::<_, Option<i64>>(4)?,
                "exit": exit,
            });
            let machine: Option<String> = row.get(7)?;
            let machine: Value = machine
                .and_then(|text| serde_json::from_str(&text).ok())
                .unwrap_or_default();
            let vmm = machine["process"]["pid"].as_i64();
            Ok((id, Row { shown, vmm }))
        });
        rows.expect("rows").map(|row| row.expect("a row")).collect()
    }
}

/// What `ps` tells of each VM, cut to what the database knows, too.
fn by_id(vms: &[Value]) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for vm in vms {
        let id = vm["id"].as_str().expect("an id").to_owned();
        let shared = SHARED.iter().map(|key| ((*key).to_owned(), vm[*key].clone()));
        let twice = found.insert(id, Value::Object(shared.collect()));
        assert!(twice.is_none(), "`ps` lists {twice:?} twice");
    }
    found
}
