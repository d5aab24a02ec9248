//! A tar archive read entry by entry: v7, ustar, GNU and pax, as POSIX.1-2017 (pax, "ustar Interchange Format") and the
//! GNU tar manual ("Basic Tar Format") lay them down.
//!
//! ```text
//! [x pax records][L long name][K long target] header │ content, padded to 512 │ next …  │ two blocks of zeros
//! ```
//!
//! The reader is our own and not the `tar` crate's, because that one splits pax records at newlines (so a file
//! capability with a 0x0a byte loses its entry's name), reads extended headers of any size into memory, and hands pax
//! sparse files out as if they were the condensed ones.

use std::io::{self, Read};

use super::entry::Time;
use super::error::TarProblem;
use super::pax::{self, Record};
use super::sparse::{self, MapReader, Range};
use super::stream::{Stream, StreamError};

/// The unit of the format.
const BLOCK: u64 = 512;
/// The largest extended header: the longest path plus every extended attribute an entry may have fit many times over.
const HEADER_LIMIT: u64 = 1 << 20;
/// The most extended headers before one entry: each kind once, and global ones between.
const MAX_EXTENDED: usize = 16;

/// Why the next entry cannot be read.
#[derive(Debug)]
pub(super) enum TarError {
    Stream(StreamError),
    Bad { offset: u64, problem: TarProblem },
}

impl From<StreamError> for TarError {
    fn from(error: StreamError) -> Self {
        Self::Stream(error)
    }
}

/// What sort of entry it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDev,
    BlockDev,
    Dir,
    Fifo,
}

/// An entry without its content: names and numbers as the archive gives them, not yet checked for sense.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    /// The file's size; for a sparse file with its holes.
    pub(super) size: u64,
    pub(super) major: u64,
    pub(super) minor: u64,
    /// Pax records with extended attributes, not yet decoded.
    pub(super) xattrs: Vec<Record>,
    map: Option<Vec<Range>>,
}

#[cfg(test)]
impl Header {
    pub(super) fn for_test(kind: Kind, path: &str, link: &str) -> Self {
        Self {
            kind,
            path: path.into(),
            link: link.into(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            size: 0,
            major: 1,
            minor: 3,
            xattrs: Vec::new(),
            map: None,
        }
    }
}

/// What pax records change in the entry that follows them.
#[derive(Default)]
struct Overrides {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Time>,
    xattrs: Vec<Record>,
    sparse: SparseRecords,
}

#[derive(Default)]
struct SparseRecords {
    major: Option<u64>,
    minor: Option<u64>,
    name: Option<Vec<u8>>,
    size: Option<u64>,
    map: Option<Vec<Range>>,
    offset: Option<u64>,
    /// Any of the records was there.
    present: bool,
}

/// Reads a tar archive.
pub(super) struct TarReader<'a> {
    stream: Stream<'a>,
    /// Records of global headers, which hold for every entry that follows.
    global: Vec<Record>,
    /// Bytes of the current entry's content that were not read yet.
    remaining: u64,
    /// Zeros after the current entry's content.
    padding: u64,
    failure: Option<TarError>,
}

impl<'a> TarReader<'a> {
    pub(super) fn new(stream: Stream<'a>) -> Self {
        Self {
            stream,
            global: Vec::new(),
            remaining: 0,
            padding: 0,
            failure: None,
        }
    }

    fn bad(&self, problem: TarProblem) -> TarError {
        TarError::Bad {
            offset: self.stream.position(),
            problem,
        }
    }

