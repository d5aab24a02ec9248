//! Images that come as one file: `docker save`, an OCI image layout, or a tar of a root file system.
//!
//! ```text
//! upload ──► spool (tmp/, hashed) ──► scan the headers ─┬─ oci-layout + index.json ──► layout    blobs copied and checked
//!            gzip and zstd are seen                     ├─ manifest.json ───────────► docker    layers copied and checked
//!            by their first bytes                       └─ bin/ etc/ usr/ … ────────► rootfs    the spool becomes the layer
//! ```
//!
//! All of an archive is checked before the first of its blobs is published, so what is refused leaves nothing behind. Names
//! are given back and not stored: that is the database's matter.

mod docker;
mod error;
mod layout;
mod members;
mod rootfs;
mod scan;

use std::io::{self, Read, Write};
use std::time::{Duration, SystemTime};

use offshoot_model::{ByteSize, Digest, EnvVar, ImageConfig, Progress, ProgressUnit};
use offshoot_store::blobs::{BlobError, BlobStore, BlobWriter, PreparedBlob};

pub use self::error::ImportError;
pub(crate) use self::rootfs::from_spool;
pub use self::scan::TarError;

use self::members::Members;
use self::rootfs::Contents;
use crate::manifest::Compression;
use crate::platform::Platform;
use crate::reference::ImageReference;

/// The largest import unless the daemon is told otherwise: larger than any image that is moved as one file.
pub const DEFAULT_IMPORT_LIMIT: ByteSize = ByteSize::from_mib(64 << 10);

/// How much is copied at once: few system calls, and still a small part of a cache.
const COPY_SIZE: usize = 256 << 10;
/// How often progress is told.
const PROGRESS_STEP: u64 = 1 << 20;

/// What an import is asked to do.
#[derive(Clone, Debug)]
pub struct ImportOptions {
    /// The image's name; where there is none, the archive's own names are given back.
    pub reference: Option<String>,
    /// Which image of several platforms, `OS/ARCHITECTURE[/VARIANT]`; this machine's where there is none.
    pub platform: Option<String>,
    /// The most bytes, both as they come and unpacked from their outer compression.
    pub limit: ByteSize,
    /// What an image made from a plain root file system runs.
    pub rootfs_config: ImageConfig,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self {
            reference: None,
            platform: None,
            limit: DEFAULT_IMPORT_LIMIT,
            rootfs_config: default_config(&["/bin/sh"]),
        }
    }
}

/// What an image without a config of its own runs: `cmd`, with Docker's `PATH`.
pub fn default_config(cmd: &[&str]) -> ImageConfig {
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    ImageConfig {
        cmd: cmd.iter().map(ToString::to_string).collect(),
        env: path.parse::<EnvVar>().into_iter().collect(),
        ..ImageConfig::default()
    }
}

/// One image of an imported archive, under one of its names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Its manifest, which is in the store with all it names.
    pub digest: Digest,
    /// Its complete name; `None` when neither the caller nor the archive has one.
    pub reference: Option<String>,
}

/// Imports what `source` yields. An image with several names comes back once for each of them.
///
/// Blocks; dropping the thread's work midway (a failing `source`) leaves nothing behind.
pub fn import(
    store: &BlobStore,
    source: impl Read,
    options: &ImportOptions,
    progress: &Progress,
) -> Result<Vec<Imported>, ImportError> {
    let name = options
        .reference
        .as_deref()
        .map(str::parse::<ImageReference>)
        .transpose()?;
    let platform = Platform::parse_or_host(options.platform.as_deref())?;
    let spool = Spool::receive(store, source, options.limit, progress)?;
    let images = match spool.contents()? {
        Contents::Rootfs(facts) => {
            let image = rootfs::import(store, spool, &facts, &platform, options.rootfs_config.clone())?;
            vec![Imported {
                digest: image,
                reference: None,
            }]
        }
        Contents::Archive => {
            let spool = spool.decompressed(store)?;
            let members = Members::scan(spool.writer.file(), spool.writer.written())?;
            if members.contains("oci-layout") && members.contains("index.json") {
                layout::import(store, &members, &platform)?
            } else {
                docker::import(store, &members, &platform)?
            }
        }
    };
    named(images, name)
}

/// Puts the caller's name in the place of the archive's own.
fn named(images: Vec<Imported>, name: Option<ImageReference>) -> Result<Vec<Imported>, ImportError> {
    let Some(name) = name else { return Ok(images) };
    let reference = name.to_string();
    let mut digests: Vec<_> = images.iter().map(|image| image.digest).collect();
    digests.dedup();
    match digests.as_slice() {
        [digest] => Ok(vec![Imported {
            digest: *digest,
            reference: Some(reference),
        }]),
        _ => Err(ImportError::ManyImages {
            count: digests.len(),
            reference,
        }),
    }
}

