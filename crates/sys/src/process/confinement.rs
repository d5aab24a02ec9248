//! A child that sees its own files and nothing else: namespaces of its own, a root that is made for it, no privileges, and
//! fewer system calls.
//!
//! ```text
//! us: a tmpfs with empty files and folders, read-only ── copies of the mounts behind them (open_tree)
//!                          │                                      │
//! the child, in its own namespaces:  tmpfs over `/` ─► each copy into its place ─► /proc of its own ─► pivot_root, detach the rest
//! ```
//!
//! Everything is made in the child's own mount namespace and goes with it: in ours nothing appears, and nothing has to be
//! removed. Paths are the same inside and outside.
//!
//! What is not there is not shown: the program then says so itself. Not for more than one process: the child is the first of its
//! process namespace, and whatever it starts ends with it. Of its signals, those without a handler do nothing to it but SIGKILL
//! and SIGSTOP; `abort(3)` therefore ends it with SIGSEGV.
//!
//! Sources: mount_namespaces(7), pivot_root(2), open_tree(2), mount_setattr(2), pid_namespaces(7), capabilities(7). Linux 5.12.

mod filter;
mod root;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;

use super::bound_folder::{MountAttr, mount_setattr};

/// What a confined child has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confinement {
    /// What it sees of our files, in any order.
    pub files: Vec<Visible>,
    /// What it has of the network.
    pub network: ConfinedNetwork,
    /// Whether it may use io_uring(7).
    pub io_uring: bool,
}

/// A file or folder that a confined child sees.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Visible {
    /// Where, for us and for it: an absolute path without `..`, not `/`.
    pub path: PathBuf,
    /// What it may do with it.
    pub access: Access,
}

/// What a confined child may do with a file, if the file's mode lets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Read it.
    Read,
    /// Read and execute it, and what is mounted below it. Where it is a symbolic link, the child gets the link.
    Program,
    /// Read and write it.
    Write,
    /// Use the device node.
    Device,
}

/// What a confined child has of the network besides the descriptors that it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfinedNetwork {
    /// A network namespace of its own, where nothing is but TAPs with these names, for a program that looks at the one it
    /// was given by its name: nobody is at their other end. Unix sockets only.
    Empty {
        /// The names.
        stand_ins: Vec<String>,
    },
    /// The namespace that it would have without confinement, for a program that opens its TAP by name. It may listen on stream
    /// Unix sockets and connect to nobody.
    Listening,
}

impl Default for ConfinedNetwork {
    fn default() -> Self {
        Self::Empty {
            stand_ins: Vec::new(),
        }
    }
}

