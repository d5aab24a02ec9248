//! Walks a tar's headers and skips what lies between them: what is in it, where, and whether it is whole.
//!
//! Nothing is unpacked and nothing is kept, so its memory does not grow with the archive. Reads ustar, pax and GNU
//! headers (pax: POSIX.1-2017, `pax`; GNU: tar(5) of libarchive); agrees with the unpacking side on where members begin.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// A tar is made of these.
const BLOCK: u64 = 512;
/// The largest name or pax header that is read; longer ones are no paths on Linux (PATH_MAX is 4096), but pax headers also
/// carry extended attributes of up to 64 KiB each.
const EXTENSION_LIMIT: u64 = 1 << 20;

/// Why a tar cannot be walked to its end.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The first block is no tar header.
    #[error("it is not a tar archive")]
    NotATar,
    /// A later block is no tar header.
    #[error("tar header at byte {offset} is damaged: {reason}")]
    Damaged {
        /// Where.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// It ends within a member.
    #[error("it is truncated: byte {offset} and what follows is missing")]
    Truncated {
        /// How much is there.
        offset: u64,
    },
    /// The bytes cannot be read.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
}

/// What a member is, as far as it matters before unpacking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    Other,
}

/// One member of a tar.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: Kind,
    /// Where its bytes begin in the tar.
    pub(crate) offset: u64,
    pub(crate) size: u64,
    /// Seconds since 1970.
    pub(crate) mtime: u64,
}

/// Bytes that can be passed over.
pub(crate) trait Source: Read {
    /// Passes over `count` bytes; gives how many there were, which is fewer only at the end.
    fn skip(&mut self, count: u64) -> io::Result<u64>;
}

/// A part of a file, read without moving the file's own position.
#[derive(Debug)]
pub(crate) struct Section<'f> {
    file: &'f File,
    position: u64,
    end: u64,
}

impl<'f> Section<'f> {
    pub(crate) fn new(file: &'f File, start: u64, length: u64) -> Self {
        Self {
            file,
            position: start,
            end: start.saturating_add(length),
        }
    }
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        let count = self.file.read_at(&mut buffer[..wanted], self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Source for Section<'_> {
    fn skip(&mut self, count: u64) -> io::Result<u64> {
        let count = count.min(self.end - self.position);
        self.position += count;
        Ok(count)
    }
}

/// A stream that can only be read: skipping reads and throws away.
#[derive(Debug)]
pub(crate) struct Stream<R>(pub(crate) R);

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> Source for Stream<R> {
    fn skip(&mut self, count: u64) -> io::Result<u64> {
        io::copy(&mut (&mut self.0).take(count), &mut io::sink())
    }
}

/// The walk. After an error or the end it is over.
#[derive(Debug)]
pub(crate) struct Scanner<S> {
    source: S,
    /// Where the source stands.
    position: u64,
    /// What is left of the member before, its padding included.
    pending: u64,
}

/// What extension headers say about the member that follows them.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl<S: Source> Scanner<S> {
    pub(crate) fn new(source: S) -> Self {
        Self {
            source,
            position: 0,
            pending: 0,
        }
    }

    /// Gives the source back, to read what follows the end of the tar.
    pub(crate) fn into_source(self) -> S {
        self.source
    }

    /// The next member; `None` at the end: a block of zeros, or the end of the bytes between two members.
    pub(crate) fn next_member(&mut self) -> Result<Option<Member>, TarError> {
        let mut extensions = Extensions::default();
        let mut extended = false;
        loop {
            self.skip(self.pending)?;
            let at = self.position;
            let Some(header) = self.header()? else {
                if extended {
                    return Err(TarError::Truncated { offset: at });
                }
                return Ok(None);
            };
            let damaged = |reason| TarError::Damaged { offset: at, reason };
            let stored = header
                .entry_size()
                .map_err(|_| damaged("its size is no number"))?;
            let kind = header.entry_type();
            if kind.is_gnu_longname() || kind.is_gnu_longlink() || kind.is_pax_local_extensions() {
                let content = self.extension(stored, at)?;
                extended = true;
                if kind.is_gnu_longname() {
                    extensions.path = Some(until_nul(content));
                } else if kind.is_gnu_longlink() {
                    extensions.link = Some(until_nul(content));
                } else {
                    read_pax(&content, &mut extensions)
                        .ok_or_else(|| damaged("its pax header is malformed"))?;
                }
                continue;
            }
            if kind.is_pax_global_extensions() {
                self.extension(stored, at)?;
                continue;
            }
            let size = extensions.size.unwrap_or(stored);
            if kind.is_gnu_sparse() && header.as_gnu().is_some_and(tar::GnuHeader::is_extended) {
                self.sparse_extensions()?;
            }
            self.pending = padded(size).ok_or_else(|| damaged("its size is impossible"))?;
            return Ok(Some(Member {
                path: extensions
                    .path
                    .unwrap_or_else(|| header.path_bytes().into_owned()),
                link: extensions
                    .link
                    .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
                    .unwrap_or_default(),
                kind: match kind {
                    tar::EntryType::Regular | tar::EntryType::Continuous => Kind::File,
                    tar::EntryType::Directory => Kind::Directory,
                    tar::EntryType::Symlink => Kind::Symlink,
                    tar::EntryType::Link => Kind::HardLink,
                    _ => Kind::Other,
                },
                offset: self.position,
                size,
                mtime: header.mtime().unwrap_or_default(),
            }));
        }
    }

