//! The store of bases: once, whole or not at all.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

use offshoot_image::layer::Limits;
use offshoot_image::manifest::StoredImage;
use offshoot_model::{ByteSize, ErrorKind, Explain, Progress, ProgressEvent};
use offshoot_rootfs::base::{BaseError, BaseStore, BaseStoreConfig, PrepareError, VerifyError, base_id};
use offshoot_rootfs::erofs::SpaceGuard;
use offshoot_store::blobs::BlobStore;
use offshoot_sys::lock::FileLock;

use crate::support::{Mount, Tar, can_run, store_image};

struct Place {
    dir: tempfile::TempDir,
    blobs: BlobStore,
    store: BaseStore,
}

impl Place {
    fn new() -> Self {
        Self::with(BaseStoreConfig::default())
    }

    fn with(config: BaseStoreConfig) -> Self {
        Self::on(&std::env::temp_dir(), config)
    }

    fn on(disk: &Path, config: BaseStoreConfig) -> Self {
        let dir = tempfile::tempdir_in(disk).unwrap();
        let blobs = BlobStore::open(dir.path()).unwrap();
        let store = BaseStore::open_with(dir.path(), blobs.clone(), config).unwrap();
        Self { dir, blobs, store }
    }

    fn image(&self, tars: &[Tar]) -> StoredImage {
        let tars: Vec<_> = tars.iter().map(|tar| tar.clone().end()).collect();
        store_image(&self.blobs, &tars)
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.dir.path().join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn small() -> Tar {
    Tar::default().file("a", "b").dir("d")
}

/// A layer that takes a while.
fn large() -> Tar {
    (0..16_u8).fold(Tar::default(), |tar, n| {
        tar.file(&format!("f{n}"), vec![n; 2 << 20])
    })
}

/// Progress that remembers what it heard.
fn recorder() -> (Progress, Arc<Mutex<Vec<ProgressEvent>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let heard = events.clone();
    (
        Progress::new(move |event| heard.lock().unwrap().push(event)),
        events,
    )
}

fn labels(events: &Mutex<Vec<ProgressEvent>>) -> Vec<String> {
    let label = |event: &ProgressEvent| match event {
        ProgressEvent::Started { label, .. } => Some(label.clone()),
        ProgressEvent::Message { text } => Some(text.clone()),
        _ => None,
    };
    events.lock().unwrap().iter().filter_map(label).collect()
}

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
        ["base.json", "overlay-seed.ext4", "root.erofs"]
    );
    assert_eq!(place.names("tmp"), Vec::<String>::new());
    for file in [base.root_erofs(), base.overlay_seed()] {
        assert_eq!(
            std::fs::metadata(file).unwrap().permissions().mode() & 0o777,
            0o444
        );
    }
    assert_eq!(base.manifest.image, image.digest);
    assert_eq!(base.manifest.root.inodes, 4);
    assert_eq!(base.manifest.overlay_seed.size, ByteSize::from_mib(10 << 10));
    assert!(
        base.manifest.overlay_seed.writer.starts_with("mke2fs 1."),
        "{:?}",
        base.manifest
    );
    assert_eq!(
        base.manifest.root.sha256,
        crate::support::sha256(&std::fs::read(base.root_erofs()).unwrap())
    );
    place.store.verify(&base.id).unwrap();

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

async fn futures_of<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
    count: usize,
    make: impl Fn() -> F,
) -> Vec<T> {
    let tasks: Vec<_> = (0..count).map(|_| tokio::spawn(make())).collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.unwrap());
    }
    results
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
    let lock = place
        .dir
        .path()
        .join(format!("locks/base-{}.lock", base_id(&image.digest)));
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
    let lock = FileLock::exclusive(
        &place
            .dir
            .path()
            .join(format!("locks/base-{}.lock", base_id(&image.digest))),
    )
    .unwrap();
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
    let break_it: [&dyn Fn(&Path); 5] = [
        &|dir| std::fs::remove_file(dir.join("overlay-seed.ext4")).unwrap(),
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
        place.store.ensure(&image, &Progress::silent()).await.unwrap();
        place.store.verify(&base.id).unwrap();
        assert_eq!(place.names("tmp").len(), 0);
    }
    // What only reading shows, verifying shows.
    let root = std::fs::OpenOptions::new()
        .write(true)
        .open(base.root_erofs())
        .unwrap();
    root.write_all_at(b"x", 5000).unwrap();
    assert!(matches!(
        place.store.verify(&base.id),
        Err(VerifyError::Damaged { .. })
    ));
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
        let place = Place::with(BaseStoreConfig { limits, guard: None });
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
    assert_eq!(offshoot_sys::space::available(disk.path()).unwrap(), before);
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
