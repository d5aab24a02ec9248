//! TCP throughput between host and guest and between two guests, by iperf3.
//!
//! What a guest can do is bounded by its VMM: the same bytes between two namespaces over a veth pair say how far the
//! network of VMs is from what this host's kernel does by itself.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::daemon::Daemon;
use crate::samples::{Samples, Unit};

/// Streams of each kind.
const RUNS: usize = 5;
/// How long each lasts, seconds.
const SECONDS: &str = "3";
/// The image with iperf3 in it.
const IMAGE: &str = "bench-throughput:latest";

/// Prints all of them.
pub(crate) fn of_a_network(daemon: &Daemon) -> Result<()> {
    daemon.ok(&[
        "image",
        "bootstrap",
        "debian:bookworm",
        "--name",
        IMAGE,
        "--include",
        "iperf3",
    ])?;
    for name in ["left", "right"] {
        daemon.ok(&["run", "-d", "--name", name, IMAGE, "iperf3", "-s"])?;
    }
    let left = address(daemon, "left")?;
    let veth = Veth::make(daemon)?;
    let (mut to_guest, mut from_guest, mut between, mut kernel) =
        (mebibytes(), mebibytes(), mebibytes(), mebibytes());
    for _ in 0..RUNS {
        to_guest.push_bytes(client(daemon.inside("iperf3"), &left, &[])?);
        from_guest.push_bytes(client(daemon.inside("iperf3"), &left, &["-R"])?);
        let right = daemon.command(&["exec", "right", "iperf3"]);
        between.push_bytes(client(right, &left, &[])?);
        kernel.push_bytes(client(daemon.inside("iperf3"), Veth::SERVER, &[])?);
    }
    drop(veth);
    daemon.ok(&["rm", "-f", "left", "right"])?;
    println!("TCP throughput, {SECONDS} s each, MiB a second");
    to_guest.print("host to guest");
    from_guest.print("guest to host");
    between.print("guest to guest");
    kernel.print("host alone, over a veth pair");
    println!(
        "  ratios of the medians to the host alone: {:.3}, {:.3}, {:.3}\n",
        to_guest.ratio_to(&kernel),
        from_guest.ratio_to(&kernel),
        between.ratio_to(&kernel)
    );
    Ok(())
}

fn mebibytes() -> Samples {
    Samples::of(Unit::MiB)
}

fn address(daemon: &Daemon, vm: &str) -> Result<String> {
    let details = daemon.inspect(vm)?;
    let address = details["network"]["ipv4"].as_str();
    Ok(address.context("the VM has no address")?.to_owned())
}

/// One stream; gives the bytes that arrived in a second. The server may still be coming up.
fn client(mut command: Command, server: &str, more: &[&str]) -> Result<u64> {
    command.args(["-c", server, "-t", SECONDS, "-J"]).args(more);
    let began = Instant::now();
    loop {
        let output = command.output().context("cannot run iperf3")?;
        let said: Value = serde_json::from_slice(&output.stdout).context("iperf3 printed no JSON")?;
        if let Some(bits) = said["end"]["sum_received"]["bits_per_second"].as_f64() {
            // Whole bytes; a fraction of one is noise.
            return Ok((bits / 8.0) as u64);
        }
        if began.elapsed() > Duration::from_secs(60) {
            bail!("iperf3 to {server}: {}", said["error"]);
        }
        std::thread::park_timeout(Duration::from_millis(200));
    }
}

/// A namespace beside the daemon's, with an iperf3 server, and a pair of veths between them.
struct Veth {
    name: String,
    server: Child,
}

impl Veth {
    /// Of the range for documentation (RFC 5737): no network of VMs has it.
    const SERVER: &'static str = "192.0.2.2";

    fn make(daemon: &Daemon) -> Result<Self> {
        let (ours, theirs) = (daemon.namespace(), format!("{}-far", daemon.namespace()));
        let ip = |words: &[&str]| -> Result<()> {
            let done = Command::new("ip").args(words).status().context("cannot run ip")?;
            if !done.success() {
                bail!("ip {}", words.join(" "));
            }
            Ok(())
        };
        ip(&["netns", "add", &theirs])?;
        let spawned = ip(&[
            "-n", ours, "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", &theirs,
        ])
        .and_then(|()| ip(&["-n", ours, "addr", "add", "192.0.2.1/24", "dev", "near"]))
        .and_then(|()| ip(&["-n", &theirs, "addr", "add", "192.0.2.2/24", "dev", "far"]))
        .and_then(|()| ip(&["-n", ours, "link", "set", "near", "up"]))
        .and_then(|()| ip(&["-n", &theirs, "link", "set", "far", "up"]))
        .and_then(|()| {
            Command::new("ip")
                .args(["netns", "exec", &theirs, "iperf3", "-s"])
                .stdout(Stdio::null())
                .spawn()
                .context("cannot run iperf3")
        });
        match spawned {
            Ok(server) => Ok(Self { name: theirs, server }),
            Err(error) => {
                let _ = Command::new("ip").args(["netns", "del", &theirs]).status();
                Err(error)
            }
        }
    }
}

impl Drop for Veth {
    fn drop(&mut self) {
        // `ip netns exec` has become the server.
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}
