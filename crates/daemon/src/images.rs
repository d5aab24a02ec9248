//! Images as the daemon keeps them: names in the database, blobs, bases, and who still needs what.

use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use offshoot_api::image::{
    BaseSummary, BootstrapRequest, ImageDetails, ImageSummary, LayerSummary, PullRequest,
    RegistryCredentials, SeedState, SeedSummary,
};
use offshoot_api::prune::PruneQuery;
use offshoot_engine::engine::Engine;
use offshoot_engine::operation::{Stages, Subject};
use offshoot_image::archive::{self, ImportOptions};
use offshoot_image::bootstrap::{self, BootstrapOptions};
use offshoot_image::manifest::StoredImage;
use offshoot_image::reference::ImageReference;
use offshoot_image::registry::{self, PullOptions, RegistryAuth};
use offshoot_model::{BaseId, ByteSize, Digest, ErrorKind, Progress};
use offshoot_rootfs::base::{BaseStore, SeedInfo, base_id};
use offshoot_rootfs::policy::RootKind;
use offshoot_store::blobs::BlobStore;
use offshoot_store::db::{Db, ImageRow};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use crate::bases;
use crate::blocking::blocking;
use crate::config::DaemonConfig;
use crate::error::{Answer, Failure, chain};
use crate::known_bases;
use crate::prune::Rules;
use crate::sweep;
use crate::time::now_ms;

/// How often a prune looks whether it is alone: a create holds its lease for some milliseconds.
const ALONE_POLL: Duration = Duration::from_millis(5);

/// All images. Cheap to clone.
#[derive(Clone)]
pub struct Images {
    pub(crate) db: Db,
    pub(crate) blobs: BlobStore,
    pub(crate) bases: Arc<BaseStore>,
    pub(crate) engine: Engine,
    config: Arc<DaemonConfig>,
    /// Held for reading by whatever makes blobs and bases that no row speaks of yet, for writing by the sweep.
    in_use: Arc<RwLock<()>>,
}

/// An image that a VM can be made from.
pub struct ReadyImage {
    /// The image.
    pub image: StoredImage,
    /// Its base.
    pub base: BaseId,
    /// The length of its root.
    pub root_size: ByteSize,
    /// Keeps the sweep away until the VM's row is written.
    pub lease: OwnedRwLockReadGuard<()>,
}

impl Images {
    /// All images of one data directory.
    pub fn new(
        db: Db,
        blobs: BlobStore,
        bases: Arc<BaseStore>,
        engine: Engine,
        config: DaemonConfig,
    ) -> Self {
        Self {
            db,
            blobs,
            bases,
            engine,
            config: Arc::new(config),
            in_use: Arc::default(),
        }
    }

    /// Every name, newest first.
    pub async fn list(&self) -> Answer<Vec<ImageSummary>> {
        let rows = self.db.call(Db::images).await?;
        let this = self.clone();
        blocking("listing images", move || {
            Ok(rows.iter().map(|row| this.summary(row)).collect())
        })
        .await
    }

