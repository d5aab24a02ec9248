//! OCI layouts in a folder: the golden image as it is, and with layers of a test's own on top.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::{Daemon, IMAGE, names, sha256, text};

/// What [`odd_layer`] holds, relative to `/`, one a line: whatever of a file's nature can get lost on its way to a guest.
pub const ODD_FILES: &str = "opt/odd\n\
    opt/odd/setuid\n\
    opt/odd/setgid\n\
    opt/odd/nobody\n\
    opt/odd/large-ids\n\
    opt/odd/capable\n\
    opt/odd/hard\n\
    opt/odd/link\n\
    opt/odd/fifo\n\
    opt/odd/null\n\
    opt/odd/two words\n";

/// Modes after owners: chown(2) takes set-user-ID away.
const ODD_SCRIPT: &str = "chmod 755 .; cd opt/odd
for file in setuid setgid nobody large-ids 'two words'; do echo \"$file\" >\"$file\"; done
chown 12:34 setgid; chown 65534:65534 nobody; chown 3000000000:2000000000 large-ids; chown 5:6 .
chmod 4755 setuid; chmod 2750 setgid; chmod 0 nobody; chmod 640 large-ids; chmod 1777 .
chmod 755 capable; setcap cap_dac_read_search=ep capable; setfattr -n user.colour -v green setuid
ln capable hard; ln -s capable link; mkfifo -m 600 fifo; mknod -m 666 null c 1 3
touch -d '2001-02-03 04:05:06' setuid 'two words'
chmod 755 .. && chown 0:0 ..";

/// Makes a tar of a tree, with everything that tar can keep.
pub fn tar_of(tar: &Path, fill: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().expect("a folder");
    fill(dir.path());
    let output = Command::new("tar")
        .args([
            "--format=posix",
            "--numeric-owner",
            "--xattrs",
            "--xattrs-include=*",
            "-C",
        ])
        .arg(dir.path())
        .arg("-cf")
        .arg(tar)
        .arg(".")
        .output()
        .expect("tar");
    assert!(output.status.success(), "tar: {}", text(&output.stderr));
}

/// Makes a layer of [`ODD_FILES`]. `capable` is the `cat` of the layer below, with a capability that lets it read everything.
pub fn odd_layer(below: &Path, tar: &Path) {
    tar_of(tar, |dir| {
        let odd = dir.join("opt/odd");
        std::fs::create_dir_all(&odd).expect("a folder");
        let cat = Command::new("tar")
            .args(["--wildcards", "-xOf"])
            .arg(below)
            .arg("*usr/bin/cat")
            .output()
            .expect("tar");
        assert!(cat.stdout.len() > 10_000, "no cat: {}", text(&cat.stderr));
        std::fs::write(odd.join("capable"), cat.stdout).expect("write");
        let made = Command::new("sh")
            .args(["-ec", ODD_SCRIPT])
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir(dir)
            .output()
            .expect("sh");
        assert!(made.status.success(), "{}", text(&made.stderr));
    });
}

/// A layout of one image.
#[derive(Debug)]
pub struct Layout {
    folder: PathBuf,
    manifest: Value,
}

impl Layout {
    /// The golden image in `folder`, which lies on the data's file system: blobs are hard links. Named `layout`.
    pub fn of_the_golden_image(daemon: &Daemon, folder: &Path) -> Self {
        let details: Value = serde_json::from_str(&daemon.ok(["image", "inspect", IMAGE])).expect("JSON");
        let details = details.get(0).unwrap_or(&details);
        let digest = details["digest"].as_str().expect("a digest");
        let store = daemon.data().join("blobs/sha256");
        let blobs = folder.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).expect("a folder");
        let manifest = std::fs::read(store.join(hex(digest))).expect("the manifest");
        let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
        let layers = manifest["layers"].as_array().expect("layers").iter();
        let digests = layers.chain([&manifest["config"]]).map(|blob| &blob["digest"]);
        for digest in digests
            .map(|digest| digest.as_str().expect("a digest"))
            .chain([digest])
        {
            std::fs::hard_link(store.join(hex(digest)), blobs.join(hex(digest))).expect("a link");
        }
        std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("write");
        let layout = Self {
            folder: folder.to_owned(),
            manifest,
        };
        layout.name(digest);
        layout
    }

    /// Puts a plain tar on top.
    pub fn push(&mut self, tar: &Path) {
        let digest = format!("sha256:{}", sha256(tar));
        let size = std::fs::metadata(tar).expect("the layer").len();
        std::fs::copy(tar, self.blob(&digest)).expect("copy");
        let config = self.manifest["config"]["digest"].as_str().expect("a digest");
        let config = std::fs::read(self.blob(config)).expect("the config");
        let mut config: Value = serde_json::from_slice(&config).expect("JSON");
        let list = |value: &mut Value, item: Value| value.as_array_mut().expect("a list").push(item);
        list(&mut config["rootfs"]["diff_ids"], json!(digest));
        if config["history"].is_array() {
            list(&mut config["history"], json!({ "created_by": "a test" }));
        }
        let (config_digest, config_size) = self.put(&config);
        self.manifest["config"]["digest"] = json!(config_digest);
        self.manifest["config"]["size"] = json!(config_size);
        let layer = json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": digest,
            "size": size,
        });
        list(&mut self.manifest["layers"], layer);
        let manifest = self.manifest.clone();
        let (digest, _) = self.put(&manifest);
        self.name(&digest);
    }

    /// The files of its layers, lowest first.
    pub fn layers(&self) -> Vec<PathBuf> {
        let layers = self.manifest["layers"].as_array().expect("layers");
        let digests = layers
            .iter()
            .map(|layer| layer["digest"].as_str().expect("a digest"));
        digests.map(|digest| self.blob(digest)).collect()
    }

    /// Imports it under a name.
    pub fn import(&self, daemon: &Daemon, name: &str) {
        let folder = self.folder.to_str().expect("a path in UTF-8");
        daemon.ok(["image", "import", "--name", name, folder]);
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.folder.join("blobs/sha256").join(hex(digest))
    }

    fn put(&self, value: &Value) -> (String, u64) {
        let bytes = value.to_string();
        let unnamed = self.folder.join("blobs/unnamed");
        std::fs::write(&unnamed, &bytes).expect("write");
        let digest = format!("sha256:{}", sha256(&unnamed));
        std::fs::rename(&unnamed, self.blob(&digest)).expect("rename");
        (digest, bytes.len() as u64)
    }

    /// Makes a manifest the one image of the layout.
    fn name(&self, digest: &str) {
        let size = std::fs::metadata(self.blob(digest)).expect("the manifest").len();
        let index = json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": digest,
                "size": size,
                "annotations": { "org.opencontainers.image.ref.name": "layout" },
            }],
        });
        std::fs::write(self.folder.join("index.json"), index.to_string()).expect("write");
        let left = names(&self.folder.join("blobs"));
        assert_eq!(left, ["sha256"], "something is left beside the blobs");
    }
}

fn hex(digest: &str) -> &str {
    digest.strip_prefix("sha256:").expect("a SHA-256")
}
