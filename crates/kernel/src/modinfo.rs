//! What a kernel module says about itself: the `.modinfo` section, `name=value` texts separated by NUL bytes
//! (include/linux/moduleparam.h).

use object::elf::{EM_X86_64, ET_REL, FileHeader64};
use object::endian::LittleEndian;
use object::read::elf::{FileHeader, SectionHeader};

/// The longest `.modinfo` we read; real ones have a few KiB (many aliases make them long).
const MODINFO_MAX: usize = 1 << 20;

/// The parts of `.modinfo` that decide whether and when a module can be loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Modinfo {
    /// What must be loaded before, normalised.
    pub(crate) depends: Vec<String>,
    /// What should be loaded before if it is there (`softdep=pre: ...`), normalised; may name aliases.
    pub(crate) soft_before: Vec<String>,
    /// The kernel release that it was built for, the first word of `vermagic`.
    pub(crate) release: Option<String>,
}

impl Modinfo {
    /// Reads the section of an uncompressed `.ko`; `None` when it is not a module for this machine.
    pub(crate) fn of_module(ko: &[u8]) -> Option<Self> {
        let header = FileHeader64::<LittleEndian>::parse(ko).ok()?;
        let endian = header.endian().ok()?;
        if header.e_machine(endian) != EM_X86_64 || header.e_type(endian) != ET_REL {
            return None;
        }
        let sections = header.sections(endian, ko).ok()?;
        let (_, section) = sections.section_by_name(endian, b".modinfo")?;
        let data = section.data(endian, ko).ok()?;
        (data.len() <= MODINFO_MAX).then(|| Self::parse(data))
    }

    fn parse(data: &[u8]) -> Self {
        let mut info = Self::default();
        for text in data.split(|b| *b == 0) {
            let Ok(text) = str::from_utf8(text) else { continue };
            match text.split_once('=') {
                Some(("depends", names)) => {
                    info.depends
                        .extend(names.split(',').filter(|name| !name.is_empty()).map(normalise));
                }
                Some(("softdep", text)) => info.soft_before.extend(soft_before(text)),
                Some(("vermagic", text)) => {
                    info.release = text.split_ascii_whitespace().next().map(str::to_owned);
                }
                _ => {}
            }
        }
        info
    }
}

/// The names after `pre:` and before `post:` (modprobe.d(5)).
fn soft_before(text: &str) -> impl Iterator<Item = String> {
    let mut before = false;
    text.split_ascii_whitespace().filter_map(move |word| {
        match word {
            "pre:" => before = true,
            "post:" => before = false,
            name if before => return Some(normalise(name)),
            _ => {}
        }
        None
    })
}

/// The module without the signature behind it (kernel/module/signing.c): signature, 12 bytes with its length in the last
/// four, marker. What has no whole signature is given as it is.
pub(crate) fn without_signature(ko: &[u8]) -> &[u8] {
    const MARKER: &[u8] = b"~Module signature appended~\n";
    const DESCRIPTION: usize = 12;
    let strip = || {
        let rest = ko.strip_suffix(MARKER)?;
        let (rest, length) = rest.split_last_chunk::<4>()?;
        let end = rest
            .len()
            .checked_sub(DESCRIPTION - 4)?
            .checked_sub(u32::from_be_bytes(*length) as usize)?;
        Some(&ko[..end])
    };
    strip().unwrap_or(ko)
}

/// A module's name as the kernel knows it: file names may have `-` where it has `_`.
pub(crate) fn normalise(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A module as small as one can be: header, three sections (null, names, `.modinfo`).
    pub(crate) fn module(modinfo: &str) -> Vec<u8> {
        let names = b"\0.shstrtab\0.modinfo\0";
        let data = modinfo.replace('\n', "\0");
        let sections = 64 + names.len() + data.len();
        let mut ko = b"\x7fELF\x02\x01\x01".to_vec();
        ko.resize(16, 0);
        ko.extend([1_u16, EM_X86_64.0].iter().flat_map(|n| n.to_le_bytes()));
        ko.extend(1_u32.to_le_bytes());
        ko.extend([0, 0, sections as u64].iter().flat_map(|n| n.to_le_bytes()));
        ko.extend(0_u32.to_le_bytes());
        ko.extend([64_u16, 0, 0, 64, 3, 1].iter().flat_map(|n| n.to_le_bytes()));
        ko.extend(names);
        ko.extend(data.as_bytes());
        ko.extend([0; 64]);
        for (name, kind, offset, size) in [
            (1_u32, 3_u32, 64, names.len()),
            (11, 1, 64 + names.len(), data.len()),
        ] {
            ko.extend([name, kind].iter().flat_map(|n| n.to_le_bytes()));
            ko.extend(
                [0, 0, offset as u64, size as u64]
                    .iter()
                    .flat_map(|n| n.to_le_bytes()),
            );
            ko.extend([0; 8]);
            ko.extend([1_u64, 0].iter().flat_map(|n| n.to_le_bytes()));
        }
        ko
    }

    #[test]
    fn reads_what_decides_about_loading() {
        let check = |text: &str, depends: &[&str], soft: &[&str], release: Option<&str>| {
            let info = Modinfo::of_module(&module(text)).unwrap();
            assert_eq!(info.depends, depends);
            assert_eq!(info.soft_before, soft);
            assert_eq!(info.release.as_deref(), release);
        };
        check("license=GPL\ndepends=\nname=x\n", &[], &[], None);
        check(
            "depends=net-failover,b\nvermagic=6.1.0 SMP mod_unload \n",
            &["net_failover", "b"],
            &[],
            Some("6.1.0"),
        );
        check(
            "softdep=pre: crc32c x-y post: z\nsoftdep=post: q pre: r\n",
            &[],
            &["crc32c", "x_y", "r"],
            None,
        );
        check("depends", &[], &[], None);
        check("", &[], &[], None);
    }

    #[test]
    fn what_is_no_module_is_none() {
        assert_eq!(Modinfo::of_module(b""), None);
        assert_eq!(
            Modinfo::of_module(&crate::vmlinux::tests::elf(EM_X86_64.0, 18, b"")),
            None
        );
        assert_eq!(
            Modinfo::of_module(&module(&"x=y\n".repeat(MODINFO_MAX / 4 + 1))),
            None
        );
    }

    #[test]
    fn a_signature_is_cut_off_only_when_it_is_whole() {
        let marker = b"~Module signature appended~\n";
        let signed = [b"module", &b"sig"[..], &[0; 8], &[0, 0, 0, 3], marker].concat();
        assert_eq!(without_signature(&signed), b"module");
        let too_long = [b"module", &[0; 8][..], &[0xff; 4], marker].concat();
        for whole in [
            &b"module"[..],
            &marker[..],
            &signed[..signed.len() - 1],
            &too_long,
        ] {
            assert_eq!(without_signature(whole), whole);
        }
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in any::<prop::sample::Index>(), value: [u8; 4], cut in any::<prop::sample::Index>()) {
            let mut bytes = module("depends=a,b\nsoftdep=pre: c\n");
            let at = at.index(bytes.len() - 4);
            bytes[at..at + 4].copy_from_slice(&value);
            bytes.truncate(cut.index(bytes.len()) + 1);
            let _ = Modinfo::of_module(&bytes);
            assert!(without_signature(&bytes).len() <= bytes.len());
        }
    }
}
