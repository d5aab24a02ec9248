//! Layers end to end: tar bytes in, merged tree out, in memory.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Command;

use flate2::Compression as Level;
use offshoot_model::{ByteSize, Digest, ErrorKind, Explain};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::manifest::{Compression, StoredLayer};

/// Keeps content in memory; an extent is its number.
#[derive(Default)]
struct Memory {
    files: Vec<Vec<u8>>,
}

impl ContentSink for Memory {
    fn file(&mut self, size: u64, content: &mut dyn Read) -> io::Result<Extent> {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes)?;
        if bytes.len() as u64 != size {
            return Err(io::Error::other(format!(
                "{} bytes instead of {size}",
                bytes.len()
            )));
        }
        self.files.push(bytes);
        Ok(Extent(self.files.len() as u64 - 1))
    }
}

/// A tar written field by field, so that it can hold what no proper writer would write.
#[derive(Clone, Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn raw(
        mut self,
        flag: u8,
        name: &str,
        link: &str,
        content: &[u8],
        change: impl FnOnce(&mut tar::Header),
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(tar::EntryType::new(flag));
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn entry(self, flag: u8, name: &str, link: &str, content: &[u8]) -> Self {
        self.raw(flag, name, link, content, |_| ())
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.entry(b'0', name, "", content.as_bytes())
    }

    fn dir(self, name: &str) -> Self {
        self.raw(b'5', name, "", b"", |header| header.set_mode(0o700))
    }

    fn link(self, name: &str, target: &str) -> Self {
        self.entry(b'1', name, target, b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(b'2', name, target, b"")
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_pax_extensions(records.iter().copied()).unwrap();
        let bytes = builder.into_inner().unwrap();
        // Without the two blocks that end an archive.
        Self([self.0, bytes[..bytes.len() - 1024].to_vec()].concat())
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

const FREE: Watch<'static> = Watch {
    cancelled: &|| false,
    moved: &|_| (),
};

/// Reads a layer whose blob is `blob` and which should unpack to `tar`.
fn read(
    blob: &[u8],
    tar: &[u8],
    compression: Compression,
    budget: &mut Budget,
    sink: &mut Memory,
    watch: Watch<'_>,
) -> Result<LayerEntries, LayerError> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(blob).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let layer = StoredLayer {
        digest: sha256(blob),
        size: blob.len() as u64,
        diff_id: sha256(tar),
        compression,
    };
    read_layer(
        LayerSource {
            layer: &layer,
            blob: file,
        },
        budget,
        sink,
        watch,
    )
}

fn merge(layers: &[Vec<u8>]) -> Result<(Tree, Memory), LayerError> {
    let (mut tree, mut sink) = (Tree::new(), Memory::default());
    let mut budget = Budget::new(Limits::default());
    for tar in layers {
        tree.apply(read(tar, tar, Compression::None, &mut budget, &mut sink, FREE)?)?;
    }
    Ok((tree, sink))
}

/// What is in a tree, one line each: folders with their mode, files with content and, above one, number of names.
fn list(tree: &Tree, sink: &Memory) -> Vec<String> {
    fn go(tree: &Tree, sink: &Memory, dir: InodeId, path: &str, lines: &mut Vec<String>) {
        for (name, id) in tree.children(dir) {
            let path = format!("{path}{}", String::from_utf8_lossy(name));
            let inode = tree.inode(id);
            let names = if inode.names > 1 {
                format!(" x{}", inode.names)
            } else {
                String::new()
            };
            lines.push(match &inode.node {
                Node::Dir(_) => format!("{path}/ {:o}", inode.metadata.mode),
                Node::File { extent, .. } => {
                    format!(
                        "{path} = {}{names}",
                        String::from_utf8_lossy(&sink.files[extent.0 as usize])
                    )
                }
                Node::Symlink(target) => format!("{path} -> {}{names}", String::from_utf8_lossy(target)),
                Node::CharDev { major, minor } => format!("{path} c{major}:{minor}"),
                Node::BlockDev { major, minor } => format!("{path} b{major}:{minor}"),
                Node::Fifo => format!("{path} p"),
            });
            go(tree, sink, id, &format!("{path}/"), lines);
        }
    }
    let mut lines = Vec::new();
    go(tree, sink, Tree::ROOT, "", &mut lines);
    lines
}

