//! The bundles of a data folder: made, found, refreshed, removed.
//!
//! ```text
//! tmp/kernel-<random>/ ──fsync, rename──► kernels/<id>/ ──rename──► tmp/kernel-<random>/ ──► gone
//! ```
//!
//! One `flock` on `locks/kernels.lock` serialises whoever changes the store; readers take no lock, since a bundle is
//! there whole or not at all.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use offshoot_model::{ErrorKind, Explain, KernelId, Progress};
use offshoot_sys::durable::{self, Published, StagingDir};
use offshoot_sys::lock::FileLock;

use crate::bundle::{self, Agent, BuildError, BundleInput, INITRAMFS, MANIFEST, VMLINUX};
use crate::compile::{self, CompileError, CompileOptions};
use crate::distro::{self, DistroError, DistroOptions};
use crate::manifest::{FORMAT, KernelManifest, KernelSource, MANIFEST_MAX};
use crate::module_tree::read_limited;

/// What is said while somebody else compiles.
const WAITING: &str = "waiting for another kernel that is being compiled";

/// Why something cannot be done with kernel bundles.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No bundle has been added yet.
    #[error("there is no kernel yet")]
    NoKernel,
    /// No bundle has that id.
    #[error("there is no kernel {id}")]
    NotFound {
        /// The id.
        id: KernelId,
    },
    /// A file or folder of the store cannot be used.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was to be done: `read`, `make`, `lock` ...
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A manifest is not JSON of ours.
    #[error("cannot understand {}", path.display())]
    Manifest {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// A bundle of another version of offshoot.
    #[error("kernel {id} has format {found}, this version of offshoot uses format {expected}")]
    Format {
        /// The bundle.
        id: KernelId,
        /// What it has.
        found: u32,
        /// What we use.
        expected: u32,
    },
    /// A bundle's file is not there or has another size.
    #[error("kernel {id} is damaged: its {file} is missing or has another size than its manifest says")]
    Damaged {
        /// The bundle.
        id: KernelId,
        /// The file in it.
        file: &'static str,
    },
    /// The bundle cannot be made.
    #[error("cannot make a kernel bundle")]
    Build {
        /// Why not.
        #[source]
        source: BuildError,
    },
    /// The distribution's kernel cannot be had.
    #[error("cannot get the distribution's kernel")]
    Distro {
        /// Why not.
        #[source]
        source: DistroError,
    },
    /// The kernel cannot be compiled.
    #[error("cannot compile a kernel")]
    Compile {
        /// Why not.
        #[source]
        source: CompileError,
    },
    /// The work was given up because the program ends.
    #[error("making the kernel bundle was interrupted")]
    Interrupted {
        /// What happened to the task.
        #[source]
        source: tokio::task::JoinError,
    },
}

impl Explain for KernelError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoKernel | Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Io { source, .. } => kind_of(source),
            Self::Manifest { .. } | Self::Damaged { .. } => ErrorKind::BadContent,
            Self::Format { .. } => ErrorKind::NotPossible,
            Self::Interrupted { .. } => ErrorKind::Cancelled,
            Self::Build { source } => match source {
                BuildError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                    ErrorKind::NotFound
                }
                BuildError::Read { source, .. } | BuildError::Write { source, .. } => kind_of(source),
                BuildError::Vmlinux { .. } | BuildError::Modules { .. } | BuildError::Agent { .. } => {
                    ErrorKind::BadContent
                }
                BuildError::Initramfs { .. } => ErrorKind::Internal,
            },
            Self::Distro { source } => source.kind(),
            Self::Compile { source } => source.kind(),
        }
    }

    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::NoKernel => "add one with `offshoot kernel add --distro`",
            Self::NotFound { .. } => "`offshoot kernel ls` lists the kernels there are",
            Self::Manifest { .. } | Self::Format { .. } | Self::Damaged { .. } => {
                "remove it and make it again with `offshoot kernel add`"
            }
            Self::Build {
                source: BuildError::Vmlinux { .. },
            } => "give an x86-64 bzImage or ELF, such as /boot/vmlinuz-$(uname -r)",
            Self::Build {
                source: BuildError::Modules { .. },
            } => {
                "give the kernel's own modules with `--modules /lib/modules/RELEASE`, or take the distribution's \
                 kernel with `offshoot kernel add --distro`"
            }
            Self::Build {
                source: BuildError::Agent { .. },
            } => {
                "build the agent with `RUSTFLAGS='-C target-feature=+crt-static' cargo build -p offshoot-agent \
                 --profile agent --target x86_64-unknown-linux-gnu`"
            }
            Self::Compile { source } => return source.hints(),
            Self::Distro { source } => match source {
                DistroError::NoPackage { .. } | DistroError::Tool { .. } => {
                    "run `apt-get update` and try again, or add a kernel of your own with \
                     `offshoot kernel add --vmlinux FILE --modules DIR`"
                }
                DistroError::Spawn { .. } | DistroError::Architecture { .. } => {
                    "`--distro` needs Debian's apt; elsewhere add a kernel of your own with \
                     `offshoot kernel add --vmlinux FILE --modules DIR`"
                }
                DistroError::Name { .. } | DistroError::NoKernel { .. } => {
                    "`apt-cache search '^linux-image-.*-cloud'` lists the packages there are"
                }
                DistroError::Output { .. } | DistroError::Io { .. } => return Vec::new(),
            },
            Self::Io { .. } | Self::Build { .. } | Self::Interrupted { .. } => return Vec::new(),
        };
        vec![hint.to_owned()]
    }
}

