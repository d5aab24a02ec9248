//! Mounts and loop devices.

use std::process::Command;

use super::Marks;
use crate::text;

pub(super) fn mounts(marks: &Marks) -> Vec<String> {
    let all = std::fs::read_to_string("/proc/mounts").expect("/proc/mounts");
    marked(&all, marks)
}

pub(super) fn loops(marks: &Marks) -> Vec<String> {
    let output = Command::new("losetup")
        .args(["-ln", "-O", "NAME,BACK-FILE"])
        .output()
        .expect("losetup");
    assert!(output.status.success(), "losetup: {}", text(&output.stderr));
    marked(&text(&output.stdout), marks)
}

fn marked(lines: &str, marks: &Marks) -> Vec<String> {
    let lines = lines.lines().filter(|line| marks.are_in(line));
    lines.map(str::to_owned).collect()
}