    fn skip(&mut self, count: u64) -> Result<(), TarError> {
        let skipped = self.source.skip(count)?;
        self.position += skipped;
        self.pending = 0;
        if skipped < count {
            Err(TarError::Truncated {
                offset: self.position,
            })
        } else {
            Ok(())
        }
    }

    /// Reads a block; `None` at the end of the bytes.
    fn block(&mut self) -> Result<Option<[u8; BLOCK as usize]>, TarError> {
        let mut block = [0; BLOCK as usize];
        let mut filled = 0;
        while filled < block.len() {
            match self.source.read(&mut block[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.position += filled as u64;
        match filled {
            0 => Ok(None),
            _ if filled < block.len() && self.position < BLOCK => Err(TarError::NotATar),
            _ if filled < block.len() => Err(TarError::Truncated {
                offset: self.position,
            }),
            _ => Ok(Some(block)),
        }
    }

    /// Reads a header and checks its sum; `None` at the end of the tar.
    fn header(&mut self) -> Result<Option<tar::Header>, TarError> {
        let at = self.position;
        let Some(block) = self.block()? else {
            return Ok(None);
        };
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let header = tar::Header::from_byte_slice(&block);
        let sum = |block: &[u8]| block.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        // The sum counts its own eight bytes as spaces (tar(5)).
        let expected = sum(&block[..148]) + 8 * u32::from(b' ') + sum(&block[156..]);
        match header.cksum() {
            Ok(found) if found == expected => Ok(Some(header.clone())),
            _ if at == 0 => Err(TarError::NotATar),
            _ => Err(TarError::Damaged {
                offset: at,
                reason: "its checksum is wrong",
            }),
        }
    }

    fn extension(&mut self, size: u64, at: u64) -> Result<Vec<u8>, TarError> {
        if size > EXTENSION_LIMIT {
            return Err(TarError::Damaged {
                offset: at,
                reason: "its extension is too long",
            });
        }
        let mut content = Vec::new();
        (&mut self.source).take(size).read_to_end(&mut content)?;
        self.position += content.len() as u64;
        if (content.len() as u64) < size {
            return Err(TarError::Truncated {
                offset: self.position,
            });
        }
        self.pending = size.next_multiple_of(BLOCK) - size;
        Ok(content)
    }

    /// Passes over the blocks in which an old GNU sparse file goes on listing its parts.
    fn sparse_extensions(&mut self) -> Result<(), TarError> {
        /// Where such a block says whether another one follows (tar(5), "GNU tar archives").
        const IS_EXTENDED: usize = 504;
        loop {
            let Some(block) = self.block()? else {
                return Err(TarError::Truncated {
                    offset: self.position,
                });
            };
            if block[IS_EXTENDED] == 0 {
                return Ok(());
            }
        }
    }
}

fn padded(size: u64) -> Option<u64> {
    size.checked_next_multiple_of(BLOCK)
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// Reads records of the form `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record.
fn read_pax(mut content: &[u8], extensions: &mut Extensions) -> Option<()> {
    while !content.is_empty() {
        let space = content.iter().position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(&content[..space]).ok()?.parse().ok()?;
        let record = content.get(space + 1..length)?;
        content = &content[length..];
        let record = record.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        let value = &record[equals + 1..];
        match &record[..equals] {
            b"path" => extensions.path = Some(value.to_vec()),
            b"linkpath" => extensions.link = Some(value.to_vec()),
            b"size" => extensions.size = Some(std::str::from_utf8(value).ok()?.parse().ok()?),
            _ => {}
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scan(bytes: &[u8]) -> Result<Vec<Member>, TarError> {
        let mut scanner = Scanner::new(Stream(bytes));
        let mut members = Vec::new();
        while let Some(member) = scanner.next_member()? {
            members.push(member);
        }
        Ok(members)
    }

    fn append(builder: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mtime(7);
        builder.append_data(&mut header, path, content).unwrap();
    }

    fn sample() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        append(&mut builder, "usr/bin/a", b"hello");
        append(&mut builder, &"long/".repeat(60), &[1; 1000]);
        builder
            .append_pax_extensions([("SCHILY.xattr.user.x", b"\n=".as_slice())])
            .unwrap();
        append(&mut builder, "b", &[2; 512]);
        builder.into_inner().unwrap()
    }

    #[test]
    fn members_are_found_where_they_are() {
        let bytes = sample();
        let members = scan(&bytes).unwrap();
        let content = |i: usize| {
            let start = usize::try_from(members[i].offset).unwrap();
            &bytes[start..start + usize::try_from(members[i].size).unwrap()]
        };
        assert_eq!(members.len(), 3);
        assert_eq!(
            (members[0].path.as_slice(), content(0)),
            (&b"usr/bin/a"[..], &b"hello"[..])
        );
        assert_eq!((members[1].path.len(), content(1)), (300, &[1; 1000][..]));
        assert_eq!(
            (members[2].path.as_slice(), content(2)),
            (&b"b"[..], &[2; 512][..])
        );
        assert_eq!(members[2].mtime, 7);
    }

    #[test]
    fn a_file_and_a_stream_are_walked_alike() {
        let bytes = sample();
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, &bytes).unwrap();
        let mut scanner = Scanner::new(Section::new(&file, 0, bytes.len() as u64));
        for expected in scan(&bytes).unwrap() {
            let member = scanner.next_member().unwrap().unwrap();
            assert_eq!((member.path, member.offset), (expected.path, expected.offset));
        }
        assert!(scanner.next_member().unwrap().is_none());
        // Cut in the middle of the second member's content.
        let mut scanner = Scanner::new(Section::new(&file, 0, 3000));
        let error = std::iter::from_fn(|| scanner.next_member().transpose())
            .find_map(Result::err)
            .unwrap();
        assert!(matches!(error, TarError::Truncated { offset: 3000 }), "{error:?}");
    }

    #[test]
    fn every_cut_within_a_member_is_noticed() {
        let bytes = sample();
        let end = scan(&bytes)
            .unwrap()
            .last()
            .map(|last| usize::try_from(last.offset + 512).unwrap())
            .unwrap();
        // Between whole members a tar may end: the closing zeros are a courtesy that some writers omit.
        let boundaries = [0, 1024, 3584, end];
        for cut in (0..end).filter(|cut| !boundaries.contains(cut)) {
            assert!(scan(&bytes[..cut]).is_err(), "{cut}");
        }
        for boundary in boundaries {
            assert!(scan(&bytes[..boundary]).is_ok(), "{boundary}");
        }
        assert!(matches!(
            scan(&bytes[..512]),
            Err(TarError::Truncated { offset: 512 })
        ));
    }

    #[test]
    fn what_is_no_tar_is_told_from_what_is_damaged() {
        assert!(matches!(scan(&[7; 2000]), Err(TarError::NotATar)));
        assert!(matches!(scan(b"short"), Err(TarError::NotATar)));
        let mut bytes = sample();
        bytes[1024 + 3] ^= 1;
        assert!(matches!(
            scan(&bytes),
            Err(TarError::Damaged { offset: 1024, .. })
        ));
        assert!(scan(&[]).unwrap().is_empty());
        assert!(scan(&[0; 1024]).unwrap().is_empty());
    }

    #[test]
    fn huge_extensions_are_not_read() {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(EXTENSION_LIMIT + 1);
        header.set_cksum();
        let bytes = [header.as_bytes().as_slice(), &[0; 4096]].concat();
        assert!(matches!(scan(&bytes), Err(TarError::Damaged { .. })));
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(u64::MAX);
        header.set_cksum();
        assert!(matches!(scan(header.as_bytes()), Err(TarError::Damaged { .. })));
    }

    #[test]
    fn malformed_pax_records_are_refused() {
        let check = |text: &[u8], expected: bool| {
            assert_eq!(
                read_pax(text, &mut Extensions::default()).is_some(),
                expected,
                "{text:?}"
            );
        };
        check(b"9 path=a\n", true);
        check(b"", true);
        for bad in [
            &b"9 path=ab\n"[..],
            b"path=a\n",
            b"0 path=a\n",
            b"3 path=a\n",
            b"99 path=a\n",
            b"9 size=x\n",
            b"8 path=a",
        ] {
            check(bad, false);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(flips in prop::collection::vec((0..4096_usize, any::<u8>()), 0..6)) {
            let mut bytes = sample();
            for (at, value) in flips {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            let _ = scan(&bytes);
        }
    }
}
