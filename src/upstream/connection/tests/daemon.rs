//! A daemon at the other end of an in-memory pipe.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf, split};

use super::absent;
use crate::upstream::said::{LAST, numbers, text};

/// A daemon of protocol 1.34 that does what a test says.
pub struct Daemon {
    pub reader: ReadHalf<DuplexStream>,
    pub writer: WriteHalf<DuplexStream>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    HashPart(String),
    Nar(String),
}

impl Daemon {
    pub async fn greet(stream: DuplexStream) -> Self {
        let (reader, writer) = split(stream);
        let mut daemon = Self { reader, writer };
        daemon.number().await.unwrap();
        daemon.number().await.unwrap();
        daemon.say(&numbers(&[0x6478_696f, 0x122])).await;
        daemon.number().await.unwrap();
        daemon.number().await.unwrap();
        daemon
            .say(&[text("2.8.0"), numbers(&[LAST])].concat())
            .await;
        daemon
    }

    pub async fn number(&mut self) -> Option<u64> {
        self.reader.read_u64_le().await.ok()
    }

    pub async fn text(&mut self) -> Option<String> {
        let len = usize::try_from(self.number().await?).unwrap();
        let mut bytes = vec![0; len.next_multiple_of(8)];
        self.reader.read_exact(&mut bytes).await.ok()?;
        bytes.truncate(len);
        Some(String::from_utf8(bytes).unwrap())
    }

    pub async fn asked(&mut self) -> Option<Asked> {
        let operation = self.number().await?;
        let argument = self.text().await?;
        Some(match operation {
            29 => Asked::HashPart(argument),
            38 => Asked::Nar(argument),
            other => panic!("operation {other}"),
        })
    }

    pub async fn say(&mut self, bytes: &[u8]) {
        // A client that left is what some tests are about.
        let _ = self.writer.write_all(bytes).await;
        let _ = self.writer.flush().await;
    }

    /// Answers questions with "not there" until the client leaves; returns how many there were.
    pub async fn answer_all(mut self) -> usize {
        let mut count = 0;
        while self.asked().await.is_some() {
            count += 1;
            self.say(&absent()).await;
        }
        count
    }
}