fn kind_of(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        _ => ErrorKind::Internal,
    }
}

/// A bundle that is in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelBundle {
    /// Its id: a hash over its files.
    pub id: KernelId,
    /// Its folder.
    pub dir: PathBuf,
    /// What it is.
    pub manifest: KernelManifest,
}

/// What takes the place of a bundle.
#[derive(Debug)]
pub struct FoundBundle {
    /// The id that its folder has.
    pub id: KernelId,
    /// The bundle, or why it cannot be used.
    pub bundle: Result<KernelBundle, KernelError>,
}

impl KernelBundle {
    /// The kernel, an ELF file.
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join(VMLINUX)
    }

    /// The initramfs, an uncompressed cpio archive.
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join(INITRAMFS)
    }
}

/// The kernel bundles of one data folder. Cheap to clone; any number may be open on one folder.
#[derive(Clone, Debug)]
pub struct KernelStore {
    kernels: PathBuf,
    tmp: PathBuf,
    lock: PathBuf,
    /// Held while a kernel is compiled: minutes, in which kernels can be added and removed all the same.
    compile_lock: PathBuf,
    /// The same within this process, so that those who wait can go away at once.
    compiling: Arc<tokio::sync::Mutex<()>>,
}

impl KernelStore {
    /// Uses `data_dir`, making the folders it needs.
    pub fn open(data_dir: &Path) -> Result<Self, KernelError> {
        let locks = data_dir.join("locks");
        let store = Self {
            kernels: data_dir.join("kernels"),
            tmp: data_dir.join("tmp"),
            lock: locks.join("kernels.lock"),
            compile_lock: locks.join("kernel-compile.lock"),
            compiling: Arc::default(),
        };
        for dir in [&store.kernels, &store.tmp, &locks] {
            std::fs::create_dir_all(dir).map_err(failed("make", dir))?;
        }
        Ok(store)
    }

    /// Every usable bundle, the newest first. A damaged one is left out with a warning in the log.
    pub fn list(&self) -> Result<Vec<KernelBundle>, KernelError> {
        let mut bundles = Vec::new();
        for FoundBundle { id, bundle } in self.all()? {
            match bundle {
                Ok(bundle) => bundles.push(bundle),
                Err(error) => {
                    tracing::warn!(%id, error = &error as &dyn std::error::Error, "unusable kernel bundle");
                }
            }
        }
        bundles.sort_by(|a, b| {
            b.manifest
                .created_unix_ms
                .cmp(&a.manifest.created_unix_ms)
                .then_with(|| a.id.cmp(&b.id))
        });
        Ok(bundles)
    }

