//! Ordered, repeatable message headers with byte values.

use std::fmt;

use bytes::Bytes;

/// The headers of a message: ordered, repeatable names (UTF-8), each with a byte value.
///
/// They are kept packed in one buffer, so that a message's headers cost at most one allocation to build and
/// none to read or to share. A name may stand more than once; order is kept.
///
/// ```
/// use anybroker_core::Headers;
/// let mut headers = Headers::new();
/// headers.append("tenant", "acme").append("trace", [0xff, 0x00]).append("tenant", "beta");
/// assert_eq!(headers.get("tenant"), Some(&b"acme"[..]));
/// assert_eq!(headers.iter().count(), 3);
/// ```
#[derive(Clone, Default)]
pub struct Headers {
    packed: Packed,
    len: u32,
}

#[derive(Clone)]
enum Packed {
    Owned(Vec<u8>),
    Shared(Bytes),
}

impl Default for Packed {
    fn default() -> Self {
        Self::Owned(Vec::new())
    }
}

/// Room for four short headers, so that appending does not grow the buffer step by step.
const FIRST_CAPACITY: usize = 128;

impl Headers {
    /// No headers. Does not allocate.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// No headers yet, with room for `bytes` of names and values plus 8 bytes for each header.
    #[must_use]
    pub fn with_capacity(bytes: usize) -> Self {
        Self { packed: Packed::Owned(Vec::with_capacity(bytes)), len: 0 }
    }

    /// Adds a header behind the others, even when the name is there already.
    pub fn append(&mut self, name: impl AsRef<str>, value: impl AsRef<[u8]>) -> &mut Self {
        let (name, value) = (name.as_ref().as_bytes(), value.as_ref());
        let buffer = self.owned(8 + name.len() + value.len());
        buffer.extend_from_slice(&length(name).to_le_bytes());
        buffer.extend_from_slice(name);
        buffer.extend_from_slice(&length(value).to_le_bytes());
        buffer.extend_from_slice(value);
        self.len += 1;
        self
    }

    /// Removes every header of that name, then adds this one.
    pub fn set(&mut self, name: impl AsRef<str>, value: impl AsRef<[u8]>) -> &mut Self {
        if self.get(name.as_ref()).is_some() {
            self.remove(name.as_ref());
        }
        self.append(name, value)
    }

    /// Removes every header of that name and tells how many there were.
    pub fn remove(&mut self, name: &str) -> usize {
        let before = self.len;
        self.retain(|other, _| other != name);
        (before - self.len) as usize
    }

    /// Keeps only the headers for which `keep` answers true.
    pub fn retain(&mut self, mut keep: impl FnMut(&str, &[u8]) -> bool) {
        if self.iter().all(|(name, value)| keep(name, value)) {
            return;
        }
        let mut kept = Self::with_capacity(self.packed_len());
        for (name, value) in self.iter() {
            if keep(name, value) {
                kept.append(name, value);
            }
        }
        *self = kept;
    }

