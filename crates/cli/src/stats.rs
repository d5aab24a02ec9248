//! `stats`: what running VMs take, once or again and again.

use std::collections::HashMap;
use std::io::{self, IsTerminal as _};
use std::time::Duration;

use clap::Args;
use offshoot_api::client::{Client, ClientError};
use offshoot_api::stats::VmStats;
use offshoot_model::{ByteSize, ErrorKind, VmId};

use crate::error::Failure;
use crate::output::{Output, OutputArgs, json, line, table};
use crate::values::vm_ref;

/// How often it is asked, as Docker does.
const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Args)]
pub(crate) struct StatsArgs {
    /// Show it once and end
    #[arg(long)]
    no_stream: bool,
    #[command(flatten)]
    output: OutputArgs,
    /// Names or ids [default: every VM that runs]
    #[arg(value_name = "VM", value_parser = vm_ref)]
    vms: Vec<String>,
}

pub(crate) async fn stats(client: &Client, args: &StatsArgs) -> Result<u8, Failure> {
    let mut now = ask_first(client, &args.vms).await?;
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The first one is at once.
    ticks.tick().await;
    match (args.output.output, args.no_stream) {
        (Output::Json, true) => json(&now)?,
        (Output::Json, false) => loop {
            let text = serde_json::to_string(&now)
                .map_err(|e| Failure::invalid("cannot write the result as JSON").caused_by(&e))?;
            line(&text)?;
            ticks.tick().await;
            now = ask_again(client, &args.vms).await?;
            if now.is_empty() && !args.vms.is_empty() {
                break;
            }
        },
        (Output::Table, true) => {
            // A rate is between two moments.
            ticks.tick().await;
            let later = ask_again(client, &args.vms).await?;
            line(&stats_table(&now, &later))?;
        }
        (Output::Table, false) => {
            let refresh = io::stdout().is_terminal();
            let mut before = Vec::new();
            loop {
                let shown = stats_table(&before, &now);
                line(&if refresh { on_a_screen(&shown) } else { shown })?;
                ticks.tick().await;
                before = std::mem::replace(&mut now, ask_again(client, &args.vms).await?);
                if now.is_empty() && !args.vms.is_empty() {
                    break;
                }
            }
        }
    }
    Ok(0)
}

/// All that is asked for must be there.
async fn ask_first(client: &Client, vms: &[String]) -> Result<Vec<VmStats>, Failure> {
    if vms.is_empty() {
        return Ok(client.stats().await?);
    }
    let mut stats = Vec::new();
    for vm in vms {
        stats.push(client.vm_stats(vm).await?);
    }
    Ok(stats)
}

