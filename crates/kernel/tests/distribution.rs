//! The distribution's real kernel package, as apt has it: found, downloaded, made into a bundle.

#![expect(clippy::print_stderr, reason = "a skipped test says so")]

use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex};

use offshoot_kernel::{BuiltinKnowledge, DistroError, DistroOptions, KernelError, KernelSource, KernelStore};
use offshoot_model::{ErrorKind, Explain, Progress, ProgressEvent};

/// The header of a static x86-64 program: all that a bundle asks of an agent.
fn agent(dir: &Path, name: &str) -> std::path::PathBuf {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2_u16, 62].iter().flat_map(|n| n.to_le_bytes()));
    elf.extend(1_u32.to_le_bytes());
    elf.extend([0_u64, 64, 0].iter().flat_map(|n| n.to_le_bytes()));
    elf.extend(0_u32.to_le_bytes());
    elf.extend([64_u16, 56, 0, 64, 0, 0].iter().flat_map(|n| n.to_le_bytes()));
    elf.extend(name.as_bytes());
    let path = dir.join(name);
    std::fs::write(&path, elf).unwrap();
    path
}

/// Whether there is nothing to test with: no apt, no lists, no mirror.
fn is_unreachable(error: &KernelError) -> bool {
    matches!(
        error,
        KernelError::Distro {
            source: DistroError::Spawn { .. } | DistroError::NoPackage { .. } | DistroError::Tool { .. }
        }
    )
}

#[tokio::test]
async fn the_newest_cloud_kernel_becomes_a_bundle() {
    let dir = tempfile::tempdir().unwrap();
    let store = KernelStore::open(&dir.path().join("data")).unwrap();
    let events = Arc::new(Mutex::new(Vec::new()));
    let progress = Progress::new({
        let events = Arc::clone(&events);
        move |event| events.lock().unwrap().push(event)
    });
    let first = agent(dir.path(), "first");
    let bundle = match store
        .add_distro(&first, &DistroOptions::default(), &progress)
        .await
    {
        Err(error) if is_unreachable(&error) => {
            eprintln!("SKIPPED: apt has no kernel here: {error:?}");
            return;
        }
        bundle => bundle.unwrap(),
    };

    let manifest = &bundle.manifest;
    let KernelSource::Debian { package, .. } = &manifest.source else {
        panic!("{:?}", manifest.source)
    };
    assert_eq!(package, &format!("linux-image-{}", manifest.release));
    assert_eq!(manifest.builtin, BuiltinKnowledge::Listed);
    let features = &manifest.features;
    assert!(
        features.block && features.pvh && features.pci && features.net,
        "{features:?}"
    );
    assert!(
        features.pmem && features.virtiofs && features.vsock,
        "{features:?}"
    );
    for name in ["virtio_blk", "erofs", "overlay"] {
        assert!(
            manifest.modules.iter().any(|module| module == name),
            "{name}: {:?}",
            manifest.modules
        );
    }
    let files = read_initramfs(&bundle.initramfs());
    for name in &manifest.modules {
        let path = format!("modules/{name}.ko");
        let (_, content) = files
            .iter()
            .find(|(name, _)| *name == path)
            .unwrap_or_else(|| panic!("{path}"));
        assert!(content.starts_with(b"\x7fELF"), "{path}");
        // Debian does not insist on signatures, and checking them costs the guest time.
        assert!(!content.ends_with(b"~Module signature appended~\n"), "{path}");
    }
    let downloads = || {
        let is_download = |event: &&ProgressEvent| matches!(event, ProgressEvent::Started { label, total: Some(1_000_000..), .. } if label.starts_with("downloading"));
        events.lock().unwrap().iter().filter(is_download).count()
    };
    assert_eq!(downloads(), 1);

    // Once more, and with another agent: what is there serves.
    assert_eq!(
        store
            .add_distro(&first, &DistroOptions::default(), &progress)
            .await
            .unwrap(),
        bundle
    );
    let other = store
        .add_distro(&agent(dir.path(), "second"), &DistroOptions::default(), &progress)
        .await
        .unwrap();
    assert_ne!(other.id, bundle.id);
    assert_eq!(other.manifest.vmlinux, bundle.manifest.vmlinux);
    assert_eq!(downloads(), 1);
    assert_eq!(store.default().unwrap(), other);
    assert_eq!(std::fs::read_dir(dir.path().join("data/tmp")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_package_that_is_none_is_refused_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let store = KernelStore::open(&dir.path().join("data")).unwrap();
    let agent = agent(dir.path(), "agent");
    let refused = async |package: &str| {
        let options = DistroOptions {
            package: Some(package.to_owned()),
        };
        store
            .add_distro(&agent, &options, &Progress::silent())
            .await
            .unwrap_err()
    };
    let error = refused("-o=Dir=/").await;
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    let error = refused("linux-image-0.0.1-none").await;
    if matches!(
        &error,
        KernelError::Distro {
            source: DistroError::Spawn { .. }
        }
    ) {
        eprintln!("SKIPPED: apt is not installed");
        return;
    }
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(
        error.hints().iter().any(|hint| hint.contains("apt-get update")),
        "{error:?}"
    );
    assert_eq!(std::fs::read_dir(dir.path().join("data/tmp")).unwrap().count(), 0);
}

fn read_initramfs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[..];
    let mut files = Vec::new();
    loop {
        let mut reader = cpio::newc::Reader::new(rest).unwrap();
        if reader.entry().is_trailer() {
            return files;
        }
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        files.push((reader.entry().name().to_owned(), content));
        rest = reader.finish().unwrap();
    }
}
