//! The system calls that a confined program is refused, whatever it is: those that change what it sees, look into other
//! processes, load code into the kernel, or are much code of the kernel's for nothing that it needs.
//!
//! A VMM's own filter, which comes on top, is narrower; this one holds from its first instruction on, and for one that has none.
//! What is refused fails with `EPERM`, so that programs fall back to something else. Sources: seccomp(2),
//! Documentation/userspace-api/seccomp_filter.rst; the choice follows the default profile of Docker.

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, c_long, sock_filter,
};

/// Refused without a look at their arguments.
const REFUSED: &[c_long] = &[
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    // Other processes, and files around their paths.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    // Keys of the daemon's session, which it inherits.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // The kernel and the machine.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_fanotify_init,
    libc::SYS_lookup_dcookie,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// Its sockets would be made without a call that a filter sees (`IORING_OP_SOCKET`).
const IO_URING: [c_long; 3] = [
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// `AUDIT_ARCH_X86_64` and `AUDIT_ARCH_AARCH64` of linux/audit.h.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// System calls of the x32 ABI have this bit; it has second numbers for all of them.
const X32: u32 = 0x4000_0000;

/// The flags of clone(2) that make namespaces.
const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// Where `struct seccomp_data` has the call's number, the architecture, and the low half of an argument (little endian).
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const fn argument(n: u32) -> u32 {
    16 + 8 * n
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const fn refuse(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()
}

const fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

const fn answer(what: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, what)
}

const fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Skips so many instructions when the test fails.
const fn unless(test: u32, k: u32, skip: u8) -> sock_filter {
    sock_filter {
        code: (BPF_JMP | test | BPF_K) as u16,
        jt: 0,
        jf: skip,
        k,
    }
}

/// The filter. A child that is `listening_only` makes stream Unix sockets and connects none; every other one makes Unix
/// sockets.
pub(super) fn program(listening_only: bool, io_uring: bool) -> Vec<sock_filter> {
    let number = |call: c_long| u32::try_from(call).unwrap_or(u32::MAX);
    let is = |call: c_long, skip| unless(BPF_JEQ, number(call), skip);
    let mut out = vec![
        load(ARCH),
        // Numbers of another architecture mean other calls.
        unless(BPF_JEQ, ARCHITECTURE, 1),
        unless(BPF_JEQ, ARCHITECTURE, 0),
        load(NUMBER),
    ];
    out[1] = sock_filter {
        jt: 1,
        jf: 0,
        ..unless(BPF_JEQ, ARCHITECTURE, 0)
    };
    out[2] = answer(libc::SECCOMP_RET_KILL_PROCESS);
    out.extend([unless(BPF_JGE, X32, 1), answer(refuse(libc::EPERM))]);
    let mut refused = REFUSED.to_vec();
    if !io_uring {
        refused.extend(IO_URING);
    }
    if listening_only {
        refused.push(libc::SYS_connect);
    }
    for call in refused {
        out.extend([is(call, 1), answer(refuse(libc::EPERM))]);
    }
    // Its flags are in memory, where no filter looks; the C library then takes clone(2).
    out.extend([is(libc::SYS_clone3, 1), answer(refuse(libc::ENOSYS))]);
    out.extend([
        is(libc::SYS_clone, 4),
        load(argument(0)),
        unless(BPF_JSET, NAMESPACES, 1),
        answer(refuse(libc::EPERM)),
        answer(ALLOW),
    ]);
    // SOCK_CLOEXEC and SOCK_NONBLOCK are above the kind.
    const KIND: u32 = 0xf;
    let stream = [
        load(argument(1)),
        statement(libc::BPF_ALU | libc::BPF_AND | BPF_K, KIND),
        unless(BPF_JEQ, libc::SOCK_STREAM.cast_unsigned(), 1),
        answer(ALLOW),
        answer(refuse(libc::EPERM)),
    ];
    let after_family: &[sock_filter] = if listening_only { &stream } else { &stream[3..4] };
    let skip = u8::try_from(3 + after_family.len()).unwrap_or(u8::MAX);
    out.extend([
        is(libc::SYS_socket, skip),
        load(argument(0)),
        sock_filter {
            jt: 1,
            jf: 0,
            ..unless(BPF_JEQ, libc::AF_UNIX.cast_unsigned(), 0)
        },
        answer(refuse(libc::EPERM)),
    ]);
    out.extend(after_family);
    out.push(answer(ALLOW));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Carries out a filter as the kernel does.
    fn carry_out(program: &[sock_filter], number: c_long, arguments: [u32; 2]) -> u32 {
        let (mut at, mut word) = (0, 0_u32);
        loop {
            let step = program[at];
            at += 1;
            let code = u32::from(step.code);
            let mut jump = |holds: bool| at += usize::from(if holds { step.jt } else { step.jf });
            if code == BPF_LD | BPF_W | BPF_ABS {
                word = match step.k {
                    NUMBER => u32::try_from(number).unwrap(),
                    ARCH => ARCHITECTURE,
                    16 => arguments[0],
                    24 => arguments[1],
                    other => panic!("reads at {other}"),
                };
            } else if code == BPF_JMP | BPF_JEQ | BPF_K {
                jump(word == step.k);
            } else if code == BPF_JMP | BPF_JGE | BPF_K {
                jump(word >= step.k);
            } else if code == BPF_JMP | BPF_JSET | BPF_K {
                jump(word & step.k != 0);
            } else if code == libc::BPF_ALU | libc::BPF_AND | BPF_K {
                word &= step.k;
            } else if code == BPF_RET | BPF_K {
                return step.k;
            } else {
                panic!("code {code:#x}");
            }
        }
    }

    #[test]
    fn what_is_refused_is_refused_and_the_rest_is_not() {
        const NO: u32 = refuse(libc::EPERM);
        let unix = libc::AF_UNIX.cast_unsigned();
        let inet = libc::AF_INET.cast_unsigned();
        let stream = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC).cast_unsigned();
        let datagram = libc::SOCK_DGRAM.cast_unsigned();
        let threads = (libc::CLONE_VM | libc::CLONE_THREAD).cast_unsigned();
        let user = libc::CLONE_NEWUSER.cast_unsigned();
        for (listening_only, io_uring) in [(false, false), (false, true), (true, false)] {
            let program = program(listening_only, io_uring);
            assert!(program.len() < 4096, "BPF_MAXINSNS");
            let check = |call, arguments, expected| {
                assert_eq!(
                    carry_out(&program, call, arguments),
                    expected,
                    "call {call} {arguments:?}"
                );
            };
            for call in [
                libc::SYS_read,
                libc::SYS_execve,
                libc::SYS_ioctl,
                libc::SYS_openat,
            ] {
                check(call, [0, 0], ALLOW);
            }
            for call in REFUSED {
                check(*call, [0, 0], NO);
            }
            check(libc::SYS_read + c_long::from(X32), [0, 0], NO);
            check(libc::SYS_clone3, [0, 0], refuse(libc::ENOSYS));
            check(libc::SYS_clone, [threads, 0], ALLOW);
            check(libc::SYS_clone, [user, 0], NO);
            check(libc::SYS_socket, [inet, stream], NO);
            check(libc::SYS_socket, [unix, stream], ALLOW);
            let limited = if listening_only { NO } else { ALLOW };
            check(libc::SYS_socket, [unix, datagram], limited);
            check(libc::SYS_connect, [0, 0], limited);
            check(
                libc::SYS_io_uring_setup,
                [0, 0],
                if io_uring { ALLOW } else { NO },
            );
        }
    }
}
