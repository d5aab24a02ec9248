//! The process of a VMM, as every driver starts one: with the VM's own user and control groups, without dumps, and confined to
//! what its plan names.
//!
//! ```text
//! /usr /lib …          read-only      the program's, where it is not static; what lies beside the `bin` that it is in
//! the program          read-only
//! <run>/vms/<id>       read-only      the VM's run folder; its `own/`, which the VMM writes
//! kernel, base, disks  as planned     each by itself
//! /dev                 null, zero, random, urandom; kvm and net/tun where needed
//! /proc                its own process
//! ```
//!
//! Somebody who is not root confines nobody: there is no user to become, either.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use offshoot_sys::process::{
    Access, ConfinedNetwork, Confinement, DetachedCommand, Identity, ResourceLimit, Visible,
};

use crate::plan::{Accel, LaunchPlan, NetBackend};
use crate::tended::own_folder;

/// A VMM's program, as its driver's config has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Program<'a> {
    /// Where it is.
    pub(crate) path: &'a Path,
    /// Its environment, whole.
    pub(crate) env: &'a [(String, String)],
    /// What it reads besides itself and the system's folders.
    pub(crate) files: &'a [PathBuf],
}

/// What the ways of a VMM make necessary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ways {
    /// How it gets its TAPs.
    pub(crate) taps: Taps,
    /// Whether it reads and writes disks with io_uring(7).
    pub(crate) io_uring: bool,
}

/// How a VMM gets its TAPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taps {
    /// Open, and that is all it wants to know.
    Open,
    /// Open, and it asks for more by the name of each.
    OpenAndNamed,
    /// By name alone.
    Named,
}

/// Where programs have their parts.
const SYSTEM: [&str; 8] = [
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/etc/ld.so.cache",
];
/// What a program that lies in a `bin` has beside that: QEMU looks for its modules and firmware there.
const BESIDE: [&str; 4] = ["lib", "lib64", "libexec", "share"];
const DEVICES: [&str; 4] = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"];

/// `program` for the VM of `plan`, with nothing of the daemon's environment. Descriptors and output are the driver's to add.
/// `taps` are the names of open TAPs, where the VMM's ways need them.
pub(crate) fn command(
    program: Program<'_>,
    args: Vec<OsString>,
    plan: &LaunchPlan,
    ways: Ways,
    taps: Vec<String>,
) -> DetachedCommand {
    let mut command = DetachedCommand::new(program.path);
    command.args = args;
    command.env = program
        .env
        .iter()
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    command.identity = plan.identity.clone().map(|who| Identity {
        uid: who.uid,
        gid: who.gid,
        groups: who.groups,
    });
    command.confinement = plan.identity.is_some().then(|| {
        let is_static = File::open(program.path).is_ok_and(|file| is_static(&file));
        let mut confinement = confinement(program, is_static, plan, ways, taps);
        confinement
            .files
            .extend(linked(program.path).into_iter().map(|path| Visible {
                path,
                access: Access::Program,
            }));
        confinement
    });
    command.cgroups.clone_from(&plan.cgroups);
    // A dump of a VMM is a dump of its guest's memory.
    command.limits = vec![ResourceLimit::Core(0)];
    command
}

/// What the VMM of `plan` sees and may do. Pure.
fn confinement(
    program: Program<'_>,
    is_static: bool,
    plan: &LaunchPlan,
    ways: Ways,
    taps: Vec<String>,
) -> Confinement {
    let by_name = plan
        .nets
        .iter()
        .any(|net| matches!(net.backend, NetBackend::Tap(_)));
    let named = !plan.nets.is_empty() && (ways.taps == Taps::Named || by_name);
    let mut files = Vec::new();
    let mut show = |path: &Path, access| {
        files.push(Visible {
            path: path.to_owned(),
            access,
        });
    };
    if !is_static {
        for path in SYSTEM {
            show(Path::new(path), Access::Program);
        }
        let folder = program.path.parent().filter(|folder| folder.ends_with("bin"));
        if let Some(prefix) = folder.and_then(Path::parent) {
            for name in BESIDE {
                show(&prefix.join(name), Access::Program);
            }
        }
    }
    show(program.path, Access::Program);
    for path in program.files {
        show(path, Access::Program);
    }
    for path in DEVICES {
        show(Path::new(path), Access::Device);
    }
    if plan.accel == Accel::Kvm {
        show(Path::new("/dev/kvm"), Access::Device);
    }
    if named {
        show(Path::new("/dev/net/tun"), Access::Device);
    }
    show(&plan.run_dir, Access::Read);
    show(&own_folder(&plan.run_dir), Access::Write);
    show(&plan.kernel, Access::Read);
    if let Some(path) = &plan.initramfs {
        show(path, Access::Read);
    }
    let disks = plan.disks.iter().map(|disk| (&disk.path, disk.read_only));
    let pmems = plan.pmems.iter().map(|pmem| (&pmem.path, pmem.read_only));
    for (path, read_only) in disks.chain(pmems) {
        let access = if read_only { Access::Read } else { Access::Write };
        show(path, access);
    }
    for share in &plan.shares {
        show(&share.socket, Access::Read);
    }
    Confinement {
        files,
        network: if named {
            ConfinedNetwork::Listening
        } else {
            ConfinedNetwork::Empty { stand_ins: taps }
        },
        io_uring: ways.io_uring,
    }
}

