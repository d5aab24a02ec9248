//! Pulls images from OCI registries.
//!
//! ```text
//! reference ──► manifest or index ──► manifest of the platform ──► config ──► layers (several at once) ──► manifest stored
//! ```
//!
//! The manifest is stored last: where it is, all it names is. A pull that breaks off leaves whole layers, and the beginnings
//! of others, and the next one goes on from there. Where credentials come from is the caller's matter.

mod client;
mod error;
mod fetch;

use std::collections::BTreeMap;
use std::fmt;

use futures::{StreamExt, TryStreamExt};
use offshoot_model::{ByteSize, Digest, Progress};
use offshoot_store::blobs::BlobStore;

pub use self::error::PullError;

use self::client::Client;
use crate::index::{self, MAX_DEPTH};
use crate::manifest::{
    Blob, CONFIG_LIMIT, Config, Document, IndexEntry, Manifest, ManifestError, StoredImage,
};
use crate::platform::Platform;
use crate::reference::ImageReference;

/// Layers fetched at once. One connection rarely fills a line; many only make the first layer late. Docker has 3.
const LAYERS_AT_ONCE: usize = 4;

/// Entries of one index that are looked at: of those that fit a platform or name none there are one or two, unless somebody
/// wants us to ask forever.
const MAX_CANDIDATES: usize = 16;

/// How we show who we are.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum RegistryAuth {
    /// Not at all.
    #[default]
    Anonymous,
    /// With a name and a password, or a token in its place.
    Basic {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },
    /// With a token that the registry itself accepts.
    Bearer(String),
}

/// Without the secrets.
impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Basic { user, .. } => f
                .debug_struct("Basic")
                .field("user", user)
                .finish_non_exhaustive(),
            Self::Bearer(_) => f.write_str("Bearer(..)"),
        }
    }
}

/// What a pull is asked to do.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// Which image of several platforms, `OS/ARCHITECTURE[/VARIANT]`; this machine's where there is none.
    pub platform: Option<String>,
    /// Who asks.
    pub auth: RegistryAuth,
    /// Registries (`host` or `host:port`) that speak HTTP without TLS. Those on loopback always do.
    pub plain_http: Vec<String>,
}

/// Makes sure that the store has the image; gives the digest of its manifest, which for an index is the platform's own.
///
/// Dropping the future stops the pull; what came so far is kept for the next one.
pub async fn pull(
    store: &BlobStore,
    reference: &str,
    options: &PullOptions,
    progress: &Progress,
) -> Result<Digest, PullError> {
    let reference: ImageReference = reference.parse()?;
    let wanted = Platform::parse_or_host(options.platform.as_deref())?;
    let client = Client::connect(&reference, options).await?;
    let mut search = Search {
        client: &client,
        store,
        reference: &reference,
        wanted: &wanted,
        offered: Vec::new(),
    };
    let Some((bytes, image)) = search.find(progress).await? else {
        let mut offered = search.offered;
        offered.sort();
        offered.dedup();
        return Err(PullError::Platform {
            reference: reference.to_string(),
            wanted: wanted.to_string(),
            offered,
        });
    };
    fetch_layers(&client, store, &image, progress).await?;
    Ok(store.put(&bytes)?)
}

/// The way from the reference to the image of the wanted platform.
struct Search<'a> {
    client: &'a Client,
    store: &'a BlobStore,
    reference: &'a ImageReference,
    wanted: &'a Platform,
    offered: Vec<String>,
}

impl Search<'_> {
    /// The manifest's bytes and what it says; `None` when there is none for the platform.
    async fn find(&mut self, progress: &Progress) -> Result<Option<(Vec<u8>, StoredImage)>, PullError> {
        // Depth first, without recursion: the entries still to be looked at, each with how deep it lies.
        let mut waiting: Vec<(Option<Blob>, usize)> = vec![(None, 0)];
        while let Some((blob, depth)) = waiting.pop() {
            let (bytes, digest) = self.client.manifest(blob.map(|blob| blob.digest)).await?;
            match Document::parse(&bytes).map_err(|source| self.manifest_error(source))? {
                Document::Manifest(manifest) => {
                    if let Some(image) = self.accept(&bytes, digest, &manifest, progress).await? {
                        return Ok(Some((bytes, image)));
                    }
                }
                Document::Index(_) if depth == MAX_DEPTH => {
                    return Err(PullError::TooDeep {
                        reference: self.reference.to_string(),
                    });
                }
                Document::Index(entries) => {
                    self.offered.extend(index::offered(&entries));
                    let mut next: Vec<&IndexEntry> = index::candidates(&entries, self.wanted);
                    next.truncate(MAX_CANDIDATES);
                    waiting.extend(next.iter().rev().map(|entry| (Some(entry.blob), depth + 1)));
                }
            }
        }
        Ok(None)
    }

    /// Fetches the config, which says for certain what the image is for.
    async fn accept(
        &mut self,
        bytes: &[u8],
        digest: Digest,
        manifest: &Manifest,
        progress: &Progress,
    ) -> Result<Option<StoredImage>, PullError> {
        let label = format!("config {}", manifest.config.digest.short());
        fetch::ensure(self.client, self.store, manifest.config, &label, progress).await?;
        let config_bytes = self.store.read_small(&manifest.config.digest, CONFIG_LIMIT)?;
        let config = Config::parse(&config_bytes).map_err(|source| self.manifest_error(source))?;
        if !self.wanted.accepts(&config.platform) {
            self.offered.push(config.platform.to_string());
            return Ok(None);
        }
        let size = bytes.len() as u64;
        let image = StoredImage::combine(digest, size, manifest, &config_bytes);
        image.map(Some).map_err(|source| self.manifest_error(source))
    }

    fn manifest_error(&self, source: ManifestError) -> PullError {
        PullError::Manifest {
            reference: self.reference.to_string(),
            source: source.into(),
        }
    }
}

async fn fetch_layers(
    client: &Client,
    store: &BlobStore,
    image: &StoredImage,
    progress: &Progress,
) -> Result<(), PullError> {
    // A layer may occur twice, and must not wait for itself.
    let layers: BTreeMap<Digest, u64> = image
        .layers
        .iter()
        .map(|layer| (layer.digest, layer.size))
        .collect();
    let missing: Vec<Blob> = layers
        .into_iter()
        .filter(|(digest, size)| store.size(digest).ok() != Some(*size))
        .map(|(digest, size)| Blob { digest, size })
        .collect();
    check_room(store, image, &missing)?;
    futures::stream::iter(missing)
        .map(|blob| async move {
            let label = format!("layer {}", blob.digest.short());
            fetch::ensure(client, store, blob, &label, progress).await
        })
        .buffer_unordered(LAYERS_AT_ONCE)
        .try_collect::<()>()
        .await
}

/// Refuses now what would fill the disk later.
fn check_room(store: &BlobStore, image: &StoredImage, missing: &[Blob]) -> Result<(), PullError> {
    let needed = missing
        .iter()
        .fold(0_u64, |sum, blob| sum.saturating_add(blob.size));
    // Where it cannot be asked, the write itself will tell.
    let available = offshoot_sys::space::available(&store.path(&image.config_digest)).unwrap_or(u64::MAX);
    if needed > available {
        return Err(PullError::NoRoom {
            needed: ByteSize::from_bytes(needed),
            available: ByteSize::from_bytes(available),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
