//! What a test could leave on the machine, counted before and after.

use std::path::Path;
use std::process::Command;

use crate::Process;

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
        let text = folder.to_string_lossy().into_owned();
        let named = |lines: String| {
            lines
                .lines()
                .filter(|line| line.contains(&text))
                .map(str::to_owned)
                .collect()
        };
        // A virtiofsd may share a folder from anywhere, but its log lies with its VM.
        let mut processes: Vec<_> = Process::all()
            .into_iter()
            .filter(|process| process.concerns(folder))
            .map(|process| process.line)
            .collect();
        processes.sort();
        Self {
            processes,
            mounts: named(std::fs::read_to_string("/proc/mounts").unwrap_or_default()),
            loops: named(losetup()),
        }
    }
}

fn losetup() -> String {
    let output = Command::new("losetup")
        .args(["-ln", "-O", "NAME,BACK-FILE"])
        .output();
    output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default()
}
