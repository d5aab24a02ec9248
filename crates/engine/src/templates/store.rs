//! Where templates lie, and the only ways in and out.
//!
//! ```text
//! <data>/templates/<id>/
//!   memory          the guest's memory, sparse        0600, root's: no VMM ever opens it
//!   state           what the VMM saved of its devices 0600
//!   template.json   what it is of, lengths, digests   0600
//! ```
//!
//! Before one is used, it is *loaded*: both files are read, their digests compared, and what was read goes into sealed
//! memory files. These are what VMMs get; what happens to the files afterwards reaches no VM, and neither does a VMM reach the
//! files. As long as the files look as they did when they were loaded (inode, length, both times), they are not read again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use offshoot_model::{ByteSize, Digest, ErrorKind, Explain, TemplateId};
use offshoot_sys::durable::{self, Published, StagingDir as Staging};
use offshoot_sys::lock::FileLock;
use offshoot_sys::memory_file;
use sha2::{Digest as _, Sha256};

use super::manifest::{FORMAT, MANIFEST_MAX, SavedFile, TemplateKey, TemplateManifest};

const MEMORY: &str = "memory";
const STATE: &str = "state";
const MANIFEST: &str = "template.json";

/// The largest state: QEMU's devices save less than 1 MiB.
pub const STATE_MAX: ByteSize = ByteSize::from_mib(64);

/// Why a template cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// There is none.
    #[error("there is no template {id}")]
    NotFound {
        /// Which.
        id: TemplateId,
    },
    /// It is not what was saved.
    #[error("template {id} is damaged: {what}")]
    Damaged {
        /// Which.
        id: TemplateId,
        /// How.
        what: String,
    },
    /// Another version made it.
    #[error("template {id} was made by another version")]
    Format {
        /// Which.
        id: TemplateId,
    },
    /// A file of ours.
    #[error("cannot use {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Explain for TemplateError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Damaged { .. } | Self::Format { .. } => ErrorKind::NotPossible,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            Self::Io { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::NotFound { .. } => vec!["see `offshoot template ls`".into()],
            Self::Damaged { id, .. } | Self::Format { id } => {
                vec![format!(
                    "remove it with `offshoot template rm {id}`; the next VM of its kind makes it again"
                )]
            }
            Self::Io { path, .. } => vec![format!("look at {}", path.display())],
        }
    }
}

impl TemplateError {
    /// Whether the template on disk is good for nothing.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Format { .. })
    }

    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

/// One template on disk, as its manifest says it.
#[derive(Clone, Debug)]
pub struct StoredTemplate {
    /// Which.
    pub id: TemplateId,
    /// Where.
    pub dir: PathBuf,
    /// What is kept beside it.
    pub manifest: TemplateManifest,
    /// When it was last used, milliseconds since 1970.
    pub used_ms: u64,
}

/// How a file looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    inode: (u64, u64),
    length: u64,
    times: [(i64, i64); 2],
}

impl Look {
    fn at(path: &Path) -> io::Result<Self> {
        let meta = std::fs::symlink_metadata(path)?;
        Ok(Self {
            inode: (meta.dev(), meta.ino()),
            length: meta.len(),
            times: [
                (meta.mtime(), meta.mtime_nsec()),
                (meta.ctime(), meta.ctime_nsec()),
            ],
        })
    }
}

/// A template in memory, ready for any number of VMs.
#[derive(Debug)]
pub struct LoadedTemplate {
    /// Which.
    pub id: TemplateId,
    /// The guest's memory, sealed.
    pub memory: Arc<File>,
    /// What the VMM saved of its devices, sealed.
    pub state: Arc<File>,
    /// Its writable disks by serial, with the sizes that the guest knows of.
    pub disks: Vec<(String, ByteSize)>,
    /// What both take.
    pub held: ByteSize,
    looks: [Look; 3],
}

/// All templates of one data directory.
#[derive(Clone, Debug)]
pub struct TemplateStore {
    dir: PathBuf,
    tmp: PathBuf,
    locks: PathBuf,
}

