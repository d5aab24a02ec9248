//! Which reference names which image.

use offshoot_model::Digest;
use rusqlite::{OptionalExtension, Row};

use super::{Db, DbError};

/// One reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRow {
    /// The normalised reference.
    pub reference: String,
    /// The manifest it names.
    pub digest: Digest,
    /// When it came to name it, milliseconds since the epoch.
    pub created_ms: u64,
}

fn read(row: &Row<'_>) -> rusqlite::Result<(String, String, i64)> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?))
}

fn parse((reference, digest, created_ms): (String, String, i64)) -> Result<ImageRow, DbError> {
    let digest = digest.parse().map_err(|source| DbError::Row {
        what: "image",
        source: Box::new(source),
    })?;
    Ok(ImageRow {
        reference,
        digest,
        created_ms: created_ms.unsigned_abs(),
    })
}

impl Db {
    /// Makes `reference` name `digest`, whatever it named before.
    pub fn put_image(&self, reference: &str, digest: &Digest, created_ms: u64) -> Result<(), DbError> {
        self.with("name an image", |connection| {
            connection.execute(
                "INSERT INTO images VALUES (?1, ?2, ?3)
                 ON CONFLICT (reference) DO UPDATE SET digest = excluded.digest, created_ms = excluded.created_ms",
                (reference, digest.to_string(), created_ms as i64),
            )
        })?;
        Ok(())
    }

    /// What `reference` names.
    pub fn image(&self, reference: &str) -> Result<Option<ImageRow>, DbError> {
        let row = self.with("look up an image", |connection| {
            connection
                .query_row(
                    "SELECT reference, digest, created_ms FROM images WHERE reference = ?1",
                    [reference],
                    read,
                )
                .optional()
        })?;
        row.map(parse).transpose()
    }

    /// Every reference, newest first.
    pub fn images(&self) -> Result<Vec<ImageRow>, DbError> {
        let rows = self.with("list images", |connection| {
            connection
                .prepare_cached(
                    "SELECT reference, digest, created_ms FROM images ORDER BY created_ms DESC, reference",
                )?
                .query_map([], read)?
                .collect::<Result<Vec<_>, _>>()
        })?;
        rows.into_iter().map(parse).collect()
    }

    /// Forgets a reference; whether there was one.
    pub fn remove_image(&self, reference: &str) -> Result<bool, DbError> {
        self.with("forget an image", |connection| {
            Ok(connection.execute("DELETE FROM images WHERE reference = ?1", [reference])? > 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_names_one_image_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path()).unwrap();
        let (one, two) = (Digest::from_bytes([1; 32]), Digest::from_bytes([2; 32]));
        db.put_image("a:1", &one, 5).unwrap();
        db.put_image("a:1", &two, 6).unwrap();
        db.put_image("b:1", &one, 7).unwrap();
        assert_eq!(db.image("a:1").unwrap().unwrap().digest, two);
        assert_eq!(
            db.images()
                .unwrap()
                .iter()
                .map(|i| i.reference.as_str())
                .collect::<Vec<_>>(),
            ["b:1", "a:1"]
        );
        assert!(db.remove_image("a:1").unwrap());
        assert!(!db.remove_image("a:1").unwrap());
        assert_eq!(db.image("a:1").unwrap(), None);
    }
}
