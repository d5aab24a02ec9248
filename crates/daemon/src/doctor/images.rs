//! Images whose description cannot be read any more. Their bases are the capability `root`'s concern.

use offshoot_model::{Finding, Severity};

use crate::error::{Answer, Failure};
use crate::images::Images;
use offshoot_api::image::ImageSummary;

const PART: &str = "images";

/// One finding for all images.
pub(super) async fn check(images: &Images) -> Finding {
    judge(images.list().await)
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
}