impl TemplateStore {
    /// Those below `<data>/templates`.
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        let dir = data_dir.join("templates");
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)?;
        Ok(Self {
            dir,
            tmp: data_dir.join("tmp"),
            locks: data_dir.join("locks"),
        })
    }

    /// Where they lie.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where one lies or would lie.
    pub fn path(&self, id: &TemplateId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    /// Everything that has a template's name.
    pub fn ids(&self) -> io::Result<Vec<TemplateId>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            ids.extend(entry?.file_name().to_string_lossy().parse::<TemplateId>());
        }
        ids.sort();
        Ok(ids)
    }

    /// What one is. Reads its manifest only.
    pub fn get(&self, id: &TemplateId) -> Result<StoredTemplate, TemplateError> {
        let dir = self.path(id);
        let path = dir.join(MANIFEST);
        let damaged = |what: &str| TemplateError::Damaged {
            id: id.clone(),
            what: what.into(),
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                return Err(TemplateError::NotFound { id: id.clone() });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged("it has no template.json"));
            }
            Err(error) => return Err(TemplateError::io(&path)(error)),
        };
        let used = file.metadata().map_err(TemplateError::io(&path))?;
        let used_ms = used.mtime().unsigned_abs() * 1000 + used.mtime_nsec().unsigned_abs() / 1_000_000;
        let mut text = Vec::new();
        file.take(MANIFEST_MAX)
            .read_to_end(&mut text)
            .map_err(TemplateError::io(&path))?;
        #[derive(serde::Deserialize)]
        struct Version {
            key: KeyVersion,
        }
        #[derive(serde::Deserialize)]
        struct KeyVersion {
            format: u32,
        }
        let unreadable = |_| damaged("its template.json cannot be read");
        let version: Version = serde_json::from_slice(&text).map_err(unreadable)?;
        if version.key.format != FORMAT {
            return Err(TemplateError::Format { id: id.clone() });
        }
        let manifest: TemplateManifest = serde_json::from_slice(&text).map_err(unreadable)?;
        if manifest.key.id() != *id {
            return Err(damaged("its template.json is another template's"));
        }
        Ok(StoredTemplate {
            id: id.clone(),
            dir,
            manifest,
            used_ms,
        })
    }

    /// Reads a template, checks all of it, and puts it into sealed memory. Blocks for as long as that takes: some tens of
    /// milliseconds for each 100 MiB.
    pub fn load(&self, key: &TemplateKey) -> Result<LoadedTemplate, TemplateError> {
        let id = key.id();
        let stored = self.get(&id)?;
        if stored.manifest.key != *key {
            return Err(TemplateError::Damaged {
                id,
                what: "it is of another VM".into(),
            });
        }
        let looks = self.looks(&id)?;
        let memory = load_file(
            &id,
            &stored.dir.join(MEMORY),
            &stored.manifest.memory,
            "the memory",
        )?;
        let state = load_file(&id, &stored.dir.join(STATE), &stored.manifest.state, "the state")?;
        let data = |file: &SavedFile| file.data.bytes();
        let held = data(&stored.manifest.memory) + data(&stored.manifest.state);
        Ok(LoadedTemplate {
            id,
            memory: Arc::new(memory),
            state: Arc::new(state),
            disks: stored.manifest.disks,
            held: ByteSize::from_bytes(held),
            looks,
        })
    }

    fn looks(&self, id: &TemplateId) -> Result<[Look; 3], TemplateError> {
        let dir = self.path(id);
        let look = |name: &str| {
            let path = dir.join(name);
            Look::at(&path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => TemplateError::Damaged {
                    id: id.clone(),
                    what: format!("it has no {name}"),
                },
                _ => TemplateError::io(&path)(error),
            })
        };
        // The manifest's own time is when it was last used.
        let mut manifest = look(MANIFEST)?;
        manifest.times = [(0, 0); 2];
        Ok([look(MEMORY)?, look(STATE)?, manifest])
    }

    /// Whether the files look as they did when they were loaded. Three calls of stat(2).
    pub fn is_as_loaded(&self, loaded: &LoadedTemplate) -> bool {
        self.looks(&loaded.id).is_ok_and(|looks| looks == loaded.looks)
    }

    /// Notes that it was used now, for `prune`.
    pub fn mark_used(&self, id: &TemplateId) {
        let path = self.path(id).join(MANIFEST);
        let marked = File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_modified(std::time::SystemTime::now()));
        if let Err(error) = marked {
            tracing::debug!(%error, path = %path.display(), "cannot note that a template was used");
        }
    }

    /// Waits until no other process makes this template. Blocks.
    pub fn lock(&self, id: &TemplateId) -> Result<FileLock, TemplateError> {
        let path = self.locks.join(format!("template-{id}"));
        FileLock::exclusive(&path).map_err(TemplateError::io(&path))
    }

    /// A folder for the template's files while it is made; what a crash leaves of it is swept at the next start.
    pub fn stage(&self) -> Result<Staging, TemplateError> {
        Staging::new(&self.tmp, "template").map_err(TemplateError::io(&self.tmp))
    }

    /// Publishes a template from the memory file of its VM and the state in `stage`. Blocks for fsync(2). `false` when
    /// somebody else did already.
    pub fn publish(
        &self,
        stage: Staging,
        key: &TemplateKey,
        memory: &File,
        disks: Vec<(String, ByteSize)>,
        created_ms: u64,
    ) -> Result<bool, TemplateError> {
        let (memory_path, state_path) = (stage.path().join(MEMORY), state_path(&stage));
        let memory = save_file(memory, &memory_path).map_err(TemplateError::io(&memory_path))?;
        let state = File::open(&state_path)
            .and_then(|file| measure(&file, |_, _| Ok(())))
            .map_err(TemplateError::io(&state_path))?;
        let manifest = TemplateManifest {
            key: key.clone(),
            memory,
            state,
            disks,
            created_ms,
        };
        let path = stage.path().join(MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest)
            .expect("our own types have string keys and no failing serializers");
        open_new(&path)
            .and_then(|file| file.write_all_at(&text, 0))
            .map_err(TemplateError::io(&path))?;
        let at = self.path(&key.id());
        let published = stage.publish(&at).map_err(TemplateError::io(&at))?;
        Ok(published == Published::New)
    }

    /// Removes one; it is no error if it is gone. VMs that were restored from it keep what they have.
    pub fn remove(&self, id: &TemplateId) -> Result<bool, TemplateError> {
        let at = self.path(id);
        // Out of the way in one step first, so that nobody finds half of it.
        let stage = self.stage()?;
        match std::fs::rename(&at, stage.path().join("gone")) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(TemplateError::io(&at)(error)),
        }
        durable::fsync_dir(&self.dir).map_err(TemplateError::io(&self.dir))?;
        Ok(true)
    }
}

