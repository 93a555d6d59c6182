//! Which faults a case meets, from its seed.

use std::fmt;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;

use super::http::Answers;

/// A fault of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Reset, and so are new ones while it lasts.
    Cut,
    /// Ended in an orderly way, and new ones are reset while it lasts.
    Finish,
    /// The server sees a reset, the client nothing.
    HalfOpen,
    /// Nothing passes in either direction, and nobody is told.
    BlackHole,
    /// The server gets nothing more; what it says itself arrives.
    DeafServer,
    /// What the server says is lost; what the client says arrives.
    DropAnswers,
    /// What the client says is lost; what the server says arrives.
    DropRequests,
    /// Late and narrow.
    Slow {
        /// How late each piece is.
        delay: Duration,
        /// How many bytes pass in a second; 0 for all.
        bytes_per_second: u32,
    },
    /// Each connection is reset when so many more bytes of one direction have passed.
    CutAfter {
        /// How many.
        bytes: u64,
        /// Of the server's bytes, not of the client's.
        answers: bool,
    },
    /// Requests are answered in the place of the server, where they are HTTP's.
    Answered(Answers),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut => f.write_str("cut (reset)"),
            Self::Finish => f.write_str("cut (orderly)"),
            Self::HalfOpen => f.write_str("half-open"),
            Self::BlackHole => f.write_str("black hole"),
            Self::DeafServer => f.write_str("black hole towards the server"),
            Self::DropAnswers => f.write_str("answers dropped"),
            Self::DropRequests => f.write_str("requests dropped"),
            Self::Slow { delay, bytes_per_second } => write!(f, "slow ({delay:?} late, {bytes_per_second} B/s)"),
            Self::CutAfter { bytes, answers: false } => write!(f, "cut after {bytes} B of the client's"),
            Self::CutAfter { bytes, answers: true } => write!(f, "cut after {bytes} B of the server's"),
            Self::Answered(Answers::OfTheServer) => f.write_str("answered by the server"),
            Self::Answered(Answers::Unavailable) => f.write_str("answered 503, not passed on"),
            Self::Answered(Answers::DoneButUnavailable) => f.write_str("done, and answered 503"),
            Self::Answered(Answers::Throttled) => f.write_str("throttled"),
        }
    }
}

/// A fault, whom it hits, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) kind: Kind,
    pub(crate) lasts: Duration,
    /// A publisher's connection, not a consumer's.
    pub(crate) publishing: bool,
    /// Chooses which one.
    pub(crate) whom: usize,
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = if self.publishing { "a publisher" } else { "a member" };
        write!(f, "{}, of {whose}, for {:?}", self.kind, self.lasts)
    }
}

/// `count` faults; `kind` draws each.
pub(crate) fn plan(
    random: &mut StdRng,
    count: usize,
    mut kind: impl FnMut(&mut StdRng) -> (Kind, Duration, bool),
) -> Vec<Planned> {
    (0..count)
        .map(|_| {
            let (kind, lasts, publishing) = kind(random);
            Planned { kind, lasts, publishing, whom: random.random_range(0..usize::MAX) }
        })
        .collect()
}
