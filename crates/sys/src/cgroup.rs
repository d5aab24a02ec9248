//! Control groups: what a set of processes may take together, how much it took, and who is in it.
//!
//! Both versions, and hosts that have some controllers on each: a group is one folder on every hierarchy that has a
//! controller we want.
//!
//! ```text
//! v2   /sys/fs/cgroup/<parent>/<instance>/<name>              cpu, memory, pids on one hierarchy
//! v1   /sys/fs/cgroup/{cpu,cpuacct,memory,pids}/<parent>/<instance>/<name>
//! ```
//!
//! `<instance>` belongs to one [`Tree`] and is there as long as it holds a group; `<parent>` is chosen by `cgroup/place.rs`.
//! Not for systemd's D-Bus: a service manager that wants its groups left alone says so with `Delegate=yes`.
//!
//! A module of our own, because the crate of the field (`cgroups-rs`) knows neither `cgroup.kill` nor the rules of a
//! delegated subtree, and looks for v1 only in the places where distributions used to mount it.
//! Source: the kernel's `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/`.

mod files;
mod group;
mod mounts;
mod place;
mod tree;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use group::{CPU_PERIOD_US, Group, GroupLimits, GroupUsage};
pub use tree::Tree;

/// One thing that a group can limit or count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Controller {
    /// Limits processor time; on v2 it counts it as well.
    Cpu,
    /// Counts processor time; v1 only.
    CpuAcct,
    /// Limits and counts memory: anonymous, page cache, and what the kernel keeps for the processes.
    Memory,
    /// Limits and counts tasks, which are threads.
    Pids,
}

impl Controller {
    /// Those that we want.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::CpuAcct, Self::Memory, Self::Pids];

    /// The kernel's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::CpuAcct => "cpuacct",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == word)
    }
}

/// Which of the kernel's two interfaces a hierarchy has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Version {
    /// A hierarchy for each controller, or for a few.
    V1,
    /// One hierarchy; only leaves hold processes.
    V2,
}

/// Why groups cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No hierarchy has a controller that we want.
    #[error("no control groups with `cpu`, `memory` or `pids` are mounted")]
    None,
    /// What the kernel says of itself cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A folder cannot be made, or a file in one cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The folder or file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Processes of others are where only groups may be, once controllers are handed down (v2).
    #[error("control group `{}` holds processes of others", path.display())]
    Occupied {
        /// The group.
        path: PathBuf,
    },
    /// A process in a group cannot be killed.
    #[error("cannot kill process {pid} in control group `{}`", path.display())]
    Kill {
        /// The group.
        path: PathBuf,
        /// The process.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Processes that were killed and did not go.
    #[error("control group `{}` still holds processes {pids:?} after {limit:?}", path.display())]
    StillThere {
        /// The group.
        path: PathBuf,
        /// The processes.
        pids: Vec<u32>,
        /// How long they had.
        limit: Duration,
    },
    /// A group that does not become empty.
    #[error("cannot remove control group `{}`", path.display())]
    Remove {
        /// The group.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl CgroupError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::None => "mount them: `mount -t cgroup2 cgroup2 /sys/fs/cgroup`",
            Self::Occupied { .. } | Self::Write { .. } => {
                "give offshootd a control group of its own: `Delegate=yes` in its systemd unit, or in a container a writable /sys/fs/cgroup"
            }
            Self::Read { .. } => "look at /proc/self/mountinfo and /proc/self/cgroup",
            Self::Remove { .. } => "see which processes are left in its `cgroup.procs`",
            Self::Kill { .. } | Self::StillThere { .. } => "look at what they wait for in /proc/PID/stack",
        }
    }
}

fn read(path: &Path) -> Result<String, CgroupError> {
    files::read(path).map_err(|source| CgroupError::Read {
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    files::write(path, text).map_err(|source| CgroupError::Write {
        path: path.to_owned(),
        source,
    })
}
