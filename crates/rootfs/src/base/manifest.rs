//! `base.json`, and how a base gets its id. See `docs/formats/base.md`.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use offshoot_model::{BaseId, ByteSize, Digest};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::error::BaseError;

pub(super) const ROOT: &str = "root.erofs";
pub(super) const OVERLAY_SEED: &str = "overlay-seed.ext4";
pub(super) const WORK_SEED: &str = "work-seed.ext4";
pub(super) const MANIFEST: &str = "base.json";
/// Made when somebody needs it, and no part of what makes a base whole.
pub(super) const TREE: &str = "tree";

/// The format of the folder and of its manifest.
pub(super) const FORMAT: u32 = 2;
/// Whatever changes the bytes of a base but the image: raise the number of a part when its bytes change.
pub(super) const VARIANT: &str = "root.erofs=1 overlay-seed.ext4=1 work-seed.ext4=1";
/// Format and variant of bases of earlier versions whose roots are as ours, newest first. What they lack is done without: VMs'
/// disks are built where there is no seed. Format 1 has no work seed, and no hash of its overlay seed.
const EARLIER: [(u32, &str); 1] = [(1, "root.erofs=1 overlay-seed.ext4=1")];

/// The largest manifest that is read: ours have less than one KiB.
const LIMIT: u64 = 64 << 10;

/// What a base is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseManifest {
    /// The format of the folder: 2, or that of an earlier version.
    pub format: u32,
    /// The image it was made from.
    pub image: Digest,
    /// The variant that is in its id.
    pub variant: String,
    /// The root.
    pub root: RootInfo,
    /// The overlay seed; always there in format 2.
    #[serde(default)]
    pub overlay_seed: Option<SeedInfo>,
    /// The work seed; always there in format 2.
    #[serde(default)]
    pub work_seed: Option<SeedInfo>,
}

/// `root.erofs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootInfo {
    /// Its length, a multiple of 2 MiB.
    pub size: ByteSize,
    /// What it took on disk when it was made; holes take nothing.
    pub allocated: ByteSize,
    /// How many files, folders and others are in it.
    pub inodes: u64,
    /// The SHA-256 of all its bytes.
    pub sha256: Digest,
    /// What wrote it.
    pub writer: String,
}

/// `overlay-seed.ext4` or `work-seed.ext4`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedInfo {
    /// Its length.
    pub size: ByteSize,
    /// What it took on disk when it was made; 0 where that was not recorded (format 1).
    #[serde(default = "unrecorded")]
    pub allocated: ByteSize,
    /// The SHA-256 of its length and of every block that is not all zeros, after its number. Hashing ten GiB of zeros
    /// with them would take longer than everything else. Absent in format 1.
    #[serde(default)]
    pub blocks_sha256: Option<Digest>,
    /// What wrote it.
    pub writer: String,
}

fn unrecorded() -> ByteSize {
    ByteSize::from_bytes(0)
}

/// The id of the base of an image: the first 128 bits of a SHA-256 over the image's digest and the variant.
pub fn base_id(image: &Digest) -> BaseId {
    id_of(image, VARIANT)
}

/// The ids that bases of this image have which earlier versions made and which still serve, newest first.
pub fn earlier_base_ids(image: &Digest) -> impl Iterator<Item = BaseId> {
    EARLIER.map(|(_, variant)| id_of(image, variant)).into_iter()
}

fn id_of(image: &Digest, variant: &str) -> BaseId {
    BaseId::from_bytes(&Sha256::digest(format!("offshoot base\n{image}\n{variant}\n")))
}

/// The UUID of an image's root file system: made from its digest, so that the same image gives the same bytes.
pub(super) fn root_uuid(image: &Digest) -> [u8; 16] {
    let hash = Sha256::digest(format!("offshoot root uuid\n{image}\n"));
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hash[..16]);
    // A version 8 UUID (RFC 9562, 5.8): made by a scheme of one's own.
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

