//! What the store knows about an image: its manifest and its config, read, checked, and written.
//!
//! ```text
//! manifest ──► config      architecture, command, environment, diff_ids (hashes of the unpacked layers)
//!    └───────► layers      one compressed tar each, lowest first; as many as there are diff_ids
//! ```
//!
//! Both forms that are met are read: OCI (image-spec, manifest.md and config.md) and Docker's schema 2. What is written is OCI.
//! Which images there are and what they are called is not known here.

use std::collections::{BTreeMap, HashMap};

use offshoot_model::{Digest, DigestError, EnvVar, ErrorKind, Explain, ImageConfig};
use offshoot_store::blobs::{BlobError, BlobStore};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::platform::Platform;

/// The largest manifest or index that is read, as containerd and the registries have it.
pub const MANIFEST_LIMIT: u64 = 4 << 20;
/// The largest config that is read; containerd's limit for what it reads into memory.
pub const CONFIG_LIMIT: u64 = 4 << 20;
/// The most layers an image may have. Docker stops at 127; a manifest within its limit could name 20,000.
pub const MAX_LAYERS: usize = 512;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// How a layer blob is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip (RFC 1952), possibly of several members.
    Gzip,
    /// Zstandard (RFC 8878), possibly of several frames.
    Zstd,
}

impl Compression {
    /// The compression that a layer's media type names; `None` where it names no layer we can unpack.
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        match media_type {
            OCI_LAYER
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar" => Some(Self::None),
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Some(Self::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The compression that the first bytes of a file show.
    pub fn of_magic(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame (RFC 8878, 3.1.2), with which eStargz-like zstd files begin.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    fn oci_media_type(self) -> String {
        let suffix = match self {
            Self::None => "",
            Self::Gzip => "+gzip",
            Self::Zstd => "+zstd",
        };
        format!("{OCI_LAYER}{suffix}")
    }
}

/// One layer of a stored image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredLayer {
    /// The blob.
    pub digest: Digest,
    /// Its size in bytes, compressed as it is.
    pub size: u64,
    /// The digest of the unpacked tar.
    pub diff_id: Digest,
    /// How the blob is compressed.
    pub compression: Compression,
}

/// An image of the store: what its manifest and its config say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredImage {
    /// The manifest: the image's identity.
    pub digest: Digest,
    /// Its size in bytes.
    pub manifest_size: u64,
    /// The config.
    pub config_digest: Digest,
    /// Its size in bytes.
    pub config_size: u64,
    /// What to run.
    pub config: ImageConfig,
    /// In Go's words: `amd64`, `arm64`.
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// When it was made, RFC 3339, as the image says.
    pub created: Option<String>,
    /// The config's labels.
    pub labels: BTreeMap<String, String>,
    /// Lowest first.
    pub layers: Vec<StoredLayer>,
}

/// Why a manifest or a config cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A blob of the image cannot be read or written.
    #[error("cannot use the {what} {digest}")]
    Blob {
        /// `manifest` or `config`.
        what: &'static str,
        /// Which.
        digest: Digest,
        /// Why.
        #[source]
        source: BlobError,
    },
    /// A blob cannot be stored.
    #[error("cannot store the {what} of the image")]
    Store {
        /// `manifest` or `config`.
        what: &'static str,
        /// Why.
        #[source]
        source: BlobError,
    },
    /// It is not the JSON it should be.
    #[error("{what} is malformed")]
    Json {
        /// `manifest`, `index` or `config`.
        what: &'static str,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// It is larger than such a document may be.
    #[error("{what} has more than {limit} bytes")]
    TooLarge {
        /// `manifest`, `index` or `config`.
        what: &'static str,
        /// The most.
        limit: u64,
    },
    /// A digest in it is none.
    #[error("{what} names a digest that cannot be used")]
    Digest {
        /// Where it stands.
        what: &'static str,
        /// Why.
        #[source]
        source: DigestError,
    },
    /// Docker's schema 1, or what comes after 2.
    #[error("manifest has schema version {version}: only 2 is known")]
    SchemaVersion {
        /// What it says.
        version: u32,
    },
    /// It could be read as a manifest and as an index (CVE-2021-41190).
    #[error("manifest is ambiguous: it has both layers and manifests, or neither")]
    Ambiguous,
    /// An index stands where an image should.
    #[error("an index of images stands where one image is expected")]
    UnexpectedIndex,
    /// A Helm chart, a signature, a WebAssembly module …
    #[error("not a runnable image: its {what} has the media type `{media_type}`")]
    MediaType {
        /// `manifest`, `config` or `layer`.
        what: &'static str,
        /// What it says.
        media_type: String,
    },
    /// The config does not belong to the manifest.
    #[error("image has {layers} layers but {diff_ids} diff_ids")]
    LayerCount {
        /// Layers in the manifest.
        layers: usize,
        /// Ids in the config.
        diff_ids: usize,
    },
    /// More layers than we unpack.
    #[error("image has {count} layers: at most {MAX_LAYERS} are supported")]
    TooManyLayers {
        /// How many.
        count: usize,
    },
    /// The manifest gives the config another size than it has.
    #[error("config {digest} has {actual} bytes, but the manifest says {expected}")]
    ConfigSize {
        /// Which config.
        digest: Digest,
        /// By the manifest.
        expected: u64,
        /// By the store.
        actual: u64,
    },
}

impl Explain for ManifestError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Blob { source, .. } | Self::Store { source, .. } => source.kind(),
            Self::MediaType { .. } => ErrorKind::InvalidRequest,
            _ => ErrorKind::BadContent,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Blob { source, .. } | Self::Store { source, .. } => source.hints(),
            Self::SchemaVersion { version: 1 } => {
                vec!["push the image again with a current tool: `skopeo copy` converts schema 1".into()]
            }
            _ => Vec::new(),
        }
    }
}

