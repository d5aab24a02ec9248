//! Every metric's name and meaning. `docs/observability.md` lists the same.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use offshoot_engine::measure;
use offshoot_net::dns::measure as dns;

pub(super) const BUILD_INFO: &str = "offshoot_build_info";
pub(super) const VMS: &str = "offshoot_vms";
pub(super) const API_REQUESTS: &str = "offshoot_api_requests_total";
pub(super) const API_REQUEST_SECONDS: &str = "offshoot_api_request_duration_seconds";
pub(super) const IMAGES: &str = "offshoot_images";
pub(super) const BASES: &str = "offshoot_bases";
pub(super) const KERNELS: &str = "offshoot_kernels";
pub(super) const STORAGE_BYTES: &str = "offshoot_storage_bytes";
pub(super) const RECLAIMABLE_BYTES: &str = "offshoot_storage_reclaimable_bytes";
pub(super) const VM_MEMORY_BYTES: &str = "offshoot_vm_memory_bytes";
pub(super) const VM_COPIES_BYTES: &str = "offshoot_vm_private_copies_bytes";
pub(super) const VM_TAKEN_BYTES: &str = "offshoot_vm_taken_bytes";
pub(super) const DEDUP_RATIO: &str = "offshoot_dedup_ratio";
pub(super) const NETWORKS: &str = "offshoot_networks";
pub(super) const PUBLISHED_PORTS: &str = "offshoot_published_ports";
pub(super) const NETWORK_BYTES: &str = "offshoot_network_bytes_total";
pub(super) const NETWORK_PACKETS: &str = "offshoot_network_packets_total";
pub(super) const NETWORK_DROPPED: &str = "offshoot_network_dropped_packets_total";
pub(super) const TAP_POOL_WANTED: &str = "offshoot_tap_pool_wanted";
pub(super) const TAP_POOL_READY: &str = "offshoot_tap_pool_ready";
pub(super) const WARM_SLOTS: &str = "offshoot_warm_slots";
pub(super) const RESIDENT_BYTES: &str = "process_resident_memory_bytes";
pub(super) const OPEN_FDS: &str = "process_open_fds";
pub(super) const MAX_FDS: &str = "process_max_fds";
pub(super) const START_SECONDS: &str = "process_start_time_seconds";
pub(super) const CPU_SECONDS: &str = "process_cpu_seconds_total";

/// How a metric moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Up only.
    Counter,
    /// Up and down.
    Gauge,
    /// How often values lay where.
    Histogram,
}

