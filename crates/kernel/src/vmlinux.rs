//! From what distributions call `vmlinuz` to the ELF that a VMM starts, and what that ELF says about itself.
//!
//! A bzImage (Documentation/arch/x86/boot.rst) is a real-mode setup part with a header, then a small program that
//! carries the compressed ELF:
//!
//! ```text
//! 0         0x1f1           0x202    0x248              (setup_sects + 1) * 512
//! ├─────────┼───────────────┼────────┼──────────────────┼────────────┬───────────────┬─────┐
//! │ boot    │ setup_sects   │ "HdrS" │ payload_offset,  │ unpacker   │ payload       │ ... │
//! │ sector  │ 0xAA55 @0x1fe │        │ payload_length   │            │ (an ELF)      │     │
//! └─────────┴───────────────┴────────┴──────────────────┴────────────┴───────────────┴─────┘
//!                                                       └─ payload_offset ─┘
//! ```
//!
//! `scripts/extract-vmlinux` of the kernel tree finds the same bytes by trying every place; the header is exact.

use std::ops::Range;

use object::elf::{EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, NoteType};
use object::endian::LittleEndian;
use object::read::elf::{FileHeader, ProgramHeader};

use crate::decompress::{DecompressError, decompress};

/// The largest vmlinux we take: a distribution's full kernel has 60 to 100 MiB, one with debug information 500.
pub(crate) const VMLINUX_MAX: usize = 768 << 20;
/// The largest configuration inside a kernel; real ones have 300 KiB.
pub(crate) const CONFIG_MAX: usize = 4 << 20;
/// `uname -r` has room for 64 bytes with the NUL (`__NEW_UTS_LEN`).
const RELEASE_MAX: usize = 64;
/// The first protocol version whose header has the payload fields.
const PROTOCOL_WITH_PAYLOAD: u16 = 0x0208;
/// Xen's PHYS32_ENTRY (xen/include/public/elfnote.h): the 32-bit entry point that PVH booting uses.
const XEN_ELFNOTE_PHYS32_ENTRY: NoteType = NoteType(18);

/// Why a file is not a kernel we can use.
#[derive(Debug, thiserror::Error)]
pub enum VmlinuxError {
    /// Neither an ELF nor a bzImage.
    #[error("it is neither an ELF vmlinux nor a bzImage")]
    NotAKernel,
    /// A bzImage whose header is impossible.
    #[error("its bzImage header is damaged: {what}")]
    Header {
        /// What is wrong.
        what: &'static str,
    },
    /// The payload does not unpack.
    #[error("cannot unpack the kernel inside the bzImage")]
    Unpack {
        /// Why not.
        #[source]
        source: DecompressError,
    },
    /// The ELF is damaged.
    #[error("its ELF structure is damaged")]
    Elf {
        /// What the parser said.
        #[source]
        source: object::read::Error,
    },
    /// An ELF for something else.
    #[error("it is not an x86-64 kernel: ELF type {kind}, machine {machine}")]
    Machine {
        /// `e_type`.
        kind: u16,
        /// `e_machine`.
        machine: u16,
    },
    /// No version banner.
    #[error("it does not say which version of Linux it is")]
    NoRelease,
}

/// A kernel, unpacked and looked at.
#[derive(Debug)]
pub(crate) struct Vmlinux {
    /// The ELF file.
    pub(crate) elf: Vec<u8>,
    /// What `uname -r` will say.
    pub(crate) release: String,
    /// Whether it has a PVH entry.
    pub(crate) pvh: bool,
}

impl Vmlinux {
    /// Takes an ELF or a bzImage.
    pub(crate) fn parse(bytes: Vec<u8>) -> Result<Self, VmlinuxError> {
        if bytes.starts_with(b"\x7fELF") {
            return Self::parse_elf(bytes, None);
        }
        let image = BzImage::parse(&bytes)?;
        let elf = decompress(&bytes[image.payload], VMLINUX_MAX)
            .map_err(|source| VmlinuxError::Unpack { source })?;
        if !elf.starts_with(b"\x7fELF") {
            return Err(VmlinuxError::Header {
                what: "the payload is not an ELF",
            });
        }
        Self::parse_elf(elf, image.release)
    }

    fn parse_elf(elf: Vec<u8>, release: Option<String>) -> Result<Self, VmlinuxError> {
        let pvh = has_pvh_entry(&elf)?;
        let release = release
            .or_else(|| banner_release(&elf))
            .ok_or(VmlinuxError::NoRelease)?;
        Ok(Self { elf, release, pvh })
    }

    /// The kernel's configuration, where it carries it (`CONFIG_IKCONFIG`, kernel/configs.c).
    pub(crate) fn config(&self) -> Option<String> {
        const START: &[u8] = b"IKCFG_ST";
        let at = find(&self.elf, START)? + START.len();
        let config = decompress(&self.elf[at..], CONFIG_MAX).ok()?;
        String::from_utf8(config).ok()
    }
}

