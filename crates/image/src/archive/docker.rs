//! What `docker save` wrote before version 25, and skopeo's `docker-archive:` still does.
//!
//! ```text
//! manifest.json      [{ "Config": "<hex>.json", "RepoTags": ["debian:bookworm"], "Layers": ["<hex>.tar", …] }]
//! <hex>.json         the config, named after its digest
//! <hex>.tar          a layer, nearly always uncompressed; in old archives <id>/layer.tar, or a symlink to another one
//! ```

use std::collections::HashMap;

use offshoot_model::Digest;
use offshoot_store::blobs::{BlobStore, PreparedBlob};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::members::Members;
use super::{ImportError, Imported};
use crate::manifest::{
    Blob, CONFIG_LIMIT, Compression, Config, MANIFEST_LIMIT, MAX_LAYERS, ManifestError, StoredLayer,
    write_manifest,
};
use crate::platform::Platform;
use crate::reference::ImageReference;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// An image whose layers are all staged.
struct Ready {
    config_bytes: Vec<u8>,
    layers: Vec<StoredLayer>,
    names: Vec<String>,
}

/// Imports every image of the archive. All of them must run on `wanted`: the format knows no platforms.
pub(super) fn import(
    store: &BlobStore,
    members: &Members<'_>,
    wanted: &Platform,
) -> Result<Vec<Imported>, ImportError> {
    let saved: Vec<Saved> = members.json("manifest.json", MANIFEST_LIMIT)?;
    if saved.is_empty() {
        return Err(ImportError::Empty);
    }
    let mut staged = HashMap::new();
    let mut images = Vec::new();
    for image in &saved {
        images.push(prepare(store, members, wanted, image, &mut staged)?);
    }
    for blob in staged.into_values().flatten() {
        blob.publish()?;
    }
    let mut imported = Vec::new();
    for image in images {
        let digest = store.put(&image.config_bytes)?;
        let config = Blob {
            digest,
            size: image.config_bytes.len() as u64,
        };
        let digest = write_manifest(store, config, &image.layers)?;
        if image.names.is_empty() {
            imported.push(Imported {
                digest,
                reference: None,
            });
        }
        imported.extend(image.names.into_iter().map(|name| Imported {
            digest,
            reference: Some(name),
        }));
    }
    Ok(imported)
}

fn prepare(
    store: &BlobStore,
    members: &Members<'_>,
    wanted: &Platform,
    saved: &Saved,
    staged: &mut HashMap<Digest, Option<PreparedBlob>>,
) -> Result<Ready, ImportError> {
    let config_bytes = members.read(&saved.config, CONFIG_LIMIT)?;
    if let Some(expected) = digest_in_name(&saved.config) {
        let actual = Digest::from_bytes(Sha256::digest(&config_bytes).into());
        if actual != expected {
            return Err(ImportError::Digest {
                name: saved.config.clone(),
                expected,
                actual,
            });
        }
    }
    let config = Config::parse(&config_bytes)?;
    if !wanted.accepts(&config.platform) {
        let offered = vec![config.platform.to_string()];
        return Err(ImportError::Platform {
            wanted: wanted.to_string(),
            offered,
        });
    }
    let names = saved.layers.as_deref().unwrap_or_default();
    let (layers, diff_ids) = (names.len(), config.diff_ids.len());
    if layers != diff_ids {
        return Err(ManifestError::LayerCount { layers, diff_ids }.into());
    }
    if layers > MAX_LAYERS {
        return Err(ManifestError::TooManyLayers { count: layers }.into());
    }
    let layers = names
        .iter()
        .zip(&config.diff_ids)
        .map(|(name, diff_id)| stage_layer(store, members, name, diff_id, staged))
        .collect::<Result<_, _>>()?;
    let names = saved
        .repo_tags
        .iter()
        .flatten()
        .map(|tag| Ok(tag.parse::<ImageReference>()?.to_string()));
    Ok(Ready {
        config_bytes,
        layers,
        names: names.collect::<Result<_, ImportError>>()?,
    })
}

fn stage_layer(
    store: &BlobStore,
    members: &Members<'_>,
    name: &str,
    diff_id: &Digest,
    staged: &mut HashMap<Digest, Option<PreparedBlob>>,
) -> Result<StoredLayer, ImportError> {
    let place = members.find(name)?;
    let compression = members.compression(place)?;
    let digest = if compression == Compression::None {
        if !staged.contains_key(diff_id) {
            staged.insert(*diff_id, members.stage_known(store, place, *diff_id)?);
        }
        *diff_id
    } else {
        let actual = members.diff_id(place, compression)?;
        if actual != *diff_id {
            return Err(ImportError::Digest {
                name: name.to_owned(),
                expected: *diff_id,
                actual,
            });
        }
        let blob = members.stage(store, place)?;
        let digest = blob.digest();
        staged.insert(digest, Some(blob));
        digest
    };
    Ok(StoredLayer {
        digest,
        size: place.size,
        diff_id: *diff_id,
        compression,
    })
}

/// The digest that a file's name claims: `<hex>.json`, `blobs/sha256/<hex>`.
fn digest_in_name(name: &str) -> Option<Digest> {
    let last = name.rsplit('/').next()?;
    format!("sha256:{}", last.strip_suffix(".json").unwrap_or(last))
        .parse()
        .ok()
}
