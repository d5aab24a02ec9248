//! Images over the wire. References hold slashes, so they are query parameters.

use offshoot_model::{Digest, ImageConfig};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// One row of `image ls`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageSummary {
    /// The reference as users write it: `debian:bookworm`.
    pub reference: String,
    /// Manifest digest.
    #[schema(value_type = String)]
    pub digest: Digest,
    /// When it came into the store, milliseconds since the epoch.
    pub created_ms: u64,
    /// Blobs, bytes.
    pub size: u64,
    /// Whether its base is prepared.
    pub prepared: bool,
    /// Whether its base has the seeds that its VMs' disks are cloned from; absent when it is not prepared.
    #[serde(default)]
    pub seeds: Option<SeedState>,
    /// Why it cannot be used, when it cannot be read; its size is 0 then.
    #[serde(default)]
    pub problem: Option<String>,
}

/// How a base stands to its seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SeedState {
    /// It has them.
    Current,
    /// An earlier version made it without one of them: disks are built instead. `image prepare` makes a current base.
    Missing,
}

/// Everything about an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageDetails {
    /// What `image ls` shows.
    #[serde(flatten)]
    pub summary: ImageSummary,
    /// What it runs.
    pub config: ImageConfig,
    /// `architecture` of its config, as Go names it.
    pub architecture: String,
    /// `os` of its config.
    pub os: String,
    /// Its layers, lowest first.
    pub layers: Vec<LayerSummary>,
    /// Its base, when prepared.
    pub base: Option<BaseSummary>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LayerSummary {
    /// Digest of the blob as stored.
    #[schema(value_type = String)]
    pub digest: Digest,
    /// Digest of the uncompressed tar.
    #[schema(value_type = String)]
    pub diff_id: Digest,
    /// Bytes as stored.
    pub size: u64,
}

/// A prepared base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BaseSummary {
    /// Its id.
    pub id: String,
    /// Blocks on disk, bytes.
    pub disk_bytes: u64,
    /// The same, part by part.
    #[serde(default)]
    pub parts: BaseParts,
    /// The version of its form on disk; 0 from a daemon that does not say.
    #[serde(default)]
    pub format: u32,
    /// The seed of its VMs' overlay disks; absent when it has none.
    #[serde(default)]
    pub overlay_seed: Option<SeedSummary>,
    /// The seed of its VMs' work disks; absent when it has none.
    #[serde(default)]
    pub work_seed: Option<SeedSummary>,
}

/// A pristine disk in a base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SeedSummary {
    /// Its length, bytes: VMs' disks that are not smaller are clones of it.
    pub size: u64,
    /// What wrote it.
    pub writer: String,
}

/// Blocks on disk that the parts of a base take, bytes; 0 for a part that it does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BaseParts {
    /// `root.erofs`, the tree of the image as one file.
    pub root: u64,
    /// The pristine overlay disk.
    pub overlay_seed: u64,
    /// The pristine work disk.
    pub work_seed: u64,
    /// The tree of the image as files, made only for roots that need it.
    pub tree: u64,
}

/// Body of `POST /v1/images/pull`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PullRequest {
    /// What to pull.
    pub reference: String,
    /// `os/architecture[/variant]`; this machine's when absent.
    #[serde(default)]
    pub platform: Option<String>,
    /// The user's credentials for that registry.
    #[serde(default)]
    pub auth: Option<RegistryCredentials>,
    /// Make the base as well.
    #[serde(default = "yes")]
    pub prepare: bool,
}

/// Credentials for one registry, out of the user's `~/.docker/config.json`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum RegistryCredentials {
    /// HTTP basic, or the password grant of a token server.
    Basic {
        /// User.
        username: String,
        /// Password.
        password: String,
    },
    /// A registry token.
    Bearer {
        /// The token.
        token: String,
    },
}

impl std::fmt::Debug for RegistryCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegistryCredentials(…)")
    }
}

/// Body of `POST /v1/images/bootstrap`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootstrapRequest {
    /// `debian:SUITE`.
    pub recipe: String,
    /// Packages on top.
    #[serde(default)]
    pub include: Vec<String>,
    /// Another mirror than the host's.
    #[serde(default)]
    pub mirror: Option<String>,
    /// The reference to give it; the recipe's own when absent.
    #[serde(default)]
    pub name: Option<String>,
    /// Make the base as well.
    #[serde(default = "yes")]
    pub prepare: bool,
}

/// Body of `POST /v1/images/warm`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WarmRequest {
    /// The image, by reference.
    pub reference: String,
    /// How many warm slots it has from now on, until the daemon ends; 0 for none.
    #[schema(maximum = 64)]
    pub slots: u32,
}

/// Query of `POST /v1/images/import`, whose body is the archive.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
pub struct ImportQuery {
    /// The reference to give it; needed for a root file system and an archive that names none.
    #[serde(default)]
    pub name: Option<String>,
    /// Make the base as well.
    #[serde(default = "yes")]
    pub prepare: bool,
}

/// Query of `GET /v1/images`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct ImagesQuery {
    /// Only this one, by a reference or the first digits of a digest; all when absent.
    pub reference: Option<String>,
}

/// Query of `GET /v1/images/inspect` and of `POST /v1/images/verify`.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
pub struct ImageQuery {
    /// A reference, or the first digits of a digest.
    pub reference: String,
}

/// Query of `POST /v1/images/prepare`.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
pub struct PrepareQuery {
    /// A reference, or the first digits of a digest.
    pub reference: String,
    /// Also when it is prepared: make the base again and put it in the old one's place.
    #[serde(default)]
    pub force: bool,
}

/// What `POST /v1/images/verify` found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerifyReport {
    /// The reference as users write it.
    pub reference: String,
    /// Manifest digest.
    #[schema(value_type = String)]
    pub digest: Digest,
    /// Every blob of the image, then every part of its base.
    pub parts: Vec<VerifiedPart>,
    /// What to do about the damage; empty when there is none.
    pub hints: Vec<String>,
}

impl VerifyReport {
    /// Whether something is damaged.
    pub fn is_damaged(&self) -> bool {
        self.parts.iter().any(|part| part.state == PartState::Damaged)
    }
}

/// One thing that was checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerifiedPart {
    /// `manifest`, `config`, `layer`, or what part of the base it is.
    pub part: String,
    /// The blob's digest, or the base's file.
    pub name: String,
    /// Bytes that were read.
    pub bytes: u64,
    /// How it stands.
    pub state: PartState,
    /// What is wrong; absent when nothing is.
    pub reason: Option<String>,
}

/// How a part of an image stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PartState {
    /// It is what it was when it was stored.
    Ok,
    /// It is missing, cannot be read, or has other bytes.
    Damaged,
    /// There is no base yet; the next VM makes it.
    NotPrepared,
}

/// Query of `DELETE /v1/images`.
#[derive(Clone, Debug, Serialize, Deserialize, IntoParams)]
pub struct ImageRemoveQuery {
    /// A reference, or the first digits of a digest.
    pub reference: String,
    /// Also when stopped VMs were made from it.
    #[serde(default)]
    pub force: bool,
}

fn yes() -> bool {
    true
}
