//! One entry of a layer, checked for sense, and what is left out on purpose.
//!
//! Left out, because it has no meaning in a merged tree:
//! - `trusted.overlay.*` attributes: they are overlayfs's own notes about another file system's layers, and a guest that
//!   mounts an overlay over this tree would take them for its own.
//! - Attributes outside `user`, `trusted`, `security` and the two POSIX ACLs: no Linux file system has them
//!   (`com.apple.*` comes from layers built on a Mac).
//! - AUFS's own files, `.wh..wh.*` other than the opaque marker.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use offshoot_model::Digest;

use super::error::{EntryProblem, shown};
use super::path::{PATH_MAX, normalize, split};
use super::pax::Record;
use super::read::Extent;
use super::tarball::{Header, Kind};

/// The longest name of an attribute (Linux `XATTR_NAME_MAX`).
const XATTR_NAME_MAX: usize = 255;
/// What all attributes of one entry may take: twice what Linux lets a single value have.
const XATTRS_MAX: usize = 128 << 10;
/// The longest single value: one less than Linux's own limit, because file systems keep it in 16 bits.
const XATTR_VALUE_MAX: usize = u16::MAX as usize;

/// libarchive leaves the padding away; others don't.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A point in time: seconds since 1970, and nanoseconds that always count forwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds since 1970-01-01 UTC, negative before.
    pub seconds: i64,
    /// Less than 1,000,000,000.
    pub nanos: u32,
}

/// Extended attributes in the order of their names.
pub type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// What every sort of file has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// The twelve permission bits; the type is the node's.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification.
    pub mtime: Time,
    /// Extended attributes, where there are any.
    pub xattrs: Option<Arc<Xattrs>>,
}

impl Metadata {
    /// A folder that a layer goes through without describing it: root's, 0755, from 1970, so that the same layers give
    /// the same tree.
    pub fn implied_dir() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            xattrs: None,
        }
    }
}

/// What one layer says, in its order.
#[derive(Debug)]
pub struct LayerEntries {
    /// The layer's blob, for messages.
    pub(super) layer: Digest,
    pub(super) entries: Vec<LayerEntry>,
}

impl LayerEntries {
    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the layer says nothing.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// One entry: where, and what to do there.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LayerEntry {
    /// Normalized; empty for the root.
    pub(super) path: Box<[u8]>,
    pub(super) change: Change,
}

/// What an entry does to its path.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Make it so.
    Put { metadata: Metadata, node: NewNode },
    /// Another name for the file of this (normalized) path.
    Link { target: Box<[u8]> },
    /// Remove what lower layers have here.
    Whiteout,
    /// Remove what lower layers have in this folder.
    Opaque,
}

/// What is put at a path.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NewNode {
    Dir,
    File { size: u64, extent: Extent },
    Symlink(Box<[u8]>),
    CharDev { major: u32, minor: u32 },
    BlockDev { major: u32, minor: u32 },
    Fifo,
}

/// What a header asks for, before the content is read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Nothing that has a meaning here.
    Nothing,
    /// A file, whose content comes next.
    File { path: Box<[u8]>, metadata: Metadata },
    /// Anything else.
    Entry(LayerEntry),
}

/// Checks a header and says what it asks for.
pub(super) fn interpret(header: &Header) -> Result<Asked, EntryProblem> {
    let path = normalize(&header.path)?;
    let (folder, name) = split(&path);
    if folder
        .split(|byte| *byte == b'/')
        .any(|part| part.starts_with(b".wh..wh."))
    {
        return Ok(Asked::Nothing);
    }
    if let Some(hidden) = name.strip_prefix(b".wh.") {
        return whiteout(folder, hidden);
    }
    if folder
        .split(|byte| *byte == b'/')
        .any(|part| part.starts_with(b".wh."))
    {
        return Err(EntryProblem::Whiteout);
    }
    if path.is_empty() && header.kind != Kind::Dir {
        return Err(EntryProblem::RootNotDir);
    }
    let path: Box<[u8]> = path.into();
    if header.kind == Kind::HardLink {
        let target = link_target(header)?;
        let outside = |_| EntryProblem::HardLinkOutside {
            target: shown(target),
        };
        let target = normalize(target).map_err(outside)?.into();
        return Ok(Asked::Entry(LayerEntry {
            path,
            change: Change::Link { target },
        }));
    }
    let metadata = Metadata {
        // Linux shows every symbolic link so, whatever it was packed with.
        mode: if header.kind == Kind::Symlink {
            0o777
        } else {
            header.mode
        },
        uid: header.uid,
        gid: header.gid,
        mtime: header.mtime,
        xattrs: xattrs(&header.xattrs)?,
    };
    let node = match header.kind {
        Kind::File => return Ok(Asked::File { path, metadata }),
        Kind::Dir => NewNode::Dir,
        Kind::Symlink => NewNode::Symlink(link_target(header)?.into()),
        Kind::Fifo => NewNode::Fifo,
        Kind::CharDev | Kind::BlockDev => device(header)?,
        Kind::HardLink => unreachable!("returned above"),
    };
    Ok(Asked::Entry(LayerEntry {
        path,
        change: Change::Put { metadata, node },
    }))
}

