//! The daemon's settings: a TOML file, every key with a default. `docs/config.md` lists them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use ipnet::Ipv4Net;
use offshoot_engine::admission::AdmissionRules;
use offshoot_model::{ByteSize, DEFAULT_DISK, VmmRequest};
use offshoot_net::dns::UpstreamAddress;
use offshoot_rootfs::base::BaseStoreConfig;
use serde::Deserialize;

use crate::prometheus::LoopbackAddress;
use crate::serve::Patience;

/// A seed cannot be smaller or larger than a disk.
const SEED_MIB: RangeInclusive<u64> = 64..=16 << 20;

/// What one bridge has room for: 1024 ports (`BR_MAX_PORTS` in the kernel's net/bridge/br_private.h), of which VMs need some.
const MOST_IDLE_TAPS: usize = 512;

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
    /// The Cloud Hypervisor program; `OFFSHOOT_CLOUD_HYPERVISOR`, or what `PATH` has, when absent.
    pub cloud_hypervisor: Option<PathBuf>,
    /// The Firecracker program; `OFFSHOOT_FIRECRACKER`, or what `PATH` has, when absent.
    pub firecracker: Option<PathBuf>,
    /// Files and folders that VMMs may read besides their own programs, `/usr` and `/lib`.
    pub vmm_files: Vec<PathBuf>,
    /// Which VMM is tried first, second and third where a VM names none.
    pub vmm_order: Vec<VmmRequest>,
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
    /// Where `/metrics` is served over TCP as well, `127.0.0.1:PORT`; nowhere when absent.
    pub metrics_listen: Option<LoopbackAddress>,
    /// Where networks get their subnets from.
    pub network_pool: Ipv4Net,
    /// How many idle TAPs each network's bridge keeps ready for VMs; 0 for none.
    pub tap_pool_size: usize,
    /// How many warm slots images have, by name.
    pub warm_slots: BTreeMap<String, usize>,
    /// The domain of VMs' names.
    pub dns_domain: String,
    /// Who is asked for names that are none of ours, `ADDRESS[:PORT]`; the host's resolvers when empty.
    pub dns_upstream: Vec<UpstreamAddress>,
    /// How much memory may be promised to VMs that run, as a multiple of the host's.
    pub memory_overcommit: f64,
    /// The length of the seeds of bases that are made from now on, MiB.
    pub seed_mib: u64,
    /// With less free in the data directory, no VM is created, MiB.
    pub disk_reserve_mib: u64,
    /// Seconds that a client may take for the head of a request, and let pass between two requests of one connection.
    pub api_head_timeout_s: u64,
    /// Seconds that a client may let pass between two pieces of a request's body.
    pub api_body_timeout_s: u64,
    /// Whether templates are made by themselves, after VMs that booted their kernel.
    pub background_templates: bool,
    /// Registries that are spoken to without TLS, `host:port`; loopback always is.
    pub insecure_registries: Vec<String>,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        Self {
            socket_group: "offshoot".into(),
            agent: None,
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            cloud_hypervisor: None,
            firecracker: None,
            vmm_files: Vec::new(),
            // The one that runs everywhere and can do everything comes first.
            vmm_order: vec![
                VmmRequest::Qemu,
                VmmRequest::CloudHypervisor,
                VmmRequest::Firecracker,
            ],
            virtiofsd: None,
            // Above what systemd hands out to containers (524288 to 1879048191) and below its reserved end.
            uid_base: 1_900_000_001,
            uid_count: 65_000,
            // Software emulation with a busy host takes half a minute at worst; a dead guest is noticed by its VMM's end.
            boot_timeout_s: 120,
            import_limit_mib: 64 << 10,
            // Whoever fetched or made something within the hour is likely to go on with it.
            prune_grace_s: 3600,
            metrics_listen: None,
            // In the middle of what RFC 1918 leaves to everybody, where routers of homes and offices, container engines and
            // clouds do not begin to count.
            network_pool: Ipv4Net::new_assert(Ipv4Addr::new(10, 87, 0, 0), 16),
            // A few that start at once; each is a device in the kernel and nothing else.
            tap_pool_size: 4,
            // Each keeps a whole VM in memory.
            warm_slots: BTreeMap::new(),
            // `internal` is no other's and will not be (ICANN, 2024).
            dns_domain: "vm.internal".into(),
            dns_upstream: Vec::new(),
            // Guests take their memory as they touch it. Clouds that sell it have settled on the same ratio (OpenStack
            // Nova's `ram_allocation_ratio`).
            memory_overcommit: 1.5,
            // Disks mostly have the size that they have by default, and then need not grow.
            seed_mib: DEFAULT_DISK.bytes() >> 20,
            // What the VMs that run can still write while somebody makes room: their logs alone are 64 MiB each.
            disk_reserve_mib: 256,
            // A client on the same host sends a head at once.
            api_head_timeout_s: 10,
            // An upload comes from a pipe, whose writer may have to read a slow disk first.
            api_body_timeout_s: 60,
            background_templates: true,
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
        let config: Self =
            toml::from_str(&text).with_context(|| format!("cannot understand {}", path.display()))?;
        if config.memory_overcommit.is_nan() || config.memory_overcommit < 1.0 {
            anyhow::bail!("{}: `memory_overcommit` must be at least 1", path.display());
        }
        if !SEED_MIB.contains(&config.seed_mib) {
            anyhow::bail!(
                "{}: `seed_mib` must be {} to {}",
                path.display(),
                SEED_MIB.start(),
                SEED_MIB.end()
            );
        }
        if let Some(wrong) = config.vmm_files.iter().find(|path| !path.is_absolute()) {
            anyhow::bail!(
                "{}: `vmm_files` must be absolute paths, and `{}` is none",
                path.display(),
                wrong.display()
            );
        }
        if config.tap_pool_size > MOST_IDLE_TAPS {
            anyhow::bail!(
                "{}: `tap_pool_size` must be at most {MOST_IDLE_TAPS}",
                path.display()
            );
        }
        let mut order = config.vmm_order.clone();
        order.sort_by_key(|vmm| *vmm as u8);
        order.dedup();
        if order.is_empty() || order.len() < config.vmm_order.len() || order.contains(&VmmRequest::Auto) {
            anyhow::bail!(
                "{}: `vmm_order` must be a list of `qemu`, `cloud-hypervisor` and `firecracker`, each at most once",
                path.display()
            );
        }
        if !is_domain(&config.dns_domain) {
            anyhow::bail!(
                "{}: `dns_domain` must be a domain in lower case, such as `vm.internal`",
                path.display()
            );
        }
        Ok(config)
    }

    /// The group that may pass through our folders: the id before the first VMM's.
    pub fn gid(&self) -> u32 {
        self.uid_base - 1
    }

    /// The user that compiles kernels: the id before that.
    pub fn builder(&self) -> u32 {
        self.uid_base - 2
    }

    /// How long a guest may take to come up.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_s)
    }

    /// For how long `prune` spares what was made or used.
    pub fn prune_grace(&self) -> Duration {
        Duration::from_secs(self.prune_grace_s)
    }

    /// What VMs may be promised, and what is kept free.
    pub fn admission(&self) -> AdmissionRules {
        AdmissionRules {
            memory_overcommit: self.memory_overcommit,
            disk_reserve: ByteSize::from_mib(self.disk_reserve_mib),
        }
    }

    /// How bases are made.
    pub fn bases(&self) -> BaseStoreConfig {
        BaseStoreConfig {
            seed_size: ByteSize::from_mib(self.seed_mib),
            ..BaseStoreConfig::default()
        }
    }

    /// How long clients may take.
    pub fn patience(&self) -> Patience {
        Patience {
            head: Duration::from_secs(self.api_head_timeout_s),
            body: Duration::from_secs(self.api_body_timeout_s),
        }
    }

    /// The largest upload.
    pub fn import_limit(&self) -> ByteSize {
        ByteSize::from_mib(self.import_limit_mib)
    }
}

