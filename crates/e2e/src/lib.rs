//! Tests with real VMs: a daemon of the test's own, the real CLI, and a check that nothing is left.
//!
//! Every test has its own data and run directories. An image and a kernel are made once and kept below
//! `target/e2e/golden`; a test's data directory shares their immutable files by hard links. Programs are those in
//! `target/<profile>` beside the test. Needs root; where something is missing the test fails and says what: nothing is
//! skipped silently.

#![expect(
    missing_docs,
    reason = "a test harness: the names say it, and nobody else calls it"
)]
#![expect(
    clippy::disallowed_methods,
    reason = "the harness polls processes that it does not control"
)]
#![expect(clippy::print_stderr, reason = "what a failed test said is for people")]

mod agreement;
mod blocks;
mod exposition;
mod facts;
mod fake;
mod forward;
mod golden;
mod http;
mod inventory;
mod layout;
mod leftovers;
mod namespace;
mod probe;
mod processes;
mod random;
mod refusal;
mod small_disk;
mod ssh;

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use small_disk::SmallDisk;

pub use blocks::{allocated, flip_byte, own_copy, put_byte, sha256, sha256_of_data};
pub use exposition::Scrape;
pub use facts::{FILE_FACTS, ODD_FACTS, XATTR_FACTS, sample, unpack, view};
pub use forward::Forwarder;
pub use http::{Answer, answer_of, encoded, read_answer};
pub use inventory::{Database, Inventory, Kind, Marks, descriptors};
pub use layout::{Layout, ODD_FILES, odd_layer, tar_of};
pub use namespace::Namespace;
pub use probe::{DIFFERS, MAY_BE_MISSING, MAY_DIFFER, Probe};
pub use processes::{Process, signal};
pub use random::Random;
pub use refusal::{refused, refused_by_the_api, stored};
pub use small_disk::ReadOnly;
pub use ssh::{SshClient, succeeds};

/// The image that every test finds in its store.
pub const IMAGE: &str = "debian:bookworm";

/// A disk for the image, a kernel and some VMs; its file takes what is in it.
const XFS_MIB: u64 = 4 << 10;

/// How long anything may take before the test fails: an emulated guest on a busy machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Where the programs under test are.
pub fn bin_dir() -> PathBuf {
    // target/<profile>/deps/<test> → target/<profile>
    let exe = std::env::current_exe().expect("a test knows its own path");
    exe.ancestors()
        .nth(2)
        .expect("tests lie in target/<profile>/deps")
        .to_owned()
}

/// A daemon with directories of its own.
pub struct Daemon {
    child: Child,
    small_disk: Option<SmallDisk>,
    /// Where its bridges, filters and published ports are.
    namespace: Arc<Namespace>,
    /// What is in it beside this daemon's.
    links_at_first: Vec<String>,
    launch: Launch,
    root: tempfile::TempDir,
}

/// How the daemon is started, and started again.
#[derive(Clone, Debug, Default)]
struct Launch {
    /// More lines of its config.
    settings: String,
    /// More of its environment.
    env: Vec<(&'static str, String)>,
}

impl Daemon {
    /// A daemon with the golden image and kernel.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// As [`start`](Self::start), with more lines in the daemon's config.
    pub fn start_with(settings: &str) -> Self {
        let root = Self::folder();
        golden::link_into(&root.path().join("data"));
        Self::start_in(root, settings)
    }

    /// As [`start`](Self::start), with more in the daemon's environment.
    pub fn start_with_env(env: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        let root = Self::folder();
        golden::link_into(&root.path().join("data"));
        let launch = Launch {
            env: env.into_iter().collect(),
            ..Launch::default()
        };
        Self::launch_in(root, launch, None)
    }

    /// As [`start`](Self::start), with its networks in the namespace of another daemon.
    pub fn start_beside(other: &Self) -> Self {
        let root = Self::folder();
        golden::link_into(&root.path().join("data"));
        Self::launch_beside(root, Launch::default(), None, Arc::clone(&other.namespace))
    }

    /// A daemon with the golden image and kernel, but nothing prepared; with more lines in its config.
    pub fn start_unprepared(settings: &str) -> Self {
        let root = Self::folder();
        let data = root.path().join("data");
        golden::link_into(&data);
        remove_below(&data.join("bases"));
        Self::start_in(root, settings)
    }

    /// A daemon with nothing in it.
    pub fn start_empty() -> Self {
        Self::start_empty_with("")
    }

