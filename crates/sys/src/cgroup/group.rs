//! One group: made, limited, read, emptied, removed.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::tree::enable;
use super::{CgroupError, Controller, Version, files, read, write};
use crate::process::{PidFd, ProcessIdentity, Signal};

/// In what slices of time processor time is given out: the kernel's default.
pub const CPU_PERIOD_US: u64 = 100_000;
/// v1 has no word for "no limit": it shows the largest multiple of a page. Nobody has a quarter of that.
const V1_NO_LIMIT: u64 = 1 << 61;
/// How long a group whose last process has just ended may stay busy: the kernel lets go of it a moment later.
const REMOVE_PATIENCE: Duration = Duration::from_secs(5);

/// Held while a group is made or removed, because the first one makes the instance's group and the last one takes it
/// along.
static INSTANCES: Mutex<()> = Mutex::new(());

fn instances() -> MutexGuard<'static, ()> {
    INSTANCES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One group, on every hierarchy that it lies on. A plain value: it can be stored, and says nothing about whether the
/// group exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub(super) parts: Vec<Part>,
}

/// A group on one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) version: Version,
    pub(super) controllers: BTreeSet<Controller>,
    pub(super) path: PathBuf,
}

/// What the processes of a group may take together. `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupLimits {
    /// Microseconds of processor time in every [`CPU_PERIOD_US`].
    pub cpu_quota_us: Option<u64>,
    /// Bytes of memory, page cache included. Whoever needs more first loses page cache, then a process.
    pub memory_bytes: Option<u64>,
    /// Threads.
    pub pids: Option<u64>,
}

/// What a group took until now. `None` is what its hierarchies do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupUsage {
    /// Processor time of all processes that are or were in it, microseconds.
    pub cpu_us: Option<u64>,
    /// How many periods it was active in, and
    pub cpu_periods: Option<u64>,
    /// in how many of them it had to wait for the next one.
    pub cpu_periods_throttled: Option<u64>,
    /// Bytes of memory now, page cache included.
    pub memory_bytes: Option<u64>,
    /// Threads now.
    pub pids: Option<u64>,
    /// How many of its processes were killed because it was out of memory.
    pub oom_kills: Option<u64>,
}

impl Group {
    /// Its folder on every hierarchy: a process that enters all of them is in it.
    pub fn folders(&self) -> Vec<PathBuf> {
        self.parts.iter().map(|part| part.path.clone()).collect()
    }

    /// Whether it is there, wholly or in part.
    pub fn exists(&self) -> bool {
        self.parts.iter().any(|part| part.path.exists())
    }

    fn shown(&self) -> PathBuf {
        self.parts
            .first()
            .map(|part| part.path.clone())
            .unwrap_or_default()
    }

    fn with(&self, controller: Controller) -> Option<&Part> {
        self.parts
            .iter()
            .find(|part| part.controllers.contains(&controller))
    }

    /// Makes it where it is not there yet, and sets the limits. On failure, [`Group::remove`] takes away what was made.
    pub fn ensure(&self, limits: &GroupLimits) -> Result<(), CgroupError> {
        {
            let _making = instances();
            for part in &self.parts {
                if let Some(instance) = part.path.parent() {
                    make(instance)?;
                    if part.version == Version::V2 {
                        enable(instance, &part.controllers)?;
                    }
                }
                make(&part.path)?;
            }
        }
        self.set_limits(limits)
    }

    /// Sets limits; those that are `None` stay as they are. A kernel that was built without one of them goes without.
    pub fn set_limits(&self, limits: &GroupLimits) -> Result<(), CgroupError> {
        if let (Some(part), Some(quota)) = (self.with(Controller::Cpu), limits.cpu_quota_us) {
            match part.version {
                Version::V2 => part.set("cpu.max", &format!("{quota} {CPU_PERIOD_US}"))?,
                Version::V1 => {
                    part.set("cpu.cfs_period_us", &CPU_PERIOD_US.to_string())?;
                    part.set("cpu.cfs_quota_us", &quota.to_string())?;
                }
            }
        }
        if let (Some(part), Some(bytes)) = (self.with(Controller::Memory), limits.memory_bytes) {
            match part.version {
                Version::V2 => {
                    part.set("memory.max", &bytes.to_string())?;
                    // Half a group is of no use to anybody: it goes as a whole.
                    part.set("memory.oom.group", "1")?;
                }
                Version::V1 => part.set("memory.limit_in_bytes", &bytes.to_string())?,
            }
        }
        if let (Some(part), Some(pids)) = (self.with(Controller::Pids), limits.pids) {
            part.set("pids.max", &pids.to_string())?;
        }
        Ok(())
    }