/// A manifest or an index, as it came.
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Vec<IndexEntry>),
}

/// A manifest whose digests and media types are checked.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Blob,
    pub(crate) layers: Vec<(Blob, Compression)>,
}

/// A digest and how many bytes belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// One image, or an index of its own, in an index.
#[derive(Debug)]
pub(crate) struct IndexEntry {
    pub(crate) blob: Blob,
    pub(crate) platform: Option<Platform>,
    pub(crate) annotations: HashMap<String, String>,
}

/// What tells a manifest from an index before either is parsed.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: Option<u32>,
    media_type: Option<String>,
    layers: Option<IgnoredAny>,
    config: Option<IgnoredAny>,
    manifests: Option<IgnoredAny>,
}

fn json<'a, T: Deserialize<'a>>(what: &'static str, bytes: &'a [u8]) -> Result<T, ManifestError> {
    serde_json::from_slice(bytes).map_err(|source| ManifestError::Json { what, source })
}

fn blob(what: &'static str, descriptor: &oci_spec::image::Descriptor) -> Result<Blob, ManifestError> {
    let digest = descriptor
        .digest()
        .to_string()
        .parse()
        .map_err(|source| ManifestError::Digest { what, source })?;
    Ok(Blob {
        digest,
        size: descriptor.size(),
    })
}

impl Document {
    /// Reads a manifest or an index; which of them it is shows in its shape, and its media type must agree.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() as u64 > MANIFEST_LIMIT {
            return Err(ManifestError::TooLarge {
                what: "manifest",
                limit: MANIFEST_LIMIT,
            });
        }
        let probe: Probe = json("manifest", bytes)?;
        match probe.schema_version {
            Some(2) => {}
            version => {
                return Err(ManifestError::SchemaVersion {
                    version: version.unwrap_or_default(),
                });
            }
        }
        let is_manifest = probe.layers.is_some() || probe.config.is_some();
        if is_manifest == probe.manifests.is_some() {
            return Err(ManifestError::Ambiguous);
        }
        let media_types = if is_manifest {
            [OCI_MANIFEST, DOCKER_MANIFEST]
        } else {
            [OCI_INDEX, DOCKER_INDEX]
        };
        if let Some(media_type) = probe.media_type
            && !media_types.contains(&media_type.as_str())
        {
            return Err(ManifestError::MediaType {
                what: "manifest",
                media_type,
            });
        }
        if is_manifest {
            Manifest::parse(bytes).map(Self::Manifest)
        } else {
            parse_index(bytes).map(Self::Index)
        }
    }
}