/// Whether a text is a domain as guests search it: labels of letters, digits and hyphens (RFC 1123), short enough that
/// a VM's name fits in front.
fn is_domain(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    text.len() <= 180 && text.split('.').all(label)
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
        std::fs::write(&path, "metrics_listen = \"0.0.0.0:9464\"\n").unwrap();
        let error = format!("{:#}", DaemonConfig::load(Some(&path)).unwrap_err());
        assert!(error.contains("can be reached from elsewhere"), "{error}");
        for (ratio, good) in [("1.0", true), ("2", true), ("0.9", false), ("nan", false)] {
            std::fs::write(&path, format!("memory_overcommit = {ratio}\n")).unwrap();
            assert_eq!(DaemonConfig::load(Some(&path)).is_ok(), good, "{ratio}");
        }
        for (mib, good) in [(64, true), (1024, true), (63, false), (17 << 20, false)] {
            std::fs::write(&path, format!("seed_mib = {mib}\n")).unwrap();
            assert_eq!(DaemonConfig::load(Some(&path)).is_ok(), good, "{mib}");
        }
        for (domain, good) in [
            ("vm.internal", true),
            ("lab", true),
            ("", false),
            ("a..b", false),
            ("Lab", false),
            ("-a.b", false),
            ("a b", false),
        ] {
            std::fs::write(&path, format!("dns_domain = \"{domain}\"\n")).unwrap();
            assert_eq!(DaemonConfig::load(Some(&path)).is_ok(), good, "{domain}");
        }
        for (upstream, good) in [("9.9.9.9", true), ("[::1]:5353", true), ("dns.example", false)] {
            std::fs::write(&path, format!("dns_upstream = [\"{upstream}\"]\n")).unwrap();
            assert_eq!(DaemonConfig::load(Some(&path)).is_ok(), good, "{upstream}");
        }
        for (size, good) in [("0", true), ("512", true), ("513", false), ("-1", false)] {
            std::fs::write(&path, format!("tap_pool_size = {size}\n")).unwrap();
            assert_eq!(DaemonConfig::load(Some(&path)).is_ok(), good, "{size}");
        }
        for (order, good) in [
            (r#"["firecracker", "qemu"]"#, true),
            (r#"[]"#, false),
            (r#"["auto"]"#, false),
            (r#"["qemu", "qemu"]"#, false),
            (r#"["bochs"]"#, false),
        ] {
            std::fs::write(&path, format!("vmm_order = {order}\n")).unwrap();
            assert_eq!(DaemonConfig::load(Some(&path)).is_ok(), good, "{order}");
        }
        std::fs::write(&path, "network_pool = \"10.9.0.0\"\n").unwrap();
        assert!(DaemonConfig::load(Some(&path)).is_err());
    }
}
