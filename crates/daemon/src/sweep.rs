//! Deletes what nothing needs: reads what lies in the stores and who needs it, asks `prune.rs` what may go, and does it.
//!
//! Two callers: the sweep that follows by itself when an image goes, and `offshoot prune`. Both hold the images' lock
//! alone, so that nobody is making something that no row speaks of yet.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use offshoot_api::prune::{PruneFailure, PruneItem, PruneQuery, PruneReport};
use offshoot_image::manifest::StoredImage;
use offshoot_kernel::KernelStore;
use offshoot_model::ErrorKind;
use offshoot_rootfs::base::base_id;

use crate::bases::TREE;
use crate::blocking::blocking;
use crate::error::{Answer, Failure, chain};
use crate::images::{Images, short};
use crate::prune::{
    BaseFacts, BlobFacts, Facts, ImageFacts, Item, KernelFacts, Plan, Rules, TREE_ROOTS, TemplateFacts,
    VmFacts, plan,
};
use crate::time::now_ms;

/// How long a prune waits for a moment in which nobody makes anything. Long enough for a VM to be created, too short for
/// a pull: whoever asks shall not wait for minutes.
const PATIENCE: Duration = Duration::from_secs(3);

/// Everything that the decision needs. Without `kernels`, only blobs and bases are looked at. Blocks.
pub fn facts(images: &Images, kernels: Option<&KernelStore>) -> Answer<Facts> {
    let mut facts = Facts {
        now_ms: now_ms(),
        ..Facts::default()
    };
    // Several names of one manifest are one image.
    let mut by_digest = BTreeMap::new();
    for row in images.db.images()? {
        by_digest
            .entry(row.digest)
            .or_insert_with(Vec::new)
            .push(short(&row.reference));
    }
    for (digest, names) in by_digest {
        let blobs = match StoredImage::load(&images.blobs, &digest) {
            Ok(image) => {
                let mut blobs: Vec<_> = image.blobs().collect();
                blobs.sort_unstable();
                blobs.dedup();
                Ok(blobs)
            }
            Err(error) => Err(chain(&error)),
        };
        facts.images.push(ImageFacts {
            names,
            digest,
            // An earlier version's base stays while it is the only one.
            base: images
                .bases
                .of_image(&digest)
                .map_or_else(|_| base_id(&digest), |base| base.id),
            blobs,
        });
    }
    for handle in images.engine.list() {
        let vm = handle.view.borrow();
        facts.vms.push(VmFacts {
            base: vm.base_id.clone(),
            kernel: vm.kernel_id.clone(),
            needs_tree: TREE_ROOTS.contains(&vm.definition.root.chosen.as_str()),
        });
    }
    for (digest, bytes) in images.blobs.list()? {
        facts.blobs.push(BlobFacts {
            digest,
            bytes,
            at_ms: modified_ms(&images.blobs.path(&digest)),
        });
    }
    for id in images.bases.ids()? {
        let place = images.bases.locate(&id);
        let tree = place.dir().join(TREE);
        facts.bases.push(BaseFacts {
            used_ms: modified_ms(place.dir()),
            tree_ms: (kernels.is_some() && tree.is_dir()).then(|| changed_ms(&tree)),
            id,
        });
    }
    if let Some(templates) = images.engine.templates() {
        let vms = images.engine.records();
        for found in templates.list().map_err(|error| unreadable_templates(&error))? {
            let stored = found.stored.as_ref().ok();
            let current = stored.filter(|_| found.stale.is_none());
            facts.templates.push(TemplateFacts {
                base: current.map(|stored| stored.manifest.key.base.clone()),
                used_ms: stored.map_or(0, |stored| stored.used_ms),
                leased: vms.iter().any(|vm| vm.runs_from(&found.id)),
                id: found.id,
            });
        }
    }
    let Some(kernels) = kernels else {
        return Ok(facts);
    };
    for download in images.blobs.downloads()? {
        facts.downloads.push(BlobFacts {
            digest: download.digest,
            bytes: download.bytes,
            at_ms: since_epoch(download.modified),
        });
    }
    let default = kernels.default().ok().map(|bundle| bundle.id);
    for bundle in kernels.list()? {
        facts.kernels.push(KernelFacts {
            default: default.as_ref() == Some(&bundle.id),
            created_ms: bundle.manifest.created_unix_ms,
            id: bundle.id,
        });
    }
    Ok(facts)
}

