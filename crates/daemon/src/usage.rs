//! What everything takes on disk, and VMs in memory: the numbers behind `offshoot df`.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use offshoot_api::prune::PruneQuery;
use offshoot_api::usage::{
    BaseUsage, BlobUsage, DiskUsage, FileUsage, ImageUsage, KernelUsage, MemoryUsage, TemplateUsage,
    UsageTotals, VmDiskUsage, VmUsage,
};
use offshoot_engine::definition::VmRecord;
use offshoot_engine::paths::VmPaths;
use offshoot_engine::shares::share_pids;
use offshoot_kernel::KernelStore;
use offshoot_model::Digest;

use crate::bases;
use crate::blocking::blocking;
use crate::error::Answer;
use crate::images::Images;
use crate::prune::{Facts, ImageFacts, Item, plan};
use crate::sweep;

/// Everything. Reads no content, only what file systems and the kernel know.
pub async fn usage(images: &Images, kernels: &Arc<KernelStore>) -> Answer<DiskUsage> {
    let (images, kernels) = (images.clone(), Arc::clone(kernels));
    blocking("the count", move || measure(&images, &kernels)).await
}

fn measure(images: &Images, kernels: &KernelStore) -> Answer<DiskUsage> {
    let facts = sweep::facts(images, Some(kernels))?;
    let (blobs, per_image) = blob_usage(&facts);
    let mut usage = DiskUsage {
        blobs,
        downloads: FileUsage {
            count: facts.downloads.len() as u64,
            bytes: facts.downloads.iter().map(|download| download.bytes).sum(),
            reclaimable: 0,
        },
        images: image_usage(&facts, per_image),
        bases: base_usage(images, &facts),
        kernels: kernel_usage(kernels, &facts)?,
        templates: template_usage(images, &facts),
        ..DiskUsage::default()
    };
    for image in &mut usage.images {
        image.base = image.base.take().filter(|id| images.bases.get(id).is_ok());
    }
    for handle in images.engine.list() {
        let vm = handle.view.borrow().clone();
        let (disk, logs) = vm_files(handle.paths.data());
        usage.logs.count += logs.count;
        usage.logs.bytes += logs.bytes;
        usage.vms.push(VmUsage {
            id: vm.id.clone(),
            name: vm.name.clone(),
            state: vm.life.state,
            base: vm.base_id.clone(),
            disk,
            log_bytes: logs.bytes,
            memory: memory(&vm, &handle.paths),
        });
    }
    for slot in images.engine.slots().list() {
        let (disk, logs) = vm_files(slot.paths.data());
        let memory = memory_of(&slot.record, &[slot.pid]);
        let slots = &mut usage.slots;
        slots.count += 1;
        slots.bytes += disk.unique + logs.bytes;
        slots.memory.processes += memory.processes;
        slots.memory.rss += memory.rss;
        slots.memory.pss += memory.pss;
        slots.memory.unique += memory.unique;
        slots.memory.shared += memory.shared;
        slots.memory.swap += memory.swap;
    }
    let rules = images.rules(PruneQuery::default());
    usage.totals.prune_grace_s = rules.grace.as_secs();
    let all = plan(&facts, crate::prune::Rules { all: true, ..rules });
    usage.totals.reclaimable_all = all.remove.iter().map(|item| bytes(&usage, &facts, item)).sum();
    for item in plan(&facts, rules).remove {
        reclaim(&mut usage, &facts, &item);
    }
    add_up(&mut usage);
    Ok(usage)
}

fn template_usage(images: &Images, facts: &Facts) -> Vec<TemplateUsage> {
    let held: HashMap<_, _> = images
        .engine
        .templates()
        .and_then(|templates| templates.list().ok())
        .into_iter()
        .flatten()
        .map(|template| (template.id, (template.disk.bytes(), template.held.bytes())))
        .collect();
    let vms = images.engine.records();
    facts
        .templates
        .iter()
        .map(|template| {
            let (bytes, memory) = held.get(&template.id).copied().unwrap_or_default();
            TemplateUsage {
                id: template.id.to_string(),
                vms: vms.iter().filter(|vm| vm.runs_from(&template.id)).count() as u64,
                bytes,
                memory,
                reclaimable: 0,
            }
        })
        .collect()
}