    /// Goes to the next entry, past what was not read of the one before; `None` at the end of the archive.
    pub(super) fn next(&mut self) -> Result<Option<Header>, TarError> {
        let mut local = Vec::new();
        let (mut long_name, mut long_link) = (None, None);
        let mut extended = 0;
        loop {
            self.pass_content()?;
            let Some(block) = self.header_block()? else {
                return match extended {
                    0 => Ok(None),
                    _ => Err(self.bad(TarProblem::NothingDescribed)),
                };
            };
            let raw = RawHeader(&block);
            match raw.flag() {
                b'x' => local = self.pax_records(&raw)?,
                b'g' => {
                    let records = self.pax_records(&raw)?;
                    self.global
                        .retain(|(key, _)| !records.iter().any(|(new, _)| new == key));
                    self.global.extend(records);
                    // Each one is limited; so must be their sum.
                    if self
                        .global
                        .iter()
                        .map(|(key, value)| key.len() + value.len())
                        .sum::<usize>() as u64
                        > HEADER_LIMIT
                    {
                        return Err(self.bad(TarProblem::HeaderTooLarge { limit: HEADER_LIMIT }));
                    }
                    continue;
                }
                b'L' => long_name = Some(self.long_text(&raw)?),
                b'K' => long_link = Some(self.long_text(&raw)?),
                // A volume's label: it names no file.
                b'V' => {
                    self.begin_content(raw.size().map_err(|problem| self.bad(problem))?);
                    continue;
                }
                _ => return self.entry(&raw, &local, long_name, long_link).map(Some),
            }
            extended += 1;
            if extended > MAX_EXTENDED {
                return Err(self.bad(TarProblem::NothingDescribed));
            }
        }
    }

    /// Reads to the end of the stream, past the end of the archive: the digest covers all of it.
    pub(super) fn drain(&mut self) -> Result<(), TarError> {
        // False at the end, and there are never so many bytes.
        self.stream.skip(u64::MAX)?;
        Ok(())
    }

    /// How many bytes of the stream were read.
    pub(super) fn position(&self) -> u64 {
        self.stream.position()
    }

    fn begin_content(&mut self, stored: u64) {
        self.remaining = stored;
        self.padding = stored.wrapping_neg() % BLOCK;
    }

    fn pass_content(&mut self) -> Result<(), TarError> {
        let rest = self
            .remaining
            .checked_add(self.padding)
            .ok_or_else(|| self.bad(TarProblem::Truncated))?;
        (self.remaining, self.padding) = (0, 0);
        if !self.stream.skip(rest)? {
            return Err(self.bad(TarProblem::Truncated));
        }
        Ok(())
    }

