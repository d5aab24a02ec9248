//! The on-disk structures of EROFS (Linux, `fs/erofs/erofs_fs.h`), all little-endian, as the bytes they are.
//!
//! What reads them takes nothing for granted but the length of its input, and only what is written here is read.

use offshoot_image::layer::{Metadata, Time, Xattrs};

/// The block size: the page size of every machine we run on, which DAX needs.
pub(super) const BLOCK: u64 = 4096;
/// The unit in which inodes are numbered.
pub(super) const SLOT: u64 = 32;
/// Where the superblock stands in block 0.
pub(super) const SUPERBLOCK_AT: usize = 1024;
/// The size of an extended inode. The compact one has no room for a time of its own.
pub(super) const INODE: u64 = 64;
/// The size of an entry of a folder.
pub(super) const DIRENT: u64 = 12;
/// The most that attributes may take: the inode counts them in 16 bits, in units of four bytes.
pub(super) const XATTRS_MAX: u64 = 12 + 4 * (u16::MAX as u64 - 1);

const MAGIC: u32 = 0xE0F5_E1E2;
/// The superblock has a checksum.
const COMPAT_SB_CHKSUM: u32 = 1;
/// Inodes hold modification and not change times.
const COMPAT_MTIME: u32 = 2;

/// How the content of an inode is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataLayout {
    /// All of it in consecutive blocks.
    FlatPlain = 0,
    /// Whole blocks in consecutive blocks, the rest behind the inode.
    FlatInline = 2,
}

/// The type bits of `st_mode` (inode(7)).
pub(super) mod mode {
    /// All type bits.
    pub(in super::super) const TYPE: u16 = 0o170_000;
    pub(in super::super) const FIFO: u16 = 0o010_000;
    pub(in super::super) const CHAR: u16 = 0o020_000;
    pub(in super::super) const DIR: u16 = 0o040_000;
    pub(in super::super) const BLOCK: u16 = 0o060_000;
    pub(in super::super) const FILE: u16 = 0o100_000;
    pub(in super::super) const LINK: u16 = 0o120_000;
}

/// File types in folders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum FileType {
    Regular = 1,
    Dir = 2,
    CharDev = 3,
    BlockDev = 4,
    Fifo = 5,
    Symlink = 7,
}

/// The bytes at `at`, which the caller knows to be there.
fn bytes<const N: usize>(place: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&place[at..at + N]);
    bytes
}

/// `struct erofs_super_block`, as far as it is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) root_nid: u16,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) meta_block: u32,
    pub(super) uuid: [u8; 16],
}