/// The blobs together, and for each image how many bytes it shares and how many are its own.
fn blob_usage(facts: &Facts) -> (BlobUsage, Vec<(u64, u64)>) {
    let mut users: HashMap<Digest, u64> = HashMap::new();
    for digest in facts.images.iter().flat_map(blobs_of) {
        *users.entry(*digest).or_default() += 1;
    }
    let sizes: HashMap<_, _> = facts.blobs.iter().map(|blob| (blob.digest, blob.bytes)).collect();
    let mut all = BlobUsage::default();
    for blob in &facts.blobs {
        all.count += 1;
        all.bytes += blob.bytes;
        match users.get(&blob.digest) {
            None => all.unneeded += blob.bytes,
            Some(1) => all.unique += blob.bytes,
            Some(_) => all.shared += blob.bytes,
        }
    }
    let split = |image: &ImageFacts| {
        let mut split = (0, 0);
        for digest in blobs_of(image) {
            let bytes = sizes.get(digest).copied().unwrap_or(0);
            if users[digest] > 1 {
                split.0 += bytes;
            } else {
                split.1 += bytes;
            }
        }
        split
    };
    (all, facts.images.iter().map(split).collect())
}

fn blobs_of(image: &ImageFacts) -> impl Iterator<Item = &Digest> {
    image.blobs.iter().flatten()
}

fn image_usage(facts: &Facts, per_image: Vec<(u64, u64)>) -> Vec<ImageUsage> {
    let mut images: Vec<_> = facts
        .images
        .iter()
        .zip(per_image)
        .map(|(image, (shared, unique))| ImageUsage {
            references: image.names.clone(),
            digest: image.digest,
            bytes: shared + unique,
            shared,
            unique,
            base: Some(image.base.clone()),
            problem: image.blobs.as_ref().err().cloned(),
        })
        .collect();
    images.sort_by(|a, b| a.references.cmp(&b.references));
    images
}

fn base_usage(images: &Images, facts: &Facts) -> Vec<BaseUsage> {
    let measure = |base: &crate::prune::BaseFacts| {
        let (bytes, parts) = bases::measure(images.bases.locate(&base.id).dir());
        BaseUsage {
            id: base.id.clone(),
            images: facts
                .images
                .iter()
                .filter(|image| image.base == base.id)
                .flat_map(|image| image.names.clone())
                .collect(),
            vms: facts.vms.iter().filter(|vm| vm.base == base.id).count() as u64,
            bytes,
            parts,
            reclaimable: 0,
        }
    };
    facts.bases.iter().map(measure).collect()
}

fn kernel_usage(kernels: &KernelStore, facts: &Facts) -> Answer<Vec<KernelUsage>> {
    let mut usage = Vec::new();
    for bundle in kernels.list()? {
        let default = facts
            .kernels
            .iter()
            .any(|kernel| kernel.id == bundle.id && kernel.default);
        usage.push(KernelUsage {
            release: bundle.manifest.release.clone(),
            default,
            vms: facts.vms.iter().filter(|vm| vm.kernel == bundle.id).count() as u64,
            bytes: offshoot_sys::space::disk_usage(&bundle.dir).unwrap_or(0),
            reclaimable: 0,
            id: bundle.id,
        });
    }
    Ok(usage)
}

/// The disks and the logs in a VM's folder. What vanishes meanwhile is not counted.
pub fn vm_files(dir: &Path) -> (VmDiskUsage, FileUsage) {
    let (mut disk, mut logs) = (VmDiskUsage::default(), FileUsage::default());
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => pending.push(entry.path()),
                Ok(kind) if kind.is_file() => {
                    let Ok(extents) = offshoot_sys::space::extents(&entry.path()) else {
                        continue;
                    };
                    if is_log(&entry.file_name().to_string_lossy()) {
                        logs.count += 1;
                        logs.bytes += extents.allocated;
                    } else {
                        disk.allocated += extents.allocated;
                        disk.shared += extents.shared;
                    }
                }
                _ => {}
            }
        }
    }
    disk.unique = disk.allocated - disk.shared;
    (disk, logs)
}

/// `vmm.log`, and `output.log.1` after a rotation.
fn is_log(name: &str) -> bool {
    let name = name.trim_end_matches(|c: char| c.is_ascii_digit());
    name.trim_end_matches('.').ends_with(".log")
}