fn parse_index(bytes: &[u8]) -> Result<Vec<IndexEntry>, ManifestError> {
    let index: oci_spec::image::ImageIndex = json("index", bytes)?;
    let mut entries = Vec::with_capacity(index.manifests().len());
    for descriptor in index.manifests() {
        let media_type = descriptor.media_type().to_string();
        // An index may also hold what is no image (image-spec, image-index.md): not ours to judge.
        if ![OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_INDEX].contains(&media_type.as_str()) {
            continue;
        }
        entries.push(IndexEntry {
            blob: blob("index", descriptor)?,
            platform: descriptor.platform().as_ref().map(|platform| Platform {
                os: platform.os().to_string(),
                architecture: platform.architecture().to_string(),
                variant: platform.variant().clone(),
            }),
            annotations: descriptor.annotations().clone().unwrap_or_default(),
        });
    }
    Ok(entries)
}

impl Manifest {
    fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: oci_spec::image::ImageManifest = json("manifest", bytes)?;
        let config_type = manifest.config().media_type().to_string();
        if ![OCI_CONFIG, DOCKER_CONFIG].contains(&config_type.as_str()) {
            return Err(ManifestError::MediaType {
                what: "config",
                media_type: config_type,
            });
        }
        let config = blob("manifest", manifest.config())?;
        if config.size > CONFIG_LIMIT {
            return Err(ManifestError::TooLarge {
                what: "config",
                limit: CONFIG_LIMIT,
            });
        }
        if manifest.layers().len() > MAX_LAYERS {
            return Err(ManifestError::TooManyLayers {
                count: manifest.layers().len(),
            });
        }
        let layers = manifest.layers().iter().map(|layer| {
            let media_type = layer.media_type().to_string();
            match Compression::of_media_type(&media_type) {
                Some(compression) => Ok((blob("manifest", layer)?, compression)),
                None => Err(ManifestError::MediaType {
                    what: "layer",
                    media_type,
                }),
            }
        });
        Ok(Self {
            config,
            layers: layers.collect::<Result<_, _>>()?,
        })
    }
}

/// A config, checked.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) run: ImageConfig,
    pub(crate) platform: Platform,
    pub(crate) created: Option<String>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) diff_ids: Vec<Digest>,
}

impl Config {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() as u64 > CONFIG_LIMIT {
            return Err(ManifestError::TooLarge {
                what: "config",
                limit: CONFIG_LIMIT,
            });
        }
        let config: oci_spec::image::ImageConfiguration = json("config", bytes)?;
        let diff_ids = config.rootfs().diff_ids().iter().map(|id| id.parse::<Digest>());
        let diff_ids = diff_ids
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| ManifestError::Digest {
                what: "config",
                source,
            })?;
        let run = config.config().clone().unwrap_or_default();
        Ok(Self {
            platform: Platform {
                os: config.os().to_string(),
                architecture: config.architecture().to_string(),
                variant: config.variant().clone(),
            },
            created: config.created().clone(),
            labels: run.labels().clone().unwrap_or_default().into_iter().collect(),
            run: ImageConfig {
                entrypoint: run.entrypoint().clone().unwrap_or_default(),
                cmd: run.cmd().clone().unwrap_or_default(),
                env: run
                    .env()
                    .iter()
                    .flatten()
                    .filter_map(|text| env_var(text))
                    .collect(),
                working_dir: run.working_dir().clone().unwrap_or_default(),
                user: run.user().clone().unwrap_or_default(),
                stop_signal: run.stop_signal().clone().unwrap_or_default(),
            },
            diff_ids,
        })
    }
}

/// Docker runs images whose environment has entries without `=`, and so do we: without those entries.
fn env_var(text: &str) -> Option<EnvVar> {
    let var = text.parse();
    if var.is_err() {
        tracing::warn!(entry = text, "passing over an entry of the image's environment");
    }
    var.ok()
}

impl StoredImage {
    /// Reads manifest and config from the store and checks that they belong together. The layers are not looked at.
    pub fn load(store: &BlobStore, digest: &Digest) -> Result<Self, ManifestError> {
        let read = |what, digest: &Digest, limit| {
            store
                .read_small(digest, limit)
                .map_err(|source| ManifestError::Blob {
                    what,
                    digest: *digest,
                    source,
                })
        };
        let bytes = read("manifest", digest, MANIFEST_LIMIT)?;
        let Document::Manifest(manifest) = Document::parse(&bytes)? else {
            return Err(ManifestError::UnexpectedIndex);
        };
        let config_bytes = read("config", &manifest.config.digest, CONFIG_LIMIT)?;
        Self::combine(*digest, bytes.len() as u64, &manifest, &config_bytes)
    }

