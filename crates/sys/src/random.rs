//! Random bytes from the kernel (`getrandom(2)`): for ids, keys and temporary names.

use std::io;

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Fills `buffer` with random bytes, waiting for the kernel's pool early at boot.
pub fn fill(buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match getrandom(&mut buffer[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Gives `N` random bytes.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_draws_differ_and_long_ones_are_filled() {
        assert_ne!(bytes::<16>().unwrap(), bytes::<16>().unwrap());
        let mut long = vec![0; 100_000];
        fill(&mut long).unwrap();
        assert!(long.rchunks(64).next().unwrap().iter().any(|byte| *byte != 0));
    }
}
