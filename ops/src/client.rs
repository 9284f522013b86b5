//! The daemon's API over its unix socket: one connection for each request, answers bounded, every failure in words.
//!
//! There are no retries here: only the user knows whether a request may be sent twice, and an exec's key makes it so.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures::Stream;
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tidepool_proto::api::{ApiError, Event};
use tidepool_proto::error::ErrorKind;
use tokio::net::UnixStream;

use crate::failure::Failure;
use crate::lines::{LineError, Lines, MAX_LINE};
use crate::progress::ProgressLine;
use crate::ui::Ui;

/// The largest answer that is read as one JSON document.
const MAX_ANSWER: usize = 64 << 20;
/// The largest body of a failed request.
const MAX_ERROR_BODY: usize = 1 << 20;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A way to the daemon.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    socket: PathBuf,
    ui: Ui,
}

impl Client {
    pub(crate) fn new(socket: &Path, ui: Ui) -> Self {
        Self {
            socket: socket.to_owned(),
            ui,
        }
    }

    /// Asks for one JSON document.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let response = self.send(Method::GET, path, None, empty()).await?;
        document(response).await
    }

    /// Posts `body`, or nothing, and reads one JSON document.
    pub(crate) async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, Failure> {
        let (kind, body) = json(body)?;
        let response = self.send(Method::POST, path, kind, body).await?;
        document(response).await
    }

    /// Deletes what `path` names.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), Failure> {
        let response = self.send(Method::DELETE, path, None, empty()).await?;
        document::<serde_json::Value>(response).await.map(drop)
    }

    /// Posts `body`, or nothing, and follows the events of the answer to its result, showing progress.
    pub(crate) async fn events<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, Failure> {
        let mut lines = self.post_lines(path, body).await?;
        let mut progress = ProgressLine::new(self.ui);
        loop {
            let line = match lines.next().await {
                Ok(Some(line)) => line,
                Ok(None) => {
                    return Err(lost("the daemon stopped before the end", progress.stage()));
                }
                Err(LineError::Lost(why)) => return Err(lost(&why, progress.stage())),
                Err(LineError::TooLong) => return Err(too_long()),
            };
            match parse::<Event<T>>(&line)? {
                Event::Progress(p) => progress.show(&p),
                Event::Done { result } => return Ok(result),
                Event::Error { error } => return Err(error.into()),
            }
        }
    }

    /// Posts `body`, or nothing, for an answer of lines.
    pub(crate) async fn post_lines<B: Serialize>(
        &self,
        path: &str,
        body: Option<&B>,
    ) -> Result<Lines, Failure> {
        let (kind, body) = json(body)?;
        let response = self.send(Method::POST, path, kind, body).await?;
        Ok(Lines::new(response.into_body()))
    }

    /// Posts a stream of raw bytes.
    pub(crate) async fn post_stream(
        &self,
        path: &str,
        stream: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<(), Failure> {
        let frames = futures::StreamExt::map(stream, |bytes| Ok(Frame::data(bytes)));
        let body = BodyExt::boxed_unsync(StreamBody::new(frames));
        let kind = Some("application/octet-stream");
        let response = self.send(Method::POST, path, kind, body).await?;
        document::<serde_json::Value>(response).await.map(drop)
    }

    /// Sends a request; an answer that is not a success becomes a failure.
    async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Body,
    ) -> Result<Response<Incoming>, Failure> {
        let started = Instant::now();
        let named = format!("{method} {path}");
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|e| self.unreachable(&e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| interrupted(&e))?;
        // Ends by itself once the answer is read or dropped; its error shows in the answer too.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "tidepool");
        if let Some(kind) = content_type {
            request = request.header(hyper::header::CONTENT_TYPE, kind);
        }
        let request = request
            .body(body)
            .map_err(|e| Failure::usage(format!("cannot ask for {path:?}: {e}")))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|e| interrupted(&e))?;
        let status = response.status();
        self.ui.detail(&format!(
            "{named}: {} after {}",
            status.as_u16(),
            crate::human::micros(u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX)),
        ));
        if status.is_success() {
            return Ok(response);
        }
        let code = status.as_u16();
        let text = bounded(response.into_body(), MAX_ERROR_BODY).await?;
        Err(match serde_json::from_slice::<ApiError>(&text) {
            Ok(error) => error.into(),
            Err(_) => unexplained(code, &text),
        })
    }

    /// Why the socket cannot be connected to, and what to do.
    fn unreachable(&self, e: &io::Error) -> Failure {
        let socket = self.socket.display();
        match e.kind() {
            io::ErrorKind::PermissionDenied => Failure::new(
                ErrorKind::Denied,
                format!("not allowed to connect to the host daemon at {socket}: {e}"),
            )
            .hint("run this as root, or as a user that may write to the socket"),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure::unavailable(
                format!("no host daemon answers at {socket}: {e}"),
            )
            .hint("start it with: tidepool-host --state-dir /var/lib/tidepool")
            .hint(
                "where it listens elsewhere, name its socket with --socket PATH or TIDEPOOL_SOCKET",
            ),
            _ => Failure::unavailable(format!(
                "cannot connect to the host daemon at {socket}: {e}"
            )),
        }
    }
}

