//! Folders and files, and the names that are the state.

use std::fs::{self, File};
use std::io::{self, ErrorKind::NotFound as Missing};
use std::path::{Path, PathBuf};

use anybroker_core::{
    Bytes, Destination, Error, ErrorKind, Group, Headers, Lag, Message, MessageId, Precision, Result, Start, Timestamp,
};
use serde::{Deserialize, Serialize};

/// The name of a mark: what a group knows of a message. `until` is when a ready one is due, or when a held one's lease ends.
#[derive(Clone, Copy)]
pub(crate) struct Mark {
    pub(crate) number: u64,
    pub(crate) attempt: u32,
    pub(crate) redrives: u32,
    pub(crate) until: i64,
}

impl Mark {
    /// The same, to be had at once.
    pub(crate) fn due(self) -> Self {
        Self { until: Timestamp::now().as_millis(), ..self }
    }

    pub(crate) fn name(&self) -> String {
        format!("{:020}-{}-{}-{}", self.number, self.attempt, self.redrives, self.until)
    }

    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.splitn(4, '-');
        let mut next = || parts.next();
        let (number, attempt) = (next()?.parse().ok()?, next()?.parse().ok()?);
        Some(Self { number, attempt, redrives: next()?.parse().ok()?, until: next()?.parse().ok()? })
    }
}

/// A message as it is stored: this in one line, then the payload as it is. JSON of bytes is a number each, which takes seconds for
/// some megabytes.
#[derive(Serialize, Deserialize)]
struct Stored {
    id: MessageId,
    key: Option<Vec<u8>>,
    headers: Vec<u8>,
    content_type: Option<String>,
    timestamp: i64,
}

/// A dead letter, beside its message.
#[derive(Serialize, Deserialize)]
pub(crate) struct Letter {
    pub(crate) reason: String,
    pub(crate) error_type: Option<String>,
    pub(crate) detail: Option<String>,
    pub(crate) attempts: u32,
    pub(crate) redrives: u32,
    pub(crate) at: i64,
}

/// A destination's folder.
#[derive(Clone)]
pub(crate) struct Topic {
    pub(crate) name: Destination,
    pub(crate) folder: PathBuf,
}

impl Topic {
    pub(crate) fn at(root: &Path, name: &Destination) -> Self {
        Self { name: name.clone(), folder: root.join(escaped(name)) }
    }

    /// Whether it is there; an error that says so otherwise.
    pub(crate) fn found(self, operation: &'static str) -> Result<Self> {
        if self.folder.join("all").is_dir() {
            return Ok(self);
        }
        Err(Error::new(ErrorKind::NotFound, operation, "there is no such destination").with("destination", &self.name))
    }

    /// Creates it where it is missing; whether it was.
    pub(crate) fn create(&self) -> Result<bool> {
        let is_new = !self.folder.join("all").is_dir();
        fs::create_dir_all(self.folder.join("groups")).map_err(|error| io_error("declare", error))?;
        fs::create_dir_all(self.folder.join("all")).map_err(|error| io_error("declare", error))?;
        Ok(is_new)
    }

    pub(crate) fn group(&self, group: &Group) -> PathBuf {
        self.folder.join("groups").join(escaped(group))
    }

    pub(crate) fn found_group(&self, group: &Group, operation: &'static str) -> Result<PathBuf> {
        let folder = self.group(group);
        if folder.is_dir() {
            return Ok(folder);
        }
        let error = Error::new(ErrorKind::NotFound, operation, "there is no such group");
        Err(error.with("destination", &self.name).with("group", group))
    }

    /// Publishing and the creation of groups exclude each other: a new group misses no message, and gets none twice.
    fn lock(&self) -> io::Result<File> {
        let lock = File::create(self.folder.join("lock"))?;
        lock.lock()?;
        Ok(lock)
    }

    /// Creates a group where it is missing; whether it was.
    pub(crate) fn create_group(&self, group: &Group, start: Start) -> Result<bool> {
        let create = || {
            let _lock = self.lock()?;
            let folder = self.group(group);
            if folder.is_dir() {
                return Ok(false);
            }
            // It counts as there when it has its name; until then nobody publishes.
            let unfinished = self.folder.join("groups").join(format!(".new-{}", escaped(group)));
            let _ = fs::remove_dir_all(&unfinished);
            for part in ["ready", "held", "dead"] {
                fs::create_dir_all(unfinished.join(part))?;
            }
            if start == Start::Earliest {
                for name in names(&self.folder.join("all"))? {
                    if let Ok(number) = name.parse() {
                        let mark = Mark { number, attempt: 1, redrives: 0, until: 0 };
                        File::create(unfinished.join("ready").join(mark.name()))?;
                    }
                }
            }
            fs::rename(unfinished, folder)?;
            Ok(true)
        };
        create().map_err(|error| io_error("declare", error))
    }

