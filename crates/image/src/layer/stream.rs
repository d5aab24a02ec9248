//! The bytes of a layer, decompressed on one thread, hashed on another, and read here.

use std::io::{self, BufReader, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use flate2::bufread::MultiGzDecoder;
use offshoot_model::Digest;
use sha2::{Digest as _, Sha256};

use crate::manifest::Compression;

/// How much is handed from thread to thread at once: it stays in a core's cache, and hand-overs are rare.
pub(super) const CHUNK: usize = 256 << 10;
/// How many chunks may wait: enough to ride out a slow write, and little memory.
pub(super) const QUEUE: usize = 8;

/// Bytes that several threads read.
pub(super) type Chunk = Arc<Vec<u8>>;

/// Why there are no more bytes though there should be.
#[derive(Debug)]
pub(super) enum StreamError {
    Read(io::Error),
    TooManyBytes,
    Cancelled,
}

/// Reads `blob` to its end and hands what comes out to both receivers. Ends early when nobody reads any more.
pub(super) fn decompress(
    blob: impl Read,
    compression: Compression,
    chunks: &SyncSender<io::Result<Chunk>>,
    to_hash: &SyncSender<Chunk>,
) {
    let mut reader: Box<dyn Read + '_> = match compression {
        Compression::None => Box::new(blob),
        Compression::Gzip => Box::new(MultiGzDecoder::new(BufReader::with_capacity(CHUNK, blob))),
        Compression::Zstd => match zstd::stream::read::Decoder::new(blob) {
            Ok(decoder) => Box::new(decoder),
            Err(error) => {
                let _ = chunks.send(Err(error));
                return;
            }
        },
    };
    let mut pool: Vec<Chunk> = Vec::new();
    loop {
        let mut chunk = take_free(&mut pool);
        let buffer = Arc::get_mut(&mut chunk).unwrap_or_else(|| unreachable!("a free chunk has one owner"));
        buffer.resize(CHUNK, 0);
        let filled = match fill(&mut reader, buffer) {
            Ok(filled) => filled,
            Err(error) => {
                // The receiver may have stopped with an error of its own; then nobody needs to know.
                let _ = chunks.send(Err(error));
                return;
            }
        };
        buffer.truncate(filled);
        if to_hash.send(chunk.clone()).is_err() || chunks.send(Ok(chunk.clone())).is_err() || filled < CHUNK {
            return;
        }
        pool.push(chunk);
    }
}

/// A chunk that nobody reads any more, or a new one.
fn take_free(pool: &mut Vec<Chunk>) -> Chunk {
    match pool.iter().position(|chunk| Arc::strong_count(chunk) == 1) {
        Some(at) => pool.swap_remove(at),
        None => Arc::new(Vec::with_capacity(CHUNK)),
    }
}

fn fill(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The digest of all chunks.
pub(super) fn hash(chunks: &Receiver<Chunk>) -> Digest {
    let mut hasher = Sha256::new();
    while let Ok(chunk) = chunks.recv() {
        hasher.update(chunk.as_slice());
    }
    Digest::from_bytes(hasher.finalize().into())
}

/// The receiving end: bytes in order, at most so many, and where they stand.
pub(super) struct Stream<'a> {
    chunks: Receiver<io::Result<Chunk>>,
    current: Option<Chunk>,
    at: usize,
    position: u64,
    limit: u64,
    ended: bool,
    cancelled: &'a dyn Fn() -> bool,
}

impl<'a> Stream<'a> {
    /// Reads what comes from `chunks`, at most `limit` bytes.
    pub(super) fn new(
        chunks: Receiver<io::Result<Chunk>>,
        limit: u64,
        cancelled: &'a dyn Fn() -> bool,
    ) -> Self {
        Self {
            chunks,
            current: None,
            at: 0,
            position: 0,
            limit,
            ended: false,
            cancelled,
        }
    }

    /// How many bytes were read.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// The bytes that are at hand; empty at the end.
    fn available(&mut self) -> Result<&[u8], StreamError> {
        while !self.ended && self.current.as_ref().is_none_or(|chunk| self.at == chunk.len()) {
            if (self.cancelled)() {
                return Err(StreamError::Cancelled);
            }
            self.current = None;
            self.at = 0;
            match self.chunks.recv() {
                // A short chunk is the last one.
                Ok(Ok(chunk)) if chunk.is_empty() => self.ended = true,
                Ok(Ok(chunk)) => {
                    if self.position + chunk.len() as u64 > self.limit {
                        return Err(StreamError::TooManyBytes);
                    }
                    self.current = Some(chunk);
                }
                Ok(Err(error)) => return Err(StreamError::Read(error)),
                Err(_) => self.ended = true,
            }
        }
        Ok(self.current.as_ref().map_or(&[], |chunk| &chunk[self.at..]))
    }

    fn consume(&mut self, count: usize) {
        self.at += count;
        self.position += count as u64;
    }

    /// Reads up to `buffer.len()` bytes; 0 at the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        let available = self.available()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }

    /// Fills `buffer`; gives how much of it, which is less only at the end.
    pub(super) fn read_full(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }

    /// Passes over `count` bytes; gives whether there were so many.
    pub(super) fn skip(&mut self, mut count: u64) -> Result<bool, StreamError> {
        while count > 0 {
            let here = self.available()?.len();
            if here == 0 {
                return Ok(false);
            }
            let step = usize::try_from(count).map_or(here, |count| count.min(here));
            self.consume(step);
            count -= step as u64;
        }
        Ok(true)
    }
}
