//! Hearing of other processes' commits, and syncing grouped ones.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anybroker_core::{Effect, Error, ErrorKind, Result, Retry};
use notify::event::ModifyKind;
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use parking_lot::{Condvar, Mutex};

use crate::inbox::Inbox;

/// How often a waiting receive looks by itself, should a notification get lost.
pub(crate) const SAFETY: Duration = Duration::from_secs(2);

/// The same where the system does not notify at all.
pub(crate) const UNNOTIFIED: Duration = Duration::from_millis(100);

/// The write-ahead log beside a database file.
pub(crate) fn log_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// Tells every process that has the file open of a commit: it touches the file's time of change, which costs one system
/// call, and the watchers hear of it. The commit itself is written to the log, where it would be heard of too: once for
/// each page, and before it can be seen.
pub(crate) struct Bell {
    path: PathBuf,
    rings: bool,
}

impl Bell {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), rings: true }
    }

    /// Something was committed that others may wait for.
    pub(crate) fn ring(&mut self) {
        if self.rings
            && let Err(error) = touch(&self.path)
        {
            tracing::warn!(%error, "other processes cannot be told of commits; they look for them instead");
            self.rings = false;
        }
    }
}

/// By path: to open the file and close it again would drop SQLite's locks on it
/// (<https://www.sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_>).
#[cfg(unix)]
fn touch(path: &Path) -> std::io::Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, utimensat};
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    // Both times: changing one of them alone is told of as a write or a read (`fsnotify_change` in Linux).
    let times = Timestamps { last_access: now, last_modification: now };
    Ok(utimensat(CWD, path, &times, AtFlags::empty())?)
}

#[cfg(not(unix))]
fn touch(_path: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Tells the writer when some process has rung the [`Bell`]. Costs nothing while nobody commits. `None` where the
/// system does not notify (too many watches, no such service): then waiting receives look by themselves, more often.
pub(crate) fn watch(path: &Path, inbox: &Arc<Inbox>) -> Option<RecommendedWatcher> {
    let inbox = Arc::downgrade(inbox);
    let told = move |event: notify::Result<notify::Event>| {
        let touched = event.as_ref().map_or(true, |event| {
            event.need_rescan() || matches!(event.kind, EventKind::Modify(kind) if !matches!(kind, ModifyKind::Data(_)))
        });
        if let Some(inbox) = inbox.upgrade().filter(|_| touched) {
            inbox.look();
        }
    };
    let watcher = notify::recommended_watcher(told)
        .and_then(|mut watcher| watcher.watch(path, RecursiveMode::NonRecursive).map(|()| watcher));
    match watcher {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::warn!(%error, "no notification of other processes' commits; receives look for them instead");
            None
        }
    }
}

/// Syncs what was committed, once per window, on a thread of its own.
pub(crate) struct GroupSync {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    unsynced: bool,
    ending: bool,
    failure: Option<std::io::Error>,
}

impl GroupSync {
    /// Starts the thread. It opens the log for itself: SQLite keeps no locks on that file, so that closing it again
    /// drops none.
    pub(crate) fn start(path: &Path, window: Duration) -> std::io::Result<Self> {
        let log = File::open(log_of(path))?;
        let shared = Arc::new(Shared::default());
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("anybroker-sync".into()).spawn(move || shared.run(&log, window))?
        };
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Something was committed and is not synced yet.
    pub(crate) fn committed(&self) {
        let mut state = self.shared.state.lock();
        if !std::mem::replace(&mut state.unsynced, true) {
            self.shared.changed.notify_one();
        }
    }

    /// The system failed to sync. What it could not write it may have dropped, so a later success proves nothing
    /// (<https://wiki.postgresql.org/wiki/Fsync_Errors>): nothing more is confirmed.
    pub(crate) fn failure(&self) -> Option<Error> {
        let state = self.shared.state.lock();
        let cause = state.failure.as_ref()?;
        let text = format!("the system failed to sync the file, what was confirmed last may be lost: {cause}");
        Some(
            Error::new(ErrorKind::Unavailable, "sync", text)
                .with("cause", "sync")
                .with_effect(Effect::NotDone)
                .with_retry(Retry::Never),
        )
    }

    /// Syncs what is left and ends the thread.
    pub(crate) fn end(mut self) -> Result<()> {
        self.stop();
        self.failure().map_or(Ok(()), Err)
    }

    fn stop(&mut self) {
        self.shared.state.lock().ending = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the syncing thread panicked");
        }
    }
}

impl Drop for GroupSync {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn run(&self, log: &File, window: Duration) {
        loop {
            let mut state = self.state.lock();
            while !state.unsynced && !state.ending {
                self.changed.wait(&mut state);
            }
            let deadline = std::time::Instant::now() + window;
            while !state.ending && !self.changed.wait_until(&mut state, deadline).timed_out() {}
            let (unsynced, ending) = (std::mem::take(&mut state.unsynced), state.ending);
            drop(state);
            if unsynced && let Err(error) = log.sync_data() {
                tracing::error!(%error, "grouped commits could not be synced");
                self.state.lock().failure.get_or_insert(error);
            }
            if ending {
                return;
            }
        }
    }
}
