//! `bench create`: how long it takes from a request to a VM that has answered.
//!
//! ```text
//! request ─► created ─► running ─► first command's output was read and is right ─► SSH: banner, key, `true`
//!            └─────── each on the client's clock, with the daemon's own stages of the same VM ───────┘
//! ```
//!
//! What is compared (several of `--boot`, `--root`, `--kernel`) alternates within one run, so that a machine that gets
//! slower slows all of it. VMs are named `bench-RUN-NUMBER` and are gone when this ends, however it ends; should this
//! program be killed, they end by themselves after an hour.
//!
//! Read in this order: [`report`] is what is written, [`drive`] makes it, [`summary`] and [`plot`] show it.

mod drive;
mod facts;
mod plot;
mod report;
mod ssh;
mod summary;
mod variant;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use offshoot_api::client::Client;
use offshoot_model::{Boot, ByteSize, KernelId, RootRequest};

use crate::error::{ERROR, Failure};
use crate::output::{Output, json, line, note};
use crate::values::api_words;
use report::Report;

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure from the request for a VM to its first answers; status 1 when a VM failed
    Create(Box<BenchArgs>),
}

/// The values that are compared, and everything else about the VMs.
#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArgs {
    /// How many VMs to measure, of each kind that is compared
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// How many VMs of each kind to make first, which do not count
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=1000))]
    warmup: u32,
    /// How many VMs to make at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    parallel: u32,
    /// What the VMs are made from; it must have `sleep` and `echo`, and `true` for SSH
    #[arg(long, value_name = "REF", default_value = "debian:bookworm")]
    image: String,
    /// Whether to boot or to restore a template; several are compared
    #[arg(long, value_name = "BOOT", default_value = "auto", value_delimiter = ',',
        value_parser = api_words::<Boot>(&["auto", "cold", "template"]))]
    boot: Vec<Boot>,
    /// How the guest sees its root; several are compared
    #[arg(long, value_name = "ROOT", default_value = "auto", value_delimiter = ',',
        value_parser = api_words::<RootRequest>(&["auto", "pmem", "block", "virtiofs", "copy"]))]
    root: Vec<RootRequest>,
    /// Kernel bundles to boot, instead of the default; several are compared
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    kernel: Vec<KernelId>,
    /// Memory of each VM, such as 512m [default: 512m]
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// vCPUs of each VM [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Also wait until each VM's SSH server lets this user in and runs `true`
    #[arg(long)]
    ssh: bool,
    /// Remove the VMs when all are measured, not each when it is
    #[arg(long)]
    hold: bool,
    /// Draw each run's stages into this file, as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// How to show the result; `json` has every sample
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

pub(crate) async fn bench(client: &Client, command: BenchCommand) -> Result<u8, Failure> {
    let BenchCommand::Create(args) = command;
    let report = drive::drive(client, &args).await?;
    match args.output {
        Output::Json => json(&report)?,
        Output::Table => line(&summary::text(&report))?,
    }
    if let Some(path) = &args.svg {
        std::fs::write(path, plot::svg(&report))
            .map_err(|e| Failure::io(format!("cannot write {}", path.display()), &e))?;
    }
    status(&report)
}

/// 0 when every VM that was asked for answered, 1 when one failed, 130 after Ctrl-C.
fn status(report: &Report) -> Result<u8, Failure> {
    for failure in &report.failures {
        note(&format!(
            "run {} ({}) failed at {}: {}",
            failure.run, failure.variant, failure.step, failure.error
        ));
    }
    if report.interrupted {
        return Err(Failure::cancelled());
    }
    Ok(if report.failures.is_empty() { 0 } else { ERROR })
}
