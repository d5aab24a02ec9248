//! A daemon of the benchmark's own, driven through the CLI as a user would.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::shared::Started;

/// A daemon with an image and a kernel.
pub(crate) struct Daemon {
    bin: PathBuf,
    root: tempfile::TempDir,
    child: Child,
}

/// The image that everything is measured with.
pub(crate) const IMAGE: &str = "debian:bookworm";

/// Stages that are QEMU's or the guest's own time.
const THEIRS: [&str; 6] = [
    "vmm.prepare",
    "agent.after_boot",
    "main.after_boot",
    "guest.main",
    "agent.stop",
    "vmm.stop",
];

impl Daemon {
    pub(crate) fn start(bin: &Path) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let bin = bin.canonicalize().context("no such folder of programs")?;
        let root = tempfile::Builder::new()
            .prefix("offshoot-bench-")
            .tempdir_in("/var/tmp")?;
        std::fs::set_permissions(root.path(), std::fs::Permissions::from_mode(0o711))?;
        let log = std::fs::File::create(root.path().join("daemon.log"))?;
        let child = Command::new(bin.join("offshootd"))
            .arg("--data-dir")
            .arg(root.path().join("data"))
            .arg("--run-dir")
            .arg(root.path().join("run"))
            .arg("--socket")
            .arg(root.path().join("run/api.sock"))
            .env("OFFSHOOT_LOG", "warn")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start offshootd")?;
        let daemon = Self { bin, root, child };
        let began = Instant::now();
        while daemon.ok(&["system", "info"]).is_err() {
            if began.elapsed() > Duration::from_secs(20) {
                bail!("offshootd does not answer");
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        daemon.ok(&["kernel", "add", "--distro"])?;
        daemon.ok(&["image", "bootstrap", IMAGE])?;
        Ok(daemon)
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.root.path().join("data")
    }

    /// A folder for files that are measured with.
    pub(crate) fn scratch(&self) -> &Path {
        self.root.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("offshoot"));
        command
            .env("OFFSHOOT_SOCKET", self.root.path().join("run/api.sock"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs the CLI; gives its standard output.
    pub(crate) fn ok(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments).output().context("cannot run offshoot")?;
        if !output.status.success() {
            bail!(
                "offshoot {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    pub(crate) fn inspect(&self, vm: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&["inspect", vm])?)?)
    }

    /// `offshoot run --rm IMAGE true`, from the CLI's start to its end.
    pub(crate) fn run_and_remove(&self) -> Result<Duration> {
        let began = Instant::now();
        self.ok(&["run", "--rm", IMAGE, "true"])?;
        Ok(began.elapsed())
    }

    /// `offshoot run --name NAME IMAGE true`: what of its time was neither QEMU's nor the guest's.
    pub(crate) fn outside_of_a_run(&self, name: &str) -> Result<Duration> {
        let began = Instant::now();
        self.ok(&["run", "--name", name, IMAGE, "true"])?;
        let wall = began.elapsed();
        let theirs = self.theirs(name)?;
        self.ok(&["rm", name])?;
        Ok(wall.saturating_sub(theirs))
    }

    /// What QEMU and the guest took of a VM's life up to now.
    fn theirs(&self, vm: &str) -> Result<Duration> {
        let details = self.inspect(vm)?;
        let stages = details["timings"].as_array().context("no timings")?;
        let theirs = stages
            .iter()
            .filter(|stage| THEIRS.iter().any(|theirs| stage["stage"] == *theirs))
            .filter_map(|stage| stage["duration_us"].as_u64())
            .sum();
        Ok(Duration::from_micros(theirs))
    }

    /// `offshoot run -d --name NAME IMAGE sleep`, and a first command in it.
    pub(crate) fn start_vm(&self, name: &str, root: &str, memory: &str) -> Result<Started> {
        let began = Instant::now();
        self.ok(&[
            "run", "-d", "--name", name, "--root", root, "--memory", memory, IMAGE, "sleep", "100000",
        ])?;
        let run = began.elapsed();
        self.ok(&["exec", name, "true"])?;
        let first_command = began.elapsed().saturating_sub(run);
        let outside = run.saturating_sub(self.theirs(name)?);
        Ok(Started {
            run,
            outside,
            first_command,
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(ids) = self.ok(&["ps", "-aq"]) {
            for id in ids.split_whitespace() {
                let _ = self.ok(&["rm", "-f", id]);
            }
        }
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}
