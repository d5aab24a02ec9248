//! Archives of every kind, whole, broken and hostile.

use std::path::Path;

use offshoot_model::{ErrorKind, Explain};

use super::*;
use crate::manifest::{OCI_INDEX, OCI_MANIFEST, StoredImage};
use crate::testing::*;

fn import_with(
    store: &TestStore,
    bytes: &[u8],
    options: &ImportOptions,
) -> Result<Vec<Imported>, ImportError> {
    import(&store.blobs, bytes, options, &Progress::silent())
}

/// Imports what must be refused, and checks that nothing stays.
fn refuse(bytes: &[u8]) -> ImportError {
    let store = TestStore::new();
    let error = import_with(&store, bytes, &ImportOptions::default()).unwrap_err();
    assert_eq!(store.files(), Vec::<std::path::PathBuf>::new(), "{error}");
    error
}

fn rootfs() -> Vec<u8> {
    tar(&[
        ("./etc/os-release", b"ID=x\n"),
        ("./usr/bin/sh", &noise(100_000)),
        ("./manifest.json", b"[]"),
    ])
}

#[test]
fn a_root_file_system_becomes_an_image_of_itself() {
    let plain = rootfs();
    for (bytes, compression) in [
        (plain.clone(), Compression::None),
        (gzip(&plain), Compression::Gzip),
        (
            [gzip(&plain[..5000]), gzip(&plain[5000..])].concat(),
            Compression::Gzip,
        ),
        (zstd(&plain), Compression::Zstd),
        (
            [zstd(&plain[..5000]), zstd(&plain[5000..])].concat(),
            Compression::Zstd,
        ),
    ] {
        let store = TestStore::new();
        let imported = import_with(&store, &bytes, &ImportOptions::default()).unwrap();
        assert_eq!((imported.len(), imported[0].reference.as_deref()), (1, None));
        let image = StoredImage::load(&store.blobs, &imported[0].digest).unwrap();
        assert_eq!(image.layers.len(), 1);
        assert_eq!(image.layers[0].compression, compression);
        assert_eq!(image.layers[0].digest, digest_of(&bytes));
        assert_eq!(image.layers[0].diff_id, digest_of(&plain));
        assert_eq!(image.layers[0].size, bytes.len() as u64);
        assert_eq!(image.config.cmd, ["/bin/sh"]);
        assert!(image.config.env[0].value().contains("/usr/bin"));
        assert_eq!(image.created.as_deref(), Some("2023-11-14T22:13:20Z"));
        assert_eq!(image.architecture, Platform::host().architecture);
        assert_eq!(store.files().len(), 3, "layer, config, manifest");
        store.blobs.verify(&image.layers[0].digest).unwrap();
        assert_eq!(
            import_with(&store, &bytes, &ImportOptions::default()).unwrap(),
            imported,
            "the same again"
        );
        assert_eq!(store.files().len(), 3);
    }
}

#[test]
fn the_callers_name_and_platform_count() {
    let store = TestStore::new();
    let options = ImportOptions {
        reference: Some("tool".into()),
        platform: Some("linux/riscv64".into()),
        ..ImportOptions::default()
    };
    let imported = import_with(&store, &rootfs(), &options).unwrap();
    assert_eq!(
        imported[0].reference.as_deref(),
        Some("docker.io/library/tool:latest")
    );
    assert_eq!(
        StoredImage::load(&store.blobs, &imported[0].digest)
            .unwrap()
            .architecture,
        "riscv64"
    );
    let bad = ImportOptions {
        reference: Some("No Name".into()),
        ..ImportOptions::default()
    };
    assert_eq!(
        import_with(&store, &rootfs(), &bad).unwrap_err().kind(),
        ErrorKind::InvalidRequest
    );
    let bad = ImportOptions {
        platform: Some("x".into()),
        ..ImportOptions::default()
    };
    assert_eq!(
        import_with(&store, &rootfs(), &bad).unwrap_err().kind(),
        ErrorKind::InvalidRequest
    );
}