    /// The next header; `None` for the block of zeros that ends an archive, or where it ends without.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK as usize]>, TarError> {
        let mut block = [0; BLOCK as usize];
        match self.stream.read_full(&mut block)? as u64 {
            0 => return Ok(None),
            BLOCK => {}
            _ => return Err(self.bad(TarProblem::Truncated)),
        }
        if block == [0; BLOCK as usize] {
            return Ok(None);
        }
        if !RawHeader(&block).checksum_holds() {
            return Err(TarError::Bad {
                offset: self.stream.position() - BLOCK,
                problem: TarProblem::Checksum,
            });
        }
        Ok(Some(block))
    }

    fn extended_body(&mut self, raw: &RawHeader<'_>) -> Result<Vec<u8>, TarError> {
        let size = raw.size().map_err(|problem| self.bad(problem))?;
        if size > HEADER_LIMIT {
            return Err(self.bad(TarProblem::HeaderTooLarge { limit: HEADER_LIMIT }));
        }
        // Fits: at most HEADER_LIMIT.
        let mut body = vec![0; size as usize];
        if self.stream.read_full(&mut body)? < body.len() {
            return Err(self.bad(TarProblem::Truncated));
        }
        self.begin_content(size);
        self.remaining = 0;
        Ok(body)
    }

    fn pax_records(&mut self, raw: &RawHeader<'_>) -> Result<Vec<Record>, TarError> {
        let body = self.extended_body(raw)?;
        pax::records(&body).map_err(|problem| self.bad(problem))
    }

    fn long_text(&mut self, raw: &RawHeader<'_>) -> Result<Vec<u8>, TarError> {
        let mut body = self.extended_body(raw)?;
        body.truncate(until_nul(&body).len());
        Ok(body)
    }

    fn entry(
        &mut self,
        raw: &RawHeader<'_>,
        local: &[Record],
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Header, TarError> {
        let overrides =
            Overrides::from_records(self.global.iter().chain(local)).map_err(|problem| self.bad(problem))?;
        let mut header = raw.entry(&overrides).map_err(|problem| self.bad(problem))?;
        if let Some(path) = long_name.or(overrides.path) {
            header.path = path;
        }
        if let Some(link) = long_link.or(overrides.link) {
            header.link = link;
        }
        // Before there was a type for folders, a slash at the end of the name said it.
        if header.kind == Kind::File && header.path.ends_with(b"/") {
            header.kind = Kind::Dir;
        }
        if header.kind != Kind::File {
            // Nothing but files has content; what some writers put into the size of a folder means nothing.
            header.size = 0;
            self.begin_content(0);
            return Ok(header);
        }
        let stored = header.size;
        self.begin_content(stored);
        if raw.flag() == b'S' {
            let (map, size) = self.gnu_map(raw)?;
            header.map = Some(sparse::check(map, size, stored).map_err(|problem| self.bad(problem))?);
            header.size = size;
        } else if overrides.sparse.present {
            self.pax_sparse(&mut header, overrides.sparse)?;
        }
        Ok(header)
    }

    /// The map in GNU's own header and the blocks that continue it.
    fn gnu_map(&mut self, raw: &RawHeader<'_>) -> Result<(Vec<Range>, u64), TarError> {
        let mut map = Vec::new();
        let wrong = |this: &Self| this.bad(TarProblem::Sparse);
        let size = number(raw.field(483, 12)).ok_or_else(|| wrong(self))?;
        gnu_ranges(raw.field(386, 96), &mut map).map_err(|problem| self.bad(problem))?;
        let mut more = raw.0[482] != 0;
        while more {
            let mut block = [0; BLOCK as usize];
            if self.stream.read_full(&mut block)? < block.len() {
                return Err(self.bad(TarProblem::Truncated));
            }
            gnu_ranges(&block[..504], &mut map).map_err(|problem| self.bad(problem))?;
            more = block[504] != 0;
        }
        Ok((map, size))
    }

    /// A sparse file in one of the three pax formats.
    fn pax_sparse(&mut self, header: &mut Header, records: SparseRecords) -> Result<(), TarError> {
        let size = records.size.ok_or_else(|| self.bad(TarProblem::Sparse))?;
        let map = match (records.major, records.minor) {
            (None | Some(0), None | Some(0 | 1)) => {
                records.map.ok_or_else(|| self.bad(TarProblem::Sparse))?
            }
            (Some(1), Some(0)) => self.map_in_content()?,
            _ => return Err(self.bad(TarProblem::Sparse)),
        };
        header.map = Some(sparse::check(map, size, self.remaining).map_err(|problem| self.bad(problem))?);
        header.size = size;
        if let Some(name) = records.name {
            header.path = name;
        }
        Ok(())
    }

    /// The map of format 1.0, which takes up the first blocks of the content.
    fn map_in_content(&mut self) -> Result<Vec<Range>, TarError> {
        let mut reader = MapReader::default();
        loop {
            let mut block = [0; BLOCK as usize];
            self.remaining = self
                .remaining
                .checked_sub(BLOCK)
                .ok_or_else(|| self.bad(TarProblem::Sparse))?;
            if self.stream.read_full(&mut block)? < block.len() {
                return Err(self.bad(TarProblem::Truncated));
            }
            if let Some(map) = reader.block(&block).map_err(|problem| self.bad(problem))? {
                return Ok(map);
            }
        }
    }

    /// The content of the entry that [`next`](Self::next) just gave.
    pub(super) fn content<'r>(&'r mut self, header: &'r Header) -> Content<'r, 'a> {
        Content {
            tar: self,
            map: header.map.as_deref(),
            size: header.size,
            at: 0,
        }
    }

    /// Why the last content broke off, if the stream was the reason.
    pub(super) fn take_failure(&mut self) -> Option<TarError> {
        self.failure.take()
    }

    fn read_stored(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.remaining).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        if most == 0 {
            return Ok(0);
        }
        match self.stream.read(&mut buffer[..most]) {
            Ok(0) => {
                self.failure = Some(self.bad(TarProblem::Truncated));
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Ok(count) => {
                self.remaining -= count as u64;
                Ok(count)
            }
            Err(failure) => {
                self.failure = Some(failure.into());
                Err(io::Error::other("the layer cannot be read"))
            }
        }
    }
}