    /// What `list` says of one image; nothing where there is none.
    pub async fn find(&self, reference: &str) -> Answer<Option<ImageSummary>> {
        match self.row(reference).await {
            Ok(row) => self.summarised(row).await.map(Some),
            Err(Failure(error)) if error.kind == ErrorKind::NotFound => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Everything about one image.
    pub async fn inspect(&self, reference: &str) -> Answer<ImageDetails> {
        let row = self.row(reference).await?;
        let this = self.clone();
        blocking("looking at an image", move || this.details(&row)).await
    }

    fn details(&self, row: &ImageRow) -> Answer<ImageDetails> {
        let image = StoredImage::load(&self.blobs, &row.digest)?;
        let base = self.bases.of_image(&image.digest).ok().map(|base| {
            let (disk_bytes, parts) = bases::measure(&base.dir);
            let seed = |info: Option<SeedInfo>| {
                info.map(|info| SeedSummary {
                    size: info.size.bytes(),
                    writer: info.writer,
                })
            };
            BaseSummary {
                id: base.id.to_string(),
                disk_bytes,
                parts,
                format: base.manifest.format,
                overlay_seed: seed(base.manifest.overlay_seed),
                work_seed: seed(base.manifest.work_seed),
            }
        });
        Ok(ImageDetails {
            summary: self.summary(row),
            config: image.config.clone(),
            architecture: image.architecture.clone(),
            os: image.os.clone(),
            layers: image
                .layers
                .iter()
                .map(|layer| LayerSummary {
                    digest: layer.digest,
                    diff_id: layer.diff_id,
                    size: layer.size,
                })
                .collect(),
            base,
        })
    }

    /// Fetches an image from its registry.
    pub async fn pull(
        &self,
        reference: ImageReference,
        request: PullRequest,
        progress: &Progress,
    ) -> Answer<ImageSummary> {
        let mut stages = self.begin("pull", &reference);
        let result = self.try_pull(&mut stages, reference, request, progress).await;
        self.settled(result).await
    }

    async fn try_pull(
        &self,
        stages: &mut Stages,
        reference: ImageReference,
        request: PullRequest,
        progress: &Progress,
    ) -> Answer<ImageSummary> {
        let lease = self.lease().await;
        let options = PullOptions {
            platform: request.platform,
            auth: match request.auth {
                None => RegistryAuth::Anonymous,
                Some(RegistryCredentials::Basic { username, password }) => RegistryAuth::Basic {
                    user: username,
                    password,
                },
                Some(RegistryCredentials::Bearer { token }) => RegistryAuth::Bearer(token),
            },
            plain_http: self.config.insecure_registries.clone(),
        };
        let (blobs, name) = (&self.blobs, &reference.to_string());
        let digest = stages
            .stage_with_tasks("fetch", progress, |progress| async move {
                registry::pull(blobs, name, &options, &progress).await
            })
            .await?;
        self.keep(stages, &reference, digest, request.prepare, progress, lease)
            .await
    }

    /// Makes an image from the distribution's own packages.
    pub async fn bootstrap(
        &self,
        reference: ImageReference,
        request: BootstrapRequest,
        progress: &Progress,
    ) -> Answer<ImageSummary> {
        let mut stages = self.begin("bootstrap", &reference);
        let result = self
            .try_bootstrap(&mut stages, reference, request, progress)
            .await;
        self.settled(result).await
    }

    async fn try_bootstrap(
        &self,
        stages: &mut Stages,
        reference: ImageReference,
        request: BootstrapRequest,
        progress: &Progress,
    ) -> Answer<ImageSummary> {
        let lease = self.lease().await;
        let options = BootstrapOptions {
            suite: request.recipe,
            include: request.include,
            mirror: request.mirror,
            ..BootstrapOptions::default()
        };
        let blobs = &self.blobs;
        let digest = stages
            .stage_with_tasks("packages", progress, |progress| async move {
                bootstrap::bootstrap(blobs, &options, &progress).await
            })
            .await?;
        self.keep(stages, &reference, digest, request.prepare, progress, lease)
            .await
    }

    /// Takes an archive in.
    pub async fn import(
        &self,
        source: impl Read + Send + 'static,
        name: Option<ImageReference>,
        prepare: bool,
        progress: &Progress,
    ) -> Answer<Vec<ImageSummary>> {
        let subject = name.as_ref().map_or_else(String::new, short_name);
        let mut stages = self.engine.operations().begin("import", Subject::named(subject));
        let result = self
            .try_import(&mut stages, source, name, prepare, progress)
            .await;
        self.settled(result).await
    }

    async fn try_import(
        &self,
        stages: &mut Stages,
        source: impl Read + Send + 'static,
        name: Option<ImageReference>,
        prepare: bool,
        progress: &Progress,
    ) -> Answer<Vec<ImageSummary>> {
        let lease = self.lease().await;
        let options = ImportOptions {
            reference: name.as_ref().map(ToString::to_string),
            limit: self.config.import_limit(),
            ..ImportOptions::default()
        };
        let blobs = self.blobs.clone();
        let imported = stages
            .stage_with_tasks("archive", progress, |progress| {
                blocking("the import", move || {
                    Ok(archive::import(&blobs, source, &options, &progress)?)
                })
            })
            .await?;
        let mut kept = Vec::new();
        for image in imported {
            let Some(name) = image.reference else {
                return Err(
                    Failure::new(ErrorKind::InvalidRequest, "the archive does not name its image")
                        .hint("give it one with `offshoot image import --name REF`"),
                );
            };
            let reference: ImageReference = name.parse()?;
            stages.set_subject(Subject::named(short_name(&reference)));
            let lease = self.lease().await;
            kept.push(
                self.keep(stages, &reference, image.digest, prepare, progress, lease)
                    .await?,
            );
        }
        drop(lease);
        self.sweep_if_idle().await;
        Ok(kept)
    }

    /// Makes the base of an image now; with `force` also when there is one, which it then replaces. One of an earlier version
    /// stays beside it as long as VMs have it.
    pub async fn prepare(&self, reference: &str, force: bool, progress: &Progress) -> Answer<ImageSummary> {
        let row = self.row(reference).await?;
        let subject = Subject::named(short(&row.reference));
        let mut stages = self.engine.operations().begin("prepare", subject);
        let lease = self.lease().await;
        let image = self.load(row.digest).await?;
        if force {
            self.refuse_if_tree_is_served(&base_id(&image.digest))?;
        }
        let (bases, image) = (&self.bases, &image);
        stages
            .stage_with_tasks("base", progress, |progress| async move {
                if force {
                    bases.rebuild(image, &progress).await
                } else {
                    bases.ensure_current(image, &progress).await
                }
            })
            .await?;
        drop(lease);
        self.sweep_if_idle().await;
        self.summarised(row).await
    }

    /// A base that is made again loses its tree, which a virtiofsd may be serving.
    fn refuse_if_tree_is_served(&self, base: &BaseId) -> Answer<()> {
        let vms = self.engine.list();
        let user = vms.iter().map(|handle| handle.view.borrow().clone()).find(|vm| {
            vm.base_id == *base
                && vm.life.state.has_vmm()
                && vm.definition.root.chosen == RootKind::Virtiofs.as_str()
        });
        match user {
            None => Ok(()),
            Some(vm) => Err(Failure::new(
                ErrorKind::Conflict,
                format!(
                    "the base is the root of the running VM `{}`, file by file",
                    vm.name
                ),
            )
            .hint(format!("stop it first with `offshoot stop {}`", vm.name))),
        }
    }

    /// The image and its base, made now when it is not there yet.
    pub async fn ready(&self, reference: &str, progress: &Progress) -> Answer<ReadyImage> {
        let row = self.row(reference).await?;
        let lease = self.lease().await;
        let image = self.load(row.digest).await?;
        let base = self.bases.ensure(&image, progress).await?;
        let dir = base.dir.clone();
        tokio::task::spawn_blocking(move || sweep::mark_used(&dir));
        Ok(ReadyImage {
            image,
            root_size: base.manifest.root.size,
            base: base.id,
            lease,
        })
    }

    /// Forgets a name; what nothing else needs is deleted.
    pub async fn remove(&self, reference: &str, force: bool) -> Answer<()> {
        let row = self.row(reference).await?;
        let rows = self.db.call(Db::images).await?;
        let last = rows.iter().filter(|other| other.digest == row.digest).count() == 1;
        if last {
            self.refuse_if_used(&row, force)?;
        }
        self.db.call(move |db| db.remove_image(&row.reference)).await?;
        self.sweep_if_idle().await;
        Ok(())
    }

    fn refuse_if_used(&self, row: &ImageRow, force: bool) -> Answer<()> {
        let users: Vec<_> = self
            .engine
            .list()
            .iter()
            .map(|handle| handle.view.borrow().clone())
            .collect();
        let users: Vec<_> = users.iter().filter(|vm| vm.image_digest == row.digest).collect();
        let running: Vec<_> = users.iter().filter(|vm| vm.life.state.has_vmm()).collect();
        let named = |vms: &[&Arc<offshoot_engine::definition::VmRecord>]| {
            vms.iter()
                .map(|vm| format!("`{}`", vm.name))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let refuse = |vms: &[&Arc<_>], what: &str, hint: &str| {
            let message = format!(
                "image `{}` is used by {what} {}",
                short(&row.reference),
                named(vms)
            );
            Err(Failure::new(ErrorKind::Conflict, message).hint(hint))
        };
        if !running.is_empty() {
            let running: Vec<_> = running.into_iter().copied().collect();
            return refuse(
                &running,
                "running VM",
                "remove the VM first with `offshoot rm -f VM`",
            );
        }
        if !users.is_empty() && !force {
            return refuse(
                &users,
                "VM",
                "remove the VM first with `offshoot rm VM`, or use `offshoot image rm -f`",
            );
        }
        Ok(())
    }

    /// After a failure, what was stored for nothing is deleted.
    async fn settled<T>(&self, result: Answer<T>) -> Answer<T> {
        if result.is_err() {
            self.sweep_if_idle().await;
        }
        result
    }

    /// Names an image that is in the store and prepares it.
    async fn keep(
        &self,
        stages: &mut Stages,
        reference: &ImageReference,
        digest: Digest,
        prepare: bool,
        progress: &Progress,
        lease: OwnedRwLockReadGuard<()>,
    ) -> Answer<ImageSummary> {
        let image = self.load(digest).await?;
        if prepare {
            let (bases, image) = (&self.bases, &image);
            stages
                .stage_with_tasks("base", progress, |progress| async move {
                    bases.ensure(image, &progress).await
                })
                .await?;
        }
        let row = ImageRow {
            reference: reference.to_string(),
            digest,
            created_ms: now_ms(),
        };
        let written = row.clone();
        let named = self
            .db
            .call(move |db| db.put_image(&written.reference, &written.digest, written.created_ms));
        stages.stage("row", named).await?;
        drop(lease);
        self.sweep_if_idle().await;
        self.summarised(row).await
    }

    /// An operation on an image begins now.
    fn begin(&self, operation: &'static str, reference: &ImageReference) -> Stages {
        let subject = Subject::named(short_name(reference));
        self.engine.operations().begin(operation, subject)
    }

    /// Keeps every sweep away while it is held.
    pub(crate) async fn lease(&self) -> OwnedRwLockReadGuard<()> {
        self.in_use.clone().read_owned().await
    }

    /// Waits until nobody holds a lease, and keeps everybody from taking one.
    pub(crate) async fn alone(&self, patience: Duration) -> Answer<OwnedRwLockWriteGuard<()>> {
        let deadline = Instant::now() + patience;
        loop {
            if let Ok(alone) = self.in_use.clone().try_write_owned() {
                return Ok(alone);
            }
            if Instant::now() >= deadline {
                let message = "cannot prune now: images or VMs are being made";
                return Err(Failure::new(ErrorKind::Conflict, message)
                    .hint("try again when the pull, import, preparation or create is done"));
            }
            // Not by queueing for it: behind a waiting writer no new reader gets in, and all creates would stand still.
            tokio::time::sleep(ALONE_POLL).await;
        }
    }

    /// How eager a prune is, out of the request and the settings.
    pub(crate) fn rules(&self, query: PruneQuery) -> Rules {
        Rules {
            all: query.all,
            templates: true,
            grace: query
                .grace_s
                .map_or_else(|| self.config.prune_grace(), Duration::from_secs),
        }
    }

    async fn load(&self, digest: Digest) -> Answer<StoredImage> {
        let blobs = self.blobs.clone();
        blocking("reading an image", move || {
            Ok(StoredImage::load(&blobs, &digest)?)
        })
        .await
    }

    async fn summarised(&self, row: ImageRow) -> Answer<ImageSummary> {
        let this = self.clone();
        blocking("looking at an image", move || Ok(this.summary(&row))).await
    }

    /// What `ls` shows. A damaged image is shown as one: it shall not hide the others.
    fn summary(&self, row: &ImageRow) -> ImageSummary {
        let (size, problem) = match StoredImage::load(&self.blobs, &row.digest) {
            Ok(image) => (image.size(), None),
            Err(error) => (0, Some(chain(&error))),
        };
        let base = self.bases.of_image(&row.digest).ok();
        ImageSummary {
            reference: short(&row.reference),
            digest: row.digest,
            created_ms: row.created_ms,
            size,
            prepared: base.is_some(),
            seeds: base.map(|base| match base.lacks().as_slice() {
                [] => SeedState::Current,
                _ => SeedState::Missing,
            }),
            problem,
        }
    }

    /// The row of a reference, or of the only image whose digest begins so.
    pub(crate) async fn row(&self, text: &str) -> Answer<ImageRow> {
        let rows = self.db.call(Db::images).await?;
        if let Ok(reference) = text.parse::<ImageReference>() {
            let name = reference.to_string();
            if let Some(row) = rows.iter().find(|row| row.reference == name) {
                return Ok(row.clone());
            }
        }
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        if digits.len() >= 6 && digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            let mut found: Vec<_> = rows
                .iter()
                .filter(|row| row.digest.hex().starts_with(digits))
                .collect();
            found.dedup_by_key(|row| row.digest);
            match found.as_slice() {
                [row] => return Ok((*row).clone()),
                [] => {}
                _ => {
                    let message = format!("`{digits}` is the beginning of more than one image's digest");
                    return Err(Failure::new(ErrorKind::InvalidRequest, message).hint("give more digits"));
                }
            }
        }
        // A text that is no reference at all gets that error.
        text.parse::<ImageReference>()?;
        let shown: String = text.chars().take(200).flat_map(char::escape_debug).collect();
        let hint = if shown.starts_with("debian:") {
            format!(
                "make it with `offshoot image bootstrap {shown}`, or fetch it with `offshoot image pull {shown}`"
            )
        } else {
            format!("fetch it with `offshoot image pull {shown}`, or see `offshoot image ls`")
        };
        Err(Failure::new(ErrorKind::NotFound, format!("no such image: `{shown}`")).hint(hint))
    }

    /// Deletes blobs and bases that nothing needs, unless somebody is making some just now: then that one's end sweeps.
    pub async fn sweep_if_idle(&self) {
        let Ok(alone) = self.in_use.clone().try_write_owned() else {
            return;
        };
        let this = self.clone();
        let swept = tokio::task::spawn_blocking(move || {
            let result = sweep::sweep(&this);
            drop(alone);
            result
        })
        .await;
        if let Ok(Err(Failure(error))) = swept {
            tracing::warn!(error = error.message, causes = ?error.causes, "cannot delete what no image needs");
        }
        known_bases::reconcile_or_warn(self).await;
    }
}

fn short_name(reference: &ImageReference) -> String {
    short(&reference.to_string())
}

/// A normalised reference as users write it.
pub(crate) fn short(reference: &str) -> String {
    reference
        .parse::<ImageReference>()
        .map_or_else(|_| reference.to_owned(), |parsed| parsed.short())
}
