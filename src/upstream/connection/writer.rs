//! The writing half: whatever waits and fits the window goes out in one write.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use super::questions::Questions;
use crate::upstream::Error;

/// Writes questions until the stream refuses them.
pub(super) async fn run(mut writer: impl AsyncWrite + Unpin, questions: &Questions) -> Error {
    let mut out = BytesMut::new();
    loop {
        // Callers that were woken together get to ask before one write is made for the first.
        tokio::task::yield_now().await;
        questions.take_work(&mut out);
        if out.is_empty() {
            questions.wait_for_work().await;
            continue;
        }
        let written = async {
            writer.write_all_buf(&mut out).await?;
            writer.flush().await
        };
        if let Err(error) = written.await {
            // Why it closed may still be on its way to the reader, which then ends first.
            tokio::time::sleep(LAST_WORDS_WITHIN).await;
            return super::lost(&error);
        }
    }
}

const LAST_WORDS_WITHIN: Duration = Duration::from_secs(1);
