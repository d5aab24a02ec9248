//! What VMs take while they run.
//!
//! Counters only grow while a VM runs and begin again with its next run. A rate is the difference of two answers, divided
//! by the difference of their `read_at_us`:
//!
//! ```text
//! processors in use = Δ cpu_us ÷ Δ read_at_us          (× 100 is what `docker stats` shows)
//! ```

use offshoot_model::{VmId, VmName, VmState};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::usage::MemoryUsage;

/// What one running VM takes: an entry of `GET /v1/stats`, and the answer to `GET /v1/vms/{vm}/stats`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmStats {
    /// Its id.
    #[schema(value_type = String)]
    pub id: VmId,
    /// Its name.
    #[schema(value_type = String)]
    pub name: VmName,
    /// `running` or `paused`; also on its way there or away.
    pub state: VmState,
    /// When this was read, microseconds on a clock that only goes forward, from the start of the host.
    pub read_at_us: u64,
    /// When its run began, milliseconds since the epoch: another value is another run, whose counters begin anew.
    pub started_ms: Option<u64>,
    /// Processor time of its VMM and its helpers.
    pub cpu: CpuStats,
    /// Memory of its VMM and its helpers.
    pub memory: MemoryStats,
    /// Its disks.
    pub disk: DiskStats,
    /// Its network device, as the guest sees it; absent without a network.
    #[serde(default)]
    pub network: Option<NetworkStats>,
    /// Threads of its VMM and its helpers.
    pub pids: PidStats,
}

/// Processor time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CpuStats {
    /// Used since the run began, microseconds.
    pub used_us: u64,
    /// vCPUs of the guest.
    pub vcpus: u32,
    /// How many processors the VMM and its helpers may use together, in thousandths; absent without a limit.
    pub limit_milli: Option<u64>,
    /// In how many tenths of a second they had to wait because of the limit.
    pub throttled_periods: Option<u64>,
}

/// Memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct MemoryStats {
    /// The guest's memory as it was asked for, bytes. It is taken from the host as the guest touches it.
    pub guest: u64,
    /// Resident memory of the processes, by who else has it.
    pub processes: MemoryUsage,
    /// What the host's kernel counts towards the VM, bytes: with cached pages of its disks, without what other VMs brought
    /// in first. Absent where nobody counts.
    pub charged: Option<u64>,
    /// The most that may be counted, bytes; absent without a limit.
    pub limit: Option<u64>,
    /// How many of its processes were killed for want of memory.
    pub oom_kills: Option<u64>,
}

/// Disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DiskStats {
    /// Blocks that its own disks take now, bytes, with those shared with its base.
    pub allocated: u64,
    /// Of these, what no other file has.
    pub unique: u64,
    /// Bytes that its processes had read from storage; what was cached does not count.
    pub read: u64,
    /// Bytes that its processes had written to storage.
    pub written: u64,
}

/// A network device, as the guest sees it: what it receives is what its TAP on the host sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NetworkStats {
    /// Bytes that came to the guest.
    pub received_bytes: u64,
    /// Packets that came to the guest.
    pub received_packets: u64,
    /// Packets to the guest that it did not take in time.
    pub received_dropped: u64,
    /// Bytes that the guest sent.
    pub sent_bytes: u64,
    /// Packets that the guest sent.
    pub sent_packets: u64,
    /// Packets of the guest that the host's kernel did not take.
    pub sent_dropped: u64,
}

/// Threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct PidStats {
    /// How many there are.
    pub current: u64,
    /// How many there may be; absent without a limit.
    pub limit: Option<u64>,
}
