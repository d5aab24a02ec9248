//! Whether the bytes of an image are still those that were stored: every blob, then every part of its base.

use offshoot_api::image::{PartState, VerifiedPart, VerifyReport};
use offshoot_image::manifest::StoredImage;
use offshoot_model::{Digest, ErrorKind, Progress, ProgressUnit};
use offshoot_rootfs::base::base_id;
use offshoot_store::blobs::{BlobError, BlobStore};
use tokio_util::sync::CancellationToken;

use crate::bases;
use crate::blocking::blocking;
use crate::error::{Answer, Failure, chain};
use crate::images::{Images, short};

/// How much is read between two words of progress.
const REPORT: u64 = 4 << 20;

/// Reads the whole image and its base. Dropping the future ends the reading soon after.
pub async fn verify(images: &Images, reference: &str, progress: &Progress) -> Answer<VerifyReport> {
    let row = images.row(reference).await?;
    let lease = images.lease().await;
    let stop = CancellationToken::new();
    let _stops = stop.clone().drop_guard();
    let (images, progress) = (images.clone(), progress.clone());
    blocking("the check", move || {
        let reference = short(&row.reference);
        let check = Check {
            blobs: &images.blobs,
            progress: &progress,
            stop: &stop,
        };
        let mut parts = check.image(&row.digest)?;
        let task = progress.start("checking the base", ProgressUnit::Items, None);
        let base = images.bases.of_image(&row.digest);
        let base = base.map_or_else(|_| base_id(&row.digest), |base| base.id);
        parts.extend(bases::verify(&images.bases, &base));
        progress.finish(task);
        drop(lease);
        Ok(VerifyReport {
            hints: hints(&parts, &reference),
            reference,
            digest: row.digest,
            parts,
        })
    })
    .await
}

struct Check<'a> {
    blobs: &'a BlobStore,
    progress: &'a Progress,
    stop: &'a CancellationToken,
}

impl Check<'_> {
    /// Every blob of the image, as far as it says which they are.
    fn image(&self, digest: &Digest) -> Answer<Vec<VerifiedPart>> {
        let mut parts = vec![self.blob("manifest", digest)?];
        let image = match StoredImage::load(self.blobs, digest) {
            Ok(image) => image,
            // A damaged manifest says nothing that could be relied on.
            Err(_) if parts[0].state == PartState::Damaged => return Ok(parts),
            Err(error) => {
                parts.push(VerifiedPart {
                    part: "config".into(),
                    name: String::new(),
                    bytes: 0,
                    state: PartState::Damaged,
                    reason: Some(chain(&error)),
                });
                return Ok(parts);
            }
        };
        parts.push(self.blob("config", &image.config_digest)?);
        let mut seen = std::collections::HashSet::new();
        for layer in image.layers.iter().filter(|layer| seen.insert(layer.digest)) {
            parts.push(self.blob("layer", &layer.digest)?);
        }
        Ok(parts)
    }

    fn blob(&self, part: &str, digest: &Digest) -> Answer<VerifiedPart> {
        let size = self.blobs.size(digest).unwrap_or(0);
        let label = format!("checking {}", digest.short());
        let task = self.progress.start(label, ProgressUnit::Bytes, Some(size));
        let mut told = 0;
        let checked = self.blobs.verify_watched(digest, &mut |done| {
            if done >= told + REPORT {
                told = done;
                self.progress.moved(task, done);
            }
            !self.stop.is_cancelled()
        });
        self.progress.finish(task);
        let (bytes, state, reason) = match checked {
            Ok(Some(bytes)) => (bytes, PartState::Ok, None),
            Ok(None) => return Err(Failure::new(ErrorKind::Cancelled, "the check was given up")),
            Err(error) => (size, PartState::Damaged, Some(why(&error))),
        };
        Ok(VerifiedPart {
            part: part.into(),
            name: digest.to_string(),
            bytes,
            state,
            reason,
        })
    }
}

/// The reason without the digest, which stands beside it.
fn why(error: &BlobError) -> String {
    match error {
        BlobError::NotFound { .. } => "it is not in the store".into(),
        BlobError::Damaged { path, .. } => format!("{} has other bytes than were stored", path.display()),
        error => chain(error),
    }
}

/// What mends the damage.
fn hints(parts: &[VerifiedPart], reference: &str) -> Vec<String> {
    let damaged = |of_base: bool| {
        let mut parts = parts.iter().filter(|part| part.state == PartState::Damaged);
        parts.any(|part| (part.part == "base") == of_base)
    };
    let mut hints = Vec::new();
    if damaged(false) {
        hints.push(format!(
            "fetch the image anew: `offshoot image rm -f {reference}`, then `offshoot image pull {reference}` or import it"
        ));
    }
    if damaged(true) {
        hints.push(format!(
            "make the base again: `offshoot image prepare --force {reference}`"
        ));
    }
    hints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_damage_has_its_remedy() {
        let part = |part: &str, state| VerifiedPart {
            part: part.into(),
            name: String::new(),
            bytes: 0,
            state,
            reason: None,
        };
        use PartState::{Damaged, NotPrepared, Ok};
        for (parts, expected) in [
            (vec![part("manifest", Ok), part("base", Ok)], [false, false]),
            (
                vec![part("manifest", Ok), part("base", NotPrepared)],
                [false, false],
            ),
            (vec![part("layer", Damaged), part("base", Ok)], [true, false]),
            (vec![part("layer", Ok), part("base", Damaged)], [false, true]),
            (vec![part("config", Damaged), part("base", Damaged)], [true, true]),
        ] {
            let hints = hints(&parts, "a:1");
            let has = |command: &str| hints.iter().any(|hint| hint.contains(command));
            let found = [
                has("`offshoot image pull a:1`"),
                has("`offshoot image prepare --force a:1`"),
            ];
            assert_eq!(found, expected, "{hints:?}");
        }
    }
}
