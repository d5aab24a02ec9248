//! What the tests of this crate share: small archives, a store to look into, and real tools around it.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use offshoot_model::{Digest, Progress};
use offshoot_store::blobs::BlobStore;

use crate::archive::{ImportOptions, import};
use crate::manifest::StoredImage;

/// A store in a folder of its own.
pub(crate) struct TestStore {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) blobs: BlobStore,
}

impl TestStore {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::open(dir.path()).unwrap();
        Self { dir, blobs }
    }

    /// Every file below the store.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut folders = vec![self.dir.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    files.push(path);
                }
            }
        }
        files
    }

    /// An image of one uncompressed layer with a file of `size` bytes that do not compress.
    pub(crate) fn image(&self, size: usize, platform: Option<&str>) -> StoredImage {
        let options = ImportOptions {
            platform: platform.map(str::to_owned),
            ..ImportOptions::default()
        };
        let bytes = tar(&[("etc/name", b"x"), ("usr/noise", &noise(size))]);
        let images = import(&self.blobs, bytes.as_slice(), &options, &Progress::silent()).unwrap();
        StoredImage::load(&self.blobs, &images[0].digest).unwrap()
    }

    /// Writes the images as an OCI image layout, each under its tag.
    pub(crate) fn export(&self, dir: &Path, images: &[(&str, Digest)]) {
        let manifests: Vec<_> = images
            .iter()
            .map(|(tag, digest)| {
                serde_json::json!({
                    "mediaType": crate::manifest::OCI_MANIFEST,
                    "digest": digest,
                    "size": self.blobs.size(digest).unwrap(),
                    "annotations": { "org.opencontainers.image.ref.name": tag },
                })
            })
            .collect();
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": manifests });
        std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        for (digest, _) in self.blobs.list().unwrap() {
            std::fs::copy(
                self.blobs.path(&digest),
                dir.join("blobs/sha256").join(digest.hex()),
            )
            .unwrap();
        }
    }
}

/// A tar of regular files.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        builder.append_data(&mut header, path, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).unwrap()
}

/// Bytes without order, the same each time: xorshift64.
pub(crate) fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(size).collect()
}

pub(crate) fn digest_of(bytes: &[u8]) -> Digest {
    use sha2::Digest as _;
    Digest::from_bytes(sha2::Sha256::digest(bytes).into())
}

/// Whether a program that a test cannot do without is missing; says so.
pub(crate) fn skip_without(program: &str) -> bool {
    let missing = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_err();
    if missing {
        let mut stderr = std::io::stderr();
        writeln!(stderr, "SKIPPED: {program} is not installed").unwrap();
    }
    missing
}

pub(crate) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

pub(crate) fn skopeo_copy(arguments: &[&str]) {
    run(
        "skopeo",
        &[&["--insecure-policy", "copy", "--quiet"], arguments].concat(),
    );
}

/// A real registry on a loopback port of its own; ends with the test.
pub(crate) struct DockerRegistry {
    child: Child,
    pub(crate) address: String,
    _dir: tempfile::TempDir,
}

impl DockerRegistry {
    /// `secret`: lets in only `user`, with the password `secret`.
    pub(crate) fn start(secret: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().display();
        let auth = if secret {
            // bcrypt of `secret`, cost 4.
            let line = "user:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n";
            std::fs::write(dir.path().join("htpasswd"), line).unwrap();
            format!("auth:\n  htpasswd:\n    realm: test\n    path: {root}/htpasswd\n")
        } else {
            String::new()
        };
        let config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {root}/data\n\
             http:\n  addr: 127.0.0.1:0\n{auth}"
        );
        std::fs::write(dir.path().join("config.yml"), config).unwrap();
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut seen = String::new();
        let address = loop {
            let mut line = String::new();
            assert_ne!(
                log.read_line(&mut line).unwrap(),
                0,
                "docker-registry did not start: {seen}"
            );
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.split(['"', ' ', '\n']).next().unwrap().to_owned();
            }
            seen.push_str(&line);
        };
        // Somebody has to take what it goes on logging.
        std::thread::spawn(move || std::io::copy(&mut log.by_ref(), &mut std::io::sink()));
        Self {
            child,
            address,
            _dir: dir,
        }
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
