//! virtiofsd: the program that serves one shared folder to one VM.
//!
//! ```text
//! us                                         virtiofsd (root, own session)              VMM (unprivileged)
//!  share.sock  listening, made by us ─ fd 10 ─► accepts one client  ◄────── connects ─── vhost-user-fs device
//!              mode 0600, owned by the VMM's user
//!  sealed memory, 64 KiB            ─ fd 1,2 ─► its own words
//!  the folder  bound on itself in mounts of its own: nodev, and read-only where the share is
//! ```
//!
//! The socket listens before the program exists, so the VMM connects at once and nothing polls. The program ends by
//! itself when the VMM closes its connection. It runs as root, because it acts for every user of the guest, as bind
//! mounts do in containers; it then goes into namespaces in which there is nothing but the folder and no network, keeps
//! the capabilities that file access needs, and filters its system calls.
//!
//! Its words go to memory that cannot grow: a guest makes it complain as often as it likes, and must not fill the
//! host's disk. They are written to the log when it ends.
//!
//! Locks stay within a guest: neither program offers POSIX locks of the host whole (QEMU's cannot wait for one, the
//! Rust one has none), while a guest's own kernel keeps all of them.
//!
//! Two programs are in the field, [`VirtiofsdFlavour`]; what they are told is in [`arguments`].

mod args;
mod probe;
mod server;

pub use args::{ArgumentsError, SOCKET_FD, arguments};
pub use probe::{DEFAULT_PROGRAMS, VirtiofsdFacts, VirtiofsdFlavour};
pub use server::{
    KillError, MAX_OPEN_FILES, ShareCache, ShareConfig, ShareError, ShareExit, ShareServer, ShareState,
    Virtiofsd, VirtiofsdConfig,
};
