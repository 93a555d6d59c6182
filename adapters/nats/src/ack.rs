//! Ack subjects: what the server says about a delivery.

/// A delivery, as its ack subject has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ack {
    /// How often the message was handed out, this time included.
    pub(crate) delivered: u32,
    /// Its place in the stream.
    pub(crate) sequence: u64,
    /// How many deliveries the consumer has made, of any message.
    pub(crate) count: u64,
    /// When it was stored, in nanoseconds of Unix time.
    pub(crate) nanos: i64,
}

/// Reads an ack subject, of which there are two forms (nats-server ADR-15).
pub(crate) fn parse(ack: &str) -> Option<Ack> {
    // One pass: this is read for each message.
    let (mut ends, mut tokens) = ([0; 11], 0);
    for (at, _) in ack.bytes().enumerate().filter(|(_, byte)| *byte == b'.') {
        if tokens < ends.len() {
            ends[tokens] = at;
        }
        tokens += 1;
    }
    let first = match tokens + 1 {
        9 => 4,
        11.. => 6,
        _ => return None,
    };
    // Neither form ends with one of these tokens.
    let number = |token: usize| ack.get(ends[token - 1] + 1..ends[token])?.parse::<u64>().ok();
    Some(Ack {
        delivered: u32::try_from(number(first)?).unwrap_or(u32::MAX),
        sequence: number(first + 1)?,
        count: number(first + 2)?,
        nanos: i64::try_from(number(first + 3)?).ok()?,
    })
}

/// What the acks of a consumer's deliveries begin with.
pub(crate) fn prefix_of(ack: &str) -> Option<&str> {
    let mut dots = ack.match_indices('.').map(|(at, _)| at);
    let end = match dots.clone().count() + 1 {
        9 => dots.nth(3),
        11.. => dots.nth(5),
        _ => None,
    };
    ack.get(..end?)
}

/// The stream sequence in an ack subject.
pub(crate) fn sequence_of(ack: &str) -> Option<u64> {
    parse(ack).map(|ack| ack.sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_ack_subjects_are_read() {
        let expected = Ack { delivered: 2, sequence: 17, count: 5, nanos: 1_700_000_000_000_000_000 };
        assert_eq!(parse("$JS.ACK.s.c.2.17.5.1700000000000000000.3"), Some(expected));
        assert_eq!(parse("$JS.ACK.domain.hash.s.c.2.17.5.1700000000000000000.3.random"), Some(expected));
        assert_eq!(parse("$JS.ACK.s.c.2"), None);
        assert_eq!(parse("other"), None);
        assert_eq!(prefix_of("$JS.ACK.s.c.2.17.5.1700000000000000000.3"), Some("$JS.ACK.s.c"));
        assert_eq!(prefix_of("$JS.ACK.domain.hash.s.c.2.17.5.17.3.random"), Some("$JS.ACK.domain.hash.s.c"));
        assert_eq!(prefix_of("other"), None);
    }
}