#[track_caller]
fn check(layers: &[Tar], expected: &[&str]) {
    let layers: Vec<_> = layers.iter().map(|tar| tar.clone().end()).collect();
    let (tree, sink) = merge(&layers).unwrap();
    assert_eq!(list(&tree, &sink), expected);
    let content: u64 = sink.files.iter().map(|file| file.len() as u64).sum();
    let orphans: u64 = tree.orphans().iter().map(|(_, size)| size).sum();
    let mut live = std::collections::BTreeMap::new();
    let mut pending = vec![Tree::ROOT];
    let mut names = std::collections::BTreeMap::from([(Tree::ROOT, 1)]);
    while let Some(dir) = pending.pop() {
        for (_, id) in tree.children(dir) {
            *names.entry(id).or_insert(0) += 1;
            match tree.inode(id).node {
                Node::Dir(_) => pending.push(id),
                Node::File { size, .. } => {
                    live.insert(id, size);
                }
                _ => {}
            }
        }
    }
    assert_eq!(
        content,
        orphans + live.values().sum::<u64>(),
        "content is lost or counted twice"
    );
    assert_eq!(names.len(), tree.inode_count(), "inodes without a name");
    assert!(
        names.iter().all(|(id, count)| tree.inode(*id).names == *count),
        "names are miscounted"
    );
}

fn tar() -> Tar {
    Tar::default()
}

#[test]
fn later_entries_replace_earlier_ones() {
    check(&[tar().file("a", "1").file("a", "2")], &["a = 2"]);
    check(&[tar().file("a", "1"), tar().file("./a", "2")], &["a = 2"]);
    check(
        &[tar().dir("d").file("d/a", "1"), tar().file("d", "2")],
        &["d = 2"],
    );
    check(&[tar().file("d", "1"), tar().dir("d")], &["d/ 700"]);
    check(
        &[tar().file("d/e/a", "1"), tar().dir("d/")],
        &["d/ 700", "d/e/ 755", "d/e/a = 1"],
    );
    check(
        &[tar().symlink("d", "x"), tar().dir("d").file("d/a", "1")],
        &["d/ 700", "d/a = 1"],
    );
    check(&[tar().dir(".").dir("./d")], &["d/ 700"]);
}

#[test]
fn every_kind_of_file_is_kept() {
    let device = |tar: Tar, flag, name| {
        tar.raw(flag, name, "", b"", |header| {
            header.set_device_major(8).unwrap();
            header.set_device_minor(300).unwrap();
        })
    };
    let mixed = device(
        device(tar().symlink("l", "/x/y").entry(b'6', "p", "", b""), b'3', "c"),
        b'4',
        "b",
    );
    check(
        &[mixed
            .entry(b'7', "contiguous", "", b"1")
            .entry(b'0', "v7/", "", b"")],
        &[
            "b b8:300",
            "c c8:300",
            "contiguous = 1",
            "l -> /x/y",
            "p p",
            "v7/ 644",
        ],
    );
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    let lower = tar().file("d/a", "1").file("d/b", "1").file("d/e/c", "1");
    check(
        &[lower.clone(), tar().file("d/.wh.a", "")],
        &["d/ 755", "d/b = 1", "d/e/ 755", "d/e/c = 1"],
    );
    check(&[lower.clone(), tar().file(".wh.d", "")], &[]);
    check(
        &[lower.clone(), tar().file(".wh.none", "").file("no/.wh.x", "")],
        &["d/ 755", "d/a = 1", "d/b = 1", "d/e/ 755", "d/e/c = 1"],
    );
    // The same whatever the order within the layer.
    let parts: [fn(Tar) -> Tar; 2] = [|tar| tar.file("d/.wh.a", ""), |tar| tar.file("d/a", "2")];
    for order in [[0, 1], [1, 0]] {
        let upper = order.iter().fold(tar(), |tar, part| parts[*part](tar));
        check(
            &[lower.clone(), upper],
            &["d/ 755", "d/a = 2", "d/b = 1", "d/e/ 755", "d/e/c = 1"],
        );
    }
    let parts: [fn(Tar) -> Tar; 2] = [|tar| tar.file("d/.wh..wh..opq", ""), |tar| tar.file("d/e/x", "2")];
    for order in [[0, 1], [1, 0]] {
        let upper = order.iter().fold(tar(), |tar, part| parts[*part](tar));
        check(&[lower.clone(), upper], &["d/ 755", "d/e/ 755", "d/e/x = 2"]);
    }
    check(
        &[lower.clone(), tar().file(".wh..wh..opq", "").file("x", "2")],
        &["x = 2"],
    );
    check(
        &[lower.clone(), tar().dir("d").file("d/.wh..wh..opq", "")],
        &["d/ 700"],
    );
    // The opaque folder is this layer's, and replaces a link: what the link pointed to stays.
    check(
        &[
            tar().file("real/a", "1").symlink("d", "real"),
            tar().dir("d").file("d/.wh..wh..opq", ""),
        ],
        &["d/ 700", "real/ 755", "real/a = 1"],
    );
    check(
        &[
            lower,
            tar().file(".wh..wh.plnk/1.2", "x").file("d/.wh..wh.aufs", ""),
        ],
        &["d/ 755", "d/a = 1", "d/b = 1", "d/e/ 755", "d/e/c = 1"],
    );
}