    /// Everything that takes the place of a bundle, in no order, and of what is unusable why.
    pub fn all(&self) -> Result<Vec<FoundBundle>, KernelError> {
        let failed = failed("read", &self.kernels);
        let mut bundles = Vec::new();
        for entry in std::fs::read_dir(&self.kernels).map_err(&failed)? {
            let name = entry.map_err(&failed)?.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<KernelId>().ok()) else {
                continue;
            };
            match self.get(&id) {
                // Removed since the folder was read.
                Err(KernelError::NotFound { .. }) => {}
                bundle => bundles.push(FoundBundle { id, bundle }),
            }
        }
        Ok(bundles)
    }

    /// Whether `bundle` has the agent at `agent`, byte for byte. Reads that file, and blocks for as long.
    pub fn has_agent(bundle: &KernelBundle, agent: &Path) -> Result<bool, KernelError> {
        let agent = Agent::read(agent).map_err(|source| KernelError::Build { source })?;
        Ok(bundle.manifest.agent == agent.info)
    }

    /// The bundle `id`. Looks at the files' sizes, not at their content.
    pub fn get(&self, id: &KernelId) -> Result<KernelBundle, KernelError> {
        let dir = self.kernels.join(id.as_str());
        let path = dir.join(MANIFEST);
        let bytes = match read_limited(&path, MANIFEST_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                return Err(KernelError::NotFound { id: id.clone() });
            }
            Err(source) => {
                return Err(KernelError::Io {
                    action: "read",
                    path,
                    source,
                });
            }
        };
        // The version first: another version may have other fields.
        #[derive(serde::Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version = parse(&path, &bytes)?;
        if version.format != FORMAT {
            return Err(KernelError::Format {
                id: id.clone(),
                found: version.format,
                expected: FORMAT,
            });
        }
        let bundle = KernelBundle {
            id: id.clone(),
            manifest: parse(&path, &bytes)?,
            dir,
        };
        let manifest = &bundle.manifest;
        for (file, info) in [(VMLINUX, manifest.vmlinux), (INITRAMFS, manifest.initramfs)] {
            let size = std::fs::symlink_metadata(bundle.dir.join(file))
                .map(|metadata| metadata.len())
                .ok();
            if size != Some(info.size.bytes()) {
                return Err(KernelError::Damaged { id: id.clone(), file });
            }
        }
        Ok(bundle)
    }

    /// The bundle that new VMs get: the one added last, also if it was there before, or the newest one when that is
    /// gone.
    pub fn default(&self) -> Result<KernelBundle, KernelError> {
        if let Some(id) = self.chosen()? {
            match self.get(&id) {
                Err(KernelError::NotFound { .. }) => {}
                found => return found,
            }
        }
        self.list()?.into_iter().next().ok_or(KernelError::NoKernel)
    }

    /// Makes `id` the default.
    pub fn set_default(&self, id: &KernelId) -> Result<(), KernelError> {
        self.get(id)?;
        let path = self.choice();
        durable::write_file(&path, format!("{id}\n").as_bytes()).map_err(failed("write", &path))
    }

    /// Removes the bundle `id`, damaged or not. Whether somebody uses it is the caller's concern.
    pub fn remove(&self, id: &KernelId) -> Result<(), KernelError> {
        let lock = FileLock::exclusive(&self.lock).map_err(failed("lock", &self.lock))?;
        self.remove_locked(id, &lock)
    }

    /// As [`remove`](Self::remove), but leaves the default alone, also one that becomes the default just now. Says whether
    /// the bundle went.
    pub fn remove_unless_default(&self, id: &KernelId) -> Result<bool, KernelError> {
        // A bundle that is being added is published and made the default under this lock.
        let lock = FileLock::exclusive(&self.lock).map_err(failed("lock", &self.lock))?;
        if self.default()?.id == *id {
            return Ok(false);
        }
        self.remove_locked(id, &lock).map(|()| true)
    }

    fn remove_locked(&self, id: &KernelId, _lock: &FileLock) -> Result<(), KernelError> {
        let dir = self.kernels.join(id.as_str());
        let grave = self.staging()?;
        match std::fs::rename(&dir, grave.path().join("bundle")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(KernelError::NotFound { id: id.clone() })
            }
            moved => {
                moved.map_err(failed("remove", &dir))?;
                durable::fsync_dir(&self.kernels).map_err(failed("sync", &self.kernels))
            }
        }
    }

    /// Adds the distribution's kernel and makes it the default.
    ///
    /// Needs apt, and the network unless this very package is there already: then only the agent is replaced, where it
    /// changed. Dropping the future kills the running tool and leaves nothing.
    pub async fn add_distro(
        &self,
        agent: &Path,
        options: &DistroOptions,
        progress: &Progress,
    ) -> Result<KernelBundle, KernelError> {
        let distro_failed = |source| KernelError::Distro { source };
        let agent = read_agent(agent).await?;
        let package = distro::find(options).await.map_err(distro_failed)?;
        let source = KernelSource::Debian {
            package: package.name.clone(),
            version: package.version.clone(),
        };
        let lock = self.lock(progress).await?;
        if let Some(there) = self
            .list()?
            .into_iter()
            .find(|bundle| bundle.manifest.source == source)
        {
            return self
                .in_background(move |store| store.refresh_locked(&there, &agent, true, &lock))
                .await;
        }
        let work = self.staging()?;
        let (tree, kernel) = distro::fetch(&package, work.path(), progress)
            .await
            .map_err(distro_failed)?;
        let input = BundleInput {
            kernel,
            modules: Some(tree),
            source,
        };
        let progress = progress.clone();
        self.in_background(move |store| {
            let bundle = store.build_locked(&input, &agent, true, &progress, &lock);
            drop(work);
            bundle
        })
        .await
    }

    /// Compiles a kernel for guests, and adds it. It becomes the default only where there is no other kernel.
    ///
    /// Needs a compiler, and apt and the network unless the source is given. One that was made of the same source and
    /// configuration with the same compiler is not compiled again: only the agent is replaced, where it changed. One
    /// kernel is compiled at a time; who asks for the same meanwhile gets that one. Dropping the future kills the
    /// compilers and leaves nothing.
    pub async fn compile(
        &self,
        agent: &Path,
        options: &CompileOptions,
        progress: &Progress,
    ) -> Result<KernelBundle, KernelError> {
        let compile_failed = |source| KernelError::Compile { source };
        let agent = read_agent(agent).await?;
        let plan = compile::plan(options).await.map_err(compile_failed)?;
        let (_turn, _file) = self.turn_to_compile(progress).await?;
        let same = |bundle: &KernelBundle| bundle.manifest.source == plan.source;
        if let Some(there) = self.list()?.into_iter().find(same) {
            progress.message(format!("kernel {} was compiled of the same before", there.id));
            let lock = self.lock(progress).await?;
            return self
                .in_background(move |store| store.refresh_locked(&there, &agent, false, &lock))
                .await;
        }
        let (work, kernel) = compile::compile(&plan, options, self.staging()?, progress)
            .await
            .map_err(compile_failed)?;
        let input = BundleInput {
            kernel,
            modules: None,
            source: plan.source,
        };
        let lock = self.lock(progress).await?;
        let progress = progress.clone();
        self.in_background(move |store| {
            let is_first = matches!(store.default(), Err(KernelError::NoKernel));
            let bundle = store.build_locked(&input, &agent, is_first, &progress, &lock);
            drop(work);
            bundle
        })
        .await
    }

    /// Waits until nobody else compiles. What it gives is held meanwhile.
    async fn turn_to_compile(
        &self,
        progress: &Progress,
    ) -> Result<(tokio::sync::OwnedMutexGuard<()>, FileLock), KernelError> {
        let turn = Arc::clone(&self.compiling);
        let turn = match Arc::clone(&turn).try_lock_owned() {
            Ok(turn) => turn,
            Err(_) => {
                progress.message(WAITING);
                turn.lock_owned().await
            }
        };
        let lock_failed = failed("lock", &self.compile_lock);
        if let Some(lock) = FileLock::try_exclusive(&self.compile_lock).map_err(&lock_failed)? {
            return Ok((turn, lock));
        }
        progress.message(WAITING);
        let lock = self
            .in_background(|store| {
                FileLock::exclusive(&store.compile_lock).map_err(failed("lock", &store.compile_lock))
            })
            .await?;
        Ok((turn, lock))
    }

    /// Adds the user's own kernel, an ELF or a bzImage, and makes it the default.
    ///
    /// `modules` is a `/lib/modules/<release>` or a folder that has it below; without it everything a guest needs must
    /// be built in.
    pub async fn add_files(
        &self,
        vmlinux: &Path,
        modules: Option<&Path>,
        agent: &Path,
        progress: &Progress,
    ) -> Result<KernelBundle, KernelError> {
        let agent = read_agent(agent).await?;
        let input = BundleInput {
            kernel: vmlinux.to_owned(),
            modules: modules.map(Path::to_owned),
            source: KernelSource::Files,
        };
        let lock = self.lock(progress).await?;
        let progress = progress.clone();
        self.in_background(move |store| store.build_locked(&input, &agent, true, &progress, &lock))
            .await
    }

    /// Gives the bundle `id` with `agent` in it: `id` itself where it has that agent, else a new bundle beside it, which
    /// becomes the default where `id` was. Needs no network, since the modules are taken out of the old initramfs.
    ///
    /// The old bundle stays for the VMs that use it.
    pub async fn refresh(&self, id: &KernelId, agent: &Path) -> Result<KernelBundle, KernelError> {
        let agent = read_agent(agent).await?;
        let bundle = self.get(id)?;
        if bundle.manifest.agent == agent.info {
            return Ok(bundle);
        }
        let lock = self.lock(&Progress::silent()).await?;
        self.in_background(move |store| {
            let make_default = store.default()?.id == bundle.id;
            store.refresh_locked(&bundle, &agent, make_default, &lock)
        })
        .await
    }

    fn refresh_locked(
        &self,
        bundle: &KernelBundle,
        agent: &Agent,
        make_default: bool,
        lock: &FileLock,
    ) -> Result<KernelBundle, KernelError> {
        let fresh = if bundle.manifest.agent == agent.info {
            bundle.clone()
        } else {
            let staging = self.staging()?;
            let manifest = bundle::rebuild(&bundle.manifest, &bundle.dir, agent, staging.path(), now_ms())
                .map_err(|source| KernelError::Build { source })?;
            self.publish(staging, &manifest, lock)?
        };
        if make_default {
            self.set_default(&fresh.id)?;
        }
        Ok(fresh)
    }

    fn build_locked(
        &self,
        input: &BundleInput,
        agent: &Agent,
        make_default: bool,
        progress: &Progress,
        lock: &FileLock,
    ) -> Result<KernelBundle, KernelError> {
        let staging = self.staging()?;
        let manifest = bundle::build(input, agent, staging.path(), now_ms(), progress)
            .map_err(|source| KernelError::Build { source })?;
        let bundle = self.publish(staging, &manifest, lock)?;
        if make_default {
            self.set_default(&bundle.id)?;
        }
        Ok(bundle)
    }

    /// Publishes a finished bundle; one with the same content that is there already stays.
    fn publish(
        &self,
        staging: StagingDir,
        manifest: &KernelManifest,
        _lock: &FileLock,
    ) -> Result<KernelBundle, KernelError> {
        let id = bundle::id(manifest);
        let place = self.kernels.join(id.as_str());
        // Staging folders are private; a VMM that runs as another user reads the kernel.
        std::fs::set_permissions(staging.path(), std::fs::Permissions::from_mode(0o755))
            .map_err(failed("open up", staging.path()))?;
        let published = match self.get(&id) {
            // What stands there is damaged, or there is nothing.
            Err(_) => staging.publish_replacing(&place).map(|()| Published::New),
            Ok(_) => Ok(Published::AlreadyThere),
        };
        published.map_err(failed("publish", &place))?;
        self.get(&id)
    }

    /// The bundle that was made the default last.
    fn chosen(&self) -> Result<Option<KernelId>, KernelError> {
        let path = self.choice();
        match read_limited(&path, 2 * KernelId::LEN as u64) {
            // What somebody else wrote there chooses nothing.
            Ok(bytes) => Ok(str::from_utf8(&bytes)
                .ok()
                .and_then(|text| text.trim_end().parse().ok())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(KernelError::Io {
                action: "read",
                path,
                source,
            }),
        }
    }

    fn choice(&self) -> PathBuf {
        self.kernels.join("default")
    }

    fn staging(&self) -> Result<StagingDir, KernelError> {
        StagingDir::new(&self.tmp, "kernel").map_err(failed("make a folder in", &self.tmp))
    }

    async fn lock(&self, progress: &Progress) -> Result<FileLock, KernelError> {
        let lock_failed = failed("lock", &self.lock);
        if let Some(lock) = FileLock::try_exclusive(&self.lock).map_err(&lock_failed)? {
            return Ok(lock);
        }
        progress.message("waiting for another change of the kernels");
        self.in_background(|store| FileLock::exclusive(&store.lock).map_err(failed("lock", &store.lock)))
            .await
    }

    /// Runs blocking work on a thread for that. It goes on when the future is dropped, and leaves a whole bundle or none.
    async fn in_background<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, KernelError> + Send + 'static,
    ) -> Result<T, KernelError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || work(&store))
            .await
            .map_err(|source| KernelError::Interrupted { source })?
    }
}

