//! Our EROFS images, read back by our own reader: what was written, and whatever else a disk may give.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use offshoot_image::layer::{InodeId, Node, Tree};
use offshoot_rootfs::erofs::{ErofsImage, ErofsReadError, Inode, InodeKind, Step};
use proptest::prelude::*;

use crate::erofs::{Made, content, every_kind, made, make, make_with_tree, tar_of};
use crate::support::Tar;

/// All names of an image by their path.
fn names(image: &ErofsImage) -> Result<BTreeMap<PathBuf, Inode>, ErofsReadError> {
    let mut names = BTreeMap::new();
    for step in image.walk()? {
        match step? {
            Step::Enter { path, dir } => names.insert(path.to_path_buf(), dir),
            Step::Entry { path, inode, .. } => names.insert(path, inode),
            Step::Leave { .. } => continue,
        };
    }
    Ok(names)
}

fn all(image: &ErofsImage, file: &Inode) -> Result<Vec<u8>, ErofsReadError> {
    let mut bytes = vec![0; usize::try_from(file.size).unwrap()];
    // In steps that do not fall on blocks.
    let mut at = 0;
    while at < bytes.len() {
        let end = bytes.len().min(at + 5000);
        at += image.read_at(file, &mut bytes[at..end], at as u64)?;
    }
    Ok(bytes)
}

/// Compares what is read with the tree that was written.
fn check_inode(
    names: &mut BTreeMap<PathBuf, Inode>,
    image: &ErofsImage,
    tree: &Tree,
    path: &Path,
    id: InodeId,
) {
    let (found, expected) = (names.remove(path).unwrap(), tree.inode(id));
    assert_eq!(found.metadata, expected.metadata, "{}", path.display());
    match &expected.node {
        Node::Dir(children) => {
            assert_eq!(found.kind, InodeKind::Dir);
            let dirs = children
                .values()
                .filter(|child| matches!(tree.inode(child.inode).node, Node::Dir(_)));
            assert_eq!(found.links as usize, 2 + dirs.count());
            for (name, child) in tree.children(id) {
                check_inode(
                    names,
                    image,
                    tree,
                    &path.join(std::ffi::OsStr::from_bytes(name)),
                    child,
                );
            }
            return;
        }
        Node::File { size, .. } => assert_eq!((found.kind, found.size), (InodeKind::File, *size)),
        Node::Symlink(target) => assert_eq!(image.read_link(&found).unwrap(), **target),
        Node::CharDev { major, minor } => {
            let (major, minor) = (*major, *minor);
            assert_eq!(found.kind, InodeKind::CharDev { major, minor });
        }
        Node::BlockDev { major, minor } => {
            let (major, minor) = (*major, *minor);
            assert_eq!(found.kind, InodeKind::BlockDev { major, minor });
        }
        Node::Fifo => assert_eq!(found.kind, InodeKind::Fifo),
    }
    assert_eq!(found.links, expected.names, "{}", path.display());
}

fn check_all(path: &Path, tree: &Tree) -> (ErofsImage, BTreeMap<PathBuf, Inode>) {
    let image = ErofsImage::open(path).unwrap();
    let all = names(&image).unwrap();
    let mut left = all.clone();
    check_inode(&mut left, &image, tree, Path::new(""), Tree::ROOT);
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(image.inodes(), tree.inode_count() as u64);
    (image, all)
}