/// Why a child cannot be confined. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementError {
    /// A path that means something else inside.
    #[error("`{}` is not a path that a confined program can see", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// The root could not be made.
    #[error("cannot make a root for it")]
    Root {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file could not be put into the root.
    #[error("cannot show it `{}`", path.display())]
    Show {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The steps of [`Prepared::enter`], [`Prepared::drop_bounding_set`] and [`Prepared::drop_capabilities`], in order.
pub(super) const STEPS: [&str; 11] = [
    "detach its mounts from ours",
    "make a stand-in of its TAP",
    "put its root into place",
    "enter its root",
    "show it a file",
    "mount its /proc",
    "leave our root",
    "give up our mounts",
    "enter its root again",
    "drop a capability for good",
    "drop its capabilities",
];

/// All that [`STEPS`] need, laid out before the fork.
pub(super) struct Prepared {
    /// The namespaces to make with the process (clone(2)).
    pub(super) namespaces: libc::c_int,
    root: OwnedFd,
    mounts: Vec<(OwnedFd, CString)>,
    stand_ins: Vec<libc::ifreq>,
    filter: Vec<libc::sock_filter>,
}

/// Makes the root of the child, with what it will see ready to be mounted.
pub(super) fn prepare(confinement: &Confinement) -> Result<Prepared, ConfinementError> {
    let (root, mounts) = root::make(&confinement.files)?;
    let mut namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let mut stand_ins = Vec::new();
    let mut listening_only = true;
    if let ConfinedNetwork::Empty { stand_ins: names } = &confinement.network {
        namespaces |= libc::CLONE_NEWNET;
        listening_only = false;
        for name in names {
            let request = crate::tap::request(name, 0).map_err(|source| ConfinementError::Root { source })?;
            stand_ins.push(request);
        }
    }
    Ok(Prepared {
        namespaces,
        root,
        mounts,
        stand_ins,
        filter: filter::program(listening_only, confinement.io_uring),
    })
}

impl Prepared {
    /// Makes the prepared root the calling process's own; the index of the step that failed if not.
    ///
    /// # Safety
    /// Only in a freshly made child that has the namespaces asked for, before its descriptors are moved: replaces everything
    /// that it sees. Makes raw system calls and allocates nothing.
    pub(super) unsafe fn enter(&self) -> Result<(), u8> {
        let (here, none) = (c".".as_ptr(), std::ptr::null::<libc::c_char>());
        // SAFETY: strings are NUL-terminated, structures have the size that is given with them, descriptors are ours.
        unsafe {
            let private = libc::MS_REC | libc::MS_PRIVATE;
            if libc::syscall(libc::SYS_mount, none, c"/".as_ptr(), none, private, none) < 0 {
                return Err(0);
            }
            for request in &self.stand_ins {
                make_stand_in(request)?;
            }
            if move_mount(self.root.as_raw_fd(), c"/".as_ptr()) < 0 {
                return Err(2);
            }
            if libc::fchdir(self.root.as_raw_fd()) < 0 {
                return Err(3);
            }
            for (mount, place) in &self.mounts {
                if move_mount(mount.as_raw_fd(), place.as_ptr()) < 0 {
                    return Err(4);
                }
            }
            let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            // Nothing of the host but the child itself.
            let only = c"subset=pid,hidepid=invisible".as_ptr();
            let proc = c"proc".as_ptr();
            if libc::syscall(libc::SYS_mount, proc, proc, proc, flags, only) < 0 {
                return Err(5);
            }
            // The old root comes to lie on top of the new one, and is taken away: pivot_root(2), "pivot_root(".", ".")".
            if libc::syscall(libc::SYS_pivot_root, here, here) < 0 {
                return Err(6);
            }
            if libc::syscall(libc::SYS_umount2, here, libc::MNT_DETACH) < 0 {
                return Err(7);
            }
            if libc::chdir(c"/".as_ptr()) < 0 {
                return Err(8);
            }
        }
        Ok(())
    }

    /// Takes away every capability that the process could ever have again; the index of the step that failed if not.
    ///
    /// # Safety
    /// Only in a freshly made child.
    pub(super) unsafe fn drop_bounding_set(&self) -> Result<(), u8> {
        // SAFETY: numbers alone.
        unsafe {
            // The kernel refuses the first number that it does not know; there are 64 at most.
            for capability in 0..64 {
                if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 {
                    if *libc::__errno_location() == libc::EINVAL {
                        break;
                    }
                    return Err(9);
                }
            }
        }
        Ok(())
    }

    /// Takes away the capabilities that are left after a change of the user: the inheritable ones.
    ///
    /// # Safety
    /// Only in a freshly made child.
    pub(super) unsafe fn drop_capabilities(&self) -> Result<(), u8> {
        // SAFETY: `_LINUX_CAPABILITY_VERSION_3` takes two sets of three words.
        unsafe {
            let header: [u32; 2] = [0x2008_0522, 0];
            let none = [0_u32; 6];
            if libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) < 0 {
                return Err(10);
            }
        }
        Ok(())
    }

    /// Refuses the system calls that the child has no use for, from here on and for whatever it executes; whether that worked.
    ///
    /// # Safety
    /// Only in a freshly made child that has no_new_privs, as its last step.
    pub(super) unsafe fn filter_calls(&self) -> bool {
        let program = libc::sock_fprog {
            len: u16::try_from(self.filter.len()).unwrap_or(0),
            filter: self.filter.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel copies the program.
        unsafe {
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) == 0
        }
    }
}

/// `move_mount(2)` of a detached mount.
///
/// # Safety
/// `place` must be NUL-terminated.
unsafe fn move_mount(mount: RawFd, place: *const libc::c_char) -> libc::c_long {
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;
    // SAFETY: the caller's word.
    unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount,
            c"".as_ptr(),
            libc::AT_FDCWD,
            place,
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    }
}

