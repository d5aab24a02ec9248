//! Pulls from a real registry and from one that misbehaves.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use offshoot_model::{ErrorKind, Explain, ProgressEvent};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

use super::*;
use crate::testing::*;

/// What a made-up registry answers.
#[derive(Clone)]
struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
    /// Ends the connection after so many bytes of the body, which its length promises all the same.
    cut: Option<usize>,
}

impl Answer {
    fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self {
            status: 200,
            headers: String::new(),
            body: body.into(),
            cut: None,
        }
    }

    fn status(status: u16, body: &str) -> Self {
        Self {
            status,
            headers: String::new(),
            body: body.into(),
            cut: None,
        }
    }
}

/// A request: its path, and where its range begins.
struct Request {
    path: String,
    from: Option<usize>,
}

/// A registry that misbehaves as it is told to; one request per connection.
async fn misbehave(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let (read, mut write) = stream.split();
                let mut lines = BufReader::new(read).lines();
                let mut request = Request {
                    path: String::new(),
                    from: None,
                };
                while let Ok(Some(line)) = lines.next_line().await {
                    if line.is_empty() {
                        break;
                    }
                    if let Some(rest) = line.strip_prefix("GET ") {
                        request.path = rest.split(' ').next().unwrap().to_owned();
                    }
                    if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                        request.from = range.split('-').next().and_then(|from| from.parse().ok());
                    }
                }
                let Answer {
                    status,
                    headers,
                    body,
                    cut,
                } = answer(&request);
                let head = format!(
                    "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
                    body.len()
                );
                let _ = write.write_all(head.as_bytes()).await;
                let _ = write.write_all(&body[..cut.unwrap_or(body.len())]).await;
                let _ = write.flush().await;
            });
        }
    });
    address
}

/// A registry with one image, of which `change` may spoil an answer.
async fn serve(
    image: &StoredImage,
    source: &TestStore,
    change: impl Fn(&Request, &mut Answer) + Send + Sync + 'static,
) -> String {
    let blobs: Vec<_> = image
        .blobs()
        .map(|digest| (digest, std::fs::read(source.blobs.path(&digest)).unwrap()))
        .collect();
    misbehave(move |request| {
        let last = request.path.rsplit('/').next().unwrap();
        let found = blobs
            .iter()
            .find(|(digest, _)| digest.to_string() == last || last == "latest");
        let mut answer = match (request.path.as_str(), found) {
            ("/v2/", _) => Answer::ok(""),
            (_, Some((_, body))) => match request.from {
                Some(from) if from < body.len() => Answer {
                    status: 206,
                    ..Answer::ok(&body[from..])
                },
                _ => Answer::ok(body.clone()),
            },
            _ => Answer::status(404, ""),
        };
        change(request, &mut answer);
        answer
    })
    .await
}

async fn pull_from(store: &TestStore, address: &str) -> Result<Digest, PullError> {
    pull(
        &store.blobs,
        &format!("{address}/x"),
        &PullOptions::default(),
        &Progress::silent(),
    )
    .await
}

fn is_layer(request: &Request, image: &StoredImage) -> bool {
    request.path.ends_with(&image.layers[0].digest.to_string())
}

/// Pushes images with skopeo and gives the registry back.
fn push(source: &TestStore, registry: &DockerRegistry, images: &[(&str, Digest)], arguments: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    source.export(&layout, images);
    for (tag, _) in images {
        let from = format!("oci:{}:{tag}", layout.display());
        let to = format!("docker://{}/a/tool:{tag}", registry.address);
        skopeo_copy(&[arguments, &["--dest-tls-verify=false", &from, &to]].concat());
    }
}