    /// The same, with more lines in its config.
    pub fn start_empty_with(settings: &str) -> Self {
        Self::start_in(Self::folder(), settings)
    }

    /// A daemon with nothing in it, whose data directory is a file system of so many MiB.
    pub fn start_on_small_disk(mib: u64) -> Self {
        let root = Self::folder();
        let disk = SmallDisk::mount(&root.path().join("data"), mib);
        Self::launch_in(root, Launch::default(), Some(disk))
    }

    /// As [`start`](Self::start), but its data directory is a file system that has so many MiB left beside the image.
    pub fn start_on_small_disk_with_image(mib: u64) -> Self {
        Self::start_on_small_disk_with(mib, "")
    }

    /// As [`start`](Self::start), but its data directory is an XFS of its own, whose files can share blocks.
    pub fn start_on_xfs() -> Self {
        let root = Self::folder();
        let data = root.path().join("data");
        let disk = SmallDisk::mount_xfs(&data, XFS_MIB);
        golden::copy_into(&data);
        Self::launch_in(root, Launch::default(), Some(disk))
    }

    /// The same, with more lines in its config.
    pub(crate) fn start_on_small_disk_with(mib: u64, settings: &str) -> Self {
        let root = Self::folder();
        let data = root.path().join("data");
        let disk = SmallDisk::mount(&data, mib + golden::mib());
        golden::copy_into(&data);
        let launch = Launch {
            // The whole disk is smaller than what is kept free elsewhere.
            settings: format!("disk_reserve_mib = 0\n{settings}"),
            ..Launch::default()
        };
        Self::launch_in(root, launch, Some(disk))
    }

    fn folder() -> tempfile::TempDir {
        let root = tempfile::Builder::new()
            .prefix("offshoot-e2e-")
            .tempdir()
            .expect("a temporary folder");
        // VMMs run as other users and pass through.
        std::fs::set_permissions(root.path(), PermissionsExt::from_mode(0o711)).expect("chmod");
        root
    }

    fn start_in(root: tempfile::TempDir, settings: &str) -> Self {
        let launch = Launch {
            settings: settings.to_owned(),
            ..Launch::default()
        };
        Self::launch_in(root, launch, None)
    }

    fn launch_in(root: tempfile::TempDir, launch: Launch, small_disk: Option<SmallDisk>) -> Self {
        let name = root
            .path()
            .file_name()
            .expect("a folder with a name")
            .to_string_lossy();
        let namespace = Arc::new(Namespace::make(&name));
        Self::launch_beside(root, launch, small_disk, namespace)
    }

    fn launch_beside(
        root: tempfile::TempDir,
        launch: Launch,
        small_disk: Option<SmallDisk>,
        namespace: Arc<Namespace>,
    ) -> Self {
        leftovers::sign(root.path());
        let child = spawn(root.path(), &launch, namespace.name());
        let daemon = Self {
            child,
            small_disk,
            links_at_first: Inventory::links(namespace.file()),
            namespace,
            launch,
            root,
        };
        daemon.wait_ready();
        daemon
    }

    fn wait_ready(&self) {
        wait_until("the daemon to answer", || {
            self.cli(["system", "info"]).run().status.success()
        });
    }

    pub fn root(&self) -> &Path {
        self.root.path()
    }

    pub fn data(&self) -> PathBuf {
        self.root.path().join("data")
    }

    pub fn socket(&self) -> PathBuf {
        self.root.path().join("run/api.sock")
    }

    /// Where a VM's sockets lie.
    pub fn run_folder(&self, vm: &str) -> PathBuf {
        let id = self.inspect(vm)["id"].as_str().expect("an id").to_owned();
        self.root.path().join("run/vms").join(id)
    }

    /// The network namespace of its VMs.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The command that runs a program in the network namespace of its VMs, as the same process.
    pub fn inside(&self, program: &str) -> Command {
        self.namespace.inside(program)
    }

    /// What the daemon logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.root.path().join("daemon.log")).unwrap_or_default()
    }

    /// `offshoot ARGUMENTS` against this daemon.
    pub fn cli<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Cli {
        let mut command = Command::new(bin_dir().join("offshoot"));
        command
            .env("OFFSHOOT_SOCKET", self.socket())
            .env("HOME", self.root.path())
            .args(arguments);
        Cli { command, stdin: None }
    }

