//! What a VM's processes may take of the host: one control group for its VMM and its virtiofsds.
//!
//! ```text
//! <parent>/offshoot-<hash of the data directory>/<VM's id>
//! ```
//!
//! The parent is chosen by `offshoot_sys::cgroup`. The processes enter the group before they run, so nothing of them is
//! ever outside of it, and what is left of them when the VM stops is found in it. Which group it is lies in the VM's run
//! folder before the group is made: a later daemon may be in another place.
//!
//! The limits are a fence around a VMM that a guest took over or that leaks, not a way to pack VMs: a healthy VM never
//! meets them. What VMs are promised together is `crate::admission`'s.

use std::io::{self, Read as _};
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use offshoot_model::{ByteSize, ErrorKind, Explain, Finding, KernelObject, ObjectKind, Severity, VmId};
use offshoot_sys::cgroup::{CPU_PERIOD_US, CgroupError, Controller, Group, GroupLimits, Tree};
use offshoot_vmm::LaunchPlan;
use offshoot_vmm::plan::Accel;
use offshoot_vmm::qemu::TCG_CACHE;
use offshoot_vmm::virtiofsd::MAX_OPEN_FILES;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::finding;
use crate::capability::{Capability, CapabilityError, Known, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;

/// How long what is left of a VM may take to go when it is killed: it may wait for a disk.
const KILL_PATIENCE: Duration = Duration::from_secs(30);
/// How long the processes of a VM that ended may take to be gone by themselves: a virtiofsd follows its VMM.
const LEAVE_PATIENCE: Duration = Duration::from_millis(500);
/// What a QEMU takes for itself beside its guest: about 60 MiB when idle, more with many requests under way.
const VMM_MEMORY: ByteSize = ByteSize::from_mib(192);
/// Stacks and state of one vCPU, in QEMU and in the host's kernel.
const VCPU_MEMORY: ByteSize = ByteSize::from_mib(4);
/// A virtiofsd itself, with its buffers.
const SHARE_MEMORY: ByteSize = ByteSize::from_mib(64);
/// What the host's kernel keeps for a file that a virtiofsd has open: file, name and inode. It has one open for every file
/// that its guest remembers.
const OPEN_FILE_MEMORY: u64 = 2 << 10;
/// Room for the cached pages of the VM's own disks and shares. They count towards the group and make way when it is full;
/// with too little room every write would wait for the disk.
const PAGE_CACHE: ByteSize = ByteSize::from_mib(256);
/// QEMU's main, RCU and console threads, up to 64 that wait for disks (its `thread-pool-max`), and as many again for what
/// it does now and then, such as saving a VM.
const VMM_THREADS: u64 = 128;
/// Two processes, a thread for each queue, and a pool of up to 64.
const SHARE_THREADS: u64 = 80;

/// Makes, finds again and removes the control groups of VMs.
pub struct LimitsCapability {
    tree: Result<Tree, CgroupError>,
}

/// A VM's control group could not be made, emptied or removed.
#[derive(Debug, thiserror::Error)]
enum LimitsError {
    #[error("cannot limit what the VM takes")]
    Group {
        #[source]
        source: CgroupError,
    },
    #[error("cannot note its control group in `{}`", path.display())]
    Record {
        path: std::path::PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Explain for LimitsError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Internal
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Group { source } => vec![source.hint().to_owned()],
            Self::Record { .. } => vec!["run `offshoot doctor`".to_owned()],
        }
    }
}

fn group_failed(source: CgroupError) -> CapabilityError {
    Box::new(LimitsError::Group { source })
}

/// The control group of a VM that runs, as its run folder says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// The group.
    pub group: Group,
    /// What was set.
    pub limits: GroupLimits,
}

impl GroupRecord {
    /// A group has at most four paths of at most 4 KiB.
    const MAX_FILE: u64 = 64 << 10;

