//! Whether the kernel's clock is kept right by somebody.

use std::io;

/// Whether a time server, or another source, disciplines the clock: the kernel counts its error, and says that it does not
/// know it when nobody corrected the clock for long. Source: adjtimex(2), `STA_UNSYNC`.
pub fn is_synchronised() -> io::Result<bool> {
    // SAFETY: all zeros is a valid `timex`; no mode is set, so the kernel only writes what it knows into it.
    let (state, timex) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&raw mut timex), timex)
    };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(timex.status & libc::STA_UNSYNC == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anybody_may_ask() {
        // What it says depends on the machine; that asking changes nothing shows in the same answer again.
        assert_eq!(is_synchronised().unwrap(), is_synchronised().unwrap());
    }
}