/// Where the links lead that a program's path ends with: what Debian's alternatives are made of.
fn linked(program: &Path) -> Vec<PathBuf> {
    /// As many as the kernel follows (`MAXSYMLINKS`).
    const MOST: usize = 40;
    let next = |path: &Path| {
        let target = path.parent()?.join(std::fs::read_link(path).ok()?);
        let folder = target.parent()?.canonicalize().ok()?;
        Some(folder.join(target.file_name()?))
    };
    let first = next(program);
    std::iter::successors(first, |path| next(path))
        .take(MOST)
        .collect()
}

/// The most program headers that are looked at; a program has about ten.
const MAX_HEADERS: u16 = 64;

/// Whether a program is an ELF file (elf(5), 64 bits, little endian) that asks for no dynamic linker. A script asks for more.
fn is_static(program: &File) -> bool {
    fn looked(mut program: &File) -> Option<bool> {
        let mut head = [0; 64];
        program.read_exact(&mut head).ok()?;
        if !head.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        // e_phoff, e_phentsize, e_phnum.
        let start = u64::from_le_bytes(head[32..40].try_into().ok()?);
        let [size, number] = [54, 56].map(|at| u16::from_le_bytes([head[at], head[at + 1]]));
        if size < 4 || number > MAX_HEADERS {
            return None;
        }
        for n in 0..number {
            let mut kind = [0; 4];
            let at = start.checked_add(u64::from(n) * u64::from(size))?;
            program.read_exact_at(&mut kind, at).ok()?;
            // PT_INTERP.
            if u32::from_le_bytes(kind) == 3 {
                return Some(false);
            }
        }
        Some(true)
    }
    looked(program).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use offshoot_model::Mac;

    use super::*;
    use crate::plan::tests::bare_plan;
    use crate::plan::{NetPlan, TapSlot};

    const WAYS: Ways = Ways {
        taps: Taps::Open,
        io_uring: false,
    };

    fn program() -> Program<'static> {
        Program {
            path: Path::new("/opt/bin/vmm"),
            env: &[],
            files: &[],
        }
    }

    fn confined(plan: &LaunchPlan, ways: Ways) -> Confinement {
        confinement(program(), true, plan, ways, Vec::new())
    }

    #[test]
    fn a_static_program_needs_nothing_and_another_what_lies_beside_it() {
        let seen = |is_static| {
            let files = confinement(program(), is_static, &bare_plan(), WAYS, Vec::new()).files;
            let programs = files.into_iter().filter(|file| file.access == Access::Program);
            programs
                .map(|file| file.path.display().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(seen(true), ["/opt/bin/vmm"]);
        let seen = seen(false);
        for path in ["/usr", "/opt/lib", "/opt/share", "/opt/bin/vmm"] {
            assert!(seen.iter().any(|known| known == path), "{path} in {seen:?}");
        }
    }

    #[test]
    fn a_vmm_sees_what_its_plan_names() {
        let plan = bare_plan();
        let seen = confined(&plan, WAYS).files;
        let access = |path: &Path| seen.iter().find(|file| file.path == path).map(|file| file.access);
        assert_eq!(access(&plan.kernel), Some(Access::Read));
        assert_eq!(access(&plan.run_dir), Some(Access::Read));
        for disk in &plan.disks {
            let expected = if disk.read_only {
                Access::Read
            } else {
                Access::Write
            };
            assert_eq!(access(&disk.path), Some(expected));
        }
        for absent in ["/dev/kvm", "/dev/net/tun", "/usr", "/etc", "/"] {
            assert_eq!(access(Path::new(absent)), None, "{absent}");
        }
        let kvm = LaunchPlan {
            accel: Accel::Kvm,
            ..plan
        };
        assert!(
            confined(&kvm, WAYS)
                .files
                .iter()
                .any(|file| file.path == Path::new("/dev/kvm"))
        );
    }

    #[test]
    fn only_who_opens_a_tap_by_name_is_in_its_namespace() {
        let check = |backend: Option<NetBackend>, taps, listening: bool| {
            let mut plan = bare_plan();
            plan.nets.extend(backend.map(|backend| NetPlan {
                backend,
                mac: Mac([2, 0, 0, 0, 0, 1]),
            }));
            let confined = confined(&plan, Ways { taps, ..WAYS });
            assert_eq!(confined.network == ConfinedNetwork::Listening, listening);
            let tun = confined
                .files
                .iter()
                .any(|file| file.path == Path::new("/dev/net/tun"));
            assert_eq!(tun, listening);
        };
        let open = || Some(NetBackend::TapFd(TapSlot::default()));
        check(open(), Taps::Open, false);
        check(open(), Taps::OpenAndNamed, false);
        check(open(), Taps::Named, true);
        check(None, Taps::Named, false);
        check(Some(NetBackend::Tap("t".into())), Taps::Open, true);
    }

    #[test]
    fn a_script_is_no_static_program() {
        let looked = |bytes: &[u8]| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(bytes).unwrap();
            is_static(&File::open(file.path()).unwrap())
        };
        assert!(!looked(b"#!/bin/sh\n"));
        assert!(!looked(b""));
        // One program header, of the kind that is given.
        let elf = |kind: u32| {
            let mut bytes = vec![0; 64 + 56];
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
            bytes[32] = 64;
            (bytes[54], bytes[56]) = (56, 1);
            bytes[64..68].copy_from_slice(&kind.to_le_bytes());
            bytes
        };
        assert!(looked(&elf(1)));
        assert!(!looked(&elf(3)));
        assert!(!looked(&elf(1)[..100][..64]));
        assert!(!is_static(&File::open("/bin/sh").unwrap()));
    }
}
