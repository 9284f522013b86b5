//! The streams of a connection between nodes. The first byte says what a stream is: control (frames of messages, one way, until the
//! connection ends), one request and its answer, or a push of bodies ([`super::push`]). A frame is its length (u32, little-endian) and that many bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use quinn::{Connection, RecvStream, SendStream};
use tidepool_proto::wire::{MAX_FRAME, WireError};
use tidepool_store_client::frame::{self, FrameError};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Inbox;

const CONTROL: u8 = 1;
const REQUEST: u8 = 2;
pub(super) const PUSH: u8 = 3;
/// Bytes of one control frame after which the next one begins.
const FRAME: usize = 4 << 20;
/// Messages of one frame.
const MESSAGES: usize = 4096;
const OK: u8 = 0;
const REFUSED: u8 = 1;
const ARRIVE: Duration = Duration::from_secs(30);

/// Sends what is waiting, all of it in one frame, until the connection ends.
pub(super) async fn send_control(
    connection: Connection,
    mut queue: UnboundedReceiver<Bytes>,
    waiting: Arc<AtomicU64>,
) -> String {
    let (mut send, _recv) = match connection.open_bi().await {
        Ok(stream) => stream,
        Err(e) => return e.to_string(),
    };
    let _ = send.set_priority(1);
    if let Err(e) = send.write_all(&[CONTROL]).await {
        return e.to_string();
    }
    let mut messages = Vec::new();
    loop {
        if queue.recv_many(&mut messages, MESSAGES).await == 0 {
            return "replaced".into();
        }
        let bytes: u64 = messages.iter().map(|m| m.len() as u64 + 64).sum();
        let mut left = messages.drain(..).peekable();
        while left.peek().is_some() {
            let mut buf = BytesMut::new();
            buf.put_u32_le(0);
            while let Some(next) = left.peek()
                && (buf.len() == 4 || buf.len() + next.len() < FRAME)
            {
                buf.put_u32_le(next.len() as u32);
                buf.put_slice(next);
                left.next();
            }
            let len = (buf.len() - 4) as u32;
            buf[..4].copy_from_slice(&len.to_le_bytes());
            if let Err(e) = send.write_chunk(buf.freeze()).await {
                return e.to_string();
            }
        }
        drop(left);
        waiting.fetch_sub(bytes, Relaxed);
    }
}

/// Takes what comes on a connection until it ends or sends something else.
pub(super) async fn take_all(connection: &Connection, from: u64, inbox: &Arc<dyn Inbox>) -> String {
    let mut streams: JoinSet<Result<(), String>> = JoinSet::new();
    loop {
        tokio::select! {
            stream = connection.accept_bi() => match stream {
                Ok((send, recv)) => {
                    streams.spawn(take(send, recv, from, inbox.clone()));
                }
                Err(e) => return e.to_string(),
            },
            Some(done) = streams.join_next() => {
                if let Ok(Err(why)) = done {
                    inbox.refused();
                    tracing::warn!(peer = from, %why, "a node sent something that is refused");
                    return why;
                }
            }
        }
    }
}

/// One stream. An error is the other side's fault and ends the connection.
async fn take(
    send: SendStream,
    mut recv: RecvStream,
    from: u64,
    inbox: Arc<dyn Inbox>,
) -> Result<(), String> {
    let mut kind = [0];
    if recv.read_exact(&mut kind).await.is_err() {
        return Ok(());
    }
    match kind[0] {
        CONTROL => loop {
            let frame = match frame::read(&mut recv).await {
                Ok(frame) => frame,
                Err(FrameError::Read(_)) => return Ok(()),
                Err(FrameError::Wire(WireError::Truncated)) => return Ok(()),
                Err(FrameError::Wire(e)) => return Err(e.to_string()),
            };
            inbox.deliver(from, split(frame)?);
        },
        REQUEST => {
            let request = match timeout(ARRIVE, frame::read(&mut recv)).await {
                Ok(Ok(request)) => request,
                Ok(Err(FrameError::Read(_))) | Err(_) => return Ok(()),
                Ok(Err(FrameError::Wire(e))) => return Err(e.to_string()),
            };
            answer(send, inbox.answer(from, request).await).await;
            Ok(())
        }
        PUSH => match timeout(ARRIVE, pushed(&mut recv, from, &inbox)).await {
            Ok(Ok(())) | Ok(Err(FrameError::Read(_))) | Err(_) => Ok(()),
            Ok(Err(FrameError::Wire(e))) => Err(e.to_string()),
        },
        other => Err(format!("a stream of unknown kind {other}")),
    }
}

