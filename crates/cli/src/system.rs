//! `system info`, `system shutdown`, `version`, `completion`: the daemon and this program themselves.

use clap::{Args, CommandFactory, Subcommand, ValueEnum};
use offshoot_api::client::{Client, ClientError};
use offshoot_api::operation::OperationsQuery;
use offshoot_api::system::{ShutdownRequest, SystemInfo};
use offshoot_model::{OperationId, VmName};
use serde::Serialize;

use crate::age;
use crate::args::Cli;
use crate::error::Failure;
use crate::output::{Output, OutputArgs, clean, json, line};
use crate::timings;
use crate::values::vm_ref;

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum SystemCommand {
    /// Show what the daemon is and has
    Info(OutputArgs),
    /// Draw where the time of the last operations went, on VMs, images and kernels
    Timings(TimingsArgs),
    /// End the daemon; VMs run on, and the next daemon finds them again
    Shutdown(ShutdownArgs),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct TimingsArgs {
    /// How many operations to show, the newest
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10)]
    last: u32,
    /// Only this kind, such as `start`, `pull` or `kernel-add`
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Only the operation with this id, as errors and events name it
    #[arg(long, value_name = "ID")]
    operation: Option<OperationId>,
    /// Only those on this VM
    #[arg(long, value_name = "VM", value_parser = vm_ref)]
    vm: Option<String>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct ShutdownArgs {
    /// Also give back what is only kept ready for VMs to come: idle TAP devices
    #[arg(long)]
    drain: bool,
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

pub(crate) async fn timings(client: &Client, args: TimingsArgs) -> Result<u8, Failure> {
    let vm = args.vm.map(|vm| vm.parse::<VmName>()).transpose();
    let query = OperationsQuery {
        vm: vm.map_err(|e| Failure::explained(&e))?,
        kind: args.kind,
        operation: args.operation,
        limit: Some(args.last),
    };
    let operations = client.operations(&query).await?;
    match args.output.output {
        Output::Json => json(&operations)?,
        Output::Table => line(&timings::draw(&operations))?,
    }
    Ok(0)
}

pub(crate) async fn shut_down(client: &Client, args: &ShutdownArgs) -> Result<u8, Failure> {
    let request = ShutdownRequest {
        pid: client.info().await?.pid,
        drain: args.drain,
    };
    client.shut_down(&request).await?;
    Ok(0)
}

fn info_text(info: &SystemInfo) -> String {
    let mut text = format!(
        "Version:         {} (API {})\nProcess:         {}, up {}\nSocket:          {}\nSettings:        {}\n\
         Data directory:  {}\nRun directory:   {}\nKVM:             {} ({})\n\
         VMs:             {} ({} running)\nImages:          {}\nIdle TAPs:       {} of {}\n",
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
        info.tap_pool.ready,
        info.tap_pool.wanted,
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