#[test]
fn what_is_no_archive_is_refused_and_leaves_nothing() {
    let plain = rootfs();
    let (gz, zst) = (gzip(&plain), zstd(&plain));
    assert!(matches!(refuse(b""), ImportError::Empty));
    assert!(matches!(refuse(&[0; 10_240]), ImportError::Empty));
    assert!(matches!(refuse(&gzip(b"")), ImportError::Empty));
    assert!(matches!(
        refuse(&noise(10_000)),
        ImportError::Tar {
            source: TarError::NotATar
        }
    ));
    assert!(matches!(
        refuse(&gzip(&noise(10_000))),
        ImportError::Tar {
            source: TarError::NotATar
        }
    ));
    assert!(matches!(
        refuse(b"x"),
        ImportError::Tar {
            source: TarError::NotATar
        }
    ));
    assert!(matches!(
        refuse(&tar(&[("README", b"x"), ("src/main.rs", b"")])),
        ImportError::NoRoot
    ));
    assert!(matches!(
        refuse(&plain[..60_000]),
        ImportError::Tar {
            source: TarError::Truncated { offset: 60_000 }
        }
    ));
    assert!(matches!(
        refuse(&plain[..700]),
        ImportError::Tar {
            source: TarError::Truncated { .. }
        }
    ));
    for cut in [
        &gz[..gz.len() - 1],
        &gz[..gz.len() / 2],
        &zst[..zst.len() - 1],
        &zst[..zst.len() / 2],
    ] {
        assert!(matches!(refuse(cut), ImportError::Decompress { .. }));
    }
    let mut flipped = gz.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x55;
    assert!(matches!(
        refuse(&flipped),
        ImportError::Decompress { .. } | ImportError::Tar { .. }
    ));
    let mut flipped = plain.clone();
    flipped[1024] ^= 1;
    assert!(matches!(
        refuse(&flipped),
        ImportError::Tar {
            source: TarError::Damaged { offset: 1024, .. }
        }
    ));
    for error in [
        refuse(b""),
        refuse(&noise(600)),
        refuse(&gz[..90]),
        refuse(&plain[..60_000]),
    ] {
        assert_eq!(
            (error.kind(), error.hints().len()),
            (ErrorKind::BadContent, 1),
            "{error}"
        );
    }
}

#[test]
fn an_upload_that_breaks_leaves_nothing() {
    struct Breaking(usize);
    impl Read for Breaking {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(1).ok_or(io::ErrorKind::ConnectionReset)?;
            buffer.fill(1);
            Ok(buffer.len())
        }
    }
    let store = TestStore::new();
    let error = import(
        &store.blobs,
        Breaking(3),
        &ImportOptions::default(),
        &Progress::silent(),
    )
    .unwrap_err();
    assert!(matches!(error, ImportError::Upload { .. }));
    assert!(store.files().is_empty());
}

#[test]
fn the_limit_counts_what_comes_and_what_it_unpacks_to() {
    let bomb = tar(&[("usr/zeros", &vec![0; 1 << 20])]);
    let layout = tar(&[("oci-layout", &vec![b' '; 1 << 20])]);
    let limited = ImportOptions {
        limit: ByteSize::from_bytes(100_000),
        ..ImportOptions::default()
    };
    for bytes in [bomb.clone(), gzip(&bomb), zstd(&bomb), gzip(&layout)] {
        let store = TestStore::new();
        let error = import_with(&store, &bytes, &limited).unwrap_err();
        assert!(matches!(error, ImportError::TooLarge { .. }), "{error}");
        assert!(store.files().is_empty());
    }
    let enough = ImportOptions {
        limit: ByteSize::from_bytes(bomb.len() as u64),
        ..ImportOptions::default()
    };
    import_with(&TestStore::new(), &gzip(&bomb), &enough).unwrap();
}

/// A `docker save` archive in the making.
struct Save {
    layers: Vec<(String, Vec<u8>)>,
    config: Vec<u8>,
    config_name: String,
    tags: serde_json::Value,
}

impl Save {
    fn new(tag: &str, architecture: &str, contents: &[&[u8]], pack: fn(&[u8]) -> Vec<u8>) -> Self {
        let tars: Vec<_> = contents
            .iter()
            .map(|content| tar(&[("etc/x", content)]))
            .collect();
        let diff_ids: Vec<_> = tars.iter().map(|tar| digest_of(tar)).collect();
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux", "config": { "Cmd": ["x"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = config.to_string().into_bytes();
        let layers = tars
            .iter()
            .map(|tar| (format!("{}/layer.tar", digest_of(tar).short()), pack(tar)));
        Self {
            config_name: format!("{}.json", digest_of(&config).hex()),
            layers: layers.collect(),
            config,
            tags: serde_json::json!([tag]),
        }
    }

