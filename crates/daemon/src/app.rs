//! What the daemon is put together from. Concrete back ends are named here and nowhere else.

use std::collections::BTreeMap;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use offshoot_engine::capabilities::{
    Accelerator, AdmissionCapability, AgentCapability, FirewallCapability, FoldersCapability,
    KernelCapability, LimitsCapability, MainProcessCapability, MountsCapability, NamesCapability,
    NetworkCapability, OverlayCapability, RootCapability, SshCapability, VmmCapability, WorkCapability,
};
use offshoot_engine::capability::Capability;
use offshoot_engine::engine::{Engine, EngineConfig, Parts};
use offshoot_engine::networks::{Networks, NetworksConfig};
use offshoot_engine::templates::{TemplateRules, Templates};
use offshoot_engine::zone::LiveZone;
use offshoot_kernel::KernelStore;
use offshoot_net::Namespace;
use offshoot_net::dns::{DnsConfig, DnsServers};
use offshoot_net::host_ports::FreePorts;
use offshoot_rootfs::base::BaseStore;
use offshoot_store::blobs::BlobStore;
use offshoot_store::db::Db;
use offshoot_sys::lock::FileLock;
use offshoot_vmm::cloud_hypervisor::{CloudHypervisorConfig, CloudHypervisorDriver};
use offshoot_vmm::firecracker::{FirecrackerConfig, FirecrackerDriver};
use offshoot_vmm::plan::Accel;
use offshoot_vmm::qemu::{QemuConfig, QemuDriver};
use offshoot_vmm::virtiofsd::{Virtiofsd, VirtiofsdConfig};
use offshoot_vmm::{Driver, ProbeError};
use tokio_util::sync::CancellationToken;

use crate::config::DaemonConfig;
use crate::images::Images;
use crate::known_bases;
use crate::prometheus::Numbers;
use crate::time::now_ms;
use crate::warm::WarmImages;

/// How long the rest of a broken download may wait for the pull that goes on with it.
const KEEP_DOWNLOADS: Duration = Duration::from_secs(7 * 24 * 3600);

/// How often it is looked for what should not be there.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// Everything that handlers share.
pub struct App {
    /// Settings.
    pub config: DaemonConfig,
    /// VMs.
    pub engine: Engine,
    /// Images and bases.
    pub images: Images,
    /// Kernel bundles.
    pub kernels: Arc<KernelStore>,
    /// VMMs, by name.
    pub drivers: BTreeMap<&'static str, Arc<dyn Driver>>,
    /// What serves shared folders.
    pub virtiofsd: Arc<Virtiofsd>,
    /// How guest instructions are run.
    pub accelerator: Accelerator,
    /// Which VM fits this host.
    pub admission: Arc<AdmissionCapability>,
    /// Who answers for the names of VMs.
    pub names: Arc<DnsServers>,
    /// The agent that goes into kernel bundles.
    pub agent: PathBuf,
    /// What is counted.
    pub numbers: Numbers,
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Where sockets lie.
    pub run_dir: PathBuf,
    /// Where the daemon listens.
    pub socket: PathBuf,
    /// The file with its settings.
    pub config_file: Option<PathBuf>,
    /// Which images have warm slots.
    pub warm: WarmImages,
    /// Cancelled when a client asked the daemon to end.
    pub end: CancellationToken,
    /// When it started: milliseconds since the epoch, and by a clock that nobody sets.
    pub started: (u64, Instant),
    /// Held while the daemon lives: no other one uses these directories.
    _locks: [FileLock; 2],
}

/// What handlers get.
pub type Shared = Arc<App>;

impl App {
    /// Opens everything, takes over VMs that run, and is ready for requests.
    pub async fn start(
        data_dir: &Path,
        run_dir: &Path,
        socket: &Path,
        config_file: Option<&Path>,
        config: DaemonConfig,
        namespace: Namespace,
    ) -> anyhow::Result<Shared> {
        // First: what happens to VMs while they are found again counts.
        let numbers = Numbers::install()?;
        let gid = config.gid();
        // Other users come to the socket; VMMs come to their own folders; nobody else needs the data.
        make_root(run_dir, 0o711, gid)?;
        make_root(data_dir, 0o710, gid)?;
        if let Some(parent) = socket.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        }
        let data_dir = &absolute(data_dir)?;
        let run_dir = &absolute(run_dir)?;
        make_root(&data_dir.join("locks"), 0o700, gid)?;
        let locks = [
            lock(&data_dir.join("locks/daemon"))?,
            lock(&run_dir.join("daemon.lock"))?,
        ];