#[tokio::test]
async fn an_image_of_a_real_registry_is_pulled_once() {
    if skip_without("docker-registry") || skip_without("skopeo") {
        return;
    }
    let source = TestStore::new();
    let image = source.image(3_000_000, None);
    let registry = DockerRegistry::start(false);
    push(&source, &registry, &[("plain", image.digest)], &[]);
    push(
        &source,
        &registry,
        &[("docker", image.digest)],
        &["--format", "v2s2", "--dest-compress-format", "gzip"],
    );
    push(
        &source,
        &registry,
        &[("zstd", image.digest)],
        &["--dest-compress-format", "zstd"],
    );

    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = events.clone();
    let progress = Progress::new(move |event| sink.lock().unwrap().push(event));
    for tag in ["plain", "docker", "zstd"] {
        let store = TestStore::new();
        let name = format!("{}/a/tool:{tag}", registry.address);
        let digest = pull(&store.blobs, &name, &PullOptions::default(), &progress)
            .await
            .unwrap();
        let pulled = StoredImage::load(&store.blobs, &digest).unwrap();
        assert_eq!(pulled.layers[0].diff_id, image.layers[0].diff_id, "{tag}");
        assert!(
            pulled.blobs().all(|blob| store.blobs.verify(&blob).is_ok()),
            "{tag}"
        );
        assert_eq!(store.files().len(), 3, "{tag}");

        // By digest, and with everything there: no layer is asked for again.
        events.lock().unwrap().clear();
        let name = format!("{}/a/tool@{digest}", registry.address);
        assert_eq!(
            pull(&store.blobs, &name, &PullOptions::default(), &progress)
                .await
                .unwrap(),
            digest
        );
        assert!(events.lock().unwrap().is_empty(), "{tag}");
    }
}

#[tokio::test]
async fn progress_is_told_per_layer_and_ends_at_its_size() {
    let source = TestStore::new();
    let image = source.image(3_000_000, None);
    let address = serve(&image, &source, |_, _| ()).await;
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = events.clone();
    let progress = Progress::new(move |event| sink.lock().unwrap().push(event));
    let store = TestStore::new();
    pull(
        &store.blobs,
        &format!("{address}/x"),
        &PullOptions::default(),
        &progress,
    )
    .await
    .unwrap();
    let events = events.lock().unwrap();
    let layer = image.layers[0].digest.short();
    let task = events
        .iter()
        .find_map(|event| match event {
            ProgressEvent::Started {
                task, label, total, ..
            } if label.contains(&layer) => {
                assert_eq!(*total, Some(image.layers[0].size));
                Some(*task)
            }
            _ => None,
        })
        .unwrap();
    let moves: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            ProgressEvent::Moved { task: t, done } if *t == task => Some(*done),
            _ => None,
        })
        .collect();
    assert!(moves.len() >= 4 && moves.is_sorted(), "{moves:?}");
    assert_eq!(moves.last(), Some(&image.layers[0].size));
    assert!(events.contains(&ProgressEvent::Finished { task }));
}

