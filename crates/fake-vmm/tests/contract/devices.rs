//! As many devices as a plan may have fit into both of QEMU's machines.

use offshoot_model::ByteSize;
use offshoot_vmm::MachineStatus;
use offshoot_vmm::plan::{DiskPlan, PmemPlan};

use crate::guest::End;
use crate::rig::{Rig, Vmm};

/// The most that `LaunchPlan::validate` allows.
const MOST: usize = 24;

async fn launch_with(pmems: usize) {
    let Some(mut rig) = Rig::new(Vmm::Qemu, End::Idle) else {
        return;
    };
    let size = ByteSize::from_mib(2);
    let file = rig.folder.join("shared,by=all");
    std::fs::File::create(&file)
        .unwrap()
        .set_len(size.bytes())
        .unwrap();
    // As a base is: nobody may write it, and its owner is not the VMM.
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    for _ in 0..pmems {
        rig.plan.pmems.push(PmemPlan {
            path: file.clone(),
            size,
            read_only: true,
        });
    }
    for n in rig.plan.disks.len() + pmems..MOST {
        rig.plan.disks.push(DiskPlan {
            serial: format!("disk-{n}"),
            path: file.clone(),
            read_only: true,
        });
    }
    let machine = rig.launch().await;
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Running);
    machine.kill().await.unwrap();
    rig.assert_nothing_left().await;
    rig.plan.disks.push(DiskPlan {
        serial: "one-too-many".into(),
        ..rig.plan.disks[0].clone()
    });
    assert!(rig.plan.validate().is_err());
}

#[tokio::test]
async fn a_microvm_has_room_for_all_devices() {
    launch_with(0).await;
}

#[tokio::test]
async fn a_q35_has_room_for_all_devices_with_persistent_memory() {
    launch_with(3).await;
}
