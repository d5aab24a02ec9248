//! By what a thing that others could have made as well is known to be one daemon's.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Process, text};

/// The daemon's folder and its control group, and the ids of every VM that it ever had. Whatever is made for a VM bears
/// one of these in its name: the whole id, or its first eight digits where names are short (an interface's has at most
/// 15 characters).
#[derive(Clone, Debug)]
pub struct Marks {
    folder: PathBuf,
    words: Vec<String>,
}

impl Marks {
    pub fn new(folder: &Path, ids: &[String]) -> Self {
        let own = folder.file_name().expect("a folder with a name");
        let own = own.to_string_lossy().into_owned();
        let short = ids.iter().filter_map(|id| id.get(..8)).map(str::to_owned);
        Self {
            folder: folder.to_owned(),
            // The short ones are in the long ones.
            words: [own, group(&folder.join("data"))]
                .into_iter()
                .chain(short)
                .collect(),
        }
    }

    /// Nobody's.
    pub(crate) fn none() -> Self {
        Self {
            folder: PathBuf::new(),
            words: Vec::new(),
        }
    }

    /// Whether a name or a line bears a mark.
    pub fn are_in(&self, text: &str) -> bool {
        self.words.iter().any(|word| text.contains(word))
    }

    /// Whether a process works for the daemon: what it was called with, or where it writes, says so.
    pub fn are_in_process(&self, process: &Process) -> bool {
        process.concerns(&self.folder) || self.are_in(&process.line)
    }
}

/// How the daemon of a data directory calls the control group that holds those of its VMs: the first eight digits of the
/// hash of the path.
fn group(data: &Path) -> String {
    let output = Command::new("sh")
        .args(["-c", "printf %s \"$0\" | sha256sum"])
        .arg(data)
        .output()
        .expect("sha256sum");
    format!("offshoot-{}", &text(&output.stdout)[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_daemon_and_of_its_vms_are_known() {
        let marks = Marks::new(Path::new("/tmp/offshoot-e2e-Ab12"), &["0123456789ab".to_owned()]);
        for (name, ours) in [
            ("/tmp/offshoot-e2e-Ab12/data", true),
            ("os-0123456789ab", true),
            ("os-01234567", true),
            ("os-0123456", false),
            ("/cpu/offshoot-78ea52d2/0", true),
            ("/tmp/offshoot-e2e-Ab34/data", false),
        ] {
            assert_eq!(marks.are_in(name), ours, "{name}");
        }
    }
}
