//! The blobs of all images: files named after the SHA-256 of what is in them.
//!
//! ```text
//! <data>/blobs/sha256/<hex>     whole, checked, never changed; readable as the blobs of an OCI image layout
//! <data>/downloads/<hex>        partly fetched blobs, kept when a pull breaks, so that the next one goes on
//! <data>/tmp/blob-<random>      being written; removed when its writer is dropped, swept at start
//! ```
//!
//! A blob is published by writing elsewhere, fsync of the file, rename, fsync of the folder. What a blob means (manifest,
//! config, layer), and which ones are still needed, is not known here.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use offshoot_model::{Digest, ErrorKind, Explain};
use offshoot_sys::durable::fsync_dir;
use sha2::{Digest as _, Sha256};

/// How much is read at once when a file is hashed: large enough that system calls do not show, small enough for a cache.
const READ_SIZE: usize = 256 << 10;

/// Why a blob cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// There is no such blob.
    #[error("blob {digest} is not in the store")]
    NotFound {
        /// The blob.
        digest: Digest,
    },
    /// What was written is not what was promised.
    #[error("content does not match its digest: expected {expected}, got {actual}")]
    Mismatch {
        /// What it should have been.
        expected: Digest,
        /// What it is.
        actual: Digest,
    },
    /// What lies on disk is no longer what was stored.
    #[error("blob {digest} is damaged on disk")]
    Damaged {
        /// The blob.
        digest: Digest,
        /// Its file.
        path: PathBuf,
    },
    /// A blob that is read into memory is larger than such a blob may be.
    #[error("blob {digest} has {size} bytes: at most {limit} are read")]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
        /// The most.
        limit: u64,
    },
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
}

impl BlobError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

impl Explain for BlobError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Mismatch { .. } | Self::Damaged { .. } | Self::TooLarge { .. } => ErrorKind::BadContent,
            Self::Io { source, .. } if is_no_space(source) => ErrorKind::NoSpace,
            Self::Io { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::NotFound { .. } => {
                vec!["run `offshoot image pull` or `offshoot image import` again".into()]
            }
            Self::Damaged { path, .. } => {
                vec![format!(
                    "remove {} and run `offshoot image pull` or `offshoot image import` again",
                    path.display()
                )]
            }
            Self::Io { source, path, .. } if is_no_space(source) => {
                vec![format!(
                    "remove VMs and images with `offshoot rm` and `offshoot image rm`, or make room on the disk of {}",
                    path.display()
                )]
            }
            _ => Vec::new(),
        }
    }
}

fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// The store's folders. Cheap to clone; any number of threads and processes may use one store at once.
#[derive(Clone, Debug)]
pub struct BlobStore {
    places: Arc<Places>,
}

#[derive(Debug)]
struct Places {
    blobs: PathBuf,
    downloads: PathBuf,
    tmp: PathBuf,
}

