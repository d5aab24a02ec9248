//! All groups of one instance: found where they may be made, and found again.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use super::group::{Part, make};
use super::mounts::{Mount, mounts, own};
use super::place::{Place, V2Facts, places};
use super::{CgroupError, Controller, Group, Version, files, read};

/// The leaf that we move into where our own group is to hold groups only.
const OWN_LEAF: &str = "daemon";
/// What a service manager marks with 1 where it gave a group away (systemd's `docs/CGROUP_DELEGATION.md`).
const DELEGATED: [&str; 2] = ["trusted.delegate", "user.delegate"];

/// Where the groups of one instance lie.
#[derive(Debug)]
pub struct Tree {
    instance: String,
    places: Vec<Place>,
}

impl Tree {
    /// Looks for places where groups can be made. `instance` names the group that holds them all.
    ///
    /// On v2 it hands controllers down to them and, where it must, moves this process into a leaf beside them.
    pub fn open(instance: &str) -> Result<Self, CgroupError> {
        let mounted = mounts(&read(Path::new("/proc/self/mountinfo"))?);
        let own = own(&read(Path::new("/proc/self/cgroup"))?);
        let facts = |mount: &Mount| v2_facts(mount, own.v2.as_deref());
        let mut usable = Vec::new();
        let mut first_error = None;
        for place in places(&mounted, &own, facts) {
            match ready(place) {
                Ok(place) if place.controllers.is_empty() => {}
                Ok(place) => usable.push(place),
                Err(error) => {
                    tracing::debug!(%error, "control groups cannot be used in one place");
                    first_error.get_or_insert(error);
                }
            }
        }
        if usable.is_empty() {
            return Err(first_error.unwrap_or(CgroupError::None));
        }
        Ok(Self {
            instance: instance.to_owned(),
            places: usable,
        })
    }

    /// The instance's name.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Of processor time, memory and threads, what cannot be limited here.
    pub fn missing(&self) -> Vec<Controller> {
        let has = |controller: &Controller| {
            let mut places = self.places.iter();
            places.any(|place| place.controllers.contains(controller))
        };
        [Controller::Cpu, Controller::Memory, Controller::Pids]
            .into_iter()
            .filter(|controller| !has(controller))
            .collect()
    }

    /// Where groups are made, with the version of the hierarchy.
    pub fn parents(&self) -> impl Iterator<Item = (Version, &Path)> {
        self.places
            .iter()
            .map(|place| (place.version, place.parent.as_path()))
    }

    /// The group of this name. Makes nothing.
    pub fn group(&self, name: &str) -> Group {
        let part = |place: &Place| Part {
            version: place.version,
            controllers: place.controllers.clone(),
            path: place.parent.join(&self.instance).join(name),
        };
        Group {
            parts: self.places.iter().map(part).collect(),
        }
    }

    /// The names of all groups of this instance, on whatever hierarchy.
    pub fn names(&self) -> Result<BTreeSet<String>, CgroupError> {
        let mut names = BTreeSet::new();
        for place in &self.places {
            let path = place.parent.join(&self.instance);
            let unreadable = |source| CgroupError::Read {
                path: path.clone(),
                source,
            };
            let entries = match std::fs::read_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.map_err(unreadable)?,
            };
            for entry in entries {
                let entry = entry.map_err(unreadable)?;
                if entry.file_type().map_err(unreadable)?.is_dir() {
                    names.insert(entry.file_name().to_string_lossy().into_owned());
                }
            }
        }
        Ok(names)
    }
}

fn v2_facts(mount: &Mount, own: Option<&Path>) -> V2Facts {
    let ours = own.and_then(|group| mount.folder_of(group));
    let above = ours
        .as_deref()
        .filter(|ours| *ours != mount.point)
        .and_then(Path::parent);
    V2Facts {
        true_root: !mount.point.join("cgroup.type").exists(),
        own_delegated: ours.as_deref().is_some_and(is_delegated),
        parent_delegated: above.is_some_and(is_delegated),
    }
}

fn is_delegated(folder: &Path) -> bool {
    DELEGATED.iter().any(|name| {
        let mut value = [0_u8; 8];
        matches!(rustix::fs::getxattr(folder, *name, &mut value), Ok(1) if value[0] == b'1')
    })
}

/// Makes sure that groups can be made below a place; gives it with the controllers that they will have.
fn ready(mut place: Place) -> Result<Place, CgroupError> {
    let refused = |path: PathBuf, errno: rustix::io::Errno| CgroupError::Write {
        path,
        source: errno.into(),
    };
    rustix::fs::access(&place.parent, rustix::fs::Access::WRITE_OK)
        .map_err(|errno| refused(place.parent.clone(), errno))?;
    if place.version == Version::V1 {
        return Ok(place);
    }
    let offered = read(&place.parent.join("cgroup.controllers"))?;
    place
        .controllers
        .retain(|controller| files::has_word(&offered, controller.as_str()));
    if place.controllers.is_empty() {
        return Ok(place);
    }
    if place.we_are_in_it {
        let leaf = place.parent.join(OWN_LEAF);
        make(&leaf)?;
        super::write(&leaf.join("cgroup.procs"), "0")?;
    }
    enable(&place.parent, &place.controllers)?;
    Ok(place)
}

/// Hands controllers down to what is in a group of v2.
pub(super) fn enable(folder: &Path, controllers: &BTreeSet<Controller>) -> Result<(), CgroupError> {
    let file = folder.join("cgroup.subtree_control");
    let enabled = read(&file)?;
    let missing: Vec<_> = controllers
        .iter()
        .map(|controller| controller.as_str())
        .filter(|name| !files::has_word(&enabled, name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    files::write(&file, &missing.join(" ")).map_err(|source| match source.kind() {
        io::ErrorKind::ResourceBusy => CgroupError::Occupied {
            path: folder.to_owned(),
        },
        _ => CgroupError::Write { path: file, source },
    })
}
