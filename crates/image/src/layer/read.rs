//! Reading one layer: its entries, and its content into a sink.

use std::fs::File;
use std::io::{self, Read};
use std::sync::mpsc::sync_channel;
use std::thread;

use offshoot_model::{ByteSize, Digest};

use super::entry::{Asked, Change, LayerEntries, LayerEntry, NewNode, interpret};
use super::error::{LayerError, shown};
use super::stream::{QUEUE, Stream, StreamError, decompress, hash};
use super::tarball::{TarError, TarReader};
use crate::manifest::StoredLayer;

/// Where a sink put a file's content, in the sink's own numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extent(pub u64);

/// Takes the content of files as layers are read.
pub trait ContentSink {
    /// Keeps `size` bytes, all of which `content` gives; gives where they are.
    ///
    /// Called once for every regular file of every layer, in the order of the layers and their entries, also for files
    /// that a later entry removes. After an error nothing more is called, and what was kept is of no use.
    fn file(&mut self, size: u64, content: &mut dyn Read) -> io::Result<Extent>;
}

/// How much an image may unpack to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most entries in all layers.
    pub entries: u64,
    /// The most bytes in all layers, holes included.
    pub bytes: ByteSize,
}

impl Default for Limits {
    /// Two million entries (the largest distribution images have half a million; the tree then takes about half a GiB)
    /// and 64 GiB (images for machine learning come to 30).
    fn default() -> Self {
        Self {
            entries: 2_000_000,
            bytes: ByteSize::from_mib(64 << 10),
        }
    }
}

/// What is left of the limits after some layers.
#[derive(Clone, Debug)]
pub struct Budget {
    limits: Limits,
    entries: u64,
    bytes: u64,
    stream: u64,
}

impl Budget {
    /// All of it.
    pub fn new(limits: Limits) -> Self {
        // Headers and padding come on top of content: within 2 KiB for an entry with a long name. Checked apart, so that a
        // small blob cannot expand without end in what is no file's content.
        let stream = limits
            .bytes
            .bytes()
            .saturating_add(limits.entries.saturating_mul(2048));
        Self {
            limits,
            entries: limits.entries,
            bytes: limits.bytes.bytes(),
            stream,
        }
    }
}

/// How a caller follows and stops the reading. Both are called often and must return at once.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Whether to stop.
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
    /// How many bytes of the blob were read; called from another thread, every MiB and at the end.
    pub moved: &'a (dyn Fn(u64) + Sync),
}

/// A layer and its open blob.
#[derive(Debug)]
pub struct LayerSource<'a> {
    /// What the image says about it.
    pub layer: &'a StoredLayer,
    /// The blob, at its start.
    pub blob: File,
}

/// Reads one layer: content goes to `sink`, all else into the result.
///
/// Decompression and hashing run on threads of their own, which are gone when this returns. What the layer unpacks to is
/// compared with its diff id, so a layer whose blob was damaged after it was stored is an error.
pub fn read_layer(
    source: LayerSource<'_>,
    budget: &mut Budget,
    sink: &mut dyn ContentSink,
    watch: Watch<'_>,
) -> Result<LayerEntries, LayerError> {
    let LayerSource {
        layer:
            StoredLayer {
                digest: layer,
                diff_id,
                compression,
                ..
            },
        blob,
    } = source;
    let (layer, compression) = (*layer, *compression);
    let (entries, found) = thread::scope(|scope| {
        let (chunks, to_parse) = sync_channel(QUEUE);
        let (hash_chunks, to_hash) = sync_channel(QUEUE);
        let hasher = scope.spawn(move || hash(&to_hash));
        scope.spawn(move || {
            decompress(
                Counted {
                    blob,
                    read: 0,
                    told: 0,
                    moved: watch.moved,
                },
                compression,
                &chunks,
                &hash_chunks,
            );
        });
        let stream = Stream::new(to_parse, budget.stream, watch.cancelled);
        let entries = read_entries(layer, TarReader::new(stream), budget, sink);
        // By now the stream is read to its end or dropped, so both threads come to an end.
        let found = hasher
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (entries, found)
    });
    let entries = entries?;
    if found != *diff_id {
        return Err(LayerError::DiffId {
            layer,
            expected: *diff_id,
            found,
        });
    }
    Ok(entries)
}

fn read_entries(
    layer: Digest,
    mut tar: TarReader<'_>,
    budget: &mut Budget,
    sink: &mut dyn ContentSink,
) -> Result<LayerEntries, LayerError> {
    let limits = budget.limits;
    let failed = |error: TarError| match error {
        TarError::Stream(StreamError::Read(source)) => LayerError::Read { layer, source },
        TarError::Stream(StreamError::TooManyBytes) => LayerError::TooManyBytes {
            layer,
            limit: limits.bytes,
        },
        TarError::Stream(StreamError::Cancelled) => LayerError::Cancelled { layer },
        TarError::Bad { offset, problem } => LayerError::Tar {
            layer,
            offset,
            source: problem,
        },
    };
    let mut entries = Vec::new();
    while let Some(header) = tar.next().map_err(failed)? {
        let entries_left = budget.entries.checked_sub(1);
        budget.entries = entries_left.ok_or(LayerError::TooManyEntries {
            layer,
            limit: limits.entries,
        })?;
        let asked = interpret(&header).map_err(|problem| LayerError::entry(layer, &header.path, problem))?;
        match asked {
            Asked::Nothing => {}
            Asked::Entry(entry) => entries.push(entry),
            Asked::File { path, metadata } => {
                let bytes_left = budget.bytes.checked_sub(header.size);
                budget.bytes = bytes_left.ok_or(LayerError::TooManyBytes {
                    layer,
                    limit: limits.bytes,
                })?;
                let stored = sink.file(header.size, &mut tar.content(&header));
                let extent = stored.map_err(|source| match tar.take_failure() {
                    Some(failure) => failed(failure),
                    None => LayerError::Store {
                        layer,
                        entry: shown(&header.path),
                        source,
                    },
                })?;
                let node = NewNode::File {
                    size: header.size,
                    extent,
                };
                entries.push(LayerEntry {
                    path,
                    change: Change::Put { metadata, node },
                });
            }
        }
    }
    tar.drain().map_err(failed)?;
    budget.stream = budget.stream.saturating_sub(tar.position());
    Ok(LayerEntries { layer, entries })
}

/// The blob, with word of how far it is read.
struct Counted<'a> {
    blob: File,
    read: u64,
    told: u64,
    moved: &'a (dyn Fn(u64) + Sync),
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        /// How often word is given.
        const STEP: u64 = 1 << 20;
        let count = self.blob.read(buffer)?;
        self.read += count as u64;
        if self.read >= self.told + STEP || (count == 0 && self.read > self.told) {
            self.told = self.read;
            (self.moved)(self.read);
        }
        Ok(count)
    }
}