/// The content of one file, holes filled with zeros.
pub(super) struct Content<'r, 'a> {
    tar: &'r mut TarReader<'a>,
    map: Option<&'r [Range]>,
    size: u64,
    at: u64,
}

impl Read for Content<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(map) = &mut self.map else {
            return self.tar.read_stored(buffer);
        };
        while let [range, rest @ ..] = *map
            && range.offset + range.len <= self.at
        {
            *map = rest;
        }
        let (until, hole) = match map.first() {
            Some(range) if range.offset <= self.at => (range.offset + range.len, false),
            Some(range) => (range.offset, true),
            None => (self.size, true),
        };
        let most = usize::try_from(until - self.at).map_or(buffer.len(), |most| most.min(buffer.len()));
        let count = if hole {
            buffer[..most].fill(0);
            most
        } else {
            self.tar.read_stored(&mut buffer[..most])?
        };
        self.at += count as u64;
        Ok(count)
    }
}

impl Overrides {
    fn from_records<'r>(records: impl Iterator<Item = &'r Record>) -> Result<Self, TarProblem> {
        let mut all = Self::default();
        for (key, value) in records {
            // An empty value takes back what an earlier record said.
            let text = || (!value.is_empty()).then(|| value.clone());
            let number = |field| match value.as_slice() {
                b"" => Ok(None),
                digits => pax::decimal(digits).map(Some).ok_or(TarProblem::Number { field }),
            };
            match key.as_slice() {
                b"path" => all.path = text(),
                b"linkpath" => all.link = text(),
                b"size" => all.size = number("size")?,
                b"uid" => all.uid = number("owner")?,
                b"gid" => all.gid = number("group")?,
                b"mtime" if value.is_empty() => all.mtime = None,
                b"mtime" => {
                    all.mtime = Some(pax::time(value).ok_or(TarProblem::Number {
                        field: "modification time",
                    })?);
                }
                _ if key.starts_with(b"SCHILY.xattr.") || key.starts_with(b"LIBARCHIVE.xattr.") => {
                    all.xattrs.push((key.clone(), value.clone()));
                }
                _ => {
                    if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                        all.sparse.take(key, value)?;
                    }
                }
            }
        }
        Ok(all)
    }
}

impl SparseRecords {
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarProblem> {
        let number = || pax::decimal(value).ok_or(TarProblem::Sparse);
        match key {
            b"major" => self.major = Some(number()?),
            b"minor" => self.minor = Some(number()?),
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.size = Some(number()?),
            b"map" => self.map = Some(sparse::from_list(value)?),
            b"offset" => self.offset = Some(number()?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or(TarProblem::Sparse)?;
                sparse::push(
                    self.map.get_or_insert_default(),
                    Range {
                        offset,
                        len: number()?,
                    },
                )?;
            }
            // How many ranges follow: the map itself says it.
            b"numblocks" if number()? == 0 => self.map = Some(Vec::new()),
            _ => {}
        }
        self.present = true;
        Ok(())
    }
}

/// The 512 bytes of a header, by offset and length of their fields.
struct RawHeader<'b>(&'b [u8; BLOCK as usize]);