    /// Puts a manifest and its config together.
    pub(crate) fn combine(
        digest: Digest,
        manifest_size: u64,
        manifest: &Manifest,
        config_bytes: &[u8],
    ) -> Result<Self, ManifestError> {
        let actual = config_bytes.len() as u64;
        if actual != manifest.config.size {
            let Blob {
                digest,
                size: expected,
            } = manifest.config;
            return Err(ManifestError::ConfigSize {
                digest,
                expected,
                actual,
            });
        }
        let config = Config::parse(config_bytes)?;
        if manifest.layers.len() != config.diff_ids.len() {
            return Err(ManifestError::LayerCount {
                layers: manifest.layers.len(),
                diff_ids: config.diff_ids.len(),
            });
        }
        let layers = manifest
            .layers
            .iter()
            .zip(&config.diff_ids)
            .map(|((blob, compression), diff_id)| StoredLayer {
                digest: blob.digest,
                size: blob.size,
                diff_id: *diff_id,
                compression: *compression,
            });
        Ok(Self {
            digest,
            manifest_size,
            config_digest: manifest.config.digest,
            config_size: actual,
            config: config.run,
            architecture: config.platform.architecture,
            os: config.platform.os,
            created: config.created,
            labels: config.labels,
            layers: layers.collect(),
        })
    }

    /// The bytes of all its blobs; a layer that occurs twice counts once.
    pub fn size(&self) -> u64 {
        let layers: BTreeMap<_, _> = self
            .layers
            .iter()
            .map(|layer| (layer.digest, layer.size))
            .collect();
        self.manifest_size + self.config_size + layers.values().sum::<u64>()
    }

    /// Every blob it needs: manifest, config, layers.
    pub fn blobs(&self) -> impl Iterator<Item = Digest> + '_ {
        [self.digest, self.config_digest]
            .into_iter()
            .chain(self.layers.iter().map(|layer| layer.digest))
    }
}

/// An image to be written: its layers are in the store already.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// What to run.
    pub config: ImageConfig,
    /// For which machines.
    pub platform: Platform,
    /// RFC 3339; the same input with the same time makes the same image.
    pub created: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Lowest first.
    pub layers: Vec<StoredLayer>,
    /// What made it, for the history of its topmost layer.
    pub created_by: String,
}

impl NewImage {
    /// Writes config and manifest; gives the manifest's digest.
    pub fn store(&self, store: &BlobStore) -> Result<Digest, ManifestError> {
        let run = &self.config;
        let mut config = serde_json::json!({
            "architecture": self.platform.architecture,
            "os": self.platform.os,
            "config": {
                "Env": run.env.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "Cmd": run.cmd,
            },
            "rootfs": {
                "type": "layers",
                "diff_ids": self.layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>(),
            },
            "history": [{ "created_by": self.created_by }],
        });
        if let Some(variant) = &self.platform.variant {
            config["variant"] = variant.as_str().into();
        }
        if let Some(created) = &self.created {
            config["created"] = created.as_str().into();
            config["history"][0]["created"] = created.as_str().into();
        }
        let texts = [
            ("WorkingDir", &run.working_dir),
            ("User", &run.user),
            ("StopSignal", &run.stop_signal),
        ];
        for (key, value) in texts.into_iter().filter(|(_, value)| !value.is_empty()) {
            config["config"][key] = value.as_str().into();
        }
        if !run.entrypoint.is_empty() {
            config["config"]["Entrypoint"] = run.entrypoint.as_slice().into();
        }
        if !self.labels.is_empty() {
            config["config"]["Labels"] = serde_json::json!(self.labels);
        }
        let config = config.to_string();
        let digest = store
            .put(config.as_bytes())
            .map_err(|source| ManifestError::Store {
                what: "config",
                source,
            })?;
        write_manifest(
            store,
            Blob {
                digest,
                size: config.len() as u64,
            },
            &self.layers,
        )
    }
}