    /// Takes so many messages. Their numbers are used up, also where fewer are stored.
    pub(crate) fn intake(&self, count: u64) -> io::Result<Intake> {
        let lock = self.lock()?;
        let counter = self.folder.join("next");
        let next = fs::read_to_string(&counter).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
        write_whole(&counter, (next + count).to_string().as_bytes())?;
        let groups = self.folder.join("groups");
        let named = names(&groups)?.into_iter().filter(|name| !name.starts_with('.'));
        let ready = named.map(|name| groups.join(name).join("ready")).collect();
        Ok(Intake { all: self.folder.join("all"), next, ready, _lock: lock })
    }

    pub(crate) fn message(&self, number: u64) -> io::Result<Message> {
        let mut file = Bytes::from(fs::read(self.folder.join("all").join(format!("{number:020}")))?);
        let line = file.iter().position(|byte| *byte == b'\n').ok_or(io::ErrorKind::InvalidData)?;
        let stored: Stored = serde_json::from_slice(&file[..line])?;
        let timestamp = Timestamp::from_millis(stored.timestamp);
        let payload = Some(file.split_off(line + 1));
        let mut message = Message::from_parts(self.name.clone(), stored.id, timestamp, payload)
            .with_headers(Headers::from_packed(stored.headers.into()).ok_or(io::ErrorKind::InvalidData)?);
        if let Some(key) = stored.key {
            message = message.with_key(key);
        }
        Ok(match stored.content_type {
            Some(content_type) => message.with_content_type(content_type),
            None => message,
        })
    }
}

/// Where messages go in. While it is there, nobody else publishes to the destination, and no group is created.
pub(crate) struct Intake {
    all: PathBuf,
    next: u64,
    ready: Vec<PathBuf>,
    _lock: File,
}

impl Intake {
    /// Stores a message, then gives it to every group; its number.
    pub(crate) fn store(&mut self, message: &Message) -> io::Result<u64> {
        let number = self.next;
        self.next += 1;
        let stored = Stored {
            id: message.id().clone(),
            key: message.key().map(<[u8]>::to_vec),
            headers: message.headers().as_packed().to_vec(),
            content_type: message.content_type().map(str::to_owned),
            timestamp: message.timestamp().as_millis(),
        };
        let mut file = serde_json::to_vec(&stored)?;
        file.push(b'\n');
        file.extend_from_slice(message.bytes());
        write_whole(&self.all.join(format!("{number:020}")), &file)?;
        let mark = Mark { number, attempt: 1, redrives: 0, until: Timestamp::now().as_millis() };
        for group in &self.ready {
            match File::create(group.join(mark.name())) {
                // Its group was deleted meanwhile.
                Err(error) if error.kind() == Missing => {}
                created => drop(created?),
            }
        }
        Ok(number)
    }
}

/// What a group has left to do.
pub(crate) fn lag(group: &Path) -> io::Result<Lag> {
    let now = Timestamp::now().as_millis();
    let (waiting, held) = (marks(&group.join("ready"))?, marks(&group.join("held"))?);
    let count = |marks: &[Mark], until_future: bool| {
        let count = marks.iter().filter(|mark| (mark.until > now) == until_future).count();
        Some((u64::try_from(count).unwrap_or(u64::MAX), Precision::Exact))
    };
    let over = held.iter().filter(|mark| mark.until <= now).count();
    let ready = count(&waiting, false).map(|(ready, precision)| (ready + over as u64, precision));
    Ok(Lag { ready, in_flight: count(&held, true), delayed: count(&waiting, true), ..Lag::default() })
}

/// The marks in a folder, those first that have been due for longest: a message that fails again and again goes to the end each
/// time, and the others get past it.
pub(crate) fn marks(folder: &Path) -> io::Result<Vec<Mark>> {
    let mut marks: Vec<Mark> = names(folder)?.iter().filter_map(|name| Mark::parse(name)).collect();
    marks.sort_unstable_by_key(|mark| (mark.until, mark.number));
    Ok(marks)
}

pub(crate) fn names(folder: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Whether a file was there to be renamed.
pub(crate) fn renamed(from: &Path, to: &Path) -> io::Result<bool> {
    was_there(fs::rename(from, to))
}

/// Whether a file was there to be deleted.
pub(crate) fn removed(file: &Path) -> io::Result<bool> {
    was_there(fs::remove_file(file))
}

fn was_there(done: io::Result<()>) -> io::Result<bool> {
    match done {
        Err(error) if error.kind() == Missing => Ok(false),
        done => done.map(|()| true),
    }
}

/// Whoever finds the file finds all of it.
pub(crate) fn write_whole(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let unfinished = file.with_extension("part");
    fs::write(&unfinished, bytes)?;
    fs::rename(unfinished, file)
}

pub(crate) fn io_error(operation: &'static str, error: io::Error) -> Error {
    let kind = match error.kind() {
        Missing => ErrorKind::NotFound,
        io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        io::ErrorKind::InvalidFilename => ErrorKind::ConfigInvalid,
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, operation, error.to_string()).with_source(error)
}

/// A name as a file's: injective, and never `.`, `..` or one of this adapter's own.
fn escaped(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    name.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02x}") }).collect()
}

/// The name that was escaped.
pub(crate) fn unescaped(name: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = name.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = (*first == b'%').then(|| tail.get(..2)).flatten();
        let byte = code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
