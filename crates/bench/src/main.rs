//! Offshoot measured against what it is made of, in the same run, on the same machine.
//!
//! `offshoot-bench BIN_DIR BARE_INIT [NAME...]` prints, for every comparison or for those that are named, N, p50, p90 and p99 of both sides and the ratio of
//! the medians. Runs of A and B alternate, so that a machine that gets slower slows both. Nothing here asserts.

#![expect(clippy::print_stdout, reason = "it prints what it measured")]

mod api;
mod bare;
mod bare_restore;
mod daemon;
mod dns;
mod http;
mod import;
mod kernel;
mod samples;
mod seeds;
mod shared;
mod ssh;
mod taps;
mod template;
mod throughput;
mod usage;
mod warm;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::daemon::Daemon;
use crate::samples::{Samples, compare};

/// Boots of each side.
const RUNS: usize = 15;
/// Imports of each side.
const IMPORTS: usize = 5;

/// Every comparison by its name.
const NAMES: [&str; 12] = [
    "cold-run",
    "import",
    "seeds",
    "shared",
    "template",
    "api",
    "dns",
    "ssh",
    "throughput",
    "kernel",
    "taps",
    "warm",
];

fn main() -> Result<()> {
    let usage = || {
        format!(
            "usage: offshoot-bench BIN_DIR BARE_INIT [NAME...], where NAME is one of {}",
            NAMES.join(", ")
        )
    };
    let mut arguments = std::env::args().skip(1);
    let bin = arguments.next().map(PathBuf::from).with_context(usage)?;
    let init = arguments.next().map(PathBuf::from).with_context(usage)?;
    let mut names: Vec<String> = arguments.collect();
    if let Some(unknown) = names.iter().find(|name| !NAMES.contains(&name.as_str())) {
        bail!("no comparison is called `{unknown}`; {}", usage());
    }
    if names.is_empty() {
        names = NAMES.map(str::to_owned).to_vec();
    }
    let mut daemon = Daemon::start(&bin)?;
    println!("{}\n", daemon.ok(&["system", "info"])?);
    for name in names {
        match name.as_str() {
            "cold-run" => cold_run(&daemon, &init)?,
            "import" => import::against_the_usual_tools(&daemon, IMPORTS)?,
            "seeds" => seeds::of_work_disks(&daemon)?,
            "shared" => shared::many_vms_of_one_image(&daemon)?,
            "template" => template::against_a_boot(&daemon)?,
            "dns" => dns::of_vms(&daemon)?,
            "ssh" => ssh::beside_a_stock_sshd(&daemon)?,
            "kernel" => kernel::compiled_beside_the_distribution_s(&daemon, RUNS)?,
            "taps" => taps::with_a_pool_and_without(&mut daemon, &bin)?,
            "warm" => warm::slots_and_many_at_once(&daemon)?,
            "throughput" => throughput::of_a_network(&daemon)?,
            "api" => api::of_a_daemon_with_many_vms(&mut daemon, &bin)?,
            _ => bail!("{}", usage()),
        }
    }
    Ok(())
}

/// `run --rm IMAGE true` against a bare QEMU with the same arguments, kernel and disks, and the least of an init.
fn cold_run(daemon: &Daemon, init: &Path) -> Result<()> {
    let bare = bare::Bare::like_a_vm_of(daemon, init)?;
    let (mut ours, mut theirs, mut outside) = (Samples::new(), Samples::new(), Samples::new());
    // One of each first, so that nobody pays for cold caches.
    bare.run()?;
    daemon.run_and_remove()?;
    for n in 0..RUNS {
        theirs.push(bare.run()?);
        ours.push(daemon.run_and_remove()?);
        // Once more without `--rm`: a VM that is gone tells no timings.
        outside.push(daemon.outside_of_a_run(&format!("bench-{n}"))?);
    }
    println!("cold `run --rm IMAGE true`, from the CLI's start to its end");
    compare("offshoot run --rm", &ours, "bare QEMU", &theirs);
    println!("  aim: at most 1.15\n");
    println!("the part of `run` outside guest and QEMU");
    outside.print("offshoot");
    println!("  aim: p50 at most 30 ms\n");
    Ok(())
}
