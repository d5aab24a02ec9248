//! Offshoot measured against what it is made of, in the same run, on the same machine.
//!
//! `offshoot-bench BIN_DIR BARE_INIT` prints, for every comparison, N, p50, p90 and p99 of both sides and the ratio of
//! the medians. Runs of A and B alternate, so that a machine that gets slower slows both. Nothing here asserts.

#![expect(clippy::print_stdout, reason = "it prints what it measured")]

mod bare;
mod daemon;
mod import;
mod samples;

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::daemon::Daemon;
use crate::samples::{Samples, compare};

/// Boots of each side.
const RUNS: usize = 15;
/// Imports of each side.
const IMPORTS: usize = 5;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let bin = arguments
        .next()
        .context("usage: offshoot-bench BIN_DIR BARE_INIT")?;
    let init = arguments
        .next()
        .context("usage: offshoot-bench BIN_DIR BARE_INIT")?;
    let daemon = Daemon::start(&bin)?;
    println!("{}\n", daemon.ok(&["system", "info"])?);
    cold_run(&daemon, &init)?;
    import::against_the_usual_tools(&daemon, IMPORTS)?;
    Ok(())
}

/// `run --rm IMAGE true` against a bare QEMU with the same arguments, kernel and disks, and the least of an init.
fn cold_run(daemon: &Daemon, init: &std::path::Path) -> Result<()> {
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
