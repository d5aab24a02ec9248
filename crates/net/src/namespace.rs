//! The network namespace (network_namespaces(7)) that holds bridges, TAPs, filters and sockets of a daemon's VMs.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where ip-netns(8) keeps namespaces that have names.
const NAMED: &str = "/run/netns";

/// Why a namespace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// No name for a file.
    #[error("`{name}` is not a network namespace's name")]
    Name {
        /// The refused name, shortened.
        name: String,
    },
    /// It is not there, or is something else.
    #[error("cannot use the network namespace {}; `ip netns add NAME` makes one", path.display())]
    Open {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One network namespace. Cheap to clone; it lives at least as long as this value.
#[derive(Clone, Debug, Default)]
pub struct Namespace {
    /// Nothing: the one that the process is in.
    inside: Option<Arc<Inside>>,
}

#[derive(Debug)]
struct Inside {
    name: String,
    file: OwnedFd,
}

impl Namespace {
    /// The one that this process is in.
    pub fn own() -> Self {
        Self::default()
    }

    /// The one that ip-netns(8) knows by this name.
    pub fn named(name: &str) -> Result<Self, NamespaceError> {
        let plain = !name.is_empty()
            && name.len() <= 255
            && !name.contains(['/', '\0'])
            && !matches!(name, "." | "..");
        if !plain {
            return Err(NamespaceError::Name {
                name: name.chars().take(80).flat_map(char::escape_debug).collect(),
            });
        }
        let path = Path::new(NAMED).join(name);
        let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let namespace = file.map_err(io::Error::from).map(|file| Self {
            inside: Some(Arc::new(Inside {
                name: name.to_owned(),
                file,
            })),
        });
        // An empty file of that name is no namespace.
        namespace
            .and_then(|namespace| namespace.run(|| ()).map(|()| namespace))
            .map_err(|source| NamespaceError::Open { path, source })
    }

    /// Its name; nothing for the process's own.
    pub fn name(&self) -> Option<&str> {
        self.inside.as_ref().map(|inside| inside.name.as_str())
    }

    /// Does something in it, on a thread of its own; blocks until it is done. Sockets, `/dev/net/tun` files and processes
    /// that are made there stay there wherever they are used later. Fails only when the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let Some(inside) = &self.inside else {
            return Ok(work());
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(inside.file.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(work())
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else() {
        for bad in ["", ".", "..", "a/b", "/etc/passwd", "a\0"] {
            assert!(
                matches!(Namespace::named(bad), Err(NamespaceError::Name { .. })),
                "{bad:?}"
            );
        }
        let missing = Namespace::named("offshoot-no-such-namespace").unwrap_err();
        assert!(missing.to_string().contains("ip netns add"), "{missing}");
    }
}
