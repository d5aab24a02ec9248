//! The daemon with many VMs: what calls take, how many fit into a second, its memory, and how long it takes to start.
//!
//! ```text
//! for N in 0, 100, 1,000 VMs that run on the fake VMM:
//!     each call, one after another ─► p50, p90, p99        by eight clients at once ─► calls a second
//!     the daemon's memory
//!     kill -9 of the daemon, start, until `system info` answers
//! `ps` beside 200 fakes and 20 real VMs
//! ```
//!
//! The fake is a process with QMP and an agent but no guest, so what is measured is the daemon's own work. There is
//! nothing to compare it with but aims.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::daemon::{Daemon, IMAGE};
use crate::http::Api;
use crate::samples::{Samples, Unit};
use crate::usage::rss;

/// How many VMs run.
const FLEETS: [usize; 3] = [0, 100, 1000];
/// Calls of each kind that change nothing.
const CALLS: usize = 500;
/// VMs that are created and started to be timed.
const CREATES: usize = 200;
/// Clients at once, where calls a second are counted.
const CLIENTS: usize = 8;
/// Starts of the daemon.
const STARTS: usize = 20;
/// What the mixed fleet has of each.
const FAKES_BESIDE: usize = 200;
const REAL_BESIDE: usize = 20;
/// What fakes have of memory, MiB; what has another number is real.
const FAKE_MEMORY_MIB: u64 = 64;
/// The least that the real ones need.
const REAL_MEMORY: &str = "256m";
/// Where Debian puts the real VMM.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Prints it all; the daemon has its own VMM again in the end.
pub(crate) fn of_a_daemon_with_many_vms(daemon: &mut Daemon, bin: &Path) -> Result<()> {
    let settings = settings(daemon, bin)?;
    daemon.kill()?;
    daemon.start_again(&settings)?;
    let api = Api::at(&daemon.socket());
    println!(
        "API calls with VMs that run on the fake VMM, a connection for each call; starts of the daemon, until `system info` answers"
    );
    let mut fleet = Vec::new();
    for size in FLEETS {
        grow(&api, &mut fleet, size)?;
        calls(daemon, &api, &fleet)?;
        starts(daemon, &settings, fleet.len())?;
    }
    shrink(&api, &mut fleet, FAKES_BESIDE)?;
    let real: Vec<_> = (0..REAL_BESIDE).map(|n| format!("real-{n}")).collect();
    for name in &real {
        daemon.start_vm(name, "auto", REAL_MEMORY)?;
    }
    println!(
        "`ps` beside {} fake VMs and {} real ones",
        fleet.len(),
        real.len()
    );
    one_after_another(CALLS, || api.call("GET", "/v1/vms", None))?.print("ps");
    println!("  aim: p99 under 50 ms\n");
    fleet.extend(real);
    shrink(&api, &mut fleet, 0)?;
    daemon.kill()?;
    daemon.start_again("")?;
    Ok(())
}

/// Settings that put a script in QEMU's place: it runs the fake for VMs of the fakes' memory, and QEMU for all others.
/// Fakes touch none of it, so any number of them may be promised theirs.
pub(crate) fn settings(daemon: &Daemon, bin: &Path) -> Result<String> {
    let fake = bin.join("offshoot-fake-vmm").canonicalize();
    let fake = fake.context("no offshoot-fake-vmm; `make bench` builds it")?;
    let script: PathBuf = daemon.scratch().join("fake-or-qemu");
    std::fs::write(
        &script,
        format!(
            "#!/bin/sh\ncase \" $* \" in\n*\" size={FAKE_MEMORY_MIB}M\"*) exec '{}' \"$@\" ;;\nesac\nexec {QEMU} \"$@\"\n",
            fake.display()
        ),
    )?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    Ok(format!(
        "qemu = {:?}\nmemory_overcommit = 1000.0\n",
        script.display().to_string()
    ))
}

pub(crate) fn create(api: &Api) -> Result<String> {
    let body = json!({"image": IMAGE, "cmd": ["sleep", "infinity"], "memory": FAKE_MEMORY_MIB << 20});
    let vm = api.json("POST", "/v1/vms", Some(&body))?;
    Ok(vm["id"].as_str().context("no id")?.to_owned())
}

pub(crate) fn start(api: &Api, id: &str) -> Result<Vec<u8>> {
    api.call("POST", &format!("/v1/vms/{id}/start"), None)
}