    /// Runs a command that must succeed; gives its standard output.
    pub fn ok<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        self.cli(arguments).ok()
    }

    /// What `inspect` says.
    pub fn inspect(&self, vm: &str) -> serde_json::Value {
        let text = self.ok(["inspect", vm]);
        let value: serde_json::Value = serde_json::from_str(&text).expect("inspect prints JSON");
        match value {
            serde_json::Value::Array(mut values) => values.remove(0),
            other => other,
        }
    }

    /// The state that `inspect` shows.
    pub fn state(&self, vm: &str) -> String {
        self.inspect(vm)["state"].as_str().unwrap_or_default().to_owned()
    }

    /// kill -9, and wait for it to be gone.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// SIGTERM; gives how it ended.
    pub fn terminate(&mut self) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
        self.child.wait().expect("wait")
    }

    /// Starts it where it cannot run: it must end by itself, soon and with a failure. Gives what it logged.
    pub fn fails_to_start(&mut self) -> String {
        let before = self.log().len();
        self.child = spawn(self.root.path(), &self.launch, self.namespace.name());
        let mut exit = None;
        wait_until("the daemon to give up", || {
            exit = self.child.try_wait().expect("wait");
            exit.is_some()
        });
        assert!(exit.is_some_and(|exit| !exit.success()), "{exit:?}");
        self.log()[before..].to_owned()
    }

    /// More lines of its config, instead of those that it had, from its next start on.
    pub fn set_settings(&mut self, settings: &str) {
        self.launch.settings = settings.to_owned();
    }

    /// Starts it again on the same directories.
    pub fn start_again(&mut self) {
        self.start_again_with(&[]);
    }

    /// The same, with more in its environment.
    pub fn start_again_with(&mut self, environment: &[(&'static str, &str)]) {
        let mut launch = self.launch.clone();
        let more = environment
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()));
        launch.env.extend(more);
        self.child = spawn(self.root.path(), &launch, self.namespace.name());
        self.wait_ready();
    }

    /// Waits until it has ended by itself.
    pub fn wait_ended(&mut self) {
        let child = &mut self.child;
        wait_until("the daemon to end", || {
            child.try_wait().expect("wait for the daemon").is_some()
        });
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("look at the daemon").is_some()
    }

    /// Deletes every base under the daemon's hands: the image's next use prepares it again.
    pub fn forget_bases(&self) {
        remove_below(&self.data().join("bases"));
    }

    /// How many bases were really prepared, by the daemon's own word.
    pub fn preparations(&self) -> usize {
        self.log().matches("prepared a base").count()
    }

    /// Starts VMs side by side, each by the arguments of one `run -d`.
    pub fn start_all(&self, runs: &[Vec<&str>]) {
        self.all_ok(runs.iter().map(|run| [&["run", "-d"], run.as_slice()].concat()));
    }

    /// Runs commands side by side; all must succeed.
    pub fn all_ok<S: AsRef<OsStr>>(&self, commands: impl IntoIterator<Item = Vec<S>>) {
        let children: Vec<_> = commands
            .into_iter()
            .map(|command| {
                let cli = self.cli(command);
                (format!("{:?}", cli.command), cli.spawn())
            })
            .collect();
        // All of them before the first complaint: nothing shall run on behind a failed test.
        let outputs: Vec<_> = children
            .into_iter()
            .map(|(shown, child)| (shown, child.wait_with_output().expect("the CLI ends")))
            .collect();
        for (shown, output) in outputs {
            assert!(output.status.success(), "{shown}: {}", text(&output.stderr));
        }
    }

    fn remove_all(&self) {
        let ids = self.ok(["ps", "-aq"]);
        if !ids.is_empty() {
            self.ok(["rm", "-f"].into_iter().chain(ids.split_whitespace()));
        }
    }

    /// The same, for one that may have ended.
    fn end(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    /// After a failed test: end what it started, by its own records.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
            let _ = self.cli(["ps", "-aq"]).run();
            if self.child.try_wait().is_ok_and(|exit| exit.is_some()) {
                self.child = spawn(self.root.path(), &self.launch, self.namespace.name());
                let began = Instant::now();
                while began.elapsed() < Duration::from_secs(5)
                    && !self.cli(["version"]).run().status.success()
                {
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            let ids = self.cli(["ps", "-aq"]).run();
            let ids = String::from_utf8_lossy(&ids.stdout).into_owned();
            if !ids.trim().is_empty() {
                let _ = self
                    .cli(["rm", "-f"].into_iter().chain(ids.split_whitespace()))
                    .run();
            }
        }
        self.end();
    }
}