/// Those that are still there.
async fn ask_again(client: &Client, vms: &[String]) -> Result<Vec<VmStats>, Failure> {
    if vms.is_empty() {
        return Ok(client.stats().await?);
    }
    let mut stats = Vec::new();
    for vm in vms {
        match client.vm_stats(vm).await {
            Ok(one) => stats.push(one),
            Err(ClientError::Api(error))
                if matches!(error.kind, ErrorKind::NotFound | ErrorKind::WrongState) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(stats)
}

/// A table in place of the one before: from the upper left, each line cleared behind its end, and all below.
fn on_a_screen(text: &str) -> String {
    format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"))
}

fn size(bytes: u64) -> String {
    ByteSize::from_bytes(bytes).to_string()
}

fn stats_table(before: &[VmStats], now: &[VmStats]) -> String {
    let before: HashMap<&VmId, &VmStats> = before.iter().map(|vm| (&vm.id, vm)).collect();
    let rows = now.iter().map(|vm| {
        let memory = &vm.memory.processes;
        vec![
            vm.name.to_string(),
            vm.id.to_string(),
            before
                .get(&vm.id)
                .and_then(|before| cpu_percent(before, vm))
                .map_or("--".to_owned(), |percent| format!("{percent:.1}%")),
            format!("{} / {}", size(memory.unique), size(vm.memory.guest)),
            size(memory.shared),
            size(vm.disk.unique),
            format!("{} / {}", size(vm.disk.read), size(vm.disk.written)),
            vm.network.map_or("--".to_owned(), |network| {
                format!("{} / {}", size(network.received_bytes), size(network.sent_bytes))
            }),
            vm.pids.current.to_string(),
        ]
    });
    table(
        &[
            "NAME",
            "ID",
            "CPU",
            "MEMORY / GUEST",
            "SHARED",
            "DISK",
            "READ / WRITTEN",
            "RECEIVED / SENT",
            "PIDS",
        ],
        rows,
    )
}

/// Of one processor, so that two busy vCPUs are 200; `None` where the two are not of one run, or of one moment.
fn cpu_percent(before: &VmStats, now: &VmStats) -> Option<f64> {
    if before.started_ms != now.started_ms {
        return None;
    }
    let time = now
        .read_at_us
        .checked_sub(before.read_at_us)
        .filter(|time| *time > 0)?;
    let used = now.cpu.used_us.checked_sub(before.cpu.used_us)?;
    Some(used as f64 * 100.0 / time as f64)
}

#[cfg(test)]
mod tests {
    use offshoot_api::stats::{CpuStats, DiskStats, MemoryStats, NetworkStats, PidStats};
    use offshoot_api::usage::MemoryUsage;
    use offshoot_model::VmState;

    use super::*;

    fn example(read_at_us: u64, used_us: u64) -> VmStats {
        VmStats {
            id: VmId::from_bytes(&[0xab; 6]),
            name: "web".parse().unwrap(),
            state: VmState::Running,
            read_at_us,
            started_ms: Some(7),
            cpu: CpuStats {
                used_us,
                vcpus: 2,
                limit_milli: Some(3000),
                throttled_periods: Some(0),
            },
            memory: MemoryStats {
                guest: 512 << 20,
                processes: MemoryUsage {
                    processes: 1,
                    unique: 95 << 20,
                    shared: 22 << 20,
                    ..MemoryUsage::default()
                },
                ..MemoryStats::default()
            },
            disk: DiskStats {
                allocated: 3 << 20,
                unique: 1 << 20,
                read: 40 << 20,
                written: 1536 << 10,
            },
            network: Some(NetworkStats {
                received_bytes: 3 << 20,
                sent_bytes: 1 << 10,
                ..NetworkStats::default()
            }),
            pids: PidStats {
                current: 6,
                limit: Some(130),
            },
        }
    }

    #[test]
    fn a_rate_is_between_two_moments_of_one_run() {
        let before = example(1_000_000, 5_000_000);
        let check = |now: &VmStats, expected: Option<f64>| assert_eq!(cpu_percent(&before, now), expected);
        check(&example(2_000_000, 6_500_000), Some(150.0));
        check(&example(2_000_000, 5_000_000), Some(0.0));
        check(&before, None);
        check(&example(2_000_000, 0), None);
        let another_run = VmStats {
            started_ms: Some(8),
            ..example(2_000_000, 6_000_000)
        };
        check(&another_run, None);
    }

    #[test]
    fn stats_look_like_dockers() {
        let (before, now) = (example(1_000_000, 5_000_000), example(2_000_000, 6_234_000));
        insta::assert_snapshot!(stats_table(&[before], std::slice::from_ref(&now)), @r"
        NAME   ID             CPU      MEMORY / GUEST   SHARED   DISK   READ / WRITTEN   RECEIVED / SENT   PIDS
        web    abababababab   123.4%   95MiB / 512MiB   22MiB    1MiB   40MiB / 1.5MiB   3MiB / 1KiB       6
        ");
        let first = stats_table(&[], &[now]);
        assert!(first.contains("   --    95MiB"), "{first}");
        assert_eq!(on_a_screen("a\nb\n"), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
    }
}
