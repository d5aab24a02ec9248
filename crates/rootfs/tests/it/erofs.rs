//! Our EROFS images, read by the host's kernel and by `fsck.erofs`.

use std::io::{Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use offshoot_image::layer::{Budget, LayerSource, Limits, Tree, Watch, read_layer};
use offshoot_image::manifest::{Compression, StoredLayer};
use offshoot_rootfs::erofs::{DataWriter, SpaceGuard};
use proptest::prelude::*;

use crate::support::{Mount, Tar, can_run, fsck, list, sha256};

/// Makes the image of some layers in `dir`.
pub(crate) fn make(dir: &Path, tars: &[Vec<u8>]) -> PathBuf {
    make_with_tree(dir, tars).0
}

/// Makes the image of some layers in `dir`; gives the tree it was made from, too.
pub(crate) fn make_with_tree(dir: &Path, tars: &[Vec<u8>]) -> (PathBuf, Tree) {
    let path = dir.join(format!("image-{}", std::fs::read_dir(dir).unwrap().count()));
    let mut writer = DataWriter::create(&path, SpaceGuard { reserve: 0 }).unwrap();
    let mut tree = Tree::new();
    let mut budget = Budget::new(Limits::default());
    for tar in tars {
        let mut blob = tempfile::tempfile().unwrap();
        blob.write_all(tar).unwrap();
        blob.rewind().unwrap();
        let digest = sha256(tar);
        let layer = StoredLayer {
            digest,
            size: tar.len() as u64,
            diff_id: digest,
            compression: Compression::None,
        };
        let watch = Watch {
            cancelled: &|| false,
            moved: &|_| (),
        };
        tree.apply(
            read_layer(
                LayerSource { layer: &layer, blob },
                &mut budget,
                &mut writer,
                watch,
            )
            .unwrap(),
        )
        .unwrap();
    }
    let written = writer.finish(&tree, [7; 16]).unwrap();
    assert_eq!(written.inodes, tree.inode_count() as u64);
    assert_eq!(written.size, std::fs::metadata(&path).unwrap().len());
    assert_eq!(written.size % (2 << 20), 0);
    (path, tree)
}

/// A layer with a file of every kind, one with an attribute of `xattr` bytes.
pub(crate) fn every_kind(xattr: usize) -> Tar {
    let device = |tar: Tar, flag, name: &str, major, minor| {
        tar.raw(flag, name.as_bytes(), b"", b"", |header| {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        })
    };
    let mut tar = Tar::default()
        .raw(b'5', b".", b"", b"", |header| header.set_mode(0o1777))
        .pax(&[("mtime", b"-5.000000001"), ("uid", b"4000000000")])
        .file("old", "x")
        .file("empty", "")
        .file("block", [1; 4096])
        .file("block-and-one", [2; 4097])
        .entry(b'2', "link", "/target", b"")
        .raw(b'2', b"long-link", &[b't'; 4095], b"", |_| ())
        .entry(b'6', "fifo", "", b"")
        .entry(b'1', "d/other-old", "old", b"")
        .pax(&[
            ("SCHILY.xattr.user.a", &vec![b'v'; xattr]),
            ("SCHILY.xattr.user.empty", b""),
            (
                "SCHILY.xattr.security.capability",
                b"\x01\0\0\x02\0\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            ),
            ("SCHILY.xattr.trusted.t", b"\0"),
        ])
        .raw(b'5', b"with-attributes", b"", b"", |header| {
            header.set_mode(0o2750);
        });
    tar = device(tar, b'3', "null", 1, 3);
    tar = device(tar, b'4', "disk", 259, 70_000);
    // Names on both sides of `.` and `..` in the order of bytes.
    for name in ["!", "-", "..x", ".x", "/", "\u{e9}", "~"] {
        tar = tar.file(&format!("order/{name}n"), name);
    }
    tar
}

#[test]
fn the_kernel_reads_every_kind_of_file() {
    if !can_run("the_kernel_reads_every_kind_of_file", &["mount", "fsck.erofs"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = make(dir.path(), &[every_kind(5000).end()]);
    fsck(&image);
    let mount = Mount::erofs(&image);
    let all = list(mount.path());
    let get = |name: &str| &all[&PathBuf::from(format!("./{name}"))];
    assert_eq!(all[Path::new(".")].mode, 0o041_777);
    assert_eq!(
        (get("old").mtime, get("old").owner, get("old").links),
        ((-6, 999_999_999), (4_000_000_000, 0), 2)
    );
    assert_eq!(get("d/other-old").same_as, PathBuf::from("./d/other-old"));
    assert_eq!(get("old").same_as, PathBuf::from("./d/other-old"));
    assert_eq!(
        std::fs::read(mount.path().join("block-and-one")).unwrap(),
        [2; 4097]
    );
    assert_eq!(get("link").content, "/target");
    assert_eq!(get("long-link").content.len(), 4095);
    assert_eq!(get("fifo").mode, 0o010_644);
    assert_eq!(
        (get("null").mode, get("null").device),
        (0o020_644, rustix::fs::makedev(1, 3))
    );
    assert_eq!(
        (get("disk").mode, get("disk").device),
        (0o060_644, rustix::fs::makedev(259, 70_000))
    );
    let with = get("with-attributes");
    assert_eq!((with.mode, with.xattrs.len()), (0o042_750, 4));
    assert_eq!(with.xattrs[std::ffi::OsStr::new("user.a")], [b'v'; 5000]);
    assert_eq!(with.xattrs[std::ffi::OsStr::new("security.capability")][5], 0x0a);
    assert_eq!(std::fs::read_dir(mount.path().join("order")).unwrap().count(), 7);
    assert_eq!(std::fs::metadata(mount.path()).unwrap().nlink(), 2 + 3);
}

#[test]
fn what_is_gone_or_zero_takes_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let large = vec![1; 20 << 20];
    let lower = Tar::default()
        .file("a", &large)
        .file("zeros", vec![0; 20 << 20])
        .file("b", "kept");
    let upper = Tar::default()
        .file(".wh.a", "")
        .file("twice", &large[..8 << 20])
        .file("twice", "small");
    let image = make(dir.path(), &[lower.end(), upper.end()]);
    let metadata = std::fs::metadata(&image).unwrap();
    assert!(metadata.len() > 48 << 20);
    assert!(
        metadata.blocks() * 512 < 1 << 20,
        "{} bytes",
        metadata.blocks() * 512
    );
}

#[test]
fn the_same_layers_give_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let tars = || {
        let lower = (0..300).fold(Tar::default(), |tar, n| {
            tar.file(&format!("d{}/f{n}", n % 7), vec![n as u8; n * 37])
        });
        [
            lower.end(),
            Tar::default().file("d1/.wh..wh..opq", "").file("x", "y").end(),
        ]
    };
    let (one, two) = (make(dir.path(), &tars()), make(dir.path(), &tars()));
    assert!(std::fs::read(one).unwrap() == std::fs::read(two).unwrap());
}

#[test]
fn a_hundred_thousand_small_files() {
    if !can_run("a_hundred_thousand_small_files", &["mount", "fsck.erofs"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut tar = Tar::default();
    for n in 0..100_000_u32 {
        // One folder with ten thousand, the others with ninety each.
        let name = if n % 10 == 0 {
            format!("large/file-{n}")
        } else {
            format!("d/{:03}/{n}", n % 1000)
        };
        tar = tar.file(&name, n.to_le_bytes());
    }
    let image = make(dir.path(), &[tar.end()]);
    fsck(&image);
    let mount = Mount::erofs(&image);
    assert_eq!(
        std::fs::read_dir(mount.path().join("large")).unwrap().count(),
        10_000
    );
    for n in (0..100_000_u32).step_by(331) {
        let name = if n % 10 == 0 {
            format!("large/file-{n}")
        } else {
            format!("d/{:03}/{n}", n % 1000)
        };
        assert_eq!(std::fs::read(mount.path().join(name)).unwrap(), n.to_le_bytes());
    }
    assert!(!mount.path().join("large/file-1").exists());
}

#[test]
fn a_full_disk_is_seen_before_it_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let available = offshoot_sys::space::available(dir.path()).unwrap();
    let error = DataWriter::create(&path, SpaceGuard { reserve: available }).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    assert!(error.to_string().contains("kept free"), "{error}");
}

/// A file of a random tree.
#[derive(Clone, Debug)]
pub(crate) enum Made {
    File { size: usize, seed: u8 },
    Link(usize),
    Dirs(usize, usize),
    Xattrs(usize),
}

pub(crate) fn made() -> impl Strategy<Value = Made> {
    let size = prop_oneof![
        0..10_000_usize,
        Just(4096),
        Just(8192),
        (1..40_usize).prop_map(|n| n * 4096 + n % 3)
    ];
    prop_oneof![
        4 => (size, any::<u8>()).prop_map(|(size, seed)| Made::File { size, seed }),
        2 => (1..4096_usize).prop_map(Made::Link),
        2 => (1..400_usize, 1..250_usize).prop_map(|(count, len)| Made::Dirs(count, len)),
        1 => (0..60_000_usize).prop_map(Made::Xattrs),
    ]
}

pub(crate) fn content(size: usize, seed: u8) -> Vec<u8> {
    (0..size)
        .map(|n| (n / 4096 % 3 * usize::from(seed)) as u8)
        .collect()
}

/// A layer with the files of a random tree, called by their number.
pub(crate) fn tar_of(tree: &[Made]) -> Tar {
    let mut tar = Tar::default();
    for (n, made) in tree.iter().enumerate() {
        let name = format!("{n}");
        tar = match made {
            Made::File { size, seed } => tar.file(&name, content(*size, *seed)),
            Made::Link(len) => tar.raw(b'2', name.as_bytes(), &vec![b'l'; *len], b"", |_| ()),
            Made::Dirs(count, len) => (0..*count).fold(tar, |tar, m| tar.dir(&format!("{name}/{m:0len$}"))),
            Made::Xattrs(len) => tar
                .pax(&[
                    ("SCHILY.xattr.user.x", &vec![b'x'; *len]),
                    ("SCHILY.xattr.user.y", b"y"),
                ])
                .dir(&name),
        };
    }
    tar
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_reads_back(tree in prop::collection::vec(made(), 1..40)) {
        if !can_run("any_tree_reads_back", &["mount", "fsck.erofs"]) {
            return Ok(());
        }
        let tar = tar_of(&tree);
        let dir = tempfile::tempdir().unwrap();
        let image = make(dir.path(), &[tar.end()]);
        fsck(&image);
        let mount = Mount::erofs(&image);
        for (n, made) in tree.iter().enumerate() {
            let path = mount.path().join(n.to_string());
            match made {
                Made::File { size, seed } => prop_assert!(std::fs::read(&path).unwrap() == content(*size, *seed)),
                Made::Link(len) => prop_assert_eq!(std::fs::read_link(&path).unwrap().as_os_str().len(), *len),
                Made::Dirs(count, len) => {
                    prop_assert_eq!(std::fs::read_dir(&path).unwrap().count(), *count);
                    for m in 0..*count {
                        let name = format!("{m:0len$}");
                        prop_assert!(path.join(name).is_dir());
                    }
                    prop_assert_eq!(std::fs::metadata(&path).unwrap().nlink(), 2 + *count as u64);
                }
                Made::Xattrs(len) => {
                    let mut value = vec![0_u8; 70_000];
                    prop_assert_eq!(rustix::fs::getxattr(&path, "user.x", &mut value[..]).unwrap(), *len);
                    prop_assert!(value[..*len].iter().all(|byte| *byte == b'x'));
                    prop_assert_eq!(rustix::fs::getxattr(&path, "user.y", &mut value[..]).unwrap(), 1);
                }
            }
        }
    }
}

#[test]
fn the_superblock_has_its_checksum() {
    let dir = tempfile::tempdir().unwrap();
    let image = make(dir.path(), &[Tar::default().file("a", "b").end()]);
    let mut block = vec![0; 4096 - 1024];
    std::fs::File::open(&image)
        .unwrap()
        .read_exact_at(&mut block, 1024)
        .unwrap();
    assert_eq!(block[..4], 0xE0F5_E1E2_u32.to_le_bytes());
    let stored = u32::from_le_bytes(block[4..8].try_into().unwrap());
    block[4..8].fill(0);
    assert_eq!(stored, !crc32c::crc32c(&block));
}
