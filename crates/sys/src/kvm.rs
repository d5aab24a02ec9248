//! Whether `/dev/kvm` is worth using, found out by running a guest and not by looking at the file.
//!
//! A device node says little: some clouds offer a paravirtual KVM that interprets guest kernels instruction by
//! instruction, which makes a boot a hundred times slower than plain emulation. So the probe runs a short loop in a
//! guest and times it. The loop must run where kernels run, in ring 0 (real mode is), for such a KVM may run guest
//! *user* code at full speed.
//!
//! ```text
//! one page of guest memory at 0xfffff000, code in its last 16 bytes, where an x86 CPU starts:
//!
//!   fffffff0  66 b9 <n: u32>   mov  ecx, n
//!   fffffff6  66 49            dec  ecx         ◄─┐
//!   fffffff8  75 fc            jnz  fffffff6    ──┘
//!   fffffffa  e6 80            out  0x80, al        back to us: one round is done
//!   fffffffc  eb f2            jmp  fffffff0
//! ```
//!
//! Nothing else has to be set up, so no register or segment layouts are needed. The guest runs in a child process
//! that is killed when it takes too long: whatever a KVM does, the probe comes back.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal, WaitOptions};
use serde::{Deserialize, Serialize};

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvmProbe {
    /// Whether the device exists.
    pub present: bool,
    /// Whether this process may open it.
    pub permitted: bool,
    /// Whether guests run on the processor itself: KVM is worth using.
    pub native: bool,
    /// How many turns of a two-instruction loop the guest made in a second; 0 when it never ran.
    pub loops_per_s: f64,
    /// The finding in words, for people.
    pub explanation: String,
}

/// Below this, the guest is interpreted. Processors of the last fifteen years make over a thousand million turns a
/// second, nested ones with slow exits still hundreds of millions; interpreters make one million.
const NATIVE_LOOPS_PER_S: f64 = 20e6;
/// Turns between two exits to us: 10 ms for an interpreter, and long enough to hide the cost of an exit elsewhere.
const TURNS_PER_ROUND: u32 = 10_000;
/// No more rounds than this: a few milliseconds on a real KVM.
const MAX_ROUNDS: u32 = 200;
/// The child makes no further round after this.
const ENOUGH: Duration = Duration::from_millis(25);
/// The child is killed after this: making the VM may take a while on a busy host, the rounds may not.
const GIVE_UP: Duration = Duration::from_millis(500);

const PAGE: usize = 4096;
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xae04;
const KVM_CREATE_VCPU: libc::c_ulong = 0xae41;
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;
const KVM_RUN: libc::c_ulong = 0xae80;
/// The one API version there is (Documentation/virt/kvm/api.rst).
const KVM_API_VERSION: i32 = 12;
const KVM_EXIT_IO: u32 = 2;
/// `struct kvm_run`: `exit_reason` follows two bytes and six of padding.
const EXIT_REASON_OFFSET: usize = 8;

#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    size: u64,
    host_address: u64,
}

/// What the child tells through its pipe, in native byte order: it is our own copy.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Report {
    /// Index into [`STEPS`]; [`DONE`] when the loop ran.
    step: u32,
    /// errno, or the exit reason where the guest stopped for another reason than its `out`.
    detail: u32,
    /// Rounds that were timed.
    rounds: u32,
    nanoseconds: u32,
}

const STEPS: [&str; 6] = [
    "ask for the API version",
    "create a VM",
    "give the VM memory",
    "create a virtual CPU",
    "map the virtual CPU",
    "run the virtual CPU",
];
const STEP_RUN: u32 = 5;
const DONE: u32 = 100;
/// Marks a `detail` that is an exit reason and not an errno.
const EXIT_REASON: u32 = 1 << 16;

/// Opens `/dev/kvm` and times a guest loop. Takes a few to 50 milliseconds, blocks, never hangs; callers keep the answer.
pub fn probe() -> KvmProbe {
    probe_device(Path::new("/dev/kvm"))
}

