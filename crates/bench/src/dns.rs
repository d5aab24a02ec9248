//! Look-ups of VMs' names: questions a second and how long one takes, beside dnsmasq with the same names.
//!
//! Both servers lie in the benchmark's network namespace and are asked from there, so what is measured is the servers.
//! dnsmasq is what hosts of VMs mostly use (libvirt, LXD); it answers from a table that does not change.

use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::daemon::Daemon;
use crate::samples::{Samples, compare};

/// How long each server is asked as often as it answers.
const FULL: &str = "5";
/// How long, and how often a second, to see how long one look-up takes.
const CALM: &str = "5";
const CALM_RATE: &str = "2000";
/// Where dnsmasq listens.
const OTHER: (&str, &str) = ("127.0.0.1", "5453");
const VMS: [&str; 4] = ["web", "db", "cache", "queue"];

/// dnsmasq; ends when dropped.
struct Dnsmasq(Child);

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Prints both.
pub(crate) fn of_vms(daemon: &Daemon) -> Result<()> {
    for vm in VMS {
        daemon.start_vm(vm, "auto", "256m")?;
    }
    let info: Value = serde_json::from_str(&daemon.ok(&["net", "dns", "--output", "json"])?)?;
    let gateway = info["servers"][0]["ipv4"].as_str().context("no server")?;
    let domain = info["domain"].as_str().context("no domain")?;
    let mut questions = String::new();
    let mut table = Vec::new();
    for vm in VMS {
        let details = daemon.inspect(vm)?;
        let [v4, v6] = ["ipv4", "ipv6"].map(|family| details["network"][family].as_str().map(str::to_owned));
        let (v4, v6) = (v4.context("no address")?, v6.context("no address")?);
        questions += &format!("{vm}.{domain} A\n{vm}.{domain} AAAA\n{vm}x.{domain} A\n");
        table.push(format!("--host-record={vm}.{domain},{v4},{v6}"));
    }
    let file = daemon.scratch().join("questions");
    std::fs::write(&file, questions)?;
    let file = file.display().to_string();
    let _dnsmasq = dnsmasq(daemon, domain, &table)?;
    let perf = |(address, port): (&str, &str), more: &[&str]| {
        let words = [&["-s", address, "-p", port, "-d", &file, "-c", "4"], more].concat();
        let output = daemon
            .inside("dnsperf")
            .args(words)
            .output()
            .context("no dnsperf")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("dnsperf: {said}{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(said)
    };
    let ours = (gateway, "53");
    println!(
        "look-ups of {} VMs (A, AAAA, and one in three of nobody), by dnsperf",
        VMS.len()
    );
    for (name, server) in [("offshootd", ours), ("dnsmasq", OTHER)] {
        let said = perf(server, &["-l", FULL])?;
        println!(
            "  {name:<34} {:>9} questions a second, {} lost",
            line(&said, "Queries per second:")?,
            line(&said, "Queries lost:")?
        );
    }
    let calm = ["-l", CALM, "-Q", CALM_RATE, "-v"];
    println!(" at {CALM_RATE} a second");
    compare(
        "offshootd",
        &latencies(&perf(ours, &calm)?)?,
        "dnsmasq",
        &latencies(&perf(OTHER, &calm)?)?,
    );
    println!();
    for vm in VMS {
        daemon.ok(&["rm", "-f", vm])?;
    }
    Ok(())
}

fn dnsmasq(daemon: &Daemon, domain: &str, table: &[String]) -> Result<Dnsmasq> {
    let child = daemon
        .inside("dnsmasq")
        .args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--user=root",
        ])
        .args(["--pid-file=", "--bind-interfaces"])
        .arg(format!("--listen-address={}", OTHER.0))
        .arg(format!("--port={}", OTHER.1))
        .arg(format!("--local=/{domain}/"))
        .args(table)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("no dnsmasq; `make install-deps` installs it")?;
    let dnsmasq = Dnsmasq(child);
    for _ in 0..1000 {
        let asked = daemon
            .inside("dig")
            .args([
                &format!("@{}", OTHER.0),
                "-p",
                OTHER.1,
                "+time=1",
                "+tries=1",
                "x",
                "A",
            ])
            .output()?;
        if asked.status.success() {
            return Ok(dnsmasq);
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
    bail!("dnsmasq does not answer")
}

/// The number behind these words.
fn line<'a>(said: &'a str, words: &str) -> Result<&'a str> {
    let rest = said.lines().find_map(|line| line.trim().strip_prefix(words));
    rest.and_then(|rest| rest.split_whitespace().next())
        .with_context(|| format!("dnsperf says no `{words}`"))
}

/// Every answer's time: `> NOERROR web.vm.internal A 0.000123`.
fn latencies(said: &str) -> Result<Samples> {
    let mut samples = Samples::new();
    for answer in said.lines().filter_map(|line| line.strip_prefix("> ")) {
        let seconds = answer
            .split_whitespace()
            .next_back()
            .and_then(|last| last.parse().ok());
        match seconds {
            Some(seconds) if !answer.starts_with('T') => samples.push(Duration::from_secs_f64(seconds)),
            // A question without an answer (`T`), which the table above counts.
            _ => {}
        }
    }
    if samples.percentile(50) <= 0.0 {
        bail!("dnsperf told no times");
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dnsperf_says_is_read() {
        let said = "> NOERROR web.vm.internal A 0.000100\n> T x.vm.internal A 0.000000\n> NXDOMAIN y A 0.000300\n\
                    Statistics:\n  Queries sent:  3\n  Queries lost:         1 (33.33%)\n  Queries per second:   51234.5\n";
        assert_eq!(line(said, "Queries per second:").unwrap(), "51234.5");
        assert_eq!(line(said, "Queries lost:").unwrap(), "1");
        let samples = latencies(said).unwrap();
        assert!((samples.percentile(99) - 0.3).abs() < 1e-9);
        latencies("").unwrap_err();
    }
}
