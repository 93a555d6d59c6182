//! Telling living processes from dead ones.

/// The number of this process.
pub(crate) fn id() -> i64 {
    i64::from(std::process::id())
}

/// When that process began, in ticks since the system did; 0 where there is none, or the system does not say. With it a
/// number that the system has used again is not taken for the process that had it before.
pub(crate) fn born(process: i64) -> i64 {
    // Field 22 of proc_pid_stat(5); the command in field 2 may hold anything, so counting begins behind it.
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let ticks = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19)?.parse().ok());
    // A zombie has ended: it only waits for its parent to notice.
    ticks.filter(|_| !stat.contains(") Z ")).unwrap_or(if process == id() { -1 } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_itself_and_no_dead_one() {
        assert_ne!(born(id()), 0);
        assert_eq!(born(id()), born(id()));
        assert_eq!(born(i64::MAX), 0);
    }
}
