//! The process of a VMM, as every driver starts one: with the VM's own user and control groups, and without dumps.

use std::ffi::OsString;
use std::path::Path;

use offshoot_sys::process::{DetachedCommand, Identity, ResourceLimit};

use crate::plan::LaunchPlan;

/// `program` for the VM of `plan`, with nothing of the daemon's environment but `env`. Descriptors and output are the driver's
/// to add.
pub(crate) fn command(
    program: &Path,
    args: Vec<OsString>,
    env: &[(String, String)],
    plan: &LaunchPlan,
) -> DetachedCommand {
    let mut command = DetachedCommand::new(program);
    command.args = args;
    command.env = env
        .iter()
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    command.identity = plan.identity.clone().map(|who| Identity {
        uid: who.uid,
        gid: who.gid,
        groups: who.groups,
    });
    command.cgroups.clone_from(&plan.cgroups);
    // A dump of a VMM is a dump of its guest's memory.
    command.limits = vec![ResourceLimit::Core(0)];
    command
}
