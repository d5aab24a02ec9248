//! The records of an output log.
//!
//! ```text
//! [kind u8][time u64 ms][offset u64][length u32][data]      little-endian
//! ```

use std::io::{self, BufReader, Read, SeekFrom};

use bytes::{BufMut as _, Bytes, BytesMut};

/// Bytes before the data.
pub(super) const HEADER: usize = 21;
/// The most data in one record; the agent sends at most 64 KiB at a time.
pub const MAX_DATA: usize = 64 << 10;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// A run begins here.
    Begin,
    /// Standard output (everything, with a terminal).
    Stdout,
    /// Standard error.
    Stderr,
    /// Output that nobody collected in time: `data` is its length in decimal.
    Lost,
}

impl RecordKind {
    fn to_byte(self) -> u8 {
        match self {
            Self::Begin => 0,
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::Lost => 3,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Begin,
            1 => Self::Stdout,
            2 => Self::Stderr,
            3 => Self::Lost,
            _ => return None,
        })
    }
}

/// One piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: RecordKind,
    /// When the host got it, milliseconds since the epoch.
    pub time_ms: u64,
    /// Position of its first byte in the run's output.
    pub offset: u64,
    /// The bytes, at most [`MAX_DATA`].
    pub data: Bytes,
}

impl Record {
    pub(super) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(HEADER + self.data.len());
        bytes.put_u8(self.kind.to_byte());
        bytes.put_u64_le(self.time_ms);
        bytes.put_u64_le(self.offset);
        bytes.put_u32_le(u32::try_from(self.data.len()).unwrap_or(u32::MAX));
        bytes.put_slice(&self.data);
        bytes.freeze()
    }

    /// Position in the run's output after this record, when `before` was the position until now.
    pub(super) fn next_offset(&self, before: u64) -> u64 {
        match self.kind {
            RecordKind::Begin => 0,
            RecordKind::Stdout | RecordKind::Stderr => self.offset + self.data.len() as u64,
            RecordKind::Lost => before.max(self.offset),
        }
    }

    /// Reads the next record; `None` at the end, at a record that is not whole yet, and at anything that is no record.
    pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        if !fill(from, &mut header)? {
            return Ok(None);
        }
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let length = u32::from_le_bytes(std::array::from_fn(|i| header[17 + i])) as usize;
        let Some(kind) = RecordKind::from_byte(header[0]).filter(|_| length <= MAX_DATA) else {
            return Ok(None);
        };
        let mut data = vec![0; length];
        if !fill(from, &mut data)? {
            return Ok(None);
        }
        Ok(Some(Self {
            kind,
            time_ms: number(1),
            offset: number(9),
            data: data.into(),
        }))
    }

    pub(super) fn encoded_length(&self) -> u64 {
        (HEADER + self.data.len()) as u64
    }
}

/// Fills `buffer`; false when the input ends first.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match from.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// What a whole file holds.
pub(super) struct Scanned {
    /// Bytes up to the end of the last whole record.
    pub(super) good_length: u64,
    /// Position in the last run's output after the last record.
    pub(super) next_offset: u64,
}

/// Reads a file through once.
pub(super) fn scan(file: &mut (impl Read + io::Seek)) -> io::Result<Scanned> {
    file.seek(SeekFrom::Start(0))?;
    let mut reader = BufReader::with_capacity(256 << 10, file);
    let mut scanned = Scanned {
        good_length: 0,
        next_offset: 0,
    };
    while let Some(record) = Record::read(&mut reader)? {
        scanned.good_length += record.encoded_length();
        scanned.next_offset = record.next_offset(scanned.next_offset);
    }
    Ok(scanned)
}