/// The processes that make up a running VM.
pub fn pids_of(vm: &VmRecord, paths: &VmPaths) -> Vec<u32> {
    let vmm = vm.life.machine.as_ref().map(|machine| &machine.process);
    let mut pids: Vec<_> = vmm
        .filter(|process| process.is_alive())
        .map(|process| process.pid)
        .into_iter()
        .chain(share_pids(paths))
        .collect();
    // None is counted twice, however it was found.
    pids.sort_unstable();
    pids.dedup();
    pids
}

fn memory(vm: &VmRecord, paths: &VmPaths) -> Option<MemoryUsage> {
    let sum = memory_of(vm, &pids_of(vm, paths));
    (sum.processes > 0).then_some(sum)
}

/// The memory of these processes of a VM together.
pub fn memory_of(vm: &VmRecord, pids: &[u32]) -> MemoryUsage {
    let mut sum = MemoryUsage::default();
    for &pid in pids {
        match offshoot_sys::smaps::memory_of(pid) {
            Ok(memory) => {
                sum.processes += 1;
                sum.rss += memory.rss;
                sum.pss += memory.pss;
                sum.unique += memory.private;
                sum.shared += memory.shared;
                sum.swap += memory.swap;
            }
            // It ended just now, or it is another user's and we are not root.
            Err(error) => tracing::debug!(vm = %vm.name, pid, %error, "cannot tell a process's memory"),
        }
    }
    sum
}

/// What an item of a plan takes, out of what was measured.
fn bytes(usage: &DiskUsage, facts: &Facts, item: &Item) -> u64 {
    let blob = |blobs: &[crate::prune::BlobFacts], digest| {
        let found = blobs.iter().find(|blob| blob.digest == digest);
        found.map_or(0, |blob| blob.bytes)
    };
    match item {
        Item::Blob(digest) => blob(&facts.blobs, *digest),
        Item::Download(digest) => blob(&facts.downloads, *digest),
        Item::Base(id) => usage
            .bases
            .iter()
            .find(|base| base.id == *id)
            .map_or(0, |base| base.bytes),
        Item::Tree(id) => {
            let base = usage.bases.iter().find(|base| base.id == *id);
            base.map_or(0, |base| base.parts.tree)
        }
        Item::Kernel(id) => {
            let kernel = usage.kernels.iter().find(|kernel| kernel.id == *id);
            kernel.map_or(0, |kernel| kernel.bytes)
        }
        Item::Template(id) => {
            let template = usage.templates.iter().find(|template| template.id == id.as_str());
            template.map_or(0, |template| template.bytes)
        }
    }
}

/// Notes that an item would go.
fn reclaim(usage: &mut DiskUsage, facts: &Facts, item: &Item) {
    let bytes = bytes(usage, facts, item);
    usage.totals.reclaimable += bytes;
    match item {
        Item::Blob(_) => usage.blobs.reclaimable += bytes,
        Item::Download(_) => usage.downloads.reclaimable += bytes,
        Item::Base(id) | Item::Tree(id) => {
            for base in usage.bases.iter_mut().filter(|base| base.id == *id) {
                base.reclaimable += bytes;
            }
        }
        Item::Kernel(id) => {
            for kernel in usage.kernels.iter_mut().filter(|kernel| kernel.id == *id) {
                kernel.reclaimable += bytes;
            }
        }
        Item::Template(id) => {
            let same = |template: &&mut TemplateUsage| template.id == id.as_str();
            for template in usage.templates.iter_mut().filter(same) {
                template.reclaimable += bytes;
            }
        }
    }
}

