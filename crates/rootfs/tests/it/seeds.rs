//! Seeds and their clones: on file systems that share blocks and on others, and bases that earlier versions made without.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use offshoot_image::manifest::StoredImage;
use offshoot_model::{BaseId, ByteSize, Progress};
use offshoot_rootfs::base::{BaseError, BaseStoreConfig, Seed, base_id, earlier_base_ids};
use offshoot_rootfs::seed::{DiskOrigin, clone_seed, clone_work_seed};
use offshoot_sys::clone::CloneKind;
use offshoot_sys::space::disk_usage;

use crate::place::{Place, labels, recorder, small};
use crate::support::{Mount, Tar, assert_same, can_run, e2fsck, list, run, whole_seconds};

const GROWN: ByteSize = ByteSize::from_mib(20 << 10);

/// An image with something in `/root`.
fn with_home() -> Tar {
    small()
        .raw(b'5', b"root", b"", b"", |header| header.set_mode(0o700))
        .file("root/.profile", "umask 022\n")
        .raw(b'0', b"root/.ssh/authorized_keys", b"", b"key", |header| {
            header.set_mode(0o600);
        })
}

/// Makes the base of an image what the first version would have made of it: its id, its `base.json`, no work seed.
fn age(place: &Place, image: &StoredImage) -> BaseId {
    let bases = place.dir.path().join("bases");
    let id = earlier_base_ids(&image.digest).next().unwrap();
    let dir = bases.join(id.as_str());
    std::fs::rename(bases.join(base_id(&image.digest).as_str()), &dir).unwrap();
    std::fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
    std::fs::remove_file(dir.join("work-seed.ext4")).unwrap();
    let path = dir.join("base.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["format"] = 1.into();
    json["variant"] = "root.erofs=1 overlay-seed.ext4=1".into();
    let fields = json.as_object_mut().unwrap();
    fields.remove("work_seed");
    let overlay = fields["overlay_seed"].as_object_mut().unwrap();
    overlay.retain(|name, _| ["size", "writer"].contains(&name.as_str()));
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, serde_json::to_vec(&json).unwrap()).unwrap();
    id
}

#[tokio::test]
async fn an_earlier_base_serves_until_the_current_one_stands_beside_it() {
    if !can_run(
        "an_earlier_base_serves_until_the_current_one_stands_beside_it",
        &["mount", "mke2fs", "debugfs", "e2fsck"],
    ) {
        return;
    }
    let place = Place::new();
    let image = place.image(&[with_home()]);
    place.store.ensure(&image, &Progress::silent()).await.unwrap();
    let old = age(&place, &image);

    // It is taken as it is, and nothing is prepared.
    let (progress, events) = recorder();
    let base = place.store.ensure(&image, &progress).await.unwrap();
    assert_eq!((&base.id, base.lacks()), (&old, vec![Seed::Work]));
    assert_eq!(labels(&events), [""; 0]);
    assert_eq!(place.names("bases"), [old.as_str()]);
    let parts = place.store.verify(&old).unwrap().parts;
    assert_eq!(
        parts.len(),
        1,
        "the first version recorded no hash of its seed: {parts:?}"
    );

    // Its disks are what they would be.
    let store = &place.store;
    let disk = |name: &str| place.dir.path().join(name);
    let built = store.make_work_disk(&old, &disk("built"), GROWN).unwrap();
    assert_eq!(built, DiskOrigin::Built);
    let overlay = store.make_overlay_disk(&old, &disk("overlay"), GROWN).unwrap();
    assert!(matches!(overlay, DiskOrigin::Cloned(_)), "{overlay:?}");
    assert_eq!(place.names("tmp"), [""; 0]);
    assert!(
        store
            .make_work_disk(&old, &disk("tiny"), ByteSize::from_mib(1))
            .is_err()
    );
    assert!(!disk("tiny").exists());

    // The current one comes beside it, which stays.
    let current = store.ensure_current(&image, &Progress::silent()).await.unwrap();
    assert_eq!((&current.id, current.lacks().len()), (&base_id(&image.digest), 0));
    assert_eq!(place.names("bases").len(), 2);
    assert_eq!(store.of_image(&image.digest).unwrap().id, current.id);
    assert_eq!(
        store.ensure(&image, &Progress::silent()).await.unwrap().id,
        current.id
    );
    store.make_work_disk(&old, &disk("still"), GROWN).unwrap();
    let cloned = store.make_work_disk(&current.id, &disk("cloned"), GROWN).unwrap();
    assert!(matches!(cloned, DiskOrigin::Cloned(_)), "{cloned:?}");
    for name in ["built", "cloned", "overlay", "still"] {
        e2fsck(&disk(name));
        assert_eq!(std::fs::metadata(disk(name)).unwrap().len(), GROWN.bytes());
    }
    let content = |name: &str| whole_seconds(list(Mount::ext4(&disk(name)).path()));
    assert_eq!(content("built").len(), 4);
    // A folder that no layer tells of has the time at which it was made.
    let timeless = |name: &str| {
        let mut content = content(name);
        content.get_mut(Path::new("./.ssh")).unwrap().mtime = (0, 0);
        content
    };
    assert_same(&timeless("built"), &timeless("cloned"));

    // Once there is a current one, that it is damaged does not bring the old one back.
    std::fs::remove_file(current.work_seed()).unwrap();
    assert!(matches!(
        store.of_image(&image.digest),
        Err(BaseError::Damaged { .. })
    ));
    let mended = store.ensure(&image, &Progress::silent()).await.unwrap();
    assert_eq!((&mended.id, mended.lacks().len()), (&current.id, 0));
    // And without it, it does.
    store.remove(&base_id(&image.digest)).unwrap();
    assert_eq!(store.of_image(&image.digest).unwrap().id, old);
}

