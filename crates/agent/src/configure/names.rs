//! The files by which a guest knows names: hostname(5), hosts(5), resolv.conf(5).
//!
//! They are written where they do not say it already, so that a restart writes nothing. Everything here runs with the
//! guest's root: its symlinks lead where the image meant, and nowhere else.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::network::NetworkPlan;

/// The largest of these files that is looked at.
const MAX_FILE: u64 = 1 << 20;

/// How many symlinks are followed to where a file should be: as many as the kernel follows (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// What ends the lines of `/etc/hosts` that are ours.
const OURS: &str = "# this VM";

/// The address that Debian gives to the name of a machine without a network.
const OWN_ADDRESS: &str = "127.0.1.1";

/// Where systemd-resolved is, when an image has it.
const RESOLVED: [&str; 2] = ["usr/lib/systemd/systemd-resolved", "lib/systemd/systemd-resolved"];

/// What a guest is told of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names {
    hostname: String,
    /// Its own addresses; none without a network.
    addresses: Vec<IpAddr>,
    nameservers: Vec<IpAddr>,
    domain: String,
}

impl Names {
    /// Those of a guest with this name on this network.
    pub(super) fn new(hostname: &str, network: Option<&NetworkPlan>) -> Self {
        Self {
            hostname: hostname.to_owned(),
            addresses: network.map_or_else(Vec::new, |network| {
                network.addresses.iter().map(ipnet::IpNet::addr).collect()
            }),
            nameservers: network.map_or_else(Vec::new, |network| network.nameservers.clone()),
            domain: network.map_or_else(String::new, |network| network.domain.clone()),
        }
    }
}

/// Writes the files below a root that has an `/etc`. Without name servers resolv.conf stays what it is.
pub(super) fn write(root: &Path, names: &Names) -> io::Result<()> {
    write_through(&root.join("etc/hostname"), &format!("{}\n", names.hostname))?;
    let hosts = root.join("etc/hosts");
    write_through(&hosts, &hosts_with(&read(&hosts).unwrap_or_default(), names))?;
    if names.nameservers.is_empty() {
        return Ok(());
    }
    write_through(&root.join("etc/resolv.conf"), &resolv_conf(names))?;
    // Where resolv.conf leads into its folder, systemd-resolved writes over it, and would know no server.
    if RESOLVED
        .iter()
        .any(|program| fs::exists(root.join(program)).unwrap_or(false))
    {
        let folder = root.join("run/systemd/resolved.conf.d");
        fs::create_dir_all(&folder)?;
        write_through(&folder.join("offshoot.conf"), &resolved_conf(names))?;
    }
    Ok(())
}

/// Writes machine-id(5) below a root that has an `/etc`; nothing when there is none to write.
pub(super) fn write_machine_id(root: &Path, id: &str) -> io::Result<()> {
    if id.is_empty() {
        return Ok(());
    }
    write_through(&root.join("etc/machine-id"), &format!("{id}\n"))
}

/// A file's text, when it is a plain file of a sensible size.
fn read(path: &Path) -> Option<String> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .ok()?;
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return None;
    }
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Writes a file through symlinks to where they lead; folders that are missing there are made. What cannot be written
/// so (a device, a pipe, something in `/proc`, a circle) is replaced by a file.
fn write_through(path: &Path, content: &str) -> io::Result<()> {
    if read(path).as_deref() == Some(content) {
        return Ok(());
    }
    let written = overwrite(path, content).or_else(|error| {
        if error.kind() != io::ErrorKind::NotFound {
            return Err(error);
        }
        // A symlink to what is not there yet.
        if let Some(folder) = end_of_links(path).parent() {
            fs::create_dir_all(folder)?;
        }
        overwrite(path, content)
    });
    if written.is_ok() {
        return Ok(());
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    open(path, OpenOptions::new().create_new(true))?.write_all(content.as_bytes())
}

/// Writes into the plain file that is there or is made.
fn overwrite(path: &Path, content: &str) -> io::Result<()> {
    let mut file = open(path, OpenOptions::new().create(true).truncate(true))?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    file.write_all(content.as_bytes())
}

fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    // A pipe that nobody reads from would be waited for.
    let options = options.write(true).mode(0o644).custom_flags(libc::O_NONBLOCK);
    options.open(path)
}

