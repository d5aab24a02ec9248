//! Trees of bases on disk: what the kernel shows of the root, once, whole or not at all, and known when they change.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use offshoot_image::manifest::StoredImage;
use offshoot_model::{ErrorKind, Explain, Progress, ProgressEvent};
use offshoot_rootfs::base::{Base, TreeError, VerifyError};
use offshoot_rootfs::compare::{CompareError, compare};
use offshoot_rootfs::erofs::{ErofsImage, SpaceGuard};
use offshoot_rootfs::unpack::{UnpackError, UnpackWatch, Unpacked, unpack};
use offshoot_sys::lock::FileLock;
use offshoot_sys::space::disk_usage;

use crate::erofs::{every_kind, make};
use crate::place::{Place, large, small};
use crate::support::{Mount, Tar, assert_same, can_run, list};

fn unpack_to(image: &Path, into: &Path) -> Result<Unpacked, UnpackError> {
    let image = ErofsImage::open(image).unwrap();
    let watch = UnpackWatch {
        cancelled: &|| false,
        moved: &|_| (),
    };
    unpack(
        &image,
        image.root().unwrap(),
        into,
        SpaceGuard { reserve: 0 },
        watch,
    )
}

async fn prepared(place: &Place, tars: &[Tar]) -> (StoredImage, Base) {
    let image = place.image(tars);
    let base = place.store.ensure(&image, &Progress::silent()).await.unwrap();
    (image, base)
}

#[tokio::test]
async fn a_tree_is_what_the_kernel_shows_of_the_root() {
    if !can_run("a_tree_is_what_the_kernel_shows_of_the_root", &["mount"]) {
        return;
    }
    let place = Place::new();
    let mut sparse = vec![0; 40 << 20];
    sparse[20 << 20..][..5].copy_from_slice(b"start");
    // Set-id bits that a change of owner or a write takes away, if it comes later.
    let tar = every_kind(1000)
        .file("sparse", &sparse)
        .pax(&[(
            "SCHILY.xattr.security.capability",
            b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        )])
        .raw(b'0', b"bin/ping", b"", &[5; 100_000], |header| {
            header.set_mode(0o6755);
            header.set_uid(33);
        })
        .pax(&[("SCHILY.xattr.trusted.of-a-link", b"x")])
        .entry(b'2', "absolute", "/etc/passwd", b"")
        .dir("closed/inside")
        .raw(b'5', b"closed", b"", b"", |header| header.set_mode(0));
    let (_, base) = prepared(&place, &[tar]).await;
    let tree = place
        .store
        .ensure_tree(&base.id, &Progress::silent())
        .await
        .unwrap();
    assert_eq!(tree, base.tree());
    assert_eq!(tree, place.store.locate(&base.id).tree());
    let mount = Mount::erofs(&base.root_erofs());
    let shown = list(&tree);
    assert!(shown.len() > 25, "{}", shown.len());
    assert_same(&shown, &list(mount.path()));
    assert!(disk_usage(&tree.join("sparse")).unwrap() < 1 << 20);
    assert_eq!(place.names("tmp").len(), 0);
    let verified = place.store.verify(&base.id).unwrap();
    assert_eq!(verified.parts[3].path, tree);
    // Files with several names count once.
    assert!(verified.parts[3].bytes > (40 << 20) + 100_000);

    // It is there now: nothing is done again.
    let inode = std::fs::metadata(&tree).unwrap().ino();
    place
        .store
        .ensure_tree(&base.id, &Progress::silent())
        .await
        .unwrap();
    assert_eq!(std::fs::metadata(&tree).unwrap().ino(), inode);
    place.store.remove_tree(&base.id).unwrap();
    place.store.remove_tree(&base.id).unwrap();
    assert!(!tree.exists());
    assert_eq!(place.names("tmp").len(), 0);
    assert_eq!(place.store.verify(&base.id).unwrap().parts.len(), 3);
    place
        .store
        .ensure_tree(&base.id, &Progress::silent())
        .await
        .unwrap();
    place.store.remove(&base.id).unwrap();
    assert_eq!((place.names("bases").len(), place.names("tmp").len()), (0, 0));
    place.store.remove_tree(&base.id).unwrap();
    let error = place
        .store
        .ensure_tree(&base.id, &Progress::silent())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error:?}");
}