#[test]
fn hard_links_are_names_of_one_file() {
    check(
        &[tar().file("a", "1").link("b", "a").link("d/c", "./b")],
        &["a = 1 x3", "b = 1 x3", "d/ 755", "d/c = 1 x3"],
    );
    check(
        &[tar().file("a", "1"), tar().link("b", "a")],
        &["a = 1 x2", "b = 1 x2"],
    );
    check(
        &[tar().file("a", "1").link("b", "a"), tar().file("a", "2")],
        &["a = 2", "b = 1"],
    );
    check(
        &[tar().file("a", "1").link("b", "a"), tar().file(".wh.a", "")],
        &["b = 1"],
    );
    check(&[tar().file("a", "1").link("a", "a")], &["a = 1"]);
    check(
        &[tar().symlink("s", "x").link("t", "s")],
        &["s -> x x2", "t -> x x2"],
    );
    check(
        &[tar().file("d/a", "1").symlink("s", "d").link("b", "s/a")],
        &["b = 1 x2", "d/ 755", "d/a = 1 x2", "s -> d"],
    );
    // The new name stands where the folder stood that held the old one.
    check(&[tar().file("d/a", "1"), tar().link("d", "d/a")], &["d = 1"]);
}

#[test]
fn entries_below_links_stay_inside() {
    let expected = ["lib -> usr/lib", "usr/ 755", "usr/lib/ 755", "usr/lib/x = 1"];
    check(
        &[
            tar().dir("usr/lib").symlink("lib", "usr/lib"),
            tar().dir("usr/lib").file("lib/x", "1"),
        ],
        &["lib -> usr/lib", "usr/ 755", "usr/lib/ 700", "usr/lib/x = 1"],
    );
    check(
        &[
            tar()
                .file("usr/lib/y", "")
                .symlink("lib", "usr/lib")
                .file("lib/x", "1"),
            tar().file("lib/.wh.y", ""),
        ],
        &expected,
    );
    check(
        &[tar()
            .file("usr/lib/x", "0")
            .symlink("a/b/c", "/usr/./lib/")
            .file("a/b/c/x", "1")],
        &[
            "a/ 755",
            "a/b/ 755",
            "a/b/c -> /usr/./lib/",
            "usr/ 755",
            "usr/lib/ 755",
            "usr/lib/x = 1",
        ],
    );
    check(
        &[tar().file("b/y", "0").symlink("a/l", "../b").file("a/l/n/x", "1")],
        &[
            "a/ 755",
            "a/l -> ../b",
            "b/ 755",
            "b/n/ 755",
            "b/n/x = 1",
            "b/y = 0",
        ],
    );
}

#[track_caller]
fn refuse(layers: &[Tar], expected: &str) {
    let layers: Vec<_> = layers.iter().map(|tar| tar.clone().end()).collect();
    let error = merge(&layers).err().expect("the layers were taken");
    let LayerError::Entry { entry, source, .. } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(format!("{entry}: {source}"), expected);
    assert_eq!(error.kind(), ErrorKind::BadContent);
    assert!(!error.hints().is_empty());
}

