//! A network namespace of a daemon's own, in which everything is of its making.

use std::path::{Path, PathBuf};
use std::process::Command;

/// It lives as long as its file is mounted; unmounted when dropped.
pub(crate) struct Namespace(PathBuf);

impl Namespace {
    pub(crate) fn make(file: &Path) -> Self {
        std::fs::write(file, "").expect("a file");
        let made = Command::new("unshare")
            .arg(format!("--net={}", file.display()))
            .arg("true")
            .status();
        assert!(made.is_ok_and(|status| status.success()), "unshare --net");
        Self(file.to_owned())
    }

    /// The command that runs a program in it, as the same process.
    pub(crate) fn enter(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.0.display())).arg(program);
        command
    }

    pub(crate) fn file(&self) -> &Path {
        &self.0
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
