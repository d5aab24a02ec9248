//! A tar of a root file system, which becomes an image of one layer: the upload itself is that layer.

use std::io::{self, Read};

use offshoot_model::{Digest, ImageConfig};
use offshoot_store::blobs::BlobStore;
use sha2::{Digest as _, Sha256};

use super::scan::{Kind, Scanner, Source, Stream, TarError};
use super::{COPY_SIZE, ImportError, Spool, decoder, rfc3339};
use crate::manifest::{Compression, NewImage, StoredLayer};
use crate::platform::Platform;

/// What no root file system lacks all of, and what no other tar has at its top: `/` of FHS 3.0, section 3.2.
const ROOT_NAMES: [&str; 7] = ["bin", "etc", "lib", "sbin", "usr", "var", "nix"];

/// What an upload turned out to be.
#[derive(Debug)]
pub(super) enum Contents {
    /// Files for `/`.
    Rootfs(Facts),
    /// Blobs and JSON, to be read out of order.
    Archive,
}

/// What one walk over a root file system's tar tells.
#[derive(Debug)]
pub(super) struct Facts {
    /// The digest of the tar when it came compressed; of a plain one the spool knows it.
    diff_id: Option<Digest>,
    /// The latest time of any member, seconds since 1970: when the tree was last changed, so the image was made.
    newest: u64,
}

/// What the member names say, as they go by.
#[derive(Debug, Default)]
struct Seen {
    members: u64,
    root: bool,
    archive: bool,
    newest: u64,
}

impl Spool {
    /// Walks the whole upload once.
    pub(super) fn contents(&self) -> Result<Contents, ImportError> {
        if self.compression == Compression::None {
            let mut scanner = Scanner::new(self.bytes());
            return judge(&walk(&mut scanner)?, None);
        }
        // Errors of the decoder and of the tar both end the walk; which it was shows in the decoder's own memory.
        let limited = decoder(self.compression, self.bytes()).take(self.limit.bytes() + 1);
        let hashing = Hashing {
            source: limited,
            hasher: Sha256::new(),
            count: 0,
            failed: false,
        };
        let mut scanner = Scanner::new(Stream(hashing));
        let seen = walk(&mut scanner);
        let mut hashing = scanner.into_source().0;
        let seen = match seen {
            Err(TarError::Io(source)) if hashing.failed => return Err(self.decompress_error(source)),
            _ if hashing.count > self.limit.bytes() => {
                return Err(ImportError::TooLarge { limit: self.limit });
            }
            other => other?,
        };
        // What follows the end of the tar counts in its digest too, and the decoder's own checksum stands behind it.
        io::copy(&mut hashing, &mut io::sink()).map_err(|source| self.decompress_error(source))?;
        if hashing.count > self.limit.bytes() {
            return Err(ImportError::TooLarge { limit: self.limit });
        }
        judge(&seen, Some(Digest::from_bytes(hashing.hasher.finalize().into())))
    }
}

fn walk<S: Source>(scanner: &mut Scanner<S>) -> Result<Seen, TarError> {
    let mut seen = Seen::default();
    while let Some(member) = scanner.next_member()? {
        seen.members += 1;
        seen.newest = seen.newest.max(member.mtime);
        let path = member.path.as_slice();
        let path = path
            .strip_prefix(b"./")
            .or_else(|| path.strip_prefix(b"/"))
            .unwrap_or(path);
        let mut parts = path.splitn(2, |byte| *byte == b'/');
        let (first, rest) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        seen.root |= ROOT_NAMES.iter().any(|name| name.as_bytes() == first);
        seen.archive |=
            rest.is_empty() && member.kind == Kind::File && matches!(first, b"oci-layout" | b"manifest.json");
    }
    Ok(seen)
}

fn judge(seen: &Seen, diff_id: Option<Digest>) -> Result<Contents, ImportError> {
    match seen {
        Seen { members: 0, .. } => Err(ImportError::Empty),
        // A root file system may hold a file of that name at its top; an image archive has no `/usr`.
        Seen { root: true, .. } => Ok(Contents::Rootfs(Facts {
            diff_id,
            newest: seen.newest,
        })),
        Seen { archive: true, .. } => Ok(Contents::Archive),
        _ => Err(ImportError::NoRoot),
    }
}

/// Publishes the upload as a layer, and an image around it.
pub(super) fn import(
    store: &BlobStore,
    spool: Spool,
    facts: &Facts,
    platform: &Platform,
    config: ImageConfig,
) -> Result<Digest, ImportError> {
    let compression = spool.compression;
    let blob = spool.prepare();
    let layer = StoredLayer {
        digest: blob.digest(),
        size: blob.size(),
        diff_id: facts.diff_id.unwrap_or(blob.digest()),
        compression,
    };
    let image = NewImage {
        config,
        platform: platform.clone(),
        created: (facts.newest > 0).then(|| rfc3339(facts.newest)),
        labels: Default::default(),
        layers: vec![layer],
        created_by: "offshoot image import".into(),
    };
    blob.publish()?;
    Ok(image.store(store)?)
}

/// Makes an image of an upload that must be a root file system.
pub(crate) fn from_spool(
    store: &BlobStore,
    spool: Spool,
    platform: &Platform,
    config: ImageConfig,
) -> Result<Digest, ImportError> {
    match spool.contents()? {
        Contents::Rootfs(facts) => import(store, spool, &facts, platform, config),
        Contents::Archive => Err(ImportError::NoRoot),
    }
}

/// Hashes and counts what is read through it.
struct Hashing<R> {
    source: R,
    hasher: Sha256,
    count: u64,
    failed: bool,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(COPY_SIZE);
        let count = self.source.read(&mut buffer[..wanted]).inspect_err(|error| {
            self.failed |= error.kind() != io::ErrorKind::Interrupted;
        })?;
        self.hasher.update(&buffer[..count]);
        self.count += count as u64;
        Ok(count)
    }
}