    /// Reads it; `None` where a VM has none.
    pub fn load(paths: &VmPaths) -> io::Result<Option<Self>> {
        let file = match std::fs::File::open(paths.cgroup()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut text = Vec::new();
        file.take(Self::MAX_FILE).read_to_end(&mut text)?;
        Ok(Some(serde_json::from_slice(&text)?))
    }

    /// Writes it, whole or not at all. No fsync: groups do not outlive a power cut.
    fn save(&self, paths: &VmPaths) -> io::Result<()> {
        let file = paths.cgroup();
        let unfinished = file.with_extension("tmp");
        std::fs::write(&unfinished, serde_json::to_vec(self)?)?;
        std::fs::rename(unfinished, file)
    }
}

impl LimitsCapability {
    /// For the VMs of one data directory, a canonical path. Moves this process where it must; see
    /// `offshoot_sys::cgroup`.
    pub fn new(data_dir: &Path) -> Self {
        let tree = Tree::open(&instance(data_dir));
        match &tree {
            Ok(tree) => tracing::debug!(?tree, "VMs get control groups"),
            Err(error) => {
                tracing::warn!(%error, cause = ?std::error::Error::source(error), "VMs run without control groups");
            }
        }
        Self { tree }
    }
}

/// A group's folders, as they are recorded.
fn objects(group: &Group) -> impl Iterator<Item = KernelObject> {
    group.folders().into_iter().map(|folder| KernelObject {
        kind: ObjectKind::Cgroup,
        name: folder.display().to_string(),
    })
}

/// Kills what is in a group and removes it; gives how many processes that were.
async fn empty(group: &Group) -> Result<usize, CgroupError> {
    let killed = group.kill(KILL_PATIENCE).await?;
    group.remove().await?;
    Ok(killed)
}

/// `offshoot-` and eight digits that no other data directory of this host has.
fn instance(data_dir: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let hash = Sha256::digest(data_dir.as_os_str().as_bytes());
    let digits: String = hash[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("offshoot-{digits}")
}

/// What the processes of a VM may take. Pure.
fn limits(launch: &LaunchPlan) -> GroupLimits {
    // A vCPU's thread cannot take more than one processor. One more is for all that works for the guest beside them:
    // QEMU's main loop, what waits for disks, virtiofsd.
    let processors = u64::from(launch.cpus) + 1;
    let shares = launch.shares.len() as u64;
    GroupLimits {
        cpu_quota_us: Some(processors * CPU_PERIOD_US),
        memory_bytes: Some(memory(launch).bytes()),
        pids: Some(VMM_THREADS + u64::from(launch.cpus) + shares * SHARE_THREADS),
    }
}

/// The most memory that a healthy VM of this plan comes to.
fn memory(launch: &LaunchPlan) -> ByteSize {
    let guest = launch.memory.bytes();
    let mut bytes = guest + VMM_MEMORY.bytes() + PAGE_CACHE.bytes();
    bytes += u64::from(launch.cpus) * VCPU_MEMORY.bytes();
    // Page tables, twice: QEMU's, and those by which the processor walks the guest's memory. Each is 1/512.
    bytes += guest / 128;
    if launch.accel == Accel::Tcg {
        // The translated code, a quarter more for finding its way in it, and the software TLB: 64 bytes or so for each
        // guest page, in a table that is up to twice too large, for each of several modes.
        bytes += TCG_CACHE.bytes() / 4 * 5 + guest / 8;
    }
    // The guest maps these pages of the host's cache and reads them again and again.
    bytes += launch.pmems.iter().map(|pmem| pmem.size.bytes()).sum::<u64>();
    let share = SHARE_MEMORY.bytes() + MAX_OPEN_FILES * OPEN_FILE_MEMORY;
    bytes += launch.shares.len() as u64 * share;
    // Whole pages, so that what is read back is what was set.
    ByteSize::from_bytes(bytes.next_multiple_of(1 << 20))
}

fn cost(missing: Controller) -> &'static str {
    match missing {
        Controller::Cpu | Controller::CpuAcct => "a VM's VMM and virtiofsd can take all processors",
        Controller::Memory => "a VM's VMM and virtiofsd can take all memory",
        Controller::Pids => "a VM's VMM and virtiofsd can take all process ids",
    }
}

#[async_trait]
impl Capability for LimitsCapability {
    fn name(&self) -> &'static str {
        "limits"
    }

    async fn check(&self) -> Vec<Finding> {
        let tree = match &self.tree {
            Ok(tree) => tree,
            Err(error) => {
                let cause =
                    std::error::Error::source(error).map_or(String::new(), |cause| format!(" ({cause})"));
                let said = format!("no control groups for VMs: {error}{cause}");
                let found = finding(self.name(), Severity::Warning, said, error.hint());
                return vec![
                    found
                        .id("cgroups-missing")
                        .cost("a VM's VMM and virtiofsd can take all of this host"),
                ];
            }
        };
        let missing = tree.missing();
        let mut findings: Vec<_> = missing
            .iter()
            .map(|controller| {
                finding(
                    self.name(),
                    Severity::Warning,
                    format!("control groups without `{}`", controller.as_str()),
                    "see /proc/cgroups, and hand the controller down: `Delegate=yes` in the systemd unit",
                )
                .id("cgroup-controller-missing")
                .cost(cost(*controller))
            })
            .collect();
        if missing.is_empty() {
            let parents: Vec<_> = tree
                .parents()
                .map(|(_, parent)| parent.display().to_string())
                .collect();
            let said = format!("control groups for VMs below {}", parents.join(", "));
            findings.push(Finding::ok(self.name(), said).id("cgroups"));
        }
        findings
    }

