//! `prune`: deleting what nothing needs, after showing it.

use std::io::{self, BufRead, IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use offshoot_api::client::Client;
use offshoot_api::prune::{PruneItem, PruneKind, PruneQuery, PruneReport};
use offshoot_model::ByteSize;

use crate::error::{ERROR, Failure, report_and_go_on};
use crate::output::{Output, OutputArgs, clean, json, line, note, table};

#[derive(Clone, Debug, Args)]
pub(crate) struct PruneArgs {
    /// Do not ask
    #[arg(short, long)]
    force: bool,
    /// Also the bases of images that no VM uses; they are made again when they are needed
    #[arg(short, long)]
    all: bool,
    /// Keep what was made or used so short a time ago, such as 30m or 0s [default: the daemon's setting, 1h]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    grace: Option<Duration>,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) async fn prune(client: &Client, args: &PruneArgs) -> Result<u8, Failure> {
    let query = PruneQuery {
        all: args.all,
        grace_s: args.grace.map(|grace| grace.as_secs()),
    };
    let ask = !args.force;
    if ask && !io::stdin().is_terminal() {
        return Err(
            Failure::usage("cannot ask whether to delete: standard input is not a terminal")
                .hint("write `offshoot prune --force`"),
        );
    }
    if ask {
        let foreseen = client.prune_plan(&query).await?;
        let text = foreseen_text(&foreseen);
        // Questions are not results: they go where errors go.
        let _ = io::stderr().write_all(text.as_bytes());
        if !foreseen.removed.is_empty() && !confirmed()? {
            note("Nothing was deleted");
            return Ok(0);
        }
        if foreseen.removed.is_empty() {
            return show(&foreseen, args.output.output);
        }
    }
    show(&client.prune(&query).await?, args.output.output)
}

fn confirmed() -> Result<bool, Failure> {
    let mut stderr = io::stderr();
    let _ = stderr
        .write_all(b"Delete all this? [y/N] ")
        .and_then(|()| stderr.flush());
    let mut answer = String::new();
    io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|e| Failure::io("cannot read the answer", &e))?;
    Ok(is_yes(&answer))
}

fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

/// Status 1 when something should have gone and is still there.
fn show(report: &PruneReport, output: Output) -> Result<u8, Failure> {
    match output {
        Output::Json => json(report)?,
        Output::Table => line(&done_text(report))?,
    }
    for failure in &report.failed {
        let what = word(failure.item.kind);
        report_and_go_on(Failure::internal(format!(
            "cannot remove {what} {}: {}",
            failure.item.name, failure.reason
        )));
    }
    Ok(if report.failed.is_empty() { 0 } else { ERROR })
}

fn foreseen_text(report: &PruneReport) -> String {
    if report.removed.is_empty() {
        return String::new();
    }
    format!("Nothing needs any more:\n\n{}\n", items(&report.removed))
}

fn done_text(report: &PruneReport) -> String {
    let mut text = if report.removed.is_empty() {
        "Nothing to delete\n".to_owned()
    } else {
        format!("{}\nFreed {}\n", items(&report.removed), size(report.freed_bytes))
    };
    if !report.kept_for_grace.is_empty() {
        let bytes = report.kept_for_grace.iter().map(|item| item.bytes).sum();
        text.push_str(&format!(
            "Kept {} more ({}), made or used less than {} ago: `--grace 0s` takes them as well\n",
            report.kept_for_grace.len(),
            size(bytes),
            humantime::format_duration(Duration::from_secs(report.grace_s)),
        ));
    }
    for note in &report.notes {
        text.push_str(&format!("note: {}\n", clean(note)));
    }
    text
}

fn items(items: &[PruneItem]) -> String {
    let rows = items
        .iter()
        .map(|item| vec![word(item.kind).to_owned(), item.name.clone(), size(item.bytes)]);
    table(&["KIND", "NAME", "SIZE"], rows)
}

fn word(kind: PruneKind) -> &'static str {
    match kind {
        PruneKind::Blob => "blob",
        PruneKind::Download => "download",
        PruneKind::Base => "base",
        PruneKind::Tree => "tree",
        PruneKind::Kernel => "kernel",
        PruneKind::Template => "template",
    }
}

fn size(bytes: u64) -> String {
    ByteSize::from_bytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> PruneReport {
        let item = |kind, name: &str, bytes| PruneItem {
            kind,
            name: name.into(),
            bytes,
        };
        PruneReport {
            removed: vec![
                item(
                    PruneKind::Download,
                    &format!("sha256:{}", "0a".repeat(32)),
                    9 << 20,
                ),
                item(PruneKind::Base, "6e30af7834c973f2801c9f60222fadac", 180 << 20),
                item(PruneKind::Tree, "0123456789abcdef0123456789abcdef", 500 << 20),
                item(PruneKind::Kernel, "0101010101010101", 60 << 20),
            ],
            freed_bytes: 749 << 20,
            kept_for_grace: vec![
                item(PruneKind::Base, "x", 1 << 20),
                item(PruneKind::Blob, "y", 1 << 20),
            ],
            grace_s: 3600,
            ..PruneReport::default()
        }
    }

    #[test]
    fn what_went_is_listed() {
        insta::assert_snapshot!(done_text(&report()), @r#"
        KIND       NAME                                                                      SIZE
        download   sha256:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a   9MiB
        base       6e30af7834c973f2801c9f60222fadac                                          180MiB
        tree       0123456789abcdef0123456789abcdef                                          500MiB
        kernel     0101010101010101                                                          60MiB

        Freed 749MiB
        Kept 2 more (2MiB), made or used less than 1h ago: `--grace 0s` takes them as well
        "#);
        let nothing = PruneReport {
            notes: vec!["all blobs stay, because image `a:1` cannot be read: \u{1b}[2J".into()],
            ..PruneReport::default()
        };
        insta::assert_snapshot!(done_text(&nothing), @r#"
        Nothing to delete
        note: all blobs stay, because image `a:1` cannot be read: \u{1b}[2J
        "#);
    }

    #[test]
    fn what_would_go_is_listed_before_the_question() {
        insta::assert_snapshot!(foreseen_text(&report()), @r#"
        Nothing needs any more:

        KIND       NAME                                                                      SIZE
        download   sha256:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a   9MiB
        base       6e30af7834c973f2801c9f60222fadac                                          180MiB
        tree       0123456789abcdef0123456789abcdef                                          500MiB
        kernel     0101010101010101                                                          60MiB
        "#);
        assert_eq!(foreseen_text(&PruneReport::default()), "");
        for (answer, expected) in [
            ("y\n", true),
            ("YES\n", true),
            ("n\n", false),
            ("\n", false),
            ("", false),
            ("yellow", false),
        ] {
            assert_eq!(is_yes(answer), expected, "{answer:?}");
        }
    }
}