#[tokio::test]
async fn credentials_open_a_closed_registry() {
    if skip_without("docker-registry") || skip_without("skopeo") {
        return;
    }
    let source = TestStore::new();
    let image = source.image(1000, None);
    let registry = DockerRegistry::start(true);
    push(
        &source,
        &registry,
        &[("1", image.digest)],
        &["--dest-creds", "user:secret"],
    );
    let name = format!("{}/a/tool:1", registry.address);
    let attempt = async |password: Option<&str>, name: &str| {
        let store = TestStore::new();
        let auth = password.map_or(RegistryAuth::Anonymous, |password| RegistryAuth::Basic {
            user: "user".into(),
            password: password.into(),
        });
        assert!(!format!("{auth:?}").contains("secret"));
        let options = PullOptions {
            auth,
            ..PullOptions::default()
        };
        pull(&store.blobs, name, &options, &Progress::silent()).await
    };
    attempt(Some("secret"), &name).await.unwrap();
    for password in [None, Some("wrong")] {
        let error = attempt(password, &name).await.unwrap_err();
        assert!(matches!(error, PullError::Denied { .. }), "{error}");
        assert!(error.hints()[0].contains("docker login"), "{error}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_said_clearly() {
    if skip_without("docker-registry") {
        return;
    }
    let registry = DockerRegistry::start(false);
    let store = TestStore::new();
    let attempt = async |name: &str| {
        pull(&store.blobs, name, &PullOptions::default(), &Progress::silent())
            .await
            .unwrap_err()
    };
    let error = attempt(&format!("{}/a/none:1", registry.address)).await;
    assert!(matches!(error, PullError::NotFound { .. }), "{error}");
    let error = attempt("127.0.0.1:1/a").await;
    assert!(
        matches!(error, PullError::Unreachable { plain_http: true, .. }),
        "{error}"
    );
    assert_eq!(error.kind(), ErrorKind::Upstream);
    let error = attempt("no-such-host.invalid/a").await;
    assert!(
        matches!(
            error,
            PullError::Unreachable {
                plain_http: false,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.hints()[0].contains("insecure_registries"), "{error}");
    assert!(matches!(attempt("A B").await, PullError::Reference { .. }));
    assert!(store.files().is_empty());
}

#[tokio::test]
async fn the_right_platform_is_taken_and_the_wrong_one_refused() {
    if skip_without("docker-registry") || skip_without("skopeo") {
        return;
    }
    let host = Platform::host();
    let foreign = if host.architecture == "s390x" {
        "linux/amd64"
    } else {
        "linux/s390x"
    };
    let source = TestStore::new();
    let (ours, theirs) = (source.image(1000, None), source.image(1000, Some(foreign)));
    assert_ne!(ours.digest, theirs.digest);
    let entry = |image: &StoredImage, platform: &Platform| {
        serde_json::json!({
            "mediaType": crate::manifest::OCI_MANIFEST, "digest": image.digest, "size": image.manifest_size,
            "platform": { "os": platform.os, "architecture": platform.architecture },
        })
    };
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": crate::manifest::OCI_INDEX,
        "manifests": [entry(&theirs, &foreign.parse().unwrap()), entry(&ours, &host)],
    });
    let index = source.blobs.put(index.to_string().as_bytes()).unwrap();
    let registry = DockerRegistry::start(false);
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    source.export(&layout, &[]);
    let outer = serde_json::json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": crate::manifest::OCI_INDEX, "digest": index, "size": source.blobs.size(&index).unwrap(),
        "annotations": { "org.opencontainers.image.ref.name": "both" },
    }] });
    std::fs::write(layout.join("index.json"), outer.to_string()).unwrap();
    let name = format!("{}/a/tool:both", registry.address);
    let from = format!("oci:{}:both", layout.display());
    skopeo_copy(&[
        "--all",
        "--preserve-digests",
        "--dest-tls-verify=false",
        &from,
        &format!("docker://{name}"),
    ]);

    let attempt = async |platform: Option<&str>| {
        let store = TestStore::new();
        let options = PullOptions {
            platform: platform.map(str::to_owned),
            ..PullOptions::default()
        };
        pull(&store.blobs, &name, &options, &Progress::silent()).await
    };
    assert_eq!(attempt(None).await.unwrap(), ours.digest);
    assert_eq!(attempt(Some(foreign)).await.unwrap(), theirs.digest);
    let error = attempt(Some("linux/mips64")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotPossible);
    let list = format!(
        "it has {}",
        index::list(&{
            let mut both = vec![host.to_string(), foreign.to_owned()];
            both.sort();
            both
        })
    );
    assert!(error.to_string().ends_with(&list), "{error}");

    // A single image says in its config what it is for.
    push(&source, &registry, &[("theirs", theirs.digest)], &[]);
    let store = TestStore::new();
    let name = format!("{}/a/tool:theirs", registry.address);
    let error = pull(&store.blobs, &name, &PullOptions::default(), &Progress::silent())
        .await
        .unwrap_err();
    assert!(
        error.to_string().ends_with(&format!("it has {foreign}")),
        "{error}"
    );
}

#[tokio::test]
async fn a_broken_pull_goes_on_where_it_stopped() {
    let source = TestStore::new();
    let image = Arc::new(source.image(2_000_000, None));
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (seen, layer) = (asked.clone(), image.clone());
    // The first two answers for the layer end early, and no third request may start at the beginning.
    let address = serve(&image, &source, move |request, answer| {
        if is_layer(request, &layer) {
            let mut seen = seen.lock().unwrap();
            seen.push(request.from.unwrap_or_default());
            if seen.len() < 3 {
                answer.cut = Some(600_000);
            }
        }
    })
    .await;
    let store = TestStore::new();
    assert_eq!(pull_from(&store, &address).await.unwrap(), image.digest);
    store.blobs.verify(&image.layers[0].digest).unwrap();
    let asked = asked.lock().unwrap();
    assert_eq!(asked.len(), 3);
    assert!(asked[0] == 0 && asked[1] > 0 && asked[2] > asked[1], "{asked:?}");
    assert_eq!(store.files().len(), 3);
}

