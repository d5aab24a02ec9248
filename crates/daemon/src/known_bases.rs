//! What the database says of bases, brought into line with what is on disk: at start, each minute, and after every change of the
//! images. What is new is told once, over restarts.

use offshoot_model::Digest;
use offshoot_store::db::{BaseChanges, BaseRow, Db};

use crate::blocking::blocking;
use crate::error::Answer;
use crate::images::{Images, short};
use crate::time::now_ms;

/// Looks at every base and records what it is.
pub async fn reconcile(images: &Images) -> Answer<()> {
    let bases = images.bases.clone();
    let there = blocking("looking at bases", move || {
        let seen_ms = now_ms();
        let rows = bases.list()?.into_iter().map(|base| BaseRow {
            id: base.id,
            image_digest: base.manifest.image,
            format: base.manifest.format,
            root: base.manifest.root.size,
            overlay_seed: base.manifest.overlay_seed.map(|seed| seed.size),
            work_seed: base.manifest.work_seed.map(|seed| seed.size),
            seen_ms,
        });
        Ok(rows.collect::<Vec<_>>())
    })
    .await?;
    let changes = images.db.call(move |db| db.note_bases(&there)).await?;
    if changes != BaseChanges::default() {
        let rows = images.db.call(Db::images).await?;
        let name = |digest: &Digest| {
            let row = rows.iter().find(|row| row.digest == *digest);
            row.map_or_else(|| digest.short(), |row| short(&row.reference))
        };
        tell(&changes, name);
    }
    Ok(())
}

/// As [`reconcile`], for whoever cannot do anything about a failure.
pub async fn reconcile_or_warn(images: &Images) {
    if let Err(failure) = reconcile(images).await {
        let error = failure.0;
        tracing::warn!(error = error.message, causes = ?error.causes, "cannot record what bases there are");
    }
}

fn tell(changes: &BaseChanges, name: impl Fn(&Digest) -> String) {
    for base in &changes.found {
        let image = name(&base.image_digest);
        if base.has_seeds() {
            tracing::debug!(base = %base.id, image, "found a base with its seeds");
        } else {
            tracing::warn!(
                base = %base.id,
                image,
                format = base.format,
                "an earlier version made this base, without a work seed: disks of its VMs are built; \
                 `offshoot image prepare --all` makes a current one beside it"
            );
        }
    }
    for id in &changes.gone {
        tracing::debug!(base = %id, "a base is gone");
    }
}
