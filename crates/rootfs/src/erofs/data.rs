//! The content of files, written while the layers stream in.
//!
//! Blocks are given out in order, from 1 on: 0 is the superblock's. What is written goes through one buffer, so a hundred
//! thousand small files are a few hundred writes; blocks of zeros are never written. Who wants to read layers in parallel
//! gives each its own run of blocks and keeps the runs in the layers' order, or the same image no longer gives the same
//! bytes.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use offshoot_image::layer::{ContentSink, Extent};
use rustix::fs::{FallocateFlags, fallocate};

use super::format::BLOCK;
use crate::room::{Room, SpaceGuard};

/// How much is gathered before it is written.
const BUFFER: usize = 1 << 20;
/// An EROFS image whose metadata is still to come.
#[derive(Debug)]
pub struct DataWriter {
    pub(super) file: File,
    room: Room,
    /// The next block to give out.
    next: u64,
    /// Blocks that were given out and are not yet written, the first of them, and how much of the buffer is used.
    buffer: Vec<u8>,
    first: u64,
    used: usize,
}

impl DataWriter {
    /// Begins an image at `path`, which must not exist.
    pub fn create(path: &Path, guard: SpaceGuard) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        let room = Room::new(path.parent().unwrap_or(Path::new("/")), guard);
        room.take(0)?;
        Ok(Self {
            file,
            room,
            next: 1,
            buffer: vec![0; BUFFER],
            first: 1,
            used: 0,
        })
    }

    /// The first block after all data.
    pub(super) fn end(&self) -> u64 {
        self.next
    }

    /// Writes what is gathered, but for blocks of zeros: the file has holes there.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let buffer = std::mem::take(&mut self.buffer);
        let written = self.write_blocks(self.first, &buffer[..self.used]);
        self.buffer = buffer;
        self.first += (self.used as u64) / BLOCK;
        self.used = 0;
        written
    }

    /// Writes whole blocks from `first` on, but for those of zeros.
    pub(super) fn write_blocks(&mut self, first: u64, bytes: &[u8]) -> io::Result<()> {
        const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
        let mut blocks = bytes
            .chunks_exact(BLOCK as usize)
            .map(|block| block != ZEROS)
            .enumerate()
            .peekable();
        while let Some((start, full)) = blocks.next() {
            if !full {
                continue;
            }
            let mut end = start + 1;
            while blocks.next_if(|(_, full)| *full).is_some() {
                end += 1;
            }
            let run = &bytes[start * BLOCK as usize..end * BLOCK as usize];
            self.room.take(run.len() as u64)?;
            self.file.write_all_at(run, (first + start as u64) * BLOCK)?;
        }
        Ok(())
    }

    /// Gives back blocks that no file uses.
    pub(super) fn punch(&self, orphans: &[(Extent, u64)]) -> io::Result<()> {
        let mut runs: Vec<(u64, u64)> = orphans
            .iter()
            .map(|(extent, size)| (extent.0, extent.0 + size.div_ceil(BLOCK)))
            .collect();
        runs.sort_unstable();
        let mut runs = runs.into_iter().peekable();
        while let Some((start, mut end)) = runs.next() {
            while let Some((_, next_end)) = runs.next_if(|(next, _)| *next == end) {
                end = next_end;
            }
            let (at, len) = (start * BLOCK, (end - start) * BLOCK);
            fallocate(
                &self.file,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                at,
                len,
            )?;
        }
        Ok(())
    }
}

impl ContentSink for DataWriter {
    fn file(&mut self, size: u64, content: &mut dyn Read) -> io::Result<Extent> {
        let extent = Extent(self.next);
        let end = size
            .div_ceil(BLOCK)
            .checked_add(self.next)
            .filter(|end| *end < u64::from(u32::MAX));
        // Blocks are numbered in 32 bits: 16 TiB.
        let end = end.ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let mut left = size;
        while left > 0 {
            if self.used == self.buffer.len() {
                self.flush()?;
            }
            let room = &mut self.buffer[self.used..];
            let count = usize::try_from(left).map_or(room.len(), |left| left.min(room.len()));
            content.read_exact(&mut room[..count])?;
            self.used += count;
            left -= count as u64;
        }
        let padded = self.used.next_multiple_of(BLOCK as usize);
        self.buffer[self.used..padded].fill(0);
        self.used = padded;
        self.next = end;
        Ok(extent)
    }
}