pub(crate) fn unreadable_templates(error: &std::io::Error) -> Failure {
    let cannot = format!("cannot look at the templates: {error}");
    Failure::new(ErrorKind::Internal, cannot)
}

/// Notes in the base's folder, where there is one, that a VM is made from it: the grace time counts from here.
pub fn mark_used(base: &Path) {
    let marked = std::fs::File::open(base).and_then(|dir| dir.set_modified(SystemTime::now()));
    if let Err(error) = marked
        && error.kind() != std::io::ErrorKind::NotFound
    {
        // At worst the base goes a little earlier and is made again.
        tracing::debug!(base = %base.display(), %error, "cannot note the use of a base");
    }
}

/// What `prune` would do now. Waits for nobody.
pub async fn preview(images: &Images, kernels: &Arc<KernelStore>, query: PruneQuery) -> Answer<PruneReport> {
    let rules = images.rules(query);
    let (images, kernels) = (images.clone(), Arc::clone(kernels));
    blocking("looking for what can go", move || {
        let plan = plan(&facts(&images, Some(&kernels))?, rules);
        let mut report = report(&images, &kernels, &plan, rules);
        report.removed = measured(&images, &kernels, &plan.remove);
        report.freed_bytes = report.removed.iter().map(|item| item.bytes).sum();
        Ok(report)
    })
    .await
}

/// Deletes what nothing needs, in a moment in which nobody makes anything. Dropping the future while it waits does nothing;
/// later it goes on to its end.
pub async fn prune(images: &Images, kernels: &Arc<KernelStore>, query: PruneQuery) -> Answer<PruneReport> {
    let rules = images.rules(query);
    let alone = images.alone(PATIENCE).await?;
    let (images, kernels) = (images.clone(), Arc::clone(kernels));
    blocking("the prune", move || {
        let plan = plan(&facts(&images, Some(&kernels))?, rules);
        let mut report = report(&images, &kernels, &plan, rules);
        for (thing, item) in plan.remove.iter().zip(measured(&images, &kernels, &plan.remove)) {
            match remove(&images, Some(&kernels), thing) {
                Ok(true) => {
                    tracing::info!(kind = ?item.kind, name = item.name, bytes = item.bytes, "pruned");
                    report.freed_bytes += item.bytes;
                    report.removed.push(item);
                }
                // Somebody took it up just now, or it went by itself.
                Ok(false) => {}
                Err(Failure(error)) => {
                    let reason = [vec![error.message], error.causes].concat().join(": ");
                    tracing::warn!(kind = ?item.kind, name = item.name, reason, "cannot prune");
                    report.failed.push(PruneFailure { item, reason });
                }
            }
        }
        drop(alone);
        Ok(report)
    })
    .await
}

/// Deletes the blobs and bases that no image and no VM needs. Blocks; the caller holds the images' lock alone.
pub fn sweep(images: &Images) -> Answer<()> {
    let plan = plan(&facts(images, None)?, Rules::SWEEP);
    for note in &plan.notes {
        tracing::warn!("{note}");
    }
    for item in &plan.remove {
        if matches!(item, Item::Base(_)) {
            tracing::info!(base = item.name(), "deleting a base that nothing needs");
        }
        remove(images, None, item)?;
    }
    Ok(())
}

/// A report on `plan` in which nothing was removed yet.
fn report(images: &Images, kernels: &KernelStore, plan: &Plan, rules: Rules) -> PruneReport {
    PruneReport {
        kept_for_grace: measured(images, kernels, &plan.spare),
        grace_s: rules.grace.as_secs(),
        notes: plan.notes.clone(),
        ..PruneReport::default()
    }
}

