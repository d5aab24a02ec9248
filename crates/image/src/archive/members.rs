//! The files of an image archive by name, to be read out of order.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;

use offshoot_model::Digest;
use offshoot_store::blobs::{BlobStore, PreparedBlob};
use sha2::{Digest as _, Sha256};

use super::scan::{Kind, Member, Scanner, Section};
use super::{COPY_SIZE, ImportError, copy, decoder, format_name};
use crate::manifest::Compression;

/// The most files that are kept in mind. An image has a few files for each layer, and an archive rarely more than ten images.
const MAX_MEMBERS: usize = 65_536;
/// How many links are followed to a file; `docker save` of old made one, from a layer that occurs twice to its other place.
const MAX_LINKS: usize = 8;

/// The archive's files, and the archive.
#[derive(Debug)]
pub(super) struct Members<'f> {
    file: &'f File,
    by_name: HashMap<String, Member>,
}

/// A file of the archive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'m> {
    pub(super) name: &'m str,
    offset: u64,
    pub(super) size: u64,
}

impl<'f> Members<'f> {
    /// Reads the headers of the plain tar in the first `length` bytes of `file`.
    pub(super) fn scan(file: &'f File, length: u64) -> Result<Self, ImportError> {
        let mut scanner = Scanner::new(Section::new(file, 0, length));
        let mut by_name = HashMap::new();
        while let Some(member) = scanner.next_member()? {
            if matches!(member.kind, Kind::Directory | Kind::Other) {
                continue;
            }
            // A name that is no text, or leads upwards, is none that a manifest could ask for.
            let Some(name) = std::str::from_utf8(&member.path)
                .ok()
                .and_then(|path| normal("", path))
            else {
                continue;
            };
            if by_name.len() == MAX_MEMBERS {
                return Err(ImportError::TooManyFiles { limit: MAX_MEMBERS });
            }
            by_name.insert(name, member);
        }
        Ok(Self { file, by_name })
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }

    /// Finds a file, through links within the archive.
    pub(super) fn find<'m>(&self, name: &'m str) -> Result<Place<'m>, ImportError> {
        let missing = || ImportError::Missing {
            name: name.chars().take(200).collect(),
        };
        let mut path = normal("", name).ok_or_else(missing)?;
        for _ in 0..MAX_LINKS {
            let member = self.by_name.get(&path).ok_or_else(missing)?;
            let link = std::str::from_utf8(&member.link).unwrap_or_default();
            path = match member.kind {
                Kind::File => {
                    return Ok(Place {
                        name,
                        offset: member.offset,
                        size: member.size,
                    });
                }
                Kind::HardLink => normal("", link),
                _ => normal(path.rsplit_once('/').map_or("", |(folder, _)| folder), link),
            }
            .ok_or_else(missing)?;
        }
        Err(missing())
    }

    /// Reads a whole file of at most `limit` bytes.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, ImportError> {
        let place = self.find(name)?;
        if place.size > limit {
            return Err(ImportError::FileTooLarge {
                name: name.to_owned(),
                size: place.size,
                limit,
            });
        }
        let mut bytes = Vec::new();
        self.open(place)
            .read_to_end(&mut bytes)
            .map_err(|source| ImportError::Upload { source })?;
        Ok(bytes)
    }

    /// Reads a whole JSON file of at most `limit` bytes.
    pub(super) fn json<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
        limit: u64,
    ) -> Result<T, ImportError> {
        serde_json::from_slice(&self.read(name, limit)?).map_err(|source| ImportError::Json {
            name: name.to_owned(),
            source,
        })
    }

    fn open(&self, place: Place<'_>) -> Section<'f> {
        Section::new(self.file, place.offset, place.size)
    }

    /// The compression that the file's first bytes show.
    pub(super) fn compression(&self, place: Place<'_>) -> Result<Compression, ImportError> {
        let mut start = Vec::new();
        self.open(place)
            .take(4)
            .read_to_end(&mut start)
            .map_err(|source| ImportError::Upload { source })?;
        Ok(Compression::of_magic(&start))
    }

    /// Copies a file to a blob that is not visible yet.
    pub(super) fn stage(&self, store: &BlobStore, place: Place<'_>) -> Result<PreparedBlob, ImportError> {
        let mut writer = store.writer()?;
        copy(&mut self.open(place), &mut writer, |source| ImportError::Upload {
            source,
        })?;
        Ok(writer.finish())
    }

    /// The same for a file whose digest is known; `None` if the store has that blob already.
    pub(super) fn stage_known(
        &self,
        store: &BlobStore,
        place: Place<'_>,
        expected: Digest,
    ) -> Result<Option<PreparedBlob>, ImportError> {
        if store.size(&expected).is_ok_and(|size| size == place.size) {
            return Ok(None);
        }
        let blob = self.stage(store, place)?;
        let actual = blob.digest();
        if actual != expected {
            return Err(ImportError::Digest {
                name: place.name.to_owned(),
                expected,
                actual,
            });
        }
        Ok(Some(blob))
    }

    /// The digest of a compressed file's content.
    pub(super) fn diff_id(&self, place: Place<'_>, compression: Compression) -> Result<Digest, ImportError> {
        let mut hasher = Sha256::new();
        let mut source = decoder(compression, self.open(place));
        let mut buffer = vec![0; COPY_SIZE];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => return Ok(Digest::from_bytes(hasher.finalize().into())),
                Ok(count) => hasher.update(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    let format = format_name(compression);
                    return Err(ImportError::Decompress {
                        format,
                        name: format!("`{}`", place.name),
                        source,
                    });
                }
            }
        }
    }
}

/// `path` as seen from `folder`, without `.` and `..`; `None` if it leads out of the archive or to its top.
fn normal(folder: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = if path.starts_with('/') {
        Vec::new()
    } else {
        folder.split('/').collect()
    };
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop().filter(|part| !part.is_empty())?;
            }
            part => parts.push(part),
        }
    }
    parts.retain(|part| !part.is_empty());
    (!parts.is_empty()).then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalised_and_stay_inside() {
        let check = |folder: &str, path: &str, expected: Option<&str>| {
            assert_eq!(normal(folder, path).as_deref(), expected, "{folder:?} {path:?}");
        };
        check("", "index.json", Some("index.json"));
        check("", "./blobs//sha256/x", Some("blobs/sha256/x"));
        check("", "/a", Some("a"));
        check("a", "../b/layer.tar", Some("b/layer.tar"));
        check("a/b", "/c", Some("c"));
        check("a", "../../b", None);
        check("", "../b", None);
        check("", "..", None);
        check("", ".", None);
        check("", "", None);
    }
}
