//! VMs with a kernel that was compiled for guests beside VMs with the distribution's.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::daemon::{Daemon, IMAGE};
use crate::samples::{Samples, compare};

/// Where bundles lie on a host whose daemon has its default directories.
const KERNELS: &str = "/var/lib/offshoot/kernels";

/// The environment variable that says which: a bundle's id, its folder, or a `vmlinux`.
pub(crate) const KERNEL: &str = "KERNEL";

/// From the call of `run -d` with `--boot cold` to the end of a first `exec`, by turns.
pub(crate) fn compiled_beside_the_distribution_s(daemon: &Daemon, runs: usize) -> Result<()> {
    let Some(kernel) = std::env::var(KERNEL).ok().filter(|kernel| !kernel.is_empty()) else {
        println!(
            "kernel: not measured; say `make bench ONLY=kernel KERNEL=ID`, of one that `offshoot kernel build` made\n"
        );
        return Ok(());
    };
    let vmlinux = find(&kernel)?;
    let path = vmlinux.to_str().context("the kernel's path is not UTF-8")?;
    let [distro] = ids(daemon)?.try_into().ok().context("not one kernel at first")?;
    let compiled = daemon.ok(&["kernel", "add", "--vmlinux", path])?;
    daemon.ok(&["kernel", "default", &distro])?;

    let (mut ours, mut theirs) = (Samples::new(), Samples::new());
    for n in 0..=runs {
        for (id, samples) in [(&compiled, &mut ours), (&distro, &mut theirs)] {
            let name = format!("kernel-{n}");
            let began = Instant::now();
            daemon.ok(&[
                "run", "-d", "--boot", "cold", "--kernel", id, "--name", &name, IMAGE, "sleep", "100000",
            ])?;
            daemon.ok(&["exec", &name, "true"])?;
            let took = began.elapsed();
            daemon.ok(&["rm", "-f", &name])?;
            // The first of each pays for cold caches.
            if n > 0 {
                samples.push(took);
            }
        }
    }
    println!("cold create to the end of the first exec, by kernel");
    compare("compiled", &ours, "distribution's", &theirs);
    println!("  aim: at most 0.6\n");
    Ok(())
}

fn ids(daemon: &Daemon) -> Result<Vec<String>> {
    let kernels: Value = serde_json::from_str(&daemon.ok(&["kernel", "ls", "--output", "json"])?)?;
    let ids = kernels.as_array().context("no list of kernels")?.iter();
    Ok(ids
        .filter_map(|kernel| kernel["id"].as_str().map(str::to_owned))
        .collect())
}

/// A bundle's id, its folder, or the kernel itself.
fn find(kernel: &str) -> Result<PathBuf> {
    let path = Path::new(kernel);
    let candidates = [
        path.to_owned(),
        path.join("vmlinux"),
        Path::new(KERNELS).join(kernel).join("vmlinux"),
    ];
    match candidates.iter().find(|candidate| candidate.is_file()) {
        Some(found) => Ok(found.clone()),
        None => bail!(
            "`{kernel}` is neither a kernel, nor the folder of a bundle, nor the id of one in {KERNELS}"
        ),
    }
}