    fn entry(&self) -> serde_json::Value {
        let names: Vec<_> = self.layers.iter().map(|(name, _)| name).collect();
        serde_json::json!({ "Config": self.config_name, "RepoTags": self.tags, "Layers": names })
    }
}

fn pack(saves: &[&Save]) -> Vec<u8> {
    let manifest =
        serde_json::Value::from(saves.iter().map(|save| save.entry()).collect::<Vec<_>>()).to_string();
    let mut files: Vec<(&str, &[u8])> = Vec::new();
    for save in saves {
        files.extend(
            save.layers
                .iter()
                .map(|(name, bytes)| (name.as_str(), bytes.as_slice())),
        );
        files.push((&save.config_name, &save.config));
    }
    // Last, so that it cannot be relied on to come first.
    files.push(("manifest.json", manifest.as_bytes()));
    tar(&files)
}

fn host_arch() -> String {
    Platform::host().architecture
}

#[test]
fn a_docker_save_archive_is_imported() {
    for outer in [<[u8]>::to_vec, gzip, zstd] {
        for inner in [<[u8]>::to_vec, gzip, zstd] {
            let save = Save::new("tool:1", &host_arch(), &[b"one", b"two", b"one"], inner);
            let store = TestStore::new();
            let imported = import_with(&store, &outer(&pack(&[&save])), &ImportOptions::default()).unwrap();
            assert_eq!(imported[0].reference.as_deref(), Some("docker.io/library/tool:1"));
            let image = StoredImage::load(&store.blobs, &imported[0].digest).unwrap();
            assert_eq!(image.config_digest, digest_of(&save.config));
            let digests: Vec<_> = image.layers.iter().map(|layer| layer.digest).collect();
            assert_eq!(
                digests,
                save.layers
                    .iter()
                    .map(|(_, bytes)| digest_of(bytes))
                    .collect::<Vec<_>>()
            );
            assert!(image.blobs().all(|blob| store.blobs.verify(&blob).is_ok()));
            assert_eq!(store.files().len(), 4, "two layers, config, manifest");
        }
    }
}

#[test]
fn several_images_keep_their_names_and_cannot_share_one() {
    let one = Save::new("one:1", &host_arch(), &[b"one"], <[u8]>::to_vec);
    let mut two = Save::new("x", &host_arch(), &[b"two"], <[u8]>::to_vec);
    two.tags = serde_json::json!(["two:1", "two:latest"]);
    let store = TestStore::new();
    let imported = import_with(&store, &pack(&[&one, &two]), &ImportOptions::default()).unwrap();
    let names: Vec<_> = imported.iter().filter_map(|i| i.reference.as_deref()).collect();
    assert_eq!(
        names,
        [
            "docker.io/library/one:1",
            "docker.io/library/two:1",
            "docker.io/library/two:latest"
        ]
    );
    let named = ImportOptions {
        reference: Some("x".into()),
        ..ImportOptions::default()
    };
    assert!(matches!(
        import_with(&store, &pack(&[&one, &two]), &named),
        Err(ImportError::ManyImages { count: 2, .. })
    ));
    let imported = import_with(&store, &pack(&[&two]), &named).unwrap();
    assert_eq!(imported.len(), 1);
    two.tags = serde_json::Value::Null;
    assert_eq!(
        import_with(&store, &pack(&[&two]), &ImportOptions::default()).unwrap()[0].reference,
        None
    );
}

#[test]
fn a_layer_may_be_a_link_to_another_within_the_archive() {
    let layer = tar(&[("etc/x", b"one")]);
    let config = serde_json::json!({
        "architecture": host_arch(), "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [digest_of(&layer), digest_of(&layer), digest_of(&layer)] },
    })
    .to_string();
    let build = |target: &str| {
        let manifest = r#"[{"Config":"c.json","Layers":["a/layer.tar","b/layer.tar","c/layer.tar"]}]"#;
        let files = [
            ("c.json", config.as_bytes()),
            ("a/layer.tar", &layer),
            ("manifest.json", manifest.as_bytes()),
        ];
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, path, content).unwrap();
        }
        for (path, kind, target) in [
            ("b/layer.tar", tar::EntryType::Symlink, target),
            ("c/layer.tar", tar::EntryType::Link, "a/layer.tar"),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            builder.append_link(&mut header, path, target).unwrap();
        }
        builder.into_inner().unwrap()
    };
    let store = TestStore::new();
    let imported = import_with(&store, &build("../a/layer.tar"), &ImportOptions::default()).unwrap();
    assert_eq!(
        StoredImage::load(&store.blobs, &imported[0].digest)
            .unwrap()
            .layers
            .len(),
        3
    );
    for outside in ["../../a/layer.tar", "/etc/passwd", "layer.tar"] {
        assert!(
            matches!(refuse(&build(outside)), ImportError::Missing { .. }),
            "{outside}"
        );
    }
}

