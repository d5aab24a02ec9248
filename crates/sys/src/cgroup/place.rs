//! Below which group of each hierarchy ours are made. Pure.
//!
//! As close to ourselves as the kernel lets us, so that whoever limits us limits what we start:
//!
//! ```text
//! v1                                         our own group
//! v2  our parent is delegated to us          our parent: we are in a leaf of it already (systemd's DelegateSubgroup=)
//!     our own group is delegated to us       our own group, and we move into a leaf of it first
//!     neither, and the true root is mounted  the root, as LXC and Firecracker's jailer do it
//!     neither, in a container                what is mounted, and we move into a leaf of it if we are there
//! ```
//!
//! On v2 a group with processes cannot hand controllers down (the root excepted), so a group that we share with others,
//! such as a login session's, is no place.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::mounts::{Mount, Own};
use super::{Controller, Version};

/// What is known of the v2 hierarchy besides where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct V2Facts {
    /// What is mounted is the true root of the hierarchy: it has no `cgroup.type`.
    pub(super) true_root: bool,
    /// The service manager gave us our own group: it set `trusted.delegate` or `user.delegate` (systemd).
    pub(super) own_delegated: bool,
    /// The same of the group above.
    pub(super) parent_delegated: bool,
}

/// A place for groups on one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) version: Version,
    /// The folder below which ours are made.
    pub(super) parent: PathBuf,
    /// On v1, those of the hierarchy; on v2, those that are wanted from it.
    pub(super) controllers: BTreeSet<Controller>,
    /// We are in `parent` itself and have to leave it.
    pub(super) we_are_in_it: bool,
}

/// The places for every controller that a writable hierarchy has, v1 hierarchies first: where a controller is on v1,
/// v2 does not have it. `facts` answers for a v2 mount.
pub(super) fn places(mounts: &[Mount], own: &Own, facts: impl Fn(&Mount) -> V2Facts) -> Vec<Place> {
    let mut wanted = BTreeSet::from(Controller::ALL);
    let mut places = Vec::new();
    for mount in mounts.iter().filter(|mount| !mount.read_only) {
        if mount.version == Version::V2 || !mount.controllers.iter().any(|one| wanted.contains(one)) {
            continue;
        }
        let ours = mount
            .controllers
            .iter()
            .find_map(|controller| mount.folder_of(own.v1.get(controller)?));
        places.push(Place {
            version: Version::V1,
            parent: ours.unwrap_or_else(|| mount.point.clone()),
            controllers: mount.controllers.clone(),
            we_are_in_it: false,
        });
        wanted.retain(|controller| !mount.controllers.contains(controller));
    }
    // v2 counts processor time with `cpu`.
    wanted.remove(&Controller::CpuAcct);
    let v2 = mounts
        .iter()
        .find(|mount| mount.version == Version::V2 && !mount.read_only);
    if let Some(mount) = v2.filter(|_| !wanted.is_empty()) {
        places.push(v2_place(mount, own, facts(mount), wanted));
    }
    places
}

fn v2_place(mount: &Mount, own: &Own, facts: V2Facts, controllers: BTreeSet<Controller>) -> Place {
    let ours = own.v2.as_deref().and_then(|group| mount.folder_of(group));
    let above = ours
        .as_deref()
        .filter(|ours| *ours != mount.point)
        .and_then(|ours| ours.parent());
    let (parent, we_are_in_it) = match (&ours, above) {
        (_, Some(above)) if facts.parent_delegated => (above.to_owned(), false),
        (Some(ours), _) if facts.own_delegated => (ours.clone(), true),
        (ours, _) => {
            let there = ours.as_ref() == Some(&mount.point);
            (mount.point.clone(), there && !facts.true_root)
        }
    };
    Place {
        version: Version::V2,
        parent,
        controllers,
        we_are_in_it,
    }
}

#[cfg(test)]
mod tests {
    use super::super::mounts::{mounts, own};
    use super::*;

    const UNIFIED: &str = "32 24 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate";
    const SPLIT: &str = "\
32 31 0:29 / /c/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /c/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /c/pids rw,relatime - cgroup cgroup rw,pids
41 31 0:38 / /c/unified rw,relatime - cgroup2 cgroup2 rw";

    fn v2(group: &str, facts: V2Facts) -> (String, bool) {
        let found = places(&mounts(UNIFIED), &own(&format!("0::{group}")), |_| facts);
        assert_eq!(found.len(), 1);
        let expected = [Controller::Cpu, Controller::Memory, Controller::Pids];
        assert_eq!(found[0].controllers, expected.into());
        (found[0].parent.display().to_string(), found[0].we_are_in_it)
    }

    #[test]
    fn on_v2_we_stay_where_we_are_if_it_is_ours() {
        let facts = |true_root, own_delegated, parent_delegated| V2Facts {
            true_root,
            own_delegated,
            parent_delegated,
        };
        let check = |group, facts, parent: &str, we_are_in_it| {
            assert_eq!(v2(group, facts), (parent.to_owned(), we_are_in_it), "{group}");
        };
        let service = "/system.slice/offshootd.service";
        let mounted = "/sys/fs/cgroup/system.slice/offshootd.service";
        check(service, facts(true, true, false), mounted, true);
        check(
            "/system.slice/offshootd.service/daemon",
            facts(true, false, true),
            mounted,
            false,
        );
        // A unit without Delegate, a login session, a plain init.
        for group in [service, "/user.slice/user-0.slice/session-3.scope", "/"] {
            check(group, facts(true, false, false), "/sys/fs/cgroup", false);
        }
        // A container: what it sees as the root is a group like any other.
        check("/", facts(false, false, false), "/sys/fs/cgroup", true);
        check("/init", facts(false, false, false), "/sys/fs/cgroup", false);
        // Outside of what is mounted.
        check("/../x", facts(false, true, true), "/sys/fs/cgroup", false);
    }

    #[test]
    fn on_v1_each_hierarchy_has_its_own_place() {
        let own = own("4:memory:/session\n2:cpu,cpuacct:/\n8:pids:/gone/away\n0::/\n");
        let facts = |_: &Mount| V2Facts::default();
        let found = places(&mounts(SPLIT), &own, facts);
        let shown: Vec<_> = found
            .iter()
            .map(|place| {
                (
                    place.version,
                    place.parent.to_str().unwrap(),
                    place.controllers.len(),
                )
            })
            .collect();
        let v1 = Version::V1;
        assert_eq!(
            shown,
            [
                (v1, "/c/cpu", 2),
                (v1, "/c/memory/session", 1),
                (v1, "/c/pids/gone/away", 1)
            ]
        );
        // Some controllers on each: v2 is asked for what v1 lacks.
        let some = SPLIT
            .lines()
            .filter(|line| !line.contains("memory"))
            .collect::<Vec<_>>();
        let found = places(&mounts(&some.join("\n")), &own, facts);
        let last = found.last().unwrap();
        assert_eq!(
            (last.version, last.controllers.clone()),
            (Version::V2, [Controller::Memory].into())
        );
        // Nothing that can be written is no place.
        let read_only = SPLIT.replace("rw,relatime", "ro,relatime");
        assert_eq!(places(&mounts(&read_only), &own, facts), []);
        assert_eq!(places(&[], &own, facts), []);
    }
}