#[test]
fn what_a_file_system_cannot_keep_is_refused_by_name() {
    if !can_run(
        "what_a_file_system_cannot_keep_is_refused_by_name",
        &["mount", "mke2fs"],
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = make(dir.path(), &[every_kind(60_000).end()]);
    // ext4 keeps attributes of at most a block.
    let disk = dir.path().join("disk");
    offshoot_rootfs::seed::make_disk(&disk, offshoot_model::ByteSize::from_mib(64)).unwrap();
    let mount = Mount::ext4_writable(&disk);
    let error = unpack_to(&image, &mount.path().join("tree")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPossible, "{error:?}");
    assert_eq!(
        error.to_string(),
        "cannot store the attribute `user.a` of `with-attributes`"
    );
    assert!(error.hints()[0].contains("--root block"));
}

#[tokio::test]
async fn those_who_wait_for_a_tree_share_it() {
    let place = Place::new();
    let (image, base) = prepared(&place, &[large()]).await;
    let lock = FileLock::exclusive(&place.lock(&image)).unwrap();
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    let progress = Progress::new(move |event| drop(sender.send(event)));
    let tasks: Vec<_> = (0..5)
        .map(|_| {
            let (store, id, progress) = (place.store.clone(), base.id.clone(), progress.clone());
            tokio::spawn(async move { store.ensure_tree(&id, &progress).await })
        })
        .collect();
    drop(progress);
    // The first waits for the lock, the others for the first.
    for _ in 0..5 {
        let ProgressEvent::Message { text } = receiver.recv().await.unwrap() else {
            panic!()
        };
        let expected = format!(
            "waiting for another preparation of image {}",
            image.digest.short()
        );
        assert_eq!(text, expected);
    }
    assert!(tasks.iter().all(|task| !task.is_finished()));
    drop(lock);
    for task in tasks {
        assert_eq!(task.await.unwrap().unwrap(), base.tree());
    }
    let mut started = 0;
    while let Some(event) = receiver.recv().await {
        started += usize::from(matches!(event, ProgressEvent::Started { .. }));
    }
    assert_eq!(started, 1);
}

#[tokio::test]
async fn a_holder_that_is_killed_frees_the_lock() {
    if !can_run("a_holder_that_is_killed_frees_the_lock", &["flock", "sleep"]) {
        return;
    }
    let place = Place::new();
    let (image, base) = prepared(&place, &[small()]).await;
    let mut holder = Command::new("flock")
        .arg("--no-fork")
        .arg(place.lock(&image))
        .args(["sh", "-c", "echo held; exec sleep 600"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut held = [0; 5];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut held).unwrap();
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    let progress = Progress::new(move |event| drop(sender.send(event)));
    let task = tokio::spawn({
        let (store, id) = (place.store.clone(), base.id.clone());
        async move { store.ensure_tree(&id, &progress).await }
    });
    assert!(matches!(
        receiver.recv().await,
        Some(ProgressEvent::Message { .. })
    ));
    assert!(!task.is_finished());
    holder.kill().unwrap();
    holder.wait().unwrap();
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn nobody_waits_any_more_and_nothing_is_left() {
    let place = Place::new();
    let many = (0..3000).fold(Tar::default(), |tar, n| {
        tar.file(&format!("d{}/f{n}", n % 9), vec![1; 9000])
    });
    let (image, base) = prepared(&place, &[many]).await;
    let started = Arc::new(tokio::sync::Notify::new());
    let tell = started.clone();
    let progress = Progress::new(move |event| {
        if matches!(event, ProgressEvent::Moved { done: 256, .. }) {
            tell.notify_one();
        }
    });
    let task = tokio::spawn({
        let (store, id) = (place.store.clone(), base.id.clone());
        async move { store.ensure_tree(&id, &progress).await }
    });
    started.notified().await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    // The lock is free once the thread has cleaned up and gone.
    let lock = place.lock(&image);
    tokio::task::spawn_blocking(move || FileLock::exclusive(&lock).unwrap())
        .await
        .unwrap();
    assert_eq!(place.names("tmp"), Vec::<String>::new());
    assert!(!base.tree().exists());
}

#[tokio::test]
async fn a_tree_that_a_crash_left_is_none() {
    let place = Place::new();
    let (_, base) = prepared(&place, &[small()]).await;
    let left = place.dir.path().join("tmp/tree-0123456789abcdef/tree");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("a"), "half").unwrap();
    let tree = place
        .store
        .ensure_tree(&base.id, &Progress::silent())
        .await
        .unwrap();
    assert_eq!(std::fs::read(tree.join("a")).unwrap(), b"b");
    assert_eq!(
        offshoot_sys::durable::sweep(&place.dir.path().join("tmp")).unwrap(),
        1
    );
    place.store.verify(&base.id).unwrap();
}

#[tokio::test]
async fn a_full_disk_leaves_no_tree() {
    if !can_run("a_full_disk_leaves_no_tree", &["mount"]) {
        return;
    }
    // Room for the layer and the root of 32 MiB each, and not for as much again.
    let disk = Mount::tmpfs(90 << 20);
    let place = Place::on(
        disk.path(),
        offshoot_rootfs::base::BaseStoreConfig {
            guard: Some(SpaceGuard { reserve: 0 }),
            ..Default::default()
        },
    );
    let (_, base) = prepared(&place, &[large()]).await;
    let error = place
        .store
        .ensure_tree(&base.id, &Progress::silent())
        .await
        .unwrap_err();
    assert!(matches!(error, TreeError::Unpack { .. }), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
    assert!(!error.hints().is_empty());
    assert!(!base.tree().exists());
    assert_eq!(place.names("tmp").len(), 0);
    place.store.verify(&base.id).unwrap();
    // Met while writing, too, for there is no looking ahead below the store.
    let error = unpack_to(&base.root_erofs(), &disk.path().join("tree")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
}

#[test]
fn every_difference_is_found() {
    if !can_run("every_difference_is_found", &["mount"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tar = every_kind(100)
        .file("d/file", [3; 9000])
        .dir("d/sub")
        .file("zeros", [0; 9000]);
    let path = make(dir.path(), &[tar.end()]);
    let image = ErofsImage::open(&path).unwrap();
    let count = std::cell::Cell::new(0);
    let fresh = || {
        count.set(count.get() + 1);
        let tree = dir.path().join(format!("tree-{}", count.get()));
        unpack_to(&path, &tree).unwrap();
        tree
    };
    let check = |name: &str, expected: &str, change: &dyn Fn(&Path)| {
        let tree = fresh();
        // What is compared is not touched by comparing.
        compare(&image, &tree).unwrap();
        let at = tree.join(name);
        let parent = at.parent().unwrap().to_owned();
        let times = |path: &Path| std::fs::metadata(path).unwrap().modified().unwrap();
        let before = times(&parent);
        change(&at);
        // The folder's time would show that something was done in it; what was done shows, too.
        std::fs::File::open(&parent)
            .unwrap()
            .set_modified(before)
            .unwrap();
        match compare(&image, &tree).unwrap_err() {
            CompareError::Differs { path, what } => {
                assert_eq!((path.as_path(), what), (Path::new(name), expected));
            }
            other => panic!("{name}: {other:?}"),
        }
    };
    let poke = |path: &Path, at: u64, byte: u8| {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        let time = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(&[byte], at).unwrap();
        file.set_modified(time).unwrap();
    };
    check("d/file", "its content", &|path| poke(path, 8999, 4));
    check("zeros", "its content", &|path| poke(path, 5000, 4));
    check("d/file", "its size", &|path| {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        let time = file.metadata().unwrap().modified().unwrap();
        file.set_len(9001).unwrap();
        file.set_modified(time).unwrap();
    });
    check("d/file", "its time", &|path| {
        std::fs::File::open(path)
            .unwrap()
            .set_modified(std::time::UNIX_EPOCH)
            .unwrap();
    });
    check("d/file", "its owner", &|path| {
        lchown(path, Some(1), None).unwrap();
    });
    check("link", "its owner", &|path| lchown(path, None, Some(1)).unwrap());
    check("d/file", "its mode", &|path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o4644)).unwrap();
    });
    check("d/file", "it is gone", &|path| {
        std::fs::remove_file(path).unwrap();
    });
    check("d/sub", "it is gone", &|path| std::fs::remove_dir(path).unwrap());
    check("d", "it has more names", &|path| {
        let time = std::fs::metadata(path).unwrap().modified().unwrap();
        std::fs::write(path.join("more"), "").unwrap();
        std::fs::File::open(path).unwrap().set_modified(time).unwrap();
    });
    check("fifo", "it is something else", &|path| {
        std::fs::remove_file(path).unwrap();
        std::fs::write(path, "").unwrap();
    });
    check("d/sub", "it is no folder any more", &|path| {
        std::fs::remove_dir(path).unwrap();
        symlink(path.parent().unwrap(), path).unwrap();
    });
    check("link", "its time", &|path| {
        std::fs::remove_file(path).unwrap();
        symlink("/target", path).unwrap();
    });
    check("old", "it has another number of names", &|path| {
        std::fs::remove_file(path.parent().unwrap().join("d/other-old")).unwrap();
    });
    check("d/file", "it has another attribute", &|path| {
        rustix::fs::lsetxattr(path, "user.new", b"", rustix::fs::XattrFlags::empty()).unwrap();
    });
    check("with-attributes", "one of its attributes", &|path| {
        rustix::fs::lsetxattr(path, "trusted.t", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    });
    check("with-attributes", "one of its attributes", &|path| {
        rustix::fs::lremovexattr(path, "security.capability").unwrap();
    });
    assert!(compare(&image, &dir.path().join("none")).is_err());
}

#[tokio::test]
async fn a_changed_tree_is_found_by_verifying_the_base() {
    let place = Place::new();
    let (_, base) = prepared(&place, &[small()]).await;
    let tree = place
        .store
        .ensure_tree(&base.id, &Progress::silent())
        .await
        .unwrap();
    std::fs::write(tree.join("a"), "c").unwrap();
    let error = place.store.verify(&base.id).unwrap_err();
    let VerifyError::Tree { path, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(
        (path, error.kind()),
        (&PathBuf::from(&tree), ErrorKind::BadContent)
    );
    assert!(error.hints()[0].contains("--force"));
}