fn probe_device(path: &Path) -> KvmProbe {
    let mut found = KvmProbe {
        present: true,
        permitted: false,
        native: false,
        loops_per_s: 0.0,
        explanation: String::new(),
    };
    let device = match rustix::fs::open(
        path,
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        0.into(),
    ) {
        Ok(device) => device,
        Err(error) => {
            found.present = path.exists();
            let error = io::Error::from(error);
            found.explanation = format!("cannot open {}: {error}", path.display());
            return found;
        }
    };
    found.permitted = true;
    match run_in_child(&device) {
        Ok(Some(report)) if report.step == DONE => {
            let seconds = f64::from(report.nanoseconds.max(1)) / 1e9;
            found.loops_per_s = f64::from(report.rounds) * f64::from(TURNS_PER_ROUND) / seconds;
            found.native = found.loops_per_s >= NATIVE_LOOPS_PER_S;
            let rate = found.loops_per_s / 1e6;
            found.explanation = if found.native {
                format!(
                    "{} runs guests on the processor ({rate:.0} million loops a second)",
                    path.display()
                )
            } else {
                format!(
                    "{} interprets guest kernels ({rate:.1} million loops a second, a real KVM makes over 100); \
                     it counts as absent",
                    path.display()
                )
            };
        }
        Ok(Some(report)) => {
            let step = STEPS.get(report.step as usize).copied().unwrap_or("run");
            found.explanation = if report.detail & EXIT_REASON != 0 {
                format!(
                    "{} stops guests with exit reason {}",
                    path.display(),
                    report.detail & !EXIT_REASON
                )
            } else {
                let error = io::Error::from_raw_os_error(report.detail.cast_signed());
                format!("{} cannot {step}: {error}", path.display())
            };
        }
        Ok(None) => {
            found.explanation = format!(
                "{} did not bring a guest through a short loop in {GIVE_UP:?}",
                path.display()
            );
        }
        Err(error) => found.explanation = format!("cannot try {}: {error}", path.display()),
    }
    found
}

/// Runs the guest in a child; `None` when it said nothing in time and was killed.
fn run_in_child(device: &OwnedFd) -> io::Result<Option<Report>> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: the child runs `run_guest` and leaves; that function makes system calls only, and neither allocates
    // nor locks, as is required after a fork of a process with threads.
    let pid = unsafe {
        let pid = libc::fork();
        if pid == 0 {
            let report = run_guest(device.as_raw_fd());
            libc::write(
                writer.as_raw_fd(),
                (&raw const report).cast(),
                size_of::<Report>(),
            );
            libc::_exit(0);
        }
        pid
    };
    drop(writer);
    let pid = Pid::from_raw(pid)
        .filter(|_| pid > 0)
        .ok_or_else(io::Error::last_os_error)?;
    let report = read_report(&reader);
    // Its child never outlives the probe, nor does it stay a zombie.
    rustix::process::kill_process(pid, Signal::KILL)?;
    rustix::process::waitpid(Some(pid), WaitOptions::empty())?;
    report
}

fn read_report(reader: &OwnedFd) -> io::Result<Option<Report>> {
    let mut fds = [PollFd::from_borrowed_fd(reader.as_fd(), PollFlags::IN)];
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(GIVE_UP.subsec_nanos()),
    };
    let ready = loop {
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut bytes = [0; size_of::<Report>()];
    // The report is smaller than PIPE_BUF, so it comes whole or not at all.
    if ready == 0 || rustix::io::read(reader, &mut bytes)? != bytes.len() {
        return Ok(None);
    }
    let word =
        |n: usize| u32::from_ne_bytes([bytes[4 * n], bytes[4 * n + 1], bytes[4 * n + 2], bytes[4 * n + 3]]);
    Ok(Some(Report {
        step: word(0),
        detail: word(1),
        rounds: word(2),
        nanoseconds: word(3),
    }))
}

/// The code in the picture above.
fn loop_code() -> [u8; 16] {
    let [a, b, c, d] = TURNS_PER_ROUND.to_le_bytes();
    [
        0x66, 0xb9, a, b, c, d, 0x66, 0x49, 0x75, 0xfc, 0xe6, 0x80, 0xeb, 0xf2, 0xf4, 0xf4,
    ]
}

