//! Disks: found by serial, mounted, grown to the size their device has, and let go of.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::ConfigureError;
use crate::{command_line, log};

/// How long a device may take to appear: the drivers are loaded, but probe in their own time. Where KVM interprets the guest's
/// kernel, mapping the persistent memory of a base takes that kernel seconds, and tens of them on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at least.
const LOOK: Duration = Duration::from_millis(1);
/// And at most: a look is work for the kernel that has the device to find.
const LONGEST_LOOK: Duration = Duration::from_millis(100);

/// `EXT4_IOC_RESIZE_FS` of the kernel's fs/ext4/ext4.h: `_IOW('f', 16, __u64)`.
const EXT4_IOC_RESIZE_FS: libc::Ioctl = 0x4008_6610;
/// `FIFREEZE` of linux/fs.h: `_IOWR('X', 119, int)`.
const FIFREEZE: libc::Ioctl = 0xc004_5877;

/// Access times are not worth a write; freed blocks are given back to the host; inode tables that were never used are
/// not written by a kernel thread, which would make every sparse disk grow.
const EXT4_OPTIONS: &std::ffi::CStr = c"discard,noinit_itable";

/// Where a disk that is still in use is mounted once more to be frozen.
const FREEZE_POINT: &str = "/frozen";

/// A disk that is written to.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    /// Its device.
    pub(crate) device: PathBuf,
    /// Where the agent itself has it mounted.
    pub(crate) mounted_on: Option<&'static str>,
}

/// Waits for something to show up.
#[expect(
    clippy::disallowed_methods,
    reason = "devices appear without an event here; the wait ends when they do"
)]
pub(super) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T, ConfigureError> {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if start.elapsed() >= PATIENCE {
            return Err(ConfigureError::NoDevice {
                what: what.to_owned(),
                waited: PATIENCE,
            });
        }
        // A tenth of what it took so far: a device that comes soon is seen soon.
        std::thread::sleep((start.elapsed() / 10).clamp(LOOK, LONGEST_LOOK));
    }
}

/// The device of the virtio disk with a serial. Where the VMM has told the serials in their order, that counts.
pub(super) fn find(serial: &str) -> Result<PathBuf, ConfigureError> {
    let (block, told) = (Path::new("/sys/block"), command_line::list(command_line::DISKS));
    wait_for(&format!("the disk `{serial}`"), || {
        let found = if told.is_empty() {
            find_in(block, serial)
        } else {
            find_by_order(block, &told, serial)
        };
        found.filter(|device| opens(device))
    })
}

/// The disk at the place that its serial has in `told`, once all of them are there. Virtio devices are numbered in the order
/// in which the machine has them.
fn find_by_order(block: &Path, told: &[String], serial: &str) -> Option<PathBuf> {
    let place = told.iter().position(|other| other == serial)?;
    let entries = fs::read_dir(block).ok()?.flatten();
    let mut disks: Vec<(u32, std::ffi::OsString)> = entries
        .filter_map(|entry| {
            let device = fs::read_link(entry.path().join("device")).ok()?;
            let number = device
                .file_name()?
                .to_str()?
                .strip_prefix("virtio")?
                .parse()
                .ok()?;
            Some((number, entry.file_name()))
        })
        .collect();
    disks.sort();
    let (_, name) = disks.get(place).filter(|_| disks.len() == told.len())?;
    Some(Path::new("/dev").join(name))
}

/// Whether a block device can be opened. Its names appear a moment before it can, and until then it is `ENXIO`.
pub(super) fn opens(device: &Path) -> bool {
    File::open(device).is_ok()
}

fn find_in(block: &Path, serial: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(block).ok()?;
    entries.flatten().map(|entry| entry.file_name()).find_map(|name| {
        let text = fs::read_to_string(block.join(&name).join("serial")).ok()?;
        // The kernel shows at most 20 characters of a virtio serial.
        (text.trim_end() == &serial[..serial.floor_char_boundary(20)]).then(|| Path::new("/dev").join(name))
    })
}

/// What an ext4 superblock says about the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Geometry {
    block_size: u64,
    blocks: u64,
}

/// Reads an ext4 superblock (kernel, Documentation/filesystems/ext4/super.rst).
fn parse_superblock(block: &[u8; 1024]) -> Option<Geometry> {
    let u32_at = |at: usize| {
        let bytes = [block[at], block[at + 1], block[at + 2], block[at + 3]];
        u64::from(u32::from_le_bytes(bytes))
    };
    const MAGIC: u64 = 0xef53;
    const INCOMPAT_64BIT: u64 = 0x80;
    let shift = u32_at(0x18);
    if u32_at(0x38) & 0xffff != MAGIC || shift > 6 {
        return None;
    }
    let high = if u32_at(0x60) & INCOMPAT_64BIT != 0 {
        u32_at(0x150)
    } else {
        0
    };
    Some(Geometry {
        block_size: 1024 << shift,
        blocks: (high << 32) | u32_at(0x4),
    })
}

