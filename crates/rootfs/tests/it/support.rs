//! What the tests share: layers, images, mounts, and a list of all that a tree shows to a program.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use offshoot_image::manifest::{Compression, StoredImage, StoredLayer};
use offshoot_model::{Digest, ImageConfig};
use offshoot_store::blobs::BlobStore;
use sha2::{Digest as _, Sha256};

/// A layer written field by field, so that it can hold what no file system would.
#[derive(Clone, Default)]
pub(crate) struct Tar(Vec<u8>);

impl Tar {
    pub(crate) fn raw(
        mut self,
        flag: u8,
        name: &[u8],
        link: &[u8],
        content: &[u8],
        change: impl FnOnce(&mut tar::Header),
    ) -> Self {
        let mut records: Vec<(&str, &[u8])> = Vec::new();
        if name.len() > 100 {
            records.push(("path", name));
        }
        if link.len() > 100 {
            records.push(("linkpath", link));
        }
        self = self.pax(&records);
        let mut header = tar::Header::new_gnu();
        let (name, link) = (&name[..name.len().min(100)], &link[..link.len().min(100)]);
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(tar::EntryType::new(flag));
        header.set_mode(if flag == b'5' { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_size(content.len() as u64);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn entry(self, flag: u8, name: &str, link: &str, content: &[u8]) -> Self {
        self.raw(flag, name.as_bytes(), link.as_bytes(), content, |_| ())
    }

    pub(crate) fn file(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        self.entry(b'0', name, "", content.as_ref())
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.entry(b'5', name, "", b"")
    }

    pub(crate) fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        if !records.is_empty() {
            let mut builder = tar::Builder::new(Vec::new());
            builder.append_pax_extensions(records.iter().copied()).unwrap();
            let bytes = builder.into_inner().unwrap();
            // Without the two blocks that end an archive.
            self.0.extend_from_slice(&bytes[..bytes.len() - 1024]);
        }
        self
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Puts layers into the store: unpacked tars, every other one compressed.
pub(crate) fn store_image(blobs: &BlobStore, tars: &[Vec<u8>]) -> StoredImage {
    let layers: Vec<StoredLayer> = tars
        .iter()
        .enumerate()
        .map(|(n, tar)| {
            let (blob, compression) = match n % 2 {
                0 => (tar.clone(), Compression::None),
                _ => (gzip(tar), Compression::Gzip),
            };
            let digest = blobs.put(&blob).unwrap();
            StoredLayer {
                digest,
                size: blob.len() as u64,
                diff_id: sha256(tar),
                compression,
            }
        })
        .collect();
    let all: Vec<String> = layers.iter().map(|layer| layer.digest.to_string()).collect();
    StoredImage {
        digest: sha256(all.join("\n").as_bytes()),
        manifest_size: 0,
        config_digest: sha256(b""),
        config_size: 0,
        config: ImageConfig::default(),
        architecture: "amd64".into(),
        os: "linux".into(),
        created: None,
        labels: BTreeMap::new(),
        layers,
    }
}

/// Runs a program that must succeed; gives its standard output.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&OsStr]) -> Vec<u8> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let said = String::from_utf8_lossy(&output.stderr);
    let heard = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{program} {arguments:?}: {said}{heard}");
    output.stdout
}

/// Whether the programs are there and we are root; says what is missing.
pub(crate) fn can_run(test: &str, programs: &[&str]) -> bool {
    let missing: Vec<&str> = programs
        .iter()
        .copied()
        .filter(|program| {
            !["/usr/bin", "/usr/sbin", "/bin", "/sbin"]
                .iter()
                .any(|dir| Path::new(dir).join(program).exists())
        })
        .collect();
    let root = rustix::process::geteuid().is_root();
    if !missing.is_empty() || !root {
        eprintln!("SKIPPED: {test}: missing {missing:?}, root: {root}");
        return false;
    }
    true
}

/// Something mounted, for as long as this lives.
pub(crate) struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    /// An EROFS image, read-only.
    #[track_caller]
    pub(crate) fn erofs(image: &Path) -> Self {
        Self::new(&["-t", "erofs", "-o", "loop,ro"], image)
    }

    /// An ext4 disk, read-only.
    #[track_caller]
    pub(crate) fn ext4(disk: &Path) -> Self {
        Self::new(&["-t", "ext4", "-o", "loop,ro,noload"], disk)
    }

    /// An ext4 disk that can be written.
    #[track_caller]
    pub(crate) fn ext4_writable(disk: &Path) -> Self {
        Self::new(&["-t", "ext4", "-o", "loop"], disk)
    }

    /// A disk of any kind that can be written.
    #[track_caller]
    pub(crate) fn writable(disk: &Path) -> Self {
        Self::new(&["-o", "loop"], disk)
    }

    /// An empty file system in memory.
    #[track_caller]
    pub(crate) fn tmpfs(size: u64) -> Self {
        Self::new(
            &["-t", "tmpfs", "-o", &format!("size={size}")],
            Path::new("tmpfs"),
        )
    }

    #[track_caller]
    fn new(options: &[&str], source: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut arguments: Vec<&OsStr> = options.iter().map(OsStr::new).collect();
        arguments.extend([source.as_os_str(), dir.path().as_os_str()]);
        run("mount", &arguments);
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(self.dir.path()).status();
        assert!(
            done.is_ok_and(|status| status.success()) || std::thread::panicking(),
            "cannot unmount"
        );
    }
}

/// Lets `fsck.erofs` read all of an image.
#[track_caller]
pub(crate) fn fsck(image: &Path) {
    run("fsck.erofs", &[OsStr::new("--extract"), image.as_os_str()]);
}

/// Lets `e2fsck` look at all of an ext4 disk.
#[track_caller]
pub(crate) fn e2fsck(disk: &Path) {
    run("/sbin/e2fsck", &[OsStr::new("-fn"), disk.as_os_str()]);
}

/// Everything a program can learn about one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) links: u64,
    pub(crate) mtime: (i64, i64),
    pub(crate) device: u64,
    /// Size and hash of a file, target of a link.
    pub(crate) content: String,
    pub(crate) xattrs: BTreeMap<OsString, Vec<u8>>,
    /// The first of the names of the same inode.
    pub(crate) same_as: PathBuf,
}

/// All files of a tree by their path; the root is `.`.
pub(crate) fn list(root: &Path) -> BTreeMap<PathBuf, Shown> {
    let mut paths = vec![PathBuf::from(".")];
    let mut pending = vec![PathBuf::from(".")];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(root.join(&dir)).unwrap() {
            let entry = entry.unwrap();
            let path = dir.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                pending.push(path.clone());
            }
            paths.push(path);
        }
    }
    paths.sort();
    let mut first_names = BTreeMap::new();
    let mut shown = BTreeMap::new();
    for path in paths {
        let full = root.join(&path);
        let metadata = std::fs::symlink_metadata(&full).unwrap();
        let same_as = first_names
            .entry(metadata.ino())
            .or_insert_with(|| path.clone())
            .clone();
        let content = if metadata.is_file() {
            let mut hasher = Sha256::new();
            std::io::copy(&mut File::open(&full).unwrap(), &mut HashWriter(&mut hasher)).unwrap();
            format!(
                "{} {}",
                metadata.len(),
                Digest::from_bytes(hasher.finalize().into())
            )
        } else if metadata.is_symlink() {
            std::fs::read_link(&full)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .escape_ascii()
                .to_string()
        } else {
            String::new()
        };
        shown.insert(
            path,
            Shown {
                mode: metadata.mode(),
                owner: (metadata.uid(), metadata.gid()),
                links: metadata.nlink(),
                mtime: (metadata.mtime(), metadata.mtime_nsec()),
                device: metadata.rdev(),
                content,
                xattrs: xattrs(&full),
                same_as,
            },
        );
    }
    shown
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let mut names = vec![0_u8; 70_000];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0_u8; 70_000];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            value.truncate(len);
            (OsStr::from_bytes(name).to_owned(), value)
        })
        .collect()
}

/// A list as mke2fs copies it: without the parts of seconds.
pub(crate) fn whole_seconds(mut list: BTreeMap<PathBuf, Shown>) -> BTreeMap<PathBuf, Shown> {
    for shown in list.values_mut() {
        shown.mtime.1 = 0;
    }
    list
}

/// Compares two lists and shows only what differs.
#[track_caller]
pub(crate) fn assert_same(ours: &BTreeMap<PathBuf, Shown>, theirs: &BTreeMap<PathBuf, Shown>) {
    let mut different = Vec::new();
    for path in ours
        .keys()
        .chain(theirs.keys().filter(|path| !ours.contains_key(*path)))
    {
        if ours.get(path) != theirs.get(path) {
            different.push(format!(
                "{}\n  ours   {:?}\n  theirs {:?}",
                path.display(),
                ours.get(path),
                theirs.get(path)
            ));
        }
    }
    assert!(
        different.is_empty(),
        "{} differ:\n{}",
        different.len(),
        different[..different.len().min(10)].join("\n")
    );
}