impl BaseManifest {
    /// Reads the manifest in a base's folder and compares it with what else is there. Cheap: nothing large is read.
    pub(super) fn read(dir: &Path, id: &BaseId) -> Result<Self, BaseError> {
        let path = dir.join(MANIFEST);
        let damaged = |what| BaseError::Damaged {
            dir: dir.to_owned(),
            what,
        };
        let mut text = Vec::new();
        match File::open(&path) {
            Ok(file) => {
                file.take(LIMIT + 1)
                    .read_to_end(&mut text)
                    .map_err(BaseError::io("read", &path))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                return Err(BaseError::NotFound { id: id.clone() });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged("it has no base.json"));
            }
            Err(source) => {
                return Err(BaseError::Io {
                    action: "open",
                    path,
                    source,
                });
            }
        }
        if text.len() as u64 > LIMIT {
            return Err(damaged("its base.json is too large"));
        }
        // The version first: another version may have other fields.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
            variant: String,
        }
        let unparsable = |_| damaged("its base.json does not parse");
        let version: Version = serde_json::from_slice(&text).map_err(unparsable)?;
        let known = (version.format, version.variant.as_str());
        if known != (FORMAT, VARIANT) && !EARLIER.contains(&known) {
            return Err(BaseError::Format { dir: dir.to_owned() });
        }
        let manifest: Self = serde_json::from_slice(&text).map_err(unparsable)?;
        if id_of(&manifest.image, &manifest.variant) != *id {
            return Err(damaged("it is the base of another image"));
        }
        if manifest.is_current() && !manifest.has_recorded_seeds() {
            return Err(damaged("its base.json says nothing of a seed"));
        }
        let seed_size = |seed: &Option<SeedInfo>| seed.as_ref().map(|seed| seed.size);
        for (name, size) in [
            (ROOT, Some(manifest.root.size)),
            (OVERLAY_SEED, seed_size(&manifest.overlay_seed)),
            (WORK_SEED, seed_size(&manifest.work_seed)),
        ] {
            let Some(size) = size else { continue };
            match std::fs::symlink_metadata(dir.join(name)) {
                Ok(file) if file.is_file() && file.len() == size.bytes() => {}
                _ => return Err(damaged("a file is missing or has another size")),
            }
        }
        Ok(manifest)
    }

    /// Whether it is of the form that this version makes.
    pub fn is_current(&self) -> bool {
        self.format == FORMAT && self.variant == VARIANT
    }

    fn has_recorded_seeds(&self) -> bool {
        let recorded =
            |seed: &Option<SeedInfo>| seed.as_ref().is_some_and(|seed| seed.blocks_sha256.is_some());
        recorded(&self.overlay_seed) && recorded(&self.work_seed)
    }

    /// The text of `base.json`.
    pub(super) fn to_json(&self) -> Vec<u8> {
        let mut text =
            serde_json::to_vec_pretty(self).unwrap_or_else(|_| unreachable!("plain values serialize"));
        text.push(b'\n');
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_depends_on_the_image_and_stays_as_it_is() {
        let (a, b) = (Digest::from_bytes([1; 32]), Digest::from_bytes([2; 32]));
        assert_ne!(base_id(&a), base_id(&b));
        // Changes only with the variant: VMs name their base by it.
        assert_eq!(base_id(&a).as_str(), "96e425b7c8662c6f0cb1282616452fc2");
        let earlier: Vec<_> = earlier_base_ids(&a).collect();
        assert_eq!(earlier.len(), EARLIER.len());
        assert!(!earlier.contains(&base_id(&a)) && !earlier.contains(&earlier_base_ids(&b).next().unwrap()));
        assert_ne!(root_uuid(&a), root_uuid(&b));
    }

    #[test]
    fn what_another_version_made_is_told_from_damage() {
        let dir = tempfile::tempdir().unwrap();
        let id = base_id(&Digest::from_bytes([1; 32]));
        let read = |text: &str| {
            std::fs::write(dir.path().join(MANIFEST), text).unwrap();
            BaseManifest::read(dir.path(), &id).unwrap_err()
        };
        // Its other fields may be unknown to us.
        for (format, variant) in [(FORMAT + 1, VARIANT), (FORMAT, "root.erofs=9")] {
            let error = read(&format!(
                r#"{{"format": {format}, "variant": "{variant}", "new": []}}"#
            ));
            assert!(matches!(error, BaseError::Format { .. }), "{error:?}");
        }
        let (image, root) = (Digest::from_bytes([1; 32]), root_json());
        for text in [
            "{",
            "{}",
            format!(r#"{{"format": {FORMAT}, "variant": "{VARIANT}"}}"#).as_str(),
            // Only an earlier format may lack a seed.
            format!(r#"{{"format": {FORMAT}, "variant": "{VARIANT}", "image": "{image}", "root": {root}}}"#)
                .as_str(),
        ] {
            let error = read(text);
            assert!(matches!(error, BaseError::Damaged { .. }), "{text}: {error:?}");
        }
    }
    fn root_json() -> String {
        let hash = Digest::from_bytes([3; 32]);
        format!(r#"{{"size": 0, "allocated": 0, "inodes": 1, "sha256": "{hash}", "writer": "x"}}"#)
    }

    #[test]
    fn a_base_of_format_1_is_read_with_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let image = Digest::from_bytes([1; 32]);
        let (format, variant) = EARLIER[0];
        let id = earlier_base_ids(&image).next().unwrap();
        std::fs::write(dir.path().join(ROOT), "").unwrap();
        std::fs::write(dir.path().join(OVERLAY_SEED), "12345").unwrap();
        let root = root_json();
        let write = |seeds: &str| {
            let text = format!(
                r#"{{"format": {format}, "image": "{image}", "variant": "{variant}", "root": {root}{seeds}}}"#
            );
            std::fs::write(dir.path().join(MANIFEST), text).unwrap();
            BaseManifest::read(dir.path(), &id)
        };
        let seed = r#", "overlay_seed": {"size": 5, "writer": "mke2fs 1.47.0"}"#;
        let read = write(seed).unwrap();
        assert!(!read.is_current() && read.work_seed.is_none());
        assert_eq!(read.overlay_seed.unwrap().blocks_sha256, None);
        // One that was made without either still has its root.
        assert!(write("").unwrap().overlay_seed.is_none());
        // What is recorded must be there.
        let other = r#", "overlay_seed": {"size": 6, "writer": "mke2fs 1.47.0"}"#;
        assert!(matches!(write(other), Err(BaseError::Damaged { .. })));
        let current = base_id(&image);
        assert!(matches!(
            BaseManifest::read(dir.path(), &current),
            Err(BaseError::Damaged { .. })
        ));
    }
}
