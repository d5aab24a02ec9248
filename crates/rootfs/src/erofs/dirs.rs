//! The content of folders: names sorted by bytes, packed into blocks that stand for themselves.
//!
//! ```text
//! block:  entry entry entry … │ name name name … │ zeros
//!         12 bytes each: inode number, where the name starts in the block, file type
//! ```
//!
//! The first entry's name offset tells how many entries a block has; a name ends where the next one starts, the last
//! one at a NUL or the end of the block. A folder's size counts whole blocks and of the last one what is used.

use super::format::{BLOCK, DIRENT, FileType};

/// The longest name (Linux `NAME_MAX`).
const NAME_MAX: usize = 255;

/// A name and what it takes to write it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) kind: FileType,
}

/// How many of the names from `lengths` fit into one block, and how much of it they use.
fn fit(lengths: impl Iterator<Item = usize>) -> (usize, u64) {
    let (mut count, mut used) = (0, 0);
    for length in lengths {
        let more = DIRENT + length as u64;
        if used + more > BLOCK {
            break;
        }
        used += more;
        count += 1;
    }
    (count, used)
}

/// The size of a folder with names of these lengths, in order, `.` and `..` among them.
pub(super) fn size(lengths: &[usize]) -> u64 {
    let mut rest = lengths;
    let mut full = 0;
    loop {
        let (count, used) = fit(rest.iter().copied());
        rest = &rest[count..];
        if rest.is_empty() {
            return full + used;
        }
        full += BLOCK;
    }
}

/// The content of a folder; as long as [`size`] says.
pub(super) fn content(names: &[Name<'_>]) -> Vec<u8> {
    let mut content = Vec::new();
    let mut rest = names;
    while !rest.is_empty() {
        let (count, used) = fit(rest.iter().map(|name| name.name.len()));
        let start = content.len();
        // Less than a block, so it fits 16 bits.
        let mut name_at = (count as u64 * DIRENT) as u16;
        for Name { name, nid, kind } in &rest[..count] {
            content.extend_from_slice(&nid.to_le_bytes());
            content.extend_from_slice(&name_at.to_le_bytes());
            content.extend_from_slice(&[*kind as u8, 0]);
            name_at += name.len() as u16;
        }
        for Name { name, .. } in &rest[..count] {
            content.extend_from_slice(name);
        }
        debug_assert_eq!((content.len() - start) as u64, used);
        rest = &rest[count..];
        if !rest.is_empty() {
            content.resize(start + BLOCK as usize, 0);
        }
    }
    content
}

/// A name as a folder has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// The entries of one block of a folder, `used` bytes of which count. Checked for what every name must be; that names go
/// upwards from block to block is for the caller to see.
pub(super) fn entries(used: &[u8]) -> Result<Vec<Entry<'_>>, &'static str> {
    const OUTSIDE: &str = "an entry of a folder lies outside its block";
    let field = |at: usize, len: usize| used.get(at..at + len).ok_or(OUTSIDE);
    let name_at = |n: usize| -> Result<usize, &'static str> {
        let bytes = field(n * DIRENT as usize + 8, 2)?;
        Ok(usize::from(u16::from_le_bytes([bytes[0], bytes[1]])))
    };
    let first = name_at(0)?;
    if first == 0 || first % DIRENT as usize != 0 || first > used.len() {
        return Err("the entries of a folder have no end");
    }
    let count = first / DIRENT as usize;
    let mut entries = Vec::with_capacity(count);
    for n in 0..count {
        let start = name_at(n)?;
        let end = if n + 1 < count {
            name_at(n + 1)?
        } else {
            used.len()
        };
        let mut name = used.get(start..end).ok_or(OUTSIDE)?;
        if n + 1 == count {
            // Zeros behind the last name fill the block.
            let len = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            name = &name[..len];
        }
        if name.is_empty() || name.len() > NAME_MAX || name.contains(&b'/') || name.contains(&0) {
            return Err("a folder has an impossible name");
        }
        let nid = field(n * DIRENT as usize, 8)?;
        entries.push(Entry {
            name,
            nid: nid
                .iter()
                .rev()
                .fold(0, |number, byte| number << 8 | u64::from(*byte)),
            file_type: field(n * DIRENT as usize + 10, 1)?[0],
        });
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_the_length_of_the_content() {
        let check = |lengths: &[usize]| {
            let texts: Vec<Vec<u8>> = lengths.iter().map(|length| vec![b'n'; *length]).collect();
            let names: Vec<_> = texts
                .iter()
                .map(|name| Name {
                    name,
                    nid: 7,
                    kind: FileType::Regular,
                })
                .collect();
            let content = content(&names);
            assert_eq!(content.len() as u64, size(lengths), "{lengths:?}");
            let read: Vec<usize> = content
                .chunks(BLOCK as usize)
                .flat_map(|block| entries(block).unwrap())
                .map(|entry| {
                    assert_eq!((entry.nid, entry.file_type), (7, FileType::Regular as u8));
                    entry.name.len()
                })
                .collect();
            assert_eq!(read, lengths);
            content
        };
        let small = check(&[1, 2]);
        assert_eq!(small.len(), 2 * 12 + 3);
        assert_eq!(small[8..12], [24, 0, FileType::Regular as u8, 0]);
        // 15 names of 255 bytes fill a block to 4005; a name of 79 bytes makes it full, one of 80 does not fit.
        assert_eq!(check(&[[255; 15].as_slice(), &[79]].concat()).len(), 4096);
        assert_eq!(check(&[[255; 15].as_slice(), &[80]].concat()).len(), 4096 + 92);
        check(&vec![1; 100_000]);
    }
}
