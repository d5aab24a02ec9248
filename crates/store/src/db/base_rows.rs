//! What the bases on disk were when they were last looked at, seeds and all.

use std::collections::HashMap;

use offshoot_model::{BaseId, ByteSize, Digest};
use rusqlite::{Connection, Row, params};

use super::vm_rows::unreadable;
use super::{Db, DbError};

/// One base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseRow {
    /// Its id.
    pub id: BaseId,
    /// The manifest of its image.
    pub image_digest: Digest,
    /// The format of its folder.
    pub format: u32,
    /// The length of its root.
    pub root: ByteSize,
    /// The length of its overlay seed; absent where it has none.
    pub overlay_seed: Option<ByteSize>,
    /// The length of its work seed; absent where it has none.
    pub work_seed: Option<ByteSize>,
    /// When it was first found so, milliseconds since the epoch.
    pub seen_ms: u64,
}

impl BaseRow {
    /// Whether it has both seeds.
    pub fn has_seeds(&self) -> bool {
        self.overlay_seed.is_some() && self.work_seed.is_some()
    }

    fn is_as(&self, other: &Self) -> bool {
        let seen_ms = other.seen_ms;
        Self {
            seen_ms,
            ..self.clone()
        } == *other
    }
}

/// What is not as it was at the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BaseChanges {
    /// These are new, or other than they were.
    pub found: Vec<BaseRow>,
    /// These are there no more.
    pub gone: Vec<BaseId>,
}

type Raw = (String, String, u32, [Option<i64>; 4]);

fn read(row: &Row<'_>) -> rusqlite::Result<Raw> {
    let numbers = [row.get(3)?, row.get(4)?, row.get(5)?, row.get(6)?];
    Ok((row.get(0)?, row.get(1)?, row.get(2)?, numbers))
}

fn parse((id, image, format, [root, overlay, work, seen]): Raw) -> Result<BaseRow, DbError> {
    let size = |bytes: i64| ByteSize::from_bytes(bytes.unsigned_abs());
    Ok(BaseRow {
        id: id.parse().map_err(unreadable)?,
        image_digest: image.parse().map_err(unreadable)?,
        format,
        root: size(root.unwrap_or_default()),
        overlay_seed: overlay.map(size),
        work_seed: work.map(size),
        seen_ms: seen.unwrap_or_default().unsigned_abs(),
    })
}

fn all(connection: &Connection) -> rusqlite::Result<Vec<Raw>> {
    connection
        .prepare_cached(
            "SELECT id, image_digest, format, root_bytes, overlay_bytes, work_bytes, seen_ms
             FROM bases ORDER BY id",
        )?
        .query_map([], read)?
        .collect()
}

impl Db {
    /// Every base of the last look, in the order of their ids.
    pub fn bases(&self) -> Result<Vec<BaseRow>, DbError> {
        self.with("list bases", |connection| all(connection))?
            .into_iter()
            .map(parse)
            .collect()
    }

    /// Records what is there now, and says what of it is new. Writes nothing where nothing is.
    pub fn note_bases(&self, there: &[BaseRow]) -> Result<BaseChanges, DbError> {
        let known: HashMap<BaseId, BaseRow> = self
            .bases()?
            .into_iter()
            .map(|base| (base.id.clone(), base))
            .collect();
        let is_new = |base: &&BaseRow| !known.get(&base.id).is_some_and(|known| base.is_as(known));
        let changes = BaseChanges {
            found: there.iter().filter(is_new).cloned().collect(),
            gone: {
                let gone = known
                    .keys()
                    .filter(|id| !there.iter().any(|base| base.id == **id));
                let mut gone: Vec<_> = gone.cloned().collect();
                gone.sort();
                gone
            },
        };
        if changes == BaseChanges::default() {
            return Ok(changes);
        }
        self.with("record bases", |connection| {
            let transaction = connection.transaction()?;
            for base in &changes.found {
                let size = |size: Option<ByteSize>| size.map(|size| size.bytes() as i64);
                transaction
                    .prepare_cached("INSERT OR REPLACE INTO bases VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?
                    .execute(params![
                        base.id.as_str(),
                        base.image_digest.to_string(),
                        base.format,
                        base.root.bytes() as i64,
                        size(base.overlay_seed),
                        size(base.work_seed),
                        base.seen_ms as i64,
                    ])?;
            }
            for id in &changes.gone {
                transaction
                    .prepare_cached("DELETE FROM bases WHERE id = ?1")?
                    .execute([id.as_str()])?;
            }
            transaction.commit()
        })?;
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_says_what_is_new_and_what_went() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let base = |n: u8, work: Option<u64>, seen_ms| BaseRow {
            id: BaseId::from_bytes(&[n; 16]),
            image_digest: Digest::from_bytes([n; 32]),
            format: 2,
            root: ByteSize::from_mib(170),
            overlay_seed: Some(ByteSize::from_mib(10 << 10)),
            work_seed: work.map(ByteSize::from_mib),
            seen_ms,
        };
        let (one, two) = (base(1, None, 5), base(2, Some(10), 5));
        assert!(!one.has_seeds() && two.has_seeds());
        let changes = |found: &[&BaseRow], gone: &[&BaseRow]| BaseChanges {
            found: found.iter().copied().cloned().collect(),
            gone: gone.iter().map(|base| base.id.clone()).collect(),
        };
        let there = [one.clone(), two.clone()];
        assert_eq!(db.note_bases(&there).unwrap(), changes(&[&one, &two], &[]));
        assert_eq!(db.bases().unwrap(), there);
        // The time of a look is no change.
        let again = [base(1, None, 6), base(2, Some(10), 6)];
        assert_eq!(db.note_bases(&again).unwrap(), changes(&[], &[]));
        assert_eq!(db.bases().unwrap(), there);
        let mended = base(1, Some(10), 7);
        assert_eq!(
            db.note_bases(std::slice::from_ref(&mended)).unwrap(),
            changes(&[&mended], &[&two])
        );
        assert_eq!(db.bases().unwrap(), [mended]);
    }
}
