//! The store of bases: once, whole or not at all.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use offshoot_image::layer::Limits;
use offshoot_image::manifest::StoredImage;
use offshoot_model::{ByteSize, ErrorKind, Explain, Progress, ProgressEvent};
use offshoot_rootfs::base::{Base, BaseError, BaseStoreConfig, PrepareError, VerifyError, base_id};
use offshoot_rootfs::erofs::SpaceGuard;
use offshoot_sys::lock::FileLock;

use crate::place::{Place, futures_of, labels, large, recorder, small};
use crate::support::{Mount, Tar, can_run};

#[tokio::test]
async fn a_base_is_made_once() {
    let place = Place::new();
    let image = place.image(&[small(), Tar::default().file("c", "d")]);
    let (progress, events) = recorder();
    let base = place.store.ensure(&image, &progress).await.unwrap();
    let shorts: Vec<_> = image
        .layers
        .iter()
        .map(|layer| format!("unpacking {}", layer.digest.short()))
        .collect();
    assert_eq!(
        labels(&events),
        [shorts[0].as_str(), &shorts[1], "writing root.erofs"]
    );
    assert_eq!(base.id, base_id(&image.digest));
    assert_eq!(place.names("bases"), [base.id.as_str()]);
    assert_eq!(
        place.names(&format!("bases/{}", base.id)),
        ["base.json", "overlay-seed.ext4", "root.erofs", "work-seed.ext4"]
    );
    assert_eq!(place.names("tmp"), Vec::<String>::new());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    for name in place.names(&format!("bases/{}", base.id)) {
        assert_eq!(mode(&base.dir.join(&name)), 0o444, "{name}");
    }
    assert_eq!(mode(&base.dir), 0o555);
    assert_eq!(base.manifest.image, image.digest);
    assert_eq!(base.manifest.root.inodes, 4);
    assert!(base.manifest.is_current() && base.lacks().is_empty());
    let seeds = [&base.manifest.overlay_seed, &base.manifest.work_seed].map(|seed| seed.as_ref().unwrap());
    for seed in seeds {
        assert_eq!(seed.size, ByteSize::from_mib(10 << 10));
        assert!(seed.writer.starts_with("mke2fs 1."), "{seed:?}");
        assert!(seed.allocated < ByteSize::from_bytes(300 << 10), "{seed:?}");
    }
    assert_ne!(seeds[0].blocks_sha256, seeds[1].blocks_sha256);
    assert_eq!(
        base.manifest.root.sha256,
        crate::support::sha256(&std::fs::read(base.root_erofs()).unwrap())
    );
    let verified = place.store.verify(&base.id).unwrap();
    let paths: Vec<_> = verified.parts.iter().map(|part| part.path.clone()).collect();
    assert_eq!(paths, [base.root_erofs(), base.overlay_seed(), base.work_seed()]);
    assert_eq!(verified.parts[0].bytes, base.manifest.root.size.bytes());

    let (progress, events) = recorder();
    let again = place.store.ensure(&image, &progress).await.unwrap();
    assert_eq!(
        (again.id.clone(), again.manifest),
        (base.id.clone(), base.manifest)
    );
    assert_eq!(labels(&events), Vec::<String>::new());
    assert_eq!(place.store.list().unwrap().len(), 1);

    place.store.remove(&base.id).unwrap();
    place.store.remove(&base.id).unwrap();
    assert_eq!((place.names("bases").len(), place.names("tmp").len()), (0, 0));
    assert!(matches!(
        place.store.get(&base.id),
        Err(BaseError::NotFound { .. })
    ));
}

#[tokio::test]
async fn those_who_wait_share_the_result() {
    let place = Place::new();
    let image = place.image(&[large()]);
    let (progress, events) = recorder();
    let all = futures_of(6, || {
        let (store, image, progress) = (place.store.clone(), image.clone(), progress.clone());
        async move { store.ensure(&image, &progress).await }
    })
    .await;
    assert!(all.iter().all(Result::is_ok), "{all:?}");
    let labels = labels(&events);
    assert_eq!(
        labels.iter().filter(|label| label.starts_with("writing")).count(),
        1,
        "{labels:?}"
    );
    assert_eq!(
        labels
            .iter()
            .filter(|label| label.starts_with("waiting for another preparation"))
            .count(),
        5,
        "{labels:?}"
    );
}

