//! `system info`, `version`, `completion`: the daemon and this program themselves.

use clap::{Args, CommandFactory, Subcommand, ValueEnum};
use offshoot_api::client::{Client, ClientError};
use offshoot_api::system::SystemInfo;
use serde::Serialize;

use crate::age;
use crate::args::Cli;
use crate::error::Failure;
use crate::output::{Output, OutputArgs, clean, json, line};

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
        "Version:         {} (API {})\nProcess:         {}, up {}\nSocket:          {}\nSettings:        {}\n\
         Data directory:  {}\nRun directory:   {}\nKVM:             {} ({})\n\
         VMs:             {} ({} running)\nImages:          {}\n",
        clean(&info.version),
        clean(&info.api_version),
        info.pid,
        age::lower_first(&age::words(info.uptime_s)),
        clean(&info.socket),
        info.config_file.as_deref().map_or("defaults".into(), clean),
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
