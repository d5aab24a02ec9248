//! One row a VM.

use offshoot_model::{
    BaseId, Digest, Event, ExitReason, ExitStatus, KernelId, KernelObject, VmId, VmName, VmState,
};
use rusqlite::{OptionalExtension, Row, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::event_rows::{self, NewEvent};
use super::network_rows::{self, AddressRow};
use super::{Db, DbError, object_rows};

/// What is kept of a VM. `definition` and `machine` are JSON of the engine's and the VMM driver's own types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRow {
    /// Its id.
    pub id: VmId,
    /// Its name, unique without regard to case.
    pub name: VmName,
    /// Where it should be in its life.
    pub state: VmState,
    /// The user id its VMM runs as, unique.
    pub uid: u32,
    /// The manifest it was made from.
    pub image_digest: Digest,
    /// The base it leases.
    pub base_id: BaseId,
    /// The kernel bundle it leases.
    pub kernel_id: KernelId,
    /// What was asked for and decided.
    pub definition: String,
    /// How to find its VMM again; present while one may run.
    pub machine: Option<String>,
    /// Milliseconds since the epoch.
    pub created_ms: u64,
    /// When the current or last run began.
    pub started_ms: Option<u64>,
    /// When the last run ended.
    pub finished_ms: Option<u64>,
    /// How the last run ended.
    pub exit: Option<ExitStatus>,
    /// Why the last start failed, outermost first.
    pub failure: Vec<String>,
    /// Somebody stopped it, and nobody started it since.
    pub held: bool,
    /// Somebody removed it, and it is not gone yet.
    pub removing: bool,
    /// How the current or last run began, and why so.
    pub boot: Option<String>,
}

/// The part of a row that a run changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRunUpdate {
    /// See [`VmRow::state`].
    pub state: VmState,
    /// See [`VmRow::machine`].
    pub machine: Option<String>,
    /// See [`VmRow::started_ms`].
    pub started_ms: Option<u64>,
    /// See [`VmRow::finished_ms`].
    pub finished_ms: Option<u64>,
    /// See [`VmRow::exit`].
    pub exit: Option<ExitStatus>,
    /// See [`VmRow::failure`].
    pub failure: Vec<String>,
    /// See [`VmRow::held`].
    pub held: bool,
    /// See [`VmRow::removing`].
    pub removing: bool,
    /// See [`VmRow::boot`].
    pub boot: Option<String>,
}

/// What goes into the database together with a change of a VM's row: all of it or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmWrite {
    /// What happened.
    pub events: Vec<NewEvent>,
    /// What the VM has or is about to get in the kernel, when that changes.
    pub objects: Option<Vec<KernelObject>>,
}

/// An enum's serde name, which is what the database and the API both show.
pub(super) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        other => unreachable!("only unit variants are stored as words, got {other:?}"),
    }
}

pub(super) fn parse_word<T: DeserializeOwned>(word: &str) -> Result<T, DbError> {
    serde_json::from_value(serde_json::Value::String(word.to_owned())).map_err(unreadable)
}

pub(super) fn unreadable(source: impl std::error::Error + Send + Sync + 'static) -> DbError {
    DbError::Row {
        what: "VM",
        source: Box::new(source),
    }
}

const COLUMNS: &str = "id, name, state, uid, image_digest, base_id, kernel_id, definition, machine, created_ms, \
                       started_ms, finished_ms, exit_code, exit_reason, failure, held, removing, boot";

/// A row as SQLite gives it, before anything is believed.
struct RawVm {
    texts: [String; 7],
    uid: u32,
    machine: Option<String>,
    times: (i64, Option<i64>, Option<i64>),
    exit: (Option<i32>, Option<String>),
    held: bool,
    removing: bool,
    boot: Option<String>,
}

fn read(row: &Row<'_>) -> rusqlite::Result<RawVm> {
    Ok(RawVm {
        texts: [
            row.get(0)?,
            row.get(1)?,
            row.get(2)?,
            row.get(4)?,
            row.get(5)?,
            row.get(6)?,
            row.get(7)?,
        ],
        uid: row.get(3)?,
        machine: row.get(8)?,
        times: (row.get(9)?, row.get(10)?, row.get(11)?),
        exit: (row.get(12)?, row.get(13)?),
        held: row.get(15)?,
        removing: row.get(16)?,
        boot: row.get(17)?,
    })
}

fn parse(raw: RawVm, failure: &str) -> Result<VmRow, DbError> {
    let [id, name, state, image_digest, base_id, kernel_id, definition] = raw.texts;
    let exit = match raw.exit {
        (Some(code), Some(reason)) => Some(ExitStatus {
            code,
            reason: parse_word::<ExitReason>(&reason)?,
        }),
        _ => None,
    };
    Ok(VmRow {
        id: id.parse().map_err(unreadable)?,
        name: name.parse().map_err(unreadable)?,
        state: parse_word(&state)?,
        uid: raw.uid,
        image_digest: image_digest.parse().map_err(unreadable)?,
        base_id: base_id.parse().map_err(unreadable)?,
        kernel_id: kernel_id.parse().map_err(unreadable)?,
        definition,
        machine: raw.machine,
        created_ms: raw.times.0.unsigned_abs(),
        started_ms: raw.times.1.map(i64::unsigned_abs),
        finished_ms: raw.times.2.map(i64::unsigned_abs),
        exit,
        failure: serde_json::from_str(failure).map_err(unreadable)?,
        held: raw.held,
        removing: raw.removing,
        boot: raw.boot,
    })
}

