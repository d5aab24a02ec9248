//! How a run ended: one status out of what is known of it. Pure.

use offshoot_model::{ExitReason, ExitStatus};

/// How a VMM that nobody ended came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    /// The guest switched itself off or asked for a reset.
    PoweredOff,
    /// The guest's kernel panicked.
    Panicked,
    /// It crashed, or somebody else killed it.
    Died,
}

/// How a run ended, out of what is known. `vmm_gone`: the VMM went by itself.
pub(crate) fn exit_status(
    reason: ExitReason,
    main_exit_before: Option<i32>,
    main_exit: Option<i32>,
    vmm_gone: Option<Gone>,
) -> ExitStatus {
    /// What a shell says of a process that SIGKILL ended.
    const KILLED: i32 = 137;
    /// Nobody told.
    const UNKNOWN: i32 = 255;
    if let Some(code) = main_exit_before {
        return ExitStatus {
            code,
            reason: ExitReason::MainExited,
        };
    }
    match (reason, vmm_gone) {
        (_, Some(Gone::PoweredOff)) => ExitStatus {
            code: main_exit.unwrap_or(0),
            reason: ExitReason::GuestPoweredOff,
        },
        (_, Some(Gone::Panicked)) => ExitStatus {
            code: main_exit.unwrap_or(UNKNOWN),
            reason: ExitReason::GuestPanicked,
        },
        (_, Some(Gone::Died)) => ExitStatus {
            code: main_exit.unwrap_or(UNKNOWN),
            reason: ExitReason::VmmDied,
        },
        (ExitReason::Lost, _) => ExitStatus {
            code: main_exit.unwrap_or(UNKNOWN),
            reason,
        },
        _ => ExitStatus {
            code: main_exit.unwrap_or(KILLED),
            reason,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_the_main_process_where_there_is_one() {
        use ExitReason as R;
        for (reason, before, after, gone, expected) in [
            (R::MainExited, Some(7), Some(7), None, (7, R::MainExited)),
            (R::Stopped, None, Some(143), None, (143, R::Stopped)),
            (R::Stopped, None, None, None, (137, R::Stopped)),
            (R::Killed, None, None, None, (137, R::Killed)),
            (
                R::VmmDied,
                None,
                None,
                Some(Gone::PoweredOff),
                (0, R::GuestPoweredOff),
            ),
            (R::VmmDied, None, None, Some(Gone::Died), (255, R::VmmDied)),
            (
                R::VmmDied,
                None,
                None,
                Some(Gone::Panicked),
                (255, R::GuestPanicked),
            ),
            (
                R::VmmDied,
                Some(3),
                Some(3),
                Some(Gone::PoweredOff),
                (3, R::MainExited),
            ),
            (R::Lost, None, None, None, (255, R::Lost)),
        ] {
            let exit = exit_status(reason, before, after, gone);
            assert_eq!((exit.code, exit.reason), expected);
        }
    }
}
