//! What the daemon and its VMs take of the host, asked of the host itself.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};

/// The bytes of blocks that a folder and all below it take, a file with several names once. What vanishes meanwhile is
/// not counted; what is reflinked counts for every file that has it.
pub(crate) fn blocks(folder: &Path) -> u64 {
    let (mut total, mut seen, mut pending) = (0, HashSet::new(), vec![folder.to_owned()]);
    while let Some(path) = pending.pop() {
        let Ok(metadata) = std::fs::symlink_metadata(&path) else {
            continue;
        };
        if !metadata.is_dir() && !seen.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        // stat(2): units of 512, whatever the file system's own are.
        total += metadata.blocks() * 512;
        if metadata.is_dir()
            && let Ok(entries) = std::fs::read_dir(&path)
        {
            pending.extend(entries.flatten().map(|entry| entry.path()));
        }
    }
    total
}

/// The proportional set size of a process, bytes: a page that several map is divided among them.
pub(crate) fn pss(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text
        .lines()
        .find(|line| line.starts_with("Pss:"))
        .context("no Pss")?;
    let kib: u64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib * 1024)
}

/// The resident set size of a process, bytes: every page that it has in RAM.
pub(crate) fn rss(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .context("no VmRSS")?;
    let kib: u64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib * 1024)
}

/// Every process of a VM: those whose command line names one of its folders, or that write there. Its VMM does, and
/// every virtiofsd logs there.
pub(crate) fn processes_of(vm_id: &str) -> Result<Vec<u32>> {
    let folder = format!("/vms/{vm_id}/");
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else {
            continue;
        };
        let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let named = String::from_utf8_lossy(&line).contains(&folder);
        let writes = ["fd/1", "fd/2"].iter().any(|fd| {
            std::fs::read_link(path.join(fd)).is_ok_and(|target| target.to_string_lossy().contains(&folder))
        });
        if named || writes {
            found.push(pid);
        }
    }
    Ok(found)
}