#[test]
fn every_kind_of_file_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let (path, tree) = make_with_tree(dir.path(), &[every_kind(5000).end()]);
    let (image, names) = check_all(&path, &tree);
    let file = &names[Path::new("block-and-one")];
    assert_eq!(all(&image, file).unwrap(), [2; 4097]);
    assert_eq!(image.next_extent(file, 0).unwrap(), Some(0..4097));
    assert_eq!(image.next_extent(file, 4097).unwrap(), None);
    assert_eq!(image.read_at(file, &mut [0; 10], 4090).unwrap(), 7);
    assert_eq!(image.read_at(file, &mut [0; 10], 5000).unwrap(), 0);
    // Two names of one file: the first that the walk meets is the other's.
    let firsts: Vec<_> = image
        .walk()
        .unwrap()
        .filter_map(|step| match step.unwrap() {
            Step::Entry {
                path,
                first: Some(first),
                ..
            } => Some((path, first.to_path_buf())),
            _ => None,
        })
        .collect();
    assert_eq!(firsts, [(PathBuf::from("d/other-old"), PathBuf::from("old"))]);
    let root = image.root().unwrap();
    assert_eq!(
        image.lookup(&root, b"fifo").unwrap().unwrap().kind,
        InodeKind::Fifo
    );
    assert!(image.lookup(&root, b"none").unwrap().is_none());
    assert!(image.read_dir(file).is_err() && image.read_link(file).is_err());
}

#[test]
fn holes_are_known() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = vec![0; 10 << 20];
    bytes[4 << 20] = 1;
    let image = make(
        dir.path(),
        &[Tar::default()
            .file("sparse", &bytes)
            .file("zeros", vec![0; 9000])
            .end()],
    );
    let image = ErofsImage::open(&image).unwrap();
    let root = image.root().unwrap();
    let sparse = image.lookup(&root, b"sparse").unwrap().unwrap();
    let extent = image.next_extent(&sparse, 0).unwrap().unwrap();
    // A file system may keep larger blocks than ours.
    assert!(
        extent.contains(&(4 << 20)) && extent.end - extent.start <= 64 << 10,
        "{extent:?}"
    );
    assert_eq!(image.next_extent(&sparse, extent.end).unwrap(), None);
    assert!(all(&image, &sparse).unwrap() == bytes);
    let zeros = image.lookup(&root, b"zeros").unwrap().unwrap();
    assert_eq!(image.next_extent(&zeros, 0).unwrap(), None);
    assert_eq!(all(&image, &zeros).unwrap(), [0; 9000]);
}

/// Reads everything that an image lets itself be asked for.
fn read_everything(path: &Path) -> Result<usize, ErofsReadError> {
    let image = ErofsImage::open(path)?;
    let mut steps = 0;
    for step in image.walk()? {
        steps += 1;
        let Step::Entry { inode, .. } = step? else {
            continue;
        };
        match inode.kind {
            InodeKind::Symlink => drop(image.read_link(&inode)?),
            InodeKind::File => {
                // No size was believed: content lies within the image.
                assert!(inode.size <= std::fs::metadata(path).unwrap().len());
                all(&image, &inode)?;
                let mut at = 0;
                while let Some(extent) = image.next_extent(&inode, at)? {
                    assert!(at <= extent.start && extent.start < extent.end && extent.end <= inode.size);
                    at = extent.end;
                }
            }
            _ => {}
        }
    }
    Ok(steps)
}

/// Gives block 0 the checksum of what is in it.
fn sign(file: &std::fs::File) {
    let mut block = vec![0; 4096 - 1024];
    file.read_exact_at(&mut block, 1024).unwrap();
    block[4..8].fill(0);
    file.write_all_at(&(!crc32c::crc32c(&block)).to_le_bytes(), 1028)
        .unwrap();
}

