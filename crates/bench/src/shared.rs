//! Many VMs of one image: what each of them costs beside the one base, with every kind of root.
//!
//! ```text
//! for N in 1, 10, 50, a few rounds each:
//!     for each root, beginning with another one in every round:
//!         blocks of the data ─► start N VMs, one after another ─► blocks, memory, times ─► remove them
//! ```
//!
//! The baseline is `copy`: a private disk with the whole tree for every VM. One VM of each root runs and goes first, so
//! that nobody pays for what is made once per image.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::daemon::Daemon;
use crate::samples::{Samples, Unit};
use crate::usage::{blocks, processes_of, pss};

/// Roots to compare; the last is the baseline. The one that `auto` takes is measured under that name alone.
const ROOTS: [&str; 4] = ["auto", "block", "pmem", "copy"];

/// How many VMs at once, and how often: few VMs give few samples in a round.
const FLEETS: [(usize, usize); 3] = [(1, 5), (10, 2), (50, 1)];

/// 50 of them fit into less than 24 GiB.
const MEMORY: &str = "256m";

/// Everything that was measured of one root with one number of VMs.
struct Measured {
    root: &'static str,
    /// Growth of the data's blocks by a fleet, divided among its VMs: one sample per round.
    disk: Samples,
    /// Proportional memory of a VM's processes while the whole fleet runs: one sample per VM.
    memory: Samples,
    /// From the request to the first command's result.
    time: Samples,
    /// The part of it in which neither the VMM nor the guest worked.
    outside: Samples,
    /// The part of it that the first command took after the VM ran.
    first_command: Samples,
}

impl Measured {
    fn of(root: &'static str) -> Self {
        Self {
            root,
            disk: Samples::of(Unit::KiB),
            memory: Samples::of(Unit::MiB),
            time: Samples::new(),
            outside: Samples::new(),
            first_command: Samples::new(),
        }
    }
}

/// Prints it all.
pub(crate) fn many_vms_of_one_image(daemon: &Daemon) -> Result<()> {
    println!("many VMs of one image, {MEMORY} each");
    let mut roots = ROOTS.to_vec();
    for root in ROOTS {
        let name = format!("first-{root}");
        daemon.start_vm(&name, root, MEMORY)?;
        if root == "auto" {
            let (chosen, why) = chosen(daemon, &name)?;
            println!("  auto is `{chosen}`: {why}");
            roots.retain(|root| *root != chosen);
        }
        daemon.ok(&["rm", "-f", &name])?;
    }
    println!(
        "  the base takes {} MiB\n",
        blocks(&daemon.data().join("bases")) >> 20
    );
    for (vms, rounds) in FLEETS {
        let mut all: Vec<_> = roots.iter().map(|root| Measured::of(root)).collect();
        for round in 0..rounds {
            for n in 0..roots.len() {
                fleet(daemon, vms, &mut all[(n + round) % roots.len()])?;
            }
        }
        print(vms, &all);
    }
    Ok(())
}

/// What was chosen, and why.
fn chosen(daemon: &Daemon, vm: &str) -> Result<(String, String)> {
    let decision = &daemon.inspect(vm)?["root"];
    let reasons: Vec<_> = decision["reasons"].as_array().into_iter().flatten().collect();
    let reasons: Vec<_> = reasons.iter().filter_map(|reason| reason.as_str()).collect();
    let chosen = decision["chosen"].as_str().context("no root was chosen")?;
    Ok((chosen.to_owned(), reasons.join("; ")))
}

/// Starts so many VMs one after another, measures, and removes them.
fn fleet(daemon: &Daemon, vms: usize, measured: &mut Measured) -> Result<()> {
    let before = blocks(&daemon.data());
    let names: Vec<_> = (0..vms).map(|n| format!("{}-{n}", measured.root)).collect();
    for name in &names {
        let started = daemon.start_vm(name, measured.root, MEMORY)?;
        measured.time.push(started.total());
        measured.outside.push(started.outside);
        measured.first_command.push(started.first_command);
    }
    let grown = blocks(&daemon.data()).saturating_sub(before);
    measured.disk.push_bytes(grown / vms as u64);
    for name in &names {
        let details = daemon.inspect(name)?;
        let id = details["id"].as_str().context("no id")?;
        let mut bytes = 0;
        for pid in processes_of(id)? {
            bytes += pss(pid)?;
        }
        measured.memory.push_bytes(bytes);
    }
    let mut remove = vec!["rm", "-f"];
    remove.extend(names.iter().map(String::as_str));
    daemon.ok(&remove)?;
    Ok(())
}

fn print(vms: usize, all: &[Measured]) {
    let Some((copy, shared)) = all.split_last() else {
        return;
    };
    println!("{vms} VM{} at once", if vms == 1 { "" } else { "s" });
    for (what, samples, aim) in [
        (
            "disk added per VM",
            (|m| &m.disk) as fn(&Measured) -> &Samples,
            "under 1024 KiB, and under 0.01 of copy",
        ),
        (
            "memory per VM (PSS of its processes)",
            |m| &m.memory,
            "less than copy",
        ),
        (
            "request to first command's result",
            |m| &m.time,
            "at most 0.60 of copy",
        ),
        (
            "  of that outside VMM and guest",
            |m| &m.outside,
            "at most 0.60 of copy",
        ),
        (
            "  of that the first command",
            |m| &m.first_command,
            "no more than copy",
        ),
    ] {
        println!(" {what} (aim: {aim})");
        for measured in all {
            samples(measured).print(measured.root);
        }
        let ratios: Vec<_> = shared
            .iter()
            .map(|measured| {
                format!(
                    "{} {:.3}",
                    measured.root,
                    samples(measured).ratio_to(samples(copy))
                )
            })
            .collect();
        println!("  ratio of the medians to copy: {}", ratios.join(", "));
    }
    println!();
}

/// The times of one start.
pub(crate) struct Started {
    /// Until `offshoot run -d` returned.
    pub(crate) run: Duration,
    /// The part of it that was neither the VMM's nor the guest's.
    pub(crate) outside: Duration,
    /// Then until `offshoot exec VM true` returned.
    pub(crate) first_command: Duration,
}

impl Started {
    fn total(&self) -> Duration {
        self.run + self.first_command
    }
}
