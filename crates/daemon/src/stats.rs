//! What running VMs take: the numbers behind `offshoot stats`.

use std::collections::HashMap;

use offshoot_api::stats::{CpuStats, DiskStats, MemoryStats, NetworkStats, PidStats, VmStats};
use offshoot_engine::capabilities::{GroupRecord, tap_name};
use offshoot_engine::definition::VmRecord;
use offshoot_engine::paths::VmPaths;
use offshoot_net::Namespace;
use offshoot_net::counters::{self, Counters};
use offshoot_sys::cgroup::{CPU_PERIOD_US, GroupLimits, GroupUsage};
use offshoot_sys::usage::{ProcessUsage, since_boot, usage_of};

use crate::usage::{memory_of, pids_of, vm_files};

/// What went over every interface of the VMs' namespace.
pub struct Traffic(HashMap<String, Counters>);

impl Traffic {
    /// Reads it once, for any number of VMs.
    pub fn read(namespace: &Namespace) -> Self {
        Self(counters::read(namespace).unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot read what went over the VMs' interfaces");
            HashMap::new()
        }))
    }

    /// What went over a VM's network device, as its guest sees it.
    pub fn of(&self, vm: &VmRecord) -> Option<NetworkStats> {
        vm.definition.attachment.as_ref()?;
        let tap = self.0.get(&tap_name(&vm.id))?;
        Some(NetworkStats {
            received_bytes: tap.tx_bytes,
            received_packets: tap.tx_packets,
            received_dropped: tap.tx_dropped,
            sent_bytes: tap.rx_bytes,
            sent_packets: tap.rx_packets,
            sent_dropped: tap.rx_dropped,
        })
    }
}

/// What a VM takes now. Reads what file systems and the kernel know; what ends meanwhile is not counted.
pub fn stats(vm: &VmRecord, paths: &VmPaths, traffic: &Traffic) -> VmStats {
    let pids = pids_of(vm, paths);
    let (group, limits) = group(vm, paths);
    let read_at_us = u64::try_from(since_boot().as_micros()).unwrap_or(u64::MAX);
    let processes = sum(pids.iter().filter_map(|pid| usage_of(*pid).ok()));
    let (disk, _) = vm_files(paths.data());
    VmStats {
        id: vm.id.clone(),
        name: vm.name.clone(),
        state: vm.life.state,
        read_at_us,
        started_ms: vm.life.started_ms,
        cpu: CpuStats {
            // A group remembers processes that have ended, too.
            used_us: group.cpu_us.unwrap_or(processes.cpu_us),
            vcpus: vm.definition.config.cpus,
            limit_milli: limits
                .cpu_quota_us
                .map(|quota| quota.saturating_mul(1000) / CPU_PERIOD_US),
            throttled_periods: group.cpu_periods_throttled,
        },
        memory: MemoryStats {
            guest: vm.definition.config.memory.bytes(),
            processes: memory_of(vm, &pids),
            charged: group.memory_bytes,
            limit: limits.memory_bytes,
            oom_kills: group.oom_kills,
        },
        disk: DiskStats {
            allocated: disk.allocated,
            unique: disk.unique,
            read: processes.read_bytes,
            written: processes.write_bytes,
        },
        network: traffic.of(vm),
        pids: PidStats {
            current: group.pids.unwrap_or(processes.threads),
            limit: limits.pids,
        },
    }
}

/// What the VM's control group counts and allows; nothing where it has none.
fn group(vm: &VmRecord, paths: &VmPaths) -> (GroupUsage, GroupLimits) {
    let record = GroupRecord::load(paths).unwrap_or_else(|error| {
        tracing::debug!(vm = %vm.name, %error, "cannot tell a VM's control group");
        None
    });
    let Some(record) = record else {
        return Default::default();
    };
    let read = || Ok((record.group.usage()?, record.group.limits()?));
    read().unwrap_or_else(|error: offshoot_sys::cgroup::CgroupError| {
        tracing::debug!(vm = %vm.name, %error, "cannot read a VM's control group");
        Default::default()
    })
}

fn sum(processes: impl Iterator<Item = ProcessUsage>) -> ProcessUsage {
    processes.fold(ProcessUsage::default(), |sum, one| ProcessUsage {
        cpu_us: sum.cpu_us + one.cpu_us,
        threads: sum.threads + one.threads,
        read_bytes: sum.read_bytes + one.read_bytes,
        write_bytes: sum.write_bytes + one.write_bytes,
    })
}
