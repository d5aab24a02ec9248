//! What Cloud Hypervisor saves of a VM, and what another VM goes on from. Pure.
//!
//! It saves two files, a configuration and a state, and takes them from a folder again. We keep them as one: the
//! configuration, a zero byte, which JSON never holds, and the state. The state is taken as it is; the configuration gets the
//! paths of the VM that goes on, which its documentation (`docs/snapshot_restore.md`) allows for.
//!
//! The memory is in neither. It is saved and taken back in one of three ways, all of which it has had since long before the
//! oldest version that we run; the first is the only one that we use:
//!
//! | the guest's memory was | it saves | whoever goes on |
//! | --- | --- | --- |
//! | a shared file with a name | nothing: it is in that file | maps that file, privately when it is told so |
//! | anything else | a copy, `memory-ranges` | reads the copy into its own memory (`copy`) |
//! | the same, from 53 on | the same | is given pages by userfaultfd(2) (`ondemand`), which needs privileges |
//!
//! A copy would be all of a guest's memory at each restore, so there never is one: a VM of which Cloud Hypervisor saved a
//! copy is not kept, and a restore finds no file that it could copy from.

use std::io::{self, Read};
use std::path::Path;

use serde_json::{Value, json};

use crate::plan::{LaunchPlan, NetBackend};

use super::args::agent_socket;
use crate::saved::{MEMORY_FD, inherited_path};

/// The files in a folder of what it saved.
pub const CONFIG: &str = "config.json";
/// The same.
pub const STATE: &str = "state.json";
/// What must not be there.
pub const MEMORY_COPY: &str = "memory-ranges";
/// The name of the memory that a VM has which is to be saved.
pub(super) const ZONE: &str = "mem0";

/// A configuration has some KiB.
const MAX_CONFIG: usize = 1 << 20;

/// Both files as one.
pub(super) fn packed(config: impl Read, state: impl Read) -> impl Read {
    config.chain(&b"\0"[..]).chain(state)
}

/// One file as both.
pub(super) fn unpacked(packed: &[u8]) -> Result<(Value, &[u8]), SavedError> {
    let at = packed.iter().take(MAX_CONFIG).position(|byte| *byte == 0);
    let (config, state) = packed.split_at(at.ok_or(SavedError::Form)?);
    let config = serde_json::from_slice(config).map_err(|source| SavedError::Config { source })?;
    Ok((config, &state[1..]))
}

/// Why a VM cannot go on from what was saved.
#[derive(Debug, thiserror::Error)]
pub(super) enum SavedError {
    /// It is not what we keep.
    #[error("it is not a configuration and a state")]
    Form,
    /// Its configuration cannot be read.
    #[error("its configuration cannot be read")]
    Config {
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It is another machine.
    #[error("its configuration has other {what} than the VM")]
    Other {
        /// What is different.
        what: &'static str,
    },
}

impl From<SavedError> for io::Error {
    fn from(error: SavedError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// The saved configuration with what is the plan's own.
pub(super) fn config_of(plan: &LaunchPlan, mut config: Value) -> Result<Value, SavedError> {
    let text = |path: &Path| json!(path.to_string_lossy());
    let disks = plan.disks.iter().map(|disk| text(&disk.path)).collect();
    set_each(&mut config["disks"], "path", disks, "disks")?;
    let pmems = plan.pmems.iter().map(|pmem| text(&pmem.path)).collect();
    set_each(&mut config["pmem"], "file", pmems, "persistent memory")?;
    let taps: Vec<_> = plan
        .nets
        .iter()
        .map(|net| match &net.backend {
            NetBackend::Tap(name) => json!(name),
            // Told beside it.
            NetBackend::TapFd(_) => Value::Null,
        })
        .collect();
    set_each(&mut config["net"], "tap", taps, "network devices")?;
    // Its memory is the template's, mapped privately.
    let zones = vec![text(&inherited_path(MEMORY_FD))];
    set_each(&mut config["memory"]["zones"], "file", zones, "memory")?;
    config["memory"]["zones"][0]["shared"] = json!(false);
    if let Some(vsock) = config["vsock"].as_object_mut() {
        vsock.insert("socket".into(), text(&agent_socket(plan)));
    }
    if let Some(payload) = config["payload"].as_object_mut() {
        payload.insert("kernel".into(), text(&plan.kernel));
        payload.insert(
            "initramfs".into(),
            plan.initramfs.as_deref().map_or(Value::Null, text),
        );
    }
    Ok(config)
}

/// Sets `key` of each device in a list that must have as many.
fn set_each(list: &mut Value, key: &str, values: Vec<Value>, what: &'static str) -> Result<(), SavedError> {
    let none = &mut Vec::new();
    let devices = list.as_array_mut().unwrap_or(none);
    if devices.len() != values.len() {
        return Err(SavedError::Other { what });
    }
    for (device, value) in devices.iter_mut().zip(values) {
        let device = device.as_object_mut().ok_or(SavedError::Other { what })?;
        device.insert(key.into(), value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::bare_plan;

    #[test]
    fn two_files_are_one_and_two_again() {
        let mut all = Vec::new();
        packed(&b"{\"a\": 1}"[..], &b"state"[..])
            .read_to_end(&mut all)
            .unwrap();
        let (config, state) = unpacked(&all).unwrap();
        assert_eq!((config, state), (json!({"a": 1}), &b"state"[..]));
        for bad in [&b""[..], b"{}", b"{\0x", &[b' '; MAX_CONFIG + 1]] {
            assert!(unpacked(bad).is_err());
        }
    }

    #[test]
    fn a_saved_configuration_gets_the_paths_of_the_vm_that_goes_on() {
        let saved = json!({
            "disks": [{"path": "/old", "id": "disk-root", "readonly": true}],
            "memory": {"size": 0, "zones": [{"id": "mem0", "file": "/old", "shared": true, "size": 1}]},
            "vsock": {"cid": 3, "socket": "/old"},
            "payload": {"kernel": "/old", "initramfs": null, "cmdline": "quiet"},
            "net": null,
        });
        let plan = bare_plan();
        let config = config_of(&plan, saved.clone()).unwrap();
        let expected = json!({
            "disks": [{"path": "/b/root.erofs", "id": "disk-root", "readonly": true}],
            "memory": {"size": 0, "zones": [{"id": "mem0", "file": "/proc/self/fd/14", "shared": false, "size": 1}]},
            "vsock": {"cid": 3, "socket": "/run/offshoot/x/own/agent.sock"},
            "payload": {"kernel": "/k/vmlinux", "initramfs": "/k/initramfs", "cmdline": "quiet"},
            "net": null, "pmem": null,
        });
        assert_eq!(config, expected);
        let refuse = |change: &dyn Fn(&mut Value), expected: &str| {
            let mut saved = saved.clone();
            change(&mut saved);
            let error = config_of(&plan, saved).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        refuse(&|saved| saved["disks"] = json!([]), "disks");
        refuse(&|saved| saved["pmem"] = json!([{}]), "persistent memory");
        refuse(&|saved| saved["net"] = json!([{}]), "network");
        refuse(
            &|saved| saved["memory"] = json!({"size": 1, "zones": null}),
            "memory",
        );
        refuse(&|saved| saved["disks"] = json!([1]), "disks");
    }
}