struct BzImage {
    payload: Range<usize>,
    release: Option<String>,
}

impl BzImage {
    fn parse(bytes: &[u8]) -> Result<Self, VmlinuxError> {
        if bytes.get(0x1fe..0x200) != Some(&[0x55, 0xaa]) || bytes.get(0x202..0x206) != Some(b"HdrS") {
            return Err(VmlinuxError::NotAKernel);
        }
        let cut_off = VmlinuxError::Header {
            what: "the file ends within the header",
        };
        let Some(header) = bytes.first_chunk::<0x250>() else {
            return Err(cut_off);
        };
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize
        };
        if half(0x206) < PROTOCOL_WITH_PAYLOAD {
            return Err(VmlinuxError::Header {
                what: "the boot protocol is older than 2.08 (Linux 2.6.26)",
            });
        }
        // Documented: 0 means 4.
        let setup_sectors = if header[0x1f1] == 0 {
            4
        } else {
            usize::from(header[0x1f1])
        };
        let start = (setup_sectors + 1) * 512 + word(0x248);
        let payload = start..start.saturating_add(word(0x24c));
        if payload.is_empty() || bytes.get(payload.clone()).is_none() {
            return Err(VmlinuxError::Header {
                what: "the payload lies outside of the file",
            });
        }
        // An offset from 0x200 to a text such as `6.12.1-cloud-amd64 (builder@host) #1 SMP ...`; 0 means none.
        let release = match half(0x20e) {
            0 => None,
            offset => bytes.get(0x200 + usize::from(offset)..).and_then(leading_release),
        };
        Ok(Self { payload, release })
    }
}