/// An upload, whole, on disk, and not yet a blob.
#[derive(Debug)]
pub(crate) struct Spool {
    writer: BlobWriter,
    compression: Compression,
    limit: ByteSize,
}

impl Spool {
    /// Takes all of `source`, of at most `limit` bytes.
    pub(crate) fn receive(
        store: &BlobStore,
        mut source: impl Read,
        limit: ByteSize,
        progress: &Progress,
    ) -> Result<Self, ImportError> {
        let mut writer = store.writer()?;
        let task = progress.start("receiving the archive", ProgressUnit::Bytes, None);
        let mut buffer = vec![0; COPY_SIZE];
        let mut told = 0;
        loop {
            let count = match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(ImportError::Upload { source }),
            };
            if writer.written() + count as u64 > limit.bytes() {
                return Err(ImportError::TooLarge { limit });
            }
            write(&mut writer, &buffer[..count])?;
            if writer.written() - told >= PROGRESS_STEP {
                told = writer.written();
                progress.moved(task, told);
            }
        }
        progress.moved(task, writer.written());
        progress.finish(task);
        let mut start = [0; 4];
        let length = scan::Section::new(writer.file(), 0, 4)
            .read(&mut start)
            .map_err(|source| ImportError::Upload { source })?;
        match length {
            0 => Err(ImportError::Empty),
            _ => Ok(Self {
                compression: Compression::of_magic(&start[..length]),
                writer,
                limit,
            }),
        }
    }

    /// What it was sent as: gives a tar, decompressed where it came compressed. The copy is one file more on disk, and only
    /// made of archives that are read out of order.
    fn decompressed(self, store: &BlobStore) -> Result<Self, ImportError> {
        if self.compression == Compression::None {
            return Ok(self);
        }
        let mut plain = store.writer()?;
        let mut source = decoder(self.compression, self.bytes()).take(self.limit.bytes() + 1);
        copy(&mut source, &mut plain, |source| self.decompress_error(source))?;
        drop(source);
        if plain.written() > self.limit.bytes() {
            return Err(ImportError::TooLarge { limit: self.limit });
        }
        Ok(Self {
            writer: plain,
            compression: Compression::None,
            limit: self.limit,
        })
    }

    fn bytes(&self) -> scan::Section<'_> {
        scan::Section::new(self.writer.file(), 0, self.writer.written())
    }

    fn decompress_error(&self, source: io::Error) -> ImportError {
        ImportError::Decompress {
            format: format_name(self.compression),
            name: "the archive".into(),
            source,
        }
    }

    fn prepare(self) -> PreparedBlob {
        self.writer.finish()
    }
}

fn format_name(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "plain",
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    }
}

/// Reads the plain bytes of what is compressed, over all its members or frames.
fn decoder<'r>(compression: Compression, source: impl Read + 'r) -> Box<dyn Read + 'r> {
    match compression {
        Compression::None => Box::new(source),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(
            io::BufReader::with_capacity(COPY_SIZE, source),
        )),
        Compression::Zstd => match zstd::stream::read::Decoder::new(source) {
            Ok(decoder) => Box::new(decoder),
            Err(error) => Box::new(Failing(Some(error))),
        },
    }
}

/// A reader whose making failed: it says so when it is read, where the errors are looked at anyway.
struct Failing(Option<io::Error>);

impl Read for Failing {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(self.0.take().unwrap_or_else(|| io::ErrorKind::Other.into()))
    }
}

fn write(writer: &mut BlobWriter, bytes: &[u8]) -> Result<(), ImportError> {
    writer.write_all(bytes).map_err(|source| {
        BlobError::Io {
            action: "write",
            path: writer.path().to_owned(),
            source,
        }
        .into()
    })
}

/// Copies to the end and keeps read errors from write errors: only the former are the archive's fault.
fn copy(
    source: &mut impl Read,
    writer: &mut BlobWriter,
    on_read_error: impl FnOnce(io::Error) -> ImportError,
) -> Result<(), ImportError> {
    let mut buffer = vec![0; COPY_SIZE];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => write(writer, &buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(on_read_error(error)),
        }
    }
}

/// A time as configs have it. Times in the future, which only wrong clocks write, count as now.
pub(crate) fn rfc3339(seconds: u64) -> String {
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    let now = SystemTime::now();
    humantime::format_rfc3339_seconds(time.map_or(now, |time| time.min(now))).to_string()
}

#[cfg(test)]
mod tests;