/// A name's uniqueness in our words.
fn name_taken(error: DbError, name: &VmName) -> DbError {
    match error {
        DbError::Statement { source, .. } if source.to_string().contains("vms.name") => DbError::NameTaken {
            name: name.to_string(),
        },
        other => other,
    }
}

impl Db {
    /// Writes a new VM, what it was given on its network, and what happened. Its name, uid and address must be free; a
    /// taken name is [`DbError::NameTaken`].
    pub fn insert_vm(
        &self,
        row: &VmRow,
        address: Option<&AddressRow>,
        events: &[NewEvent],
    ) -> Result<Vec<Event>, DbError> {
        let failure = serde_json::to_string(&row.failure).map_err(unreadable)?;
        let result = self.with("write a VM", |connection| {
            let transaction = connection.transaction()?;
            transaction.execute(
                &format!(
                    "INSERT INTO vms ({COLUMNS}) VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15,?16,?17,?18)"
                ),
                params![
                    row.id.as_str(),
                    row.name.as_str(),
                    row.state.as_str(),
                    row.uid,
                    row.image_digest.to_string(),
                    row.base_id.as_str(),
                    row.kernel_id.as_str(),
                    row.definition,
                    row.machine,
                    row.created_ms as i64,
                    row.started_ms.map(|ms| ms as i64),
                    row.finished_ms.map(|ms| ms as i64),
                    row.exit.map(|exit| exit.code),
                    row.exit.map(|exit| word(&exit.reason)),
                    failure,
                    row.held,
                    row.removing,
                    row.boot,
                ],
            )?;
            if let Some(address) = address {
                network_rows::insert(&transaction, row.id.as_str(), address)?;
            }
            let events = event_rows::insert(&transaction, events)?;
            transaction.commit()?;
            Ok(events)
        });
        result.map_err(|error| name_taken(error, &row.name))
    }

    /// Writes what a run changed, together with what goes with it.
    pub fn update_vm_run(
        &self,
        id: &VmId,
        update: &VmRunUpdate,
        write: &VmWrite,
    ) -> Result<Vec<Event>, DbError> {
        let failure = serde_json::to_string(&update.failure).map_err(unreadable)?;
        self.with("write a VM's state", |connection| {
            let transaction = connection.transaction()?;
            transaction
                .prepare_cached(
                    "UPDATE vms SET state = ?2, machine = ?3, started_ms = ?4, finished_ms = ?5, exit_code = ?6,
                     exit_reason = ?7, failure = ?8, held = ?9, removing = ?10, boot = ?11 WHERE id = ?1",
                )?
                .execute(params![
                    id.as_str(),
                    update.state.as_str(),
                    update.machine,
                    update.started_ms.map(|ms| ms as i64),
                    update.finished_ms.map(|ms| ms as i64),
                    update.exit.map(|exit| exit.code),
                    update.exit.map(|exit| word(&exit.reason)),
                    failure,
                    update.held,
                    update.removing,
                    update.boot,
                ])?;
            if let Some(objects) = &write.objects {
                object_rows::replace(&transaction, id, objects)?;
            }
            let events = event_rows::insert(&transaction, &write.events)?;
            transaction.commit()?;
            Ok(events)
        })
    }

    /// Gives a VM another name; a taken one is [`DbError::NameTaken`].
    pub fn rename_vm(&self, id: &VmId, name: &VmName, events: &[NewEvent]) -> Result<Vec<Event>, DbError> {
        let result = self.with("rename a VM", |connection| {
            let transaction = connection.transaction()?;
            transaction.execute(
                "UPDATE vms SET name = ?2 WHERE id = ?1",
                [id.as_str(), name.as_str()],
            )?;
            let events = event_rows::insert(&transaction, events)?;
            transaction.commit()?;
            Ok(events)
        });
        result.map_err(|error| name_taken(error, name))
    }

    /// Every VM, oldest first.
    pub fn vms(&self) -> Result<Vec<VmRow>, DbError> {
        let rows = self.with("list VMs", |connection| {
            connection
                .prepare_cached(&format!("SELECT {COLUMNS} FROM vms ORDER BY created_ms, id"))?
                .query_map([], |row| Ok((read(row)?, row.get::<_, String>(14)?)))?
                .collect::<Result<Vec<_>, _>>()
        })?;
        rows.into_iter()
            .map(|(raw, failure)| parse(raw, &failure))
            .collect()
    }

