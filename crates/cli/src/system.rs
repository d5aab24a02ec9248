//! `system info`, `doctor`, `version`, `completion`: the daemon and this program themselves.

use clap::{Args, CommandFactory, Subcommand, ValueEnum};
use offshoot_api::client::{Client, ClientError};
use offshoot_api::system::{DoctorReport, SystemInfo};
use offshoot_model::Severity;
use serde::Serialize;

use crate::args::Cli;
use crate::error::{ERROR, Failure};
use crate::output::{Output, OutputArgs, clean, json, line, table};

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum SystemCommand {
    /// Show what the daemon is and has
    Info(OutputArgs),
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct CompletionArgs {
    /// Shell to write for
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Serialize)]
struct Versions {
    client: &'static str,
    daemon: Option<String>,
}

pub(crate) async fn info(client: &Client, args: OutputArgs) -> Result<u8, Failure> {
    let info = client.info().await?;
    match args.output {
        Output::Json => json(&info)?,
        Output::Table => line(&info_text(&info))?,
    }
    Ok(0)
}

fn info_text(info: &SystemInfo) -> String {
    let mut text = format!(
        "Version:         {}\nProcess:         {}\nData directory:  {}\nRun directory:   {}\nKVM:             {} ({})\n\
         VMs:             {} ({} running)\nImages:          {}\n",
        clean(&info.version),
        info.pid,
        clean(&info.data_dir),
        clean(&info.run_dir),
        clean(&info.kvm),
        clean(&info.kvm_explanation),
        info.vms,
        info.running,
        info.images,
    );
    for vmm in &info.vmms {
        let (name, version, path) = (clean(&vmm.name), clean(&vmm.version), clean(&vmm.path));
        text.push_str(&format!(
            "VMM:             {name} {version} ({path}): {}\n",
            clean(&vmm.features.join(", "))
        ));
    }
    text
}

/// Status 1 when something is missing that VMs cannot run without.
pub(crate) async fn doctor(client: &Client, args: OutputArgs) -> Result<u8, Failure> {
    let report = client.doctor().await?;
    match args.output {
        Output::Json => json(&report)?,
        Output::Table => line(&doctor_text(&report))?,
    }
    let failed = report
        .findings
        .iter()
        .any(|finding| finding.severity == Severity::Failure);
    Ok(if failed { ERROR } else { 0 })
}

fn doctor_text(report: &DoctorReport) -> String {
    let rows = report.findings.iter().map(|finding| {
        let result = match finding.severity {
            Severity::Ok => "ok",
            Severity::Warning => "warning",
            Severity::Failure => "FAILURE",
        };
        vec![
            result.to_owned(),
            finding.capability.clone(),
            finding.message.clone(),
        ]
    });
    let mut text = table(&["RESULT", "CAPABILITY", "FINDING"], rows);
    for finding in report.findings.iter().filter(|finding| !finding.hint.is_empty()) {
        text.push_str(&format!(
            "hint: {}: {}\n",
            clean(&finding.capability),
            clean(&finding.hint)
        ));
    }
    text
}

pub(crate) async fn version(client: &Client, args: OutputArgs) -> Result<u8, Failure> {
    let ours = env!("CARGO_PKG_VERSION");
    let daemon = match client.info().await {
        Ok(info) => Ok(info.version),
        Err(e @ ClientError::Unreachable { .. }) => Err(e.to_string()),
        Err(e) => return Err(e.into()),
    };
    match args.output {
        Output::Json => json(&Versions {
            client: ours,
            daemon: daemon.ok(),
        })?,
        Output::Table => {
            let theirs = daemon.map_or_else(|e| format!("({e})"), |version| clean(&version));
            line(&format!("offshoot   {ours}\noffshootd  {theirs}\n"))?;
        }
    }
    Ok(0)
}

pub(crate) fn completion(args: &CompletionArgs) -> Result<u8, Failure> {
    let shell = match args.shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "offshoot", &mut script);
    line(&String::from_utf8_lossy(&script))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use offshoot_model::Finding;

    #[test]
    fn doctor_names_what_is_missing_and_what_mends_it() {
        let finding = |capability: &str, severity, message: &str, hint: &str| Finding {
            capability: capability.into(),
            severity,
            message: message.into(),
            hint: hint.into(),
        };
        let report = DoctorReport {
            findings: vec![
                finding("root", Severity::Ok, "mkfs.erofs 1.5", ""),
                finding(
                    "kvm",
                    Severity::Warning,
                    "/dev/kvm is emulated; VMs run with TCG",
                    "run on bare metal",
                ),
                finding(
                    "vmm",
                    Severity::Failure,
                    "no VMM",
                    "apt-get install qemu-system-x86",
                ),
            ],
        };
        insta::assert_snapshot!(doctor_text(&report), @r#"
        RESULT    CAPABILITY   FINDING
        ok        root         mkfs.erofs 1.5
        warning   kvm          /dev/kvm is emulated; VMs run with TCG
        FAILURE   vmm          no VMM
        hint: kvm: run on bare metal
        hint: vmm: apt-get install qemu-system-x86
        "#);
    }
}
