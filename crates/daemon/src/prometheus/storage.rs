//! What everything takes, and what sharing saves. Counting walks the disk, so the numbers are kept for a while.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::gauge;
use offshoot_api::usage::DiskUsage;
use offshoot_model::VmId;
use tokio::sync::Mutex;

use super::float;
use super::names::{
    BASES, DEDUP_RATIO, IMAGES, KERNELS, RECLAIMABLE_BYTES, STORAGE_BYTES, VM_COPIES_BYTES, VM_MEMORY_BYTES,
    VM_TAKEN_BYTES,
};
use crate::app::Shared;
use crate::usage;

/// For how long a count is good: scrapes come every few seconds, and disks do not fill as fast.
const GOOD_FOR: Duration = Duration::from_secs(30);
/// How long a scrape waits for a count; a slower one is there for the next scrape. Prometheus waits ten seconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// When it was counted last. Held while it is counted.
#[derive(Clone, Debug, Default)]
pub(super) struct Storage(Arc<Mutex<Option<Instant>>>);

impl Storage {
    /// Counts again, unless that was done just now or is being done.
    pub(super) async fn refresh(&self, app: &Shared) {
        let Ok(mut counted) = Arc::clone(&self.0).try_lock_owned() else {
            return;
        };
        if counted.is_some_and(|then| then.elapsed() < GOOD_FOR) {
            return;
        }
        let app = Arc::clone(app);
        // A task of its own: a scrape that gives up shall not have it begun again by the next one.
        let task = tokio::spawn(async move {
            match usage::usage(&app.images, &app.kernels).await {
                Ok(usage) => publish(&usage, Sharing::of(&usage, &private_roots(&app))),
                Err(failure) => tracing::warn!(error = ?failure.0, "cannot count what is on disk"),
            }
            *counted = Some(Instant::now());
        });
        let _ = tokio::time::timeout(PATIENCE, task).await;
    }
}

/// The VMs that have a private copy of their root already.
fn private_roots(app: &Shared) -> HashSet<VmId> {
    let vms = app.engine.list();
    let records = vms.iter().map(|handle| handle.view.borrow().clone());
    records
        .filter(|vm| vm.definition.root.chosen == "copy")
        .map(|vm| vm.id.clone())
        .collect()
}

/// What VMs take on disk, and what they would take if each had its root for itself.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sharing {
    copies: u64,
    taken: u64,
}

impl Sharing {
    /// `private`: VMs whose own disks hold the whole root.
    fn of(usage: &DiskUsage, private: &HashSet<VmId>) -> Self {
        let root_of = |vm: &offshoot_api::usage::VmUsage| {
            let base = usage.bases.iter().find(|base| base.id == vm.base);
            let shared = base.filter(|_| !private.contains(&vm.id));
            shared.map_or(0, |base| base.parts.root)
        };
        let bases = usage.bases.iter().filter(|base| base.vms > 0);
        Self {
            copies: usage.vms.iter().map(|vm| vm.disk.allocated + root_of(vm)).sum(),
            taken: bases.map(|base| base.bytes).sum::<u64>()
                + usage.vms.iter().map(|vm| vm.disk.unique).sum::<u64>(),
        }
    }

    fn ratio(self) -> f64 {
        if self.taken == 0 {
            1.0
        } else {
            float(self.copies) / float(self.taken)
        }
    }
}

fn publish(usage: &DiskUsage, sharing: Sharing) {
    gauge!(IMAGES).set(float(usage.images.len() as u64));
    gauge!(BASES).set(float(usage.bases.len() as u64));
    gauge!(KERNELS).set(float(usage.kernels.len() as u64));
    for (kind, bytes) in [
        ("blobs", usage.blobs.bytes),
        ("downloads", usage.downloads.bytes),
        ("bases", usage.bases.iter().map(|base| base.bytes).sum()),
        ("kernels", usage.kernels.iter().map(|kernel| kernel.bytes).sum()),
        ("vms", usage.vms.iter().map(|vm| vm.disk.unique).sum()),
        ("logs", usage.logs.bytes),
    ] {
        gauge!(STORAGE_BYTES, "kind" => kind).set(float(bytes));
    }
    gauge!(RECLAIMABLE_BYTES).set(float(usage.totals.reclaimable));
    let memory = usage.totals.memory;
    for (kind, bytes) in [
        ("resident", memory.rss),
        ("proportional", memory.pss),
        ("unique", memory.unique),
        ("swap", memory.swap),
    ] {
        gauge!(VM_MEMORY_BYTES, "kind" => kind).set(float(bytes));
    }
    gauge!(VM_COPIES_BYTES).set(float(sharing.copies));
    gauge!(VM_TAKEN_BYTES).set(float(sharing.taken));
    gauge!(DEDUP_RATIO).set(sharing.ratio());
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;
    use offshoot_api::image::BaseParts;
    use offshoot_api::usage::{BaseUsage, VmDiskUsage, VmUsage};
    use offshoot_model::{BaseId, VmState};

    use super::*;

    fn base(n: u8, vms: u64) -> BaseUsage {
        BaseUsage {
            id: BaseId::from_bytes(&[n; 16]),
            images: Vec::new(),
            vms,
            bytes: 1010,
            parts: BaseParts {
                root: 1000,
                overlay_seed: 10,
                ..BaseParts::default()
            },
            reclaimable: 0,
        }
    }

    fn vm(n: u8, base: u8) -> VmUsage {
        VmUsage {
            id: VmId::from_bytes(&[n; 6]),
            name: "web".parse().unwrap(),
            state: VmState::Running,
            base: BaseId::from_bytes(&[base; 16]),
            disk: VmDiskUsage {
                allocated: 15,
                unique: 5,
                shared: 10,
            },
            log_bytes: 0,
            memory: None,
        }
    }

    #[test]
    fn what_is_shared_counts_once_and_would_count_for_each() {
        let mut usage = DiskUsage {
            bases: vec![base(1, 3), base(2, 0)],
            vms: vec![vm(1, 1), vm(2, 1), vm(3, 1)],
            ..DiskUsage::default()
        };
        let nobody = HashSet::new();
        let sharing = Sharing::of(&usage, &nobody);
        // The base that no VM has is not theirs.
        let expected = Sharing {
            copies: 3 * 1015,
            taken: 1010 + 15,
        };
        assert_eq!(sharing, expected);
        assert!((sharing.ratio() - 3045.0 / 1025.0).abs() < 1e-9);
        // A VM that holds a copy holds it in its own disk.
        let private = HashSet::from([VmId::from_bytes(&[3; 6])]);
        assert_eq!(Sharing::of(&usage, &private).copies, 2 * 1015 + 15);
        usage.vms.clear();
        usage.bases.clear();
        assert!((Sharing::of(&usage, &nobody).ratio() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn the_kinds_add_up() {
        let mut usage = DiskUsage {
            bases: vec![base(1, 1)],
            vms: vec![vm(1, 1)],
            ..DiskUsage::default()
        };
        usage.blobs.bytes = 100_000;
        usage.totals.memory.unique = 7;
        let recorder = PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            publish(&usage, Sharing::of(&usage, &HashSet::new()));
        });
        let text = recorder.handle().render();
        for line in [
            r#"offshoot_storage_bytes{kind="blobs"} 100000"#,
            r#"offshoot_storage_bytes{kind="bases"} 1010"#,
            r#"offshoot_storage_bytes{kind="vms"} 5"#,
            r#"offshoot_vm_memory_bytes{kind="unique"} 7"#,
            "offshoot_bases 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