/// Makes a TAP in the network namespace of the process that stays there, and switches it on.
///
/// # Safety
/// Only in a freshly made child.
unsafe fn make_stand_in(request: &libc::ifreq) -> Result<(), u8> {
    // SAFETY: both requests take one `struct ifreq`, which this is, and keep no pointer to it; TUNSETPERSIST takes a number.
    unsafe {
        let tun = libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        let socket = libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let mut up = *request;
        up.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        let one: libc::c_ulong = 1;
        let made = tun >= 0
            && socket >= 0
            && libc::ioctl(tun, libc::TUNSETIFF, std::ptr::from_ref(request)) >= 0
            // Root's, who is nobody here: without an owner, whoever may open the device may open it.
            && libc::ioctl(tun, libc::TUNSETOWNER, libc::c_ulong::from(0_u8)) >= 0
            && libc::ioctl(tun, libc::TUNSETPERSIST, one) >= 0
            && libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const up) >= 0;
        libc::close(tun);
        libc::close(socket);
        if made { Ok(()) } else { Err(1) }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{DetachedCommand, Exit, Identity, SpawnError, is_root, spawn_detached};
    use super::*;

    const SYSTEM: [&str; 5] = ["/usr", "/bin", "/lib", "/lib64", "/dev/null"];

    fn shell(script: &str, shown: &[(&Path, Access)]) -> DetachedCommand {
        let system = SYSTEM.map(|path| (Path::new(path), Access::Program));
        let files = system.iter().chain(shown).map(|(path, access)| Visible {
            path: (*path).to_owned(),
            access: *access,
        });
        DetachedCommand {
            args: vec!["-c".into(), script.into()],
            env: vec![("PATH".into(), "/usr/bin:/bin".into())],
            identity: Some(Identity {
                uid: 65534,
                gid: 65534,
                groups: Vec::new(),
            }),
            confinement: Some(Confinement {
                files: files.collect(),
                ..Confinement::default()
            }),
            ..DetachedCommand::new("/bin/sh")
        }
    }

    async fn run(mut command: DetachedCommand) -> (Option<Exit>, String) {
        let out = tempfile::NamedTempFile::new().unwrap();
        command.output = Some(out.reopen().unwrap().into());
        let (_, process) = spawn_detached(command).unwrap();
        let exit = process.wait_exit().await;
        (exit, std::fs::read_to_string(out.path()).unwrap())
    }

    #[tokio::test]
    async fn a_folder_can_be_read_and_one_in_it_written_and_we_have_no_new_mount() {
        use std::os::unix::fs::PermissionsExt;
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let [folder, own, secret] = ["run", "run/own", "secret"].map(|name| dir.path().join(name));
        for path in [&folder, &own, &secret] {
            std::fs::create_dir(path).unwrap();
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
        }
        std::fs::write(folder.join("word"), "hello\n").unwrap();
        let script = format!(
            "cd {}; cat word; echo x >own/new && cat own/new; echo x >new; ls ..; ls -A /proc | head -1",
            folder.display()
        );
        let command = shell(&script, &[(&own, Access::Write), (&folder, Access::Read)]);
        let (exit, said) = run(command).await;
        assert_eq!(exit, Some(Exit::Code(0)), "{said}");
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines[..2], ["hello", "x"], "{said}");
        assert!(lines[2].ends_with("Read-only file system"), "{said}");
        assert_eq!(lines[3..], ["run", "1"], "{said}");
        assert_eq!(std::fs::read_to_string(own.join("new")).unwrap(), "x\n");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
    }

    #[tokio::test]
    async fn what_would_mean_something_else_inside_is_refused_and_what_is_not_there_is_not_shown() {
        for path in ["/", "/..", "/usr/../etc", "etc", ""] {
            let error = spawn_detached(shell("true", &[(Path::new(path), Access::Read)])).unwrap_err();
            assert!(
                matches!(
                    error,
                    SpawnError::Confinement {
                        source: ConfinementError::Path { .. },
                        ..
                    }
                ),
                "{path}: {error:?}"
            );
        }
        if !is_root() {
            return;
        }
        let absent = Path::new("/no/such/file");
        let (exit, said) = run(shell("ls /no", &[(absent, Access::Write)])).await;
        assert_eq!(exit, Some(Exit::Code(2)), "{said}");
    }

    #[tokio::test]
    async fn a_program_that_it_does_not_see_cannot_be_started() {
        if !is_root() {
            return;
        }
        let command = DetachedCommand {
            confinement: Some(Confinement::default()),
            ..DetachedCommand::new("/bin/true")
        };
        let SpawnError::Child { step, .. } = spawn_detached(command).unwrap_err() else {
            panic!("it is not the child that failed")
        };
        assert_eq!(step, "execute the program");
    }
}