#[test]
fn what_leads_outside_is_refused() {
    refuse(
        &[tar().file("../x", "")],
        "../x: its name leads out of the image with `..`",
    );
    refuse(&[tar().file("/etc/x", "")], "/etc/x: its name is absolute");
    refuse(
        &[tar().symlink("l", "../../etc"), tar().file("l/x", "")],
        "l/x: it lies below the symbolic link `l`, whose target `../../etc` leads out of the image",
    );
    refuse(
        &[tar().symlink("l", "/../etc").file("l/x", "")],
        "l/x: it lies below the symbolic link `l`, whose target `/../etc` leads out of the image",
    );
    refuse(
        &[tar().symlink("l", "none/e").file("l/x", "")],
        "l/x: it lies below the symbolic link `l`, whose target `none/e` does not exist",
    );
    refuse(
        &[tar().symlink("a", "b").symlink("b", "a").file("a/x", "")],
        "a/x: it lies below symbolic links that lead in a circle",
    );
    refuse(
        &[tar().file("a", "").file("a/x", "")],
        "a/x: it lies below `a`, which is not a folder",
    );
    refuse(
        &[tar().link("a", "none")],
        "a: it is a hard link to `none`, which does not exist",
    );
    refuse(
        &[tar().link("a", "../x")],
        "a: it is a hard link to `../x`, which lies outside the image",
    );
    refuse(
        &[tar().dir("d").link("a", "d")],
        "a: it is a hard link to `d`, which is a folder",
    );
    refuse(
        &[tar().link("a", ".")],
        "a: it is a hard link to `.`, which is a folder",
    );
    refuse(
        &[tar().file("a", "").link(".", "a")],
        ".: the root of the image can only be a folder",
    );
    refuse(
        &[tar().symlink(".", "x")],
        ".: the root of the image can only be a folder",
    );
    refuse(
        &[tar().file("a/.wh.", "")],
        "a/.wh.: it is a whiteout of no proper name",
    );
    refuse(
        &[tar().pax(&[("path", b"a\0b")]).file("x", "")],
        "a\\u{0}b: a NUL byte is in its name or target",
    );
    refuse(
        &[tar().pax(&[("SCHILY.xattr.x", b"")]).file("x", "")],
        "x: its extended attribute `x` has no proper name",
    );
}

#[test]
fn depth_is_limited_also_through_links() {
    let deep = vec!["d"; 250].join("/");
    let one = tar()
        .pax(&[("path", deep.as_bytes())])
        .dir("x")
        .pax(&[("linkpath", deep.as_bytes())])
        .symlink("l", "x");
    let below = |times: usize| format!("l/{}/f", vec![deep.as_str(); times].join("/"));
    let (fits, not) = (below(1), below(3));
    let (tree, _) = merge(&[one.clone().pax(&[("path", fits.as_bytes())]).file("x", "1").end()]).unwrap();
    assert_eq!(tree.inode_count(), 1 + 250 + 250 + 2);
    refuse(
        &[one.pax(&[("path", not[..].as_bytes())]).file("x", "1")],
        &format!("{}…: it lies more than 512 folders deep", &not[..160]),
    );
}