fn whiteout(folder: &[u8], hidden: &[u8]) -> Result<Asked, EntryProblem> {
    let (path, change) = match hidden {
        b".wh..opq" => (folder.to_vec(), Change::Opaque),
        b"" | b"." | b".." => return Err(EntryProblem::Whiteout),
        _ if hidden.starts_with(b".wh.") => return Ok(Asked::Nothing),
        _ if folder.is_empty() => (hidden.to_vec(), Change::Whiteout),
        _ => ([folder, b"/", hidden].concat(), Change::Whiteout),
    };
    Ok(Asked::Entry(LayerEntry {
        path: path.into(),
        change,
    }))
}

fn link_target(header: &Header) -> Result<&[u8], EntryProblem> {
    let target = header.link.as_slice();
    match target {
        b"" => Err(EntryProblem::NoTarget),
        _ if target.contains(&0) => Err(EntryProblem::Nul),
        _ if target.len() > PATH_MAX => Err(EntryProblem::PathTooLong { limit: PATH_MAX }),
        _ => Ok(target),
    }
}

/// Linux device numbers have 12 bits of major and 20 of minor number.
fn device(header: &Header) -> Result<NewNode, EntryProblem> {
    let (Ok(major @ 0..=0xfff), Ok(minor @ 0..=0xf_ffff)) =
        (u32::try_from(header.major), u32::try_from(header.minor))
    else {
        return Err(EntryProblem::Device {
            major: header.major,
            minor: header.minor,
        });
    };
    Ok(match header.kind {
        Kind::CharDev => NewNode::CharDev { major, minor },
        _ => NewNode::BlockDev { major, minor },
    })
}

/// The attributes in pax records. Where both writers' forms are there, star's wins: its bytes went through no encoding.
fn xattrs(records: &[Record]) -> Result<Option<Arc<Xattrs>>, EntryProblem> {
    let mut xattrs = Xattrs::new();
    for (key, value) in records {
        if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
            let name = percent_decode(name);
            let value = BASE64
                .decode(value)
                .map_err(|_| EntryProblem::XattrEncoding { name: shown(&name) })?;
            keep(&mut xattrs, name, value)?;
        }
    }
    for (key, value) in records {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            keep(&mut xattrs, name.to_vec(), value.clone())?;
        }
    }
    let total: usize = xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
    if total > XATTRS_MAX || xattrs.values().any(|value| value.len() > XATTR_VALUE_MAX) {
        return Err(EntryProblem::XattrsTooLarge {
            limit: XATTRS_MAX.min(XATTR_VALUE_MAX),
        });
    }
    Ok((!xattrs.is_empty()).then(|| Arc::new(xattrs)))
}

fn keep(xattrs: &mut Xattrs, name: Vec<u8>, value: Vec<u8>) -> Result<(), EntryProblem> {
    let refuse = || EntryProblem::XattrName { name: shown(&name) };
    let dot = name.iter().position(|byte| *byte == b'.').ok_or_else(refuse)?;
    let (namespace, rest) = (&name[..dot], &name[dot + 1..]);
    if name.len() > XATTR_NAME_MAX || name.contains(&0) || namespace.is_empty() || rest.is_empty() {
        return Err(refuse());
    }
    let known = match namespace {
        b"user" | b"security" => true,
        b"trusted" => !rest.starts_with(b"overlay."),
        b"system" => matches!(rest, b"posix_acl_access" | b"posix_acl_default"),
        _ => false,
    };
    if known {
        xattrs.insert(name.into(), value.into());
    }
    Ok(())
}