    /// Forgets a VM. What it has in the kernel stays recorded until it is gone.
    pub fn remove_vm(&self, id: &VmId, events: &[NewEvent]) -> Result<Vec<Event>, DbError> {
        self.with("forget a VM", |connection| {
            let transaction = connection.transaction()?;
            transaction.execute("DELETE FROM vms WHERE id = ?1", [id.as_str()])?;
            let events = event_rows::insert(&transaction, events)?;
            transaction.commit()?;
            Ok(events)
        })
    }

    /// The lowest user id from `base` on that no VM has, of `count`; `None` when all are taken.
    pub fn free_uid(&self, base: u32, count: u32) -> Result<Option<u32>, DbError> {
        self.with("choose a user id", |connection| {
            connection
                .query_row(
                    "SELECT ?1 WHERE NOT EXISTS (SELECT 1 FROM vms WHERE uid = ?1)
                     UNION ALL
                     SELECT uid + 1 FROM vms v WHERE uid >= ?1 AND uid + 1 < ?1 + ?2
                       AND NOT EXISTS (SELECT 1 FROM vms w WHERE w.uid = v.uid + 1)
                     ORDER BY 1 LIMIT 1",
                    [base, count],
                    |row| row.get(0),
                )
                .optional()
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::db::EventFilter;
    use offshoot_model::{EventAction, ObjectKind};

    pub(crate) fn row(n: u8, name: &str) -> VmRow {
        VmRow {
            id: VmId::from_bytes(&[n; 6]),
            name: name.parse().unwrap(),
            state: VmState::Created,
            uid: 100 + u32::from(n),
            image_digest: Digest::from_bytes([n; 32]),
            base_id: BaseId::from_bytes(&[n; 16]),
            kernel_id: KernelId::from_bytes(&[n; 8]),
            definition: "{}".into(),
            machine: None,
            created_ms: u64::from(n),
            started_ms: None,
            finished_ms: None,
            exit: None,
            failure: Vec::new(),
            held: false,
            removing: false,
            boot: None,
        }
    }

    #[test]
    fn rows_come_back_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let mut one = row(1, "web");
        db.insert_vm(&one, None, &[]).unwrap();
        db.insert_vm(&row(2, "db"), None, &[]).unwrap();
        let update = VmRunUpdate {
            state: VmState::Stopped,
            machine: Some("{\"pid\":1}".into()),
            started_ms: Some(5),
            finished_ms: Some(6),
            exit: Some(ExitStatus {
                code: 7,
                reason: ExitReason::MainExited,
            }),
            failure: vec!["a".into(), "b".into()],
            held: true,
            removing: true,
            boot: Some("{}".into()),
        };
        let event = NewEvent {
            time_ms: 6,
            action: EventAction::Exit,
            vm_id: Some(one.id.clone()),
            vm_name: Some(one.name.clone()),
            operation: None,
            reason: "status 7".into(),
        };
        let socket = KernelObject {
            kind: ObjectKind::Folder,
            name: "/run/x".into(),
        };
        let write = VmWrite {
            events: vec![event],
            objects: Some(vec![socket.clone()]),
        };
        let events = db.update_vm_run(&one.id, &update, &write).unwrap();
        assert_eq!(db.events(&EventFilter::default(), 9).unwrap(), events);
        assert_eq!(db.objects().unwrap()[0].object, socket);
        (one.state, one.machine, one.started_ms) = (update.state, update.machine, update.started_ms);
        (one.finished_ms, one.exit, one.failure) = (update.finished_ms, update.exit, update.failure);
        (one.held, one.removing) = (true, true);
        one.boot = Some("{}".into());
        assert_eq!(db.vms().unwrap(), [one.clone(), row(2, "db")]);
        db.remove_vm(&one.id, &[]).unwrap();
        assert_eq!(db.objects().unwrap().len(), 1, "it may still be there");
        assert_eq!(db.vms().unwrap(), [row(2, "db")]);
    }

    #[test]
    fn a_name_is_taken_whatever_its_case() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        db.insert_vm(&row(1, "web"), None, &[]).unwrap();
        assert!(matches!(
            db.insert_vm(&row(2, "WEB"), None, &[]),
            Err(DbError::NameTaken { .. })
        ));
        db.insert_vm(&row(3, "other"), None, &[]).unwrap();
        let taken = db.rename_vm(&row(3, "x").id, &"Web".parse().unwrap(), &[]);
        assert!(matches!(taken, Err(DbError::NameTaken { .. })));
    }

    #[test]
    fn user_ids_fill_the_gaps() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        assert_eq!(db.free_uid(101, 3).unwrap(), Some(101));
        for (n, free) in [(1, Some(102)), (2, Some(103)), (3, None)] {
            db.insert_vm(&row(n, &format!("v{n}")), None, &[]).unwrap();
            assert_eq!(db.free_uid(101, 3).unwrap(), free);
        }
        db.remove_vm(&row(2, "x").id, &[]).unwrap();
        assert_eq!(db.free_uid(101, 3).unwrap(), Some(102));
    }
}
