//! Lines in the kernel's log, and so on the console where the kernel's log level lets them.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

static KMSG: OnceLock<Option<File>> = OnceLock::new();

/// Log levels of syslog(3).
const ERROR: u8 = 3;
const WARNING: u8 = 4;
const INFO: u8 = 6;

fn write(level: u8, message: &dyn Display) {
    let kmsg = KMSG.get_or_init(|| OpenOptions::new().write(true).open("/dev/kmsg").ok());
    let mut line = format!("<{level}>offshoot-agent: {message}\n");
    // The kernel cuts lines at about 1 KiB, and takes one line for each write.
    line.truncate(line.floor_char_boundary(900));
    let written = match kmsg.as_ref() {
        Some(mut kmsg) => kmsg.write_all(line.as_bytes()),
        None => std::io::stderr().write_all(line.as_bytes()),
    };
    // There is nobody left to tell.
    drop(written);
}

/// Something that is good to know.
pub(crate) fn info(message: impl Display) {
    write(INFO, &message);
}

/// Something that will be missed.
pub(crate) fn warning(message: impl Display) {
    write(WARNING, &message);
}

/// The last line before the end: on the console whatever the log level is.
pub(crate) fn fatal(message: impl Display) {
    write(ERROR, &message);
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        drop(write!(console, "\r\noffshoot-agent: fatal: {message}\r\n"));
    } else {
        drop(writeln!(std::io::stderr(), "offshoot-agent: fatal: {message}"));
    }
}
