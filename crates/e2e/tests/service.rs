//! The daemon as a service: what it tells the service manager, what signals do, and what `make install` lays down.

use std::io::Read as _;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use offshoot_e2e::{Daemon, IMAGE, PATIENCE, bin_dir, signal, wait_until};
use rustix::process::Signal;

/// A daemon under a service manager that only listens.
struct Service {
    child: Child,
    manager: UnixDatagram,
    folder: tempfile::TempDir,
}

impl Service {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let notify = folder.path().join("notify");
        let manager = UnixDatagram::bind(&notify).unwrap();
        manager.set_read_timeout(Some(PATIENCE)).unwrap();
        let child = Command::new(bin_dir().join("offshootd"))
            .arg("--data-dir")
            .arg(folder.path().join("data"))
            .arg("--run-dir")
            .arg(folder.path().join("run"))
            .args(["--config".into(), config(folder.path())])
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            child,
            manager,
            folder,
        }
    }

    /// The next message to the service manager, line by line.
    fn told(&self) -> Vec<String> {
        let mut message = [0; 4096];
        let length = self
            .manager
            .recv(&mut message)
            .expect("a message to the service manager");
        let text = std::str::from_utf8(&message[..length]).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("run/api.sock")
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn config(folder: &Path) -> PathBuf {
    let agent = bin_dir()
        .parent()
        .unwrap()
        .join("x86_64-unknown-linux-gnu/agent/offshoot-agent");
    let path = folder.join("config.toml");
    std::fs::write(&path, format!("agent = {:?}\n", agent.display().to_string())).unwrap();
    path
}

#[test]
fn the_service_manager_is_told_when_it_begins_and_ends() {
    let mut service = Service::start();
    let ready = service.told();
    assert!(ready.contains(&"READY=1".to_owned()), "{ready:?}");
    let status = format!("STATUS=serving at {}", service.socket().display());
    assert!(ready.contains(&status), "{ready:?}");
    // Ready means that it answers.
    UnixStream::connect(service.socket()).unwrap();

    // A hang-up ends nothing and is explained.
    signal(service.pid(), Signal::HUP);
    let mut log = service.child.stderr.take().unwrap();
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains("SIGHUP") {
        let mut piece = [0; 4096];
        let read = log.read(&mut piece).unwrap();
        assert!(read > 0, "it ended: {}", String::from_utf8_lossy(&said));
        said.extend_from_slice(&piece[..read]);
    }
    UnixStream::connect(service.socket()).unwrap();

    signal(service.pid(), Signal::TERM);
    let stopping = service.told();
    assert!(stopping.contains(&"STOPPING=1".to_owned()), "{stopping:?}");
    let status = service.child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(!service.socket().exists());
}

#[test]
fn a_log_that_nobody_reads_any_more_ends_nothing() {
    let mut service = Service::start();
    service.told();
    drop(service.child.stderr.take());
    // Every one of these writes to a pipe that is closed.
    for _ in 0..3 {
        signal(service.pid(), Signal::HUP);
        UnixStream::connect(service.socket()).unwrap();
    }
    signal(service.pid(), Signal::TERM);
    service.told();
    assert!(service.child.wait().unwrap().success());
}

#[test]
fn info_says_what_runs_where() {
    let daemon = Daemon::start_empty();
    let info: serde_json::Value =
        serde_json::from_str(&daemon.ok(["system", "info", "--output", "json"])).unwrap();
    assert_eq!(info["socket"], daemon.socket().display().to_string());
    assert_eq!(
        info["config_file"],
        daemon.root().join("config.toml").display().to_string()
    );
    assert_eq!(info["api_version"], "v1");
    assert_eq!(info["pid"], daemon.pid());
    assert!(
        info["started_ms"]
            .as_u64()
            .is_some_and(|ms| ms > 1_700_000_000_000),
        "{info}"
    );
    assert!(info["uptime_s"].is_u64(), "{info}");
    let table = daemon.ok(["system", "info"]);
    for word in ["Socket:", "Settings:", "API v1", "config.toml"] {
        assert!(table.contains(word), "{table}");
    }
    daemon.finish();
}

#[test]
fn what_is_installed_fits_together() {
    let root = tempfile::tempdir().unwrap();
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let made = Command::new("make")
        .current_dir(project)
        .args(["-s", "install-files", "PROFILE=dev"])
        .arg(format!("DESTDIR={}", root.path().display()))
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let unit = root.path().join("usr/local/lib/systemd/system/offshootd.service");
    let text = std::fs::read_to_string(&unit).unwrap();
    let setting = |name: &str| {
        let mut values = text
            .lines()
            .filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        values.next().unwrap_or_else(|| panic!("no {name}"))
    };
    let program = setting("ExecStart").split(' ').next().unwrap();
    for installed in [
        program,
        "/usr/local/bin/offshoot",
        "/usr/local/bin/offshoot-agent",
    ] {
        assert!(
            root.path().join(installed.trim_start_matches('/')).is_file(),
            "{installed}"
        );
    }
    // VMs outlive the daemon, and it says when it is ready.
    assert_eq!(setting("KillMode"), "process");
    assert_eq!(setting("Type"), "notify");
    assert_eq!(setting("Delegate"), "yes");
    assert_eq!(setting("Restart"), "on-failure");

    // It looks for the programs where the unit says they are.
    let rooted = root.path().join("offshootd.service");
    let prefix = format!("ExecStart={}", root.path().display());
    std::fs::write(&rooted, text.replace("ExecStart=", &prefix)).unwrap();
    let verified = Command::new("systemd-analyze")
        .arg("verify")
        .arg(&rooted)
        .output();
    match verified {
        Ok(verified) => {
            let said = String::from_utf8_lossy(&verified.stderr);
            assert!(
                verified.status.success() && !said.contains("offshootd.service:"),
                "{said}"
            );
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            offshoot_e2e::tell("SKIPPED: systemd-analyze is not installed, so nobody else read the unit");
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn each_run_has_logs_of_its_own_and_the_last_ones_stay() {
    let daemon = Daemon::start();
    daemon.ok(["run", "-d", "--name", "twice", IMAGE, "sleep", "1000"]);
    let folder = PathBuf::from(daemon.inspect("twice")["directory"].as_str().unwrap());
    let console = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    daemon.ok(["kill", "twice"]);
    wait_until("the VM to be stopped", || daemon.state("twice") == "stopped");
    let first = console("console.log");
    assert!(!first.is_empty(), "the guest's kernel said nothing");
    assert_eq!(console("console.log.1"), "");
    daemon.ok(["start", "twice"]);
    assert_eq!(console("console.log.1"), first);
    assert_ne!(console("console.log"), first);
    let shown = daemon.ok(["logs", "--console", "twice"]);
    assert!(!shown.is_empty());
    daemon.finish();
}