async fn read_agent(path: &Path) -> Result<Agent, KernelError> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || Agent::read(&path))
        .await
        .map_err(|source| KernelError::Interrupted { source })?
        .map_err(|source| KernelError::Build { source })
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> KernelError + use<> {
    let path = path.to_owned();
    move |source| KernelError::Io {
        action,
        path: path.clone(),
        source,
    }
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, KernelError> {
    serde_json::from_slice(bytes).map_err(|source| KernelError::Manifest {
        path: path.to_owned(),
        source,
    })
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::tests::agent;
    use crate::decompress::tests::zstd;
    use crate::initramfs::tests::read_back;
    use crate::manifest::BuiltinKnowledge;
    use crate::module_tree::tests::write_tree;
    use crate::vmlinux::tests::{BANNER, bzimage, elf};

    struct Fixture {
        dir: tempfile::TempDir,
        store: KernelStore,
    }

    const BUILTIN: &str =
        "kernel/virtio_pci.ko\nkernel/virtio_console.ko\nkernel/ext4.ko\nkernel/virtio_blk.ko\n";

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let modules = [
                ("erofs.ko.xz", "depends=netfs\nvermagic=6.12.1-test SMP"),
                ("netfs.ko", ""),
                ("overlay.ko", ""),
            ];
            write_tree(
                &dir.path().join("lib/modules/6.12.1-test"),
                &modules,
                Some(BUILTIN),
            );
            std::fs::write(dir.path().join("agent"), agent(b"one")).unwrap();
            std::fs::write(dir.path().join("agent2"), agent(b"two")).unwrap();
            let store = KernelStore::open(&dir.path().join("data")).unwrap();
            let fixture = Self { dir, store };
            fixture.kernel("vmlinuz", b"");
            fixture
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn kernel(&self, name: &str, tail: &[u8]) {
            let elf = elf(object::elf::EM_X86_64.0, 18, &[BANNER, tail].concat());
            std::fs::write(self.path(name), bzimage(&zstd(&elf), Some("6.12.1-test (x)"))).unwrap();
        }

        async fn add(&self, kernel: &str, agent: &str) -> Result<KernelBundle, KernelError> {
            let root = self.dir.path();
            self.store
                .add_files(
                    &self.path(kernel),
                    Some(root),
                    &self.path(agent),
                    &Progress::silent(),
                )
                .await
        }

        fn left_in_tmp(&self) -> usize {
            std::fs::read_dir(self.path("data/tmp")).unwrap().count()
        }
    }

    #[tokio::test]
    async fn what_is_unusable_is_told_apart() {
        let fixture = Fixture::new();
        let good = fixture.add("vmlinuz", "agent").await.unwrap();
        assert!(KernelStore::has_agent(&good, &fixture.path("agent")).unwrap());
        assert!(!KernelStore::has_agent(&good, &fixture.path("agent2")).unwrap());
        assert!(KernelStore::has_agent(&good, &fixture.path("none")).is_err());
        let bad = fixture
            .store
            .refresh(&good.id, &fixture.path("agent2"))
            .await
            .unwrap();
        std::fs::remove_file(bad.vmlinux()).unwrap();
        let all = fixture.store.all().unwrap();
        assert_eq!(all.len(), 2);
        for FoundBundle { id, bundle } in all {
            assert_eq!(bundle.is_ok(), id == good.id, "{bundle:?}");
        }
        assert_eq!(fixture.store.list().unwrap(), [good]);
    }

    #[tokio::test]
    async fn the_same_content_is_the_same_bundle() {
        let fixture = Fixture::new();
        let bundle = fixture.add("vmlinuz", "agent").await.unwrap();
        assert_eq!(fixture.add("vmlinuz", "agent").await.unwrap(), bundle);
        assert_eq!(fixture.store.list().unwrap(), std::slice::from_ref(&bundle));
        let manifest = &bundle.manifest;
        assert_eq!(manifest.release, "6.12.1-test");
        assert_eq!(manifest.modules, ["netfs", "erofs", "overlay"]);
        assert_eq!(manifest.builtin, BuiltinKnowledge::Listed);
        assert!(
            manifest.features.block
                && manifest.features.pvh
                && manifest.features.pci
                && !manifest.features.net
        );
        assert!(std::fs::read(bundle.vmlinux()).unwrap().starts_with(b"\x7fELF"));
        let init = agent(b"one");
        assert!(
            read_back(&std::fs::read(bundle.initramfs()).unwrap())
                .iter()
                .any(|f| f.0 == "init" && f.2 == init)
        );
        assert_eq!(
            std::fs::metadata(&bundle.dir).unwrap().permissions().mode() & 0o777,
            0o755
        );
        assert_eq!(fixture.left_in_tmp(), 0);
    }

    #[tokio::test]
    async fn the_default_is_what_was_added_last_and_survives() {
        let fixture = Fixture::new();
        assert!(matches!(fixture.store.default(), Err(KernelError::NoKernel)));
        let first = fixture.add("vmlinuz", "agent").await.unwrap();
        fixture.kernel("other", b"other");
        let second = fixture.add("other", "agent").await.unwrap();
        assert_ne!(first.id, second.id);
        let reopened = KernelStore::open(&fixture.path("data")).unwrap();
        assert_eq!(reopened.default().unwrap(), second);
        fixture.add("vmlinuz", "agent").await.unwrap();
        assert_eq!(reopened.default().unwrap(), first);
        reopened.set_default(&second.id).unwrap();
        assert_eq!(fixture.store.default().unwrap(), second);
        assert!(!fixture.store.remove_unless_default(&second.id).unwrap());
        assert_eq!(fixture.store.default().unwrap(), second);
        fixture.store.remove(&second.id).unwrap();
        assert_eq!(fixture.store.default().unwrap(), first);
        let third = fixture.add("other", "agent").await.unwrap();
        fixture.store.set_default(&first.id).unwrap();
        assert!(fixture.store.remove_unless_default(&third.id).unwrap());
        assert_eq!(fixture.store.list().unwrap(), std::slice::from_ref(&first));
        std::fs::write(fixture.path("data/kernels/default"), "nonsense").unwrap();
        assert_eq!(fixture.store.default().unwrap(), first);
        assert!(matches!(
            fixture.store.remove(&second.id),
            Err(KernelError::NotFound { .. })
        ));
        assert!(matches!(
            fixture.store.set_default(&second.id),
            Err(KernelError::NotFound { .. })
        ));
        assert_eq!(fixture.left_in_tmp(), 0);
    }

    #[tokio::test]
    async fn a_new_agent_makes_a_new_bundle_without_the_sources() {
        let fixture = Fixture::new();
        let old = fixture.add("vmlinuz", "agent").await.unwrap();
        let made = fixture.add("vmlinuz", "agent2").await.unwrap();
        fixture.store.remove(&made.id).unwrap();
        fixture.store.set_default(&old.id).unwrap();
        std::fs::remove_dir_all(fixture.path("lib")).unwrap();
        std::fs::remove_file(fixture.path("vmlinuz")).unwrap();
        assert_eq!(
            fixture
                .store
                .refresh(&old.id, &fixture.path("agent"))
                .await
                .unwrap(),
            old
        );
        let fresh = fixture
            .store
            .refresh(&old.id, &fixture.path("agent2"))
            .await
            .unwrap();
        assert_eq!(fresh.id, made.id);
        assert_eq!(
            std::fs::read(fresh.vmlinux()).unwrap(),
            std::fs::read(old.vmlinux()).unwrap()
        );
        assert_eq!(fixture.store.default().unwrap(), fresh);
        assert_eq!(fixture.store.list().unwrap().len(), 2);
        fixture.store.remove(&old.id).unwrap();
        assert_eq!(fixture.store.get(&fresh.id).unwrap(), fresh);
        assert!(fresh.vmlinux().exists());
    }

    #[tokio::test]
    async fn damage_is_noticed_and_mended_by_adding_again() {
        let fixture = Fixture::new();
        let bundle = fixture.add("vmlinuz", "agent").await.unwrap();
        std::fs::write(bundle.initramfs(), "short").unwrap();
        assert!(matches!(
            fixture.store.get(&bundle.id),
            Err(KernelError::Damaged {
                file: "initramfs",
                ..
            })
        ));
        assert_eq!(fixture.store.list().unwrap(), []);
        let mended = fixture.add("vmlinuz", "agent").await.unwrap();
        assert_eq!(mended.id, bundle.id);
        let path = bundle.dir.join(MANIFEST);
        std::fs::write(&path, r#"{"format": 99}"#).unwrap();
        assert!(matches!(
            fixture.store.get(&bundle.id),
            Err(KernelError::Format { found: 99, .. })
        ));
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(
            fixture.store.get(&bundle.id),
            Err(KernelError::Manifest { .. })
        ));
        std::fs::write(&path, vec![b' '; MANIFEST_MAX as usize + 1]).unwrap();
        assert!(matches!(
            fixture.store.get(&bundle.id),
            Err(KernelError::Io { .. })
        ));
        fixture.store.remove(&bundle.id).unwrap();
        assert_eq!(fixture.left_in_tmp(), 0);
    }

    #[tokio::test]
    async fn what_cannot_be_used_says_why_and_leaves_nothing() {
        let fixture = Fixture::new();
        std::fs::write(fixture.path("text"), "text").unwrap();
        let check = async |kernel: &str, agent: &str, expected: &str, kind: ErrorKind| {
            let error = fixture.add(kernel, agent).await.unwrap_err();
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(error) = source {
                text = format!("{text}: {error}");
                source = error.source();
            }
            assert_eq!(
                text.replace(&fixture.path("").display().to_string(), "/"),
                expected
            );
            assert_eq!(error.kind(), kind);
        };
        let prefix = "cannot make a kernel bundle:";
        let bad = ErrorKind::BadContent;
        check(
            "text",
            "agent",
            &format!("{prefix} cannot use /text as a kernel: it is neither an ELF vmlinux nor a bzImage"),
            bad,
        )
        .await;
        check(
            "vmlinuz",
            "text",
            &format!("{prefix} cannot use /text as the agent: it is not an x86-64 program"),
            bad,
        )
        .await;
        check(
            "none",
            "agent",
            &format!("{prefix} cannot read /none: No such file or directory (os error 2)"),
            ErrorKind::NotFound,
        )
        .await;
        std::fs::write(fixture.path("lib/modules/6.12.1-test/modules.builtin"), "x.ko").unwrap();
        check(
            "vmlinuz",
            "agent",
            &format!(
                "{prefix} cannot choose modules for Linux 6.12.1-test: \
                 the kernel has no `virtio_blk`, neither built in nor as a module"
            ),
            bad,
        )
        .await;
        assert!(matches!(fixture.store.default(), Err(KernelError::NoKernel)));
        assert_eq!(fixture.left_in_tmp(), 0);
    }

    #[tokio::test]
    async fn two_at_once_make_one() {
        let fixture = Fixture::new();
        let (one, two) = tokio::join!(fixture.add("vmlinuz", "agent"), fixture.add("vmlinuz", "agent"));
        assert_eq!(one.unwrap(), two.unwrap());
        assert_eq!(fixture.store.list().unwrap().len(), 1);
        assert_eq!(fixture.left_in_tmp(), 0);
    }
}