impl BlobStore {
    /// Opens the store below `data_dir` and makes its folders (mode 0700) where they are missing.
    pub fn open(data_dir: &Path) -> Result<Self, BlobError> {
        let places = Places {
            blobs: data_dir.join("blobs/sha256"),
            downloads: data_dir.join("downloads"),
            tmp: data_dir.join("tmp"),
        };
        for dir in [&places.blobs, &places.downloads, &places.tmp] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(BlobError::io("create", dir))?;
        }
        Ok(Self {
            places: Arc::new(places),
        })
    }

    /// Where unpublished work lies, on the blobs' own file system.
    pub fn tmp_dir(&self) -> &Path {
        &self.places.tmp
    }

    /// Whether the blob is there, whole.
    pub fn contains(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Where the blob lies, or would lie.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.places.blobs.join(digest.hex())
    }

    /// Opens the blob for reading. Its content is not checked again.
    pub fn open_blob(&self, digest: &Digest) -> Result<File, BlobError> {
        let path = self.path(digest);
        File::open(&path).map_err(|source| Self::read_error(digest, path, "open", source))
    }

    /// The blob's size in bytes.
    pub fn size(&self, digest: &Digest) -> Result<u64, BlobError> {
        let path = self.path(digest);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(source) => Err(Self::read_error(digest, path, "look at", source)),
        }
    }

    /// Reads a whole blob of at most `limit` bytes and checks it: for manifests and configs.
    pub fn read_small(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, BlobError> {
        let file = self.open_blob(digest)?;
        let path = self.path(digest);
        let size = file.metadata().map_err(BlobError::io("look at", &path))?.len();
        if size > limit {
            return Err(BlobError::TooLarge {
                digest: *digest,
                size,
                limit,
            });
        }
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
        file.take(limit)
            .read_to_end(&mut bytes)
            .map_err(BlobError::io("read", &path))?;
        if hash_of(&bytes) != *digest {
            return Err(BlobError::Damaged {
                digest: *digest,
                path,
            });
        }
        Ok(bytes)
    }

    /// Reads the blob from end to end and compares it with its name.
    pub fn verify(&self, digest: &Digest) -> Result<(), BlobError> {
        self.verify_watched(digest, &mut |_| true).map(drop)
    }

    /// As [`verify`](Self::verify), telling `moved` after each piece how far it is. Gives the number of bytes, or `None`
    /// if `moved` says to stop.
    pub fn verify_watched(
        &self,
        digest: &Digest,
        moved: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<u64>, BlobError> {
        let path = self.path(digest);
        let mut hasher = Sha256::new();
        let mut file = self.open_blob(digest)?;
        let read = hash_watched(&mut file, &mut hasher, moved).map_err(BlobError::io("read", &path))?;
        if read.is_some() && finish(hasher) != *digest {
            return Err(BlobError::Damaged {
                digest: *digest,
                path,
            });
        }
        Ok(read)
    }

    fn read_error(digest: &Digest, path: PathBuf, action: &'static str, source: io::Error) -> BlobError {
        if source.kind() == io::ErrorKind::NotFound {
            return BlobError::NotFound { digest: *digest };
        }
        BlobError::Io { action, path, source }
    }

    /// Begins a blob whose digest need not be known yet.
    pub fn writer(&self) -> Result<BlobWriter, BlobError> {
        let random =
            offshoot_sys::random::bytes().map_err(BlobError::io("draw a name in", &self.places.tmp))?;
        let path = self
            .places
            .tmp
            .join(format!("blob-{:016x}", u64::from_ne_bytes(random)));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(BlobError::io("create", &path))?;
        Ok(BlobWriter {
            store: self.clone(),
            file,
            path,
            hasher: Sha256::new(),
            written: 0,
        })
    }

    /// Keeps `bytes` as a blob: for manifests and configs we make ourselves.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest, BlobError> {
        let mut writer = self.writer()?;
        let path = writer.path.clone();
        writer.write_all(bytes).map_err(BlobError::io("write", &path))?;
        Ok(writer.commit(None)?.0)
    }

    /// Begins or goes on with the download of a blob; `None` while somebody else downloads it.
    ///
    /// Reads and hashes what is there already, so it blocks for about a second per GiB.
    pub fn download(&self, digest: &Digest) -> Result<Option<BlobDownload>, BlobError> {
        let path = self.places.downloads.join(digest.hex());
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .map_err(BlobError::io("open", &path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => return Ok(None),
                Err(fs::TryLockError::Error(source)) => {
                    return Err(BlobError::Io {
                        action: "lock",
                        path,
                        source,
                    });
                }
            }
            // Whoever held the lock before may have published or removed the file that we have open.
            let ours = file.metadata().map_err(BlobError::io("look at", &path))?.ino();
            if !fs::metadata(&path).is_ok_and(|named| named.ino() == ours) {
                continue;
            }
            let mut hasher = Sha256::new();
            let written = hash_file(&mut file, &mut hasher).map_err(BlobError::io("read", &path))?;
            return Ok(Some(BlobDownload {
                store: self.clone(),
                file,
                path,
                digest: *digest,
                hasher,
                written,
            }));
        }
    }

    /// Removes downloads that nobody is working on and that were last written longer than `age` ago; gives their number.
    pub fn sweep_downloads(&self, age: Duration) -> Result<usize, BlobError> {
        let dir = &self.places.downloads;
        let mut removed = 0;
        for entry in fs::read_dir(dir).map_err(BlobError::io("list", dir))? {
            let path = entry.map_err(BlobError::io("list", dir))?.path();
            let Ok(file) = File::open(&path) else { continue };
            let modified = file
                .metadata()
                .and_then(|m| m.modified())
                .map_err(BlobError::io("look at", &path))?;
            let old = SystemTime::now()
                .duration_since(modified)
                .is_ok_and(|since| since >= age);
            if old && file.try_lock().is_ok() {
                fs::remove_file(&path).map_err(BlobError::io("remove", &path))?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Every download that was begun and is not whole, also one that somebody works on, in the order of their digests.
    pub fn downloads(&self) -> Result<Vec<PartialDownload>, BlobError> {
        let dir = &self.places.downloads;
        let mut downloads = Vec::new();
        for entry in fs::read_dir(dir).map_err(BlobError::io("list", dir))? {
            let entry = entry.map_err(BlobError::io("list", dir))?;
            let Some(digest) = digest_of(&entry.file_name()) else {
                continue;
            };
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                // Finished since the folder was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => {
                    return Err(BlobError::Io {
                        action: "look at",
                        path: entry.path(),
                        source,
                    });
                }
            };
            downloads.push(PartialDownload {
                digest,
                bytes: metadata.len(),
                modified: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            });
        }
        downloads.sort_by_key(|download| download.digest);
        Ok(downloads)
    }

    /// Removes what has come of a download, unless somebody works on it. Says whether it went.
    pub fn remove_download(&self, digest: &Digest) -> Result<bool, BlobError> {
        let path = self.places.downloads.join(digest.hex());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => {
                return Err(BlobError::Io {
                    action: "open",
                    path,
                    source,
                });
            }
        };
        if file.try_lock().is_err() {
            return Ok(false);
        }
        fs::remove_file(&path).map_err(BlobError::io("remove", &path))?;
        Ok(true)
    }

    /// Removes the blob; it is no error if there is none. Whoever has it open reads on.
    pub fn remove(&self, digest: &Digest) -> Result<(), BlobError> {
        let path = self.path(digest);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(BlobError::Io {
                action: "remove",
                path,
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Every blob with its size, in the order of their digests. Files of other names are passed over.
    pub fn list(&self) -> Result<Vec<(Digest, u64)>, BlobError> {
        let dir = &self.places.blobs;
        let mut blobs = Vec::new();
        for entry in fs::read_dir(dir).map_err(BlobError::io("list", dir))? {
            let entry = entry.map_err(BlobError::io("list", dir))?;
            let name = entry.file_name();
            let Some(digest) = digest_of(&name) else {
                continue;
            };
            match entry.metadata() {
                Ok(metadata) if metadata.is_file() => blobs.push((digest, metadata.len())),
                // Removed since the folder was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    return Err(BlobError::Io {
                        action: "look at",
                        path: entry.path(),
                        source,
                    });
                }
                Ok(_) => {}
            }
        }
        blobs.sort_unstable();
        Ok(blobs)
    }

    /// Moves a complete file of known content into place, durably.
    fn publish(&self, file: &File, path: &Path, digest: &Digest, size: u64) -> Result<(), BlobError> {
        let place = self.path(digest);
        // The same content is there and durable already: spare the fsync, which is the dearest step of an import. A file of
        // another size is what a damaged disk left, and is replaced.
        if fs::metadata(&place).is_ok_and(|there| there.is_file() && there.len() == size) {
            return fs::remove_file(path).map_err(BlobError::io("remove", path));
        }
        file.sync_all().map_err(BlobError::io("write", path))?;
        fs::rename(path, &place).map_err(BlobError::io("publish", &place))?;
        fsync_dir(&self.places.blobs).map_err(BlobError::io("write", &self.places.blobs))
    }
}

