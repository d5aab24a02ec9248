//! The image and the kernel that tests start from, made once by the real commands.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{IMAGE, Launch, Namespace, bin_dir, wait_until};

fn folder() -> PathBuf {
    bin_dir().parent().expect("target").join("e2e/golden")
}

/// Fills a data directory: immutable files as hard links, the database as a copy.
pub(crate) fn link_into(data: &Path) {
    let golden = folder();
    ensure(&golden);
    std::fs::create_dir_all(data).expect("a data directory");
    for shared in ["blobs", "bases", "kernels"] {
        let status = Command::new("cp")
            .arg("-al")
            .arg(golden.join(shared))
            .arg(data.join(shared))
            .status();
        assert!(status.is_ok_and(|status| status.success()), "cp -al");
    }
    std::fs::copy(golden.join("offshoot.db"), data.join("offshoot.db")).expect("the database");
}

/// Fills a data directory on another file system, with files of its own.
pub(crate) fn copy_into(data: &Path) {
    let golden = folder();
    ensure(&golden);
    for part in ["blobs", "bases", "kernels", "offshoot.db"] {
        let status = Command::new("cp")
            .args(["-a", "--sparse=always"])
            .arg(golden.join(part))
            .arg(data.join(part))
            .status();
        assert!(status.is_ok_and(|status| status.success()), "cp -a");
    }
}

/// What such a copy takes, MiB.
pub(crate) fn mib() -> u64 {
    let golden = folder();
    ensure(&golden);
    crate::allocated(&golden).div_ceil(1 << 20)
}

/// The daemon that makes it; ended also when making it fails.
struct Making(Child);

impl Drop for Making {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Makes the golden directory unless it is there; one whose kernel has another agent gets a new kernel. One process makes
/// it, others wait.
fn ensure(golden: &Path) {
    let parent = golden.parent().expect("target/e2e");
    std::fs::create_dir_all(parent).expect("target/e2e");
    let lock = File::create(parent.join("golden.lock")).expect("a lock file");
    lock.lock().expect("the lock");
    let (agent, made_with) = (crate::sha256(&crate::agent()), parent.join("golden.agent"));
    let there = golden.join("offshoot.db").exists();
    if there && std::fs::read_to_string(&made_with).is_ok_and(|hash| hash == agent) {
        return;
    }
    let root = parent.join("making");
    let _ = std::fs::remove_dir_all(&root);
    std::fs::create_dir_all(&root).expect("a folder");
    if there {
        std::fs::rename(golden, root.join("data")).expect("rename");
    }
    std::fs::set_permissions(&root, PermissionsExt::from_mode(0o711)).expect("chmod");
    let namespace = Namespace::make(&format!("offshoot-e2e-golden-{}", std::process::id()));
    let mut daemon = Making(crate::spawn(&root, &Launch::default(), namespace.name()));
    let socket = root.join("run/api.sock");
    let offshoot = |arguments: &[&str]| {
        let mut command = Command::new(bin_dir().join("offshoot"));
        command
            .env("OFFSHOOT_SOCKET", &socket)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("the CLI")
    };
    wait_until("the daemon to answer", || {
        offshoot(&["system", "info"]).status.success()
    });
    // A daemon puts its agent into the kernel when it starts; the kernel that was is then nobody's.
    let commands: &[&[&str]] = if there {
        &[&["prune", "--force", "--grace", "0s"]]
    } else {
        &[&["kernel", "add", "--distro"], &["image", "bootstrap", IMAGE]]
    };
    for arguments in commands {
        let output = offshoot(arguments);
        assert!(
            output.status.success(),
            "offshoot {arguments:?}: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            std::fs::read_to_string(root.join("daemon.log")).unwrap_or_default()
        );
    }
    let pid = rustix::process::Pid::from_child(&daemon.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
    daemon.0.wait().expect("the daemon ends");
    // Everything is in the database file itself once its last user closed it.
    assert!(
        !root.join("data/offshoot.db-wal").exists(),
        "the daemon did not close its database"
    );
    std::fs::rename(root.join("data"), golden).expect("rename");
    std::fs::write(made_with, agent).expect("a note");
    let _ = std::fs::remove_dir_all(&root);
}