#[tokio::test]
async fn a_base_without_any_seed_has_disks() {
    let place = Place::new();
    let image = place.image(&[with_home()]);
    place.store.ensure(&image, &Progress::silent()).await.unwrap();
    let old = age(&place, &image);
    let dir = place.dir.path().join("bases").join(old.as_str());
    let json = std::fs::read_to_string(dir.join("base.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
    json.as_object_mut().unwrap().remove("overlay_seed");
    std::fs::write(dir.join("base.json"), json.to_string()).unwrap();
    std::fs::remove_file(dir.join("overlay-seed.ext4")).unwrap();
    let base = place.store.get(&old).unwrap();
    assert_eq!(base.lacks(), [Seed::Overlay, Seed::Work]);
    let disk = place.dir.path().join("overlay");
    assert_eq!(
        place.store.make_overlay_disk(&old, &disk, GROWN).unwrap(),
        DiskOrigin::Made
    );
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), GROWN.bytes());
}

#[tokio::test]
async fn seeds_have_the_size_that_is_set() {
    let place = Place::with(BaseStoreConfig {
        seed_size: ByteSize::from_mib(1 << 10),
        ..BaseStoreConfig::default()
    });
    let image = place.image(&[with_home()]);
    let base = place.store.ensure(&image, &Progress::silent()).await.unwrap();
    let (overlay, work) = (base.overlay_seed(), base.work_seed());
    for seed in [&overlay, &work] {
        assert_eq!(std::fs::metadata(seed).unwrap().len(), 1 << 30);
    }
    let disk = place.dir.path().join("disk");
    let origin = place
        .store
        .make_work_disk(&base.id, &disk, ByteSize::from_mib(1 << 10))
        .unwrap();
    assert!(matches!(origin, DiskOrigin::Cloned(_)), "{origin:?}");
}

/// A file system of its own on a loop file.
struct OnLoop {
    mount: Mount,
    _file: tempfile::NamedTempFile,
}

impl OnLoop {
    fn new(mkfs: &str, options: &[&str], mib: u64) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(mib << 20).unwrap();
        let mut arguments: Vec<_> = options.iter().map(OsStr::new).collect();
        arguments.push(file.path().as_os_str());
        run(mkfs, &arguments);
        Self {
            mount: Mount::writable(file.path()),
            _file: file,
        }
    }

    fn path(&self) -> &Path {
        self.mount.path()
    }
}

