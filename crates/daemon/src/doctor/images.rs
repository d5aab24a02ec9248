//! Images whose description cannot be read any more, and those whose base has no seeds. Whether bases are whole is the capability
//! `root`'s concern.

use offshoot_model::{Finding, Fix, Severity};

use crate::error::{Answer, Failure};
use crate::images::Images;
use offshoot_api::image::{ImageSummary, SeedState};

const PART: &str = "images";

/// How many images are named before the rest is only counted.
const NAMED: usize = 3;

/// One finding for all images, and one for their seeds.
pub(super) async fn check(images: &Images) -> Vec<Finding> {
    let listed = images.list().await;
    let seeds = listed.as_deref().ok().and_then(judge_seeds);
    std::iter::once(judge(listed)).chain(seeds).collect()
}

/// Nothing where no image is prepared.
fn judge_seeds(images: &[ImageSummary]) -> Option<Finding> {
    let in_state = |state| images.iter().filter(move |image| image.seeds == Some(state));
    let lacking: Vec<_> = in_state(SeedState::Missing)
        .map(|image| format!("`{}`", image.reference))
        .collect();
    if lacking.is_empty() {
        let message = match in_state(SeedState::Current).count() {
            0 => return None,
            1 => "the base of 1 image has its seeds".to_owned(),
            count => format!("the bases of {count} images have their seeds"),
        };
        return Some(Finding::ok(PART, message).id("seeds"));
    }
    let more = match lacking.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let names = lacking
        .iter()
        .take(NAMED)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ");
    Some(
        Finding::new(
            PART,
            Severity::Warning,
            format!("an earlier version prepared {names}{more}, without a seed of work disks"),
            "offshoot image prepare --all",
        )
        .id("seed-missing")
        .cost("the disks of new VMs are built when they first start, which takes longer than a clone")
        .fix(Fix::PrepareBases),
    )
}

fn judge(listed: Answer<Vec<ImageSummary>>) -> Finding {
    let images = match listed {
        Ok(images) => images,
        Err(Failure(error)) => {
            return Finding::new(
                PART,
                Severity::Failure,
                [vec![error.message], error.causes].concat().join(": "),
                error
                    .hints
                    .into_iter()
                    .next()
                    .unwrap_or_else(|| "look at the daemon's log".into()),
            )
            .id("images-unreadable")
            .cost("no VM can be created");
        }
    };
    let damaged: Vec<_> = images.iter().filter(|image| image.problem.is_some()).collect();
    let Some(first) = damaged.first() else {
        return Finding::ok(
            PART,
            match images.len() {
                1 => "1 image can be read".to_owned(),
                count => format!("{count} images can be read"),
            },
        )
        .id("images");
    };
    let names: Vec<_> = damaged
        .iter()
        .map(|image| format!("`{}`", image.reference))
        .collect();
    Finding::new(
        PART,
        Severity::Warning,
        format!(
            "cannot read {}: {}",
            names.join(", "),
            first.problem.as_deref().unwrap_or_default()
        ),
        format!(
            "offshoot image rm -f {0}, then offshoot image pull {0}, or import it again",
            first.reference
        ),
    )
    .id("image-damaged")
    .cost("no VM can be created from it; `prune` keeps all blobs")
}

#[cfg(test)]
mod tests {
    use offshoot_model::{Digest, ErrorKind};

    use super::*;

    #[test]
    fn an_image_that_cannot_be_read_is_named() {
        let image = |reference: &str, problem: Option<&str>| ImageSummary {
            reference: reference.into(),
            digest: Digest::from_bytes([1; 32]),
            created_ms: 0,
            size: 0,
            prepared: false,
            seeds: None,
            problem: problem.map(str::to_owned),
        };
        let well = judge(Ok(vec![image("a:1", None)]));
        assert_eq!((well.severity, well.id.as_str()), (Severity::Ok, "images"));
        let bad = judge(Ok(vec![
            image("a:1", None),
            image("b:1", Some("the blob is gone")),
        ]));
        assert_eq!(
            (bad.severity, bad.id.as_str()),
            (Severity::Warning, "image-damaged")
        );
        assert!(
            bad.message.contains("`b:1`") && bad.hint.contains("image pull b:1"),
            "{bad:?}"
        );
        let broken = judge(Err(Failure::new(ErrorKind::Internal, "no database")));
        assert_eq!(broken.severity, Severity::Failure);
    }
    #[test]
    fn images_whose_base_has_no_seed_are_named() {
        let check = |images: &[(&str, Option<SeedState>)], id: Option<&str>, message: &str| {
            let image = |(reference, seeds): &(&str, Option<SeedState>)| ImageSummary {
                reference: (*reference).into(),
                digest: Digest::from_bytes([1; 32]),
                created_ms: 0,
                size: 0,
                prepared: seeds.is_some(),
                seeds: *seeds,
                problem: None,
            };
            let found = judge_seeds(&images.iter().map(image).collect::<Vec<_>>());
            assert_eq!(found.as_ref().map(|found| found.id.as_str()), id);
            let Some(found) = found else { return };
            assert_eq!(found.message, message);
            let bad = found.severity == Severity::Warning;
            assert_eq!(
                (bad, bad),
                (!found.cost.is_empty(), found.fix.is_some()),
                "{found:?}"
            );
        };
        let (current, missing) = (Some(SeedState::Current), Some(SeedState::Missing));
        check(&[("a:1", None)], None, "");
        check(
            &[("a:1", current), ("b:1", None)],
            Some("seeds"),
            "the base of 1 image has its seeds",
        );
        check(
            &[("a:1", current), ("b:1", current)],
            Some("seeds"),
            "the bases of 2 images have their seeds",
        );
        check(
            &[("a:1", current), ("b:1", missing)],
            Some("seed-missing"),
            "an earlier version prepared `b:1`, without a seed of work disks",
        );
        check(
            &[
                ("a:1", missing),
                ("b:1", missing),
                ("c:1", missing),
                ("d:1", missing),
            ],
            Some("seed-missing"),
            "an earlier version prepared `a:1`, `b:1`, `c:1` and 1 more, without a seed of work disks",
        );
    }
}
