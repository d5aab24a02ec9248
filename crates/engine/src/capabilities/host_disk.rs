//! What the host's disk and its tools still allow, for every capability that makes disks or folders on it.

use std::io;
use std::path::Path;

use offshoot_model::{ByteSize, Finding, Severity};
use offshoot_rootfs::base::BaseStore;
use offshoot_sys::space::{Room, room};

use super::finding;

/// Below this little room a VM that starts now would soon run into a full disk.
const LITTLE_ROOM: u64 = 1 << 30;
/// Below this little room, or a twentieth of a small disk, there is none: what a start writes (disks, logs, the database)
/// takes some MiB, and the guest writes on.
const NO_ROOM: u64 = 64 << 20;
/// So few files are as good as none: a VM has up to twenty, and the database makes its own.
const NO_FILES: u64 = 64;
/// The files of some hundred VMs, or of one image's tree.
const FEW_FILES: u64 = 10_000;

/// How much room there is on the disk of `dir`, whatever it is.
pub(super) fn room_in(capability: &str, dir: &Path) -> Finding {
    judge(capability, dir, room(dir))
}

/// Why the disk of the data directory, in which these bases lie, takes no more: for capabilities that would only repeat
/// that it does. In the same words for all of them, so that it is told once.
pub(super) fn lack_of_room(capability: &str, bases: &BaseStore) -> Option<Finding> {
    let data = bases.dir().parent().unwrap_or(bases.dir());
    Some(room_in(capability, data)).filter(|found| found.severity != Severity::Ok)
}

fn judge(capability: &str, dir: &Path, room: io::Result<Room>) -> Finding {
    let place = dir.display();
    let make_room =
        "remove VMs and images with `offshoot rm` and `offshoot image rm`, then run `offshoot prune`";
    let bad = |severity, id, message: String, cost: &str, hint: &str| {
        finding(capability, severity, message, hint).id(id).cost(cost)
    };
    let room = match room {
        Ok(room) => room,
        Err(error) => {
            return bad(
                Severity::Failure,
                "disk-unreadable",
                format!("cannot look at {place}: {error}"),
                "no VM can be created or started",
                &format!("look at it with `ls -ld {place}`"),
            );
        }
    };
    let left = ByteSize::from_bytes(room.free);
    if room.read_only {
        return bad(
            Severity::Failure,
            "disk-read-only",
            format!("{place} lies on a file system that is mounted read-only"),
            "nothing can be created, started or recorded",
            &format!(
                "look for errors of the disk with `dmesg`, then `mount -o remount,rw` what holds {place}"
            ),
        );
    }
    if room.free < NO_ROOM.min(room.size / 20) {
        return bad(
            Severity::Failure,
            "disk-full",
            format!("the disk is full: {left} left in {place}"),
            "no VM can be created or started, and the guests that run get errors when they write",
            make_room,
        );
    }
    if room.free_inodes.is_some_and(|files| files < NO_FILES) {
        return bad(
            Severity::Failure,
            "inodes-full",
            format!("the file system of {place} has no room for more files"),
            "no VM can be created or started, whatever space is left",
            make_room,
        );
    }
    if room.free < LITTLE_ROOM {
        return bad(
            Severity::Warning,
            "disk-low",
            format!("only {left} left in {place}"),
            "images may not be pulled or prepared, and guests get errors when it is used up",
            make_room,
        );
    }
    if let Some(files) = room.free_inodes
        && files < FEW_FILES
    {
        return bad(
            Severity::Warning,
            "inodes-low",
            format!("only {files} more files fit in {place}"),
            "trees of images (`--root virtiofs`, `--root copy`) may not be unpacked",
            make_room,
        );
    }
    Finding::ok(capability, format!("{left} left in {place}")).id("disk-room")
}

/// Whether disks are cloned or copied in `dir`.
pub(super) fn reflink(capability: &str, dir: &Path) -> Finding {
    judge_reflink(capability, dir, offshoot_sys::clone::can_reflink(dir))
}