#[test]
fn any_changed_byte_is_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut tar = every_kind(100).dir("many");
    for n in 0..70 {
        tar = tar.entry(b'2', &format!("many/{n:060}"), "x", b"");
    }
    let path = make(dir.path(), &[tar.end()]);
    let steps = read_everything(&path).unwrap();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mut block = [0; 128];
    file.read_exact_at(&mut block, 1024).unwrap();
    let number = |at: usize| u64::from(u32::from_le_bytes(block[at..at + 4].try_into().unwrap()));
    let (blocks, meta) = (number(36), number(40));
    // The superblock, the large folder, which stands before the metadata, and all metadata.
    let places: Vec<u64> = (1024..1152).chain((meta - 2) * 4096..blocks * 4096).collect();
    let (mut read, mut refused) = (0, 0);
    for (n, at) in places.iter().enumerate() {
        let mut before = [0];
        file.read_exact_at(&mut before, *at).unwrap();
        let mask = [1, 0x80, 0xff, 0x10][n % 4];
        if before == [0] && n % 16 > 2 {
            // Most of the metadata is zeros; some of them are enough.
            continue;
        }
        file.write_all_at(&[before[0] ^ mask], *at).unwrap();
        let is_superblock = *at < 4096;
        if is_superblock {
            assert!(
                read_everything(&path).is_err(),
                "byte {at} is not in the checksum"
            );
            sign(&file);
        }
        match read_everything(&path) {
            Ok(_) => read += 1,
            Err(error) => {
                assert!(error.to_string().contains("image-0"), "{error}");
                refused += 1;
            }
        }
        file.write_all_at(&before, *at).unwrap();
        if is_superblock {
            sign(&file);
        }
    }
    assert!(read > 100 && refused > 100, "{read} read, {refused} refused");
    assert_eq!(read_everything(&path).unwrap(), steps);
    for len in [0, 1024, 4096, meta * 4096, blocks * 4096 - 1] {
        file.set_len(len).unwrap();
        assert!(matches!(
            ErofsImage::open(&path),
            Err(ErofsReadError::Damaged { .. })
        ));
    }
    assert!(matches!(
        ErofsImage::open(dir.path()),
        Err(ErofsReadError::Damaged { .. })
    ));
}

#[test]
fn a_folder_within_itself_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = make(dir.path(), &[Tar::default().dir("a/b").end()]);
    let image = ErofsImage::open(&path).unwrap();
    let (root, a) = (
        image.root().unwrap(),
        names(&image).unwrap()[Path::new("a")].clone(),
    );
    let b = image.lookup(&a, b"b").unwrap().unwrap();
    // The entry of `b` in `a` is the only one with its number and the type of a folder before its own `.`.
    let mut bytes = std::fs::read(&path).unwrap();
    let entry = |nid: u64| nid.to_le_bytes();
    let places: Vec<usize> = (4096..bytes.len() - 12)
        .filter(|at| bytes[*at..at + 8] == entry(b.nid) && bytes[at + 10] == 2)
        .collect();
    assert_eq!(places.len(), 2, "the entry, and `.` of the folder itself");
    for nid in [root.nid, a.nid] {
        bytes[places[0]..places[0] + 8].copy_from_slice(&entry(nid));
        std::fs::write(&path, &bytes).unwrap();
        let error = names(&ErofsImage::open(&path).unwrap()).unwrap_err();
        assert!(
            error.to_string().ends_with("a folder has several names"),
            "{error}"
        );
    }
}

#[test]
fn what_is_too_deep_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let deep = |part: &str, levels: usize| vec![part; levels].join("/");
    let within = make(dir.path(), &[Tar::default().dir(&deep("d", 500)).end()]);
    assert_eq!(names(&ErofsImage::open(&within).unwrap()).unwrap().len(), 501);
    let long = "n".repeat(200);
    let beyond = make(dir.path(), &[Tar::default().dir(&deep(&long, 19)).end()]);
    let error = names(&ErofsImage::open(&beyond).unwrap()).unwrap_err();
    assert!(matches!(error, ErofsReadError::TooDeep { .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_written_is_read(tree in prop::collection::vec(made(), 1..40)) {
        let dir = tempfile::tempdir().unwrap();
        let (path, written) = make_with_tree(dir.path(), &[tar_of(&tree).end()]);
        let (image, names) = check_all(&path, &written);
        for (n, made) in tree.iter().enumerate() {
            if let Made::File { size, seed } = made {
                let file = &names[Path::new(&n.to_string())];
                prop_assert!(all(&image, file).unwrap() == content(*size, *seed));
            }
        }
    }
}
