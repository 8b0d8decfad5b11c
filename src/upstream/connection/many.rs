//! Many questions of one caller, whose answers can be had as far as they came.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::super::Error;
use super::questions::{Answer, Batch};

/// Questions under way; dropped, those that were not written are never asked.
#[derive(Debug)]
pub struct Many {
    count: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    UnderWay(Arc<Batch>, oneshot::Receiver<Vec<Answer>>),
    /// All that came, and why there is no more.
    Over(Vec<Answer>, Error),
}

impl Many {
    pub(super) fn new(batch: Arc<Batch>, answers: oneshot::Receiver<Vec<Answer>>) -> Self {
        Self {
            count: batch.count(),
            state: State::UnderWay(batch, answers),
        }
    }

    pub(super) fn refused(count: usize, error: Error) -> Self {
        Self {
            count,
            state: State::Over(Vec::new(), error),
        }
    }

    /// Waits until all are answered or failed. May be dropped and called again.
    pub async fn settled(&mut self) {
        if let State::UnderWay(batch, answers) = &mut self.state {
            let ended = || Error::Lost("the connection ended".into());
            let answers = match answers.await {
                Ok(answers) => answers,
                Err(_) => batch.take(),
            };
            self.state = State::Over(answers, ended());
        }
    }

    /// Returns how many are answered so far.
    pub fn answered(&self) -> usize {
        match &self.state {
            State::UnderWay(batch, _) => batch.answered(),
            State::Over(answers, _) => answers.len(),
        }
    }

    /// Gives up what is not answered, with this error; the answers have the order of the questions.
    pub fn finish(self, otherwise: Option<Error>) -> Vec<Answer> {
        let (mut answers, error) = match self.state {
            // What came while the caller made up its mind counts.
            State::UnderWay(batch, mut answers) => match answers.try_recv() {
                Ok(answers) => (answers, None),
                Err(_) => (batch.take(), None),
            },
            State::Over(answers, error) => (answers, Some(error)),
        };
        let left_open = || Error::Lost("given up".into());
        let error = otherwise.or(error).unwrap_or_else(left_open);
        answers.resize(self.count, Err(error));
        answers
    }
}