fn judge_reflink(capability: &str, dir: &Path, tried: io::Result<bool>) -> Finding {
    let place = dir.display();
    let copies = |message: String| {
        let hint = format!("put {place} on XFS or btrfs");
        finding(capability, Severity::Warning, message, hint)
            .id("reflink-absent")
            .cost("each VM's disks begin as copies of their seeds instead of sharing blocks: 0.2 MiB, and what its image has in /root")
    };
    match tried {
        Ok(true) => {
            Finding::ok(capability, format!("files in {place} can share blocks (reflink)")).id("reflink")
        }
        Ok(false) => copies(format!("files in {place} cannot share blocks (no reflink)")),
        Err(error) => copies(format!(
            "cannot try whether files in {place} can share blocks: {error}"
        )),
    }
}

/// Whether a program of e2fsprogs is there. `cost` is what does not work without.
pub(super) fn e2fs_tool(capability: &str, program: &str, cost: &str) -> Finding {
    judge_tool(
        capability,
        program,
        offshoot_sys::programs::find(program).as_deref(),
        cost,
    )
}

fn judge_tool(capability: &str, program: &str, found: Option<&Path>, cost: &str) -> Finding {
    match found {
        Some(path) => Finding::ok(capability, format!("{program} at {}", path.display())).id(program),
        None => finding(
            capability,
            Severity::Warning,
            format!("{program} is not installed"),
            "apt install e2fsprogs",
        )
        .id(format!("{program}-missing"))
        .cost(cost),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_well_low_or_full() {
        const GIB: u64 = 1 << 30;
        let well = Room {
            size: 100 * GIB,
            free: 50 * GIB,
            free_inodes: Some(1 << 20),
            read_only: false,
        };
        let check = |room: Room, severity, id: &str| {
            let found = judge("folders", Path::new("/data"), Ok(room));
            assert_eq!((found.severity, found.id.as_str()), (severity, id), "{room:?}");
            let explained = !found.cost.is_empty() && !found.hint.is_empty();
            assert_eq!(explained, severity != Severity::Ok, "{found:?}");
        };
        check(well, Severity::Ok, "disk-room");
        check(
            Room {
                free_inodes: None,
                ..well
            },
            Severity::Ok,
            "disk-room",
        );
        check(
            Room {
                free: GIB - 1,
                ..well
            },
            Severity::Warning,
            "disk-low",
        );
        check(
            Room {
                free: NO_ROOM - 1,
                ..well
            },
            Severity::Failure,
            "disk-full",
        );
        check(
            Room {
                free_inodes: Some(9_999),
                ..well
            },
            Severity::Warning,
            "inodes-low",
        );
        check(
            Room {
                free_inodes: Some(0),
                ..well
            },
            Severity::Failure,
            "inodes-full",
        );
        check(
            Room {
                read_only: true,
                ..well
            },
            Severity::Failure,
            "disk-read-only",
        );
        // A small disk is not full as long as a twentieth is left.
        let small = Room {
            size: 100 << 20,
            free: 5 << 20,
            ..well
        };
        check(small, Severity::Warning, "disk-low");
        check(
            Room {
                free: (5 << 20) - 1,
                ..small
            },
            Severity::Failure,
            "disk-full",
        );
        let gone = judge("folders", Path::new("/data"), Err(io::ErrorKind::NotFound.into()));
        assert_eq!(
            (gone.severity, gone.id.as_str()),
            (Severity::Failure, "disk-unreadable")
        );
    }

    #[test]
    fn copies_instead_of_clones_are_a_warning() {
        let check = |tried, severity, id: &str| {
            let found = judge_reflink("folders", Path::new("/data"), tried);
            assert_eq!((found.severity, found.id.as_str()), (severity, id));
        };
        check(Ok(true), Severity::Ok, "reflink");
        check(Ok(false), Severity::Warning, "reflink-absent");
        check(
            Err(io::ErrorKind::Unsupported.into()),
            Severity::Warning,
            "reflink-absent",
        );
    }

    #[test]
    fn a_tool_that_is_missing_costs_something() {
        let there = judge_tool("work", "resize2fs", Some(Path::new("/sbin/resize2fs")), "x");
        assert_eq!((there.severity, there.cost.as_str()), (Severity::Ok, ""));
        let missing = judge_tool("work", "resize2fs", None, "no small disks");
        assert_eq!(missing.id, "resize2fs-missing");
        assert_eq!(missing.cost, "no small disks");
        assert!(missing.hint.contains("e2fsprogs"));
    }
}
