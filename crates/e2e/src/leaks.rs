//! What a test could leave on the machine, counted before and after.

use std::path::Path;
use std::process::Command;

/// Processes, mounts and loop devices that have to do with a folder.
#[derive(Debug, PartialEq, Eq)]
pub struct Inventory {
    pub processes: Vec<String>,
    pub mounts: Vec<String>,
    pub loops: Vec<String>,
}

impl Inventory {
    /// What there is of `folder` now.
    pub fn of(folder: &Path) -> Self {
        let folder = folder.to_string_lossy().into_owned();
        let named = |text: String| {
            text.lines()
                .filter(|line| line.contains(&folder))
                .map(str::to_owned)
                .collect()
        };
        Self {
            processes: processes(&folder),
            mounts: named(std::fs::read_to_string("/proc/mounts").unwrap_or_default()),
            loops: named(losetup()),
        }
    }
}

/// The command lines of processes that name `folder`; zombies have none, so they are counted by their state.
fn processes(folder: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(folder) {
            found.push(line);
        }
    }
    found.sort();
    found
}

fn losetup() -> String {
    let output = Command::new("losetup")
        .args(["-ln", "-O", "NAME,BACK-FILE"])
        .output();
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default()
}
