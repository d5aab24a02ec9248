//! What a pool of idle TAPs is worth: the stage that puts a VM onto its network, with a pool and without.
//!
//! ```text
//! a daemon without a pool, and one with a pool, in turns:
//!     create, start, rm of VMs on the fake VMM ─► `network.prepare` of each start, and the whole of it
//! ```
//!
//! One VM runs all the time, so that the bridge is there on both sides.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::api::{create, remove, settings, start};
use crate::daemon::Daemon;
use crate::http::Api;
use crate::samples::{Samples, compare};

/// Turns of each side, and starts in each.
const TURNS: usize = 4;
const STARTS: usize = 50;
/// More than one start takes.
const POOL: usize = 4;

/// Stages and wholes of one side.
struct Side {
    stage: Samples,
    start: Samples,
}

pub(crate) fn with_a_pool_and_without(daemon: &mut Daemon, bin: &Path) -> Result<()> {
    let settings = settings(daemon, bin)?;
    let new = || Side {
        stage: Samples::new(),
        start: Samples::new(),
    };
    let (mut with, mut without) = (new(), new());
    for _ in 0..TURNS {
        for (side, size) in [(&mut without, 0), (&mut with, POOL)] {
            daemon.kill()?;
            daemon.start_again(&format!("{settings}tap_pool_size = {size}\n"))?;
            turn(&Api::at(&daemon.socket()), side)?;
        }
    }
    println!("a VM's place on its network (`network.prepare`), on the fake VMM");
    compare("with idle TAPs", &with.stage, "without", &without.stage);
    println!("the whole of those starts");
    compare("with idle TAPs", &with.start, "without", &without.start);
    println!();
    daemon.kill()?;
    daemon.start_again("")?;
    Ok(())
}

fn turn(api: &Api, side: &mut Side) -> Result<()> {
    let neighbour = create(api)?;
    start(api, &neighbour)?;
    for _ in 0..STARTS {
        wait_for_the_pool(api)?;
        let vm = create(api)?;
        let began = Instant::now();
        start(api, &vm)?;
        side.start.push(began.elapsed());
        side.stage.push(stage(api, &vm)?);
        remove(api, &vm)?;
    }
    remove(api, &neighbour)?;
    Ok(())
}

/// How long the start of a VM took to put it onto its network.
fn stage(api: &Api, vm: &str) -> Result<Duration> {
    let details = api.json("GET", &format!("/v1/vms/{vm}"), None)?;
    let stages = details["timings"].as_array().context("no timings")?;
    let stage = stages.iter().find(|stage| stage["stage"] == "network.prepare");
    let us = stage.and_then(|stage| stage["duration_us"].as_u64());
    Ok(Duration::from_micros(us.context("no such stage")?))
}

/// Waits until as many are idle as there shall be: at once where there are none.
fn wait_for_the_pool(api: &Api) -> Result<()> {
    let began = Instant::now();
    loop {
        let info = api.json("GET", "/v1/system/info", None)?;
        if info["tap_pool"]["ready"] == info["tap_pool"]["wanted"] {
            return Ok(());
        }
        if began.elapsed() > Duration::from_secs(10) {
            bail!("the pool is not filled");
        }
        std::thread::park_timeout(Duration::from_millis(1));
    }
}
