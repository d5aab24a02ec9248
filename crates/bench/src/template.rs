//! A VM that is restored against one that boots: from the request that makes it to the result of its first command.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::bare_restore::BareRestore;
use crate::daemon::{Daemon, IMAGE};
use crate::samples::{Samples, compare};

/// Of every VM here.
const MEMORY: &str = "256m";
/// VMs of each side.
const RUNS: usize = 20;

/// `run -d` and `exec`; both ways in turn.
pub(crate) fn against_a_boot(daemon: &Daemon) -> Result<()> {
    // The first one makes the template, the second one warms caches.
    for n in 0..2 {
        life(daemon, &format!("warm-{n}"), "template")?;
    }
    let restore = BareRestore::like_a_vm_of(daemon, MEMORY)?;
    restore.run()?;
    let (mut template, mut cold, mut outside) = (Samples::new(), Samples::new(), Samples::new());
    let mut bare = Samples::new();
    let (mut stages, mut bare_stages) = (Vec::new(), Vec::new());
    for n in 0..RUNS {
        cold.push(life(daemon, &format!("cold-{n}"), "cold")?.ready);
        let (ready, bare_run) = restore.run()?;
        bare.push(ready);
        keep(&mut bare_stages, bare_run);
        let restored = life(daemon, &format!("template-{n}"), "template")?;
        template.push(restored.ready);
        outside.push(restored.outside);
        keep(&mut stages, restored.stages);
    }
    println!("create to first command, restored and booted");
    compare("--boot template", &template, "--boot cold", &cold);
    println!("  aim: at most 0.25\n");
    println!(
        "create to first command, restored, and a bare QEMU with a client of its agent restored from the same template"
    );
    compare("--boot template", &template, "bare QEMU", &bare);
    let more = template.percentile(50) - bare.percentile(50);
    println!("  p50 {more:.1} ms more; aim: at most 60\n");
    println!("the part of a restored one's outside guest and QEMU");
    outside.print("offshoot");
    println!();
    for (whose, stages) in [("a restored one's", stages), ("the bare one's", bare_stages)] {
        println!("{whose} stages");
        for (name, samples) in stages {
            samples.print(&name);
        }
        println!();
    }
    Ok(())
}

/// Sorts the stages of one life to those of others.
fn keep(stages: &mut Vec<(String, Samples)>, of_one: Vec<(String, Duration)>) {
    for (name, time) in of_one {
        let at = stages.iter().position(|(known, _)| *known == name);
        let at = at.unwrap_or_else(|| {
            stages.push((name, Samples::new()));
            stages.len() - 1
        });
        stages[at].1.push(time);
    }
}

struct Life {
    ready: Duration,
    outside: Duration,
    stages: Vec<(String, Duration)>,
}

fn life(daemon: &Daemon, name: &str, boot: &str) -> Result<Life> {
    let began = Instant::now();
    daemon.ok(&[
        "run", "-d", "--name", name, "--memory", MEMORY, "--boot", boot, IMAGE, "sleep", "100000",
    ])?;
    let run = began.elapsed();
    daemon.ok(&["exec", name, "true"])?;
    let ready = began.elapsed();
    let outside = run.saturating_sub(daemon.theirs(name)?);
    let details = daemon.inspect(name)?;
    if details["boot"]["chosen"] != boot {
        bail!("{name}: {}", details["boot"]);
    }
    let mut stages: Vec<_> = details["timings"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|stage| stage["operation"] == "start")
        .filter_map(|stage| {
            let time = Duration::from_micros(stage["duration_us"].as_u64()?);
            Some((stage["stage"].as_str()?.to_owned(), time))
        })
        .filter(|(_, time)| *time >= Duration::from_millis(1))
        .collect();
    stages.push(("exec".into(), ready.saturating_sub(run)));
    daemon.ok(&["rm", "-f", name])?;
    Ok(Life {
        ready,
        outside,
        stages,
    })
}
