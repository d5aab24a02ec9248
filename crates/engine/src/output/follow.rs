//! Reading an output log while it is written.

use std::fs::File;
use std::io::{self, BufReader, Seek as _, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::watch;

use super::record::Record;
use super::{End, Shared, rotated};

/// What a reader wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// All that the current file holds and everything after it; holds rotation up.
    Everything,
    /// Only what comes from now on; holds rotation up.
    FromEnd,
    /// What is still kept, older file included; may miss something when it is slower than the writer.
    Kept,
}

/// One reader. Dropping it lets go of the files.
pub struct Follower {
    shared: Arc<Shared>,
    end: watch::Receiver<End>,
    pinned: bool,
    /// The older file, read first.
    older: Option<BufReader<File>>,
    current: Option<(u64, BufReader<File>)>,
    /// Bytes of the current file that are read.
    position: u64,
}

impl Follower {
    pub(super) fn new(shared: Arc<Shared>, what: Follow) -> Self {
        let pinned = what != Follow::Kept;
        if pinned {
            shared.pinned.fetch_add(1, Ordering::AcqRel);
        }
        let end = shared.end.subscribe();
        let older = (what == Follow::Kept)
            .then(|| File::open(rotated(&shared.path)).ok())
            .flatten()
            .map(|file| BufReader::with_capacity(256 << 10, file));
        let position = if what == Follow::FromEnd {
            end.borrow().length
        } else {
            0
        };
        Self {
            shared,
            end,
            pinned,
            older,
            current: None,
            position,
        }
    }

    /// The next record that is there already.
    pub fn try_next(&mut self) -> io::Result<Option<Record>> {
        if let Some(older) = &mut self.older {
            if let Some(record) = Record::read(older)? {
                return Ok(Some(record));
            }
            self.older = None;
        }
        let end = *self.end.borrow_and_update();
        if let Some((generation, reader)) = &mut self.current
            && *generation != end.generation
        {
            // The file was rotated away; what we have open still holds its rest.
            if let Some(record) = Record::read(reader)? {
                return Ok(Some(record));
            }
            self.current = None;
            self.position = 0;
        }
        if self.position >= end.length {
            return Ok(None);
        }
        let (_, reader) = match &mut self.current {
            Some(current) => current,
            slot => {
                let mut file = File::open(&self.shared.path)?;
                file.seek(SeekFrom::Start(self.position))?;
                slot.insert((end.generation, BufReader::with_capacity(256 << 10, file)))
            }
        };
        let record = Record::read(reader)?;
        self.position += record.as_ref().map_or(0, Record::encoded_length);
        Ok(record)
    }

    /// The next record, waiting for it. Dropping the future loses nothing.
    pub async fn next(&mut self) -> io::Result<Record> {
        loop {
            if let Some(record) = self.try_next()? {
                return Ok(record);
            }
            // The sender lives in `shared`, which we hold.
            if self.end.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if self.pinned {
            self.shared.pinned.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