/// What has come of a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialDownload {
    /// The blob that it shall be.
    pub digest: Digest,
    /// Bytes that are there.
    pub bytes: u64,
    /// When the last of them came.
    pub modified: SystemTime,
}

/// The digest that a file is named after.
fn digest_of(name: &OsStr) -> Option<Digest> {
    format!("sha256:{}", name.to_str()?).parse().ok()
}

/// A blob being written, hashed as it goes. Dropped without [`commit`](Self::commit), it leaves nothing behind.
#[derive(Debug)]
pub struct BlobWriter {
    store: BlobStore,
    file: File,
    path: PathBuf,
    hasher: Sha256,
    written: u64,
}

impl BlobWriter {
    /// How many bytes were written so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// What was written so far, for reading with `read_at`; its file position belongs to the writer.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is written to, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends the writing; gives what [`PreparedBlob::publish`] then makes visible.
    pub fn finish(mut self) -> PreparedBlob {
        let digest = finish(std::mem::take(&mut self.hasher));
        let path = std::mem::take(&mut self.path);
        PreparedBlob {
            store: self.store.clone(),
            path,
            digest,
            size: self.written,
        }
    }

    /// Publishes what was written, if it is what was `expected`; gives its digest and size.
    pub fn commit(self, expected: Option<&Digest>) -> Result<(Digest, u64), BlobError> {
        let prepared = self.finish();
        let actual = prepared.digest;
        if let Some(expected) = expected
            && *expected != actual
        {
            return Err(BlobError::Mismatch {
                expected: *expected,
                actual,
            });
        }
        prepared.publish()
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        remove_unpublished(&self.path);
    }
}