#[test]
fn extended_headers_change_the_entry_that_follows() {
    let long = format!("{}/n", vec!["long"; 100].join("/"));
    let capability = b"\x01\0\0\x02\n\x0a=1\n\0".as_slice();
    let layer = tar()
        .pax(&[
            ("path", long.as_bytes()),
            ("uid", b"3000000000"),
            ("gid", b"7"),
            ("mtime", b"-1.25"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.trusted.overlay.redirect", b"x"),
        ])
        .file("short", "1")
        .entry(b'L', "././@LongLink", "", format!("{long}2\0").as_bytes())
        .entry(b'K', "././@LongLink", "", format!("{long}\0").as_bytes())
        .link("short", "short")
        .entry(b'g', "pax_global_header", "", b"18 comment=0123ab\n")
        .file("next", "2");
    let (tree, sink) = merge(&[layer.end()]).unwrap();
    let lines = list(&tree, &sink);
    assert_eq!(
        lines[100..],
        [
            format!("{long} = 1 x2"),
            format!("{long}2 = 1 x2"),
            "next = 2".into()
        ][..]
    );
    let file = (0..tree.table_len() as u32)
        .map(|n| tree.inode(InodeId(n)))
        .find(|inode| inode.names == 2)
        .unwrap();
    let Metadata {
        uid,
        gid,
        mtime,
        xattrs,
        ..
    } = &file.metadata;
    assert_eq!(
        (*uid, *gid, *mtime),
        (
            3_000_000_000,
            7,
            Time {
                seconds: -2,
                nanos: 750_000_000
            }
        )
    );
    let xattrs: Vec<_> = xattrs
        .as_ref()
        .unwrap()
        .iter()
        .map(|(name, value)| (&**name, &**value))
        .collect();
    assert_eq!(xattrs, [(&b"security.capability"[..], capability)]);
}

#[test]
fn damage_is_named() {
    let whole = tar().file("a", &"x".repeat(2000)).file("b", "y").end();
    let damaged = |tar: &[u8]| {
        let mut budget = Budget::new(Limits::default());
        read(
            tar,
            tar,
            Compression::None,
            &mut budget,
            &mut Memory::default(),
            FREE,
        )
        .unwrap_err()
    };
    let check = |tar: &[u8], at: u64, problem: TarProblem| {
        let error = damaged(tar);
        let LayerError::Tar { offset, source, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!((*offset, source), (at, &problem));
    };
    check(&whole[..1000], 1000, TarProblem::Truncated);
    check(&whole[..2600], 2600, TarProblem::Truncated);
    check(&whole[..100], 100, TarProblem::Truncated);
    let mut flipped = whole.clone();
    flipped[2562] ^= 1;
    check(&flipped, 2560, TarProblem::Checksum);
    check(
        &tar().entry(b'M', "a", "", b"").end(),
        512,
        TarProblem::UnknownType { flag: b'M' },
    );
    check(
        &tar().entry(b'x', "a", "", b"nonsense").file("b", "").end(),
        520,
        TarProblem::Pax,
    );
    check(
        &tar().raw(b'x', "a", "", b"", |h| h.set_size(2 << 20)).end(),
        512,
        TarProblem::HeaderTooLarge { limit: 1 << 20 },
    );
    check(
        &tar().pax(&[("path", b"x")]).end(),
        1536,
        TarProblem::NothingDescribed,
    );
    check(
        &tar().pax(&[("size", b"x")]).file("a", "").end(),
        1536,
        TarProblem::Number { field: "size" },
    );
    check(
        &tar()
            .raw(b'0', "a", "", b"", |h| h.as_old_mut().uid = *b"99999999")
            .end(),
        512,
        TarProblem::Number { field: "owner" },
    );
    check(
        &tar().raw(b'V', "a", "", b"", |h| h.set_size(u64::MAX >> 2)).end(),
        1536,
        TarProblem::Truncated,
    );
    // An archive may end without its two blocks of zeros, as GNU tar allows; a wrong digest shows what is missing.
    let mut budget = Budget::new(Limits::default());
    let cut = &whole[..whole.len() - 1024];
    read(
        cut,
        cut,
        Compression::None,
        &mut budget,
        &mut Memory::default(),
        FREE,
    )
    .unwrap();
    let error = read(
        cut,
        &whole,
        Compression::None,
        &mut budget,
        &mut Memory::default(),
        FREE,
    )
    .unwrap_err();
    assert!(matches!(error, LayerError::DiffId { .. }), "{error:?}");
}

#[test]
fn compressed_layers_are_read_member_by_member() {
    let tar = tar().file("a", &"x".repeat(700_000)).file("b", "y").end();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Level::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap();
    let (one, two) = tar.split_at(300_000);
    let skippable = [
        &[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3],
        zstd(&tar).as_slice(),
    ]
    .concat();
    for (blob, compression) in [
        (gzip(&tar), Compression::Gzip),
        ([gzip(one), gzip(two)].concat(), Compression::Gzip),
        (zstd(&tar), Compression::Zstd),
        ([zstd(one), zstd(two)].concat(), Compression::Zstd),
        (skippable, Compression::Zstd),
    ] {
        let read = |blob: &[u8]| {
            let mut sink = Memory::default();
            read(
                blob,
                &tar,
                compression,
                &mut Budget::new(Limits::default()),
                &mut sink,
                FREE,
            )
            .map(|_| sink.files)
        };
        let files = read(&blob).unwrap();
        assert_eq!((files[0].len(), files[1].as_slice()), (700_000, &b"y"[..]));
        let error = read(&blob[..blob.len() - 3]).unwrap_err();
        assert!(matches!(error, LayerError::Read { .. }), "{error:?}");
        assert_eq!(error.kind(), ErrorKind::BadContent);
        let error = read(&tar).unwrap_err();
        assert!(matches!(error, LayerError::Read { .. }), "{error:?}");
    }
}

#[test]
fn limits_hold() {
    let limited = |entries, bytes, tar: Vec<u8>| {
        let limits = Limits {
            entries,
            bytes: ByteSize::from_bytes(bytes),
        };
        read(
            &tar,
            &tar,
            Compression::None,
            &mut Budget::new(limits),
            &mut Memory::default(),
            FREE,
        )
    };
    let two = || tar().file("a", "123").file("b", "456").end();
    assert_eq!(limited(2, 6, two()).unwrap().len(), 2);
    assert!(matches!(
        limited(1, 1 << 20, two()),
        Err(LayerError::TooManyEntries { limit: 1, .. })
    ));
    assert!(matches!(
        limited(2, 5, two()),
        Err(LayerError::TooManyBytes { .. })
    ));
    // What is no file's content counts too.
    let padded = [two(), vec![0; 1 << 20]].concat();
    assert!(matches!(
        limited(2, 6, padded),
        Err(LayerError::TooManyBytes { .. })
    ));
    // A hole counts with its size: nobody may claim an exabyte.
    let hole = tar()
        .pax(&[
            ("GNU.sparse.size", b"1000000000000000000"),
            ("GNU.sparse.map", b""),
        ])
        .file("a", "");
    assert!(matches!(
        limited(2, 1 << 30, hole.end()),
        Err(LayerError::TooManyBytes { .. })
    ));
}

#[test]
fn reading_stops_when_it_is_told_to() {
    let tar = tar().file("a", &"x".repeat(5 << 20)).end();
    let calls = std::sync::atomic::AtomicUsize::new(0);
    let cancelled = || calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed) > 3;
    let watch = Watch {
        cancelled: &cancelled,
        moved: &|_| (),
    };
    let mut budget = Budget::new(Limits::default());
    let error = read(
        &tar,
        &tar,
        Compression::None,
        &mut budget,
        &mut Memory::default(),
        watch,
    )
    .unwrap_err();
    assert!(matches!(error, LayerError::Cancelled { .. }), "{error:?}");
}

#[test]
fn progress_counts_the_blob() {
    let tar = tar().file("a", &"x".repeat(5 << 20)).end();
    let seen = std::sync::Mutex::new(Vec::new());
    let watch = Watch {
        cancelled: &|| false,
        moved: &|done| seen.lock().unwrap().push(done),
    };
    read(
        &tar,
        &tar,
        Compression::None,
        &mut Budget::new(Limits::default()),
        &mut Memory::default(),
        watch,
    )
    .unwrap();
    let seen = seen.into_inner().unwrap();
    assert!((5..8).contains(&seen.len()) && seen.is_sorted(), "{seen:?}");
    assert_eq!(seen.last(), Some(&(tar.len() as u64)));
}

/// Makes a tar of `dir` with GNU tar.
fn gnu_tar(dir: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(arguments)
        .args(["-c", "-C"])
        .arg(dir)
        .arg(".")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

#[test]
fn sparse_files_of_every_format_read_whole() {
    use std::os::unix::fs::FileExt;

    let dir = tempfile::tempdir().unwrap();
    let sparse = |name: &str, len: u64, pieces: &[u64]| {
        let file = File::create(dir.path().join(name)).unwrap();
        file.set_len(len).unwrap();
        for at in pieces {
            file.write_all_at(b"data", *at).unwrap();
        }
    };
    sparse("start", 3 << 20, &[0]);
    sparse("end", (3 << 20) + 4, &[3 << 20]);
    sparse(
        "many",
        8 << 20,
        &(0..60).map(|n| n * 131_072 + 5000).collect::<Vec<_>>(),
    );
    sparse("empty", 1 << 20, &[]);
    std::fs::write(dir.path().join("full"), "full").unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let tar = gnu_tar(dir.path(), &[format, &["-S"]].concat());
        assert!(tar.len() < 1 << 20, "{format:?} is not sparse: {}", tar.len());
        let (tree, sink) = merge(&[tar]).unwrap();
        let names: Vec<_> = tree.children(Tree::ROOT).collect();
        assert_eq!(names.len(), 5, "{format:?}: {names:?}");
        for (name, id) in names {
            let Node::File { size, extent } = tree.inode(id).node else {
                panic!("{format:?}")
            };
            let name = std::str::from_utf8(name).unwrap();
            let expected = std::fs::read(dir.path().join(name)).unwrap();
            assert!(
                expected.len() as u64 == size && sink.files[extent.0 as usize] == expected,
                "{format:?} {name}"
            );
        }
    }
}

#[test]
fn other_writers_headers_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("a".repeat(90)).join("b".repeat(90));
    std::fs::create_dir_all(&deep).unwrap();
    std::fs::write(deep.join("file"), "1").unwrap();
    for format in ["v7", "oldgnu", "gnu", "ustar", "pax"] {
        if format == "v7" {
            // No place for such a name: only the short one.
            std::fs::write(dir.path().join("short"), "1").unwrap();
            let (tree, _) = merge(&[gnu_tar(dir.path(), &["--format=v7", "--exclude=aaa*"])]).unwrap();
            assert_eq!(tree.children(Tree::ROOT).count(), 1);
            std::fs::remove_file(dir.path().join("short")).unwrap();
            continue;
        }
        let (tree, sink) = merge(&[gnu_tar(dir.path(), &[&format!("--format={format}")])]).unwrap();
        let lines = list(&tree, &sink);
        assert_eq!(
            lines[2],
            format!("{}/{}/file = 1", "a".repeat(90), "b".repeat(90)),
            "{format}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bytes_from_anywhere_do_no_harm(start in any::<Vec<u8>>(), flips in prop::collection::vec((0..3000_usize, any::<u8>()), 0..20)) {
        let layer = tar()
            .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9")])
            .file("a", &format!("1\n3\n2\n{}ab", "\0".repeat(506)))
            .symlink("l", "a")
            .file("l/.wh.x", "");
        let mut bytes = [start, layer.end()].concat();
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
            // Mend the checksum, or nothing but checksums is tested.
            let block = at / 512 * 512;
            if block + 512 <= bytes.len() {
                let mut header = tar::Header::from_byte_slice(&bytes[block..block + 512]).clone();
                header.set_cksum();
                bytes[block..block + 512].copy_from_slice(header.as_bytes());
            }
        }
        // Any result will do: the point is that there is one.
        let _ = merge(&[bytes]);
    }

    #[test]
    fn whiteouts_work_wherever_they_stand(
        lower in prop::collection::vec("(d[12]/){0,3}f[12]", 1..12),
        upper in prop::collection::vec("(d[12]/){0,3}f[12]", 0..6),
        hidden in prop::collection::vec("(d[12]/){0,2}(\\.wh\\.[df][12]|\\.wh\\.\\.wh\\.\\.opq)", 0..4),
    ) {
        let put = |tar: Tar, names: &[String], content: &str| names.iter().fold(tar, |tar, name| tar.file(name, content));
        let lower = put(tar(), &lower, "1").end();
        let before = put(put(tar(), &hidden, ""), &upper, "2").end();
        let after = put(put(tar(), &upper, "2"), &hidden, "").end();
        let [before, after] = [before, after].map(|upper| {
            let (tree, sink) = merge(&[lower.clone(), upper]).unwrap();
            list(&tree, &sink)
        });
        prop_assert_eq!(&before, &after);
        for name in upper {
            let line = format!("{name} = 2");
            prop_assert!(before.contains(&line), "{} is missing in {:?}", line, before);
        }
    }
}
