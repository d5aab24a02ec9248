//! `doctor`: what is wrong with the daemon's host, what that costs, and what mends it.

use std::fmt::Write as _;

use clap::Args;
use offshoot_api::client::{Client, ClientError};
use offshoot_api::doctor::{FixOutcome, has_failure};
use offshoot_model::{Finding, Severity};

use crate::error::{ERROR, Failure, report_and_go_on};
use crate::output::{Output, OutputArgs, clean, json, line};
use crate::progress::Bars;

#[derive(Clone, Copy, Debug, Args)]
#[command(
    after_help = "Exit status: 0, also with warnings; 1 when something was found that VMs cannot run with, or that \
    endangers data, or when a fix failed."
)]
pub(crate) struct DoctorArgs {
    /// Mend what can be mended safely, then check again
    #[arg(long)]
    fix: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Status 1 when there is a failure. Warnings do not count.
pub(crate) async fn doctor(client: &Client, args: DoctorArgs) -> Result<u8, Failure> {
    if args.fix {
        return fix(client, args.output.output).await;
    }
    let report = client.doctor().await?;
    match args.output.output {
        Output::Json => json(&report)?,
        Output::Table => line(&text(&report.findings, &[]))?,
    }
    Ok(if has_failure(&report.findings) { ERROR } else { 0 })
}

/// As [`doctor`], and status 1 also when a fix failed.
async fn fix(client: &Client, output: Output) -> Result<u8, Failure> {
    let mut bars = Bars::new(output == Output::Json);
    let report = client
        .doctor_fix()
        .await?
        .finish(|event| bars.show(event))
        .await?;
    drop(bars);
    match output {
        Output::Json => json(&report)?,
        Output::Table => line(&format!(
            "{}\n{}",
            done_text(&report.fixes),
            text(&report.findings, &report.fixes)
        ))?,
    }
    let mut status = if has_failure(&report.findings) { ERROR } else { 0 };
    for failed in report.fixes.into_iter().filter_map(|outcome| outcome.failed) {
        status = ERROR;
        report_and_go_on(ClientError::Api(failed).into());
    }
    Ok(status)
}

fn done_text(fixes: &[FixOutcome]) -> String {
    let done: Vec<_> = fixes.iter().flat_map(|outcome| &outcome.done).collect();
    if done.is_empty() {
        return "Nothing was mended\n".to_owned();
    }
    done.iter().fold(String::new(), |mut text, line| {
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "mended: {}", clean(line));
        text
    })
}

/// The findings by capability; what is well takes one line, what is not says what it costs and what mends it.
fn text(findings: &[Finding], tried: &[FixOutcome]) -> String {
    let mut text = String::new();
    let mut capabilities: Vec<&str> = Vec::new();
    for found in findings {
        if !capabilities.contains(&found.capability.as_str()) {
            capabilities.push(&found.capability);
        }
    }
    for capability in capabilities {
        let _ = writeln!(text, "{}", clean(capability));
        for found in findings.iter().filter(|found| found.capability == capability) {
            one(&mut text, found);
        }
    }
    text.push('\n');
    text.push_str(&summary(findings, tried));
    text
}

fn one(text: &mut String, found: &Finding) {
    let message = clean(&found.message);
    let word = match found.severity {
        Severity::Ok => {
            let _ = writeln!(text, "  ok       {message}");
            return;
        }
        Severity::Warning => "warning",
        Severity::Failure => "FAILURE",
    };
    let _ = writeln!(text, "  {word}  {message} [{}]", clean(&found.id));
    for (label, value) in [("cost", &found.cost), ("hint", &found.hint)] {
        if !value.is_empty() {
            let _ = writeln!(text, "           {label}: {}", clean(value));
        }
    }
}

/// `1 failure, 2 warnings, 9 ok`, and how many of them `--fix` mends that was not tried yet.
fn summary(findings: &[Finding], tried: &[FixOutcome]) -> String {
    let count = |severity| findings.iter().filter(|found| found.severity == severity).count();
    let plural = |count: usize, word: &str| match count {
        1 => format!("1 {word}"),
        count => format!("{count} {word}s"),
    };
    let mut text = format!(
        "{}, {}, {} ok\n",
        plural(count(Severity::Failure), "failure"),
        plural(count(Severity::Warning), "warning"),
        count(Severity::Ok)
    );
    let untried = |found: &&Finding| {
        let tried = |fix| tried.iter().any(|outcome| outcome.fix == fix);
        found.fix.is_some_and(|fix| !tried(fix))
    };
    let mendable = findings.iter().filter(untried).count();
    if mendable > 0 {
        let _ = writeln!(text, "`offshoot doctor --fix` mends {mendable} of them");
    }
    text
}

#[cfg(test)]
mod tests {
    use offshoot_model::Fix;

    use super::*;

    fn findings() -> Vec<Finding> {
        vec![
            Finding::ok("folders", "43GiB left in /var/lib/offshoot").id("disk-room"),
            Finding::ok("vmm", "qemu 7.2.22 at /usr/bin/qemu-system-x86_64").id("qemu-found"),
            Finding::new(
                "kernel",
                Severity::Failure,
                "there is no kernel yet",
                "add one with `offshoot kernel add --distro`",
            )
            .id("kernel-missing")
            .cost("no VM can be created or started"),
            Finding::new(
                "vmm",
                Severity::Warning,
                "/dev/kvm interprets \u{1b}[2J",
                "use a host whose processor offers virtualisation to Linux",
            )
            .id("kvm-emulated")
            .cost("guests are emulated in software"),
            Finding::new(
                "files",
                Severity::Failure,
                "/d/offshoot.db has mode 0644",
                "offshoot doctor --fix",
            )
            .id("mode-unsafe")
            .cost("other users can read it")
            .fix(Fix::TightenModes),
        ]
    }

    #[test]
    fn findings_are_grouped_and_explained() {
        insta::assert_snapshot!(text(&findings(), &[]), @r"
        folders
          ok       43GiB left in /var/lib/offshoot
        vmm
          ok       qemu 7.2.22 at /usr/bin/qemu-system-x86_64
          warning  /dev/kvm interprets \u{1b}[2J [kvm-emulated]
                   cost: guests are emulated in software
                   hint: use a host whose processor offers virtualisation to Linux
        kernel
          FAILURE  there is no kernel yet [kernel-missing]
                   cost: no VM can be created or started
                   hint: add one with `offshoot kernel add --distro`
        files
          FAILURE  /d/offshoot.db has mode 0644 [mode-unsafe]
                   cost: other users can read it
                   hint: offshoot doctor --fix

        2 failures, 1 warning, 2 ok
        `offshoot doctor --fix` mends 1 of them
        ");
        insta::assert_snapshot!(text(&findings()[..1], &[]), @r"
        folders
          ok       43GiB left in /var/lib/offshoot

        0 failures, 0 warnings, 1 ok
        ");
    }

    #[test]
    fn what_was_mended_is_told_and_not_promised_again() {
        let tried = [FixOutcome {
            fix: Fix::TightenModes,
            done: vec!["changed the mode of /d/offshoot.db from 0644 to 0600".into()],
            failed: None,
        }];
        insta::assert_snapshot!(done_text(&tried), @"mended: changed the mode of /d/offshoot.db from 0644 to 0600");
        assert_eq!(done_text(&[]), "Nothing was mended\n");
        assert_eq!(summary(&findings(), &tried), "2 failures, 1 warning, 2 ok\n");
    }
}
