//! OpenSSH's own programs against a daemon's VMs, with the configuration that `offshoot ssh-config` writes.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::{Daemon, text};

/// A configuration for ssh(1), scp(1) and sftp(1), and nothing of the user's own.
pub struct SshClient<'a> {
    daemon: &'a Daemon,
    config: PathBuf,
}

impl<'a> SshClient<'a> {
    /// As the daemon's VMs are now.
    pub fn of(daemon: &'a Daemon) -> Self {
        Self::with(daemon, &daemon.ok(["ssh-config"]))
    }

    /// Another configuration.
    pub fn with(daemon: &'a Daemon, text: &str) -> Self {
        let config = daemon.root().join(format!("ssh_config_{}", text.len()));
        std::fs::write(&config, format!("{text}\n")).expect("a configuration");
        Self { daemon, config }
    }

    pub fn config(&self) -> &Path {
        &self.config
    }

    /// `PROGRAM -F CONFIGURATION WORDS`, as the daemon's user.
    pub fn command<S: AsRef<OsStr>>(&self, program: &str, words: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(program);
        command
            .arg("-F")
            .arg(&self.config)
            .args(words)
            .env("HOME", self.daemon.root())
            .env_remove("SSH_AUTH_SOCK")
            .stdin(std::process::Stdio::null());
        command
    }

    pub fn run<S: AsRef<OsStr>>(&self, program: &str, words: impl IntoIterator<Item = S>) -> Output {
        let mut command = self.command(program, words);
        command
            .output()
            .unwrap_or_else(|error| panic!("{command:?}: {error}; run scripts/install-deps"))
    }

    /// It must succeed; gives what it said.
    pub fn ok<S: AsRef<OsStr>>(&self, program: &str, words: impl IntoIterator<Item = S>) -> String {
        succeeds(&mut self.command(program, words))
    }
}

/// A command must succeed; gives what it said.
pub fn succeeds(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; run scripts/install-deps"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout).trim_end().to_owned()
}
