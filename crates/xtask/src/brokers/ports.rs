//! Loopback ports for servers.

use std::hash::{BuildHasher as _, RandomState};
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Below Linux's ephemeral range (32768 and up), so that no outgoing connection takes a server's port while it restarts.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// Whether a server could listen on `port` of the loopback interface now.
pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// As [`is_free`], with patience: the first thread of a killed process can be gone while others still hold its sockets, for
/// seconds on a busy machine.
pub(crate) fn is_free_soon(port: u16, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while !is_free(port) {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// A free port that is not among `taken`.
pub(crate) fn choose(taken: &[u16]) -> Result<u16> {
    let width = RANGE.end - RANGE.start;
    let random = RandomState::new();
    for attempt in 0..1_000_u64 {
        let offset = u16::try_from(random.hash_one(attempt) % u64::from(width))?;
        let port = RANGE.start + offset;
        if !taken.contains(&port) && is_free(port) {
            return Ok(port);
        }
    }
    bail!("no free loopback port between {} and {}", RANGE.start, RANGE.end);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chosen_port_is_free_and_not_one_that_is_taken() {
        let first = choose(&[]).unwrap();
        let second = choose(&[first]).unwrap();
        assert_ne!(first, second);
        let held = TcpListener::bind((Ipv4Addr::LOCALHOST, second)).unwrap();
        assert!(!is_free(held.local_addr().unwrap().port()));
    }
}