        let db = Db::open(data_dir)?;
        let blobs = BlobStore::open(data_dir)?;
        let bases = Arc::new(BaseStore::open_with(data_dir, blobs.clone(), config.bases())?);
        let kernels = Arc::new(KernelStore::open(data_dir)?);
        for shared in ["bases", "kernels"] {
            make_root(&data_dir.join(shared), 0o710, gid)?;
        }
        // What an earlier daemon did not finish. Nobody else makes anything here: the lock is ours.
        let swept = offshoot_sys::durable::sweep(&data_dir.join("tmp"));
        tracing::debug!(?swept, "swept unpublished work");
        if let Err(error) = blobs.sweep_downloads(KEEP_DOWNLOADS) {
            tracing::warn!(%error, "cannot sweep broken downloads");
        }
        let agent = find_agent(config.agent.as_deref())?;
        let accelerator = accelerator().await;
        tracing::info!(
            kvm = accelerator.probe.explanation,
            "guests run {}",
            match accelerator.accel {
                Accel::Kvm => "on KVM",
                Accel::Tcg => "emulated",
            }
        );
        let qemu: Arc<dyn Driver> = Arc::new(QemuDriver::new(QemuConfig {
            program: config.qemu.clone(),
            files: config.vmm_files.clone(),
            ..QemuConfig::default()
        }));
        let cloud_hypervisor: Arc<dyn Driver> = Arc::new(CloudHypervisorDriver::new(CloudHypervisorConfig {
            files: config.vmm_files.clone(),
            ..CloudHypervisorConfig::at(program(
                config.cloud_hypervisor.as_deref(),
                "OFFSHOOT_CLOUD_HYPERVISOR",
                "cloud-hypervisor",
            ))
        }));
        let firecracker: Arc<dyn Driver> = Arc::new(FirecrackerDriver::new(FirecrackerConfig {
            files: config.vmm_files.clone(),
            ..FirecrackerConfig::at(program(
                config.firecracker.as_deref(),
                "OFFSHOOT_FIRECRACKER",
                "firecracker",
            ))
        }));
        let drivers = [qemu, cloud_hypervisor, firecracker];
        let drivers = BTreeMap::from(drivers.map(|driver| (driver.kind(), driver)));
        for driver in drivers.values() {
            let driver = Arc::clone(driver);
            // It takes a tenth of a second and is kept: the first VM shall not wait for it.
            tokio::spawn(async move {
                match driver.probe().await {
                    Ok(_) => {}
                    Err(ProbeError::Missing { program, .. }) if driver.kind() != "qemu" => {
                        tracing::debug!(vmm = driver.kind(), program = %program.display(), "a VMM is not installed");
                    }
                    Err(error) => tracing::warn!(vmm = driver.kind(), %error, "a VMM cannot be used"),
                }
            });
        }

        let virtiofsd = Arc::new(Virtiofsd::new(VirtiofsdConfig {
            program: config.virtiofsd.clone(),
        }));
        let admission = Arc::new(AdmissionCapability {
            rules: config.admission(),
            data_dir: data_dir.clone(),
            ledger: Arc::default(),
        });
        let networks = Networks::open(
            db.clone(),
            namespace.clone(),
            Arc::new(FreePorts {
                namespace: namespace.clone(),
            }),
            NetworksConfig {
                pool: config.network_pool,
                data_dir: data_dir.clone(),
                tap_pool_size: config.tap_pool_size,
            },
        )
        .await?;
        let zone = LiveZone::new(networks.clone());
        let dns = DnsConfig {
            domain: config.dns_domain.parse()?,
            upstream: config.dns_upstream.clone(),
        };
        let names = Arc::new(DnsServers::new(namespace, dns, Arc::clone(&zone) as _));
        let capabilities: Vec<Arc<dyn Capability>> = vec![
            Arc::clone(&admission) as Arc<dyn Capability>,
            Arc::new(FoldersCapability {
                roots: [data_dir.clone(), run_dir.clone()],
                gid,
            }),
            // Before whatever starts a process.
            Arc::new(LimitsCapability::new(data_dir)),
            Arc::new(RootCapability {
                bases: Arc::clone(&bases),
                virtiofsd: Arc::clone(&virtiofsd),
                db: db.clone(),
            }),
            Arc::new(OverlayCapability {
                bases: Arc::clone(&bases),
            }),
            Arc::new(WorkCapability {
                bases: Arc::clone(&bases),
            }),
            Arc::new(MountsCapability {
                virtiofsd: Arc::clone(&virtiofsd),
                run_dir: run_dir.clone(),
            }),
            Arc::new(NetworkCapability::new(
                networks.clone(),
                config.dns_domain.clone(),
            )),
            Arc::new(FirewallCapability::new(networks.clone(), db.clone(), data_dir)),
            Arc::new(NamesCapability {
                servers: Arc::clone(&names),
                networks: networks.clone(),
            }),
            Arc::new(SshCapability),
            Arc::new(KernelCapability {
                kernels: Arc::clone(&kernels),
                agent: agent.clone(),
                gid,
                db: db.clone(),
            }),
            Arc::new(VmmCapability {
                boots: VmmCapability::boots_at_once(),
                drivers: drivers.clone(),
                accelerator: accelerator.clone(),
                gid,
                run_dir: run_dir.clone(),
            }),
            Arc::new(AgentCapability {
                boot_timeout: config.boot_timeout(),
            }),
            Arc::new(MainProcessCapability),
        ];
        let templates = Arc::new(
            Templates::open(
                data_dir,
                drivers.clone(),
                Arc::clone(&kernels),
                TemplateRules {
                    background: config.background_templates,
                    // Beside those of VMs.
                    uid: config.uid_base + config.uid_count,
                    boot_timeout: config.boot_timeout(),
                },
            )
            .with_context(|| format!("cannot use {}", data_dir.join("templates").display()))?,
        );
        let engine_config = EngineConfig {
            data_dir: data_dir.clone(),
            run_dir: run_dir.clone(),
            uid_base: config.uid_base,
            uid_count: config.uid_count,
            gid,
        };
        let engine = Engine::start(Parts {
            db: db.clone(),
            config: engine_config,
            networks,
            capabilities,
            templates: Some(templates),
        })
        .await?;
        zone.follow(&engine);
        refresh_kernel(&kernels, &agent).await;
        let images = Images::new(db, blobs, bases, engine.clone(), config.clone());
        look_after(engine.clone(), images.clone());
        Ok(Arc::new(Self {
            engine,
            images,
            kernels,
            drivers,
            virtiofsd,
            accelerator,
            admission,
            names,
            agent,
            numbers,
            data_dir: data_dir.clone(),
            run_dir: run_dir.clone(),
            socket: std::path::absolute(socket)?,
            config_file: config_file.map(std::path::absolute).transpose()?,
            warm: WarmImages::new(config.warm_slots.clone()),
            config,
            end: CancellationToken::new(),
            started: (now_ms(), Instant::now()),
            _locks: locks,
        }))
    }
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::fs::canonicalize(path).with_context(|| format!("cannot use {}", path.display()))
}