/// Mounts an ext4 disk for writing, and grows it when its device is larger.
pub(super) fn mount_ext4(device: &Path, target: &str) -> Result<(), ConfigureError> {
    fs::create_dir_all(target).map_err(ConfigureError::step(format!("make {target}")))?;
    mount(device, target, "ext4", MountFlags::NOATIME, EXT4_OPTIONS).map_err(|error| {
        ConfigureError::Mount {
            what: format!("ext4 of {}", device.display()),
            target: target.to_owned(),
            source: error.into(),
        }
    })?;
    ensure_grown(device, target);
    Ok(())
}

/// Grows a mounted ext4 when its device is larger. A disk that stays small is still a disk.
pub(super) fn ensure_grown(device: &Path, target: &str) {
    if let Err(error) = grow(device, target) {
        log::warning(format_args!("cannot grow {}: {error}", device.display()));
    }
}

fn grow(device: &Path, target: &str) -> io::Result<()> {
    let device = File::open(device)?;
    let mut superblock = [0; 1024];
    device.read_exact_at(&mut superblock, 1024)?;
    let geometry = parse_superblock(&superblock).ok_or_else(|| io::Error::other("not an ext4 superblock"))?;
    let size = io::Seek::seek(&mut &device, io::SeekFrom::End(0))?;
    let blocks = size / geometry.block_size;
    if blocks <= geometry.blocks {
        return Ok(());
    }
    let folder = File::open(target)?;
    // SAFETY: the request reads one u64, which lives through the call.
    if unsafe { libc::ioctl(folder.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Disk {
    /// Unmounts what the agent has mounted itself.
    pub(crate) fn unmount(&self) {
        if let Some(target) = self.mounted_on
            && let Err(error) = unmount(target, UnmountFlags::DETACH)
        {
            log::warning(format_args!("cannot unmount {target}: {error}"));
        }
    }

    /// Whether no file system uses it any more: its device can be opened alone.
    pub(crate) fn is_free(&self) -> bool {
        use std::os::unix::fs::OpenOptionsExt;
        File::options()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(&self.device)
            .is_ok()
    }

    /// Freezes the file system on it: everything is on disk, and nothing more gets there.
    pub(crate) fn freeze(&self) -> io::Result<()> {
        fs::create_dir_all(FREEZE_POINT)?;
        // The same file system once more, wherever else it is mounted.
        mount(&self.device, FREEZE_POINT, "ext4", MountFlags::NOATIME, None)?;
        let folder = File::open(FREEZE_POINT)?;
        // SAFETY: the request's argument is not used.
        let result = unsafe { libc::ioctl(folder.as_raw_fd(), FIFREEZE, 0) };
        let error = io::Error::last_os_error();
        drop(folder);
        let _ = unmount(FREEZE_POINT, UnmountFlags::DETACH);
        if result < 0 { Err(error) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_found_by_serial() {
        let block = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "root\n"), ("vdb", "0123456789abcdefghij\n"), ("vdc", "")] {
            fs::create_dir(block.path().join(name)).unwrap();
            fs::write(block.path().join(name).join("serial"), serial).unwrap();
        }
        fs::create_dir(block.path().join("loop0")).unwrap();
        assert_eq!(find_in(block.path(), "root"), Some("/dev/vda".into()));
        assert_eq!(
            find_in(block.path(), "0123456789abcdefghijKLM"),
            Some("/dev/vdb".into())
        );
        assert_eq!(find_in(block.path(), "overlay"), None);
    }

    #[test]
    fn disks_without_serials_are_found_by_their_order() {
        let block = tempfile::tempdir().unwrap();
        let add = |name: &str, device: &str| {
            fs::create_dir(block.path().join(name)).unwrap();
            std::os::unix::fs::symlink(device, block.path().join(name).join("device")).unwrap();
        };
        let told = ["root", "overlay"].map(str::to_owned);
        add("pmem0", "../../../region0/namespace0.0");
        add("vdb", "../../../virtio10");
        assert_eq!(
            find_by_order(block.path(), &told, "root"),
            None,
            "one is not there yet"
        );
        add("vda", "../../../virtio9");
        assert_eq!(
            find_by_order(block.path(), &told, "root"),
            Some("/dev/vda".into())
        );
        assert_eq!(
            find_by_order(block.path(), &told, "overlay"),
            Some("/dev/vdb".into())
        );
        assert_eq!(find_by_order(block.path(), &told, "work"), None);
    }

    #[test]
    #[expect(clippy::print_stderr, reason = "a test that cannot run says so")]
    fn a_superblock_that_mke2fs_wrote_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        for (options, expected) in [
            (
                ["-b", "4096", "-O", "64bit"],
                Geometry {
                    block_size: 4096,
                    blocks: 16384,
                },
            ),
            (
                ["-b", "1024", "-O", "^64bit,^metadata_csum"],
                Geometry {
                    block_size: 1024,
                    blocks: 65536,
                },
            ),
        ] {
            let made = std::process::Command::new("mke2fs")
                .args(["-q", "-F", "-t", "ext4"])
                .args(options)
                .arg(&image)
                .status();
            if !made.is_ok_and(|status| status.success()) {
                eprintln!("SKIPPED: needs mke2fs");
                return;
            }
            let mut superblock = [0; 1024];
            File::open(&image)
                .unwrap()
                .read_exact_at(&mut superblock, 1024)
                .unwrap();
            assert_eq!(parse_superblock(&superblock), Some(expected));
        }
        assert_eq!(parse_superblock(&[0; 1024]), None);
    }
}
