//! One connection: publishing, topology, dead letters.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anybroker_core::capability::Capabilities;
use anybroker_core::{
    Broker, Confirms, DeadLetter, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Description, Destination,
    Effect, Endpoint, Error, ErrorKind, Group, GroupDescription, Lag, Message, Position, PublishOrder, PublishTerms,
    Receipt, Result, SubscribeSpec, Subscription, Timestamp, TopologyMode, TopologySpec, held_back,
};
use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::task::spawn_blocking;

use crate::files::{self, Intake, Letter, Mark, Topic, io_error};
use crate::member::{Member, SpoolSubscription};

/// A connection to a folder.
pub(crate) struct Spool {
    root: PathBuf,
    creates: bool,
    endpoint: Endpoint,
    record: Capabilities,
    closed: AtomicBool,
    members: Mutex<Vec<Weak<Member>>>,
}

impl Spool {
    pub(crate) fn open(root: PathBuf, url: String, creates: bool) -> Result<Self> {
        fs::create_dir_all(&root).map_err(|error| io_error("connect", error))?;
        let server = concat!("files, spool ", env!("CARGO_PKG_VERSION")).to_owned();
        let endpoint = Endpoint { scheme: "spool", mode: "default".to_owned(), url, server };
        let (closed, members) = (AtomicBool::new(false), Mutex::default());
        Ok(Self { root, creates, endpoint, record: crate::record(), closed, members })
    }

    fn topic(&self, name: &Destination, operation: &'static str) -> Result<Topic> {
        self.is_open(operation)?;
        Ok(Topic::at(&self.root, name))
    }

    fn is_open(&self, operation: &'static str) -> Result<()> {
        if self.closed.load(Ordering::Acquire) { Err(Error::closed(operation)) } else { Ok(()) }
    }

    fn dead(&self, scope: &DeadLetterScope, operation: &'static str) -> Result<(Topic, PathBuf)> {
        let topic = self.topic(&scope.source, operation)?.found(operation)?;
        let group = topic.found_group(&scope.group, operation)?;
        Ok((topic, group))
    }

    fn each(
        &self,
        scope: &DeadLetterScope,
        ids: &[DeadLetterId],
        operation: &'static str,
        change: impl Fn(&PathBuf, &str) -> std::io::Result<bool>,
    ) -> Vec<Result<()>> {
        let one = |id: &DeadLetterId| {
            let (_, group) = self.dead(scope, operation)?;
            let is_number = !id.0.is_empty() && id.0.bytes().all(|byte| byte.is_ascii_digit());
            match if is_number { change(&group, &id.0) } else { Ok(false) } {
                Ok(true) => Ok(()),
                Ok(false) => {
                    Err(Error::new(ErrorKind::NotFound, operation, "there is no such dead letter").with("letter", id))
                }
                Err(error) => Err(io_error(operation, error)),
            }
        };
        ids.iter().map(one).collect()
    }
}

fn publish_all(root: &Path, creates: bool, batch: &[Message], terms: &PublishTerms) -> Vec<Result<Receipt>> {
    let mut failed = HashSet::new();
    let mut outcomes = Vec::with_capacity(batch.len());
    // Neighbours of one destination share its lock, its count and the list of its groups.
    for run in batch.chunk_by(|one, next| one.destination() == next.destination()) {
        let mut intake = open_intake(root, creates, run);
        for message in run {
            let lane = message.key().map(|key| (message.destination().clone(), key.to_vec()));
            if lane.as_ref().is_some_and(|lane| failed.contains(lane)) {
                outcomes.push(Err(held_back(message.id(), message.destination())));
                continue;
            }
            let outcome = match &mut intake {
                Ok(intake) => {
                    intake.store(message).map_err(|error| io_error("publish", error).with("id", message.id()))
                }
                Err(error) => Err(error.duplicate()),
            };
            if let (Err(_), Some(lane), PublishOrder::Key) = (&outcome, lane, terms.order) {
                failed.insert(lane);
            }
            outcomes.push(outcome.map(|number| Receipt { position: Some(Position::new(number)), duplicate: false }));
        }
    }
    outcomes
}

fn open_intake(root: &Path, creates: bool, run: &[Message]) -> Result<Intake> {
    let topic = Topic::at(root, run[0].destination());
    let topic = if creates { topic.create().map(|_| topic)? } else { topic.found("publish")? };
    topic.intake(run.len() as u64).map_err(|error| io_error("publish", error))
}

fn read_letter(topic: &Topic, group: &Group, folder: &Path, name: &str) -> std::io::Result<DeadLetter> {
    let letter: Letter = serde_json::from_slice(&fs::read(folder.join("dead").join(name))?)?;
    let number: u64 = name.parse().map_err(|_| std::io::ErrorKind::InvalidData)?;
    Ok(DeadLetter {
        id: DeadLetterId(name.into()),
        message: topic.message(number)?,
        group: group.clone(),
        reason: letter.reason.as_str().into(),
        error_type: letter.error_type.map(Into::into),
        detail: letter.detail.map(Into::into),
        attempts: letter.attempts,
        first_at: None,
        last_at: Timestamp::from_millis(letter.at),
        redrives: letter.redrives,
        position: Some(Position::new(number)),
    })
}

