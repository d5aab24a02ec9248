//! A daemon of the benchmark's own, driven through the CLI as a user would.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::http::Api;
use crate::shared::Started;

/// A daemon with an image and a kernel.
pub(crate) struct Daemon {
    bin: PathBuf,
    root: tempfile::TempDir,
    child: Child,
    namespace: Namespace,
}

/// A network namespace of the benchmark's own (ip-netns(8)): its VMs never touch the host's network.
struct Namespace(String);

impl Namespace {
    fn make(name: String) -> Result<Self> {
        let made = Command::new("ip").args(["netns", "add", &name]).status();
        let namespace = Self(name);
        if !made.context("cannot run ip")?.success() {
            bail!("ip netns add {}", namespace.0);
        }
        let up = Command::new("ip")
            .args(["-n", &namespace.0, "link", "set", "lo", "up"])
            .status()?;
        if !up.success() {
            bail!("cannot bring up loopback in {}", namespace.0);
        }
        Ok(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
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
        let name = root.path().file_name().unwrap_or_default().to_string_lossy();
        let namespace = Namespace::make(name.into_owned())?;
        let child = spawn(&bin, root.path(), &namespace, "")?;
        let daemon = Self {
            bin,
            root,
            child,
            namespace,
        };
        daemon.wait_ready()?;
        daemon.ok(&["kernel", "add", "--distro"])?;
        daemon.ok(&["image", "bootstrap", IMAGE])?;
        Ok(daemon)
    }

    /// Waits until `system info` answers.
    fn wait_ready(&self) -> Result<()> {
        let (began, api) = (Instant::now(), Api::at(&self.socket()));
        while api.call("GET", "/v1/system/info", None).is_err() {
            if began.elapsed() > Duration::from_secs(60) {
                bail!("offshootd does not answer");
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        Ok(())
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts it again on the same directories, with these lines in its config; gives the time until it answers.
    pub(crate) fn start_again(&mut self, settings: &str) -> Result<Duration> {
        let began = Instant::now();
        self.child = spawn(&self.bin, self.root.path(), &self.namespace, settings)?;
        self.wait_ready()?;
        Ok(began.elapsed())
    }

    /// The daemon's process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.root.path().join("run/api.sock")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.root.path().join("data")
    }

    /// A folder for files that are measured with.
    pub(crate) fn scratch(&self) -> &Path {
        self.root.path()
    }

    /// The network namespace of its VMs (ip-netns(8)).
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace.0
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("offshoot"));
        command
            .env("OFFSHOOT_SOCKET", self.socket())
            .env("HOME", self.root.path())
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// The command that runs a program in the network namespace of the VMs, as the same process.
    pub(crate) fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.namespace.0))
            .arg(program);
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

    /// The same, for one that reads its standard input.
    pub(crate) fn ok_with_input(&self, arguments: &[&str], input: &str) -> Result<()> {
        use std::io::Write as _;
        let mut child = self.command(arguments).stdin(Stdio::piped()).spawn()?;
        child.stdin.take().context("piped")?.write_all(input.as_bytes())?;
        let status = child.wait()?;
        if !status.success() {
            bail!("offshoot {arguments:?}: {status}");
        }
        Ok(())
    }

    pub(crate) fn inspect(&self, vm: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&["inspect", vm])?)?)
    }

    /// `offshoot run --rm IMAGE true`, from the CLI's start to its end.
    pub(crate) fn run_and_remove(&self) -> Result<Duration> {
        let began = Instant::now();
        self.ok(&["run", "--rm", "--boot", "cold", IMAGE, "true"])?;
        Ok(began.elapsed())
    }

    /// `offshoot run --name NAME IMAGE true`: what of its time was neither QEMU's nor the guest's.
    pub(crate) fn outside_of_a_run(&self, name: &str) -> Result<Duration> {
        let began = Instant::now();
        self.ok(&["run", "--name", name, "--boot", "cold", IMAGE, "true"])?;
        let wall = began.elapsed();
        let theirs = self.theirs(name)?;
        self.ok(&["rm", name])?;
        Ok(wall.saturating_sub(theirs))
    }

    /// What QEMU and the guest took of a VM's life up to now.
    pub(crate) fn theirs(&self, vm: &str) -> Result<Duration> {
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

fn spawn(bin: &Path, root: &Path, namespace: &Namespace, settings: &str) -> Result<Child> {
    let config = root.join("config.toml");
    // What is measured has the machine to itself.
    std::fs::write(&config, format!("background_templates = false\n{settings}"))?;
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(root.join("daemon.log"))?;
    Command::new(bin.join("offshootd"))
        .arg("--data-dir")
        .arg(root.join("data"))
        .arg("--run-dir")
        .arg(root.join("run"))
        .arg("--socket")
        .arg(root.join("run/api.sock"))
        .args(["--netns", &namespace.0])
        .arg("--config")
        .arg(config)
        .env("OFFSHOOT_LOG", "warn")
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .context("cannot start offshootd")
}