#[tokio::test]
async fn what_an_earlier_pull_left_is_used_and_replaced_where_it_is_wrong() {
    let source = TestStore::new();
    let image = Arc::new(source.image(500_000, None));
    let layer = image.layers[0].digest;
    let bytes = std::fs::read(source.blobs.path(&layer)).unwrap();
    for (left, expected) in [
        (bytes[..300_000].to_vec(), vec![300_000]),
        (noise(300_000), vec![300_000, 0]),
        (bytes.clone(), vec![]),
        ([bytes.clone(), vec![1]].concat(), vec![0]),
    ] {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (seen, wanted) = (asked.clone(), image.clone());
        let address = serve(&image, &source, move |request, _| {
            if is_layer(request, &wanted) {
                seen.lock().unwrap().push(request.from.unwrap_or_default());
            }
        })
        .await;
        let store = TestStore::new();
        std::io::Write::write_all(&mut store.blobs.download(&layer).unwrap().unwrap(), &left).unwrap();
        assert_eq!(pull_from(&store, &address).await.unwrap(), image.digest);
        store.blobs.verify(&layer).unwrap();
        assert_eq!(*asked.lock().unwrap(), expected);
        assert_eq!(store.files().len(), 3);
    }
}

#[tokio::test]
async fn a_registry_without_ranges_serves_as_well() {
    let source = TestStore::new();
    let image = source.image(500_000, None);
    let whole = std::fs::read(source.blobs.path(&image.layers[0].digest)).unwrap();
    let layer = Arc::new(image.clone());
    let address = serve(&image, &source, move |request, answer| {
        if is_layer(request, &layer) {
            *answer = Answer::ok(whole.clone());
        }
    })
    .await;
    let store = TestStore::new();
    let mut left = store.blobs.download(&image.layers[0].digest).unwrap().unwrap();
    std::io::Write::write_all(&mut left, &noise(1000)).unwrap();
    drop(left);
    assert_eq!(pull_from(&store, &address).await.unwrap(), image.digest);
    store.blobs.verify(&image.layers[0].digest).unwrap();
}

