//! A VM that is restored against one that boots: from the request that makes it to the result of its first command.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::daemon::{Daemon, IMAGE};
use crate::samples::{Samples, compare};

/// VMs of each side.
const RUNS: usize = 20;

/// `run -d` and `exec`; both ways in turn.
pub(crate) fn against_a_boot(daemon: &Daemon) -> Result<()> {
    // The first one makes the template, the second one warms caches.
    for n in 0..2 {
        life(daemon, &format!("warm-{n}"), "template")?;
    }
    let (mut template, mut cold, mut outside) = (Samples::new(), Samples::new(), Samples::new());
    let mut stages: Vec<(String, Samples)> = Vec::new();
    for n in 0..RUNS {
        cold.push(life(daemon, &format!("cold-{n}"), "cold")?.ready);
        let restored = life(daemon, &format!("template-{n}"), "template")?;
        template.push(restored.ready);
        outside.push(restored.outside);
        for (name, time) in restored.stages {
            let at = stages.iter().position(|(known, _)| *known == name);
            let at = at.unwrap_or_else(|| {
                stages.push((name, Samples::new()));
                stages.len() - 1
            });
            stages[at].1.push(time);
        }
    }
    println!("create to first command, restored and booted");
    compare("--boot template", &template, "--boot cold", &cold);
    println!("  aim: at most 0.25\n");
    println!("the part of a restored one's outside guest and QEMU");
    outside.print("offshoot");
    println!("  aim: p50 at most 60 ms\n");
    println!("its stages");
    for (name, samples) in stages {
        samples.print(&name);
    }
    Ok(())
}

struct Life {
    ready: Duration,
    outside: Duration,
    stages: Vec<(String, Duration)>,
}

fn life(daemon: &Daemon, name: &str, boot: &str) -> Result<Life> {
    let began = Instant::now();
    daemon.ok(&[
        "run", "-d", "--name", name, "--memory", "256m", "--boot", boot, IMAGE, "sleep", "100000",
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
