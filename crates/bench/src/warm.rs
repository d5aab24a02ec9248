//! What a warm slot is worth, and many creates at once: from the request to the first command's result.
//!
//! ```text
//! run -d, exec true ─┬─ a template, no slot      ─┐
//!                    └─ a warm slot               ├─ in turns
//! twenty of them in a row, and all at once        ┘  (templates, no slots); where the processors' time went
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::daemon::{Daemon, IMAGE};
use crate::http::Api;
use crate::samples::{Samples, compare};

/// Creates of each side.
const RUNS: usize = 15;
/// Creates at once.
const MANY: usize = 20;

pub(crate) fn slots_and_many_at_once(daemon: &Daemon) -> Result<()> {
    let api = Api::at(&daemon.socket());
    // The template is there afterwards.
    daemon.ok(&["run", "--rm", "--boot", "template", IMAGE, "true"])?;
    let (mut with, mut without) = (Samples::new(), Samples::new());
    let mut stages = [Vec::new(), Vec::new()];
    for n in 0..RUNS {
        for (slots, side) in [(0, &mut without), (1, &mut with)] {
            warm(daemon, &api, slots)?;
            let name = format!("warm-{n}-{slots}");
            side.push(create_and_exec(daemon, &name)?);
            let details = daemon.inspect(&name)?;
            let reason = details["boot"]["reasons"][0].as_str().unwrap_or_default();
            if reason.contains("warm slot") != (slots == 1) {
                bail!("{name}: {reason}");
            }
            stages[usize::from(slots == 1)].push(details["timings"].clone());
            daemon.ok(&["rm", "-f", &name])?;
        }
    }
    println!("`run -d` and a first command, each a call of the CLI");
    compare("a warm slot", &with, "a template", &without);
    println!("  aim: at most 0.35");
    for (name, runs) in [("a template", &stages[0]), ("a warm slot", &stages[1])] {
        print_stages(name, runs);
    }
    println!();
    warm(daemon, &api, 0)?;
    many_at_once(daemon)
}

/// The stages of a start, medians.
fn print_stages(name: &str, runs: &[serde_json::Value]) {
    let mut names: Vec<String> = Vec::new();
    for run in runs {
        for stage in run.as_array().into_iter().flatten() {
            let name = stage["stage"].as_str().unwrap_or_default().to_owned();
            if stage["operation"] == "start" && !names.contains(&name) {
                names.push(name);
            }
        }
    }
    println!("  stages of a start with {name}, medians of at least 1 ms:");
    for stage in names {
        let mut samples = Samples::new();
        for run in runs {
            let found = run
                .as_array()
                .into_iter()
                .flatten()
                .find(|timed| timed["stage"] == *stage);
            if let Some(us) = found.and_then(|timed| timed["duration_us"].as_u64()) {
                samples.push(Duration::from_micros(us));
            }
        }
        if samples.percentile(50) >= 1.0 {
            println!("    {stage:<28} {:>8.1} ms", samples.percentile(50));
        }
    }
}

/// Waits until the image has so many warm slots.
fn warm(daemon: &Daemon, api: &Api, slots: u64) -> Result<()> {
    daemon.ok(&["image", "warm", IMAGE, &slots.to_string()])?;
    let began = Instant::now();
    while api.json("GET", "/v1/system/df", None)?["slots"]["count"] != slots {
        if began.elapsed() > Duration::from_secs(60) {
            bail!("waited in vain for {slots} warm slots");
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
    Ok(())
}

fn create_and_exec(daemon: &Daemon, name: &str) -> Result<Duration> {
    let began = Instant::now();
    daemon.ok(&["run", "-d", "--name", name, IMAGE, "sleep", "100000"])?;
    daemon.ok(&["exec", name, "true"])?;
    Ok(began.elapsed())
}

fn many_at_once(daemon: &Daemon) -> Result<()> {
    let names: Vec<_> = (0..MANY).map(|n| format!("many-{n}")).collect();
    let remove = || -> Result<()> {
        let words: Vec<_> = ["rm", "-f"]
            .into_iter()
            .chain(names.iter().map(String::as_str))
            .collect();
        daemon.ok(&words).map(drop)
    };
    let (in_a_row, row_spent) = timed(daemon, &names, || {
        names
            .iter()
            .try_for_each(|name| create_and_exec(daemon, name).map(drop))
    })?;
    remove()?;
    let (at_once, spent) = timed(daemon, &names, || {
        std::thread::scope(|scope| {
            let clients: Vec<_> = names
                .iter()
                .map(|name| scope.spawn(move || create_and_exec(daemon, name).map(drop)))
                .collect();
            clients.into_iter().try_for_each(|client| match client.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    })?;
    remove()?;
    println!("{MANY} times `run -d` and a first command, restored from a template");
    println!("  in a row      {:>8.2} s   {row_spent}", in_a_row.as_secs_f64());
    println!("  all at once   {:>8.2} s   {spent}", at_once.as_secs_f64());
    println!("  ratio: {:.2}", at_once.as_secs_f64() / in_a_row.as_secs_f64());
    println!("  aim: at most 0.6\n");
    Ok(())
}

/// Runs it; gives the time that it took, and in words where the processors' time went.
fn timed(daemon: &Daemon, vms: &[String], work: impl FnOnce() -> Result<()>) -> Result<(Duration, String)> {
    let (all, own) = (busy_s("/proc/stat", 1..4)?, process_s(daemon.pid())?);
    let began = Instant::now();
    work()?;
    let wall = began.elapsed();
    let (all, own) = (busy_s("/proc/stat", 1..4)? - all, process_s(daemon.pid())? - own);
    let mut vmms = 0.0;
    for vm in vms {
        let pid = daemon.inspect(vm)?["pid"].as_u64().context("a pid")?;
        vmms += process_s(u32::try_from(pid)?)?;
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let words = format!(
        "of {:.1} s of {processors} processors {all:.1} were used: {vmms:.1} by VMMs, {own:.1} by the daemon, {:.1} by the rest",
        wall.as_secs_f64() * processors as f64,
        (all - vmms - own).max(0.0)
    );
    Ok((wall, words))
}

/// Seconds of some columns of the first line (proc_stat(5): user, nice, system).
fn busy_s(path: &str, columns: std::ops::Range<usize>) -> Result<f64> {
    let text = std::fs::read_to_string(path)?;
    let line = text.lines().next().context("no line")?;
    let words: Vec<_> = line.split_whitespace().collect();
    let ticks: u64 = words
        .get(columns)
        .context("no columns")?
        .iter()
        .filter_map(|word| word.parse::<u64>().ok())
        .sum();
    Ok(ticks as f64 / 100.0)
}

/// Seconds of processor time of a process (proc_pid_stat(5), the 14th and 15th field).
fn process_s(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = text.rsplit_once(')').context("no name")?.1;
    let words: Vec<_> = rest.split_whitespace().collect();
    let ticks: u64 = words
        .get(11..13)
        .context("no times")?
        .iter()
        .filter_map(|word| word.parse::<u64>().ok())
        .sum();
    Ok(ticks as f64 / 100.0)
}