/// Where the state of a template that is being made is written.
pub fn state_path(stage: &Staging) -> PathBuf {
    stage.path().join(STATE)
}

/// A new file that root alone reads.
pub fn open_new(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Goes over a file's pages that are not all zeros; gives what it holds.
fn measure(file: &File, mut page: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<SavedFile> {
    let mut hash = Sha256::new();
    let mut data = 0;
    memory_file::for_each_page(file, |at, bytes| {
        hash.update(at.to_le_bytes());
        hash.update(bytes);
        data += bytes.len() as u64;
        page(at, bytes)
    })?;
    Ok(SavedFile {
        size: ByteSize::from_bytes(file.metadata()?.len()),
        data: ByteSize::from_bytes(data),
        digest: Digest::from_bytes(hash.finalize().into()),
    })
}

fn save_file(from: &File, path: &Path) -> io::Result<SavedFile> {
    let to = open_new(path)?;
    to.set_len(from.metadata()?.len())?;
    measure(from, |at, bytes| to.write_all_at(bytes, at))
}

fn load_file(id: &TemplateId, path: &Path, expected: &SavedFile, what: &str) -> Result<File, TemplateError> {
    let damaged = |how: &str| TemplateError::Damaged {
        id: id.clone(),
        what: format!("{what} {how}"),
    };
    let load = || -> io::Result<Result<File, TemplateError>> {
        let from = match OpenOptions::new().read(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Err(damaged("is gone"))),
            Err(error) => return Err(error),
        };
        let length = from.metadata()?.len();
        if length != expected.size.bytes() {
            return Ok(Err(damaged(&format!(
                "has {length} bytes instead of {}",
                expected.size.bytes()
            ))));
        }
        let to = memory_file::create(&format!("offshoot-{id}"), length)?;
        let found = measure(&from, |at, bytes| to.write_all_at(bytes, at))?;
        if found != *expected {
            return Ok(Err(damaged("is not what was saved")));
        }
        memory_file::seal(&to)?;
        Ok(Ok(to))
    };
    load().map_err(TemplateError::io(path))?
}
