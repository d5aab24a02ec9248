//! Which request is legal in which state. Pure; the owner task asks it before anything is done.

use offshoot_model::VmState;

/// What a client can ask of a VM that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// Boot it.
    Start,
    /// Ask its guest to end, then kill it.
    Stop,
    /// Stop it if it runs, and boot it.
    Restart,
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
    /// Undo a start that is under way.
    Cancel,
    /// Look after it; nobody outside asks for this.
    Tend,
}

impl RequestKind {
    /// Every kind, for tables and tests.
    pub const ALL: [Self; 15] = [
        Self::Start,
        Self::Stop,
        Self::Restart,
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
        Self::Cancel,
        Self::Tend,
    ];

    /// What it does, as a verb for messages: `cannot <verb> VM …`.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Kill => "kill",
            Self::Signal => "signal",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Reset | Self::ResetForced => "reset",
            Self::Remove | Self::RemoveForced => "remove",
            Self::Rename => "rename",
            Self::Session => "enter",
            Self::Cancel => "cancel the start of",
            Self::Tend => "look after",
        }
    }

    /// Whether it cuts a start short that is under way.
    pub fn interrupts_start(self) -> bool {
        matches!(
            self,
            Self::Stop | Self::Restart | Self::Kill | Self::ResetForced | Self::RemoveForced | Self::Cancel
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
        (R::Rename | R::RemoveForced | R::ResetForced | R::Restart | R::Cancel | R::Tend, _) => Verdict::Do,

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

/// Where a VM is after `request` was done in `state`; `None` when it is gone.
pub fn outcome(state: VmState, request: RequestKind) -> Option<VmState> {
    use RequestKind as R;
    Some(match request {
        R::Start | R::Restart | R::Resume => VmState::Running,
        R::Stop | R::Kill => VmState::Stopped,
        R::Pause => VmState::Paused,
        R::Reset | R::ResetForced if state.has_vmm() => VmState::Stopped,
        R::Remove | R::RemoveForced => return None,
        R::Reset | R::ResetForced | R::Signal | R::Rename | R::Session | R::Cancel | R::Tend => state,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_request() -> impl Strategy<Value = RequestKind> {
        (0..RequestKind::ALL.len()).prop_map(|n| RequestKind::ALL[n])
    }

    fn any_state() -> impl Strategy<Value = VmState> {
        (0..STATES.len()).prop_map(|n| STATES[n])
    }

    proptest! {
        /// Whatever is asked in whatever order: no VMM is started twice, forgotten, or stands between a VM and its end.
        #[test]
        fn a_life_of_requests_keeps_its_promises(
            first in any_state(),
            requests in proptest::collection::vec(any_request(), 0..40),
        ) {
            let mut state = first;
            for request in requests {
                match decide(state, request) {
                    Verdict::Do => {
                        let starts = request == RequestKind::Start;
                        prop_assert!(!(starts && state.has_vmm()), "a second VMM: {state} {request:?}");
                        let Some(next) = outcome(state, request) else {
                            let kills = request == RequestKind::RemoveForced;
                            prop_assert!(kills || !state.has_vmm(), "a VMM without a VM: {state} {request:?}");
                            return Ok(());
                        };
                        // Only what ends, starts, halts or resumes it moves it, and it rests where it came to.
                        let again = [RequestKind::ResetForced, RequestKind::Restart];
                        if next != state && !again.contains(&request) {
                            prop_assert_ne!(decide(next, request), Verdict::Do, "{} {:?}", next, request);
                        }
                        state = next;
                    }
                    Verdict::AlreadySo => prop_assert_eq!(outcome(state, request).map(VmState::has_vmm), Some(state.has_vmm())),
                    Verdict::Refuse(hint) => prop_assert!(hint.contains("`offshoot "), "{}", hint),
                }
                prop_assert_eq!(decide(state, RequestKind::RemoveForced), Verdict::Do);
            }
        }
    }

    const STATES: [VmState; 7] = VmState::ALL;

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
