//! Kernel modules, from lists that the kernel bundle made: nothing is resolved in the guest.
//!
//! ```text
//!   /modules/order           every boot: one module file a line, in load order
//!   /modules/order.mmio      only where virtio devices are on MMIO, before they are looked for
//!   /modules/order.<group>   only where a virtio device of that kind is present: balloon pmem virtiofs vsock
//!   /modules/order.net       when the guest is configured: nobody waits for it at boot
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::{command_line, log};

/// Where a kernel bundle's initramfs has its modules.
pub(crate) const FOLDER: &str = "/modules";

/// Where the kernel shows its virtio devices.
pub(crate) const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";

/// Groups of modules and the virtio device id each is for (VIRTIO 1.3, section 5).
const GROUPS: [(&str, u32); 4] = [("balloon", 5), ("vsock", 19), ("virtiofs", 26), ("pmem", 27)];

/// The group of virtio devices on MMIO.
const MMIO: &str = "mmio";
/// Where ACPI tells of devices, and what those on MMIO are called there (`drivers/virtio/virtio_mmio.c`).
const ACPI_DEVICES: &str = "/sys/bus/acpi/devices";
const ACPI_MMIO: &str = "LNRO0005:";
/// How the command line tells of one.
const MMIO_PARAMETER: &str = "virtio_mmio.device=";

/// The group of network devices.
pub(crate) const NET: &str = "net";

/// The virtio id of a console, which carries the agent's port.
pub(crate) const CONSOLE: u32 = 3;
/// The virtio id of a vsock device.
pub(crate) const VSOCK: u32 = 19;

/// The kinds of virtio devices in this machine.
pub(crate) fn virtio_devices(folder: &Path) -> BTreeSet<u32> {
    let Ok(entries) = fs::read_dir(folder) else {
        return BTreeSet::new();
    };
    entries
        .flatten()
        .filter_map(|entry| parse_id(&fs::read_to_string(entry.path().join("device")).ok()?))
        .collect()
}

fn parse_id(text: &str) -> Option<u32> {
    u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

/// Loads the modules that the lists in `folder` name for the devices below `devices`. A module that cannot be loaded
/// is logged; whatever needs it says so later.
pub(crate) fn load(folder: &Path, devices: &Path) {
    load_list(&folder.join("order"));
    if has_mmio(Path::new(ACPI_DEVICES)) || command_line::has_prefix(MMIO_PARAMETER) {
        load_group(folder, MMIO);
    }
    let devices = virtio_devices(devices);
    for (group, id) in GROUPS {
        if devices.contains(&id) {
            load_group(folder, group);
        }
    }
}

/// Whether ACPI tells of virtio devices on MMIO.
fn has_mmio(devices: &Path) -> bool {
    let entries = fs::read_dir(devices).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name())
        .any(|name| name.to_string_lossy().starts_with(ACPI_MMIO))
}

/// Loads the modules of one group. Blocks until the kernel has them.
pub(crate) fn load_group(folder: &Path, group: &str) {
    load_list(&folder.join(format!("order.{group}")));
}

fn load_list(list: &Path) {
    // A kernel with everything built in has no list.
    let Ok(text) = fs::read_to_string(list) else {
        return;
    };
    for path in text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        if let Err(error) = load_module(Path::new(path)) {
            log::warning(format_args!("cannot load {path}: {error}"));
        }
    }
}

fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    match rustix::system::finit_module(&file, c"", 0) {
        // Two lists may name the same module.
        Err(rustix::io::Errno::EXIST) => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acpi_tells_of_mmio() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("PNP0C0C:00")).unwrap();
        assert!(!has_mmio(folder.path()));
        fs::create_dir(folder.path().join("LNRO0005:00")).unwrap();
        assert!(has_mmio(folder.path()));
        assert!(!has_mmio(&folder.path().join("missing")));
    }

    #[test]
    fn devices_are_read_as_the_kernel_writes_them() {
        let folder = tempfile::tempdir().unwrap();
        for (name, id) in [
            ("virtio0", "0x0003\n"),
            ("virtio1", "0x001b\n"),
            ("virtio2", "what\n"),
        ] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("device"), id).unwrap();
        }
        fs::create_dir(folder.path().join("virtio3")).unwrap();
        assert_eq!(virtio_devices(folder.path()), BTreeSet::from([3, 27]));
        assert_eq!(virtio_devices(&folder.path().join("missing")), BTreeSet::new());
    }
}