#[test]
fn a_wrong_docker_save_archive_is_refused_and_leaves_nothing() {
    let arch = host_arch();
    let broken = |change: fn(&mut Save)| {
        let mut save = Save::new("x", &host_arch(), &[b"one", b"two"], <[u8]>::to_vec);
        change(&mut save);
        refuse(&pack(&[&save]))
    };
    assert!(matches!(
        broken(|s| s.layers[1].1 = tar(&[("etc/x", b"owt")])),
        ImportError::Digest { .. }
    ));
    assert!(matches!(
        broken(|s| s.layers[1].1 = gzip(&tar(&[("etc/x", b"owt")]))),
        ImportError::Digest { .. }
    ));
    assert!(matches!(
        broken(|s| s.layers[1].1 = gzip(&tar(&[("etc/x", b"owt")]))[..40].to_vec()),
        ImportError::Decompress { .. }
    ));
    assert!(matches!(
        broken(|s| s.config_name = format!("{}.json", "ab".repeat(32))),
        ImportError::Digest { .. }
    ));
    assert!(matches!(
        broken(|s| drop(s.layers.pop())),
        ImportError::Manifest { .. }
    ));
    assert!(matches!(
        broken(|s| s.tags = serde_json::json!(["A B"])),
        ImportError::Reference { .. }
    ));
    assert!(matches!(
        broken(|s| s.tags = serde_json::json!(7)),
        ImportError::Json { .. }
    ));
    assert!(matches!(
        broken(|s| (s.config, s.config_name) = (b"{".to_vec(), "c".into())),
        ImportError::Manifest { .. }
    ));
    let huge = |s: &mut Save| (s.config, s.config_name) = (vec![b' '; (4 << 20) + 1], "c".into());
    assert!(matches!(broken(huge), ImportError::FileTooLarge { .. }));
    assert!(matches!(
        refuse(&tar(&[("manifest.json", b"[]")])),
        ImportError::Empty
    ));
    assert!(matches!(
        refuse(&tar(&[("manifest.json", b"nope")])),
        ImportError::Json { .. }
    ));
    let absent = br#"[{"Config":"../../etc/passwd","Layers":[]}]"#;
    assert!(matches!(
        refuse(&tar(&[("manifest.json", absent)])),
        ImportError::Missing { .. }
    ));
    let foreign = Save::new(
        "x",
        if arch == "s390x" { "amd64" } else { "s390x" },
        &[b"one"],
        <[u8]>::to_vec,
    );
    let error = refuse(&pack(&[&foreign]));
    assert_eq!(error.kind(), ErrorKind::NotPossible);
    assert!(error.to_string().contains("it has linux/"), "{error}");
}

/// An OCI layout in the making: blobs by digest.
#[derive(Default)]
struct Layout {
    blobs: Vec<Vec<u8>>,
}

impl Layout {
    fn add(&mut self, media_type: &str, bytes: impl Into<Vec<u8>>) -> serde_json::Value {
        let bytes = bytes.into();
        let descriptor =
            serde_json::json!({ "mediaType": media_type, "digest": digest_of(&bytes), "size": bytes.len() });
        self.blobs.push(bytes);
        descriptor
    }

