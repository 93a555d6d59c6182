//! One direction of one connection.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;

use super::proxy::{Way, Weather};

/// The connection cannot go on: bytes are missing, or a side is gone.
#[derive(Debug)]
pub(super) struct Broken;

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Self
    }
}

/// A reader that counts.
pub(super) struct Counted<'a, R> {
    inner: R,
    bytes: &'a AtomicU64,
}

impl<'a, R: AsyncRead + Unpin> Counted<'a, R> {
    pub(super) fn new(inner: R, bytes: &'a AtomicU64) -> Self {
        Self { inner, bytes }
    }

    async fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(piece).await?;
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Passes bytes on, as the weather has it, until the end of the stream, which is passed on too.
pub(super) async fn run<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    mut from: Counted<'_, R>,
    mut to: W,
    mut weather: watch::Receiver<Weather>,
    way_of: fn(&Weather) -> Way,
) -> Result<(), Broken> {
    let mut piece = vec![0; 16 * 1_024];
    let mut lost = false;
    // How many bytes may pass still, and the weather that says so.
    let (mut left, mut since) = (u64::MAX, None);
    loop {
        let count = tokio::select! {
            count = from.read(&mut piece) => count?,
            changed = weather.changed() => {
                changed.map_err(|_| Broken)?;
                let way = way_of(&weather.borrow_and_update());
                if lost && way != Way::Lose {
                    return Err(Broken);
                }
                continue;
            }
        };
        if count == 0 {
            // The end goes the way of the bytes.
            let _ = passable(&mut weather, way_of).await?;
            if lost {
                return Err(Broken);
            }
            to.shutdown().await?;
            return Ok(());
        }
        let (way, number) = passable(&mut weather, way_of).await?;
        if lost && way != Way::Lose {
            return Err(Broken);
        }
        match way {
            Way::Pass | Way::Hold => to.write_all(&piece[..count]).await?,
            Way::Lose => lost = true,
            Way::Slow { delay, bytes_per_second } => {
                let millis = match bytes_per_second {
                    0 => 0,
                    rate => count as u64 * 1_000 / u64::from(rate),
                };
                tokio::time::sleep(delay + Duration::from_millis(millis)).await;
                to.write_all(&piece[..count]).await?;
            }
            Way::CutAfter(bytes) => {
                if since != Some(number) {
                    (left, since) = (bytes, Some(number));
                }
                let passing = usize::try_from(left).unwrap_or(usize::MAX).min(count);
                to.write_all(&piece[..passing]).await?;
                left -= passing as u64;
                if passing < count {
                    return Err(Broken);
                }
            }
        }
    }
}

/// Waits while bytes are held, and answers what becomes of them then.
async fn passable(weather: &mut watch::Receiver<Weather>, way_of: fn(&Weather) -> Way) -> Result<(Way, u64), Broken> {
    loop {
        let (way, number) = {
            let now = weather.borrow_and_update();
            (way_of(&now), now.number)
        };
        if way != Way::Hold {
            return Ok((way, number));
        }
        weather.changed().await.map_err(|_| Broken)?;
    }
}
