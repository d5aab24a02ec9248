//! Frames: making them, and finding them again in a stream that may start anywhere.

use std::ops::Range;

use super::cobs;

/// The most data in one frame: stuffed and delimited it still fits into 32 KiB, which is the most that Linux's
/// virtio-serial driver takes in one write.
pub(super) const MAX_DATA: usize = 32_000;

const KIND: usize = 1;
const SESSION: usize = 8;
const CRC: usize = 4;
/// What a frame has besides data, before stuffing.
const OVERHEAD: usize = KIND + SESSION + CRC;
/// The longest stuffed frame without its delimiter.
const MAX_STUFFED: usize = MAX_DATA + OVERHEAD + (MAX_DATA + OVERHEAD) / 254 + 1;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Hello = 1,
    Ready = 2,
    Data = 3,
    Bye = 4,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Hello, Self::Ready, Self::Data, Self::Bye]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// Appends one frame to `out`; the data is the concatenation of `pieces`, at most [`MAX_DATA`] bytes.
pub(super) fn append<'a>(
    out: &mut Vec<u8>,
    kind: Kind,
    session: u64,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) {
    let mut crc = crc32fast::Hasher::new();
    let mut encoder = cobs::Encoder::new(out);
    let mut push = |piece: &[u8]| {
        crc.update(piece);
        encoder.push(piece);
    };
    push(&[kind as u8]);
    push(&session.to_le_bytes());
    pieces.into_iter().for_each(push);
    encoder.push(&crc.finalize().to_le_bytes());
    encoder.finish();
}

/// What was found in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A whole frame; `data` lies in the deframer's buffer until the next call.
    Frame {
        kind: Kind,
        session: u64,
        data: Range<usize>,
    },
    /// Bytes up to a delimiter that are no frame.
    Damaged,
}

/// Finds frames in a byte stream. Its memory is fixed.
pub(super) struct Deframer {
    buffer: Box<[u8]>,
    /// Unread bytes.
    head: usize,
    tail: usize,
    /// Bytes before this one hold no delimiter.
    searched: usize,
    /// A frame was too long: everything up to the next delimiter is dropped.
    skipping: bool,
}

impl Deframer {
    /// Twice the longest frame, so that a frame is moved at most once.
    const BUFFER: usize = 64 << 10;

    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; Self::BUFFER].into_boxed_slice(),
            head: 0,
            tail: 0,
            searched: 0,
            skipping: false,
        }
    }

    /// Room for bytes from the stream, never empty after [`Deframer::next`] has answered nothing. Moves what is
    /// unread, so data ranges end here.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.head == self.tail {
            (self.head, self.tail, self.searched) = (0, 0, 0);
        } else if self.tail == self.buffer.len() {
            self.buffer.copy_within(self.head..self.tail, 0);
            self.tail -= self.head;
            self.searched -= self.head;
            self.head = 0;
        }
        &mut self.buffer[self.tail..]
    }

    /// Says that so many bytes of the room were filled.
    pub(super) fn filled(&mut self, count: usize) {
        self.tail = (self.tail + count).min(self.buffer.len());
    }

    /// The bytes of a range that [`Deframer::next`] gave.
    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.buffer[range]
    }

    /// The next thing in what was read so far.
    pub(super) fn next(&mut self) -> Option<Found> {
        loop {
            let Some(length) = memchr::memchr(0, &self.buffer[self.searched..self.tail]) else {
                self.searched = self.tail;
                if self.tail - self.head > MAX_STUFFED {
                    self.skipping = true;
                }
                if self.skipping {
                    self.head = self.tail;
                }
                return None;
            };
            let end = self.searched + length;
            let start = std::mem::replace(&mut self.head, end + 1);
            self.searched = self.head;
            if std::mem::take(&mut self.skipping) {
                return Some(Found::Damaged);
            }
            if start == end {
                // A delimiter by itself: both sides send one before they start over.
                continue;
            }
            return Some(self.parse(start..end).unwrap_or(Found::Damaged));
        }
    }

    fn parse(&mut self, range: Range<usize>) -> Option<Found> {
        let start = range.start;
        if range.len() > MAX_STUFFED {
            return None;
        }
        let length = cobs::decode_in_place(&mut self.buffer[range])?;
        let payload = &self.buffer[start..start + length];
        let (content, crc) = payload.split_last_chunk::<CRC>()?;
        if crc32fast::hash(content) != u32::from_le_bytes(*crc) {
            return None;
        }
        let (kind, rest) = content.split_first()?;
        let (session, data) = rest.split_first_chunk::<SESSION>()?;
        let data_start = start + KIND + SESSION;
        Some(Found::Frame {
            kind: Kind::from_byte(*kind)?,
            session: u64::from_le_bytes(*session),
            data: data_start..data_start + data.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn feed(deframer: &mut Deframer, mut bytes: &[u8]) -> Vec<(Kind, u64, Vec<u8>)> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let room = deframer.room();
            let count = room.len().min(bytes.len());
            assert!(count > 0, "no room");
            room[..count].copy_from_slice(&bytes[..count]);
            deframer.filled(count);
            bytes = &bytes[count..];
            while let Some(found) = deframer.next() {
                if let Found::Frame { kind, session, data } = found {
                    frames.push((kind, session, deframer.bytes(data).to_vec()));
                }
            }
        }
        frames
    }

    #[test]
    fn the_largest_frame_fits_into_one_write_and_into_the_buffer() {
        let mut out = Vec::new();
        let data: Vec<u8> = (0..MAX_DATA).map(|n| (n % 255) as u8 + 1).collect();
        append(&mut out, Kind::Data, u64::MAX, [&data[..]]);
        assert!(out.len() <= 32 << 10, "{}", out.len());
        assert!(out.len() - 1 <= MAX_STUFFED);
        let frames = feed(&mut Deframer::new(), &[&out[..], &out, &out, &out, &out].concat());
        assert_eq!(frames.len(), 5);
        assert!(frames.iter().all(|frame| frame.2 == data));
    }

    #[test]
    fn a_flipped_bit_is_seen() {
        let mut good = Vec::new();
        append(&mut good, Kind::Data, 5, [&b"some data"[..]]);
        for at in 0..good.len() - 1 {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert_eq!(feed(&mut Deframer::new(), &bad), [], "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn a_frame_without_end_is_dropped_and_the_next_one_read() {
        let mut deframer = Deframer::new();
        assert_eq!(feed(&mut deframer, &vec![9; 1 << 20]), []);
        let mut next = vec![0];
        append(&mut next, Kind::Bye, 3, []);
        assert_eq!(feed(&mut deframer, &next), [(Kind::Bye, 3, Vec::new())]);
    }

    proptest! {
        #[test]
        fn noise_never_panics_and_a_delimiter_ends_it(noise in proptest::collection::vec(prop_oneof![3 => any::<u8>(), 1 => Just(0_u8)], 0..5000)) {
            let mut deframer = Deframer::new();
            feed(&mut deframer, &noise);
            let mut bytes = vec![0];
            append(&mut bytes, Kind::Hello, 77, [&[1_u8][..]]);
            prop_assert_eq!(feed(&mut deframer, &bytes).pop(), Some((Kind::Hello, 77, vec![1])));
            prop_assert_eq!(deframer.buffer.len(), Deframer::BUFFER);
        }
    }
}