/// Makes a VM and times rounds of its loop.
///
/// # Safety
/// Changes nothing but file descriptors and mappings of the calling process, which must be a child made for it: they
/// are not given back.
unsafe fn run_guest(device: RawFd) -> Report {
    // SAFETY: the ioctls get the arguments that the KVM API names for them; both mappings are checked before they
    // are touched, and the offsets lie inside them.
    unsafe {
        let errno = || (*libc::__errno_location()).cast_unsigned();
        let failed = |step| Report {
            step,
            detail: errno(),
            ..Report::default()
        };
        if libc::ioctl(device, KVM_GET_API_VERSION, 0) != KVM_API_VERSION {
            return failed(0);
        }
        let vm = libc::ioctl(device, KVM_CREATE_VM, 0);
        if vm < 0 {
            return failed(1);
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let memory = libc::mmap(std::ptr::null_mut(), PAGE, protection, private, -1, 0);
        if memory == libc::MAP_FAILED {
            return failed(2);
        }
        let code = loop_code();
        std::ptr::copy_nonoverlapping(
            code.as_ptr(),
            memory.cast::<u8>().add(PAGE - code.len()),
            code.len(),
        );
        let region = MemoryRegion {
            slot: 0,
            flags: 0,
            guest_address: 0xffff_f000,
            size: PAGE as u64,
            host_address: memory as u64,
        };
        if libc::ioctl(vm, KVM_SET_USER_MEMORY_REGION, &raw const region) < 0 {
            return failed(2);
        }
        let vcpu = libc::ioctl(vm, KVM_CREATE_VCPU, 0);
        if vcpu < 0 {
            return failed(3);
        }
        let size = libc::ioctl(device, KVM_GET_VCPU_MMAP_SIZE, 0);
        let size = usize::try_from(size).unwrap_or(0).max(PAGE);
        let run = libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, vcpu, 0);
        if run == libc::MAP_FAILED {
            return failed(4);
        }
        let exit_reason = run.cast::<u8>().add(EXIT_REASON_OFFSET).cast::<u32>();
        let start = monotonic_nanoseconds();
        // The first round also pays for page faults; it counts only where it is all there is.
        let mut timed_from = start;
        let mut rounds = 0;
        loop {
            if libc::ioctl(vcpu, KVM_RUN, 0) < 0 {
                return failed(STEP_RUN);
            }
            let reason = exit_reason.read_volatile();
            if reason != KVM_EXIT_IO {
                return Report {
                    step: STEP_RUN,
                    detail: EXIT_REASON | reason,
                    ..Report::default()
                };
            }
            rounds += 1;
            let now = monotonic_nanoseconds();
            if rounds > 1 && (rounds > MAX_ROUNDS || u128::from(now - start) >= ENOUGH.as_nanos()) {
                let nanoseconds = u32::try_from(now - timed_from).unwrap_or(u32::MAX);
                return Report {
                    step: DONE,
                    detail: 0,
                    rounds: rounds - 1,
                    nanoseconds,
                };
            }
            if rounds == 1 {
                timed_from = now;
            }
        }
    }
}

fn monotonic_nanoseconds() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a timespec of ours. This clock exists on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_loop_jumps_where_the_picture_says() {
        let code = loop_code();
        // A relative jump counts from the byte after it.
        let target = |at: usize| (at + 2).wrapping_add_signed(isize::from(code[at + 1].cast_signed()));
        assert_eq!((code[8], target(8)), (0x75, 6));
        assert_eq!((code[12], target(12)), (0xeb, 0));
        assert_eq!(
            u32::from_le_bytes([code[2], code[3], code[4], code[5]]),
            TURNS_PER_ROUND
        );
    }

    #[test]
    fn what_is_not_kvm_is_called_so() {
        let absent = probe_device(Path::new("/dev/no-such-kvm"));
        assert_eq!(
            (absent.present, absent.permitted, absent.native),
            (false, false, false)
        );
        assert!(
            absent.explanation.contains("No such file"),
            "{}",
            absent.explanation
        );
        let null = probe_device(Path::new("/dev/null"));
        assert_eq!((null.present, null.permitted, null.native), (true, true, false));
        assert!(
            null.explanation.contains("cannot ask for the API version"),
            "{}",
            null.explanation
        );
    }

    #[test]
    fn the_probe_is_bounded_and_judges_by_the_rate() {
        let start = Instant::now();
        let found = probe();
        let took = start.elapsed();
        assert!(took < GIVE_UP + Duration::from_secs(1), "{took:?}");
        assert_eq!(found.native, found.loops_per_s >= NATIVE_LOOPS_PER_S);
        assert!(!found.explanation.is_empty());
        if found.loops_per_s == 0.0 {
            #[expect(clippy::print_stderr, reason = "a skipped test says so")]
            {
                eprintln!("SKIPPED in part: {}", found.explanation);
            }
        }
    }
}
