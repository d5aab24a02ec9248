//! Three layers with everything a layer can say, unpacked by `umoci` and by us: the same tree.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use offshoot_model::{ByteSize, Progress};
use offshoot_rootfs::base::BaseStore;
use offshoot_rootfs::copy::make_copy;
use offshoot_store::blobs::BlobStore;

use crate::support::{
    Mount, Tar, assert_same, can_run, e2fsck, fsck, gzip, list, run, sha256, store_image, whole_seconds,
};

/// The lowest layer, as a real tree that GNU tar packs.
fn lowest(dir: &Path) -> Vec<u8> {
    let root = dir.join("lowest");
    let path = |name: &str| root.join(name);
    for folder in [
        "etc",
        "usr/bin",
        "usr/lib",
        "var/log",
        "tmp",
        "dev",
        "run",
        "opt/old/c",
        "opt/keep/e",
        "srv/dir/deep",
        "home/u",
    ] {
        std::fs::create_dir_all(path(folder)).unwrap();
    }
    let file = |name: &str, content: &[u8], mode: u32| {
        std::fs::write(path(name), content).unwrap();
        std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let owner = |name: &str, uid, gid| std::os::unix::fs::lchown(path(name), Some(uid), Some(gid)).unwrap();
    file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n", 0o644);
    file("etc/shadow", b"root:*:\n", 0o644);
    owner("etc/shadow", 0, 42);
    file("etc/hostname", b"lowest\n", 0o644);
    file("usr/bin/su", &[1; 9000], 0o755);
    owner("usr/bin/su", 1000, 1000);
    std::fs::set_permissions(path("usr/bin/su"), std::fs::Permissions::from_mode(0o6755)).unwrap();
    file("usr/bin/ping", &[2; 5000], 0o755);
    std::fs::hard_link(path("usr/bin/ping"), path("usr/bin/ping6")).unwrap();
    // cap_net_raw=ep (VFS_CAP_REVISION_2).
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let set = |name: &str, attribute: &str, value: &[u8]| {
        rustix::fs::lsetxattr(path(name), attribute, value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    set("usr/bin/ping", "security.capability", &capability);
    set("etc/passwd", "user.note", b"a=b\nc");
    set("var/log", "trusted.kept", b"\0\x01");
    file("usr/lib/libx.so", b"x", 0o644);
    symlink("usr/lib", path("lib")).unwrap();
    symlink("/usr/bin/su", path("usr/bin/absolute")).unwrap();
    symlink("../nowhere", path("usr/bin/dangling")).unwrap();
    owner("usr/bin/dangling", 7, 8);
    std::fs::set_permissions(path("var/log"), std::fs::Permissions::from_mode(0o2775)).unwrap();
    owner("var/log", 0, 4);
    std::fs::set_permissions(path("var/log"), std::fs::Permissions::from_mode(0o2775)).unwrap();
    std::fs::set_permissions(path("tmp"), std::fs::Permissions::from_mode(0o1777)).unwrap();
    for (name, kind, major, minor) in [
        ("dev/null", "c", "1", "3"),
        ("dev/loop7", "b", "7", "7"),
        ("dev/far", "b", "259", "1000"),
    ] {
        run(
            "mknod",
            &[
                path(name).as_os_str(),
                OsStr::new(kind),
                OsStr::new(major),
                OsStr::new(minor),
            ],
        );
    }
    run("mkfifo", &[path("run/pipe").as_os_str()]);
    let sparse = std::fs::File::create(path("var/sparse")).unwrap();
    sparse.set_len((9 << 20) + 5).unwrap();
    sparse.write_all_at(b"start", 0).unwrap();
    sparse.write_all_at(b"end", 9 << 20).unwrap();
    file("home/u/empty", b"", 0o600);
    file("home/u/block", &[3; 4096], 0o600);
    file("home/u/blocks", &[4; 3 * 4096 + 1], 0o600);
    file(&format!("home/u/{}", "n".repeat(255)), b"long", 0o644);
    let deep = vec!["d".repeat(60); 10].join("/");
    std::fs::create_dir_all(path(&format!("home/{deep}"))).unwrap();
    file(&format!("home/{deep}/leaf"), b"deep", 0o644);
    std::fs::write(path("home/u").join(OsStr::from_bytes(b"not utf-8 \xff\n")), "odd").unwrap();
    for name in [
        "opt/old/a",
        "opt/old/b",
        "opt/old/c/d",
        "opt/keep/e/f",
        "srv/gone",
        "srv/dir/deep/x",
        "srv/file",
        "srv/one",
    ] {
        file(name, name.as_bytes(), 0o640);
    }
    std::fs::hard_link(path("srv/one"), path("srv/two")).unwrap();
    for n in 0..400 {
        file(
            &format!("usr/lib/module-{n:03}.{}", "ko".repeat(n % 20)),
            &vec![n as u8; n * 13],
            0o644,
        );
    }
    run(
        "touch",
        &["-h", "-d", "2001-02-03T04:05:06.123456789Z"]
            .map(OsStr::new)
            .into_iter()
            .chain([
                path("etc/passwd").as_os_str(),
                path("usr/bin/absolute").as_os_str(),
                path("var").as_os_str(),
            ])
            .collect::<Vec<_>>(),
    );
    let mut arguments = vec![
        "--format=pax",
        "--xattrs",
        "--xattrs-include=*",
        "-S",
        "--numeric-owner",
        "-c",
        "-C",
    ]
    .into_iter()
    .map(OsStr::new)
    .collect::<Vec<_>>();
    arguments.extend([root.as_os_str(), OsStr::new(".")]);
    run("tar", &arguments)
}

fn middle() -> Vec<u8> {
    Tar::default()
        .dir("opt")
        .dir("opt/old")
        .file("opt/old/.wh..wh..opq", "")
        .file("opt/old/new", "new")
        .dir("srv")
        .file("srv/.wh.gone", "")
        .file("srv/.wh.dir", "")
        .raw(b'0', b"etc/hostname", b"", b"middle\n", |header| {
            header.set_mode(0o600);
            header.set_uid(12);
            header.set_gid(34);
        })
        // Below a link to a folder.
        .file("lib/added", "through the link")
        // Another name for a file of the layer below, and two of one file of this one.
        .entry(b'1', "usr/bin/ping4", "usr/bin/ping", b"")
        .file("usr/bin/one", "one")
        .entry(b'1', "usr/bin/another", "usr/bin/one", b"")
        // A folder where a file was, and the other way round.
        .file("srv/.wh.file", "")
        .dir("srv/file")
        .file("srv/file/inside", "x")
        .raw(b'5', b"var/log", b"", b"", |header| {
            header.set_mode(0o750);
            header.set_gid(99);
        })
        .file("var/log/messages", "m")
        // ACL of user 5 (version 2; user:: group:: mask:: other::).
        .pax(&[(
            "SCHILY.xattr.system.posix_acl_access",
            &[
                2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 5, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 4,
                0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
            ],
        )])
        .raw(b'0', b"srv/with-acl", b"", b"acl", |header| header.set_mode(0o640))
        .end()
}

fn highest() -> Vec<u8> {
    Tar::default()
        .file("opt/.wh.keep", "")
        .dir("opt/keep")
        .file("opt/keep/again", "a")
        .file("usr/bin/.wh.another", "")
        .entry(b'2', "usr/bin/dangling", "su", b"")
        .entry(b'2', "newlink", "usr/bin", b"")
        .file("newlink/below", "b")
        .pax(&[("mtime", b"1234567890.987654321")])
        .file("etc/hostname", "highest\n")
        .end()
}

/// Writes the image as an OCI layout for umoci.
fn write_layout(dir: &Path, tars: &[Vec<u8>]) {
    std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    let put = |bytes: &[u8]| {
        let digest = sha256(bytes);
        std::fs::write(dir.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        serde_json::json!({ "digest": digest, "size": bytes.len() })
    };
    let typed = |mut descriptor: serde_json::Value, kind: &str| {
        descriptor["mediaType"] = format!("application/vnd.oci.image.{kind}").into();
        descriptor
    };
    let layers: Vec<_> = tars
        .iter()
        .map(|tar| typed(put(&gzip(tar)), "layer.v1.tar+gzip"))
        .collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": tars.iter().map(|tar| sha256(tar)).collect::<Vec<_>>() },
    });
    let manifest = serde_json::json!({
        "schemaVersion": 2, "layers": layers,
        "config": typed(put(config.to_string().as_bytes()), "config.v1+json"),
    });
    let mut manifest = typed(put(manifest.to_string().as_bytes()), "manifest.v1+json");
    manifest["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "test" });
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [manifest] });
    std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

#[tokio::test]
async fn three_layers_unpack_as_umoci_unpacks_them() {
    if !can_run(
        "three_layers_unpack_as_umoci_unpacks_them",
        &["umoci", "mount", "tar", "mknod", "fsck.erofs", "mke2fs"],
    ) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tars = [lowest(dir.path()), middle(), highest()];
    write_layout(&dir.path().join("layout"), &tars);
    let unpacked = Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(format!("{}:test", dir.path().join("layout").display()))
        .arg(dir.path().join("bundle"))
        .output()
        .unwrap();
    assert!(
        unpacked.status.success(),
        "{}",
        String::from_utf8_lossy(&unpacked.stderr)
    );

    let blobs = BlobStore::open(&dir.path().join("data")).unwrap();
    let image = store_image(&blobs, &tars);
    let store = BaseStore::open(&dir.path().join("data"), blobs).unwrap();
    let base = store.ensure(&image, &Progress::silent()).await.unwrap();
    fsck(&base.root_erofs());
    let mount = Mount::erofs(&base.root_erofs());
    let (ours, theirs) = (list(mount.path()), list(&dir.path().join("bundle/rootfs")));
    assert!(ours.len() > 440, "{} files", ours.len());
    assert_same(&ours, &theirs);

    // The same on disk, and on a disk of its own, where times are whole seconds.
    let tree = store.ensure_tree(&base.id, &Progress::silent()).await.unwrap();
    assert_same(&list(&tree), &theirs);
    let verified = store.verify(&base.id).unwrap();
    assert_eq!((verified.parts.len(), &verified.parts[3].path), (4, &tree));
    let copy = dir.path().join("copy.ext4");
    make_copy(&tree, &copy, ByteSize::from_mib(256)).unwrap();
    e2fsck(&copy);
    let mount = Mount::ext4(&copy);
    assert_same(&whole_seconds(list(mount.path())), &whole_seconds(theirs));
}