fn has_pvh_entry(elf: &[u8]) -> Result<bool, VmlinuxError> {
    let broken = |source| VmlinuxError::Elf { source };
    let header = FileHeader64::<LittleEndian>::parse(elf).map_err(broken)?;
    let endian = header.endian().map_err(broken)?;
    let (kind, machine) = (header.e_type(endian), header.e_machine(endian));
    if machine != EM_X86_64 || !matches!(kind, ET_EXEC | ET_DYN) {
        return Err(VmlinuxError::Machine {
            kind: kind.0,
            machine: machine.0,
        });
    }
    for segment in header.program_headers(endian, elf).map_err(broken)? {
        let Some(mut notes) = segment.notes(endian, elf).map_err(broken)? else {
            continue;
        };
        while let Some(note) = notes.next().map_err(broken)? {
            if note.name() == b"Xen" && note.n_type(endian) == XEN_ELFNOTE_PHYS32_ENTRY {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The release in `linux_banner` (init/version-timestamp.c): `Linux version 6.12.1 (...`.
fn banner_release(elf: &[u8]) -> Option<String> {
    const START: &[u8] = b"Linux version ";
    let mut rest = elf;
    while let Some(at) = find(rest, START) {
        rest = &rest[at + START.len()..];
        // The format string of the banner, `Linux version %s`, is there too.
        if rest.first().is_some_and(u8::is_ascii_digit) {
            return leading_release(rest);
        }
    }
    None
}

/// The release at the start of `bytes`, which ends at a space or NUL.
fn leading_release(bytes: &[u8]) -> Option<String> {
    let end = bytes
        .iter()
        .take(RELEASE_MAX)
        .position(|b| matches!(b, b' ' | 0))?;
    let valid = |b: &u8| b.is_ascii_alphanumeric() || b".+~_-".contains(b);
    let release = &bytes[..end];
    let is_release = release.first().is_some_and(u8::is_ascii_digit) && release.iter().all(valid);
    is_release.then(|| String::from_utf8_lossy(release).into_owned())
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let (first, rest) = needle.split_first()?;
    let mut from = 0;
    loop {
        let at = from + haystack.get(from..)?.iter().position(|b| b == first)?;
        from = at + 1;
        if haystack[from..].starts_with(rest) {
            return Some(at);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::decompress::tests::{gzip, xz, zstd};

    /// A vmlinux as small as one can be: header, one PT_NOTE, the banner.
    pub(crate) fn elf(machine: u16, note_type: u32, tail: &[u8]) -> Vec<u8> {
        let note: Vec<u8> = [4_u32, 4, note_type]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect();
        let note = [&note[..], b"Xen\0", &[0, 0, 0, 1]].concat();
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2_u16, machine].iter().flat_map(|n| n.to_le_bytes()));
        elf.extend(1_u32.to_le_bytes());
        elf.extend([0x100_0000_u64, 64, 0].iter().flat_map(|n| n.to_le_bytes()));
        elf.extend(0_u32.to_le_bytes());
        elf.extend([64_u16, 56, 1, 64, 0, 0].iter().flat_map(|n| n.to_le_bytes()));
        elf.extend([4_u32, 4].iter().flat_map(|n| n.to_le_bytes()));
        elf.extend(
            [120, 0, 0, note.len() as u64, note.len() as u64, 4]
                .iter()
                .flat_map(|n| n.to_le_bytes()),
        );
        assert_eq!(elf.len(), 120);
        elf.extend(note);
        elf.extend(tail);
        elf
    }

    pub(crate) const BANNER: &[u8] = b"Linux version %s (%s)\0Linux version 6.12.1-test (a@b) #1 SMP\0";

    pub(crate) fn bzimage(payload: &[u8], release: Option<&str>) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x1f1] = 1;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        if let Some(release) = release {
            image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
            image[0x300..0x300 + release.len()].copy_from_slice(release.as_bytes());
        }
        image[0x248..0x24c].copy_from_slice(&0x20_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0xcc; 0x20]);
        image.extend(payload);
        image.extend([0xcc; 100]);
        image
    }

    fn pvh_elf() -> Vec<u8> {
        elf(EM_X86_64.0, XEN_ELFNOTE_PHYS32_ENTRY.0, BANNER)
    }

    #[test]
    fn a_bzimage_and_its_elf_say_the_same() {
        for pack in [gzip as fn(&[u8]) -> Vec<u8>, xz, zstd] {
            let packed = [pack(&pvh_elf()), vec![1, 2, 3, 4]].concat();
            let kernel = Vmlinux::parse(bzimage(&packed, Some("6.13-x+1 (c@d)"))).unwrap();
            assert_eq!((kernel.release.as_str(), kernel.pvh), ("6.13-x+1", true));
            assert_eq!(kernel.elf, pvh_elf());
            assert_eq!(
                Vmlinux::parse(bzimage(&packed, None)).unwrap().release,
                "6.12.1-test"
            );
        }
        let kernel = Vmlinux::parse(pvh_elf()).unwrap();
        assert_eq!((kernel.release.as_str(), kernel.pvh), ("6.12.1-test", true));
        assert!(!Vmlinux::parse(elf(EM_X86_64.0, 6, BANNER)).unwrap().pvh);
    }

    #[test]
    fn a_kernel_may_carry_its_configuration() {
        let packed = gzip(b"CONFIG_EXT4_FS=y\n");
        let tail = [BANNER, b"IKCFG_ST", &packed, b"IKCFG_ED"].concat();
        let kernel = Vmlinux::parse(elf(EM_X86_64.0, 18, &tail)).unwrap();
        assert_eq!(kernel.config().as_deref(), Some("CONFIG_EXT4_FS=y\n"));
        assert_eq!(Vmlinux::parse(pvh_elf()).unwrap().config(), None);
        let damaged = Vmlinux::parse(elf(EM_X86_64.0, 18, &[BANNER, b"IKCFG_ST?"].concat())).unwrap();
        assert_eq!(damaged.config(), None);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let check = |bytes: Vec<u8>, expected: &str| {
            assert_eq!(Vmlinux::parse(bytes).unwrap_err().to_string(), expected);
        };
        let edited = |edit: fn(&mut Vec<u8>)| {
            let mut image = bzimage(&zstd(&pvh_elf()), None);
            edit(&mut image);
            image
        };
        check(vec![], "it is neither an ELF vmlinux nor a bzImage");
        check(
            b"#!/bin/sh".repeat(1000),
            "it is neither an ELF vmlinux nor a bzImage",
        );
        check(b"\x7fELF".to_vec(), "its ELF structure is damaged");
        check(
            elf(183, 18, BANNER),
            "it is not an x86-64 kernel: ELF type 2, machine 183",
        );
        check(
            elf(EM_X86_64.0, 18, b"Linux version %s"),
            "it does not say which version of Linux it is",
        );
        check(
            edited(|i| i.truncate(0x24f)),
            "its bzImage header is damaged: the file ends within the header",
        );
        check(
            edited(|i| i[0x206..0x208].fill(1)),
            "its bzImage header is damaged: the boot protocol is older than 2.08 (Linux 2.6.26)",
        );
        let outside = "its bzImage header is damaged: the payload lies outside of the file";
        check(edited(|i| i[0x24c..0x250].fill(0xff)), outside);
        check(edited(|i| i[0x24c..0x250].fill(0)), outside);
        check(edited(|i| i[0x248..0x24c].fill(0xff)), outside);
        check(
            edited(|i| i[0x420..0x430].fill(0)),
            "cannot unpack the kernel inside the bzImage",
        );
        check(
            bzimage(&gzip(b"text"), None),
            "its bzImage header is damaged: the payload is not an ELF",
        );
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in any::<prop::sample::Index>(), value: [u8; 4], cut in any::<prop::sample::Index>()) {
            for mut bytes in [pvh_elf(), bzimage(&zstd(&pvh_elf()), Some("6.1 x"))] {
                let at = at.index(bytes.len() - 4);
                bytes[at..at + 4].copy_from_slice(&value);
                bytes.truncate(cut.index(bytes.len()) + 1);
                let _ = Vmlinux::parse(bytes);
            }
        }
    }
}
