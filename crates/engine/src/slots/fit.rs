//! Which warm slot a new VM may become. Pure.

use offshoot_model::{Boot, NetworkChoice, VmConfig};

use crate::definition::VmRecord;
use crate::engine::CreateRequest;

/// Whether a VM that is asked for can become of the one that is ready: what a guest cannot be told any more is the same, and
/// its disks need only grow.
pub(crate) fn fits(slot: &VmRecord, asked: &CreateRequest) -> bool {
    let (have, want) = (&slot.definition.config, &asked.config);
    slot.image_digest == asked.image_digest
        && slot.base_id == asked.base_id
        && slot.kernel_id == asked.kernel_id
        && slot.definition.vmm.chosen == asked.vmm.chosen
        && slot.definition.root.chosen == asked.root.chosen
        && (have.cpus, have.memory) == (want.cpus, want.memory)
        && (have.disk <= want.disk && have.work <= want.work)
        && is_on_a_network(have) == is_on_a_network(want)
        && want.mounts.is_empty()
        && want.boot != Boot::Cold
}

fn is_on_a_network(config: &VmConfig) -> bool {
    matches!(config.network.network, NetworkChoice::On(_))
}

#[cfg(test)]
mod tests {
    use offshoot_model::{BaseId, ByteSize, Digest, ImageConfig, KernelId, VmId};

    use super::*;
    use crate::definition::{Choice, Life, VmDefinition};

    fn choice(chosen: &str) -> Choice {
        Choice {
            chosen: chosen.into(),
            ..Choice::default()
        }
    }

    fn asked() -> CreateRequest {
        CreateRequest {
            config: VmConfig::new("debian:bookworm"),
            image_config: ImageConfig::default(),
            image_digest: Digest::from_bytes([1; 32]),
            base_id: BaseId::from_bytes(&[2; 16]),
            kernel_id: KernelId::from_bytes(&[3; 16]),
            vmm: choice("qemu"),
            root: choice("block"),
        }
    }

    fn slot() -> VmRecord {
        let like = asked();
        VmRecord {
            id: VmId::from_bytes(&[4; 6]),
            name: "slot".parse().unwrap(),
            uid: 1,
            image_digest: like.image_digest,
            base_id: like.base_id,
            kernel_id: like.kernel_id,
            definition: VmDefinition {
                config: like.config,
                process: None,
                stop_signal: 15,
                vmm: like.vmm,
                root: like.root,
                attachment: None,
            },
            created_ms: 0,
            life: Life::new(),
        }
    }

    #[test]
    fn what_a_guest_can_be_told_makes_no_difference() {
        let own: [fn(&mut CreateRequest); 6] = [
            |_| (),
            |asked| asked.config.name = Some("web".parse().unwrap()),
            |asked| asked.config.cmd = vec!["true".into()],
            |asked| asked.config.disk = ByteSize::from_mib(20 << 10),
            |asked| asked.config.work = ByteSize::from_mib(20 << 10),
            |asked| asked.config.boot = Boot::Template,
        ];
        for change in own {
            let mut asked = asked();
            change(&mut asked);
            assert!(fits(&slot(), &asked), "{asked:?}");
        }
    }

    #[test]
    fn what_it_cannot_be_told_does() {
        let others: [fn(&mut CreateRequest); 11] = [
            |asked| asked.image_digest = Digest::from_bytes([9; 32]),
            |asked| asked.base_id = BaseId::from_bytes(&[9; 16]),
            |asked| asked.kernel_id = KernelId::from_bytes(&[9; 16]),
            |asked| asked.vmm.chosen.push('x'),
            |asked| asked.root.chosen = "pmem".into(),
            |asked| asked.config.cpus += 1,
            |asked| asked.config.memory = ByteSize::from_mib(77),
            |asked| asked.config.disk = ByteSize::from_mib(64),
            |asked| asked.config.work = ByteSize::from_mib(64),
            |asked| asked.config.network.network = NetworkChoice::None,
            |asked| asked.config.boot = Boot::Cold,
        ];
        for change in others {
            let mut asked = asked();
            change(&mut asked);
            assert!(!fits(&slot(), &asked), "{asked:?}");
        }
    }
}
