//! Ack subjects: what the server says about a delivery.

/// Deliveries, stream sequence and time out of an ack subject, of which there are two forms (nats-server ADR-15).
pub(crate) fn parse(ack: &str) -> Option<(u32, u64, i64)> {
    let tokens: Vec<&str> = ack.split('.').collect();
    let first = match tokens.len() {
        9 => 4,
        11.. => 6,
        _ => return None,
    };
    let number = |index: usize| tokens.get(index)?.parse::<u64>().ok();
    let delivered = u32::try_from(number(first)?).unwrap_or(u32::MAX);
    Some((delivered, number(first + 1)?, i64::try_from(number(first + 3)?).ok()?))
}

/// The stream sequence in an ack subject.
pub(crate) fn sequence_of(ack: &str) -> Option<u64> {
    parse(ack).map(|(_, sequence, _)| sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_ack_subjects_are_read() {
        let time = 1_700_000_000_000_000_000;
        assert_eq!(parse("$JS.ACK.s.c.2.17.5.1700000000000000000.3"), Some((2, 17, time)));
        assert_eq!(parse("$JS.ACK.domain.hash.s.c.2.17.5.1700000000000000000.3.random"), Some((2, 17, time)));
        assert_eq!(parse("$JS.ACK.s.c.2"), None);
        assert_eq!(parse("other"), None);
    }
}