/// One push. The time it takes to be stored counts too: what is not stored by then is fetched.
async fn pushed(
    recv: &mut RecvStream,
    from: u64,
    inbox: &Arc<dyn Inbox>,
) -> Result<(), FrameError> {
    let head = frame::read(recv).await?;
    match inbox.coming(from, head).map_err(WireError::Message)? {
        Some(coming) => {
            let bodies = frame::read_body(recv, coming.bytes).await?;
            inbox.store(from, coming, bodies).await;
        }
        None => {
            let _ = recv.stop(0u32.into());
        }
    }
    Ok(())
}

fn split(mut frame: Bytes) -> Result<Vec<Bytes>, String> {
    let mut out = Vec::new();
    while !frame.is_empty() {
        let Some(head) = frame.first_chunk::<4>() else {
            return Err("a frame of control messages ends inside a length".into());
        };
        let len = u32::from_le_bytes(*head) as usize;
        let _ = frame.split_to(4);
        if len > frame.len() || out.len() >= MESSAGES {
            return Err("a frame of control messages is not what its lengths say".into());
        }
        out.push(frame.split_to(len));
    }
    Ok(out)
}

async fn answer(mut send: SendStream, answer: Result<Bytes, String>) {
    let (kind, body) = match answer {
        Ok(body) if body.len() < MAX_FRAME => (OK, body),
        Ok(_) => (REFUSED, Bytes::from_static(b"the answer is too long")),
        Err(why) => (REFUSED, Bytes::from(why)),
    };
    let mut head = [0; 5];
    head[..4].copy_from_slice(&(body.len() as u32 + 1).to_le_bytes());
    head[4] = kind;
    let _ = send.set_priority(-1);
    let written = async {
        send.write_all(&head).await?;
        send.write_chunk(body).await
    };
    let _ = timeout(ARRIVE, written).await;
    let _ = send.finish();
}

/// One request. The outer error is the connection's, the inner one the peer's word.
pub(super) async fn ask(
    connection: &Connection,
    request: Bytes,
) -> Result<Result<Bytes, String>, String> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(|e| e.to_string())?;
    let _ = send.set_priority(if request.len() > FRAME / 64 { -1 } else { 0 });
    let mut head = [REQUEST, 0, 0, 0, 0];
    if request.len() > MAX_FRAME {
        return Err("the request is too long".into());
    }
    head[1..].copy_from_slice(&(request.len() as u32).to_le_bytes());
    send.write_all(&head).await.map_err(|e| e.to_string())?;
    send.write_chunk(request).await.map_err(|e| e.to_string())?;
    let _ = send.finish();
    let mut answer = frame::read(&mut recv).await.map_err(|e| e.to_string())?;
    if answer.is_empty() {
        return Err("an empty answer".into());
    }
    match answer.split_to(1)[0] {
        OK => Ok(Ok(answer)),
        _ => {
            let why: String = String::from_utf8_lossy(&answer).chars().take(300).collect();
            Ok(Err(why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_frames_are_taken_apart_or_refused() {
        let mut frame = BytesMut::new();
        for message in [&b"ab"[..], b"", b"c"] {
            frame.put_u32_le(message.len() as u32);
            frame.put_slice(message);
        }
        let frame = frame.freeze();
        assert_eq!(split(frame.clone()).unwrap(), [&b"ab"[..], b"", b"c"]);
        for cut in [1, 3, 5, frame.len() - 1] {
            assert!(split(frame.slice(..cut)).is_err(), "{cut}");
        }
        let long = Bytes::from(vec![0; 4 * (MESSAGES + 1)]);
        assert!(split(long).is_err());
    }
}
