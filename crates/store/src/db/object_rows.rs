//! The things in the host's kernel that VMs have or are about to get.

use offshoot_model::{KernelObject, VmId};
use rusqlite::{Transaction, params};

use super::vm_rows::{parse_word, unreadable};
use super::{Db, DbError};

/// One thing and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectRow {
    /// The thing.
    pub object: KernelObject,
    /// The VM; it may be gone.
    pub vm_id: VmId,
}

/// Replaces what is recorded of a VM within a transaction.
pub(super) fn replace(
    transaction: &Transaction<'_>,
    id: &VmId,
    objects: &[KernelObject],
) -> rusqlite::Result<()> {
    transaction
        .prepare_cached("DELETE FROM objects WHERE vm_id = ?1")?
        .execute([id.as_str()])?;
    for object in objects {
        transaction
            .prepare_cached("INSERT OR REPLACE INTO objects (kind, name, vm_id) VALUES (?1, ?2, ?3)")?
            .execute(params![object.kind.as_str(), object.name, id.as_str()])?;
    }
    Ok(())
}

impl Db {
    /// Everything that is recorded.
    pub fn objects(&self) -> Result<Vec<ObjectRow>, DbError> {
        let rows: Vec<(String, String, String)> = self.with("read kernel objects", |connection| {
            connection
                .prepare_cached("SELECT kind, name, vm_id FROM objects ORDER BY vm_id, kind, name")?
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
                .collect()
        })?;
        rows.into_iter()
            .map(|(kind, name, vm_id)| {
                Ok(ObjectRow {
                    object: KernelObject {
                        kind: parse_word(&kind)?,
                        name,
                    },
                    vm_id: vm_id.parse().map_err(unreadable)?,
                })
            })
            .collect()
    }

    /// Replaces what is recorded of what is no VM of anybody's but has an id like one.
    pub fn put_objects(&self, id: &VmId, objects: &[KernelObject]) -> Result<(), DbError> {
        self.with("write kernel objects", |connection| {
            let transaction = connection.transaction()?;
            replace(&transaction, id, objects)?;
            transaction.commit()
        })
    }

    /// Forgets a thing that is gone.
    pub fn remove_object(&self, object: &KernelObject) -> Result<(), DbError> {
        self.with("forget a kernel object", |connection| {
            connection.execute(
                "DELETE FROM objects WHERE kind = ?1 AND name = ?2",
                [object.kind.as_str(), &object.name],
            )
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::ObjectKind;

    #[test]
    fn what_is_recorded_of_a_vm_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let object = |name: &str| KernelObject {
            kind: ObjectKind::Process,
            name: name.into(),
        };
        let (one, two) = (VmId::from_bytes(&[1; 6]), VmId::from_bytes(&[2; 6]));
        let put = |id: &VmId, objects: &[KernelObject]| {
            db.with("test", |connection| {
                let transaction = connection.transaction()?;
                replace(&transaction, id, objects)?;
                transaction.commit()
            })
            .unwrap();
        };
        put(&one, &[object("a"), object("b")]);
        put(&two, &[object("c")]);
        put(&one, &[object("b")]);
        let names: Vec<_> = db
            .objects()
            .unwrap()
            .into_iter()
            .map(|row| row.object.name)
            .collect();
        assert_eq!(names, ["b", "c"]);
        put(&one, &[]);
        db.remove_object(&object("c")).unwrap();
        assert_eq!(db.objects().unwrap(), []);
    }
}
