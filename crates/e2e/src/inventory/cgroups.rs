//! Control groups, of version 2 and of every hierarchy of version 1.

use std::path::{Path, PathBuf};

use super::{Marks, everything_below};

/// The paths of those that bear a mark, each once.
pub(super) fn cgroups(marks: &Marks) -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/mounts").expect("/proc/mounts");
    let roots = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (place, kind) = (fields.nth(1)?, fields.next()?);
        matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(place))
    });
    let mut found: Vec<_> = roots
        .flat_map(|root: PathBuf| everything_below(&root))
        .filter(|path| Path::is_dir(path))
        .map(|path| path.to_string_lossy().into_owned())
        .filter(|path| marks.are_in(path))
        .collect();
    found.sort();
    found.dedup();
    found
}
