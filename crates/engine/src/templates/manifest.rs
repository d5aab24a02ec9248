//! What a template is of, and what is kept beside it: `template.json`, see `docs/formats/template.md`.

use offshoot_model::{BaseId, ByteSize, Digest, KernelId, TemplateId};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The version of a template's format: its files, its manifest, and what its guest had done when it was saved.
pub const FORMAT: u32 = 1;

/// The largest `template.json`; ours have 1 KiB.
pub(super) const MANIFEST_MAX: u64 = 64 << 10;

/// Everything that a VM must have in common with the one that was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateKey {
    /// [`FORMAT`].
    pub format: u32,
    /// What the guest has as its root.
    pub base: BaseId,
    /// What it booted.
    pub kernel: KernelId,
    /// The agent in that bundle.
    pub agent: Digest,
    /// The VMM's name.
    pub vmm: String,
    /// Its version, as it says it.
    pub vmm_version: String,
    /// What tells its program from another one of that version.
    pub vmm_build: Digest,
    /// The host's processor, as `/proc/cpuinfo` names it, with what it can do.
    pub processor: Digest,
    /// vCPUs.
    pub cpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// How the root is shown.
    pub root: String,
    /// Whether it has a network device.
    pub network: bool,
    /// The whole machine as its VMM is told it, without what differs from VM to VM.
    pub shape: Digest,
}

impl TemplateKey {
    /// The template's name: the first 128 bits of a hash over all of it.
    pub fn id(&self) -> TemplateId {
        let text =
            serde_json::to_vec(self).expect("our own types have string keys and no failing serializers");
        TemplateId::from_bytes(&Sha256::digest(text))
    }
}

/// A file whose content is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFile {
    /// Its length, bytes.
    pub size: ByteSize,
    /// Bytes that are not in pages of zeros; what it takes of disk and memory.
    pub data: ByteSize,
    /// Over the pages that are not all zeros, each behind its offset (64 bits, little-endian), in order.
    pub digest: Digest,
}

/// What is kept beside a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateManifest {
    /// What it is of.
    pub key: TemplateKey,
    /// The guest's memory.
    pub memory: SavedFile,
    /// What the VMM saved of its devices.
    pub state: SavedFile,
    /// Its writable disks by serial, with the sizes that its guest knows of, bytes.
    pub disks: Vec<(String, ByteSize)>,
    /// When it was made, milliseconds since 1970.
    pub created_ms: u64,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn key() -> TemplateKey {
        TemplateKey {
            format: FORMAT,
            base: BaseId::from_bytes(&[1; 16]),
            kernel: KernelId::from_bytes(&[2; 16]),
            agent: Digest::from_bytes([3; 32]),
            vmm: "qemu".into(),
            vmm_version: "7.2.22".into(),
            vmm_build: Digest::from_bytes([6; 32]),
            processor: Digest::from_bytes([4; 32]),
            cpus: 1,
            memory_mib: 256,
            root: "block".into(),
            network: true,
            shape: Digest::from_bytes([5; 32]),
        }
    }

    #[test]
    fn whatever_differs_makes_another_template() {
        let changes: [fn(&mut TemplateKey); 13] = [
            |key| key.format += 1,
            |key| key.base = BaseId::from_bytes(&[9; 16]),
            |key| key.kernel = KernelId::from_bytes(&[9; 16]),
            |key| key.agent = Digest::from_bytes([9; 32]),
            |key| key.vmm.push('x'),
            |key| key.vmm_version.push('x'),
            |key| key.vmm_build = Digest::from_bytes([9; 32]),
            |key| key.processor = Digest::from_bytes([9; 32]),
            |key| key.cpus += 1,
            |key| key.memory_mib += 1,
            |key| key.root.push('x'),
            |key| key.network = false,
            |key| key.shape = Digest::from_bytes([9; 32]),
        ];
        let mut ids: Vec<_> = changes
            .iter()
            .map(|change| {
                let mut key = key();
                change(&mut key);
                key.id()
            })
            .collect();
        ids.push(key().id());
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), changes.len() + 1);
        assert_eq!(key().id(), key().id());
    }
}
