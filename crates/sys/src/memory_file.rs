//! Memory files: memfd_create(2) with seals, and their sparse copies on disk.
//!
//! A sealed one can be handed to anybody: whoever has it open maps it privately or reads it, and nobody can write, grow or
//! shrink it any more, whatever the descriptor's mode says.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{
    MemfdFlags, SealFlags, SeekFrom, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create, seek,
};
use rustix::io::Errno;

/// What is read, hashed and written at once: a page of the memory that guests and hosts have in common.
pub const PAGE: usize = 4096;

/// How much is read at once.
const CHUNK: usize = 64 * PAGE;

/// Makes an empty memory file of so many bytes; `name` is what `/proc` shows of it. It takes memory as it is written.
pub fn create(name: &str, size: u64) -> io::Result<File> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, size)?;
    Ok(fd.into())
}

/// Makes a memory file unchangeable for everybody and for good. Fails with `EBUSY` while somebody has it mapped to write.
pub fn seal(file: impl AsFd) -> io::Result<()> {
    let all = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    Ok(fcntl_add_seals(file, all)?)
}

/// Whether it is sealed so.
pub fn is_sealed(file: impl AsFd) -> io::Result<bool> {
    let all = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK;
    Ok(fcntl_get_seals(file)?.contains(all))
}

/// Calls `page` with the offset and bytes of each page of a file that is not all zeros, in order. Holes are not read.
/// The file's length must be whole pages.
pub fn for_each_page(file: &File, mut page: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let length = file.metadata()?.len();
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < length {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start - start % PAGE as u64,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start.max(at)))?.min(length);
        let end = end.next_multiple_of(PAGE as u64).min(length);
        let mut from = start;
        while from < end {
            let wanted = usize::try_from(end - from).map_or(CHUNK, |rest| rest.min(CHUNK));
            file.read_exact_at(&mut buffer[..wanted], from)?;
            for (n, bytes) in buffer[..wanted].chunks(PAGE).enumerate() {
                if !is_zero(bytes) {
                    page(from + (n * PAGE) as u64, bytes)?;
                }
            }
            from += wanted as u64;
        }
        at = end;
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    // Sixteen at a time: this is asked of every page that is read.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_sealed_file_takes_nothing_more() {
        let mut file = create("test", 8192).unwrap();
        file.write_all(b"words").unwrap();
        assert!(!is_sealed(&file).unwrap());
        seal(&file).unwrap();
        assert!(is_sealed(&file).unwrap());
        file.write_all(b"more").unwrap_err();
        file.set_len(100).unwrap_err();
        file.set_len(1 << 20).unwrap_err();
        // Whoever opens it anew cannot either.
        use std::os::fd::AsRawFd as _;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        if let Ok(again) = File::options().write(true).open(path) {
            again.write_at(b"more", 0).unwrap_err();
        }
        let mut word = [0; 5];
        file.read_exact_at(&mut word, 0).unwrap();
        assert_eq!(&word, b"words");
    }

    #[test]
    fn pages_with_something_in_them_come_in_order() {
        let file = create("test", 1 << 20).unwrap();
        file.write_at(&[0; 3 * PAGE], 0).unwrap();
        for at in [70 * PAGE + 5, PAGE, 255 * PAGE + PAGE - 1] {
            file.write_at(&[7], at as u64).unwrap();
        }
        let mut seen = Vec::new();
        for_each_page(&file, |at, bytes| {
            assert_eq!(bytes.len(), PAGE);
            assert_eq!(bytes.iter().filter(|byte| **byte == 7).count(), 1);
            seen.push(usize::try_from(at).unwrap() / PAGE);
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [1, 70, 255]);
        let empty = create("test", 1 << 20).unwrap();
        for_each_page(&empty, |_, _| panic!("nothing is there")).unwrap();
    }
}