#[tokio::test]
async fn damaged_blobs_are_refused_and_never_published() {
    let source = TestStore::new();
    let image = Arc::new(source.image(100_000, None));
    let spoil = async |change: fn(&mut Answer)| {
        let layer = image.clone();
        let tries = Arc::new(AtomicUsize::new(0));
        let counter = tries.clone();
        let address = serve(&image, &source, move |request, answer| {
            if is_layer(request, &layer) {
                counter.fetch_add(1, Ordering::Relaxed);
                change(answer);
            }
        })
        .await;
        let store = TestStore::new();
        let error = pull_from(&store, &address).await.unwrap_err();
        assert!(
            !store.blobs.contains(&image.layers[0].digest) && !store.blobs.contains(&image.digest),
            "{error}"
        );
        (error, tries.load(Ordering::Relaxed))
    };
    let (error, tries) = spoil(|answer| answer.body[77] ^= 1).await;
    assert!(matches!(error, PullError::Digest { .. }), "{error}");
    assert_eq!((tries, error.kind()), (1, ErrorKind::BadContent));
    let (error, _) = spoil(|answer| answer.body.push(0)).await;
    assert!(matches!(error, PullError::TooLong { .. }), "{error}");
    let (error, tries) = spoil(|answer| answer.body.clear()).await;
    assert!(matches!(error, PullError::Truncated { actual: 0, .. }), "{error}");
    assert_eq!(tries, 5, "asked again, and then given up");
    let (error, _) = spoil(|answer| *answer = Answer::status(404, "")).await;
    assert!(matches!(error, PullError::MissingBlob { .. }), "{error}");
    let (error, _) = spoil(|answer| {
        *answer = Answer::status(403, r#"{"errors":[{"code":"DENIED","message":"pay first"}]}"#);
    })
    .await;
    assert!(
        matches!(&error, PullError::Denied { said, .. } if said == "pay first"),
        "{error}"
    );
}

#[tokio::test]
async fn manifests_are_limited_and_checked() {
    let source = TestStore::new();
    let image = source.image(1000, None);
    let attempt = async |reference: &str, answer: Answer| {
        let address = misbehave(move |request| {
            if request.path == "/v2/" {
                Answer::ok("")
            } else {
                answer.clone()
            }
        })
        .await;
        let store = TestStore::new();
        let error = pull(
            &store.blobs,
            &format!("{address}/{reference}"),
            &PullOptions::default(),
            &Progress::silent(),
        )
        .await
        .unwrap_err();
        assert!(store.files().is_empty(), "{error}");
        error
    };
    let huge = attempt("x", Answer::ok(vec![b' '; (4 << 20) + 1])).await;
    let PullError::Manifest { source, .. } = huge else {
        panic!("{huge}");
    };
    assert!(matches!(*source, ManifestError::TooLarge { .. }), "{source}");
    let other = attempt(&format!("x@{}", image.digest), Answer::ok("{}")).await;
    assert!(matches!(other, PullError::ManifestDigest { .. }), "{other}");
    let bad = attempt("x", Answer::ok("not json")).await;
    assert!(matches!(bad, PullError::Manifest { .. }), "{bad}");
    let old = attempt("x", Answer::ok(r#"{"schemaVersion":1}"#)).await;
    assert!(old.hints()[0].contains("skopeo"), "{old}");
    let down = attempt("x", Answer::status(503, "<html>")).await;
    assert!(
        matches!(&down, PullError::Status { status: 503, said, .. } if said.is_empty()),
        "{down}"
    );
    // An index that names itself would go on forever.
    let index = |entry: Digest| {
        serde_json::json!({ "schemaVersion": 2, "manifests": [
            { "mediaType": crate::manifest::OCI_INDEX, "digest": entry, "size": 7 },
        ] })
        .to_string()
    };
    let inner = index(image.digest);
    let middle = index(digest_of(inner.as_bytes()));
    let outer = index(digest_of(middle.as_bytes()));
    let documents = [inner, middle, outer.clone()];
    let address = misbehave(move |request| {
        let found = documents
            .iter()
            .find(|text| request.path.ends_with(&digest_of(text.as_bytes()).to_string()));
        Answer::ok(found.unwrap_or(&outer).clone())
    })
    .await;
    let error = pull_from(&TestStore::new(), &address).await.unwrap_err();
    assert!(matches!(error, PullError::TooDeep { .. }), "{error}");
}

#[tokio::test]
async fn a_token_is_fetched_where_the_registry_asks_for_one() {
    let source = TestStore::new();
    let image = Arc::new(source.image(1000, None));
    let realm = misbehave(|request| {
        assert!(
            request.path.contains("scope=repository%3Ax%3Apull"),
            "{}",
            request.path
        );
        Answer::ok(r#"{"token":"t"}"#)
    })
    .await;
    let address = serve(&image, &source, move |request, answer| {
        if request.path == "/v2/" {
            *answer = Answer {
                headers: format!("www-authenticate: Bearer realm=\"http://{realm}/token\",service=\"s\"\r\n"),
                ..Answer::status(401, "")
            };
        }
    })
    .await;
    assert_eq!(
        pull_from(&TestStore::new(), &address).await.unwrap(),
        image.digest
    );
    let refused = misbehave(|_| Answer::status(401, r#"{"details":"incorrect username or password"}"#)).await;
    let address = misbehave(move |_| Answer {
        headers: format!("www-authenticate: Bearer realm=\"http://{refused}/token\"\r\n"),
        ..Answer::status(401, "")
    })
    .await;
    let error = pull_from(&TestStore::new(), &address).await.unwrap_err();
    assert!(matches!(error, PullError::Denied { .. }), "{error}");
}

#[tokio::test]
async fn two_pulls_of_one_image_share_the_work() {
    let source = TestStore::new();
    let image = Arc::new(source.image(2_000_000, None));
    let asked = Arc::new(AtomicUsize::new(0));
    let (counter, layer) = (asked.clone(), image.clone());
    let address = serve(&image, &source, move |request, _| {
        if is_layer(request, &layer) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    })
    .await;
    let store = TestStore::new();
    let (one, two) = tokio::join!(pull_from(&store, &address), pull_from(&store, &address));
    assert_eq!((one.unwrap(), two.unwrap()), (image.digest, image.digest));
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert_eq!(store.files().len(), 3);
}
