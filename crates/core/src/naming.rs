//! For adapters: how names that a broker does not take are made of logical ones, so that no two become the same.
//!
//! What is stored at a broker has these names: the functions give the same for ever.

use std::fmt::Write;

/// The name with every byte that is not plain written as `mark` and two hexadecimal digits. Injective, as long as no byte of
/// `mark` is plain.
///
/// ```
/// use anybroker_core::naming::{escape, unescape};
///
/// let token = escape("a.b", "=", |byte| byte.is_ascii_alphanumeric());
/// assert_eq!(token, "a=2eb");
/// assert_eq!(unescape(&token, "=").as_deref(), Some("a.b"));
/// ```
#[must_use]
pub fn escape(name: &str, mark: &str, is_plain: impl Fn(u8) -> bool) -> String {
    let mut text = String::with_capacity(name.len() + 8);
    for byte in name.bytes() {
        if is_plain(byte) {
            text.push(char::from(byte));
        } else {
            write!(text, "{mark}{byte:02x}").expect("writing to a string cannot fail");
        }
    }
    text
}

/// The name that [`escape`] made this text of, or `None` where it tells none. Other texts may give a name too: whoever has to know
/// escapes that again and compares.
#[must_use]
pub fn unescape(text: &str, mark: &str) -> Option<String> {
    let mut parts = text.split(mark);
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(part.get(..2)?, 16).ok()?);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}

/// The first `readable` bytes of an escaped text, and a hash. `h` is no hexadecimal digit: no escaped name looks like this.
///
/// # Panics
/// When the text is shorter than that, or not ASCII there.
#[must_use]
pub fn shorten(escaped: &str, mark: &str, readable: usize, hashed: &str) -> String {
    format!("{}{mark}h{:032x}", &escaped[..readable], fnv1a(hashed.as_bytes()))
}

/// FNV-1a of 128 bits (<http://www.isthe.com/chongo/tech/comp/fnv/>): not against an adversary, but far beyond chance for names.
#[must_use]
pub fn fnv1a(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash: u128, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_as_they_have_been_stored() {
        let plain = |byte: u8| byte.is_ascii_alphanumeric();
        assert_eq!(escape("a.ы-=", "--", plain), "a--2e--d1--8b--2d--3d");
        assert_eq!(fnv1a(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        // From the list of the algorithm's authors.
        assert_eq!(fnv1a(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
        assert_eq!(shorten("abc", "=", 2, "a"), "ab=hd228cb696f1a8caf78912b704e4a8964");
    }

    #[test]
    fn what_was_never_escaped_tells_no_name() {
        assert_eq!(unescape("a=2eb", "="), Some("a.b".to_owned()));
        for text in ["a=", "a=2", "a=h0", "a=ff"] {
            assert_eq!(unescape(text, "="), None, "{text}");
        }
    }
}
