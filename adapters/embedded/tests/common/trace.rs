//! What a power loss leaves: a process is run under `strace`, and the files are built again from its system calls with
//! everything discarded that no sync had reached.
#![allow(dead_code, reason = "each test file uses some of it")]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use rand::RngExt;
use rand::rngs::StdRng;

/// One call that matters, in the order in which the calls ended.
#[derive(Debug)]
pub(crate) enum Step {
    Write {
        file: PathBuf,
        offset: u64,
        bytes: Vec<u8>,
    },
    Truncate {
        file: PathBuf,
        length: u64,
    },
    /// The file's writes that ended before this sync began are on the disk. `begun` is its place in the list.
    Sync {
        file: PathBuf,
        begun: usize,
    },
    Remove {
        file: PathBuf,
    },
    /// A line to the standard output, and when.
    Said {
        line: String,
        at: f64,
    },
}

/// Reads the output of `strace -f -y -ttt -xx -e trace=…` for the files below `directory`.
pub(crate) fn steps(trace: &str, directory: &Path) -> Vec<Step> {
    let mut steps = Vec::new();
    // Calls that strace shows in two parts: by thread, the first part and the place where it stood.
    let mut unfinished: HashMap<&str, (String, usize)> = HashMap::new();
    for line in trace.lines() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let Some((at, call)) = rest.trim_start().split_once(' ') else { continue };
        let at: f64 = at.parse().unwrap();
        if let Some(begin) = call.strip_suffix(" <unfinished ...>") {
            unfinished.insert(thread, (begin.to_owned(), steps.len()));
            continue;
        }
        let (call, begun) = match call.strip_prefix("<... ").and_then(|call| call.split_once(" resumed>")) {
            Some((_, end)) => match unfinished.remove(thread) {
                Some((begin, begun)) => (format!("{begin}{end}"), begun),
                None => continue,
            },
            None => (call.to_owned(), steps.len()),
        };
        steps.extend(step(&call, begun, at, directory));
    }
    steps
}

fn step(call: &str, begun: usize, at: f64, directory: &Path) -> Option<Step> {
    let (name, rest) = call.split_once('(')?;
    let (arguments, result) = rest.rsplit_once(") = ").or_else(|| rest.rsplit_once(')'))?;
    let result = result.trim_start_matches([' ', '=']);
    if result.starts_with('-') {
        return None;
    }
    if name == "unlink" || name == "unlinkat" {
        let file = PathBuf::from(String::from_utf8(text(arguments)?).ok()?);
        return file.starts_with(directory).then_some(Step::Remove { file });
    }
    let (descriptor, path) = arguments.split_once('<')?;
    let (path, rest) = path.split_once('>')?;
    let file = PathBuf::from(String::from_utf8(unescape(path)).ok()?);
    if name == "write" && descriptor == "1" {
        return Some(Step::Said { line: String::from_utf8_lossy(&text(rest)?).trim_end().to_owned(), at });
    }
    if !file.starts_with(directory) {
        return None;
    }
    match name {
        "pwrite64" => {
            let bytes = text(rest)?;
            let offset = rest.rsplit_once(", ")?.1.parse().unwrap();
            let written: usize = result.split_whitespace().next()?.parse().unwrap();
            assert_eq!(written, bytes.len(), "strace cut a string: {file:?}");
            Some(Step::Write { file, offset, bytes })
        }
        "ftruncate" => Some(Step::Truncate { file, length: rest.trim_start_matches(", ").parse().unwrap() }),
        "fsync" | "fdatasync" => Some(Step::Sync { file, begun }),
        // The index is shared memory; SQLite builds it anew. Anything else would be a write that is not understood.
        "write" | "writev" | "pwritev" | "rename" => panic!("a call that this test does not know: {call:.200}"),
        _ => None,
    }
}

/// The string argument of a call.
fn text(arguments: &str) -> Option<Vec<u8>> {
    let (_, rest) = arguments.split_once('"')?;
    let (text, _) = rest.split_once('"')?;
    Some(unescape(text))
}

/// `\x2f` and plain characters.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len() / 4);
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        if let [b'\\', b'x', high, low, after @ ..] = rest {
            let digit = |byte: &u8| char::from(*byte).to_digit(16).unwrap() as u8;
            bytes.push(digit(high) << 4 | digit(low));
            rest = after;
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    bytes
}

/// What is on the disk when the power goes after `until` steps: what was synced, and of the rest what `keep` lets through
/// (a disk writes in any order).
pub(crate) fn disk(steps: &[Step], until: usize, mut keep: impl FnMut() -> bool) -> BTreeMap<PathBuf, Vec<u8>> {
    // The last sync of each file that has ended, by where it began.
    let mut synced: HashMap<&Path, usize> = HashMap::new();
    for step in &steps[..until] {
        if let Step::Sync { file, begun } = step {
            let place = synced.entry(file).or_default();
            *place = (*place).max(*begun);
        }
    }
    let mut files: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    for (place, step) in steps[..until].iter().enumerate() {
        let mut lasts = |file: &Path| synced.get(file).is_some_and(|sync| place < *sync) || keep();
        match step {
            Step::Write { file, offset, bytes } if lasts(file) => {
                let content = files.entry(file.clone()).or_default();
                let offset = usize::try_from(*offset).unwrap();
                content.resize(content.len().max(offset + bytes.len()), 0);
                content[offset..offset + bytes.len()].copy_from_slice(bytes);
            }
            Step::Truncate { file, length } if lasts(file) => {
                files.entry(file.clone()).or_default().resize(usize::try_from(*length).unwrap(), 0);
            }
            Step::Remove { file } => drop(files.remove(file)),
            _ => {}
        }
    }
    files
}

/// Lets half of the unsynced writes through.
pub(crate) fn any_order(random: &mut StdRng) -> impl FnMut() -> bool {
    || random.random_bool(0.5)
}
