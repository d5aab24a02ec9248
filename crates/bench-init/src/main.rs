//! The least that an init must do to run `true` on an overlay root: what `offshoot run` is measured against.
//!
//! No agent, no channel, no configuration: load the modules, mount the disks, run the program, say `done`.

#![expect(clippy::print_stdout, reason = "the console is how the benchmark is told")]

use std::fs::{File, create_dir_all, read_to_string};
use std::os::fd::AsFd as _;
use std::process::Command;

use rustix::mount::{MountFlags, mount};

fn main() {
    if let Err(error) = run() {
        println!("failed: {error}");
    }
    loop {
        std::thread::park();
    }
}

fn run() -> std::io::Result<()> {
    const NO: MountFlags = MountFlags::empty();
    mount("proc", "/proc", "proc", NO, None)?;
    mount("sysfs", "/sys", "sysfs", NO, None)?;
    mount("devtmpfs", "/dev", "devtmpfs", NO, None)?;
    for module in read_to_string("/modules/order")?
        .lines()
        .filter(|line| !line.is_empty())
    {
        let path = if module.starts_with('/') {
            module.to_owned()
        } else {
            format!("/modules/{module}")
        };
        // A module whose device is not there says so; that is no failure.
        let _ = rustix::system::finit_module(File::open(path)?.as_fd(), c"", 0);
    }
    create_dir_all("/lower")?;
    create_dir_all("/overlay")?;
    create_dir_all("/sysroot")?;
    mount(device("root")?, "/lower", "erofs", MountFlags::RDONLY, None)?;
    mount(device("overlay")?, "/overlay", "ext4", MountFlags::NOATIME, None)?;
    create_dir_all("/overlay/upper")?;
    create_dir_all("/overlay/work")?;
    let options = c"lowerdir=/lower,upperdir=/overlay/upper,workdir=/overlay/work";
    mount("overlay", "/sysroot", "overlay", NO, Some(options))?;
    mount(
        device("work")?,
        "/sysroot/root",
        "ext4",
        MountFlags::NOATIME,
        None,
    )?;
    mount("proc", "/sysroot/proc", "proc", NO, None)?;
    rustix::process::chroot("/sysroot")?;
    std::env::set_current_dir("/")?;
    let status = Command::new("/bin/true").status()?;
    println!("done {status}");
    Ok(())
}

/// The disk with a serial, once it is there.
fn device(serial: &str) -> std::io::Result<String> {
    loop {
        for entry in std::fs::read_dir("/sys/block")? {
            let entry = entry?;
            if read_to_string(entry.path().join("serial")).is_ok_and(|text| text.trim_end() == serial) {
                return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
            }
        }
    }
}
