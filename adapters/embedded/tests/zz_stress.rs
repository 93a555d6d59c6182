#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]
use anybroker_conformance::{Options, UrlHarness, run};
use anybroker_core::{Bus, BusOptions};
use anybroker_embedded::{Durability, EmbeddedBroker, Settings};
use std::sync::Arc;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stress() {
    for seed in 700..=950u64 {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("e.db");
        let harness = UrlHarness::new("stress", move || {
            let path = path.clone();
            Box::pin(async move {
                let mut settings = Settings::new(path);
                settings.durability = Durability::Grouped;
                Ok(Bus::new(Arc::new(EmbeddedBroker::open(settings).await?), BusOptions::default()))
            })
        })
        .with_lease(Duration::from_millis(500))
        .with_quiet(Duration::from_millis(150));
        let options = Options::default().with_filter("random/*").with_seed(seed).with_parallelism(8);
        let report = run(Arc::new(harness), options).await.unwrap();
        println!("seed {seed}: {}", report.summary());
        if !report.is_green() {
            println!("{}", report.text());
        }
    }
}