/// A blob that is written whole and not yet visible: several of them can be checked before the first is published.
/// Dropped without [`publish`](Self::publish), it leaves nothing behind.
#[derive(Debug)]
pub struct PreparedBlob {
    store: BlobStore,
    path: PathBuf,
    digest: Digest,
    size: u64,
}

impl PreparedBlob {
    /// What it is.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// How many bytes it has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Opens it for reading.
    pub fn open(&self) -> Result<File, BlobError> {
        File::open(&self.path).map_err(BlobError::io("open", &self.path))
    }

    /// Makes it visible, durably; gives its digest and size.
    pub fn publish(self) -> Result<(Digest, u64), BlobError> {
        self.store
            .publish(&self.open()?, &self.path, &self.digest, self.size)?;
        Ok((self.digest, self.size))
    }
}

impl Drop for PreparedBlob {
    fn drop(&mut self) {
        remove_unpublished(&self.path);
    }
}

/// After publishing the name is gone, and names are random: this removes ours or nothing. What cannot be removed now is swept
/// at the next start.
fn remove_unpublished(path: &Path) {
    if !path.as_os_str().is_empty() {
        let _ = fs::remove_file(path);
    }
}

/// A blob being fetched. Dropped without [`commit`](Self::commit), what has come so far is kept for the next attempt.
///
/// It holds a lock, so two pulls of one layer do not write one file.
#[derive(Debug)]
pub struct BlobDownload {
    store: BlobStore,
    file: File,
    path: PathBuf,
    digest: Digest,
    hasher: Sha256,
    written: u64,
}

impl BlobDownload {
    /// How many bytes are there, those of earlier attempts included.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Where it is written to, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Forgets what has come so far: the source cannot go on in the middle, or what came was wrong.
    pub fn restart(&mut self) -> Result<(), BlobError> {
        self.file
            .set_len(0)
            .map_err(BlobError::io("truncate", &self.path))?;
        io::Seek::rewind(&mut self.file).map_err(BlobError::io("rewind", &self.path))?;
        self.hasher = Sha256::new();
        self.written = 0;
        Ok(())
    }

    /// Publishes the blob if it is whole and right; gives its size. What is wrong is removed.
    pub fn commit(self) -> Result<u64, BlobError> {
        let Self {
            store,
            file,
            path,
            digest,
            hasher,
            written,
        } = self;
        let actual = finish(hasher);
        if actual != digest {
            fs::remove_file(&path).map_err(BlobError::io("remove", &path))?;
            return Err(BlobError::Mismatch {
                expected: digest,
                actual,
            });
        }
        store.publish(&file, &path, &digest, written)?;
        Ok(written)
    }

    /// Removes what has come so far: nobody will want it.
    pub fn discard(self) -> Result<(), BlobError> {
        fs::remove_file(&self.path).map_err(BlobError::io("remove", &self.path))
    }
}