/// Every metric: how it moves, its name, what it counts.
pub(super) const ALL: [(Kind, &str, &str); 35] = [
    (Kind::Gauge, BUILD_INFO, "Always 1; its labels say what runs"),
    (Kind::Gauge, VMS, "VMs by state"),
    (
        Kind::Counter,
        measure::OPERATIONS,
        "Operations on VMs by kind and outcome",
    ),
    (
        Kind::Histogram,
        measure::OPERATION_SECONDS,
        "How long operations on VMs take, from the first stage to the last",
    ),
    (
        Kind::Histogram,
        measure::STAGE_SECONDS,
        "How long the stages of operations take, whether they succeed or fail",
    ),
    (Kind::Counter, measure::EVENTS, "Events by action"),
    (Kind::Counter, measure::EXITS, "Ends of runs of VMs by reason"),
    (
        Kind::Counter,
        API_REQUESTS,
        "Requests to the API; status 499 where the client did not wait for the answer",
    ),
    (
        Kind::Histogram,
        API_REQUEST_SECONDS,
        "How long the API takes from a request's head to the head of its answer",
    ),
    (
        Kind::Counter,
        dns::QUERIES,
        "Look-ups of names by kind and outcome",
    ),
    (
        Kind::Histogram,
        dns::FORWARD_SECONDS,
        "How long other resolvers take to answer for names that are none of ours",
    ),
    (Kind::Gauge, IMAGES, "Images, each once, whatever names it has"),
    (Kind::Gauge, BASES, "Bases"),
    (Kind::Gauge, KERNELS, "Kernel bundles"),
    (
        Kind::Gauge,
        STORAGE_BYTES,
        "Bytes on disk by kind; for VMs only what they share with nothing, so that the kinds add up",
    ),
    (
        Kind::Gauge,
        RECLAIMABLE_BYTES,
        "Bytes on disk that `offshoot prune` would free",
    ),
    (
        Kind::Gauge,
        VM_MEMORY_BYTES,
        "Memory of the processes of all VMs together; `resident` counts a page once for each that maps it",
    ),
    (
        Kind::Gauge,
        VM_COPIES_BYTES,
        "Bytes on disk that VMs would take with a private copy of the root each",
    ),
    (
        Kind::Gauge,
        VM_TAKEN_BYTES,
        "Bytes on disk that VMs take, with the bases that they share",
    ),
    (
        Kind::Gauge,
        DEDUP_RATIO,
        "offshoot_vm_private_copies_bytes divided by offshoot_vm_taken_bytes; 1 without VMs",
    ),
    (Kind::Gauge, NETWORKS, "Networks of VMs"),
    (
        Kind::Gauge,
        PUBLISHED_PORTS,
        "Ports of the host that lead to running VMs",
    ),
    (
        Kind::Counter,
        NETWORK_BYTES,
        "Bytes over the network devices of all VMs, as the guests see them",
    ),
    (
        Kind::Counter,
        NETWORK_PACKETS,
        "Packets over the network devices of all VMs, as the guests see them",
    ),
    (
        Kind::Counter,
        NETWORK_DROPPED,
        "Packets from and to the network devices of all VMs that were not taken",
    ),
    (
        Kind::Gauge,
        TAP_POOL_WANTED,
        "How many idle TAPs the bridges of networks shall have ready, together",
    ),
    (Kind::Gauge, TAP_POOL_READY, "Idle TAPs that are ready"),
    (
        Kind::Counter,
        measure::TAP_CLAIMS,
        "TAPs that starts of VMs asked a pool for; a miss was made on the spot",
    ),
    (
        Kind::Gauge,
        WARM_SLOTS,
        "Warm slots that are ready: VMs that are nobody's yet",
    ),
    (
        Kind::Counter,
        measure::SLOT_CLAIMS,
        "VMs that were created while warm slots were ready; a miss is one that no slot fitted",
    ),
    (Kind::Gauge, RESIDENT_BYTES, "Resident memory of the daemon"),
    (Kind::Gauge, OPEN_FDS, "Open file descriptors of the daemon"),
    (
        Kind::Gauge,
        MAX_FDS,
        "How many file descriptors the daemon may open",
    ),
    (
        Kind::Gauge,
        START_SECONDS,
        "When the daemon started, seconds since the epoch",
    ),
    (
        Kind::Counter,
        CPU_SECONDS,
        "CPU time of the daemon, whole seconds",
    ),
];

/// Tells the current recorder what each metric means.
pub(super) fn describe() {
    for (kind, name, help) in ALL {
        match kind {
            Kind::Counter => describe_counter!(name, Unit::Count, help),
            Kind::Gauge => describe_gauge!(name, Unit::Count, help),
            Kind::Histogram => describe_histogram!(name, Unit::Seconds, help),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_to_the_conventions() {
        let mut seen = std::collections::BTreeSet::new();
        for (kind, name, help) in ALL {
            assert!(seen.insert(name), "{name} is there twice");
            assert!(
                name.starts_with("offshoot_") || name.starts_with("process_"),
                "{name}"
            );
            assert!(
                name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{name}"
            );
            assert_eq!(kind == Kind::Counter, name.ends_with("_total"), "{name}");
            if kind == Kind::Histogram {
                assert!(name.ends_with("_seconds"), "{name}");
            }
            assert!(!help.is_empty() && !help.ends_with('.'), "{name}: {help}");
        }
    }

    #[test]
    fn the_documentation_lists_every_metric() {
        let text = include_str!("../../../../docs/observability.md");
        for (_, name, _) in ALL {
            assert!(text.contains(&format!("| `{name}` |")), "{name} is not listed");
        }
        let listed = text
            .lines()
            .filter(|line| line.starts_with("| `offshoot_") || line.starts_with("| `process_"));
        assert_eq!(listed.count(), ALL.len(), "something is listed that is no metric");
    }
}