    /// The limits that hold.
    pub fn limits(&self) -> Result<GroupLimits, CgroupError> {
        let mut limits = GroupLimits::default();
        if let Some(part) = self.with(Controller::Cpu) {
            limits.cpu_quota_us = match part.version {
                Version::V2 => part.get("cpu.max")?.and_then(|text| cpu_max(&text)),
                Version::V1 => part.number("cpu.cfs_quota_us")?,
            };
        }
        if let Some(part) = self.with(Controller::Memory) {
            limits.memory_bytes = match part.version {
                Version::V2 => part.number("memory.max")?,
                Version::V1 => part
                    .number("memory.limit_in_bytes")?
                    .filter(|bytes| *bytes < V1_NO_LIMIT),
            };
        }
        if let Some(part) = self.with(Controller::Pids) {
            limits.pids = part.number("pids.max")?;
        }
        Ok(limits)
    }

    /// What it took until now. A group that is gone is an error.
    pub fn usage(&self) -> Result<GroupUsage, CgroupError> {
        let mut usage = GroupUsage::default();
        if let Some(part) = self.with(Controller::Cpu) {
            let stat = part.get("cpu.stat")?.unwrap_or_default();
            usage.cpu_us = files::keyed(&stat, "usage_usec");
            usage.cpu_periods = files::keyed(&stat, "nr_periods");
            usage.cpu_periods_throttled = files::keyed(&stat, "nr_throttled");
        }
        if let Some(part) = self.with(Controller::CpuAcct) {
            usage.cpu_us = part.number("cpuacct.usage")?.map(|ns| ns / 1000);
        }
        if let Some(part) = self.with(Controller::Memory) {
            let (now, events) = match part.version {
                Version::V2 => ("memory.current", "memory.events"),
                Version::V1 => ("memory.usage_in_bytes", "memory.oom_control"),
            };
            usage.memory_bytes = part.number(now)?;
            usage.oom_kills = part.get(events)?.and_then(|text| files::keyed(&text, "oom_kill"));
        }
        if let Some(part) = self.with(Controller::Pids) {
            usage.pids = part.number("pids.current")?;
        }
        Ok(usage)
    }

    /// The processes in it, on any of its hierarchies; none when it is not there.
    pub fn members(&self) -> Result<BTreeSet<u32>, CgroupError> {
        let mut members = BTreeSet::new();
        for part in &self.parts {
            if let Some(text) = part.get("cgroup.procs")? {
                members.extend(files::pids(&text));
            }
        }
        Ok(members)
    }

    /// Waits until no process is in it; gives whether that came within `patience`.
    pub async fn wait_empty(&self, patience: Duration) -> Result<bool, CgroupError> {
        let deadline = Instant::now() + patience;
        let mut pause = Duration::from_millis(1);
        while !self.members()?.is_empty() {
            if Instant::now() + pause > deadline {
                return Ok(false);
            }
            // v1 has no event for it.
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Ok(true)
    }

    /// Kills every process in it and returns when none is left; `patience` is how long they may take to go. Gives how
    /// many it found. Dropping the future leaves those that were not killed yet.
    pub async fn kill(&self, patience: Duration) -> Result<usize, CgroupError> {
        let deadline = Instant::now() + patience;
        let mut killed = BTreeSet::<u32>::new();
        loop {
            let members = self.members()?;
            if members.is_empty() {
                return Ok(killed.len());
            }
            // Whoever forks faster than we read is stopped from it first.
            for part in &self.parts {
                if part.set_if_there("cgroup.kill", "1")? || !part.controllers.contains(&Controller::Pids) {
                    continue;
                }
                part.set("pids.max", "0")?;
            }
            let mut dying = Vec::new();
            for pid in &members {
                dying.extend(self.kill_member(*pid)?);
            }
            killed.extend(&members);
            let gone = async {
                for process in &dying {
                    process.wait_exit().await;
                }
                if dying.is_empty() {
                    // They ended while we looked; the kernel takes them off the list a moment later.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            if tokio::time::timeout_at(deadline, gone).await.is_err() {
                return Err(CgroupError::StillThere {
                    path: self.shown(),
                    pids: self.members()?.into_iter().collect(),
                    limit: patience,
                });
            }
        }
    }

    /// Kills one process if it is in here; `None` when it is not any more.
    fn kill_member(&self, pid: u32) -> Result<Option<PidFd>, CgroupError> {
        let failed = |source| CgroupError::Kill {
            path: self.shown(),
            pid,
            source,
        };
        let Some(identity) = ProcessIdentity::of(pid).map_err(failed)? else {
            return Ok(None);
        };
        let Some(held) = PidFd::open(&identity).map_err(failed)? else {
            return Ok(None);
        };
        // Only now is the number held. Until here it could have become that of a stranger.
        if !self.members()?.contains(&pid) || !held.is_alive() {
            return Ok(None);
        }
        held.send_signal(Signal::KILL).map_err(failed)?;
        Ok(Some(held))
    }

    /// Removes it, and its instance's group with it when it was the last one. It must hold no process; a group that is
    /// not there is no error.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        let deadline = Instant::now() + REMOVE_PATIENCE;
        let mut pause = Duration::from_millis(1);
        loop {
            match self.remove_now() {
                // v1 has no event that says when a group may go: asking for it is the question.
                Err(CgroupError::Remove { source, .. })
                    if source.kind() == io::ErrorKind::ResourceBusy && Instant::now() + pause < deadline =>
                {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(100));
                }
                result => return result,
            }
        }
    }