/// Joins segments to an absolute path, each percent-encoded.
pub(crate) fn path(segments: &[&str]) -> String {
    let mut out = String::from("/v1");
    for segment in segments {
        out.push('/');
        encode(segment, &mut out);
    }
    out
}

/// Adds `?name=value&...`, values percent-encoded, to a path.
pub(crate) fn query(mut path: String, pairs: &[(&str, String)]) -> String {
    for (i, (name, value)) in pairs.iter().enumerate() {
        path.push(if i == 0 { '?' } else { '&' });
        path += name;
        path.push('=');
        encode(value, &mut path);
    }
    path
}

/// Everything but the unreserved characters of RFC 3986 as `%XX`. A segment of dots only would be taken for a
/// relative path by proxies and servers, so there the dots too.
fn encode(text: &str, out: &mut String) {
    let dots = text.bytes().all(|b| b == b'.');
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || b"-_~@".contains(&b) || (b == b'.' && !dots) {
            out.push(char::from(b));
        } else {
            *out += &format!("%{b:02X}");
        }
    }
}

/// Reads one line's JSON.
pub(crate) fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(line).map_err(|e| {
        let shown: String = String::from_utf8_lossy(line.get(..200).unwrap_or(line)).into_owned();
        not_understood(&e.to_string()).hint(format!("it was: {}", crate::human::clean(&shown)))
    })
}

/// A line over the bound.
pub(crate) fn too_long() -> Failure {
    not_understood(&format!("a line of more than {MAX_LINE} bytes"))
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn json<B: Serialize>(body: Option<&B>) -> Result<(Option<&'static str>, Body), Failure> {
    let Some(body) = body else {
        return Ok((None, empty()));
    };
    let text = serde_json::to_vec(body)
        .map_err(|e| Failure::usage(format!("cannot write the request as JSON: {e}")))?;
    let body = Full::from(text)
        .map_err(|never| match never {})
        .boxed_unsync();
    Ok((Some("application/json"), body))
}

async fn document<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T, Failure> {
    let text = bounded(response.into_body(), MAX_ANSWER).await?;
    parse(&text)
}

/// Collects a body of at most `max` bytes.
async fn bounded(body: Incoming, max: usize) -> Result<Bytes, Failure> {
    let mut body = Pin::new(Box::new(body));
    let mut out = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| interrupted(&e))?;
        if let Some(data) = frame.data_ref() {
            if out.len() + data.len() > max {
                return Err(not_understood(&format!("it is over {max} bytes")));
            }
            out.extend_from_slice(data);
        }
    }
    Ok(out.freeze())
}

fn interrupted(e: &hyper::Error) -> Failure {
    Failure::unavailable(format!("the host daemon ended the connection: {e}"))
        .hint("whether it did what was asked is not known; look with `tidepool sandbox list`")
        .doubtful()
}

fn lost(why: &str, stage: Option<&str>) -> Failure {
    let stage = stage.map_or(String::new(), |s| {
        format!(" while {}", crate::human::clean(s))
    });
    Failure::unavailable(format!(
        "the connection to the host daemon was lost{stage}: {why}"
    ))
    .hint("whether it finished is not known; look with `tidepool sandbox list` and try again")
    .doubtful()
}

fn not_understood(why: &str) -> Failure {
    Failure::failed(format!("the host daemon's answer is not understood: {why}"))
        .hint("`tidepool` and `tidepool-host` may be of different versions; `tidepool --version` and `tidepool-host --version` tell")
}

/// A failed request without an [`ApiError`]: from a router, not from the daemon's own code.
fn unexplained(code: u16, text: &[u8]) -> Failure {
    let kind = match code {
        404 => ErrorKind::NotFound,
        409 => ErrorKind::Conflict,
        403 => ErrorKind::Denied,
        503 => ErrorKind::Unavailable,
        400 | 422 => ErrorKind::Invalid,
        _ => ErrorKind::Failed,
    };
    let shown: String = String::from_utf8_lossy(text).chars().take(300).collect();
    let shown = crate::human::clean(shown.trim());
    let text = if shown.is_empty() {
        String::new()
    } else {
        format!(": {shown}")
    };
    Failure::new(
        kind,
        format!("the host daemon answered with HTTP status {code}{text}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_segment() {
        assert_eq!(
            path(&["sandboxes", "web", "checkpoints", "@3"]),
            "/v1/sandboxes/web/checkpoints/@3"
        );
        assert_eq!(
            path(&["sandboxes", "../x?y=1#z"]),
            "/v1/sandboxes/..%2Fx%3Fy%3D1%23z"
        );
        assert_eq!(path(&["sandboxes", ".."]), "/v1/sandboxes/%2E%2E");
        assert_eq!(
            query(
                path(&["a"]),
                &[("from", "a b&c".into()), ("to", "@1".into())]
            ),
            "/v1/a?from=a%20b%26c&to=@1"
        );
    }

    #[test]
    fn unexplained_statuses_keep_their_meaning() {
        assert_eq!(unexplained(404, b"").exit_code(), 10);
        assert_eq!(unexplained(503, b"busy").exit_code(), 12);
        let teapot = unexplained(418, b"\x1b[31m");
        assert_eq!(teapot.exit_code(), 1);
        assert!(!teapot.message.contains('\x1b'));
    }
}
