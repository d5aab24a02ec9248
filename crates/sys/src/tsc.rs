//! How fast this processor's time-stamp counter runs.
//!
//! An emulated guest reads the host's counter and has nothing on a `microvm` to measure it against: without being told
//! the rate, its kernel tries against a timer that a busy host delays, gives up, and often hangs.

use std::time::{Duration, Instant};

/// Long enough that an interrupt of some microseconds in it means less than one part in ten thousand, which Linux
/// itself takes for well calibrated.
const SAMPLE: Duration = Duration::from_millis(20);

/// Thousands of counts a second, measured for some 20 ms; `None` where there is no such counter. Blocks the thread.
pub fn khz() -> Option<u64> {
    let (counts, nanos) = sample()?;
    u64::try_from(u128::from(counts) * 1_000_000 / nanos).ok()
}

#[cfg(target_arch = "x86_64")]
fn sample() -> Option<(u64, u128)> {
    let began = Instant::now();
    let first = counter();
    while began.elapsed() < SAMPLE {
        std::hint::spin_loop();
    }
    let last = counter();
    let nanos = began.elapsed().as_nanos();
    Some((last.checked_sub(first)?, nanos))
}

#[cfg(target_arch = "x86_64")]
fn counter() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC; a kernel that forbids it to user space (PR_SET_TSC) is not one that we
    // run under, because QEMU's emulator uses it too.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn sample() -> Option<(u64, u128)> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn two_measurements_agree() {
        let (one, two) = (khz().unwrap(), khz().unwrap());
        assert!((100_000..20_000_000).contains(&one), "{one}");
        assert!(one.abs_diff(two) < one / 100, "{one} {two}");
    }
}
