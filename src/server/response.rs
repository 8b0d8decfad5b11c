//! Responses: finished bytes, or a stream of NAR bytes.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream as _;
use futures_util::stream::BoxStream;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};

use crate::substituter::transfer;

use super::error::Error;
use super::scope::OFFERS;
use super::splice::FileBody;

/// The body of a response.
pub enum Body {
    /// Finished bytes.
    Whole(Option<Bytes>),
    /// NAR bytes as they come. An error cuts the connection, so the client sees it in any case.
    Stream {
        /// The bytes.
        stream: BoxStream<'static, Result<Bytes, transfer::Error>>,
        /// Bytes still to come; `None` where it is not known beforehand.
        left: Option<u64>,
        /// An error that waits until what came before it has been sent.
        failure: Option<transfer::Error>,
    },
    /// A part of a file, sent by the kernel.
    File(FileBody),
}

/// Answers with finished bytes.
pub fn whole(content_type: &'static str, body: Bytes) -> Response<Body> {
    with_type(Response::new(Body::Whole(Some(body))), content_type)
}

/// Answers with a stream.
pub fn stream(
    content_type: &'static str,
    stream: BoxStream<'static, Result<Bytes, transfer::Error>>,
    length: Option<u64>,
) -> Response<Body> {
    let body = Body::Stream {
        stream,
        left: length,
        failure: None,
    };
    with_type(Response::new(body), content_type)
}

/// Answers with a part of a file.
pub fn file(content_type: &'static str, body: FileBody) -> Response<Body> {
    with_type(Response::new(Body::File(body)), content_type)
}

/// Answers with a head alone that names the length of the body that a GET would have.
pub fn head(content_type: &'static str, length: Option<u64>) -> Response<Body> {
    let mut response = with_type(Response::new(Body::Whole(None)), content_type);
    if let Some(length) = length {
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    response
}

/// Answers that nobody has a path. Of these there are thousands in a row, and nobody reads a phrase.
pub fn absent() -> Response<Body> {
    let mut response = Response::new(Body::Whole(None));
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

/// Answers with an error and its phrase.
pub fn error(error: Error) -> Response<Body> {
    let phrase = Bytes::from(format!("{error}\n"));
    let mut response = whole(TEXT, phrase);
    *response.status_mut() = error.status();
    match error {
        Error::NotFound => {}
        Error::ReadOnly => {
            let allowed = HeaderValue::from_static("GET, HEAD");
            response.headers_mut().insert(header::ALLOW, allowed);
            // The body that comes with it is not read.
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        Error::Range { size_bytes } => {
            if let Ok(range) = HeaderValue::try_from(format!("bytes */{size_bytes}")) {
                response.headers_mut().insert(header::CONTENT_RANGE, range);
            }
        }
    }
    response
}

/// Says that parts of this body can be asked for, and which part this is.
pub fn with_range(
    mut response: Response<Body>,
    part: Option<std::ops::Range<u64>>,
    size_bytes: u64,
) -> Response<Body> {
    let accepted = HeaderValue::from_static("bytes");
    response
        .headers_mut()
        .insert(header::ACCEPT_RANGES, accepted);
    if let Some(part) = part {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let last = part.end.saturating_sub(1);
        let range = HeaderValue::try_from(format!("bytes {}-{last}/{size_bytes}", part.start));
        if let Ok(range) = range {
            response.headers_mut().insert(header::CONTENT_RANGE, range);
        }
    }
    response
}

/// Says what answers and what it offers, once per cache: other musters look for it.
pub fn named(mut response: Response<Body>, offer: &'static str) -> Response<Body> {
    let name = HeaderValue::from_static(concat!("muster/", env!("CARGO_PKG_VERSION")));
    response.headers_mut().insert(header::SERVER, name);
    let offer = HeaderValue::from_static(offer);
    response.headers_mut().insert(OFFERS, offer);
    response
}

fn with_type(mut response: Response<Body>, content_type: &'static str) -> Response<Body> {
    let value = HeaderValue::from_static(content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = transfer::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, transfer::Error>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream {
                stream,
                left,
                failure,
            } => {
                if let Some(error) = failure.take() {
                    return Poll::Ready(Some(Err(error)));
                }
                match std::task::ready!(Pin::new(stream).poll_next(context)) {
                    Some(Ok(chunk)) => {
                        if let Some(left) = left {
                            *left = left.saturating_sub(chunk.len() as u64);
                        }
                        Poll::Ready(Some(Ok(Frame::data(chunk))))
                    }
                    Some(Err(error)) => {
                        // hyper throws away what it has not sent yet, the head too, when a body
                        // fails; while the body is pending it sends it. So the client sees a cut.
                        *failure = Some(error);
                        context.waker().wake_by_ref();
                        Poll::Pending
                    }
                    None => Poll::Ready(None),
                }
            }
            Self::File(file) => Poll::Ready(file.next_part().map(|part| Ok(Frame::data(part)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Stream { .. } => false,
            Self::File(file) => file.left() == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64))
            }
            Self::Stream { left, .. } => left.map_or_else(SizeHint::default, SizeHint::with_exact),
            Self::File(file) => SizeHint::with_exact(file.left()),
        }
    }
}

/// Content type of phrases, logs and keys.
pub const TEXT: &str = "text/plain; charset=utf-8";