/// The agent that daemons are told to use: tests of the agent itself leave one beside the daemon that is not static.
pub fn agent() -> PathBuf {
    let target = bin_dir().parent().expect("target").to_owned();
    target.join("x86_64-unknown-linux-gnu/agent/offshoot-agent")
}

fn spawn(root: &Path, launch: &Launch, netns: &str) -> Child {
    let config = root.join("config.toml");
    let settings = &launch.settings;
    let lines = if settings.starts_with("agent =") {
        format!("{settings}\n")
    } else {
        format!("agent = {:?}\n{settings}\n", agent().display().to_string())
    };
    // VMs that are made into templates would be in the way of what tests look at; those that are about them say so.
    let lines = if lines.contains("background_templates") {
        lines
    } else {
        format!("background_templates = false\n{lines}")
    };
    std::fs::write(&config, lines).expect("the config");
    let log = File::options()
        .create(true)
        .append(true)
        .open(root.join("daemon.log"))
        .expect("the daemon's log");
    let program = bin_dir().join("offshootd");
    Command::new(program)
        .envs(launch.env.iter().map(|(name, value)| (name, value)))
        .arg("--data-dir")
        .arg(root.join("data"))
        .arg("--run-dir")
        .arg(root.join("run"))
        .arg("--socket")
        .arg(root.join("run/api.sock"))
        .args(["--netns", netns])
        .arg("--config")
        .arg(config)
        .env(
            "OFFSHOOT_LOG",
            "info,offshoot_engine=debug,offshoot_vmm=debug,offshootd=debug",
        )
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("offshootd starts; run `make test`, which builds it")
}

/// Deletes what is in a folder, but not the folder.
fn remove_below(folder: &Path) {
    for name in names(folder) {
        std::fs::remove_dir_all(folder.join(name)).expect("remove");
    }
}

/// Says something to whoever reads a test's output.
pub fn tell(words: &str) {
    eprintln!("{words}");
}

/// Lets time pass, where time itself is what the test varies.
pub fn after(time: Duration) {
    std::thread::sleep(time);
}

/// The names in a folder; none where it is missing.
pub fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Waits for a state. Fails the test after [`PATIENCE`].
pub fn wait_until(what: &str, reached: impl FnMut() -> bool) {
    assert!(comes_true(reached), "waited in vain for {what}");
}

/// Whether a state is reached within [`PATIENCE`].
pub fn comes_true(mut reached: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if reached() {
            return true;
        }
        if began.elapsed() >= PATIENCE {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// One call of the CLI.
pub struct Cli {
    command: Command,
    stdin: Option<Vec<u8>>,
}

impl Cli {
    /// What it reads from standard input; without, that is `/dev/null`.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Starts it with pipes.
    pub fn spawn(mut self) -> Child {
        let stdin = if self.stdin.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        let mut child = self
            .command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the CLI starts");
        if let Some(bytes) = self.stdin {
            let mut pipe = child.stdin.take().expect("piped");
            // The command may not read it all.
            std::thread::spawn(move || pipe.write_all(&bytes));
        }
        child
    }

    pub fn run(self) -> Output {
        self.spawn().wait_with_output().expect("the CLI ends")
    }

    /// It must end within [`PATIENCE`], however.
    pub fn in_time(self) -> Output {
        let shown = format!("{:?}", self.command);
        let child = self.spawn();
        let pid = rustix::process::Pid::from_child(&child);
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || done.send(child.wait_with_output()));
        match ended.recv_timeout(PATIENCE) {
            Ok(output) => output.expect("the CLI ends"),
            Err(_) => {
                // It still runs, so the id is still its own.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                panic!("{shown} hangs");
            }
        }
    }

    /// It must succeed; gives its standard output without the last newline.
    pub fn ok(self) -> String {
        let shown = format!("{:?}", self.command);
        let output = self.run();
        assert!(
            output.status.success(),
            "{shown}: {}\n{}",
            output.status,
            text(&output.stderr)
        );
        text(&output.stdout).trim_end_matches('\n').to_owned()
    }

    /// It must fail with this status; gives its standard error.
    pub fn fails(self, status: i32) -> String {
        let shown = format!("{:?}", self.command);
        let output = self.run();
        let error = text(&output.stderr);
        assert_eq!(
            output.status.code(),
            Some(status),
            "{shown}: {}\n{error}",
            output.status
        );
        error
    }
}

/// Bytes for people.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
