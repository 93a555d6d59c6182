//! Transactions that record: what is published in one counts as stored when it commits, and what is settled as settled.

use std::sync::Arc;

use anybroker_core::{AckLevel, Effect, Error, ErrorKind, Message, PublishOptions, Settlement, Transaction, settle_in};

use crate::case::Proof;
use crate::client::Client;
use crate::consumer::Held;
use crate::history::What;

/// How a transaction ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Commit,
    Abort,
    /// Without a word.
    Drop,
}

/// A transaction of a client.
pub(crate) struct Unit<'c, 'e> {
    client: &'c Client<'e>,
    pub(crate) transaction: Arc<dyn Transaction>,
    published: Vec<u64>,
    /// Client and number of each delivery.
    settled: Vec<(u32, u64)>,
}

impl<'c, 'e> Unit<'c, 'e> {
    pub(crate) async fn begin(client: &'c Client<'e>) -> Proof<Self> {
        Ok(Self::try_begin(client).await??)
    }

    /// The same, where it may fail.
    pub(crate) async fn try_begin(client: &'c Client<'e>) -> Proof<Result<Self, Error>> {
        let begun = client.env.bounded("begin", client.bus.begin()).await?;
        Ok(begun.map(|transaction| Self { client, transaction, published: Vec::new(), settled: Vec::new() }))
    }

    /// Publishes and settles, and ends so; gives it up where something of that fails.
    pub(crate) async fn try_all(
        mut self,
        batch: Vec<Message>,
        settled: Vec<(Held<'e>, Settlement)>,
        end: End,
    ) -> Proof<Result<(), Error>> {
        let filled = match self.try_publish(batch).await? {
            Ok(()) => self.try_settle(settled).await?,
            // What was to be settled is dropped with it.
            Err(error) => Err(error),
        };
        if let Err(error) = filled {
            // Whether or not the broker says so, nothing of it becomes visible.
            let _ = self.try_abort().await?;
            return Ok(Err(error));
        }
        match end {
            End::Commit => self.try_commit().await,
            End::Abort => self.try_abort().await,
            End::Drop => {
                self.vanish();
                Ok(Ok(()))
            }
        }
    }

    /// Commits, and records what is known of it.
    async fn try_commit(&self) -> Proof<Result<(), Error>> {
        let committed = self.client.env.bounded("commit", self.transaction.commit()).await?;
        match &committed {
            Ok(()) => self.is_done(),
            Err(error) if error.effect() == Effect::NotDone => self.is_taken_back(),
            Err(error) => {
                let kind = error.kind();
                for call in &self.published {
                    self.client.record(What::PublishInfo { call: *call, kind });
                }
                for (client, delivery) in &self.settled {
                    let history = &self.client.env.history;
                    history.record(*client, What::SettleFail { delivery: *delivery, kind, effect: error.effect() });
                    history.record(*client, What::Dropped { delivery: *delivery });
                }
            }
        }
        Ok(committed)
    }

    async fn try_abort(&self) -> Proof<Result<(), Error>> {
        self.is_taken_back();
        self.client.env.bounded("abort", self.transaction.abort()).await
    }

    /// Publishes messages that must all be accepted.
    pub(crate) async fn publish(&mut self, batch: Vec<Message>) -> Proof {
        Ok(self.try_publish(batch).await??)
    }

    async fn try_publish(&mut self, batch: Vec<Message>) -> Proof<Result<(), Error>> {
        self.published.extend(self.client.invoke(&batch));
        let options = PublishOptions::default().with_transaction(Arc::clone(&self.transaction));
        let publishing = async { self.client.bus.submit(batch, &options).await.await };
        let outcomes = self.client.env.bounded("publish", publishing).await?;
        Ok(outcomes.into_iter().collect::<Result<Vec<_>, _>>().map(drop))
    }

    /// Settles deliveries; a failure fails the case.
    pub(crate) async fn settle(&mut self, batch: Vec<(Held<'e>, Settlement)>) -> Proof {
        Ok(self.try_settle(batch).await??)
    }

    async fn try_settle(&mut self, batch: Vec<(Held<'e>, Settlement)>) -> Proof<Result<(), Error>> {
        let mut entries = Vec::with_capacity(batch.len());
        for (held, settlement) in batch {
            let (client, delivery, entry) = held.take();
            self.client.env.history.record(client, What::settle_invoke(delivery, &settlement));
            self.settled.push((client, delivery));
            entries.push((entry, settlement));
        }
        let outcomes = self.client.env.bounded("settle", settle_in(&self.transaction, entries)).await?;
        Ok(outcomes.into_iter().collect::<Result<Vec<_>, _>>().map(drop).map_err(Error::from))
    }

    pub(crate) async fn commit(self) -> Proof {
        Ok(self.try_commit().await??)
    }

    fn is_done(&self) {
        for call in &self.published {
            self.client.record(What::PublishOk { call: *call, duplicate: false, position: None });
        }
        for (client, delivery) in &self.settled {
            let level = AckLevel::Confirmed;
            self.client.env.history.record(*client, What::SettleOk { delivery: *delivery, level });
        }
    }

    pub(crate) async fn abort(self) -> Proof {
        Ok(self.try_abort().await??)
    }

    /// Drops it without an end.
    pub(crate) fn vanish(self) {
        self.is_taken_back();
    }

    /// None of it may be seen from here on, and what was settled may come again.
    fn is_taken_back(&self) {
        for call in &self.published {
            self.client.record(What::PublishFail { call: *call, kind: ErrorKind::Closed });
        }
        for (client, delivery) in &self.settled {
            let (kind, effect) = (ErrorKind::Unavailable, Effect::NotDone);
            let history = &self.client.env.history;
            history.record(*client, What::SettleFail { delivery: *delivery, kind, effect });
            history.record(*client, What::Dropped { delivery: *delivery });
        }
    }
}
