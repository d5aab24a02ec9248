//! How the fake is told to misbehave: words in one environment variable.

use std::str::FromStr;
use std::time::Duration;

/// What the fake does besides behaving.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Behaviour {
    /// `exit`: complain on standard error and exit with status 1 at once.
    pub exit: bool,
    /// `hang`: accept a client and say nothing.
    pub hang: bool,
    /// `garbage`: greet with something that is not QMP.
    pub garbage: bool,
    /// `deaf`: ignore `quit`.
    pub deaf: bool,
    /// `refuse=COMMAND`: answer this command with an error. May be given several times.
    pub refuse: Vec<String>,
    /// `die=REQUEST`: vanish when this is asked. May be given several times.
    pub die: Vec<String>,
    /// `silent=REQUEST`: never answer this. May be given several times.
    pub silent: Vec<String>,
    /// `die-after-ms=N`: vanish, as after a crash.
    pub die_after: Option<Duration>,
    /// `power-off-after-ms=N`: the guest switches itself off.
    pub power_off_after: Option<Duration>,
    /// `console=TEXT`: what the guest's console has said.
    pub console: String,
}

/// A word that is none of those.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is not something that the fake VMM can do")]
pub struct BehaviourError {
    /// The word.
    pub word: String,
}

impl Behaviour {
    /// The environment variable that holds the words.
    pub const VARIABLE: &str = "OFFSHOOT_FAKE_VMM";
}

impl FromStr for Behaviour {
    type Err = BehaviourError;

    /// Words separated by white space.
    fn from_str(text: &str) -> Result<Self, BehaviourError> {
        let mut out = Self::default();
        for word in text.split_ascii_whitespace() {
            let refuse = || BehaviourError {
                word: word.to_owned(),
            };
            let millis = |value: &str| {
                value
                    .parse()
                    .map(Duration::from_millis)
                    .map(Some)
                    .map_err(|_| refuse())
            };
            match word.split_once('=') {
                None if word == "exit" => out.exit = true,
                None if word == "hang" => out.hang = true,
                None if word == "garbage" => out.garbage = true,
                None if word == "deaf" => out.deaf = true,
                Some(("refuse", command)) => out.refuse.push(command.to_owned()),
                Some(("die", request)) => out.die.push(request.to_owned()),
                Some(("silent", request)) => out.silent.push(request.to_owned()),
                Some(("die-after-ms", value)) => out.die_after = millis(value)?,
                Some(("power-off-after-ms", value)) => out.power_off_after = millis(value)?,
                Some(("console", value)) => value.clone_into(&mut out.console),
                _ => return Err(refuse()),
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read() {
        let read: Behaviour = "hang refuse=stop refuse=cont die-after-ms=5 console=hi"
            .parse()
            .unwrap();
        let expected = Behaviour {
            hang: true,
            refuse: vec!["stop".into(), "cont".into()],
            die_after: Some(Duration::from_millis(5)),
            console: "hi".into(),
            ..Behaviour::default()
        };
        assert_eq!(read, expected);
        assert_eq!("".parse(), Ok(Behaviour::default()));
        for bad in ["dance", "hang=1", "die-after-ms", "die-after-ms=x"] {
            assert!(bad.parse::<Behaviour>().is_err(), "{bad}");
        }
    }
}