impl Write for BlobDownload {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn finish(hasher: Sha256) -> Digest {
    Digest::from_bytes(hasher.finalize().into())
}

fn hash_of(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

/// Hashes from the file's position to its end, leaves the position there, and gives the number of bytes.
fn hash_file(file: &mut File, hasher: &mut Sha256) -> io::Result<u64> {
    Ok(hash_watched(file, hasher, &mut |_| true)?.unwrap_or_default())
}

/// The same; `None` if `moved`, which hears how far it is, says to stop.
fn hash_watched(
    file: &mut File,
    hasher: &mut Sha256,
    moved: &mut dyn FnMut(u64) -> bool,
) -> io::Result<Option<u64>> {
    let mut buffer = vec![0; READ_SIZE];
    let mut total = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(Some(total)),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                total += count as u64;
                if !moved(total) {
                    return Ok(None);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, BlobStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(&dir.path().join("data")).unwrap();
        (dir, store)
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn what_is_committed_is_there_and_the_rest_leaves_nothing() {
        let (_dir, store) = store();
        let mut writer = store.writer().unwrap();
        writer.write_all(b"hello").unwrap();
        let (digest, size) = writer.commit(Some(&hash_of(b"hello"))).unwrap();
        assert_eq!((digest, size), (hash_of(b"hello"), 5));
        assert!(store.contains(&digest));
        assert_eq!(store.size(&digest).unwrap(), 5);
        assert_eq!(store.read_small(&digest, 5).unwrap(), b"hello");
        assert_eq!(store.put(b"hello").unwrap(), digest);
        assert_eq!(store.list().unwrap(), [(digest, 5)]);

        let mut wrong = store.writer().unwrap();
        wrong.write_all(b"other").unwrap();
        assert!(
            matches!(wrong.commit(Some(&digest)), Err(BlobError::Mismatch { expected, .. }) if expected == digest)
        );
        let mut dropped = store.writer().unwrap();
        dropped.write_all(b"x").unwrap();
        assert_eq!(files(&store.places.tmp), 1);
        drop(dropped);
        assert_eq!(files(&store.places.tmp), 0);
        assert_eq!(files(&store.places.blobs), 1);

        store.remove(&digest).unwrap();
        store.remove(&digest).unwrap();
        assert!(matches!(
            store.open_blob(&digest),
            Err(BlobError::NotFound { .. })
        ));
        assert!(matches!(store.size(&digest), Err(BlobError::NotFound { .. })));
        assert!(!store.contains(&digest));
    }

    #[test]
    fn small_reads_are_limited_and_checked() {
        let (_dir, store) = store();
        let digest = store.put(b"hello").unwrap();
        assert!(matches!(
            store.read_small(&digest, 4),
            Err(BlobError::TooLarge {
                size: 5,
                limit: 4,
                ..
            })
        ));
        store.verify(&digest).unwrap();
        assert_eq!(
            store.verify_watched(&digest, &mut |done| done == 5).unwrap(),
            Some(5)
        );
        assert_eq!(store.verify_watched(&digest, &mut |_| false).unwrap(), None);
        fs::write(store.path(&digest), b"hellO").unwrap();
        assert!(matches!(
            store.read_small(&digest, 100),
            Err(BlobError::Damaged { .. })
        ));
        assert!(matches!(store.verify(&digest), Err(BlobError::Damaged { .. })));
        // A damaged blob of the wrong size is mended by storing it again.
        fs::write(store.path(&digest), b"hell").unwrap();
        store.put(b"hello").unwrap();
        store.verify(&digest).unwrap();
    }

    #[test]
    fn a_download_goes_on_where_it_broke_off_and_has_one_writer() {
        let (_dir, store) = store();
        let digest = hash_of(b"hello world");
        let mut first = store.download(&digest).unwrap().unwrap();
        first.write_all(b"hello ").unwrap();
        assert!(store.download(&digest).unwrap().is_none());
        assert_eq!(store.sweep_downloads(Duration::ZERO).unwrap(), 0);
        drop(first);

        let mut second = store.download(&digest).unwrap().unwrap();
        assert_eq!(second.written(), 6);
        second.write_all(b"world").unwrap();
        assert_eq!(second.commit().unwrap(), 11);
        assert_eq!(store.read_small(&digest, 100).unwrap(), b"hello world");
        assert_eq!(files(&store.places.downloads), 0);

        let wanted = hash_of(b"abc");
        let mut wrong = store.download(&wanted).unwrap().unwrap();
        wrong.write_all(b"abd").unwrap();
        assert!(matches!(wrong.commit(), Err(BlobError::Mismatch { .. })));
        let mut again = store.download(&wanted).unwrap().unwrap();
        assert_eq!(again.written(), 0);
        again.write_all(b"abd").unwrap();
        again.restart().unwrap();
        again.write_all(b"abc").unwrap();
        assert_eq!(again.commit().unwrap(), 3);

        let never = hash_of(b"never");
        let mut begun = store.download(&never).unwrap().unwrap();
        begun.write_all(b"ne").unwrap();
        let listed = store.downloads().unwrap();
        assert_eq!((listed.len(), listed[0].digest, listed[0].bytes), (1, never, 2));
        assert!(!store.remove_download(&never).unwrap());
        drop(begun);
        assert!(store.remove_download(&never).unwrap());
        assert!(!store.remove_download(&never).unwrap());

        drop(store.download(&never).unwrap().unwrap());
        assert_eq!(store.sweep_downloads(Duration::from_secs(3600)).unwrap(), 0);
        assert_eq!(store.sweep_downloads(Duration::ZERO).unwrap(), 1);
        let mut unwanted = store.download(&wanted).unwrap().unwrap();
        unwanted.write_all(b"x").unwrap();
        unwanted.discard().unwrap();
        assert_eq!(files(&store.places.downloads), 0);
    }

    #[test]
    fn many_writers_of_one_blob_agree() {
        let (_dir, store) = store();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| assert_eq!(store.put(b"same").unwrap(), hash_of(b"same")));
            }
        });
        assert_eq!(store.list().unwrap(), [(hash_of(b"same"), 4)]);
        assert_eq!(files(&store.places.tmp), 0);
    }
}
