//! A store of bases with a folder of its own, small images for it, and what is heard while it works.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use offshoot_image::manifest::StoredImage;
use offshoot_model::{Progress, ProgressEvent};
use offshoot_rootfs::base::{BaseStore, BaseStoreConfig, base_id};
use offshoot_store::blobs::BlobStore;

use crate::support::{Tar, store_image};

pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) blobs: BlobStore,
    pub(crate) store: BaseStore,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::with(BaseStoreConfig::default())
    }

    pub(crate) fn with(config: BaseStoreConfig) -> Self {
        Self::on(&std::env::temp_dir(), config)
    }

    pub(crate) fn on(disk: &Path, config: BaseStoreConfig) -> Self {
        let dir = tempfile::tempdir_in(disk).unwrap();
        let blobs = BlobStore::open(dir.path()).unwrap();
        let store = BaseStore::open_with(dir.path(), blobs.clone(), config).unwrap();
        Self { dir, blobs, store }
    }

    pub(crate) fn image(&self, tars: &[Tar]) -> StoredImage {
        let tars: Vec<_> = tars.iter().map(|tar| tar.clone().end()).collect();
        store_image(&self.blobs, &tars)
    }

    /// The lock file of the base of an image.
    pub(crate) fn lock(&self, image: &StoredImage) -> PathBuf {
        self.dir
            .path()
            .join(format!("locks/base-{}.lock", base_id(&image.digest)))
    }

    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.dir.path().join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

pub(crate) fn small() -> Tar {
    Tar::default().file("a", "b").dir("d")
}

/// A layer that takes a while.
pub(crate) fn large() -> Tar {
    (0..16_u8).fold(Tar::default(), |tar, n| {
        tar.file(&format!("f{n}"), vec![n; 2 << 20])
    })
}

/// Progress that remembers what it heard.
pub(crate) fn recorder() -> (Progress, Arc<Mutex<Vec<ProgressEvent>>>) {
    let events = Arc::new(Mutex::new(Vec::new()));
    let heard = events.clone();
    (
        Progress::new(move |event| heard.lock().unwrap().push(event)),
        events,
    )
}

pub(crate) fn labels(events: &Mutex<Vec<ProgressEvent>>) -> Vec<String> {
    let label = |event: &ProgressEvent| match event {
        ProgressEvent::Started { label, .. } => Some(label.clone()),
        ProgressEvent::Message { text } => Some(text.clone()),
        _ => None,
    };
    events.lock().unwrap().iter().filter_map(label).collect()
}

pub(crate) async fn futures_of<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
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
