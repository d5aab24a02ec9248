//! Trees on ext4 disks of their own: private roots, and the seeds of work disks.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use offshoot_model::{ByteSize, ErrorKind, Explain, Progress};
use offshoot_rootfs::copy::make_copy;
use offshoot_rootfs::seed::{DiskOrigin, SEED_SIZE, SeedError, clone_work_seed};
use offshoot_sys::space::disk_usage;

use crate::place::{Place, small};
use crate::support::{Mount, Tar, assert_same, can_run, e2fsck, list, whole_seconds};

/// A tree of some files, with a top folder that is not root's.
fn tree(dir: &Path, bytes: usize) -> std::path::PathBuf {
    let tree = dir.join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("file"), vec![7; bytes]).unwrap();
    std::fs::write(tree.join(".hidden"), "dot").unwrap();
    std::fs::hard_link(tree.join("file"), tree.join("other")).unwrap();
    std::fs::create_dir(tree.join("sub")).unwrap();
    std::os::unix::fs::symlink("/nowhere", tree.join("sub/link")).unwrap();
    chown(&tree, Some(70_000), Some(80_000)).unwrap();
    std::fs::set_permissions(&tree, std::fs::Permissions::from_mode(0o2711)).unwrap();
    tree
}

#[test]
fn a_copy_has_all_of_the_tree() {
    if !can_run(
        "a_copy_has_all_of_the_tree",
        &["mount", "mke2fs", "debugfs", "e2fsck"],
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = tree(dir.path(), 3 << 20);
    // From the smallest to one that is mostly holes.
    for mib in [16, 256, 20 << 10] {
        let disk = dir.path().join(format!("{mib}.ext4"));
        make_copy(&tree, &disk, ByteSize::from_mib(mib)).unwrap();
        e2fsck(&disk);
        assert_eq!(std::fs::metadata(&disk).unwrap().len(), mib << 20);
        assert!(
            disk_usage(&disk).unwrap() < 5 << 20,
            "{} bytes",
            disk_usage(&disk).unwrap()
        );
        let mount = Mount::ext4(&disk);
        // Without `lost+found`, and with the top folder's own owner and mode.
        assert_same(&whole_seconds(list(mount.path())), &whole_seconds(list(&tree)));
    }
}

#[test]
fn a_tree_of_many_small_files_gets_its_inodes() {
    if !can_run(
        "a_tree_of_many_small_files_gets_its_inodes",
        &["mke2fs", "e2fsck"],
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    for n in 0..6000 {
        std::fs::write(tree.join(n.to_string()), "").unwrap();
    }
    // mke2fs by itself would make 2,048.
    let disk = dir.path().join("disk");
    make_copy(&tree, &disk, ByteSize::from_mib(32)).unwrap();
    e2fsck(&disk);
}

#[test]
fn a_disk_that_is_too_small_is_refused_with_what_is_enough() {
    if !can_run(
        "a_disk_that_is_too_small_is_refused_with_what_is_enough",
        &["mke2fs"],
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = tree(dir.path(), 30 << 20);
    let disk = dir.path().join("disk");
    // Less than the content; and more, but not enough for what a file system needs besides.
    for mib in [8, 35] {
        let error = make_copy(&tree, &disk, ByteSize::from_mib(mib)).unwrap_err();
        let SeedError::TooSmall { needed, .. } = error else {
            panic!("{mib}: {error:?}")
        };
        assert_eq!(error.kind(), ErrorKind::InvalidRequest);
        assert!(error.hints()[0].contains("--disk"), "{:?}", error.hints());
        assert!(!disk.exists());
        make_copy(&tree, &disk, needed).unwrap();
        std::fs::remove_file(&disk).unwrap();
    }
}

#[test]
fn a_full_host_disk_is_known_for_what_it_is() {
    if !can_run("a_full_host_disk_is_known_for_what_it_is", &["mount", "mke2fs"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = tree(dir.path(), 30 << 20);
    // Seen before anything is written, and met while writing: the reserve is a twentieth.
    for mib in [20, 32] {
        let mount = Mount::tmpfs(mib << 20);
        let disk = mount.path().join("disk");
        let error = make_copy(&tree, &disk, ByteSize::from_mib(256)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{mib}: {error:?}");
        assert_eq!(std::fs::read_dir(mount.path()).unwrap().count(), 0);
    }
    assert!(make_copy(Path::new("/no/tree"), &dir.path().join("disk"), SEED_SIZE).is_err());
    assert!(!dir.path().join("disk").exists());
}

fn home() -> Tar {
    small()
        .raw(b'5', b"root", b"", b"", |header| {
            header.set_mode(0o750);
            header.set_uid(5);
            header.set_gid(70_000);
        })
        .file("root/.bashrc", "alias ll='ls -l'\n")
        .pax(&[("SCHILY.xattr.user.note", b"kept")])
        .raw(b'0', b"root/.ssh/key", b"", b"secret", |header| {
            header.set_mode(0o600);
        })
        .entry(b'1', "root/hard", "root/.bashrc", b"")
        .entry(b'2', "root/link", "/etc/motd", b"")
        .entry(b'6', "root/pipe", "", b"")
}

#[tokio::test]
async fn a_work_seed_has_what_the_image_has_in_root() {
    if !can_run(
        "a_work_seed_has_what_the_image_has_in_root",
        &["mount", "mke2fs", "debugfs", "e2fsck", "resize2fs"],
    ) {
        return;
    }
    let place = Place::new();
    let image = place.image(&[home()]);
    let base = place.store.ensure(&image, &Progress::silent()).await.unwrap();
    e2fsck(&base.work_seed());
    assert_eq!(base.manifest.work_seed.as_ref().unwrap().size, SEED_SIZE);
    let erofs = Mount::erofs(&base.root_erofs());
    let expected = whole_seconds(list(&erofs.path().join("root")));
    assert_eq!((expected.len(), expected[Path::new(".")].mode), (7, 0o040_750));
    assert_same(
        &whole_seconds(list(Mount::ext4(&base.work_seed()).path())),
        &expected,
    );
    for (name, mib, shrunk) in [
        ("larger", 20 << 10, false),
        ("smaller", 1 << 10, true),
        ("small", 64, true),
    ] {
        let disk = place.dir.path().join(name);
        let origin = clone_work_seed(&base.work_seed(), &disk, ByteSize::from_mib(mib)).unwrap();
        assert_eq!(
            matches!(origin, DiskOrigin::Shrunk(_)),
            shrunk,
            "{name}: {origin:?}"
        );
        assert_eq!(std::fs::metadata(&disk).unwrap().len(), mib << 20);
        e2fsck(&disk);
        assert_same(&whole_seconds(list(Mount::ext4(&disk).path())), &expected);
    }
    let disk = place.dir.path().join("tiny");
    assert!(clone_work_seed(&base.work_seed(), &disk, ByteSize::from_mib(1)).is_err());
    assert!(!disk.exists());
}

#[tokio::test]
async fn an_image_without_root_gets_an_empty_one() {
    if !can_run(
        "an_image_without_root_gets_an_empty_one",
        &["mount", "mke2fs", "e2fsck"],
    ) {
        return;
    }
    let place = Place::new();
    for tar in [small(), Tar::default().entry(b'2', "root", "d", b"").dir("d")] {
        let image = place.image(&[tar]);
        let base = place.store.ensure(&image, &Progress::silent()).await.unwrap();
        e2fsck(&base.work_seed());
        let mount = Mount::ext4(&base.work_seed());
        let metadata = std::fs::metadata(mount.path()).unwrap();
        assert_eq!(
            (metadata.mode(), metadata.uid(), metadata.gid()),
            (0o040_700, 0, 0)
        );
        assert_eq!(std::fs::read_dir(mount.path()).unwrap().count(), 0);
    }
}