/// Writes an OCI manifest for a config that is in the store; gives its digest.
pub(crate) fn write_manifest(
    store: &BlobStore,
    config: Blob,
    layers: &[StoredLayer],
) -> Result<Digest, ManifestError> {
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            serde_json::json!({
                "mediaType": layer.compression.oci_media_type(),
                "digest": layer.digest,
                "size": layer.size,
            })
        })
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": { "mediaType": OCI_CONFIG, "digest": config.digest, "size": config.size },
        "layers": layers,
    });
    store
        .put(manifest.to_string().as_bytes())
        .map_err(|source| ManifestError::Store {
            what: "manifest",
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, BlobStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path()).unwrap();
        (dir, store)
    }

    fn new_image(store: &BlobStore) -> NewImage {
        let layer = |text: &[u8], compression| {
            let digest = store.put(text).unwrap();
            StoredLayer {
                digest,
                size: text.len() as u64,
                diff_id: digest,
                compression,
            }
        };
        NewImage {
            config: ImageConfig {
                entrypoint: vec!["/e".into()],
                cmd: vec!["sh".into(), "-c".into()],
                env: vec!["A=b=c".parse().unwrap()],
                working_dir: "/w".into(),
                user: "1:2".into(),
                stop_signal: "SIGINT".into(),
            },
            platform: "linux/arm64/v8".parse().unwrap(),
            created: Some("2024-01-02T03:04:05Z".into()),
            labels: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
            layers: vec![
                layer(b"one", Compression::None),
                layer(b"twoo", Compression::Gzip),
                layer(b"twoo", Compression::Zstd),
            ],
            created_by: "test".into(),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let (_dir, store) = store();
        let new = new_image(&store);
        let digest = new.store(&store).unwrap();
        assert_eq!(
            new.store(&store).unwrap(),
            digest,
            "the same image twice is one image"
        );
        let image = StoredImage::load(&store, &digest).unwrap();
        assert_eq!(image.config, new.config);
        assert_eq!(image.layers, new.layers);
        assert_eq!(image.labels, new.labels);
        assert_eq!(
            (image.os.as_str(), image.architecture.as_str()),
            ("linux", "arm64")
        );
        assert_eq!(image.created.as_deref(), Some("2024-01-02T03:04:05Z"));
        assert_eq!(
            image.size(),
            store.list().unwrap().iter().map(|(_, size)| size).sum::<u64>()
        );
        assert!(image.blobs().all(|blob| store.contains(&blob)));
    }

    fn digest(byte: u8) -> Digest {
        Digest::from_bytes([byte; 32])
    }

    fn manifest_json(config_type: &str, layer_type: &str) -> String {
        serde_json::json!({
            "schemaVersion": 2,
            "config": { "mediaType": config_type, "digest": digest(1), "size": 3 },
            "layers": [{ "mediaType": layer_type, "digest": digest(2), "size": 5 }],
        })
        .to_string()
    }

    #[test]
    fn both_manifest_forms_are_read_and_the_rest_is_refused() {
        let read = |text: &str| Document::parse(text.as_bytes());
        for (config, layer) in [
            (OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar+gzip"),
            (DOCKER_CONFIG, "application/vnd.docker.image.rootfs.diff.tar.gzip"),
        ] {
            let Ok(Document::Manifest(manifest)) = read(&manifest_json(config, layer)) else {
                panic!("{config}")
            };
            assert_eq!(
                manifest.config,
                Blob {
                    digest: digest(1),
                    size: 3
                }
            );
            assert_eq!(
                manifest.layers,
                [(
                    Blob {
                        digest: digest(2),
                        size: 5
                    },
                    Compression::Gzip
                )]
            );
        }
        let refuse = |text: &str| read(text).err().unwrap_or_else(|| panic!("{text}"));
        assert!(matches!(
            refuse(&manifest_json(
                "application/vnd.cncf.helm.config.v1+json",
                OCI_LAYER
            )),
            ManifestError::MediaType { what: "config", .. }
        ));
        assert!(matches!(
            refuse(&manifest_json(
                OCI_CONFIG,
                "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
            )),
            ManifestError::MediaType { what: "layer", .. }
        ));
        assert!(matches!(refuse("{"), ManifestError::Json { .. }));
        assert!(matches!(refuse("[]"), ManifestError::Json { .. }));
        assert!(matches!(
            refuse(r#"{"schemaVersion":1,"layers":[]}"#),
            ManifestError::SchemaVersion { version: 1 }
        ));
        assert!(matches!(
            refuse(r#"{"layers":[]}"#),
            ManifestError::SchemaVersion { version: 0 }
        ));
        assert!(matches!(
            refuse(r#"{"schemaVersion":2}"#),
            ManifestError::Ambiguous
        ));
        assert!(matches!(
            refuse(r#"{"schemaVersion":2,"layers":[],"manifests":[]}"#),
            ManifestError::Ambiguous
        ));
        assert!(matches!(
            refuse(&format!(
                r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","manifests":[]}}"#
            )),
            ManifestError::MediaType { what: "manifest", .. }
        ));
        let sha512 = manifest_json(OCI_CONFIG, OCI_LAYER)
            .replace(&digest(2).to_string(), &format!("sha512:{}", "ab".repeat(64)));
        assert!(matches!(refuse(&sha512), ManifestError::Digest { .. }));
        let huge = format!("{{\"schemaVersion\":2,{}\"layers\":[]}}", " ".repeat(4 << 20));
        assert!(matches!(refuse(&huge), ManifestError::TooLarge { .. }));
        let layer = serde_json::json!({"mediaType": OCI_LAYER, "digest": digest(2), "size": 5});
        let many = serde_json::json!({
            "schemaVersion": 2,
            "config": { "mediaType": OCI_CONFIG, "digest": digest(1), "size": 3 },
            "layers": vec![layer; MAX_LAYERS + 1],
        });
        assert!(matches!(
            refuse(&many.to_string()),
            ManifestError::TooManyLayers { .. }
        ));
    }

    #[test]
    fn an_index_lists_images_and_skips_the_rest() {
        let index = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": DOCKER_INDEX,
            "manifests": [
                { "mediaType": DOCKER_MANIFEST, "digest": digest(1), "size": 5,
                  "platform": { "os": "linux", "architecture": "arm64", "variant": "v8" } },
                { "mediaType": OCI_INDEX, "digest": digest(2), "size": 5, "annotations": { "a": "b" } },
                { "mediaType": "application/x-other", "digest": digest(3), "size": 5 },
            ],
        });
        let Ok(Document::Index(entries)) = Document::parse(index.to_string().as_bytes()) else {
            panic!()
        };
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].platform, Some("linux/arm64/v8".parse().unwrap()));
        assert_eq!(entries[1].annotations["a"], "b");
    }

    #[test]
    fn a_manifest_and_a_config_that_do_not_fit_are_refused() {
        let (_dir, store) = store();
        let new = new_image(&store);
        let image = StoredImage::load(&store, &new.store(&store).unwrap()).unwrap();
        let config = Blob {
            digest: image.config_digest,
            size: image.config_size,
        };

        let fewer = write_manifest(&store, config, &new.layers[..1]).unwrap();
        assert!(matches!(
            StoredImage::load(&store, &fewer),
            Err(ManifestError::LayerCount {
                layers: 1,
                diff_ids: 3
            })
        ));
        let longer = write_manifest(
            &store,
            Blob {
                size: config.size + 1,
                ..config
            },
            &new.layers,
        )
        .unwrap();
        assert!(matches!(
            StoredImage::load(&store, &longer),
            Err(ManifestError::ConfigSize { .. })
        ));
        let missing = write_manifest(
            &store,
            Blob {
                digest: digest(9),
                ..config
            },
            &new.layers,
        )
        .unwrap();
        let error = StoredImage::load(&store, &missing).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(!error.hints().is_empty());
    }

    #[test]
    fn configs_as_docker_writes_them_are_read() {
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","container":"x","docker_version":"20","created":"2024-01-01T00:00:00Z",
               "config":{{"Hostname":"","User":"","AttachStdin":false,"ExposedPorts":{{"80/tcp":{{}}}},"Tty":false,
               "Env":["PATH=/bin","BROKEN"],"Cmd":["a"],"Image":"","Volumes":null,"WorkingDir":"","Entrypoint":null,
               "OnBuild":null,"Labels":null}},
               "history":[{{"created":"2024-01-01T00:00:00Z","created_by":"x","empty_layer":true}}],
               "rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
            digest(7)
        );
        let config = Config::parse(text.as_bytes()).unwrap();
        assert_eq!(config.run.cmd, ["a"]);
        assert_eq!(config.run.env.len(), 1);
        assert_eq!(config.diff_ids, [digest(7)]);
        assert!(Config::parse(text.replace("sha256:", "md5:").as_bytes()).is_err());
        assert!(Config::parse(b"{}").is_err());
    }

    #[test]
    fn magic_bytes_show_the_compression() {
        for (start, expected) in [
            (&[0x1f, 0x8b, 8][..], Compression::Gzip),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
            (&[0x5e, 0x2a, 0x4d, 0x18], Compression::Zstd),
            (b"usr/", Compression::None),
            (&[], Compression::None),
        ] {
            assert_eq!(Compression::of_magic(start), expected);
        }
    }
}
