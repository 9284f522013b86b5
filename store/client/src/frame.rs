//! Frames on a QUIC stream, for both ends.

use bytes::{Bytes, BytesMut};
use quinn::{ReadError, ReadExactError, RecvStream};
use tidepool_proto::wire::{self, WireError};

/// Why a frame could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other side sent something else.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The connection failed.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Reads one frame to its end, of at most [`wire::MAX_FRAME`] bytes.
pub async fn read(stream: &mut RecvStream) -> Result<Bytes, FrameError> {
    read_noting(stream, || {}).await
}

/// The same. `came` is called for each part that arrives.
pub(crate) async fn read_noting(
    stream: &mut RecvStream,
    came: impl FnMut(),
) -> Result<Bytes, FrameError> {
    let len = read_len(stream).await?;
    read_parts(stream, len, came).await
}

/// Reads the length that a frame opens with, and checks it.
pub async fn read_len(stream: &mut RecvStream) -> Result<usize, FrameError> {
    let mut head = [0u8; 4];
    match stream.read_exact(&mut head).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(_)) => return Err(WireError::Truncated.into()),
        Err(ReadExactError::ReadError(e)) => return Err(e.into()),
    }
    Ok(wire::frame_len(head)?)
}

/// Reads what follows the length, of at most [`wire::MAX_FRAME`] bytes. Room for all of it is asked for at once, so that nothing is copied
/// twice; pages that nothing arrives for are never touched, so that a length which promises too much costs no memory.
pub async fn read_body(stream: &mut RecvStream, len: usize) -> Result<Bytes, FrameError> {
    read_parts(stream, len, || {}).await
}

async fn read_parts(
    stream: &mut RecvStream,
    len: usize,
    mut came: impl FnMut(),
) -> Result<Bytes, FrameError> {
    let mut buf = BytesMut::with_capacity(len.min(wire::MAX_FRAME));
    while buf.len() < len {
        match stream.read_chunk(len - buf.len(), true).await? {
            Some(chunk) => {
                came();
                buf.extend_from_slice(&chunk.bytes);
            }
            None => return Err(WireError::Truncated.into()),
        }
    }
    Ok(buf.freeze())
}
