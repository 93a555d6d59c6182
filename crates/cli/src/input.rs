//! Lines of input, read in a thread of their own and bounded in number and size.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::exit::Failure;

/// How many lines wait between the reading thread and the broker.
const QUEUE: usize = 1_000;
/// How much input may be in memory, in KiB: read and without an outcome yet.
const MEMORY_KIB: u32 = 64 * 1024;

/// One line, without its line feed.
pub(crate) struct Line {
    /// Counted from 1.
    pub(crate) number: u64,
    pub(crate) content: Content,
    pub(crate) share: Share,
}

/// A line's share of the memory bound, given back when it is dropped.
pub(crate) struct Share {
    _permit: OwnedSemaphorePermit,
}

pub(crate) enum Content {
    Bytes(Vec<u8>),
    /// Longer than any message of the endpoint; only counted, not kept.
    TooLong(u64),
}

/// An opened file, or standard input.
pub(crate) type Source = Box<dyn Read + Send>;

/// Opens `path`; `-` is standard input. A file that cannot be opened is a mistake on the command line.
pub(crate) fn open(path: &Path) -> Result<Source, Failure> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin()));
    }
    match File::open(path) {
        Ok(file) => Ok(Box::new(file)),
        Err(error) => Err(Failure::Usage(format!("--file {}: {error}", path.display()))),
    }
}

/// The lines of a file or of standard input, as they come. An `Err` is the last item.
pub(crate) struct Lines(mpsc::Receiver<io::Result<Line>>);

impl Lines {
    /// Begins to read. Lines above `longest` bytes are skipped over.
    pub(crate) fn read(source: Source, longest: usize) -> Result<Self, Failure> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let runtime = tokio::runtime::Handle::current();
        // A plain thread: reading a terminal or a pipe blocks, and the runtime would wait for its own threads.
        std::thread::Builder::new()
            .name("input".into())
            .spawn(move || {
                let memory = Arc::new(Semaphore::new(MEMORY_KIB as usize));
                let mut source = BufReader::with_capacity(64 * 1024, source);
                for number in 1.. {
                    let line = match read_line(&mut source, longest) {
                        Ok(None) => return,
                        Ok(Some(content)) => content,
                        Err(error) => {
                            // Nobody waits for it any more where this fails.
                            let _ = sender.blocking_send(Err(error));
                            return;
                        }
                    };
                    let size = match &line {
                        Content::Bytes(bytes) => bytes.len() / 1024 + 1,
                        Content::TooLong(_) => 1,
                    };
                    let share = u32::try_from(size).unwrap_or(u32::MAX).min(MEMORY_KIB);
                    let Ok(permit) = runtime.block_on(Arc::clone(&memory).acquire_many_owned(share)) else { return };
                    let share = Share { _permit: permit };
                    if sender.blocking_send(Ok(Line { number, content: line, share })).is_err() {
                        return;
                    }
                }
            })
            .map_err(|error| Failure::Io("start reading", error))?;
        Ok(Self(receiver))
    }

    /// Waits for a line, then takes what is there, up to `max`. Empty at the end of the input. Cancel-safe.
    pub(crate) async fn next(&mut self, max: usize) -> Vec<io::Result<Line>> {
        let mut lines = Vec::new();
        self.0.recv_many(&mut lines, max).await;
        lines
    }
}

/// A line is what stands before a line feed, or before the end of the input; a carriage return belongs to it.
fn read_line(source: &mut impl BufRead, longest: usize) -> io::Result<Option<Content>> {
    let mut bytes = Vec::new();
    let room = longest as u64 + 1;
    if source.by_ref().take(room).read_until(b'\n', &mut bytes)? == 0 {
        return Ok(None);
    }
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
        return Ok(Some(Content::Bytes(bytes)));
    }
    if bytes.len() <= longest {
        return Ok(Some(Content::Bytes(bytes)));
    }
    let mut length = bytes.len() as u64;
    drop(bytes);
    loop {
        let buffer = source.fill_buf()?;
        if buffer.is_empty() {
            return Ok(Some(Content::TooLong(length)));
        }
        match buffer.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                length += end as u64;
                source.consume(end + 1);
                return Ok(Some(Content::TooLong(length)));
            }
            None => {
                length += buffer.len() as u64;
                let all = buffer.len();
                source.consume(all);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(input: &[u8], longest: usize) -> Vec<Result<Vec<u8>, u64>> {
        let mut source = BufReader::with_capacity(3, input);
        std::iter::from_fn(|| read_line(&mut source, longest).expect("memory can be read"))
            .map(|content| match content {
                Content::Bytes(bytes) => Ok(bytes),
                Content::TooLong(length) => Err(length),
            })
            .collect()
    }

    #[test]
    fn an_empty_line_is_a_line_and_the_last_one_needs_no_line_feed() {
        assert_eq!(lines(b"a\n\nb", 10), [Ok(b"a".to_vec()), Ok(vec![]), Ok(b"b".to_vec())]);
        assert_eq!(lines(b"a\n", 10), [Ok(b"a".to_vec())]);
        assert!(lines(b"", 10).is_empty());
    }

    #[test]
    fn bytes_stay_as_they_are() {
        assert_eq!(lines(b"\xff\0\r\n", 10), [Ok(b"\xff\0\r".to_vec())]);
    }

    #[test]
    fn a_line_that_is_too_long_does_not_spoil_the_next() {
        assert_eq!(lines(b"12345\n123456789012\nx", 5), [Ok(b"12345".to_vec()), Err(12), Ok(b"x".to_vec())]);
        assert_eq!(lines(b"123456", 5), [Err(6)]);
    }
}