    /// The first value under that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter().find(|(other, _)| *other == name).map(|(_, value)| value)
    }

    /// The first value under that name, where it is UTF-8.
    #[must_use]
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Names and values in order.
    #[must_use]
    pub fn iter(&self) -> Iter<'_> {
        Iter { rest: self.bytes() }
    }

    /// How many headers there are (repeated names counted each time).
    #[must_use]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes of all names and values together, without framing.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.packed_len() - 8 * self.len()
    }

    /// The packed form: per header a little-endian `u32` name length, the name, a `u32` value length, the value.
    /// It is what durable adapters store; [`from_packed`](Self::from_packed) reads it back.
    #[must_use]
    pub fn as_packed(&self) -> &[u8] {
        self.bytes()
    }

    /// Headers over a packed buffer (see [`as_packed`](Self::as_packed)), which is shared, not copied.
    /// `None` when the buffer is not well formed.
    #[must_use]
    pub fn from_packed(packed: Bytes) -> Option<Self> {
        let (mut rest, mut len) = (&packed[..], 0u32);
        while !rest.is_empty() {
            let (name, after) = field(rest)?;
            std::str::from_utf8(name).ok()?;
            let (_, after) = field(after)?;
            rest = after;
            len += 1;
        }
        Some(Self { packed: Packed::Shared(packed), len })
    }

    fn bytes(&self) -> &[u8] {
        match &self.packed {
            Packed::Owned(buffer) => buffer,
            Packed::Shared(buffer) => buffer,
        }
    }

    fn packed_len(&self) -> usize {
        self.bytes().len()
    }

    fn owned(&mut self, more: usize) -> &mut Vec<u8> {
        if let Packed::Shared(shared) = &self.packed {
            let mut buffer = Vec::with_capacity(shared.len() + more);
            buffer.extend_from_slice(shared);
            self.packed = Packed::Owned(buffer);
        }
        match &mut self.packed {
            Packed::Owned(buffer) => {
                if buffer.capacity() == 0 {
                    buffer.reserve(more.max(FIRST_CAPACITY));
                }
                buffer
            }
            Packed::Shared(_) => unreachable!("replaced just above"),
        }
    }
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("a header name or value of 4 GiB cannot be built")
}

fn field(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = rest.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

/// The iterator of [`Headers::iter`].
#[derive(Debug, Clone)]
pub struct Iter<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Iter<'a> {
    type Item = (&'a str, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, rest) = field(self.rest)?;
        let (value, rest) = field(rest)?;
        self.rest = rest;
        Some((std::str::from_utf8(name).unwrap_or_default(), value))
    }
}

impl<'a> IntoIterator for &'a Headers {
    type Item = (&'a str, &'a [u8]);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<N: AsRef<str>, V: AsRef<[u8]>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        let mut headers = Self::new();
        headers.extend(pairs);
        headers
    }
}

impl<N: AsRef<str>, V: AsRef<[u8]>> Extend<(N, V)> for Headers {
    fn extend<I: IntoIterator<Item = (N, V)>>(&mut self, pairs: I) {
        for (name, value) in pairs {
            self.append(name, value);
        }
    }
}

impl PartialEq for Headers {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Headers {}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(|(name, value)| format!("{name}: {}", value.escape_ascii()))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_repeats_and_bytes_survive_packing() {
        let mut headers = Headers::new();
        headers.append("a", "1").append("A", [0, 255]).append("a", "").append("ключ", "значение");
        let packed = Headers::from_packed(Bytes::copy_from_slice(headers.as_packed())).expect("well formed");
        assert_eq!(packed, headers);
        assert_eq!(packed.len(), 4);
        assert_eq!(packed.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "A", "a", "ключ"]);
        assert_eq!(packed.byte_len(), 1 + 1 + 1 + 2 + 1 + 8 + 16);
    }

    #[test]
    fn set_replaces_all_and_remove_counts() {
        let mut headers: Headers = [("a", "1"), ("b", "2"), ("a", "3")].into_iter().collect();
        headers.set("a", "4");
        assert_eq!(headers.iter().filter(|(name, _)| *name == "a").count(), 1);
        assert_eq!(headers.remove("b"), 1);
        assert_eq!(headers.remove("b"), 0);
        assert_eq!(headers.len(), 1);
    }

    #[test]
    fn shared_headers_are_copied_before_they_change() {
        let mut first = Headers::new();
        first.append("a", "1");
        let shared = Headers::from_packed(Bytes::copy_from_slice(first.as_packed())).expect("well formed");
        let mut changed = shared.clone();
        changed.append("b", "2");
        assert_eq!((shared.len(), changed.len()), (1, 2));
    }

    #[test]
    fn a_cut_buffer_is_refused() {
        let mut headers = Headers::new();
        headers.append("name", "value");
        let packed = headers.as_packed();
        for end in 1..packed.len() {
            assert!(Headers::from_packed(Bytes::copy_from_slice(&packed[..end])).is_none(), "{end}");
        }
    }
}