fn measured(images: &Images, kernels: &KernelStore, items: &[Item]) -> Vec<PruneItem> {
    let measure = |item: &Item| PruneItem {
        kind: item.kind(),
        name: item.name(),
        bytes: bytes(images, kernels, item),
    };
    items.iter().map(measure).collect()
}

/// What it takes on disk; 0 when it cannot be measured.
fn bytes(images: &Images, kernels: &KernelStore, item: &Item) -> u64 {
    let place = match item {
        Item::Blob(digest) => return images.blobs.size(digest).unwrap_or(0),
        Item::Download(digest) => {
            let downloads = images.blobs.downloads().unwrap_or_default();
            let found = downloads.iter().find(|download| download.digest == *digest);
            return found.map_or(0, |download| download.bytes);
        }
        Item::Base(id) => images.bases.locate(id).dir().to_owned(),
        Item::Tree(id) => images.bases.locate(id).dir().join(TREE),
        Item::Kernel(id) => match kernels.get(id) {
            Ok(bundle) => bundle.dir,
            Err(_) => return 0,
        },
        Item::Template(id) => match images.engine.templates() {
            Some(templates) => templates.store.path(id),
            None => return 0,
        },
    };
    offshoot_sys::space::disk_usage(&place).unwrap_or(0)
}

/// Says whether it went.
fn remove(images: &Images, kernels: Option<&KernelStore>, item: &Item) -> Answer<bool> {
    match item {
        Item::Blob(digest) => images.blobs.remove(digest)?,
        Item::Download(digest) => return Ok(images.blobs.remove_download(digest)?),
        Item::Base(id) => images.bases.remove(id)?,
        Item::Tree(id) => images.bases.remove_tree(id)?,
        Item::Kernel(id) => {
            return match kernels {
                Some(kernels) => Ok(kernels.remove_unless_default(id)?),
                None => Ok(false),
            };
        }
        Item::Template(id) => {
            return match images.engine.templates() {
                Some(templates) => Ok(templates.remove_now(id)?),
                None => Ok(false),
            };
        }
    }
    Ok(true)
}

/// When it was last written; the beginning of time when that cannot be told.
fn modified_ms(path: &Path) -> u64 {
    let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.map_or(0, since_epoch)
}

/// When it came to its place. Not when it was written: the root of a tree has the time that the image says.
fn changed_ms(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let seconds = std::fs::metadata(path).map_or(0, |metadata| metadata.ctime());
    u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)
}

