//! What the daemon's things take: disk, and the memory of the VMs that run.
//!
//! Bytes on disk are allocated blocks, not sizes: a hole takes nothing. What several things have in common is *shared*
//! and counted once in the totals; *unique* is what would be free without that one thing.

use offshoot_model::{BaseId, Digest, KernelId, VmId, VmName, VmState};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::image::BaseParts;

/// Answer to `GET /v1/system/df`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DiskUsage {
    /// The blobs of all images together.
    pub blobs: BlobUsage,
    /// Rests of downloads that broke off.
    pub downloads: FileUsage,
    /// Every image, one entry for all names of one manifest.
    pub images: Vec<ImageUsage>,
    /// Every base.
    pub bases: Vec<BaseUsage>,
    /// Every kernel bundle.
    pub kernels: Vec<KernelUsage>,
    /// Every template.
    pub templates: Vec<TemplateUsage>,
    /// Warm slots: VMs that are nobody's yet.
    pub slots: SlotUsage,
    /// Every VM.
    pub vms: Vec<VmUsage>,
    /// What VMs wrote: output, consoles, the VMMs' own logs.
    pub logs: FileUsage,
    /// Everything together.
    pub totals: UsageTotals,
}

/// Some files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct FileUsage {
    /// How many.
    pub count: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Of these, what `prune` would free.
    pub reclaimable: u64,
}

/// The blobs of all images. `bytes` is `shared`, `unique` and `unneeded` together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct BlobUsage {
    /// How many.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of those that more than one image has, each counted once.
    pub shared: u64,
    /// Bytes of those that just one image has.
    pub unique: u64,
    /// Bytes of those that no image has.
    pub unneeded: u64,
    /// Of these, what `prune` would free: not what is too young.
    pub reclaimable: u64,
}

/// What one image takes as blobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageUsage {
    /// All its names, as users write them.
    pub references: Vec<String>,
    /// Manifest digest.
    #[schema(value_type = String)]
    pub digest: Digest,
    /// Bytes of its blobs.
    pub bytes: u64,
    /// Of these, bytes that another image has as well.
    pub shared: u64,
    /// Of these, bytes that no other image has.
    pub unique: u64,
    /// Its base, when it is prepared.
    #[schema(value_type = Option<String>)]
    pub base: Option<BaseId>,
    /// Why its blobs cannot be told; then all sizes are 0.
    pub problem: Option<String>,
}

/// What one base takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BaseUsage {
    /// Its id.
    #[schema(value_type = String)]
    pub id: BaseId,
    /// The names of its images; none when it is there only for its VMs.
    pub images: Vec<String>,
    /// How many VMs have their root from it.
    pub vms: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// The same, part by part.
    pub parts: BaseParts,
    /// Of these, what `prune` would free.
    pub reclaimable: u64,
}

/// What one kernel bundle takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KernelUsage {
    /// Its id.
    #[schema(value_type = String)]
    pub id: KernelId,
    /// `uname -r`.
    pub release: String,
    /// Whether new VMs boot it.
    pub default: bool,
    /// How many VMs boot it.
    pub vms: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Of these, what `prune` would free.
    pub reclaimable: u64,
}

/// What one template takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TemplateUsage {
    /// Its id.
    pub id: String,
    /// How many VMs were restored from it and run.
    pub vms: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Bytes of memory that the daemon holds for VMs to come; VMs that run share them.
    #[serde(default)]
    pub memory: u64,
    /// Of those on disk, what `prune` would free.
    pub reclaimable: u64,
}

/// What all warm slots take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct SlotUsage {
    /// How many are ready.
    pub count: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// The memory of their processes.
    pub memory: MemoryUsage,
}

/// What one VM takes beside its base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmUsage {
    /// Its id.
    #[schema(value_type = String)]
    pub id: VmId,
    /// Its name.
    #[schema(value_type = String)]
    pub name: VmName,
    /// Where it is in its life.
    pub state: VmState,
    /// The base that it shares with others.
    #[schema(value_type = String)]
    pub base: BaseId,
    /// Its own disks; its logs are counted apart.
    pub disk: VmDiskUsage,
    /// Bytes of its logs.
    pub log_bytes: u64,
    /// The memory of its processes, while it runs.
    pub memory: Option<MemoryUsage>,
}

/// Blocks that a VM's own disks take. `allocated` is `unique` and `shared` together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct VmDiskUsage {
    /// Bytes on disk.
    pub allocated: u64,
    /// Bytes that no other file has.
    pub unique: u64,
    /// Bytes that are reflinked: the seed, or another VM, has them as well.
    pub shared: u64,
}

/// Memory of processes as the host's kernel counts it (`proc(5)`, `smaps`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct MemoryUsage {
    /// How many processes these are: the VMM, and one virtiofsd for every share.
    pub processes: u64,
    /// Resident bytes. Not to be added up over VMs: a page that several map counts for each of them.
    pub rss: u64,
    /// Resident bytes, a page that several processes map being divided among them. Adds up.
    pub pss: u64,
    /// Resident bytes that nobody else maps: what would be free without this VM.
    pub unique: u64,
    /// Resident bytes that others map as well.
    pub shared: u64,
    /// Bytes in swap.
    pub swap: u64,
}

/// Everything together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct UsageTotals {
    /// Bytes on disk. What VMs share with bases and with one another is counted with the bases.
    pub disk: u64,
    /// What `prune` would free on disk.
    pub reclaimable: u64,
    /// What `prune --all` would free on disk.
    pub reclaimable_all: u64,
    /// Seconds that both spare what was just made or used.
    pub prune_grace_s: u64,
    /// The memory of all VMs that run. `rss` counts shared pages once for each VM.
    pub memory: MemoryUsage,
}
