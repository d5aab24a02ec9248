//! Terminal modes as SSH tells them (RFC 4254, section 8), and as the kernel has them.

use russh::Pty;
use rustix::termios::{ControlModes, InputModes, LocalModes, OutputModes, SpecialCodeIndex, Termios};

/// A character that is switched off (RFC 4254: 255; the kernel: 0).
const OFF: u32 = 255;

fn special(mode: Pty) -> Option<SpecialCodeIndex> {
    Some(match mode {
        Pty::VINTR => SpecialCodeIndex::VINTR,
        Pty::VQUIT => SpecialCodeIndex::VQUIT,
        Pty::VERASE => SpecialCodeIndex::VERASE,
        Pty::VKILL => SpecialCodeIndex::VKILL,
        Pty::VEOF => SpecialCodeIndex::VEOF,
        Pty::VEOL => SpecialCodeIndex::VEOL,
        Pty::VEOL2 => SpecialCodeIndex::VEOL2,
        Pty::VSTART => SpecialCodeIndex::VSTART,
        Pty::VSTOP => SpecialCodeIndex::VSTOP,
        Pty::VSUSP => SpecialCodeIndex::VSUSP,
        Pty::VREPRINT => SpecialCodeIndex::VREPRINT,
        Pty::VWERASE => SpecialCodeIndex::VWERASE,
        Pty::VLNEXT => SpecialCodeIndex::VLNEXT,
        Pty::VDISCARD => SpecialCodeIndex::VDISCARD,
        _ => return None,
    })
}

fn input(mode: Pty) -> Option<InputModes> {
    Some(match mode {
        Pty::IGNPAR => InputModes::IGNPAR,
        Pty::PARMRK => InputModes::PARMRK,
        Pty::INPCK => InputModes::INPCK,
        Pty::ISTRIP => InputModes::ISTRIP,
        Pty::INLCR => InputModes::INLCR,
        Pty::IGNCR => InputModes::IGNCR,
        Pty::ICRNL => InputModes::ICRNL,
        Pty::IUCLC => InputModes::IUCLC,
        Pty::IXON => InputModes::IXON,
        Pty::IXANY => InputModes::IXANY,
        Pty::IXOFF => InputModes::IXOFF,
        Pty::IMAXBEL => InputModes::IMAXBEL,
        Pty::IUTF8 => InputModes::IUTF8,
        _ => return None,
    })
}

fn local(mode: Pty) -> Option<LocalModes> {
    Some(match mode {
        Pty::ISIG => LocalModes::ISIG,
        Pty::ICANON => LocalModes::ICANON,
        Pty::XCASE => LocalModes::XCASE,
        Pty::ECHO => LocalModes::ECHO,
        Pty::ECHOE => LocalModes::ECHOE,
        Pty::ECHOK => LocalModes::ECHOK,
        Pty::ECHONL => LocalModes::ECHONL,
        Pty::NOFLSH => LocalModes::NOFLSH,
        Pty::TOSTOP => LocalModes::TOSTOP,
        Pty::IEXTEN => LocalModes::IEXTEN,
        Pty::ECHOCTL => LocalModes::ECHOCTL,
        Pty::ECHOKE => LocalModes::ECHOKE,
        Pty::PENDIN => LocalModes::PENDIN,
        _ => return None,
    })
}

fn output(mode: Pty) -> Option<OutputModes> {
    Some(match mode {
        Pty::OPOST => OutputModes::OPOST,
        Pty::OLCUC => OutputModes::OLCUC,
        Pty::ONLCR => OutputModes::ONLCR,
        Pty::OCRNL => OutputModes::OCRNL,
        Pty::ONOCR => OutputModes::ONOCR,
        Pty::ONLRET => OutputModes::ONLRET,
        _ => return None,
    })
}

fn control(mode: Pty) -> Option<ControlModes> {
    Some(match mode {
        Pty::PARENB => ControlModes::PARENB,
        Pty::PARODD => ControlModes::PARODD,
        _ => return None,
    })
}

/// Sets what the client asked for; what the kernel does not know, and the speed, stay as they are.
pub(super) fn apply(modes: &[(Pty, u32)], termios: &mut Termios) {
    for (mode, value) in modes.iter().copied() {
        let on = value != 0;
        if let Some(index) = special(mode) {
            let character = if value == OFF { 0 } else { value };
            termios.special_codes[index] = u8::try_from(character).unwrap_or(0);
        } else if let Some(flag) = input(mode) {
            termios.input_modes.set(flag, on);
        } else if let Some(flag) = local(mode) {
            termios.local_modes.set(flag, on);
        } else if let Some(flag) = output(mode) {
            termios.output_modes.set(flag, on);
        } else if let Some(flag) = control(mode) {
            termios.control_modes.set(flag, on);
        } else if on && matches!(mode, Pty::CS7 | Pty::CS8) {
            let size = if matches!(mode, Pty::CS7) {
                ControlModes::CS7
            } else {
                ControlModes::CS8
            };
            termios.control_modes.remove(ControlModes::CSIZE);
            termios.control_modes.insert(size);
        }
    }
}

#[cfg(test)]
mod unit {
    use rustix::pty::{OpenptFlags, openpt};
    use rustix::termios::tcgetattr;

    use super::*;

    #[test]
    fn modes_are_set_and_unknown_ones_left() {
        let mut termios = tcgetattr(openpt(OpenptFlags::RDWR).unwrap()).unwrap();
        apply(
            &[
                (Pty::ECHO, 0),
                (Pty::IUTF8, 1),
                (Pty::VINTR, 24),
                (Pty::VEOL, OFF),
                (Pty::ONLCR, 0),
                (Pty::CS7, 1),
                (Pty::TTY_OP_OSPEED, 9600),
            ],
            &mut termios,
        );
        assert!(!termios.local_modes.contains(LocalModes::ECHO));
        assert!(termios.local_modes.contains(LocalModes::ICANON));
        assert!(termios.input_modes.contains(InputModes::IUTF8));
        assert!(!termios.output_modes.contains(OutputModes::ONLCR));
        assert_eq!(termios.special_codes[SpecialCodeIndex::VINTR], 24);
        assert_eq!(termios.special_codes[SpecialCodeIndex::VEOL], 0);
        assert_eq!(
            termios.control_modes.intersection(ControlModes::CSIZE),
            ControlModes::CS7
        );
    }
}
