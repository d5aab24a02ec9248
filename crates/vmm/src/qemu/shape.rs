//! What two VMs must have in common so that one can go on from where the other was saved. Pure.

use super::args::command_line;
use super::probe::QemuFacts;
use crate::driver::LaunchError;
use crate::plan::LaunchPlan;

/// The command line without what differs from VM to VM; `None` when QEMU cannot save such a VM: what serves its shares has
/// their memory in common with it.
pub(super) fn shape(plan: &LaunchPlan, facts: &QemuFacts) -> Result<Option<String>, LaunchError> {
    if !plan.shares.is_empty() {
        return Ok(None);
    }
    let same = plan.without_its_own();
    // The rate that one guest was told is that of every guest here, but each daemon measures it a little differently.
    let facts = QemuFacts {
        tsc_khz: facts.tsc_khz.map(|_| 0),
        ..facts.clone()
    };
    let words = command_line(&same, &facts)?
        .encode()
        .map_err(|error| LaunchError::Plan {
            source: crate::plan::PlanError::Path {
                what: error.option,
                path: error.value.into(),
            },
        })?;
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    Ok(Some(words.join("\n")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use offshoot_model::{ByteSize, Mac};

    use super::super::probe::tests::debian_12;
    use super::*;
    use crate::plan::tests::bare_plan;
    use crate::plan::{DiskPlan, NetBackend, NetPlan, Origin, SharePlan};

    fn plan() -> LaunchPlan {
        let mut plan = bare_plan();
        plan.nets.push(NetPlan {
            backend: NetBackend::Tap("t".into()),
            mac: Mac([2, 0, 0, 0, 0, 9]),
        });
        plan
    }

    #[test]
    fn what_is_a_vms_own_makes_no_difference() {
        let shape = |change: &dyn Fn(&mut LaunchPlan)| {
            let mut plan = plan();
            change(&mut plan);
            shape(&plan, &debian_12()).unwrap().unwrap()
        };
        let same = shape(&|_| {});
        let own: [&dyn Fn(&mut LaunchPlan); 6] = [
            &|plan| plan.vm = offshoot_model::VmId::from_bytes(&[7; 6]),
            &|plan| plan.run_dir = "/other".into(),
            &|plan| plan.disks[0].path = "/other".into(),
            &|plan| plan.nets[0].mac = Mac([2, 0, 0, 0, 0, 8]),
            &|plan| plan.kernel = "/other".into(),
            &|plan| {
                let memory = offshoot_sys::memory_file::create("test", 4096).unwrap();
                plan.origin = Origin::KernelInto(Arc::new(memory));
            },
        ];
        for change in own {
            assert_eq!(shape(change), same);
        }
        let others: [&dyn Fn(&mut LaunchPlan); 6] = [
            &|plan| plan.cpus += 1,
            &|plan| plan.memory = ByteSize::from_mib(plan.memory.mib() + 1),
            &|plan| plan.cmdline.push("more".into()),
            &|plan| plan.nets.clear(),
            &|plan| plan.disks[0].serial.push('x'),
            &|plan| {
                plan.disks.push(DiskPlan {
                    serial: "more".into(),
                    path: "/d".into(),
                    read_only: false,
                });
            },
        ];
        for change in others {
            assert_ne!(shape(change), same);
        }
        let mut shared = plan();
        shared.shares.push(SharePlan {
            tag: "t".into(),
            socket: "/s".into(),
        });
        assert_eq!(super::shape(&shared, &debian_12()).unwrap(), None);
    }
}