#[tokio::test]
async fn those_who_wait_share_the_error() {
    let place = Place::new();
    let image = place.image(&[large().file("../out", "")]);
    let all = futures_of(3, || {
        let (store, image) = (place.store.clone(), image.clone());
        async move { store.ensure(&image, &Progress::silent()).await }
    })
    .await;
    for result in all {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadContent);
        let PrepareError::Layer { source, .. } = &error else {
            panic!("{error:?}")
        };
        assert!(
            source.to_string().starts_with("cannot unpack `../out` of layer "),
            "{source}"
        );
    }
    assert_eq!((place.names("bases").len(), place.names("tmp").len()), (0, 0));
}

#[tokio::test]
async fn dropping_the_last_who_waits_stops_the_work() {
    let place = Place::new();
    let image = place.image(&[large()]);
    let started = Arc::new(tokio::sync::Notify::new());
    let tell = started.clone();
    let progress = Progress::new(move |event| {
        if matches!(event, ProgressEvent::Moved { .. }) {
            tell.notify_one();
        }
    });
    let task = tokio::spawn({
        let (store, image) = (place.store.clone(), image.clone());
        async move { store.ensure(&image, &progress).await.map(|_| ()) }
    });
    started.notified().await;
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    // The lock is free once the thread has cleaned up and gone.
    let lock = place.lock(&image);
    tokio::task::spawn_blocking(move || FileLock::exclusive(&lock).unwrap())
        .await
        .unwrap();
    assert_eq!((place.names("bases").len(), place.names("tmp").len()), (0, 0));
    place.store.ensure(&image, &Progress::silent()).await.unwrap();
}

