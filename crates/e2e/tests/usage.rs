//! What everything takes, whether it is whole, and what may go.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use offshoot_e2e::{
    Daemon, IMAGE, Layout, allocated, flip_byte, names, own_copy, put_byte, sha256, tar_of, text,
};
use serde_json::Value;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn json(daemon: &Daemon, words: &[&str]) -> Value {
    let text = daemon.ok([words, &["--output", "json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{words:?}: {error}: {text}"))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// The one item of a list that `is` it.
fn find(list: &Value, is: impl Fn(&Value) -> bool) -> &Value {
    let found = list
        .as_array()
        .and_then(|items| items.iter().find(|item| is(item)));
    found.unwrap_or_else(|| panic!("not in {list}"))
}

fn near(told: u64, true_one: u64, within: u64, what: &str) {
    assert!(
        told.abs_diff(true_one) <= within,
        "{what}: {told} is told, {true_one} is true"
    );
}

/// The folder of the golden image's base, which is prepared if it was not.
fn prepared_base(daemon: &Daemon) -> PathBuf {
    daemon.ok(["image", "prepare", IMAGE]);
    let details = json(daemon, &["image", "inspect", IMAGE]);
    let details = details.get(0).unwrap_or(&details);
    daemon
        .data()
        .join("bases")
        .join(details["base"]["id"].as_str().unwrap())
}

/// `rss` of processes as the kernel tells it, bytes.
fn resident(pids: impl IntoIterator<Item = i64>) -> u64 {
    let rss = |pid: i64| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = text.lines().find(|line| line.starts_with("Rss:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * KIB
    };
    pids.into_iter().map(rss).sum()
}

#[test]
fn df_tells_what_du_tells() {
    let daemon = Daemon::start();
    let base = prepared_base(&daemon);
    let mut layout = Layout::of_the_golden_image(&daemon, &daemon.root().join("layout"));
    let common = std::fs::metadata(&layout.layers()[0]).unwrap().len();
    let own = daemon.root().join("own.tar");
    tar_of(&own, |dir| {
        std::fs::create_dir_all(dir.join("opt")).unwrap();
        std::fs::write(dir.join("opt/own"), vec![1; 3_000_000]).unwrap();
    });
    layout.push(&own);
    layout.import(&daemon, "derived:1");
    let shared_folder = daemon.root().join("shared");
    std::fs::create_dir(&shared_folder).unwrap();
    let volume = format!("{}:/shared", shared_folder.display());
    daemon.ok(["create", "--name", "off", IMAGE, "true"]);
    daemon.ok([
        "run", "-d", "--name", "on", "--memory", "256m", "-v", &volume, IMAGE, "sleep", "1000",
    ]);
    daemon.ok([
        "exec",
        "on",
        "sh",
        "-c",
        "head -c 20000000 /dev/urandom >/written; sync",
    ]);
    let df = json(&daemon, &["df"]);

    // Blobs: the common layer once, the rest for each image alone.
    let blobs = daemon.data().join("blobs/sha256");
    let files: Vec<_> = names(&blobs).iter().map(|name| blobs.join(name)).collect();
    let slack = 64 * KIB;
    assert_eq!(number(&df["blobs"]["count"]), files.len() as u64);
    let true_bytes = files.iter().map(|file| allocated(file)).sum();
    near(number(&df["blobs"]["bytes"]), true_bytes, slack, "blobs");
    near(number(&df["blobs"]["shared"]), common, slack, "shared blobs");
    near(
        number(&df["blobs"]["unique"]),
        true_bytes - common,
        slack,
        "unique blobs",
    );
    assert_eq!(df["blobs"]["unneeded"], 0);
    let own = std::fs::metadata(&own).unwrap().len();
    for (name, unique) in [(IMAGE, 0), ("derived:1", own)] {
        let image = find(&df["images"], |image| image["references"][0] == name);
        near(number(&image["shared"]), common, slack, name);
        near(number(&image["unique"]), unique, slack, name);
        assert_eq!(
            number(&image["bytes"]),
            number(&image["shared"]) + number(&image["unique"]),
            "{image}"
        );
    }

    // Bases: one for each image, whole and part by part.
    assert_eq!(df["bases"].as_array().unwrap().len(), 2);
    let of_golden = find(&df["bases"], |found| {
        base.ends_with(found["id"].as_str().unwrap())
    });
    assert_eq!(of_golden["vms"], 2);
    assert_eq!(of_golden["images"][0], IMAGE);
    near(number(&of_golden["bytes"]), allocated(&base), slack, "the base");
    for (part, file) in [
        ("root", "root.erofs"),
        ("overlay_seed", "overlay-seed.ext4"),
        ("work_seed", "work-seed.ext4"),
    ] {
        assert_eq!(
            number(&of_golden["parts"][part]),
            allocated(&base.join(file)),
            "{part}"
        );
    }
    for kernel in df["kernels"].as_array().unwrap() {
        let folder = daemon.data().join("kernels").join(kernel["id"].as_str().unwrap());
        near(number(&kernel["bytes"]), allocated(&folder), slack, "a kernel");
    }

    // VMs: their own disks, and the memory of their processes.
    for vm in ["on", "off"] {
        let told = find(&df["vms"], |found| found["name"] == vm);
        let disk = &told["disk"];
        let folder = PathBuf::from(daemon.inspect(vm)["directory"].as_str().unwrap());
        let disks = ["overlay.ext4", "work.ext4"].map(|name| folder.join(name));
        let true_bytes = disks
            .iter()
            .filter(|disk| disk.exists())
            .map(|disk| allocated(disk))
            .sum();
        // The guest writes on meanwhile.
        near(number(&disk["allocated"]), true_bytes, MIB, vm);
        assert_eq!(
            number(&disk["allocated"]),
            number(&disk["unique"]) + number(&disk["shared"]),
            "{disk}"
        );
        assert!(base.ends_with(told["base"].as_str().unwrap()));
    }
    let on = find(&df["vms"], |found| found["name"] == "on");
    assert!(number(&on["disk"]["unique"]) > 20_000_000, "{on}");
    let memory = &on["memory"];
    let [rss, pss, unique, shared] = ["rss", "pss", "unique", "shared"].map(|key| number(&memory[key]));
    assert!(0 < unique && unique <= pss && pss <= rss, "{memory}");
    near(rss, unique + shared, slack, "memory");
    let pids = daemon
        .virtiofsds_of(&shared_folder)
        .into_iter()
        .map(|process| i64::from(process.pid));
    let pids: Vec<i64> = pids.chain(daemon.inspect("on")["pid"].as_i64()).collect();
    assert!(
        number(&memory["processes"]) >= 2,
        "the VMM and a virtiofsd: {memory}"
    );
    let true_rss = resident(pids);
    near(rss, true_rss, true_rss / 4, "resident memory");
    assert!(find(&df["vms"], |found| found["name"] == "off")["memory"].is_null());

    let everything =
        ["blobs", "bases", "kernels", "vms"].map(|folder| allocated(&daemon.data().join(folder)));
    near(
        number(&df["totals"]["disk"]),
        everything.iter().sum(),
        4 * MIB,
        "everything",
    );
    let table = daemon.ok(["df"]);
    assert!(
        table.contains("TYPE") && daemon.ok(["df", "-v"]).contains("derived:1"),
        "{table}"
    );
    daemon.finish();
}

/// `image verify` finds just this damaged, says so with status 1, and gives this hint.
fn damaged(daemon: &Daemon, name: &str, hint: &str) {
    let output = daemon.cli(["image", "verify", IMAGE]).run();
    let said = text(&output.stdout) + &text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains(name) && said.to_lowercase().contains("damaged"),
        "{name}: {said}"
    );
    let hints: Vec<_> = said.lines().filter(|line| line.starts_with("hint: ")).collect();
    assert!(hints.iter().any(|line| line.contains(hint)), "{name}: {said}");
    let output = daemon.cli(["image", "verify", "--output", "json", IMAGE]).run();
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for part in report["parts"].as_array().unwrap() {
        let is_it = part["name"].as_str().unwrap().contains(name);
        assert_eq!(
            part["state"],
            if is_it { "damaged" } else { "ok" },
            "{name}: {part}"
        );
    }
}

#[test]
fn damage_is_found_and_mended() {
    let daemon = Daemon::start();
    let base = prepared_base(&daemon);
    let report = json(&daemon, &["image", "verify", IMAGE]);
    let parts = report["parts"].as_array().unwrap();
    assert!(
        parts.len() >= 6,
        "manifest, config, layer, root and two seeds: {report}"
    );
    assert!(parts.iter().all(|part| part["state"] == "ok"), "{report}");
    for file in ["root.erofs", "overlay-seed.ext4", "work-seed.ext4"] {
        let path = base.join(file);
        own_copy(&path);
        // Within the superblock of either file system: no hole.
        flip_byte(&path, 1024 + 20);
        damaged(&daemon, file, "offshoot image prepare --force");
        let before = daemon.preparations();
        daemon.ok(["image", "prepare", "--force", IMAGE]);
        assert_eq!(daemon.preparations(), before + 1);
        daemon.ok(["image", "verify", IMAGE]);
    }
    // Also far inside, where nothing is looked at before somebody reads that file.
    let root = base.join("root.erofs");
    own_copy(&root);
    flip_byte(&root, std::fs::metadata(&root).unwrap().len() / 2);
    damaged(&daemon, "root.erofs", "offshoot image prepare --force");
    daemon.ok(["image", "prepare", "--force", IMAGE]);
    assert_eq!(daemon.ok(["run", "--rm", IMAGE, "echo", "whole"]), "whole");

    // What the base is made from can only be fetched again.
    let store = daemon.data().join("blobs/sha256");
    let largest = names(&store)
        .into_iter()
        .max_by_key(|name| std::fs::metadata(store.join(name)).unwrap().len())
        .unwrap();
    let blob = store.join(&largest);
    own_copy(&blob);
    let at = std::fs::metadata(&blob).unwrap().len() / 2;
    let was = flip_byte(&blob, at);
    damaged(&daemon, &largest, "offshoot image rm");
    put_byte(&blob, at, was);
    assert_eq!(sha256(&blob), largest);
    daemon.ok(["image", "verify", IMAGE]);
    daemon.finish();
}

#[test]
fn a_base_of_another_version_is_made_again() {
    let daemon = Daemon::start();
    let manifest = prepared_base(&daemon).join("base.json");
    for (key, old) in [
        ("format", Value::from(0)),
        ("variant", Value::from("root.erofs=0")),
    ] {
        own_copy(&manifest);
        let mut json: Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
        let current = std::mem::replace(&mut json[key], old);
        assert!(!current.is_null(), "base.json has no `{key}`");
        std::fs::write(&manifest, json.to_string()).unwrap();
        let before = daemon.preparations();
        assert_eq!(
            daemon.ok(["run", "--rm", "--memory", "256m", IMAGE, "echo", "new"]),
            "new"
        );
        assert_eq!(daemon.preparations(), before + 1, "{key}");
        let json: Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
        assert_eq!(json[key], current);
    }
    daemon.finish();
}

/// Things by kind, and name or id.
type Items = Vec<(String, String)>;

/// `prune` with a grace time; gives what it removed, and what was too young.
fn prune(daemon: &Daemon, words: &[&str]) -> (Items, Items) {
    let report = json(daemon, &[&["prune", "--force"], words].concat());
    assert_eq!(report["failed"].as_array().map_or(0, Vec::len), 0, "{report}");
    let items = |key: &str| {
        let items = report[key].as_array().unwrap().iter();
        let word = |item: &Value, key: &str| item[key].as_str().unwrap().to_owned();
        items
            .map(|item| (word(item, "kind"), word(item, "name")))
            .collect()
    };
    (items("removed"), items("kept_for_grace"))
}

#[test]
fn prune_takes_what_nothing_leases() {
    let daemon = Daemon::start();
    let base = prepared_base(&daemon);
    let base_item = (
        "base".to_owned(),
        base.file_name().unwrap().to_string_lossy().into_owned(),
    );
    let tree_item = ("tree".to_owned(), base_item.1.clone());
    // A blob that no image speaks of, as a daemon leaves it that was killed at the right moment.
    let lost = daemon.root().join("lost");
    std::fs::write(&lost, vec![7; 1_000_000]).unwrap();
    let digest = sha256(&lost);
    let blob = daemon.data().join("blobs/sha256").join(&digest);
    std::fs::copy(&lost, &blob).unwrap();
    let blob_item = ("blob".to_owned(), format!("sha256:{digest}"));
    // A tree that was needed once, and a base that a VM needs.
    daemon.ok([
        "run", "--rm", "--root", "virtiofs", "--memory", "256m", IMAGE, "true",
    ]);
    assert!(base.join("tree").is_dir());
    daemon.ok([
        "create", "--name", "user", "--root", "block", "--memory", "256m", IMAGE, "sleep", "1000",
    ]);

    let unasked = daemon.cli(["prune"]).fails(2);
    assert!(
        unasked.contains("hint: ") && unasked.contains("--force"),
        "{unasked}"
    );
    let (removed, young) = prune(&daemon, &["--all", "--grace", "1h"]);
    assert_eq!(removed, []);
    assert!(
        young.contains(&blob_item) && young.contains(&tree_item),
        "{young:?}"
    );
    assert!(blob.exists() && base.join("tree").exists());

    let (removed, young) = prune(&daemon, &["--all", "--grace", "0s"]);
    assert!(
        removed.contains(&blob_item) && removed.contains(&tree_item),
        "{removed:?}"
    );
    assert!(!removed.contains(&base_item), "a VM has its root from it");
    assert_eq!(young, []);
    assert!(!blob.exists() && !base.join("tree").exists() && base.join("root.erofs").exists());
    daemon.ok(["start", "user"]);
    assert_eq!(daemon.ok(["exec", "user", "echo", "there"]), "there");

    // Without its VM only `--all` takes it, and not at once.
    daemon.ok(["rm", "-f", "user"]);
    assert_eq!(prune(&daemon, &["--grace", "0s"]), (vec![], vec![]));
    let (removed, young) = prune(&daemon, &["--all", "--grace", "1h"]);
    assert_eq!((removed, young), (vec![], vec![base_item.clone()]));
    let (removed, _) = prune(&daemon, &["--all", "--grace", "0s"]);
    assert_eq!(removed, [base_item]);
    assert_eq!(names(&daemon.data().join("bases")), [""; 0]);
    let images = json(&daemon, &["image", "ls"]);
    assert_eq!(images[0]["prepared"], false, "the image itself stays: {images}");
    assert_eq!(
        daemon.ok(["run", "--rm", "--memory", "256m", IMAGE, "echo", "again"]),
        "again"
    );
    daemon.finish();
}

/// VMs that are created while somebody prunes.
const CREATES: usize = 20;
/// How many at once.
const ROUND: usize = 4;

#[test]
fn creates_win_against_a_prune() {
    let daemon = Daemon::start();
    prepared_base(&daemon);
    let vms: Vec<String> = (0..CREATES).map(|n| format!("vm{n}")).collect();
    let (passing, staying) = vms.split_at(CREATES - ROUND);
    let mut pruned = 0;
    let mut refused = 0;
    std::thread::scope(|scope| {
        let creating = scope.spawn(|| {
            let create = |vms: &[String]| {
                daemon.all_ok(
                    vms.iter()
                        .map(|vm| vec!["create", "--name", vm, "--memory", "256m", IMAGE, "true"]),
                );
            };
            // Between the rounds nothing needs the base, so that it goes and must come again.
            for round in passing.chunks(ROUND) {
                create(round);
                daemon.ok([&["rm".to_owned()], round].concat());
            }
            create(staying);
        });
        while !creating.is_finished() {
            let output = daemon.cli(["prune", "--force", "--all", "--grace", "0s"]).run();
            let said = text(&output.stderr);
            match output.status.code() {
                Some(0) => pruned += 1,
                // It gives way, and says when to come back.
                Some(1) => {
                    refused += 1;
                    assert!(said.contains("hint: "), "{said}");
                }
                status => panic!("{status:?}: {said}"),
            }
        }
    });
    offshoot_e2e::tell(&format!("{pruned} times pruned, {refused} times refused"));
    assert!(pruned > 0, "nothing was ever pruned");
    let bases = daemon.data().join("bases");
    for vm in staying {
        let base = daemon.inspect(vm)["base"].as_str().unwrap().to_owned();
        let root = bases.join(base).join("root.erofs");
        assert!(whole(&root), "{vm} has no root: {}", root.display());
    }
    daemon.ok(["start", &staying[0]]);
    assert_eq!(daemon.ok(["wait", &staying[0]]), "0");
    daemon.finish();
}

fn whole(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.size() > 0)
}
