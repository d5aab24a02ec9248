//! What went over the network devices of all VMs together. The kernel's counters end with their VM, ours go on: each look
//! adds what is new since the one before.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use metrics::{counter, gauge};
use offshoot_api::stats::NetworkStats;
use offshoot_model::VmId;

use super::float;
use super::names::{NETWORK_BYTES, NETWORK_DROPPED, NETWORK_PACKETS, NETWORKS, PUBLISHED_PORTS};
use crate::app::Shared;
use crate::blocking::blocking;
use crate::stats::Traffic;

/// What was seen of each VM that runs, by its run.
#[derive(Debug, Default)]
pub(super) struct Seen(Mutex<HashMap<Run, NetworkStats>>);

/// A VM and when its run began.
type Run = (VmId, Option<u64>);

impl Seen {
    /// Looks at what there is now.
    pub(super) async fn refresh(&self, app: &Shared) {
        let vms = app.engine.records();
        gauge!(NETWORKS).set(float(app.engine.networks().list().len() as u64));
        let running = vms.iter().filter(|vm| vm.life.state.has_vmm());
        let attached = running.clone().filter_map(|vm| vm.definition.attachment.as_ref());
        let ports: usize = attached.map(|attachment| attachment.publish.len()).sum();
        gauge!(PUBLISHED_PORTS).set(float(ports as u64));

        let namespace = app.engine.networks().namespace().clone();
        let Ok(traffic) = blocking("the count", move || Ok(Traffic::read(&namespace))).await else {
            return;
        };
        let now = running
            .filter_map(|vm| Some(((vm.id.clone(), vm.life.started_ms), traffic.of(vm)?)))
            .collect();
        let new = self.since_last(now);
        for (direction, bytes, packets, dropped) in [
            (
                "received",
                new.received_bytes,
                new.received_packets,
                new.received_dropped,
            ),
            ("sent", new.sent_bytes, new.sent_packets, new.sent_dropped),
        ] {
            counter!(NETWORK_BYTES, "direction" => direction).increment(bytes);
            counter!(NETWORK_PACKETS, "direction" => direction).increment(packets);
            counter!(NETWORK_DROPPED, "direction" => direction).increment(dropped);
        }
    }

    /// What is new in all of these together. Two looks at once count nothing twice.
    fn since_last(&self, now: HashMap<Run, NetworkStats>) -> NetworkStats {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new = NetworkStats::default();
        for (run, stats) in &now {
            let before = seen.get(run).copied().unwrap_or_default();
            for (sum, now, before) in [
                (
                    &mut new.received_bytes,
                    stats.received_bytes,
                    before.received_bytes,
                ),
                (
                    &mut new.received_packets,
                    stats.received_packets,
                    before.received_packets,
                ),
                (
                    &mut new.received_dropped,
                    stats.received_dropped,
                    before.received_dropped,
                ),
                (&mut new.sent_bytes, stats.sent_bytes, before.sent_bytes),
                (&mut new.sent_packets, stats.sent_packets, before.sent_packets),
                (&mut new.sent_dropped, stats.sent_dropped, before.sent_dropped),
            ] {
                // An older look that comes later adds nothing.
                *sum += now.saturating_sub(before);
            }
        }
        *seen = now;
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(runs: &[(u8, u64, u64)]) -> HashMap<Run, NetworkStats> {
        let stats = |received_bytes| NetworkStats {
            received_bytes,
            ..NetworkStats::default()
        };
        runs.iter()
            .map(|(id, run, bytes)| ((VmId::from_bytes(&[*id; 6]), Some(*run)), stats(*bytes)))
            .collect()
    }

    #[test]
    fn each_byte_counts_once_whoever_comes_and_goes() {
        let seen = Seen::default();
        for (runs, new) in [
            (&[(1, 1, 100)][..], 100),
            (&[(1, 1, 150), (2, 1, 7)], 57),
            (&[(1, 1, 150), (2, 1, 7)], 0),
            // Another run begins anew.
            (&[(1, 2, 30), (2, 1, 8)], 31),
            (&[], 0),
        ] {
            assert_eq!(seen.since_last(look(runs)).received_bytes, new, "{runs:?}");
        }
    }
}