#[async_trait]
impl Broker for Spool {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn capabilities(&self) -> &Capabilities {
        &self.record
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        if self.is_open("publish").is_err() {
            return Confirms::ready(batch.iter().map(|_| Err(Error::closed("publish"))).collect());
        }
        let count = batch.len();
        // On a thread for that: a batch is many files, and everybody else's tasks would wait for them.
        let (root, creates) = (self.root.clone(), self.creates);
        let publishing = spawn_blocking(move || publish_all(&root, creates, &batch, &terms));
        Confirms::waiting(async move {
            let unknown =
                || Error::new(ErrorKind::Unexpected, "publish", "its thread ended").with_effect(Effect::Unknown);
            publishing.await.unwrap_or_else(|_| (0..count).map(|_| Err(unknown())).collect())
        })
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        let mut places = Vec::new();
        for name in &spec.destinations {
            let topology = TopologySpec::group(name, &spec.group).with_start(spec.start);
            match spec.topology {
                TopologyMode::Declare => drop(self.declare(&topology).await?),
                _ => self.verify(&topology).await?,
            }
            let topic = self.topic(name, "subscribe")?;
            let group = topic.group(&spec.group);
            if places.iter().all(|(_, other)| *other != group) {
                places.push((topic, group));
            }
        }
        let subscription = SpoolSubscription::new(spec, places);
        let mut members = self.members.lock();
        members.retain(|member| member.strong_count() > 0);
        members.push(subscription.member());
        drop(members);
        self.is_open("subscribe")?;
        Ok(Box::new(subscription))
    }

    async fn dead_letters(
        &self,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        let (topic, group) = self.dead(scope, "dead letters")?;
        let failed = |error| io_error("dead letters", error);
        let mut names = files::names(&group.join("dead")).map_err(failed)?;
        names.retain(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        names.retain(|name| from.as_ref().is_none_or(|from| name.as_str() >= &*from.0));
        names.sort_unstable();
        let next = names.get(max).map(|name| DeadLetterId(name.as_str().into()));
        names.truncate(max);
        let letters: std::io::Result<Vec<_>> =
            names.iter().map(|name| read_letter(&topic, &scope.group, &group, name)).collect();
        Ok(DeadLetterPage { letters: letters.map_err(failed)?, next })
    }

    async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.each(scope, ids, "redrive", |group, name| {
            let file = group.join("dead").join(name);
            let Ok(text) = fs::read(&file) else { return Ok(false) };
            let letter: Letter = serde_json::from_slice(&text)?;
            let number = name.parse().map_err(|_| std::io::ErrorKind::InvalidData)?;
            let mark = Mark { number, attempt: 1, redrives: letter.redrives + 1, until: letter.at };
            // It is there before the letter goes: a crash in between doubles it and loses nothing.
            fs::File::create(group.join("ready").join(mark.name()))?;
            files::removed(&file)
        })
    }

    async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.each(scope, ids, "purge", |group, name| files::removed(&group.join("dead").join(name)))
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        let topic = self.topic(&spec.destination, "declare")?;
        let mut created = topic.create()?;
        if let Some(group) = &spec.group {
            created |= topic.create_group(group, spec.start)?;
        }
        Ok(if created { Declared::Created } else { Declared::Existed })
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        let topic = self.topic(&spec.destination, "verify")?.found("verify")?;
        match &spec.group {
            Some(group) => topic.found_group(group, "verify").map(drop),
            None => Ok(()),
        }
    }

    async fn describe(&self, destination: &Destination) -> Result<Description> {
        let topic = self.topic(destination, "describe")?.found("describe")?;
        let failed = |error| io_error("describe", error);
        let count = |folder: PathBuf| files::names(&folder).map(|names| names.len() as u64).map_err(failed);
        let mut groups = Vec::new();
        for name in files::names(&topic.folder.join("groups")).map_err(failed)? {
            let folder = topic.folder.join("groups").join(&name);
            if !name.starts_with('.') {
                groups.push(GroupDescription {
                    group: files::unescaped(&name).into(),
                    physical: folder.display().to_string(),
                    dead_letters: folder.join("dead").display().to_string(),
                    dead_letter_count: Some(count(folder.join("dead"))?),
                    lag: files::lag(&folder).map_err(failed)?,
                });
            }
        }
        Ok(Description {
            destination: destination.clone(),
            physical: topic.folder.display().to_string(),
            groups,
            messages: Some(count(topic.folder.join("all"))?),
            settings: Default::default(),
        })
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let topic = self.topic(destination, "delete")?.found("delete")?;
        let folder = match group {
            Some(group) => topic.found_group(group, "delete")?,
            None => topic.folder,
        };
        // Gone at once for everybody, then bit by bit.
        let gone = self.root.join(format!(".deleted-{}", anybroker_core::MessageId::new()));
        fs::rename(&folder, &gone).and_then(|()| fs::remove_dir_all(gone)).map_err(|error| io_error("delete", error))
    }

    async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag> {
        let topic = self.topic(destination, "lag")?.found("lag")?;
        files::lag(&topic.found_group(group, "lag")?).map_err(|error| io_error("lag", error))
    }

    async fn close(&self, _grace: Duration) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        let members = std::mem::take(&mut *self.members.lock());
        members.iter().filter_map(Weak::upgrade).for_each(|member| member.close());
        Ok(())
    }
}
