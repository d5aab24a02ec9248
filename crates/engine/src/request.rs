//! Which request is legal in which state. Pure; the owner task asks it before anything is done.

use offshoot_model::VmState;

/// What a client can ask of a VM that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// Boot it.
    Start,
    /// Ask its guest to end, then kill it.
    Stop,
    /// End it at once.
    Kill,
    /// Send a signal to its main process.
    Signal,
    /// Halt its vCPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Drop what it wrote but its work; it must not run.
    Reset,
    /// The same, running or not.
    ResetForced,
    /// Delete it; it must not run.
    Remove,
    /// Delete it, running or not.
    RemoveForced,
    /// Give it another name.
    Rename,
    /// Run one more process in it, or copy files.
    Session,
}

impl RequestKind {
    /// Every kind, for tables and tests.
    pub const ALL: [Self; 12] = [
        Self::Start,
        Self::Stop,
        Self::Kill,
        Self::Signal,
        Self::Pause,
        Self::Resume,
        Self::Reset,
        Self::ResetForced,
        Self::Remove,
        Self::RemoveForced,
        Self::Rename,
        Self::Session,
    ];

    /// What it does, as a verb for messages: `cannot <verb> VM …`.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Kill => "kill",
            Self::Signal => "signal",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Reset | Self::ResetForced => "reset",
            Self::Remove | Self::RemoveForced => "remove",
            Self::Rename => "rename",
            Self::Session => "enter",
        }
    }

    /// Whether it cuts a start short that is under way.
    pub fn interrupts_start(self) -> bool {
        matches!(
            self,
            Self::Stop | Self::Kill | Self::ResetForced | Self::RemoveForced
        )
    }
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Do it.
    Do,
    /// It is so already: answer like a success, do nothing.
    AlreadySo,
    /// It makes no sense now; the text is the command that would help, with `{}` for the VM's name.
    Refuse(&'static str),
}

/// Decides about `request` for a VM in `state`.
///
/// `Starting` and `Stopping` are seen here only by a request that was not ordered behind them: the owner task handles
/// one operation at a time, so they mean that an earlier operation broke off.
pub fn decide(state: VmState, request: RequestKind) -> Verdict {
    use RequestKind as R;
    use VmState as S;
    const START_IT: &str = "start it with `offshoot start {}`";
    const RESUME_IT: &str = "let it go on with `offshoot resume {}`";
    match (request, state) {
        (R::Rename | R::RemoveForced | R::ResetForced, _) => Verdict::Do,

        (R::Start, S::Created | S::Stopped | S::Failed) => Verdict::Do,
        (R::Start, S::Running | S::Starting) => Verdict::AlreadySo,
        (R::Start, S::Paused) => Verdict::Refuse(RESUME_IT),
        (R::Start, S::Stopping) => Verdict::Refuse("wait for it with `offshoot wait {}`"),

        (R::Stop, S::Created | S::Stopped | S::Failed) => Verdict::AlreadySo,
        (R::Stop | R::Kill, S::Running | S::Paused | S::Starting | S::Stopping) => Verdict::Do,
        (R::Kill, S::Created | S::Stopped | S::Failed) => {
            Verdict::Refuse("there is nothing to kill; see `offshoot ps -a`")
        }

        (R::Signal | R::Session, S::Running) => Verdict::Do,
        (R::Signal | R::Session, S::Paused) => Verdict::Refuse(RESUME_IT),
        (R::Signal | R::Session, _) => Verdict::Refuse(START_IT),

        (R::Pause, S::Running) => Verdict::Do,
        (R::Pause, S::Paused) => Verdict::AlreadySo,
        (R::Pause, _) => Verdict::Refuse(START_IT),

        (R::Resume, S::Paused) => Verdict::Do,
        (R::Resume, S::Running) => Verdict::AlreadySo,
        (R::Resume, _) => Verdict::Refuse(START_IT),

        (R::Reset, S::Created | S::Stopped | S::Failed) => Verdict::Do,
        (R::Reset, _) => {
            Verdict::Refuse("stop it first with `offshoot stop {0}`, or use `offshoot reset -f {0}`")
        }

        (R::Remove, S::Created | S::Stopped | S::Failed) => Verdict::Do,
        (R::Remove, _) => {
            Verdict::Refuse("stop it first with `offshoot stop {0}`, or use `offshoot rm -f {0}`")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [VmState; 7] = [
        VmState::Created,
        VmState::Starting,
        VmState::Running,
        VmState::Paused,
        VmState::Stopping,
        VmState::Stopped,
        VmState::Failed,
    ];

    #[test]
    fn every_refusal_names_a_command() {
        for state in STATES {
            for request in RequestKind::ALL {
                if let Verdict::Refuse(hint) = decide(state, request) {
                    assert!(hint.contains("`offshoot "), "{state} {request:?}: {hint}");
                }
            }
        }
    }

    #[test]
    fn no_state_is_a_dead_end() {
        for state in STATES {
            assert_eq!(decide(state, RequestKind::RemoveForced), Verdict::Do, "{state}");
            let ends = [RequestKind::Stop, RequestKind::Remove];
            assert!(ends.iter().any(|r| decide(state, *r) == Verdict::Do), "{state}");
        }
    }

    #[test]
    fn a_vmm_is_never_left_behind() {
        for state in STATES.into_iter().filter(|s| s.has_vmm()) {
            assert_ne!(decide(state, RequestKind::Remove), Verdict::Do, "{state}");
            assert_ne!(decide(state, RequestKind::Reset), Verdict::Do, "{state}");
            assert_ne!(decide(state, RequestKind::Start), Verdict::Do, "{state}");
        }
    }

    #[test]
    fn asking_twice_is_no_error() {
        for (request, state) in [
            (RequestKind::Start, VmState::Running),
            (RequestKind::Stop, VmState::Stopped),
            (RequestKind::Pause, VmState::Paused),
            (RequestKind::Resume, VmState::Running),
        ] {
            assert_eq!(decide(state, request), Verdict::AlreadySo);
        }
    }
}
