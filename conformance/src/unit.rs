//! Transactions that record: what is published in one counts as stored when it commits, and what is settled as settled.

use std::sync::Arc;

use anybroker_core::{AckLevel, Effect, ErrorKind, Message, PublishOptions, Settlement, Transaction, settle_in};

use crate::case::Proof;
use crate::client::Client;
use crate::consumer::Held;
use crate::history::What;

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
        let transaction = client.env.bounded("begin", client.bus.begin()).await??;
        Ok(Self { client, transaction, published: Vec::new(), settled: Vec::new() })
    }

    /// Publishes messages that must all be accepted.
    pub(crate) async fn publish(&mut self, batch: Vec<Message>) -> Proof {
        self.published.extend(self.client.invoke(&batch));
        let options = PublishOptions::default().with_transaction(Arc::clone(&self.transaction));
        let publishing = async { self.client.bus.submit(batch, &options).await.await };
        for outcome in self.client.env.bounded("publish", publishing).await? {
            outcome?;
        }
        Ok(())
    }

    /// Settles deliveries; a failure fails the case.
    pub(crate) async fn settle(&mut self, batch: Vec<(Held<'e>, Settlement)>) -> Proof {
        let mut entries = Vec::with_capacity(batch.len());
        for (held, settlement) in batch {
            let (client, delivery, entry) = held.take();
            self.client.env.history.record(client, What::settle_invoke(delivery, &settlement));
            self.settled.push((client, delivery));
            entries.push((entry, settlement));
        }
        for outcome in self.client.env.bounded("settle", settle_in(&self.transaction, entries)).await? {
            outcome?;
        }
        Ok(())
    }

    pub(crate) async fn commit(self) -> Proof {
        self.client.env.bounded("commit", self.transaction.commit()).await??;
        for call in self.published {
            self.client.record(What::PublishOk { call, duplicate: false, position: None });
        }
        for (client, delivery) in self.settled {
            self.client.env.history.record(client, What::SettleOk { delivery, level: AckLevel::Confirmed });
        }
        Ok(())
    }

    pub(crate) async fn abort(self) -> Proof {
        self.is_taken_back();
        self.client.env.bounded("abort", self.transaction.abort()).await??;
        Ok(())
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
