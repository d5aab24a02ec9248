//! An OCI image layout as a tar (image-spec, image-layout.md): `oci-layout`, `index.json`, `blobs/sha256/…`.
//!
//! `docker save` since version 25 writes this too, with a `manifest.json` beside it.

use std::collections::{BTreeMap, HashMap};

use offshoot_model::Digest;
use offshoot_store::blobs::{BlobStore, PreparedBlob};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::members::{Members, Place};
use super::{ImportError, Imported};
use crate::index::{self, MAX_DEPTH};
use crate::manifest::{
    Blob, CONFIG_LIMIT, Config, Document, IndexEntry, MANIFEST_LIMIT, Manifest, StoredImage,
};
use crate::platform::Platform;
use crate::reference::ImageReference;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layout {
    image_layout_version: String,
}

/// An image found in the layout, checked but for its layers.
struct Found {
    blob: Blob,
    manifest_bytes: Vec<u8>,
    config_bytes: Vec<u8>,
    image: StoredImage,
}

/// What a search for the wanted platform meets on its way.
struct Search<'a> {
    members: &'a Members<'a>,
    wanted: &'a Platform,
    offered: Vec<String>,
}

/// Imports every image of the layout that runs on `wanted`.
pub(super) fn import(
    store: &BlobStore,
    members: &Members<'_>,
    wanted: &Platform,
) -> Result<Vec<Imported>, ImportError> {
    let layout: Layout = members.json("oci-layout", MANIFEST_LIMIT)?;
    if !layout.image_layout_version.starts_with("1.") {
        return Err(ImportError::LayoutVersion {
            version: layout.image_layout_version.chars().take(40).collect(),
        });
    }
    let Document::Index(entries) = Document::parse(&members.read("index.json", MANIFEST_LIMIT)?)? else {
        return Err(crate::manifest::ManifestError::Ambiguous.into());
    };
    let mut search = Search {
        members,
        wanted,
        offered: index::offered(&entries),
    };
    let mut found: BTreeMap<Digest, Found> = BTreeMap::new();
    let mut named = Vec::new();
    for entry in index::candidates(&entries, wanted) {
        let Some(image) = search.follow(entry, MAX_DEPTH - 1)? else {
            continue;
        };
        named.push((image.blob.digest, name(&entry.annotations)?));
        found.entry(image.blob.digest).or_insert(image);
    }
    if found.is_empty() {
        let mut offered = search.offered;
        offered.sort();
        offered.dedup();
        return Err(ImportError::Platform {
            wanted: wanted.to_string(),
            offered,
        });
    }
    let mut staged = HashMap::new();
    for image in found.values() {
        stage_layers(store, members, &image.image, &mut staged)?;
    }
    for blob in staged.into_values().flatten() {
        blob.publish()?;
    }
    // Manifests last: one that is there has everything it names.
    for image in found.values() {
        store.put(&image.config_bytes)?;
        store.put(&image.manifest_bytes)?;
    }
    named.sort();
    named.dedup();
    Ok(named
        .into_iter()
        .map(|(digest, reference)| Imported { digest, reference })
        .collect())
}

impl Search<'_> {
    /// The image behind an entry of an index; `None` if it is for another platform.
    fn follow(&mut self, entry: &IndexEntry, depth: usize) -> Result<Option<Found>, ImportError> {
        let bytes = read_blob(self.members, entry.blob, MANIFEST_LIMIT)?;
        match Document::parse(&bytes)? {
            Document::Index(_) if depth == 0 => Err(ImportError::TooDeep),
            Document::Index(entries) => {
                self.offered.extend(index::offered(&entries));
                for inner in index::candidates(&entries, self.wanted) {
                    if let Some(found) = self.follow(inner, depth - 1)? {
                        return Ok(Some(found));
                    }
                }
                Ok(None)
            }
            Document::Manifest(manifest) => self.accept(entry, bytes, &manifest),
        }
    }

    fn accept(
        &mut self,
        entry: &IndexEntry,
        manifest_bytes: Vec<u8>,
        manifest: &Manifest,
    ) -> Result<Option<Found>, ImportError> {
        let config_bytes = read_blob(self.members, manifest.config, CONFIG_LIMIT)?;
        let config = Config::parse(&config_bytes)?;
        if !self.wanted.accepts(&config.platform) {
            self.offered.push(config.platform.to_string());
            return Ok(None);
        }
        let size = manifest_bytes.len() as u64;
        let image = StoredImage::combine(entry.blob.digest, size, manifest, &config_bytes)?;
        Ok(Some(Found {
            blob: entry.blob,
            manifest_bytes,
            config_bytes,
            image,
        }))
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Reads a small blob and checks it.
fn read_blob(members: &Members<'_>, blob: Blob, limit: u64) -> Result<Vec<u8>, ImportError> {
    let name = blob_name(&blob.digest);
    let bytes = members.read(&name, limit)?;
    let actual = Digest::from_bytes(Sha256::digest(&bytes).into());
    if actual != blob.digest {
        return Err(ImportError::Digest {
            name,
            expected: blob.digest,
            actual,
        });
    }
    match bytes.len() as u64 {
        actual if actual != blob.size => Err(ImportError::Size {
            name,
            expected: blob.size,
            actual,
        }),
        _ => Ok(bytes),
    }
}

fn stage_layers(
    store: &BlobStore,
    members: &Members<'_>,
    image: &StoredImage,
    staged: &mut HashMap<Digest, Option<PreparedBlob>>,
) -> Result<(), ImportError> {
    for layer in &image.layers {
        if staged.contains_key(&layer.digest) {
            continue;
        }
        let name = blob_name(&layer.digest);
        let blob = match members.find(&name) {
            Ok(Place { size: actual, .. }) if actual != layer.size => {
                return Err(ImportError::Size {
                    name,
                    expected: layer.size,
                    actual,
                });
            }
            Ok(place) => members.stage_known(store, place, layer.digest)?,
            // An archive may leave out layers that the receiver has.
            Err(_) if store.contains(&layer.digest) => None,
            Err(error) => return Err(error),
        };
        staged.insert(layer.digest, blob);
    }
    Ok(())
}

/// The name that the tools leave with an image: containerd and Docker a complete one, others often only a tag, which alone
/// says too little.
fn name(annotations: &HashMap<String, String>) -> Result<Option<String>, ImportError> {
    let name = annotations.get("io.containerd.image.name").or_else(|| {
        annotations
            .get("org.opencontainers.image.ref.name")
            .filter(|name| name.contains(['/', ':']))
    });
    match name {
        Some(name) => Ok(Some(name.parse::<ImageReference>()?.to_string())),
        None => Ok(None),
    }
}
