//! Network namespaces as ip-netns(8) keeps them. Each daemon has one of its own for its VMs, in which everything is of its
//! making; a test makes more where it plays the world outside.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::text;

/// A network namespace with a name; loopback is up, and nothing else is there. Gone when dropped.
pub struct Namespace {
    name: String,
    file: PathBuf,
}

impl Namespace {
    /// Makes one. The name says whose it is: it begins with that of the daemon's folder.
    pub fn make(name: &str) -> Self {
        let folder = Path::new("/run/netns");
        std::fs::create_dir_all(folder).expect("/run/netns");
        let file = folder.join(name);
        std::fs::write(&file, "").expect("a file in /run/netns");
        // Dropped, it goes, whatever fails next.
        let namespace = Self {
            name: name.to_owned(),
            file,
        };
        let mut unshare = Command::new("unshare");
        unshare
            .arg(format!("--net={}", namespace.file.display()))
            .arg("true");
        does(unshare);
        let mut up = namespace.inside("ip");
        up.args(["link", "set", "lo", "up"]);
        does(up);
        namespace
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is mounted.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The command that runs a program in it, as the same process.
    pub fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.file.display()))
            .arg(program)
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            );
        command
    }

    /// Runs a program in it, which must succeed; gives what it said.
    pub fn ok(&self, words: &[&str]) -> String {
        let mut command = self.inside(words[0]);
        command.args(&words[1..]);
        does(command)
    }
}

fn does(mut command: Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; run scripts/install-deps"));
    assert!(output.status.success(), "{command:?}: {}", text(&output.stderr));
    text(&output.stdout).trim_end().to_owned()
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.file).status();
        let _ = std::fs::remove_file(&self.file);
    }
}
