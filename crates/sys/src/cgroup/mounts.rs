//! Which hierarchies are mounted where, and in which group of each we are. Pure: text in, values out.
//!
//! Sources: proc_pid_mountinfo(5), cgroups(7). Both files show paths as our cgroup namespace sees them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use super::{Controller, Version};

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) version: Version,
    /// Which group of the hierarchy is shown at `point`.
    pub(super) root: PathBuf,
    pub(super) point: PathBuf,
    /// On v1, those of ours that it has; on v2, the files below it say that.
    pub(super) controllers: BTreeSet<Controller>,
    pub(super) read_only: bool,
}

/// Our own group on every hierarchy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Own {
    pub(super) v2: Option<PathBuf>,
    pub(super) v1: BTreeMap<Controller, PathBuf>,
}

/// The hierarchies in the text of `/proc/self/mountinfo` that may be of use, in its order. Lines that are none are
/// passed over.
pub(super) fn mounts(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(mount).collect()
}

/// `36 35 98:0 /root /point rw,relatime shared:1 - cgroup cgroup rw,cpu,cpuacct`
fn mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ');
    let root = fields.nth(3)?;
    let point = fields.next()?;
    let options = fields.next()?;
    let mut fields = after.split(' ');
    let version = match fields.next()? {
        "cgroup" => Version::V1,
        "cgroup2" => Version::V2,
        _ => return None,
    };
    let super_options = fields.nth(1).unwrap_or_default();
    let read_only = |options: &str| options.split(',').any(|option| option == "ro");
    let controllers: BTreeSet<_> = match version {
        Version::V1 => super_options.split(',').filter_map(Controller::parse).collect(),
        Version::V2 => BTreeSet::new(),
    };
    if version == Version::V1 && controllers.is_empty() {
        return None;
    }
    Some(Mount {
        version,
        root: unescape(root),
        point: unescape(point),
        controllers,
        read_only: read_only(options) || read_only(super_options),
    })
}

/// A path in which white space and backslashes are written as `\ooo`.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        let octal = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    OsString::from_vec(out).into()
}

/// Our groups in the text of `/proc/self/cgroup`: lines `4:cpu,cpuacct:/path`, and `0::/path` for v2.
pub(super) fn own(text: &str) -> Own {
    let mut own = Own::default();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        // A group that was removed while we are still in it.
        let path = PathBuf::from(path.strip_suffix(" (deleted)").unwrap_or(path));
        if number == "0" && controllers.is_empty() {
            own.v2 = Some(path);
        } else {
            for controller in controllers.split(',').filter_map(Controller::parse) {
                own.v1.insert(controller, path.clone());
            }
        }
    }
    own
}

impl Mount {
    /// The folder that shows `group`; `None` when it lies outside of what is mounted.
    pub(super) fn folder_of(&self, group: &Path) -> Option<PathBuf> {
        let below = group.strip_prefix(&self.root).ok()?;
        let plain = below
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        plain.then(|| {
            let mut folder = self.point.clone();
            folder.extend(below.components());
            folder
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Debian 12 as it is installed.
    const UNIFIED: &str = "\
24 30 0:22 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
32 24 0:28 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
30 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw";
    /// A v1 host, with two controllers on one hierarchy and a v2 hierarchy beside it.
    const SPLIT: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:11 - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime master:3 propagate_from:1 - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";

    fn set<const N: usize>(controllers: [Controller; N]) -> BTreeSet<Controller> {
        controllers.into()
    }

    #[test]
    fn mounted_hierarchies_are_found() {
        let found = mounts(UNIFIED);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].version, found[0].point.as_path(), found[0].read_only),
            (Version::V2, Path::new("/sys/fs/cgroup"), false)
        );
        let found = mounts(SPLIT);
        let shown: Vec<_> = found
            .iter()
            .map(|mount| {
                let name = mount.point.file_name().unwrap().to_str().unwrap();
                (mount.version, name, mount.controllers.clone())
            })
            .collect();
        let expected = [
            (
                Version::V1,
                "cpu,cpuacct",
                set([Controller::Cpu, Controller::CpuAcct]),
            ),
            (Version::V1, "memory", set([Controller::Memory])),
            (Version::V1, "pids", set([Controller::Pids])),
            (Version::V2, "unified", set([])),
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn read_only_mounts_and_odd_paths_are_read() {
        let line = r"32 24 0:28 /a\040b\134c /sys/fs/c\011group ro,relatime - cgroup2 cgroup2 rw";
        let found = mount(line).unwrap();
        assert!(found.read_only);
        assert_eq!(found.root, Path::new("/a b\\c"));
        assert_eq!(found.point, Path::new("/sys/fs/c\tgroup"));
        for none in [
            "",
            "1 2 3",
            "1 2 3 / /x rw - ext4 x rw",
            "a - cgroup2",
            r"\",
            r"1 2 0:1 / /x rw - cgroup c rw,name=x",
        ] {
            assert_eq!(mount(none), None, "{none}");
        }
        assert_eq!(unescape(r"a\04"), Path::new(r"a\04"));
        assert_eq!(unescape(r"a\999b"), Path::new(r"a\999b"));
    }

    #[test]
    fn our_own_groups_are_found() {
        let v2 = own("0::/system.slice/offshootd.service\n");
        assert_eq!(
            v2.v2.as_deref(),
            Some(Path::new("/system.slice/offshootd.service"))
        );
        assert!(v2.v1.is_empty());
        let v1 = own("9:name=systemd:/\n4:memory:/a:b\n2:cpu,cpuacct:/c (deleted)\n0::/\nnonsense\n");
        assert_eq!(v1.v2.as_deref(), Some(Path::new("/")));
        let expected = [
            (Controller::Cpu, "/c"),
            (Controller::CpuAcct, "/c"),
            (Controller::Memory, "/a:b"),
        ];
        assert_eq!(v1.v1, expected.map(|(one, path)| (one, path.into())).into());
    }

    #[test]
    fn a_group_is_found_below_what_is_mounted_and_nowhere_else() {
        let mount = |root: &str| Mount {
            version: Version::V1,
            root: root.into(),
            point: "/m".into(),
            controllers: BTreeSet::new(),
            read_only: false,
        };
        let check = |root: &str, group: &str, expected: Option<&str>| {
            let found = mount(root).folder_of(Path::new(group));
            assert_eq!(found.as_deref(), expected.map(Path::new), "{group} in {root}");
        };
        check("/", "/", Some("/m"));
        check("/", "/a/b", Some("/m/a/b"));
        // A container without a cgroup namespace: only its own part is mounted.
        check("/docker/1", "/docker/1", Some("/m"));
        check("/docker/1", "/docker/1/x", Some("/m/x"));
        check("/docker/1", "/docker/2", None);
        check("/", "/../x", None);
        check("/", "relative", None);
    }
}
