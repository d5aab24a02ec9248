//! What a daemon and its VMs must have taken away again: at the end of every test, and whenever a test asks.

use std::path::Path;

use crate::inventory::{Database, Inventory, Kind, Marks, Scope, everything_below};
use crate::{Daemon, comes_true, descriptors, names, tell, wait_until};

/// Says in a test's folder whose it is, so that `scripts/verify` does not take what is in use for left over: the id and
/// the start time of the test's process.
pub(crate) fn sign(root: &Path) {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc/self/stat");
    // The 22nd field (proc_pid_stat(5)); the second may hold anything, but ends with the last parenthesis.
    let rest = &stat[stat.rfind(')').expect("a name") + 1..];
    let started = rest.split_whitespace().nth(19).expect("a start time");
    let owner = format!("{} {started}\n", std::process::id());
    std::fs::write(root.join("owner"), owner).expect("the owner");
}

impl Daemon {
    /// The database of the running daemon.
    pub fn database(&self) -> Database {
        Database::open(&self.data())
    }

    /// By what this daemon's things are known.
    pub fn marks(&self) -> Marks {
        Marks::new(self.root(), &self.database().vm_ids())
    }

    /// What the daemon says of its idle TAPs: how many there are, and how many there shall be.
    pub fn idle_taps(&self) -> (u64, u64) {
        let info = self.get_json("/v1/system/info");
        let number = |key: &str| info["tap_pool"][key].as_u64().expect("a number");
        (number("ready"), number("wanted"))
    }

    /// Waits until the daemon has everything ready again that it keeps for VMs to come.
    pub fn at_rest(&self) {
        wait_until("the daemon to be at rest", || {
            let (ready, wanted) = self.idle_taps();
            ready == wanted
        });
    }

    /// Everything there is of the running daemon: on the machine, in its folders, in its database, in its process. What it
    /// keeps ready counts in full.
    pub fn inventory(&self) -> Inventory {
        self.at_rest();
        let marks = self.marks();
        let mut inventory = Inventory::of_the_machine(Scope {
            marks: &marks,
            namespace: Some(self.namespace.file()),
        });
        for folder in [self.data(), self.root().join("run")] {
            inventory.add(
                Kind::File,
                everything_below(&folder).iter().map(|path| shown(path)),
            );
        }
        inventory.add(Kind::Row, self.database().all_rows());
        inventory.add(Kind::Descriptor, descriptors(self.pid()));
        inventory
    }

    /// Waits until everything is as it was: connections close and tasks end a moment after the answer. Fails with the name
    /// of what is not.
    pub fn as_before(&self, before: &Inventory, after_what: &str) {
        let mut changes = Vec::new();
        let reached = comes_true(|| {
            changes = self.inventory().since(before);
            changes.is_empty()
        });
        assert!(
            reached,
            "after {after_what} the host is not as it was:\n{}",
            changes.join("\n")
        );
        tell(&format!("as it was, after {after_what}"));
    }

    /// Fails unless the kernel has as many idle TAPs of this daemon as it shall, each on its bridge and switched off.
    fn check_idle_taps(&self) {
        let (_, wanted) = self.idle_taps();
        let networks = self.get_json("/v1/networks");
        let bridges = networks.as_array().expect("a list").iter();
        // Those of other daemons in the same namespace have other bridges.
        let own: Vec<_> = bridges
            .filter_map(|network| network["bridge"].as_str()?.strip_prefix("ofs-"))
            .map(|digits| format!("osp-{digits} tun"))
            .collect();
        let links = Inventory::links(self.namespace.file());
        let idle: Vec<_> = links.iter().filter(|link| own.contains(link)).collect();
        assert_eq!(idle.len() as u64, wanted, "idle TAPs: {idle:?}");
    }

    /// Gives back what the daemon keeps ready, and ends it.
    pub fn drain(&mut self) {
        self.ok(["system", "shutdown", "--drain"]);
        let exit = self.child.wait().expect("wait");
        assert!(exit.success(), "the daemon ended with {exit}");
    }

    /// Removes every VM, checks what the daemon keeps ready, lets it give that back and end, and fails if anything is left
    /// of it.
    pub fn finish(mut self) {
        self.remove_all();
        assert_eq!(self.ok(["ps", "-aq"]), "", "VMs are left");
        let data = self.data();
        assert_eq!(names(&data.join("vms")), [""; 0], "files of VMs are left");
        assert_eq!(names(&data.join("tmp")), [""; 0], "unpublished work is left");
        let run = self.root().join("run");
        assert_eq!(names(&run.join("vms")), [""; 0], "sockets of VMs are left");
        let database = self.database();
        assert_eq!(database.rows_of_vms(), [""; 0], "rows of VMs are left");
        assert_eq!(database.integrity(), "ok");
        drop(database);

        self.at_rest();
        self.check_idle_taps();
        let marks = self.marks();
        self.drain();
        self.small_disk = None;
        let scope = Scope {
            marks: &marks,
            namespace: Some(self.namespace.file()),
        };
        let mut after = Inventory::of_the_machine(scope);
        // What lies in the data directory is the daemon's to keep, but nothing that is named after a VM.
        let files = everything_below(self.root()).into_iter().map(|path| shown(&path));
        let own = self.root().to_string_lossy().into_owned();
        after.add(
            Kind::File,
            files.filter(|path| marks.are_in(path.strip_prefix(&own).unwrap_or(path))),
        );
        let mut empty = Inventory::default();
        let own = Some(self.namespace.name().to_owned()).filter(|name| marks.are_in(name));
        empty.add(Kind::NetworkNamespace, own);
        empty.add(Kind::Link, self.links_at_first.clone());
        let mut changes = after.since(&empty);
        // Its own namespace goes last, with the daemon's value.
        let mounted = format!(" {} ", self.namespace.file().display());
        changes.retain(|change| !change.contains(&mounted));
        assert!(
            changes.is_empty(),
            "left on this machine:\n{}",
            changes.join("\n")
        );
    }
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