impl RawHeader<'_> {
    fn field(&self, at: usize, len: usize) -> &[u8] {
        &self.0[at..at + len]
    }

    fn flag(&self) -> u8 {
        self.0[156]
    }

    fn number(&self, at: usize, len: usize, field: &'static str) -> Result<u64, TarProblem> {
        number(self.field(at, len)).ok_or(TarProblem::Number { field })
    }

    fn size(&self) -> Result<u64, TarProblem> {
        self.number(124, 12, "size")
    }

    /// The sum of all bytes, the checksum's own field taken as spaces. Some old writers added signed bytes.
    fn checksum_holds(&self) -> bool {
        let Some(stored) = number(self.field(148, 8)) else {
            return false;
        };
        let bytes = || {
            self.0
                .iter()
                .enumerate()
                .map(|(at, byte)| if (148..156).contains(&at) { b' ' } else { *byte })
        };
        let unsigned: u64 = bytes().map(u64::from).sum();
        let signed: i64 = bytes().map(|byte| i64::from(byte.cast_signed())).sum();
        stored == unsigned || i64::try_from(stored) == Ok(signed)
    }

    /// The name, with ustar's prefix. GNU's header has other things where the prefix stands, star's a shorter prefix.
    fn path(&self) -> Vec<u8> {
        let name = until_nul(self.field(0, 100));
        let prefix = match self.field(257, 6) {
            b"ustar\0" if self.field(508, 4) == b"tar\0" => until_nul(self.field(345, 131)),
            b"ustar\0" => until_nul(self.field(345, 155)),
            _ => b"",
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    fn entry(&self, overrides: &Overrides) -> Result<Header, TarProblem> {
        let kind = match self.flag() {
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDev,
            b'4' => Kind::BlockDev,
            b'5' => Kind::Dir,
            b'6' => Kind::Fifo,
            flag => return Err(TarProblem::UnknownType { flag }),
        };
        let id = |pax: Option<u64>, at, field| {
            let id = pax.map_or_else(|| self.number(at, 8, field), Ok)?;
            u32::try_from(id).map_err(|_| TarProblem::Number { field })
        };
        let is_device = matches!(kind, Kind::CharDev | Kind::BlockDev);
        let device = |at| {
            if is_device {
                self.number(at, 8, "device number")
            } else {
                Ok(0)
            }
        };
        let mtime = match overrides.mtime {
            Some(mtime) => mtime,
            None => {
                let seconds = signed(self.field(136, 12)).ok_or(TarProblem::Number {
                    field: "modification time",
                })?;
                Time { seconds, nanos: 0 }
            }
        };
        Ok(Header {
            kind,
            path: self.path(),
            link: until_nul(self.field(157, 100)).to_vec(),
            // Twelve bits are left.
            mode: (self.number(100, 8, "mode")? & 0o7777) as u16,
            uid: id(overrides.uid, 108, "owner")?,
            gid: id(overrides.gid, 116, "group")?,
            mtime,
            size: overrides.size.map_or_else(|| self.size(), Ok)?,
            major: device(329)?,
            minor: device(337)?,
            xattrs: overrides.xattrs.clone(),
            map: None,
        })
    }
}

/// Ranges as GNU's headers hold them: offset and length of twelve bytes each, until the first empty one.
fn gnu_ranges(mut fields: &[u8], map: &mut Vec<Range>) -> Result<(), TarProblem> {
    while let Some((offset, rest)) = fields.split_at_checked(12)
        && let Some((len, rest)) = rest.split_at_checked(12)
        && len[0] != 0
    {
        let number = |field| number(field).ok_or(TarProblem::Sparse);
        sparse::push(
            map,
            Range {
                offset: number(offset)?,
                len: number(len)?,
            },
        )?;
        fields = rest;
    }
    Ok(())
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn number(field: &[u8]) -> Option<u64> {
    signed(field).and_then(|number| number.try_into().ok())
}

/// A number of a header: octal digits between spaces and NULs, or, where the first bit is set, a big-endian binary number.
fn signed(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // The second bit is the sign; what is left of it extends upwards.
        let top = if first & 0x40 != 0 {
            i128::from(*first) - 0x100
        } else {
            i128::from(first & 0x3f)
        };
        let value = rest.iter().try_fold(top, |value, byte| {
            Some(value.checked_mul(256)? + i128::from(*byte))
        })?;
        return value.try_into().ok();
    }
    let digits = until_nul(field).trim_ascii();
    digits.iter().try_fold(0_i64, |value, byte| {
        let digit = matches!(byte, b'0'..=b'7').then(|| i64::from(byte - b'0'))?;
        value.checked_mul(8)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        let check = |field: &[u8], expected: Option<i64>| {
            assert_eq!(signed(field), expected, "{}", field.escape_ascii());
        };
        check(b"0000644\0", Some(0o644));
        check(b"    644 ", Some(0o644));
        check(b"\0\0\0\0\0\0\0\0", Some(0));
        check(b"77777777777\0", Some(0o77_777_777_777));
        check(b"\x80\0\0\0\0\0\x01\x02", Some(0x102));
        check(b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1));
        check(b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2));
        check(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX));
        check(b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None);
        check(b"0000648\0", None);
        check(b"-1\0\0\0\0\0\0", None);
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff"), None);
    }
}