    fn plan(&self, vm: &VmRecord, _: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        if let Ok(tree) = &self.tree {
            let group = tree.group(vm.id.as_str());
            plan.objects.extend(objects(&group));
            plan.launch.cgroups = group.folders();
        }
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        if run.is_warm() {
            return Ok(());
        }
        let Ok(tree) = &self.tree else { return Ok(()) };
        let record = GroupRecord {
            group: tree.group(run.vm.id.as_str()),
            limits: limits(&run.plan.launch),
        };
        record.save(&run.paths).map_err(|source| {
            Box::new(LimitsError::Record {
                path: run.paths.cgroup(),
                source,
            }) as CapabilityError
        })?;
        if record.group.exists() {
            // Of a run that nobody ended. Its counters shall not be taken for this run's.
            empty(&record.group).await.map_err(group_failed)?;
        }
        record.group.ensure(&record.limits).map_err(group_failed)
    }

    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        // A service manager may have taken the controllers back while no daemon ran, and the limits with them.
        let again =
            GroupRecord::load(&run.paths).map(|record| record.map(|found| found.group.ensure(&found.limits)));
        match again {
            Ok(Some(Err(error))) => {
                tracing::warn!(vm = %run.vm.name, %error, "cannot limit a running VM again");
            }
            Err(error) => {
                tracing::warn!(vm = %run.vm.name, %error, "cannot tell a running VM's control group");
            }
            Ok(_) => {}
        }
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        let unreadable = |source| {
            Box::new(LimitsError::Record {
                path: run.paths.cgroup(),
                source,
            }) as CapabilityError
        };
        let Some(record) = GroupRecord::load(&run.paths).map_err(unreadable)? else {
            return Ok(());
        };
        let kills = record.group.usage().ok().and_then(|usage| usage.oom_kills);
        if let Some(kills) = kills.filter(|kills| *kills > 0) {
            run.note_cause(out_of_memory(kills, &record.limits));
        }
        let gone = record
            .group
            .wait_empty(LEAVE_PATIENCE)
            .await
            .map_err(group_failed)?;
        let killed = empty(&record.group).await.map_err(group_failed)?;
        if !gone {
            tracing::warn!(vm = %run.vm.name, killed, "killed what was left of a VM");
        }
        match std::fs::remove_file(run.paths.cgroup()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(unreadable(error)),
            _ => Ok(()),
        }
    }

    async fn leftovers(&self, known: Known<'_>) -> Vec<KernelObject> {
        let Ok(tree) = &self.tree else { return Vec::new() };
        let names = tree.names().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot look for control groups that are left");
            Default::default()
        });
        let of_no_vm = |name: &&String| !name.parse::<VmId>().is_ok_and(|vm| known(&vm));
        // One folder stands for the whole group: it is removed from all hierarchies at once.
        let first = |name: &String| objects(&tree.group(name)).next();
        names.iter().filter(of_no_vm).filter_map(first).collect()
    }

    async fn remove_leftover(&self, object: &KernelObject) -> Result<(), CapabilityError> {
        let name = Path::new(&object.name).file_name().and_then(|name| name.to_str());
        let (Ok(tree), Some(name)) = (&self.tree, name) else {
            return Ok(());
        };
        let killed = empty(&tree.group(name)).await.map_err(group_failed)?;
        if killed > 0 {
            tracing::warn!(name, killed, "killed processes of no VM");
        }
        Ok(())
    }
}

fn out_of_memory(kills: u64, limits: &GroupLimits) -> String {
    let limit = limits.memory_bytes.map_or(String::new(), |bytes| {
        format!(
            " or their control group's limit of {}",
            ByteSize::from_bytes(bytes)
        )
    });
    let whom = if kills == 1 {
        "one of its processes"
    } else {
        "its processes"
    };
    format!("out of memory: the host's kernel killed {whom}, for want of memory on the host{limit}")
}

#[cfg(test)]
mod tests {
    use offshoot_sys::process::{DetachedCommand, spawn_detached};
    use offshoot_vmm::plan::{PmemPlan, SharePlan};

    use super::*;
    use crate::run::empty_plan;

    fn launch(mib: u64, cpus: u32) -> LaunchPlan {
        let mut launch = empty_plan(VmId::from_bytes(&[1; 6])).launch;
        launch.memory = ByteSize::from_mib(mib);
        launch.cpus = cpus;
        launch
    }