    fn image(&mut self, architecture: &str, content: &[u8]) -> serde_json::Value {
        let layer = tar(&[("etc/x", content)]);
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": [digest_of(&layer)] },
        });
        let layer = self.add("application/vnd.oci.image.layer.v1.tar+gzip", gzip(&layer));
        let config = self.add("application/vnd.oci.image.config.v1+json", config.to_string());
        let manifest = serde_json::json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
        let mut descriptor = self.add(OCI_MANIFEST, manifest.to_string());
        descriptor["platform"] = serde_json::json!({ "os": "linux", "architecture": architecture });
        descriptor
    }

    fn index(&mut self, entries: &[serde_json::Value]) -> serde_json::Value {
        let index = serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries });
        self.add(OCI_INDEX, index.to_string())
    }

    fn pack(&self, entries: &[serde_json::Value]) -> Vec<u8> {
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": entries }).to_string();
        let names: Vec<_> = self
            .blobs
            .iter()
            .map(|bytes| format!("./blobs/sha256/{}", digest_of(bytes).hex()))
            .collect();
        let mut files: Vec<(&str, &[u8])> = vec![("./oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)];
        files.extend(
            names
                .iter()
                .map(String::as_str)
                .zip(self.blobs.iter().map(Vec::as_slice)),
        );
        files.push(("./index.json", index.as_bytes()));
        tar(&files)
    }
}

fn digest_in(descriptor: &serde_json::Value) -> Digest {
    serde_json::from_value(descriptor["digest"].clone()).unwrap()
}

#[test]
fn an_oci_layout_is_imported_with_its_names() {
    let mut layout = Layout::default();
    let mut one = layout.image(&host_arch(), b"one");
    one["annotations"] = serde_json::json!({ "io.containerd.image.name": "ghcr.io/o/one:1" });
    let mut two = layout.image(&host_arch(), b"two");
    two["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "latest" });
    let mut foreign = layout.image("s390x", b"three");
    foreign["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "x:y" });
    for outer in [<[u8]>::to_vec, gzip, zstd] {
        let bytes = outer(&layout.pack(&[one.clone(), two.clone(), foreign.clone()]));
        let store = TestStore::new();
        let mut imported = import_with(&store, &bytes, &ImportOptions::default()).unwrap();
        imported.sort_by_key(|image| image.reference.clone());
        assert_eq!(
            imported,
            [
                Imported {
                    digest: digest_in(&two),
                    reference: None
                },
                Imported {
                    digest: digest_in(&one),
                    reference: Some("ghcr.io/o/one:1".into())
                },
            ]
        );
        assert_eq!(store.files().len(), 6, "nothing of the foreign one");
        assert!(
            store
                .blobs
                .list()
                .unwrap()
                .iter()
                .all(|(digest, _)| store.blobs.verify(digest).is_ok())
        );
    }
}

#[test]
fn the_platforms_image_is_found_behind_indexes() {
    let mut layout = Layout::default();
    let foreign = layout.image("s390x", b"one");
    let ours = layout.image(&host_arch(), b"two");
    let attestation = serde_json::json!({
        "mediaType": OCI_MANIFEST, "digest": digest_of(b"absent"), "size": 6,
        "platform": { "os": "unknown", "architecture": "unknown" },
    });
    let inner = layout.index(&[foreign.clone(), attestation.clone(), ours.clone()]);
    let only_foreign = layout.index(&[foreign, attestation]);
    let deep = layout.index(std::slice::from_ref(&inner));
    let deeper = layout.index(std::slice::from_ref(&deep));
    let store = TestStore::new();
    let imported = import_with(&store, &layout.pack(&[inner]), &ImportOptions::default()).unwrap();
    assert_eq!(
        imported,
        [Imported {
            digest: digest_in(&ours),
            reference: None
        }]
    );
    let error = refuse(&layout.pack(std::slice::from_ref(&only_foreign)));
    assert!(error.to_string().ends_with("it has linux/s390x"), "{error}");
    let named = ImportOptions {
        platform: Some("linux/s390x".into()),
        ..ImportOptions::default()
    };
    import_with(&TestStore::new(), &layout.pack(&[only_foreign]), &named).unwrap();
    assert!(matches!(refuse(&layout.pack(&[deep])), ImportError::TooDeep));
    assert!(matches!(refuse(&layout.pack(&[deeper])), ImportError::TooDeep));
}

#[test]
fn a_wrong_oci_layout_is_refused_and_leaves_nothing() {
    let mut layout = Layout::default();
    let image = layout.image(&host_arch(), b"one");
    let whole = layout.pack(std::slice::from_ref(&image));
    import_with(&TestStore::new(), &whole, &ImportOptions::default()).unwrap();
    // One byte wrong in each of the blobs: layer, config, manifest.
    for i in 0..layout.blobs.len() {
        let good = layout.blobs[i].clone();
        let name = digest_of(&good).hex();
        let mut bad = good.clone();
        let last = bad.len() - 1;
        bad[last] ^= 1;
        let at = whole
            .windows(good.len())
            .position(|window| window == good)
            .unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + bad.len()].copy_from_slice(&bad);
        let error = refuse(&bytes);
        assert!(
            matches!(&error, ImportError::Digest { name: n, .. } if n.contains(&name)),
            "{error}"
        );
        let mut without = Layout {
            blobs: layout.blobs.clone(),
        };
        without.blobs.remove(i);
        assert!(matches!(
            refuse(&without.pack(std::slice::from_ref(&image))),
            ImportError::Missing { .. }
        ));
    }
    let mut longer = image.clone();
    longer["size"] = (image["size"].as_u64().unwrap() + 1).into();
    assert!(matches!(
        refuse(&layout.pack(&[longer])),
        ImportError::Size { .. }
    ));
    assert!(matches!(refuse(&layout.pack(&[])), ImportError::Platform { .. }));
    assert!(matches!(
        refuse(&tar(&[
            ("oci-layout", br#"{"imageLayoutVersion":"2.0"}"#),
            ("index.json", b"{}")
        ])),
        ImportError::LayoutVersion { .. }
    ));
    assert!(matches!(
        refuse(&tar(&[
            ("oci-layout", br#"{"imageLayoutVersion":"1.0"}"#),
            ("index.json", b"{}")
        ])),
        ImportError::Manifest { .. }
    ));
    assert!(matches!(
        refuse(&tar(&[("oci-layout", b"{}")])),
        ImportError::Missing { .. }
    ));
}

#[test]
fn what_skopeo_writes_is_imported() {
    if skip_without("skopeo") {
        return;
    }
    let source = TestStore::new();
    let image = source.image(300_000, None);
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    source.export(&layout, &[("latest", image.digest)]);
    let from = format!("oci:{}:latest", layout.display());
    let path = |name: &str| dir.path().join(name).display().to_string();
    skopeo_copy(&[&from, &format!("docker-archive:{}:tool:1", path("docker.tar"))]);
    skopeo_copy(&[
        &from,
        &format!("oci-archive:{}:ghcr.io/o/tool:1", path("oci.tar")),
    ]);
    skopeo_copy(&[
        "--dest-compress-format",
        "zstd",
        &from,
        &format!("oci:{}:tool:1", path("folder")),
    ]);
    run("tar", &["-C", &path("folder"), "-cf", &path("folder.tar"), "."]);
    for (file, name) in [
        ("docker.tar", "docker.io/library/tool:1"),
        ("oci.tar", "ghcr.io/o/tool:1"),
        ("folder.tar", "docker.io/library/tool:1"),
    ] {
        let store = TestStore::new();
        let bytes = std::fs::read(Path::new(&path(file))).unwrap();
        let imported = import_with(&store, &bytes, &ImportOptions::default()).unwrap();
        assert_eq!(imported[0].reference.as_deref(), Some(name), "{file}");
        let found = StoredImage::load(&store.blobs, &imported[0].digest).unwrap();
        assert_eq!(found.layers[0].diff_id, image.layers[0].diff_id, "{file}");
        assert_eq!(found.config, image.config, "{file}");
        assert!(
            found.blobs().all(|blob| store.blobs.verify(&blob).is_ok()),
            "{file}"
        );
    }
}

/// Prints what an import costs beside the least it could: `OFFSHOOT_TAR=… cargo test -p offshoot-image -- --ignored cost`.
#[test]
#[ignore = "a measurement of a tar that the caller has"]
fn cost_of_an_import_beside_writing_and_hashing() {
    let bytes = std::fs::read(std::env::var_os("OFFSHOOT_TAR").unwrap()).unwrap();
    for _ in 0..5 {
        let store = TestStore::new();
        let started = std::time::Instant::now();
        let mut file = std::fs::File::create(store.dir.path().join("plain")).unwrap();
        digest_of(&bytes);
        file.write_all(&bytes).unwrap();
        file.sync_all().unwrap();
        let least = started.elapsed();
        let started = std::time::Instant::now();
        import_with(&store, &bytes, &ImportOptions::default()).unwrap();
        let import = started.elapsed();
        writeln!(
            io::stderr(),
            "hash, write, fsync: {least:.0?}; import: {import:.0?}"
        )
        .unwrap();
    }
}