/// libarchive writes names with `%41` for what is not plain ASCII.
fn percent_decode(name: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((byte, after)) = rest.split_first() {
        let mut pair = [0];
        match after.split_at_checked(2) {
            Some((digits, after)) if *byte == b'%' && hex::decode_to_slice(digits, &mut pair).is_ok() => {
                decoded.push(pair[0]);
                rest = after;
            }
            _ => {
                decoded.push(*byte);
                rest = after;
            }
        }
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(records: &[(&str, &[u8])]) -> Result<Vec<(String, Vec<u8>)>, EntryProblem> {
        let records: Vec<Record> = records
            .iter()
            .map(|(k, v)| (k.as_bytes().to_vec(), v.to_vec()))
            .collect();
        let found = xattrs(&records)?;
        let pairs = found.iter().flat_map(|xattrs| xattrs.iter());
        Ok(pairs
            .map(|(k, v)| (String::from_utf8_lossy(k).into_owned(), v.to_vec()))
            .collect())
    }

    #[test]
    fn attributes_are_kept_dropped_or_refused() {
        let check = |records: &[(&str, &[u8])], expected: &[(&str, &[u8])]| {
            let expected: Vec<_> = expected
                .iter()
                .map(|(k, v)| ((*k).to_owned(), v.to_vec()))
                .collect();
            assert_eq!(keys(records).unwrap(), expected);
        };
        check(
            &[("SCHILY.xattr.security.capability", b"\x01\n\0")],
            &[("security.capability", b"\x01\n\0")],
        );
        check(
            &[
                ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ("SCHILY.xattr.com.apple.provenance", b"x"),
            ],
            &[],
        );
        check(
            &[
                ("SCHILY.xattr.trusted.x", b""),
                ("SCHILY.xattr.system.nfs4_acl", b""),
            ],
            &[("trusted.x", b"")],
        );
        check(&[("LIBARCHIVE.xattr.user.a%20b", b"aGk")], &[("user.a b", b"hi")]);
        check(
            &[
                ("SCHILY.xattr.user.a", b"raw"),
                ("LIBARCHIVE.xattr.user.a", b"aGk="),
            ],
            &[("user.a", b"raw")],
        );
        for bad in [
            "SCHILY.xattr.",
            "SCHILY.xattr.user",
            "SCHILY.xattr.user.",
            "SCHILY.xattr..x",
            "SCHILY.xattr.user.a\0",
        ] {
            assert!(
                matches!(keys(&[(bad, b"x")]), Err(EntryProblem::XattrName { .. })),
                "{bad:?}"
            );
        }
        assert!(matches!(
            keys(&[("LIBARCHIVE.xattr.user.a", b"?")]),
            Err(EntryProblem::XattrEncoding { .. })
        ));
        let large = vec![0; 65_536];
        assert!(matches!(
            keys(&[("SCHILY.xattr.user.a", &large)]),
            Err(EntryProblem::XattrsTooLarge { .. })
        ));
    }

    #[test]
    fn whiteouts_name_what_they_hide() {
        let check = |path: &str, expected: Result<Option<(&str, Change)>, EntryProblem>| {
            let header = Header::for_test(Kind::File, path, "");
            let found = interpret(&header).map(|asked| match asked {
                Asked::Nothing => None,
                Asked::Entry(entry) => {
                    Some((String::from_utf8_lossy(&entry.path).into_owned(), entry.change))
                }
                Asked::File { .. } => panic!("{path} is a file"),
            });
            assert_eq!(
                found,
                expected.map(|e| e.map(|(p, c)| (p.to_owned(), c))),
                "{path}"
            );
        };
        check("a/.wh.b", Ok(Some(("a/b", Change::Whiteout))));
        check(".wh.b", Ok(Some(("b", Change::Whiteout))));
        check("a/.wh..wh..opq", Ok(Some(("a", Change::Opaque))));
        check(".wh..wh..opq", Ok(Some(("", Change::Opaque))));
        check(".wh..wh.plnk/12.34", Ok(None));
        check("a/.wh..wh.aufs", Ok(None));
        check("a/.wh.", Err(EntryProblem::Whiteout));
        check("a/.wh..", Err(EntryProblem::Whiteout));
        check("a/.wh...", Err(EntryProblem::Whiteout));
        check(".wh.a/b", Err(EntryProblem::Whiteout));
    }

    #[test]
    fn impossible_entries_are_refused() {
        let check = |kind, path, link, expected: EntryProblem| {
            assert_eq!(
                interpret(&Header::for_test(kind, path, link)),
                Err(expected),
                "{path} -> {link}"
            );
        };
        check(Kind::File, "/etc/passwd", "", EntryProblem::Absolute);
        check(Kind::File, "../x", "", EntryProblem::Climbs);
        check(Kind::File, ".", "", EntryProblem::RootNotDir);
        check(Kind::Symlink, "a", "", EntryProblem::NoTarget);
        check(Kind::Symlink, "a", "x\0y", EntryProblem::Nul);
        check(
            Kind::HardLink,
            "a",
            "../../etc/shadow",
            EntryProblem::HardLinkOutside {
                target: "../../etc/shadow".into(),
            },
        );
        check(
            Kind::HardLink,
            "a",
            "/etc/shadow",
            EntryProblem::HardLinkOutside {
                target: "/etc/shadow".into(),
            },
        );
        let mut device = Header::for_test(Kind::CharDev, "null", "");
        (device.major, device.minor) = (0x1000, 3);
        assert_eq!(
            interpret(&device),
            Err(EntryProblem::Device {
                major: 0x1000,
                minor: 3
            })
        );
    }
}