fn since_epoch(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use offshoot_api::image::PartState;
    use offshoot_api::prune::PruneKind;
    use offshoot_engine::definition::Choice;
    use offshoot_engine::engine::{CreateRequest, Engine, EngineConfig, Parts};
    use offshoot_engine::networks::{Networks, NetworksConfig};
    use offshoot_model::{ErrorKind, KernelId, Progress, VmConfig};
    use offshoot_net::Namespace;
    use offshoot_net::host_ports::FreePorts;
    use offshoot_rootfs::base::BaseStore;
    use offshoot_store::blobs::BlobStore;
    use offshoot_store::db::Db;

    use super::*;
    use crate::config::DaemonConfig;
    use crate::{usage, verify};

    /// Images, bases and VMs in a folder of their own. VMs are rows: no capability is there to start one.
    struct Fixture {
        dir: tempfile::TempDir,
        images: Images,
        kernels: Arc<KernelStore>,
    }

    impl Fixture {
        async fn new() -> Self {
            use std::os::unix::fs::MetadataExt as _;
            let dir = tempfile::tempdir().unwrap();
            let data_dir = dir.path().join("data");
            let kernels = Arc::new(KernelStore::open(&data_dir).unwrap());
            let db = Db::open(&data_dir).unwrap();
            let blobs = BlobStore::open(&data_dir).unwrap();
            let bases = Arc::new(BaseStore::open(&data_dir, blobs.clone()).unwrap());
            let config = EngineConfig {
                data_dir,
                run_dir: dir.path().join("run"),
                uid_base: 1_900_000_001,
                uid_count: 10,
                gid: fs::metadata(dir.path()).unwrap().gid(),
            };
            let ports = Arc::new(FreePorts {
                namespace: Namespace::own(),
            });
            let networks = NetworksConfig {
                pool: DaemonConfig::default().network_pool,
                data_dir: config.data_dir.clone(),
                tap_pool_size: 0,
            };
            let networks = Networks::open(db.clone(), Namespace::own(), ports, networks);
            let engine = Engine::start(Parts {
                db: db.clone(),
                networks: networks.await.unwrap(),
                config,
                capabilities: Vec::new(),
                templates: None,
            })
            .await
            .unwrap();
            let images = Images::new(db, blobs, bases, engine, DaemonConfig::default());
            Self { dir, images, kernels }
        }

        /// An image of one layer that holds `content`, and its base.
        async fn image(&self, name: &str, content: &str) {
            let mut tar = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, "etc/name", content.as_bytes())
                .unwrap();
            let tar = std::io::Cursor::new(tar.into_inner().unwrap());
            let images = &self.images;
            images
                .import(tar, Some(name.parse().unwrap()), true, &Progress::silent())
                .await
                .unwrap();
        }

        /// A VM of this image whose root is shown so.
        async fn vm(&self, image: &str, root: &str) {
            let ready = self.images.ready(image, &Progress::silent()).await.unwrap();
            let choice = |chosen: &str| Choice {
                chosen: chosen.into(),
                ..Choice::default()
            };
            let mut config = VmConfig::new(image);
            config.cmd = vec!["sh".into()];
            let request = CreateRequest {
                config,
                image_config: ready.image.config.clone(),
                image_digest: ready.image.digest,
                base_id: ready.base.clone(),
                kernel_id: KernelId::from_bytes(&[1; 8]),
                vmm: choice("qemu"),
                root: choice(root),
            };
            self.images.engine.create(request).await.unwrap();
        }

        async fn base_dir(&self, image: &str) -> std::path::PathBuf {
            let row = self.images.row(image).await.unwrap();
            self.images.bases.locate(&base_id(&row.digest)).dir().to_owned()
        }

        async fn prune(&self, all: bool, grace_s: u64) -> PruneReport {
            let query = PruneQuery {
                all,
                grace_s: Some(grace_s),
            };
            let foreseen = preview(&self.images, &self.kernels, query).await.unwrap();
            let done = prune(&self.images, &self.kernels, query).await.unwrap();
            assert_eq!(foreseen, done, "what was foreseen is what was done");
            done
        }
    }

    fn kinds(items: &[PruneItem]) -> Vec<PruneKind> {
        items.iter().map(|item| item.kind).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_nothing_needs_goes_and_the_rest_stays() {
        let fixture = Fixture::new().await;
        fixture.image("used:1", "used").await;
        fixture.image("idle:1", "idle").await;
        fixture.vm("used:1", "block").await;
        let (used, idle) = (fixture.base_dir("used:1").await, fixture.base_dir("idle:1").await);
        fs::create_dir(used.join(TREE)).unwrap();
        fs::write(used.join(TREE).join("file"), vec![1; 100_000]).unwrap();
        let stray = fixture.images.blobs.put(b"nobody's").unwrap();
        let mut broken = fixture.images.blobs.download(&base_digest(7)).unwrap().unwrap();
        std::io::Write::write_all(&mut broken, b"the first half").unwrap();
        drop(broken);
        // A folder in a base's place that holds none, as another version may leave it.
        let foreign = fixture
            .images
            .bases
            .locate(&offshoot_model::BaseId::from_bytes(&[9; 16]))
            .dir()
            .to_owned();
        fs::create_dir(&foreign).unwrap();

        let young = fixture.prune(true, 3600).await;
        assert_eq!((young.removed.len(), young.freed_bytes), (0, 0));
        assert_eq!(young.kept_for_grace.len(), 5, "{young:?}");

        let report = fixture.prune(false, 0).await;
        let mut found = kinds(&report.removed);
        found.sort_by_key(|kind| format!("{kind:?}"));
        use PruneKind::{Base, Blob, Download, Tree};
        assert_eq!(found, [Base, Blob, Download, Tree]);
        assert!(report.freed_bytes > 100_000);
        assert!(!used.join(TREE).exists() && !foreign.exists());
        assert!(!fixture.images.blobs.contains(&stray));
        assert!(used.join("base.json").exists() && idle.join("base.json").exists());

        assert_eq!(kinds(&fixture.prune(true, 0).await.removed), [Base]);
        assert!(!idle.exists() && used.exists());
        assert_eq!(fixture.prune(true, 0).await.removed, []);
        // Both can still be had, and nothing is left half done.
        fixture.vm("idle:1", "block").await;
        assert!(idle.join("base.json").exists());
        assert_eq!(
            fs::read_dir(fixture.dir.path().join("data/tmp")).unwrap().count(),
            0
        );
    }

    fn base_digest(n: u8) -> offshoot_model::Digest {
        offshoot_model::Digest::from_bytes([n; 32])
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_tree_stays_for_the_vm_that_needs_it_and_a_use_renews_the_grace() {
        let fixture = Fixture::new().await;
        fixture.image("a:1", "a").await;
        let base = fixture.base_dir("a:1").await;
        fs::create_dir(base.join(TREE)).unwrap();
        let long_ago = SystemTime::now() - Duration::from_secs(10_000);
        fs::File::open(&base).unwrap().set_modified(long_ago).unwrap();
        assert_eq!(
            kinds(&fixture_preview(&fixture, true).await.removed),
            [PruneKind::Base]
        );
        mark_used(&base);
        let marked = fixture_preview(&fixture, true).await;
        assert_eq!(kinds(&marked.kept_for_grace), [PruneKind::Base]);

        fixture.vm("a:1", "virtiofs").await;
        assert_eq!(fixture.prune(true, 0).await.removed, []);
        assert!(base.join(TREE).exists());
        mark_used(&fixture.dir.path().join("none"));
    }

    async fn fixture_preview(fixture: &Fixture, all: bool) -> PruneReport {
        let query = PruneQuery { all, grace_s: None };
        preview(&fixture.images, &fixture.kernels, query).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_prune_waits_for_makers_and_does_not_hold_them_up() {
        let fixture = Fixture::new().await;
        let maker = fixture.images.lease().await;
        let query = PruneQuery {
            all: true,
            grace_s: Some(0),
        };
        // While a prune waits, others begin as if there was none.
        let waiting = tokio::spawn({
            let (images, kernels) = (fixture.images.clone(), Arc::clone(&fixture.kernels));
            async move { prune(&images, &kernels, query).await }
        });
        for _ in 0..20 {
            tokio::task::yield_now().await;
            let another = tokio::time::timeout(Duration::from_secs(5), fixture.images.lease()).await;
            drop(another.expect("nobody waits behind a prune"));
        }
        drop(maker);
        waiting.await.unwrap().unwrap();

        let _maker = fixture.images.lease().await;
        let Err(Failure(error)) = fixture.images.alone(Duration::from_millis(20)).await else {
            panic!("it is not alone");
        };
        assert_eq!(error.kind, ErrorKind::Conflict);
        assert!(!error.hints.is_empty());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_count_and_the_check_see_what_is_there() {
        let fixture = Fixture::new().await;
        fixture.image("a:1", "the same").await;
        fixture.image("a:2", "the same").await;
        fixture.image("b:1", "another").await;
        fixture.vm("a:1", "block").await;
        let df = usage::usage(&fixture.images, &fixture.kernels).await.unwrap();
        let names: Vec<_> = df.images.iter().map(|image| image.references.join(" ")).collect();
        assert_eq!(
            (names.len(), df.bases.len(), df.vms.len()),
            (2, 2, 1),
            "{names:?}"
        );
        assert_eq!(df.blobs.bytes, df.blobs.shared + df.blobs.unique);
        assert_eq!(df.blobs.count, 6);
        assert!(
            df.bases
                .iter()
                .all(|base| base.bytes >= base.parts.root + base.parts.overlay_seed)
        );
        assert!(
            df.bases
                .iter()
                .all(|base| base.parts.root > 0 && base.parts.overlay_seed > 0)
        );
        assert_eq!(df.bases.iter().map(|base| base.vms).sum::<u64>(), 1);
        assert_eq!(
            (df.totals.reclaimable, df.totals.reclaimable_all),
            (0, 0),
            "all is young"
        );
        assert!(df.totals.disk >= df.blobs.bytes + df.bases.iter().map(|base| base.bytes).sum::<u64>());

        let check = async |image: &str| {
            verify::verify(&fixture.images, image, &Progress::silent())
                .await
                .unwrap()
        };
        let good = check("a:1").await;
        assert!(!good.is_damaged() && good.hints.is_empty(), "{good:?}");
        assert_eq!(good.reference, "a:1");
        let named: Vec<_> = good.parts.iter().map(|part| part.part.as_str()).collect();
        assert_eq!(named[..3], ["manifest", "config", "layer"]);
        let of_base: Vec<_> = good.parts[3..].iter().map(|part| part.name.as_str()).collect();
        assert_eq!(of_base, ["root.erofs", "overlay-seed.ext4", "work-seed.ext4"]);
        assert!(
            good.parts
                .iter()
                .all(|part| part.state == PartState::Ok && part.bytes > 0)
        );

        // One flipped bit in the root; then no base at all.
        let base = fixture.base_dir("a:1").await;
        flip_a_bit(&base.join("root.erofs"));
        let bad = check("a:2").await;
        assert!(bad.is_damaged());
        assert!(bad.hints[0].contains("image prepare --force a:2"), "{bad:?}");
        let states: Vec<_> = bad.parts[3..].iter().map(|part| part.state).collect();
        assert_eq!(
            states,
            [PartState::Damaged, PartState::Ok, PartState::Ok],
            "each for itself"
        );
        let images = &fixture.images;
        let prepared = images.prepare("a:1", true, &Progress::silent()).await.unwrap();
        assert!(prepared.prepared && !check("a:1").await.is_damaged());
        fs::remove_dir_all(&base).unwrap();
        let missing = check("a:1").await;
        assert!(!missing.is_damaged());
        assert_eq!(missing.parts.last().unwrap().state, PartState::NotPrepared);

        // A damaged layer, then a damaged manifest.
        let layer = good.parts[2].name.parse().unwrap();
        flip_a_bit(&images.blobs.path(&layer));
        let bad = check("a:1").await;
        assert_eq!(bad.parts[2].state, PartState::Damaged);
        assert!(bad.hints[0].contains("image pull a:1"), "{bad:?}");
        flip_a_bit(&images.blobs.path(&good.digest));
        let worse = check("a:1").await;
        assert_eq!(worse.parts[0].state, PartState::Damaged);
        let listed = images.list().await.unwrap();
        let problems: Vec<_> = listed.iter().map(|image| image.problem.is_some()).collect();
        assert_eq!(
            problems.iter().filter(|problem| **problem).count(),
            2,
            "two names of it: {listed:?}"
        );
        let report = fixture.prune(true, 0).await;
        assert_eq!(report.notes.len(), 1, "{report:?}");
        assert!(images.blobs.contains(&layer), "nobody knows whose it is");
        let df = usage::usage(images, &fixture.kernels).await.unwrap();
        assert_eq!(
            df.images.iter().filter(|image| image.problem.is_some()).count(),
            1
        );
    }

    fn flip_a_bit(path: &Path) {
        use std::os::unix::fs::PermissionsExt as _;
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(path, bytes).unwrap();
    }
}