    fn remove_now(&self) -> Result<(), CgroupError> {
        let _removing = instances();
        for part in &self.parts {
            remove_folder(&part.path)?;
        }
        for instance in self.parts.iter().filter_map(|part| part.path.parent()) {
            match remove_folder(instance) {
                Err(CgroupError::Remove { source, .. })
                    if source.kind() != io::ErrorKind::ResourceBusy
                        && source.kind() != io::ErrorKind::DirectoryNotEmpty =>
                {
                    tracing::warn!(path = %instance.display(), error = %source, "cannot remove an empty control group");
                }
                // Another group is in it.
                _ => {}
            }
        }
        Ok(())
    }
}

impl Part {
    /// Writes a control file; one that this kernel does not have is passed over.
    fn set(&self, name: &str, text: &str) -> Result<(), CgroupError> {
        if !self.set_if_there(name, text)? {
            tracing::debug!(path = %self.path.display(), name, "this kernel has no such control file");
        }
        Ok(())
    }

    fn set_if_there(&self, name: &str, text: &str) -> Result<bool, CgroupError> {
        match write(&self.path.join(name), text) {
            Ok(()) => Ok(true),
            Err(CgroupError::Write { source, .. })
                if source.kind() == io::ErrorKind::NotFound && self.path.is_dir() =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Reads a control file; `None` when the group is gone, or this kernel has no such file.
    fn get(&self, name: &str) -> Result<Option<String>, CgroupError> {
        match read(&self.path.join(name)) {
            Ok(text) => Ok(Some(text)),
            // A group that was removed while the file was open answers with ENODEV.
            Err(CgroupError::Read { source, .. })
                if source.kind() == io::ErrorKind::NotFound
                    || source.raw_os_error() == Some(libc::ENODEV) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn number(&self, name: &str) -> Result<Option<u64>, CgroupError> {
        Ok(self.get(name)?.and_then(|text| files::number(&text)))
    }
}

/// The quota in `cpu.max`, `200000 100000`, for a period of [`CPU_PERIOD_US`].
fn cpu_max(text: &str) -> Option<u64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok()?);
    Some((u128::from(quota) * u128::from(CPU_PERIOD_US) / u128::from(period.max(1))) as u64)
}

/// Makes a folder that may be there.
pub(super) fn make(path: &Path) -> Result<(), CgroupError> {
    match std::fs::create_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(CgroupError::Write {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

fn remove_folder(path: &Path) -> Result<(), CgroupError> {
    match std::fs::remove_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(CgroupError::Remove {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_read_whatever_its_period() {
        for (text, expected) in [
            ("200000 100000\n", Some(200_000)),
            ("50000 25000\n", Some(200_000)),
            ("max 100000\n", None),
            ("1 0\n", Some(100_000)),
            ("", None),
        ] {
            assert_eq!(cpu_max(text), expected, "{text}");
        }
    }

    #[tokio::test]
    async fn what_is_not_there_is_empty_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let group = Group {
            parts: vec![Part {
                version: Version::V2,
                controllers: Controller::ALL.into(),
                path: dir.path().join("i/g"),
            }],
        };
        assert!(!group.exists());
        assert!(group.members().unwrap().is_empty());
        assert_eq!(group.kill(Duration::from_secs(1)).await.unwrap(), 0);
        group.remove().await.unwrap();
        assert_eq!(group.limits().unwrap(), GroupLimits::default());
        let stored = serde_json::to_string(&group).unwrap();
        assert_eq!(serde_json::from_str::<Group>(&stored).unwrap(), group);
    }
}