fn make_root(path: &Path, mode: u32, gid: u32) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .and_then(|()| chown(path, None, Some(gid)))
        .and_then(|()| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)))
        .with_context(|| format!("cannot make {} (is this root?)", path.display()))
}

fn lock(path: &Path) -> anyhow::Result<FileLock> {
    match FileLock::try_exclusive(path).with_context(|| format!("cannot lock {}", path.display()))? {
        Some(lock) => Ok(lock),
        None => bail!(
            "another offshootd uses this directory ({} is locked)",
            path.display()
        ),
    }
}

/// A VMM's program: as configured, as the environment says, or what is installed. Where there is none, where it would be.
fn program(configured: Option<&Path>, variable: &str, name: &str) -> PathBuf {
    configured
        .map(Path::to_owned)
        .or_else(|| {
            std::env::var_os(variable)
                .filter(|path| !path.is_empty())
                .map(PathBuf::from)
        })
        .or_else(|| offshoot_sys::programs::find(name))
        .unwrap_or_else(|| Path::new("/usr/bin").join(name))
}

/// The agent: as configured, beside this program, or where packages put it.
fn find_agent(configured: Option<&Path>) -> anyhow::Result<PathBuf> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("offshoot-agent")));
    let packaged = PathBuf::from("/usr/lib/offshoot/offshoot-agent");
    let places: Vec<PathBuf> = match configured {
        Some(path) => vec![path.to_owned()],
        None => beside.into_iter().chain([packaged]).collect(),
    };
    match places.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => bail!(
            "no offshoot-agent at {}; build it with `make build`, or set `agent` in the config",
            places
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
                .join(" or ")
        ),
    }
}

/// Asks `/dev/kvm` with a short guest loop, so that one that only pretends is treated as absent.
async fn accelerator() -> Accelerator {
    let probe = tokio::task::spawn_blocking(offshoot_sys::kvm::probe)
        .await
        .unwrap_or_else(|panic| {
            std::panic::resume_unwind(panic.into_panic());
        });
    let accel = if probe.native { Accel::Kvm } else { Accel::Tcg };
    let kvm_gid = std::fs::metadata("/dev/kvm").ok().map(|meta| meta.gid());
    Accelerator {
        accel,
        probe,
        kvm_gid,
    }
}

/// Looks every minute whether what should be is so. The first look at the host's own findings comes at once: a start
/// that is doomed is then refused before it makes anything.
fn look_after(engine: Engine, images: Images) {
    tokio::spawn(async move {
        let _ = engine.check().await;
        known_bases::reconcile_or_warn(&images).await;
        let mut minute = tokio::time::interval(LOOK_EVERY);
        minute.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The engine looked when it started.
        minute.tick().await;
        loop {
            minute.tick().await;
            for line in engine.reconcile().await {
                tracing::warn!("{line}");
            }
            known_bases::reconcile_or_warn(&images).await;
        }
    });
}

/// Puts this version's agent into the default bundle when it holds another one. A failure is not the end: the old
/// bundle still boots.
async fn refresh_kernel(kernels: &KernelStore, agent: &Path) {
    let Ok(bundle) = kernels.default() else { return };
    match kernels.refresh(&bundle.id, agent).await {
        Ok(fresh) if fresh.id != bundle.id => {
            let chosen = kernels.set_default(&fresh.id);
            tracing::info!(old = %bundle.id, new = %fresh.id, ?chosen, "put this version's agent into the kernel bundle");
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "cannot put this version's agent into the kernel bundle"),
    }
}