fn add_up(usage: &mut DiskUsage) {
    let UsageTotals { disk, memory, .. } = &mut usage.totals;
    *disk = usage.blobs.bytes + usage.downloads.bytes + usage.logs.bytes;
    *disk += usage.bases.iter().map(|base| base.bytes).sum::<u64>();
    *disk += usage.kernels.iter().map(|kernel| kernel.bytes).sum::<u64>();
    *disk += usage.slots.bytes;
    *disk += usage.templates.iter().map(|template| template.bytes).sum::<u64>();
    *disk += usage.vms.iter().map(|vm| vm.disk.unique).sum::<u64>();
    for vm in usage.vms.iter().filter_map(|vm| vm.memory) {
        memory.processes += vm.processes;
        memory.rss += vm.rss;
        memory.pss += vm.pss;
        memory.unique += vm.unique;
        memory.shared += vm.shared;
        memory.swap += vm.swap;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::BlobFacts;
    use offshoot_model::BaseId;

    fn digest(n: u8) -> Digest {
        Digest::from_bytes([n; 32])
    }

    #[test]
    fn a_blob_counts_once_however_many_images_have_it() {
        let image = |n: u8, blobs: Result<&[u8], &str>| ImageFacts {
            names: vec![format!("i{n}")],
            digest: digest(n),
            base: BaseId::from_bytes(&[n; 16]),
            blobs: blobs
                .map(|blobs| blobs.iter().copied().map(digest).collect())
                .map_err(str::to_owned),
        };
        let facts = Facts {
            images: vec![
                image(2, Ok(&[2, 10, 11])),
                image(1, Ok(&[1, 10, 99])),
                image(3, Err("damaged")),
            ],
            blobs: [(1, 1), (2, 2), (10, 100), (11, 1000), (12, 10_000)]
                .map(|(n, bytes)| BlobFacts {
                    digest: digest(n),
                    bytes,
                    at_ms: 0,
                })
                .to_vec(),
            ..Facts::default()
        };
        let (all, per_image) = blob_usage(&facts);
        let expected = BlobUsage {
            count: 5,
            bytes: 11_103,
            shared: 100,
            unique: 1003,
            unneeded: 10_000,
            reclaimable: 0,
        };
        assert_eq!(all, expected);
        // Blob 99 is missing: it takes nothing.
        assert_eq!(per_image, [(100, 1002), (100, 1), (0, 0)]);
        let images = image_usage(&facts, per_image);
        let shown: Vec<_> = images
            .iter()
            .map(|image| {
                (
                    image.references[0].as_str(),
                    image.bytes,
                    image.problem.as_deref(),
                )
            })
            .collect();
        assert_eq!(
            shown,
            [("i1", 101, None), ("i2", 1102, None), ("i3", 0, Some("damaged"))]
        );
    }

    #[test]
    fn disks_and_logs_of_a_vm_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["overlay.ext4", "output.log", "output.log.1", "deeper/memory"] {
            std::fs::create_dir_all(dir.path().join("deeper")).unwrap();
            std::fs::write(dir.path().join(name), vec![1; 64 << 10]).unwrap();
        }
        let sparse = std::fs::File::create(dir.path().join("work.ext4")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        for file in ["overlay.ext4", "output.log", "output.log.1", "deeper/memory"] {
            // Blocks are allocated when they are written out.
            std::fs::File::open(dir.path().join(file))
                .unwrap()
                .sync_all()
                .unwrap();
        }
        let (disk, logs) = vm_files(dir.path());
        assert_eq!(logs.count, 2);
        assert!((128 << 10..256 << 10).contains(&logs.bytes), "{logs:?}");
        assert!((128 << 10..256 << 10).contains(&disk.allocated), "{disk:?}");
        assert_eq!(disk.allocated, disk.unique + disk.shared);
        assert_eq!(vm_files(&dir.path().join("none")).0, VmDiskUsage::default());
        for (name, expected) in [
            ("a.log", true),
            ("a.log.12", true),
            ("a.ext4", false),
            ("log", false),
            ("1", false),
        ] {
            assert_eq!(is_log(name), expected, "{name}");
        }
    }

    #[test]
    fn totals_count_what_is_shared_once() {
        let mut usage = DiskUsage::default();
        usage.blobs.bytes = 1;
        usage.downloads.bytes = 10;
        usage.logs.bytes = 100;
        usage.vms = [1000, 2000]
            .map(|unique| VmUsage {
                id: offshoot_model::VmId::from_bytes(&[1; 6]),
                name: "web".parse().unwrap(),
                state: offshoot_model::VmState::Running,
                base: BaseId::from_bytes(&[1; 16]),
                disk: VmDiskUsage {
                    allocated: unique + 500_000,
                    unique,
                    shared: 500_000,
                },
                log_bytes: 50,
                memory: Some(MemoryUsage {
                    processes: 1,
                    pss: 7,
                    ..MemoryUsage::default()
                }),
            })
            .to_vec();
        add_up(&mut usage);
        assert_eq!(usage.totals.disk, 3111);
        assert_eq!((usage.totals.memory.pss, usage.totals.memory.processes), (14, 2));
    }

    #[test]
    fn our_own_memory_is_what_the_kernel_says() {
        let ours = offshoot_sys::smaps::memory_of(std::process::id()).unwrap();
        assert!(
            ours.private > 0 && ours.pss >= ours.private && ours.rss >= ours.pss,
            "{ours:?}"
        );
    }
}