/// Where a chain of symlinks ends, whether anything is there or not.
fn end_of_links(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match (fs::read_link(&path), path.parent()) {
            (Ok(target), Some(folder)) => path = folder.join(target),
            _ => break,
        }
    }
    path
}

/// The hosts file that also knows the guest's own name. Docker writes such a file into every container, and users expect
/// their name to resolve.
fn hosts_with(hosts: &str, names: &Names) -> String {
    const LOCALHOST: &str = "127.0.0.1\tlocalhost\n\
        ::1\tlocalhost ip6-localhost ip6-loopback\n\
        fe00::\tip6-localnet\n\
        ff00::\tip6-mcastprefix\n\
        ff02::1\tip6-allnodes\n\
        ff02::2\tip6-allrouters\n";
    let hostname = &names.hostname;
    let without_network = format!("{OWN_ADDRESS}\t{hostname}");
    let fields = |line: &str| -> Vec<String> {
        let line = line.split('#').next().unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect()
    };
    let knows = |hosts: &str, name: &str| {
        hosts
            .lines()
            .any(|line| fields(line).iter().skip(1).any(|known| known == name))
    };
    // Names and addresses it had before, as when an image was made of a VM.
    let was_ours = |line: &str| {
        let fields = fields(line);
        let own = fields.first().is_some_and(|address| address == OWN_ADDRESS);
        line.ends_with(OURS)
            || own && !fields.contains(hostname)
            || line == without_network && !names.addresses.is_empty()
    };
    let mut new: String = hosts
        .lines()
        .filter(|line| !was_ours(line))
        .map(|line| format!("{line}\n"))
        .collect();
    if knows(&new, hostname) {
        // The image's own word.
        return new;
    }
    if !knows(&new, "localhost") {
        new.insert_str(0, LOCALHOST);
    }
    if names.addresses.is_empty() && hostname != "localhost" {
        new.push_str(&format!("{without_network}\n"));
    }
    // The whole name first: it is the one that `hostname -f` says.
    let whole = if names.domain.is_empty() || hostname.contains('.') {
        String::new()
    } else {
        format!("{hostname}.{} ", names.domain)
    };
    for address in &names.addresses {
        new.push_str(&format!("{address}\t{whole}{hostname}\t{OURS}\n"));
    }
    new
}

/// resolv.conf(5) of a guest on a network.
fn resolv_conf(names: &Names) -> String {
    let mut text = "# Written at every start of the VM.\n".to_owned();
    for server in &names.nameservers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !names.domain.is_empty() {
        text.push_str(&format!("search {}\n", names.domain));
    }
    text
}