impl Superblock {
    /// Block 0 with the superblock in it and its checksum: CRC-32C of the rest of the block, without the final inversion.
    pub(super) fn to_block(self) -> Vec<u8> {
        let mut block = vec![0; BLOCK as usize];
        let mut put =
            |at: usize, bytes: &[u8]| block[SUPERBLOCK_AT + at..][..bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(8, &(COMPAT_SB_CHKSUM | COMPAT_MTIME).to_le_bytes());
        put(12, &[BLOCK.trailing_zeros() as u8]);
        put(14, &self.root_nid.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta_block.to_le_bytes());
        put(48, &self.uuid);
        let checksum = !crc32c::crc32c(&block[SUPERBLOCK_AT..]);
        block[SUPERBLOCK_AT + 4..][..4].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    /// Reads block 0; says what is wrong with it.
    pub(super) fn from_block(block: &[u8; BLOCK as usize]) -> Result<Self, &'static str> {
        let fields = &block[SUPERBLOCK_AT..];
        if u32::from_le_bytes(bytes(fields, 0)) != MAGIC {
            return Err("it is no EROFS image");
        }
        let mut blank = fields.to_vec();
        blank[4..8].fill(0);
        if u32::from_le_bytes(bytes(fields, 4)) != !crc32c::crc32c(&blank) {
            return Err("its superblock has another checksum");
        }
        let features = (
            u32::from_le_bytes(bytes(fields, 8)),
            u32::from_le_bytes(bytes(fields, 80)),
        );
        let shared_xattrs = u32::from_le_bytes(bytes(fields, 44));
        if features != (COMPAT_SB_CHKSUM | COMPAT_MTIME, 0)
            || u32::from(fields[12]) != BLOCK.trailing_zeros()
            || shared_xattrs != 0
        {
            return Err("another program wrote it");
        }
        Ok(Self {
            root_nid: u16::from_le_bytes(bytes(fields, 14)),
            inodes: u64::from_le_bytes(bytes(fields, 16)),
            blocks: u32::from_le_bytes(bytes(fields, 36)),
            meta_block: u32::from_le_bytes(bytes(fields, 40)),
            uuid: bytes(fields, 48),
        })
    }
}

/// `struct erofs_inode_extended` as it is read; its fields are checked by whoever reads the image.
pub(super) struct InodeFields {
    pub(super) layout: DataLayout,
    /// The room for attributes behind the inode.
    pub(super) xattrs: u64,
    /// Type and permissions.
    pub(super) mode: u16,
    pub(super) size: u64,
    pub(super) block_or_device: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    pub(super) links: u32,
}

impl InodeFields {
    /// Takes an inode apart; says what is wrong with it.
    pub(super) fn read(inode: &[u8; INODE as usize]) -> Result<Self, &'static str> {
        let layout = match u16::from_le_bytes(bytes(inode, 0)) {
            0b0001 => DataLayout::FlatPlain,
            0b0101 => DataLayout::FlatInline,
            _ => return Err("an inode has another form"),
        };
        let mtime = Time {
            seconds: i64::from_le_bytes(bytes(inode, 32)),
            nanos: u32::from_le_bytes(bytes(inode, 40)),
        };
        if mtime.nanos >= 1_000_000_000 {
            return Err("an inode has an impossible time");
        }
        Ok(Self {
            layout,
            xattrs: match u16::from_le_bytes(bytes(inode, 2)) {
                0 => 0,
                count => 12 + 4 * (u64::from(count) - 1),
            },
            mode: u16::from_le_bytes(bytes(inode, 4)),
            size: u64::from_le_bytes(bytes(inode, 8)),
            block_or_device: u32::from_le_bytes(bytes(inode, 16)),
            uid: u32::from_le_bytes(bytes(inode, 24)),
            gid: u32::from_le_bytes(bytes(inode, 28)),
            mtime,
            links: u32::from_le_bytes(bytes(inode, 44)),
        })
    }
}

/// `struct erofs_inode_extended`.
pub(super) struct RawInode<'a> {
    pub(super) layout: DataLayout,
    pub(super) type_bits: u16,
    pub(super) metadata: &'a Metadata,
    pub(super) size: u64,
    /// The first block, or the device number.
    pub(super) block_or_device: u32,
    pub(super) number: u32,
    pub(super) links: u32,
}

impl RawInode<'_> {
    /// Writes the inode and its attributes at the start of `place`.
    pub(super) fn write(&self, place: &mut [u8]) {
        let Metadata {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        } = self.metadata;
        let xattrs = xattrs.as_deref();
        let mut put = |at: usize, bytes: &[u8]| place[at..][..bytes.len()].copy_from_slice(bytes);
        put(0, &(1 | ((self.layout as u16) << 1)).to_le_bytes());
        put(2, &xattr_count(xattrs).to_le_bytes());
        put(4, &(self.type_bits | mode).to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.block_or_device.to_le_bytes());
        put(20, &self.number.to_le_bytes());
        put(24, &uid.to_le_bytes());
        put(28, &gid.to_le_bytes());
        put(32, &mtime.seconds.to_le_bytes());
        put(40, &mtime.nanos.to_le_bytes());
        put(44, &self.links.to_le_bytes());
        if let Some(xattrs) = xattrs {
            write_xattrs(xattrs, &mut place[INODE as usize..]);
        }
    }
}

/// A device number as Linux keeps it on disk (`new_encode_dev`).
pub(super) fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The major and minor number that [`device_number`] put together.
pub(super) fn split_device_number(number: u32) -> (u32, u32) {
    (
        (number >> 8) & 0xfff,
        (number & 0xff) | ((number >> 12) & 0xfff00),
    )
}