    #[test]
    fn limits_leave_room_for_everything_that_works_for_a_guest() {
        let check = |launch: &LaunchPlan, cpu_us, mib: u64, pids| {
            let limits = limits(launch);
            assert_eq!(limits.cpu_quota_us, Some(cpu_us));
            assert_eq!(
                limits.memory_bytes,
                Some(mib << 20),
                "{}",
                limits.memory_bytes.unwrap() >> 20
            );
            assert_eq!(limits.pids, Some(pids));
        };
        let mut plan = launch(512, 1);
        plan.accel = Accel::Kvm;
        check(&plan, 200_000, 512 + 192 + 256 + 4 + 4, 129);
        plan.accel = Accel::Tcg;
        check(&plan, 200_000, 512 + 192 + 256 + 4 + 4 + 160 + 64, 129);
        plan.accel = Accel::Kvm;
        plan.pmems.push(PmemPlan {
            path: "/p".into(),
            size: ByteSize::from_mib(180),
            read_only: true,
        });
        check(&plan, 200_000, 512 + 192 + 256 + 4 + 4 + 180, 129);
        plan.cpus = 4;
        for tag in ["a", "b"] {
            plan.shares.push(SharePlan {
                tag: tag.into(),
                socket: "/s".into(),
            });
        }
        check(
            &plan,
            500_000,
            512 + 192 + 256 + 16 + 4 + 180 + 2 * (64 + 512),
            132 + 160,
        );
    }

    #[tokio::test]
    async fn groups_of_no_vm_are_swept_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let limits = LimitsCapability::new(dir.path());
        let Ok(tree) = &limits.tree else {
            #[expect(clippy::print_stderr, reason = "a skipped test says so")]
            {
                eprintln!("SKIPPED: needs root and control groups");
            }
            return;
        };
        let (known, gone) = (VmId::from_bytes(&[1; 6]), VmId::from_bytes(&[2; 6]));
        for vm in [&known, &gone] {
            tree.group(vm.as_str()).ensure(&GroupLimits::default()).unwrap();
        }
        let command = DetachedCommand {
            args: vec!["1000".into()],
            cgroups: tree.group(gone.as_str()).folders(),
            ..DetachedCommand::new("/bin/sleep")
        };
        let (_, process) = spawn_detached(command).unwrap();
        let sweep = async |known: Known<'_>| {
            let found = limits.leftovers(known).await;
            for object in &found {
                limits.remove_leftover(object).await.unwrap();
            }
            found.len()
        };
        assert_eq!(sweep(&|vm| *vm == known).await, 1);
        process.wait_exit().await;
        assert_eq!(tree.names().unwrap(), [known.to_string()].into());
        assert_eq!(sweep(&|vm| *vm == known).await, 0);
        assert_eq!(sweep(&|_| false).await, 1);
        assert!(tree.names().unwrap().is_empty());
    }

    #[test]
    fn a_record_is_read_back_and_a_missing_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let paths = VmPaths::new(dir.path(), dir.path(), &VmId::from_bytes(&[3; 6]));
        assert_eq!(GroupRecord::load(&paths).unwrap(), None);
        std::fs::create_dir_all(paths.run()).unwrap();
        let text = r#"{"group":{"parts":[{"version":"v1","controllers":["cpu","cpuacct"],"path":"/c/offshoot-1/2"}]},
            "limits":{"cpu_quota_us":200000,"memory_bytes":null,"pids":129}}"#;
        std::fs::write(paths.cgroup(), text).unwrap();
        let record = GroupRecord::load(&paths).unwrap().unwrap();
        assert_eq!(record.group.folders(), [Path::new("/c/offshoot-1/2")]);
        assert_eq!(
            (record.limits.pids, record.limits.memory_bytes),
            (Some(129), None)
        );
        record.save(&paths).unwrap();
        assert_eq!(GroupRecord::load(&paths).unwrap(), Some(record));
        std::fs::write(paths.cgroup(), "{").unwrap();
        assert!(GroupRecord::load(&paths).is_err());
    }

    #[test]
    fn each_data_directory_has_groups_of_its_own() {
        let name = instance(Path::new("/var/lib/offshoot"));
        assert_eq!(name, instance(Path::new("/var/lib/offshoot")));
        assert_ne!(name, instance(Path::new("/var/lib/offshoot2")));
        let digits = name.strip_prefix("offshoot-").unwrap();
        assert!(
            digits.len() == 8 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()),
            "{name}"
        );
    }

    #[test]
    fn the_end_of_a_vm_that_was_out_of_memory_says_so() {
        let limits = GroupLimits {
            memory_bytes: Some(812 << 20),
            ..GroupLimits::default()
        };
        assert_eq!(
            out_of_memory(1, &limits),
            "out of memory: the host's kernel killed one of its processes, for want of memory on the host or their \
             control group's limit of 812MiB"
        );
        assert!(
            out_of_memory(2, &GroupLimits::default())
                .ends_with("killed its processes, for want of memory on the host")
        );
    }
}
