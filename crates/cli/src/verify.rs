//! `image verify`: whether an image and its base are still what was stored.

use clap::Args;
use offshoot_api::client::Client;
use offshoot_api::image::{ImageQuery, PartState, VerifyReport};
use offshoot_model::ByteSize;

use crate::error::{ERROR, Failure};
use crate::output::{Output, OutputArgs, clean, json, line, table};
use crate::progress::Bars;

#[derive(Clone, Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
    /// Image
    reference: String,
}

/// Status 1 when something is damaged.
pub(crate) async fn verify(client: &Client, args: VerifyArgs) -> Result<u8, Failure> {
    let mut bars = Bars::new(args.quiet);
    let query = ImageQuery {
        reference: args.reference,
    };
    let report = client
        .verify(&query)
        .await?
        .finish(|event| bars.show(event))
        .await?;
    drop(bars);
    match args.output.output {
        Output::Json => json(&report)?,
        Output::Table => line(&text(&report))?,
    }
    Ok(if report.is_damaged() { ERROR } else { 0 })
}

fn text(report: &VerifyReport) -> String {
    let rows = report.parts.iter().map(|part| {
        let state = match part.state {
            PartState::Ok => "ok",
            PartState::Damaged => "DAMAGED",
            PartState::NotPrepared => "not prepared",
        };
        let result = match &part.reason {
            Some(reason) => format!("{state}: {reason}"),
            None => state.to_owned(),
        };
        let size = ByteSize::from_bytes(part.bytes).to_string();
        vec![part.part.clone(), part.name.clone(), size, result]
    });
    let mut text = table(&["PART", "NAME", "SIZE", "RESULT"], rows);
    for hint in &report.hints {
        text.push_str(&format!("hint: {}\n", clean(hint)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_api::image::VerifiedPart;

    #[test]
    fn each_part_has_its_line_and_damage_a_hint() {
        let part = |part: &str, name: &str, bytes, state, reason: Option<&str>| VerifiedPart {
            part: part.into(),
            name: name.into(),
            bytes,
            state,
            reason: reason.map(str::to_owned),
        };
        let digest = format!("sha256:{}", "0a".repeat(32));
        let mut report = VerifyReport {
            reference: "debian:bookworm".into(),
            digest: digest.parse().unwrap(),
            parts: vec![
                part("manifest", &digest, 500, PartState::Ok, None),
                part(
                    "layer",
                    &digest,
                    48 << 20,
                    PartState::Damaged,
                    Some("it is not in the store"),
                ),
                part(
                    "base",
                    "6e30af7834c973f2801c9f60222fadac",
                    0,
                    PartState::NotPrepared,
                    None,
                ),
            ],
            hints: vec!["make the base again: `offshoot image prepare --force debian:bookworm`".into()],
        };
        assert!(report.is_damaged());
        insta::assert_snapshot!(text(&report), @r#"
        PART       NAME                                                                      SIZE    RESULT
        manifest   sha256:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a   500B    ok
        layer      sha256:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a   48MiB   DAMAGED: it is not in the store
        base       6e30af7834c973f2801c9f60222fadac                                          0B      not prepared
        hint: make the base again: `offshoot image prepare --force debian:bookworm`
        "#);
        report.parts.remove(1);
        assert!(!report.is_damaged());
    }
}