/// resolved.conf(5) that says the same.
fn resolved_conf(names: &Names) -> String {
    let servers: Vec<String> = names.nameservers.iter().map(ToString::to_string).collect();
    let mut text = format!("[Resolve]\nDNS={}\n", servers.join(" "));
    if !names.domain.is_empty() {
        text.push_str(&format!("Domains={}\n", names.domain));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn alone(hostname: &str) -> Names {
        Names::new(hostname, None)
    }

    fn on_a_network(hostname: &str) -> Names {
        let address = |text: &str| text.parse().unwrap();
        Names {
            hostname: hostname.into(),
            addresses: vec![address("10.87.0.2"), address("fd00:57::2")],
            nameservers: vec![address("10.87.0.1"), address("fd00:57::1")],
            domain: "vm.internal".into(),
        }
    }

    const RESOLV_CONF: &str = "# Written at every start of the VM.\nnameserver 10.87.0.1\nnameserver fd00:57::1\nsearch vm.internal\n";

    #[test]
    fn the_hosts_file_knows_the_guest_once() {
        let first = hosts_with("", &alone("vm"));
        assert!(
            first.starts_with("127.0.0.1\tlocalhost\n") && first.ends_with("127.0.1.1\tvm\n"),
            "{first}"
        );
        assert_eq!(hosts_with(&first, &alone("vm")), first);
        let renamed = hosts_with(&first, &alone("other"));
        assert_eq!(renamed, first.replace("127.0.1.1\tvm", "127.0.1.1\tother"));
        let own = hosts_with("127.0.0.1 localhost\n10.0.0.1 db # vm", &alone("vm"));
        assert_eq!(own, "127.0.0.1 localhost\n10.0.0.1 db # vm\n127.0.1.1\tvm\n");
        let named = "127.0.0.1 localhost vm\n";
        assert_eq!(hosts_with(named, &alone("vm")), named);
        assert_eq!(hosts_with(named, &on_a_network("vm")), named);
    }

    #[test]
    fn on_a_network_the_guest_has_its_addresses() {
        let ours = "10.87.0.2\tvm.vm.internal vm\t# this VM\nfd00:57::2\tvm.vm.internal vm\t# this VM\n";
        let before = hosts_with("", &alone("vm"));
        let after = hosts_with(&before, &on_a_network("vm"));
        assert_eq!(after, before.replace("127.0.1.1\tvm\n", ours));
        assert_eq!(hosts_with(&after, &on_a_network("vm")), after);
        let other = hosts_with(&after, &on_a_network("other"));
        assert_eq!(
            other,
            after.replace("vm.vm.internal vm", "other.vm.internal other")
        );
        assert_eq!(hosts_with(&other, &alone("vm")), before);
        // An alias that the user gave it.
        let alias = "127.0.0.1 localhost\n127.0.1.1\tvm alias\n";
        assert_eq!(hosts_with(alias, &on_a_network("vm")), alias);
        let whole = hosts_with("127.0.0.1 localhost\n", &on_a_network("vm.example.org"));
        assert!(whole.contains("10.87.0.2\tvm.example.org\t"), "{whole}");
    }

    /// A root with an `/etc` that a test can fill.
    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        root
    }

    #[test]
    fn resolv_conf_is_written_and_only_on_a_network() {
        let root = root();
        let path = root.path().join("etc/resolv.conf");
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        write(root.path(), &alone("vm")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 192.0.2.1\n");
        write(root.path(), &on_a_network("vm")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), RESOLV_CONF);
        assert_eq!(
            fs::read_to_string(root.path().join("etc/hostname")).unwrap(),
            "vm\n"
        );
        assert!(!root.path().join("run").exists());
        // What is right already is not even opened for writing.
        let readable = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o444);
        fs::set_permissions(&path, readable).unwrap();
        let before = fs::metadata(&path).unwrap().modified().unwrap();
        write(root.path(), &on_a_network("vm")).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
    }

    #[test]
    fn a_link_to_a_stub_leads_to_a_file_and_resolved_learns_the_servers() {
        let root = root();
        let path = root.path().join("etc/resolv.conf");
        symlink("../run/systemd/resolve/stub-resolv.conf", &path).unwrap();
        fs::create_dir_all(root.path().join("usr/lib/systemd")).unwrap();
        fs::write(root.path().join("usr/lib/systemd/systemd-resolved"), "").unwrap();
        write(root.path(), &on_a_network("vm")).unwrap();
        assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&path).unwrap(), RESOLV_CONF);
        let conf = fs::read_to_string(root.path().join("run/systemd/resolved.conf.d/offshoot.conf")).unwrap();
        assert_eq!(conf, "[Resolve]\nDNS=10.87.0.1 fd00:57::1\nDomains=vm.internal\n");
    }

    #[test]
    fn what_cannot_be_written_through_is_replaced() {
        let check = |make: &dyn Fn(&Path)| {
            let root = root();
            let path = root.path().join("etc/resolv.conf");
            make(&path);
            write(root.path(), &on_a_network("vm")).unwrap();
            assert!(fs::symlink_metadata(&path).unwrap().is_file());
            assert_eq!(fs::read_to_string(&path).unwrap(), RESOLV_CONF);
        };
        check(&|path| symlink("/dev/null", path).unwrap());
        check(&|path| symlink("/proc/net/pnp", path).unwrap());
        check(&|path| symlink("resolv.conf", path).unwrap());
        check(&|path| symlink("hosts/file", path).unwrap());
        check(&|path| {
            let made = std::process::Command::new("mkfifo").arg(path).status();
            assert!(made.unwrap().success());
        });
        // A folder is the image's own mistake.
        let root = root();
        fs::create_dir(root.path().join("etc/resolv.conf")).unwrap();
        assert!(write(root.path(), &on_a_network("vm")).is_err());
    }
}
