//! The server against OpenSSH's own clients, without a VM: the guest is this machine, on loopback.

#![expect(clippy::print_stderr, reason = "a test that cannot run says so")]

mod files;
mod forwards;
mod keys;
mod sessions;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use offshoot_agent_proto::v1;
use rustix::net::AddressFamily;
use tokio::net::TcpListener;
use tokio::process::Command;

use super::{Server, config, listener};
use crate::count::Count;
use crate::workload::Workload;

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server, and keys that let in.
struct Rig {
    folder: tempfile::TempDir,
    server: Arc<Server>,
    count: Arc<Count>,
    port: u16,
}

/// Whether what the tests need is there; says so when it is not.
fn possible() -> bool {
    let there = |program: &str| Path::new("/usr/bin").join(program).exists();
    let missing = ["ssh", "sftp", "scp", "ssh-keygen", "ssh-agent"]
        .into_iter()
        .find(|program| !there(program));
    if let Some(program) = missing {
        eprintln!("SKIPPED: there is no {program}");
    }
    let root = rustix::process::getuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root, because whoever logs in gets their own rights");
    }
    missing.is_none() && root
}

/// The agent's own program, which cargo puts beside the tests' folder.
fn agent_program() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().parent().unwrap().join("offshoot-agent");
    assert!(program.exists(), "{} is not built", program.display());
    program
}

async fn done(command: &mut Command) -> Output {
    let output = command.kill_on_drop(true).stdin(Stdio::null()).output();
    tokio::time::timeout(PATIENCE, output)
        .await
        .expect("stuck")
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Waits for a state that no event tells of.
async fn until(mut state: impl FnMut() -> bool) {
    let wait = async {
        while !state() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("never");
}

impl Rig {
    /// `None` where it is not possible.
    async fn new() -> Option<Self> {
        if !possible() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        // Others must be able to come in.
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        for (name, kind) in [
            ("host", "ed25519"),
            ("ed25519", "ed25519"),
            ("ecdsa", "ecdsa"),
            ("rsa", "rsa"),
            ("wrong", "ed25519"),
            ("other", "ed25519"),
        ] {
            let file = folder.path().join(name);
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", kind, "-N", "", "-C", name, "-f"])
                .arg(file)
                .status();
            assert!(made.await.unwrap().success());
        }
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let plan = config::plan(&v1::SshServer {
            host_key: read("host"),
            authorized_keys: ["ed25519.pub", "ecdsa.pub", "rsa.pub"].map(read).to_vec(),
            port: 22,
            yield_to_sshd: false,
            env: vec!["OF_THE_VM=yes".to_owned()],
        });
        let count = Count::new();
        let server = Server::with_sftp(
            plan.unwrap(),
            Arc::new(Workload::here().unwrap()),
            Arc::clone(&count),
            agent_program(),
        );
        let server = Arc::new(server);
        let socket = listener::open(AddressFamily::INET, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let socket = TcpListener::from_std(socket).unwrap();
        let port = socket.local_addr().unwrap().port();
        listener::attend(&server, socket);
        let known = format!("[127.0.0.1]:{port} {}", read("host.pub"));
        std::fs::write(folder.path().join("known_hosts"), known).unwrap();
        Some(Self {
            folder,
            server,
            count,
            port,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// One of OpenSSH's programs with this server's port and a key.
    fn client(&self, program: &str, key: &str) -> Command {
        self.client_of(program, key, self.port)
    }

    /// The same, for another port that leads to the same server.
    fn client_of(&self, program: &str, key: &str, port: u16) -> Command {
        let mut command = Command::new(program);
        command
            .args([
                "-F",
                "/dev/null",
                "-o",
                "BatchMode=yes",
                "-o",
                "IdentitiesOnly=yes",
            ])
            .args(["-o", "StrictHostKeyChecking=yes", "-o"])
            .arg(format!(
                "UserKnownHostsFile={}",
                self.path("known_hosts").display()
            ))
            .args(["-o", &format!("Port={port}"), "-o"])
            .arg(format!("HostKeyAlias=[127.0.0.1]:{}", self.port))
            .arg("-i")
            .arg(self.path(key))
            .env_remove("SSH_AUTH_SOCK")
            .kill_on_drop(true);
        command
    }

    fn ssh(&self) -> Command {
        let mut command = self.client("ssh", "ed25519");
        command.arg("root@127.0.0.1");
        command
    }

    /// What a command writes and how it ends.
    async fn run(&self, script: &str) -> (i32, String, String) {
        let output = done(self.ssh().arg(script)).await;
        (
            output.status.code().unwrap(),
            text(&output.stdout),
            text(&output.stderr),
        )
    }
}