/// The prefixes that have numbers, and so take no room.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// The number of an attribute's prefix and the rest of its name; `None` for a prefix that EROFS has not.
pub(super) fn split_xattr(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES
        .iter()
        .find_map(|(prefix, number)| Some((*number, name.strip_prefix(*prefix)?)))
}

/// How much room attributes take behind the inode: a header of 12 bytes, and each one rounded up to four.
pub(super) fn xattrs_size(xattrs: Option<&Xattrs>) -> u64 {
    let Some(xattrs) = xattrs else { return 0 };
    let sizes = xattrs.iter().map(|(name, value)| {
        split_xattr(name).map_or(0, |(_, rest)| {
            (4 + rest.len() as u64 + value.len() as u64).next_multiple_of(4)
        })
    });
    12 + sizes.sum::<u64>()
}

/// The room in the inode's own count.
fn xattr_count(xattrs: Option<&Xattrs>) -> u16 {
    match xattrs_size(xattrs) {
        0 => 0,
        // Checked against XATTRS_MAX when the layout is made.
        size => u16::try_from((size - 12) / 4 + 1).unwrap_or(u16::MAX),
    }
}

fn write_xattrs(xattrs: &Xattrs, place: &mut [u8]) {
    // The header is all zeros: no filter, no shared attributes.
    let mut at = 12;
    for (name, value) in xattrs {
        let Some((number, rest)) = split_xattr(name) else {
            continue;
        };
        // Names have at most 255 bytes and values 65,535: the layers were checked for it.
        place[at] = rest.len() as u8;
        place[at + 1] = number;
        place[at + 2..at + 4].copy_from_slice(&(value.len() as u16).to_le_bytes());
        place[at + 4..][..rest.len()].copy_from_slice(rest);
        place[at + 4 + rest.len()..][..value.len()].copy_from_slice(value);
        at = (at + 4 + rest.len() + value.len()).next_multiple_of(4);
    }
}

/// The attributes behind an inode, from their header on; says what is wrong with them.
pub(super) fn read_xattrs(place: &[u8]) -> Result<Xattrs, &'static str> {
    const OUTSIDE: &str = "an attribute lies outside its inode";
    let (header, mut rest) = place.split_at_checked(12).ok_or(OUTSIDE)?;
    if header.iter().any(|byte| *byte != 0) {
        return Err("an inode has shared attributes");
    }
    let mut xattrs = Xattrs::new();
    while !rest.is_empty() {
        let [rest_len, number, low, high] = *rest.first_chunk::<4>().ok_or(OUTSIDE)?;
        let prefix = PREFIXES
            .iter()
            .find(|(_, n)| *n == number)
            .ok_or("an attribute has an unknown prefix")?
            .0;
        let value_at = 4 + usize::from(rest_len);
        let end = value_at + usize::from(u16::from_le_bytes([low, high]));
        let name = rest.get(4..value_at).ok_or(OUTSIDE)?;
        let value = rest.get(value_at..end).ok_or(OUTSIDE)?;
        let name = [prefix, name].concat();
        if name.contains(&0) || xattrs.insert(name.into(), value.into()).is_some() {
            return Err("an attribute has an impossible name");
        }
        rest = rest.get(end.next_multiple_of(4)..).ok_or(OUTSIDE)?;
    }
    Ok(xattrs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_encoded_as_linux_does() {
        assert_eq!(device_number(1, 3), 0x103);
        assert_eq!(device_number(259, 0x12345), (0x45) | (259 << 8) | (0x12300 << 12));
        for (major, minor) in [(1, 3), (259, 0x12345), (0xfff, 0xf_ffff)] {
            assert_eq!(split_device_number(device_number(major, minor)), (major, minor));
        }
    }

    #[test]
    fn attribute_names_split_at_numbered_prefixes() {
        assert_eq!(split_xattr(b"security.capability"), Some((6, &b"capability"[..])));
        assert_eq!(split_xattr(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(split_xattr(b"user.x"), Some((1, &b"x"[..])));
        assert_eq!(split_xattr(b"btrfs.x"), None);
    }
}
