//! The daemon's settings: a TOML file, every key with a default. `docs/config.md` lists them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use offshoot_model::ByteSize;
use serde::Deserialize;

/// Every setting.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DaemonConfig {
    /// The group that may use the socket, where it exists.
    pub socket_group: String,
    /// The agent program; beside `offshootd` or in `/usr/lib/offshoot` when absent.
    pub agent: Option<PathBuf>,
    /// The QEMU program.
    pub qemu: PathBuf,
    /// The virtiofsd program; where the distribution puts it when absent.
    pub virtiofsd: Option<PathBuf>,
    /// The first of the user ids that VMMs run as.
    pub uid_base: u32,
    /// How many VMs can exist at once.
    pub uid_count: u32,
    /// Seconds that a guest may take to come up.
    pub boot_timeout_s: u64,
    /// The largest upload, MiB.
    pub import_limit_mib: u64,
    /// Seconds for which `prune` spares what was made or used.
    pub prune_grace_s: u64,
    /// Registries that are spoken to without TLS, `host:port`; loopback always is.
    pub insecure_registries: Vec<String>,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        Self {
            socket_group: "offshoot".into(),
            agent: None,
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            virtiofsd: None,
            // Above what systemd hands out to containers (524288 to 1879048191) and below its reserved end.
            uid_base: 1_900_000_001,
            uid_count: 65_000,
            // Software emulation with a busy host takes half a minute at worst; a dead guest is noticed by its VMM's end.
            boot_timeout_s: 120,
            import_limit_mib: 64 << 10,
            // Whoever fetched or made something within the hour is likely to go on with it.
            prune_grace_s: 3600,
            insecure_registries: Vec::new(),
        }
    }
}

impl DaemonConfig {
    /// Reads the file, or takes the defaults when none is named. An unknown key is an error: it would be a setting that
    /// silently does nothing.
    pub fn load(path: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("cannot understand {}", path.display()))
    }

    /// The group that may pass through our folders: the id before the first VMM's.
    pub fn gid(&self) -> u32 {
        self.uid_base - 1
    }

    /// How long a guest may take to come up.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_s)
    }

    /// For how long `prune` spares what was made or used.
    pub fn prune_grace(&self) -> Duration {
        Duration::from_secs(self.prune_grace_s)
    }

    /// The largest upload.
    pub fn import_limit(&self) -> ByteSize {
        ByteSize::from_mib(self.import_limit_mib)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_does_nothing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "boot_timeout_s = 5\n").unwrap();
        assert_eq!(
            DaemonConfig::load(Some(&path)).unwrap().boot_timeout(),
            Duration::from_secs(5)
        );
        std::fs::write(&path, "boot_timeout = 5\n").unwrap();
        assert!(DaemonConfig::load(Some(&path)).is_err());
        assert!(DaemonConfig::load(Some(&dir.path().join("none"))).is_err());
    }
}