#[tokio::test]
async fn another_process_is_waited_for() {
    let place = Place::new();
    let image = place.image(&[small()]);
    let lock = FileLock::exclusive(&place.lock(&image)).unwrap();
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    let progress = Progress::new(move |event| drop(sender.send(event)));
    let task = tokio::spawn({
        let (store, image) = (place.store.clone(), image.clone());
        async move { store.ensure(&image, &progress).await }
    });
    let ProgressEvent::Message { text } = receiver.recv().await.unwrap() else {
        panic!()
    };
    assert!(
        text.starts_with("waiting for another preparation of image "),
        "{text}"
    );
    assert!(!task.is_finished());
    drop(lock);
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_damaged_is_made_again() {
    let place = Place::new();
    let image = place.image(&[small()]);
    let base = place.store.ensure(&image, &Progress::silent()).await.unwrap();
    let break_it: [&dyn Fn(&Path); 6] = [
        &|dir| std::fs::remove_file(dir.join("overlay-seed.ext4")).unwrap(),
        &|dir| std::fs::remove_file(dir.join("work-seed.ext4")).unwrap(),
        &|dir| {
            std::fs::OpenOptions::new()
                .write(true)
                .open(dir.join("root.erofs"))
                .unwrap()
                .set_len(5)
                .unwrap();
        },
        &|dir| std::fs::write(dir.join("base.json"), "{").unwrap(),
        &|dir| std::fs::write(dir.join("base.json"), vec![b' '; 100_000]).unwrap(),
        &|dir| {
            std::fs::remove_dir_all(dir).unwrap();
            std::fs::create_dir(dir).unwrap();
        },
    ];
    for damage in break_it {
        damage(&base.dir);
        assert!(matches!(
            place.store.get(&base.id),
            Err(BaseError::Damaged { .. })
        ));
        assert_eq!(place.store.list().unwrap().len(), 0);
        assert_eq!(place.store.ids().unwrap(), std::slice::from_ref(&base.id));
        place.store.ensure(&image, &Progress::silent()).await.unwrap();
        place.store.verify(&base.id).unwrap();
        assert_eq!(place.names("tmp").len(), 0);
    }
    // What only reading shows, verifying shows.
    for path in [base.work_seed(), base.overlay_seed(), base.root_erofs()] {
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"x", 5000).unwrap();
        match place.store.verify(&base.id).unwrap_err() {
            VerifyError::Damaged { path: found } => assert_eq!(found, path),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_rebuilt_base_is_new_and_who_has_the_old_one_open_keeps_it() {
    let place = Place::new();
    let image = place.image(&[small()]);
    let base = place.store.ensure(&image, &Progress::silent()).await.unwrap();
    place
        .store
        .ensure_tree(&base.id, &Progress::silent())
        .await
        .unwrap();
    let held = std::fs::File::open(base.root_erofs()).unwrap();
    let damaged = std::fs::OpenOptions::new()
        .write(true)
        .open(base.root_erofs())
        .unwrap();
    damaged.write_all_at(b"x", 5000).unwrap();
    // It looks whole, and only rebuilding mends it.
    place.store.ensure(&image, &Progress::silent()).await.unwrap();
    assert!(place.store.verify(&base.id).is_err());
    let (progress, events) = recorder();
    let rebuilt = place.store.rebuild(&image, &progress).await.unwrap();
    assert!(
        labels(&events).contains(&"writing root.erofs".to_owned()),
        "{events:?}"
    );
    assert_eq!(rebuilt.manifest.root, base.manifest.root);
    // The root is the same bytes again; mke2fs gives every seed an id of its own.
    let hash_of = |base: &Base| base.manifest.overlay_seed.as_ref().unwrap().blocks_sha256;
    assert_ne!(hash_of(&rebuilt), hash_of(&base));
    assert_eq!(place.store.verify(&base.id).unwrap().parts.len(), 3);
    assert!(!base.tree().exists());
    assert_eq!(place.names("tmp").len(), 0);
    let mut byte = [0];
    held.read_exact_at(&mut byte, 5000).unwrap();
    assert_eq!(&byte, b"x");
    // Where there is none, it is prepared.
    place.store.remove(&base.id).unwrap();
    place.store.rebuild(&image, &Progress::silent()).await.unwrap();
    place.store.verify(&base.id).unwrap();
}

async fn check_refused(place: &Place, image: &StoredImage, expected: &str) {
    let error = place.store.ensure(image, &Progress::silent()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains(expected), "{cause}");
    assert!(!error.hints().is_empty());
    assert_eq!((place.names("bases").len(), place.names("tmp").len()), (0, 0));
}

#[tokio::test]
async fn an_image_beyond_the_limits_is_refused() {
    let entries = Limits {
        entries: 1,
        ..Limits::default()
    };
    let bytes = Limits {
        bytes: ByteSize::from_mib(1),
        ..Limits::default()
    };
    for (limits, expected) in [
        (entries, "more than 1 entries"),
        (bytes, "more than 1MiB unpacked"),
    ] {
        let place = Place::with(BaseStoreConfig {
            limits,
            ..BaseStoreConfig::default()
        });
        let image = place.image(&[large()]);
        check_refused(&place, &image, expected).await;
    }
}

#[tokio::test]
async fn a_disk_is_never_filled() {
    if !can_run("a_disk_is_never_filled", &["mount"]) {
        return;
    }
    // Its own small disk: the room on the host's changes while the test looks.
    let disk = Mount::tmpfs(100 << 20);
    let place = Place::on(disk.path(), BaseStoreConfig::default());
    let image = place.image(&[large(), Tar::default().file("more", vec![1; 20 << 20])]);
    let before = offshoot_sys::space::available(disk.path()).unwrap();
    check_refused(&place, &image, "cannot store").await;
    // A program that another test starts just now holds our files open until it is executed.
    let began = std::time::Instant::now();
    while offshoot_sys::space::available(disk.path()).unwrap() != before {
        assert!(
            began.elapsed().as_secs() < 20,
            "what was written is not given back"
        );
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    // A guard of one's own is heeded.
    let place = Place::on(
        disk.path(),
        BaseStoreConfig {
            guard: Some(SpaceGuard { reserve: 90 << 20 }),
            ..BaseStoreConfig::default()
        },
    );
    let image = place.image(&[small()]);
    let error = place.store.ensure(&image, &Progress::silent()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
}

#[tokio::test]
async fn a_missing_blob_is_named() {
    let place = Place::new();
    let image = place.image(&[small()]);
    place.blobs.remove(&image.layers[0].digest).unwrap();
    let error = place.store.ensure(&image, &Progress::silent()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(!error.hints().is_empty());
}