/// How many pieces a file lies in, and how many of them it shares with another (`FIEMAP_EXTENT_SHARED`).
fn extents(path: &Path) -> (usize, usize) {
    let said = run("/usr/sbin/filefrag", &[OsStr::new("-v"), path.as_os_str()]);
    let said = String::from_utf8(said).unwrap();
    let is_extent = |line: &&str| {
        let number = line.split(':').next().unwrap_or_default().trim();
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    };
    let extents: Vec<_> = said.lines().filter(is_extent).collect();
    let shared = extents.iter().filter(|line| line.contains("shared")).count();
    (extents.len(), shared)
}

/// Both seeds of a base that is made in `dir`, with the clone of each that is grown to 20 GiB.
async fn grown_clones(dir: &Path) -> Vec<(PathBuf, PathBuf, DiskOrigin)> {
    let place = Place::on(dir, BaseStoreConfig::default());
    let image = place.image(&[with_home()]);
    let base = place.store.ensure(&image, &Progress::silent()).await.unwrap();
    let (overlay, work) = (dir.join("overlay"), dir.join("work"));
    let origins = [
        clone_seed(&base.overlay_seed(), &overlay, GROWN).unwrap(),
        clone_work_seed(&base.work_seed(), &work, GROWN).unwrap(),
    ];
    // The seeds are kept where the place is not.
    let kept = [dir.join("overlay-seed"), dir.join("work-seed")];
    std::fs::rename(base.overlay_seed(), &kept[0]).unwrap();
    std::fs::rename(base.work_seed(), &kept[1]).unwrap();
    kept.into_iter()
        .zip([overlay, work])
        .zip(origins)
        .map(|((seed, clone), origin)| (seed, clone, origin))
        .collect()
}

#[tokio::test]
async fn clones_share_their_blocks_where_the_file_system_can() {
    let test = "clones_share_their_blocks_where_the_file_system_can";
    if !can_run(test, &["mount", "mkfs.xfs", "filefrag", "mke2fs", "e2fsck"]) {
        return;
    }
    let disk = OnLoop::new("mkfs.xfs", &["-q", "-m", "reflink=1"], 320);
    for (seed, clone, origin) in grown_clones(disk.path()).await {
        assert_eq!(origin, DiskOrigin::Cloned(CloneKind::Reflink));
        assert_eq!(std::fs::metadata(&clone).unwrap().len(), GROWN.bytes());
        let before = disk_usage(&clone).unwrap();
        // Grown, all of it is still the seed's.
        let (pieces, shared) = extents(&clone);
        assert!(pieces > 0 && shared == pieces, "{shared} of {pieces} are shared");
        assert!(extents(&seed).1 >= shared, "with whom else?");
        e2fsck(&clone);
        // Small writes do not make more than themselves the clone's own.
        let file = std::fs::File::options().write(true).open(&clone).unwrap();
        for n in 0..16_u64 {
            file.write_all_at(&[1; 4096], n * (1 << 20)).unwrap();
        }
        file.sync_all().unwrap();
        let grown = disk_usage(&clone).unwrap().saturating_sub(before);
        assert!(grown <= 16 * 4096, "16 blocks took {grown} bytes");
    }
}

#[tokio::test]
async fn clones_are_sparse_copies_elsewhere() {
    let test = "clones_are_sparse_copies_elsewhere";
    if !can_run(test, &["mount", "mkfs.ext4", "filefrag", "mke2fs", "e2fsck"]) {
        return;
    }
    let memory = Mount::tmpfs(64 << 20);
    let ext4 = OnLoop::new("mkfs.ext4", &["-q"], 128);
    for dir in [memory.path(), ext4.path()] {
        for (seed, clone, origin) in grown_clones(dir).await {
            assert_eq!(origin, DiskOrigin::Cloned(CloneKind::SparseCopy));
            assert_eq!(std::fs::metadata(&clone).unwrap().len(), GROWN.bytes());
            let (of_seed, of_clone) = (disk_usage(&seed).unwrap(), disk_usage(&clone).unwrap());
            // As much as the seed, but for how the file system keeps its map.
            assert!(
                of_clone <= of_seed + (64 << 10) && of_clone < 1 << 20,
                "{} takes {of_clone}, its seed {of_seed}",
                clone.display()
            );
            e2fsck(&clone);
        }
    }
    // The map of what lies where, which memory has not.
    assert_eq!(extents(&ext4.path().join("work")).1, 0);
}