pub(crate) fn remove(api: &Api, id: &str) -> Result<Vec<u8>> {
    api.call("DELETE", &format!("/v1/vms/{id}?force=true"), None)
}

/// Does `work` once for each number, by all clients at once.
fn at_once<T: Send>(times: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let work = &work;
                scope
                    .spawn(move || -> Result<Vec<T>> { (client..times).step_by(CLIENTS).map(work).collect() })
            })
            .collect();
        let mut done = Vec::with_capacity(times);
        for client in clients {
            match client.join() {
                Ok(part) => done.extend(part?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(done)
    })
}

/// Times each of so many calls, one after another.
fn one_after_another<T>(times: usize, mut call: impl FnMut() -> Result<T>) -> Result<Samples> {
    let mut samples = Samples::of(Unit::Ms);
    for _ in 0..times {
        let began = Instant::now();
        call()?;
        samples.push(began.elapsed());
    }
    Ok(samples)
}

fn print_rate(name: &str, times: usize, time: Duration) {
    println!(
        "  {name:<34} N {times:>3}   {:>7.0} calls a second by {CLIENTS} clients",
        times as f64 / time.as_secs_f64()
    );
}

/// Creates and starts VMs until there are so many.
fn grow(api: &Api, fleet: &mut Vec<String>, size: usize) -> Result<()> {
    let more = at_once(size.saturating_sub(fleet.len()), |_| {
        let id = create(api)?;
        start(api, &id)?;
        Ok(id)
    })?;
    fleet.extend(more);
    Ok(())
}

/// Removes VMs until there are so many.
fn shrink(api: &Api, fleet: &mut Vec<String>, size: usize) -> Result<()> {
    let gone = fleet.split_off(size.min(fleet.len()));
    at_once(gone.len(), |n| remove(api, &gone[n]))?;
    Ok(())
}

/// Measures every kind of call.
fn calls(daemon: &Daemon, api: &Api, fleet: &[String]) -> Result<()> {
    println!(
        " {} VMs; the daemon has {:.1} MiB of RAM",
        fleet.len(),
        rss(daemon.pid())? as f64 / f64::from(1 << 20)
    );
    let ps = || api.call("GET", "/v1/vms?all=true", None);
    one_after_another(CALLS, ps)?.print("ps -a");
    let began = Instant::now();
    at_once(CALLS, |_| ps())?;
    print_rate("ps -a", CALLS, began.elapsed());

    // Where there is no VM there is one more, to be looked at.
    let mut extra = Vec::new();
    if fleet.is_empty() {
        grow(api, &mut extra, 1)?;
    }
    let vms = if fleet.is_empty() { &extra } else { fleet };
    let inspect = |n: usize| api.call("GET", &format!("/v1/vms/{}", vms[n % vms.len()]), None);
    let mut n = 0;
    one_after_another(CALLS, || {
        // Not one beside the other in any table.
        n += 7;
        inspect(n)
    })?
    .print("inspect");
    let began = Instant::now();
    at_once(CALLS, |n| inspect(7 * n))?;
    print_rate("inspect", CALLS, began.elapsed());
    shrink(api, &mut extra, 0)?;

    let mut created = Vec::new();
    one_after_another(CREATES, || {
        created.push(create(api)?);
        Ok(())
    })?
    .print("create");
    let mut each = created.iter();
    one_after_another(CREATES, || start(api, each.next().context("one for each")?))?.print("start");
    shrink(api, &mut created, 0)?;
    let began = Instant::now();
    created = at_once(CREATES, |_| create(api))?;
    print_rate("create", CREATES, began.elapsed());
    let began = Instant::now();
    at_once(CREATES, |n| start(api, &created[n]))?;
    print_rate("start", CREATES, began.elapsed());
    shrink(api, &mut created, 0)?;
    println!();
    Ok(())
}

/// Kills the daemon and starts it, again and again.
fn starts(daemon: &mut Daemon, settings: &str, vms: usize) -> Result<()> {
    let (mut samples, mut listed) = (Samples::new(), 0);
    for _ in 0..STARTS {
        daemon.kill()?;
        samples.push(daemon.start_again(settings)?);
        let all = Api::at(&daemon.socket()).json("GET", "/v1/vms", None)?;
        listed = all.as_array().map_or(0, Vec::len);
    }
    samples.print("the daemon itself: kill -9, start");
    println!("  `ps` lists {listed} of {vms} right after\n");
    Ok(())
}
