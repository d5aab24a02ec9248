//! Maps of sparse files: which ranges of a file the archive holds; all else is zeros.
//!
//! GNU tar writes four kinds: its own headers (type `S`), and in pax headers the formats 0.0 (a pair of records for each
//! range), 0.1 (one record with all of them) and 1.0 (the map stands before the data). See the GNU tar manual,
//! "Storing Sparse Files".

use super::error::TarProblem;
use super::pax::decimal;

/// The most ranges of one file. A map takes 16 bytes a range in memory; a file more ragged than this is no accident.
pub(super) const MAX_RANGES: usize = 1 << 20;

/// One range of a sparse file that holds data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Checks a map: in order, not overlapping, within the file, and exactly as long as what the archive holds.
pub(super) fn check(mut map: Vec<Range>, size: u64, stored: u64) -> Result<Vec<Range>, TarProblem> {
    let (mut at, mut held) = (0, 0_u64);
    for range in &map {
        let end = range.offset.checked_add(range.len).ok_or(TarProblem::Sparse)?;
        if range.offset < at || end > size {
            return Err(TarProblem::Sparse);
        }
        at = end;
        held += range.len;
    }
    if held != stored {
        return Err(TarProblem::Sparse);
    }
    map.retain(|range| range.len > 0);
    Ok(map)
}

/// The map of format 0.1: `offset,length,offset,length`.
pub(super) fn from_list(list: &[u8]) -> Result<Vec<Range>, TarProblem> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    let mut map = Vec::new();
    let mut numbers = list.split(|byte| *byte == b',');
    while let Some(offset) = numbers.next() {
        let offset = decimal(offset).ok_or(TarProblem::Sparse)?;
        let len = numbers.next().and_then(decimal).ok_or(TarProblem::Sparse)?;
        push(&mut map, Range { offset, len })?;
    }
    Ok(map)
}

/// Adds a range, unless there are too many.
pub(super) fn push(map: &mut Vec<Range>, range: Range) -> Result<(), TarProblem> {
    if map.len() == MAX_RANGES {
        return Err(TarProblem::Sparse);
    }
    map.push(range);
    Ok(())
}

/// Reads the map of format 1.0, fed with the blocks that stand before the data.
///
/// The map is a list of decimal numbers, each ended by a newline: how many ranges, then offset and length of each.
#[derive(Default)]
pub(super) struct MapReader {
    number: Option<u64>,
    count: Option<u64>,
    offset: Option<u64>,
    map: Vec<Range>,
}

impl MapReader {
    /// Takes the next block; gives the map when it is complete. What follows in the block is padding.
    pub(super) fn block(&mut self, block: &[u8]) -> Result<Option<Vec<Range>>, TarProblem> {
        for byte in block {
            if byte.is_ascii_digit() {
                let digit = u64::from(byte - b'0');
                let number = self
                    .number
                    .unwrap_or(0)
                    .checked_mul(10)
                    .and_then(|n| n.checked_add(digit));
                self.number = Some(number.ok_or(TarProblem::Sparse)?);
                continue;
            }
            let number = self
                .number
                .take()
                .filter(|_| *byte == b'\n')
                .ok_or(TarProblem::Sparse)?;
            match (self.count, self.offset.take()) {
                (None, _) => self.count = Some(number),
                (Some(_), None) => self.offset = Some(number),
                (Some(_), Some(offset)) => push(&mut self.map, Range { offset, len: number })?,
            }
            if self.count == Some(self.map.len() as u64) {
                return Ok(Some(std::mem::take(&mut self.map)));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(u64, u64)]) -> Vec<Range> {
        pairs
            .iter()
            .map(|(offset, len)| Range {
                offset: *offset,
                len: *len,
            })
            .collect()
    }

    #[test]
    fn only_an_orderly_map_passes() {
        assert_eq!(
            check(map(&[(0, 3), (5, 0), (10, 2)]), 12, 5),
            Ok(map(&[(0, 3), (10, 2)]))
        );
        for (bad, size, stored) in [
            (&[(0, 3), (2, 3)][..], 9, 6),
            (&[(5, 1), (0, 1)], 9, 2),
            (&[(0, 10)], 9, 10),
            (&[(0, 3)], 9, 4),
            (&[(u64::MAX, 2)], 9, 2),
        ] {
            assert_eq!(check(map(bad), size, stored), Err(TarProblem::Sparse), "{bad:?}");
        }
    }

    #[test]
    fn the_formats_read() {
        assert_eq!(from_list(b"0,3,10,2"), Ok(map(&[(0, 3), (10, 2)])));
        assert_eq!(from_list(b"0,3,10"), Err(TarProblem::Sparse));
        let mut reader = MapReader::default();
        assert_eq!(reader.block(b"2\n0\n3\n1"), Ok(None));
        assert_eq!(reader.block(b"0\n2\n\0\0\0"), Ok(Some(map(&[(0, 3), (10, 2)]))));
        assert_eq!(MapReader::default().block(b"0\n\0"), Ok(Some(Vec::new())));
        for bad in [&b"x"[..], b"\n", b"1\n\n", b"99999999999999999999\n", b"1 2\n"] {
            assert_eq!(
                MapReader::default().block(bad),
                Err(TarProblem::Sparse),
                "{}",
                bad.escape_ascii()
            );
        }
    }
}
