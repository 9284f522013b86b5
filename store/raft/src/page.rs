//! Pages of a raft snapshot. The raft message that announces a snapshot carries no data: the follower pulls the rows of the group's
//! state page by page from one consistent view of the sender, whose index, term and members every page repeats.

use bytes::Bytes;
use raft::eraftpb::ConfState;
use raft_prost::Message as _;

/// The most bytes of rows in a page, except where one row alone is longer.
pub const PAGE_BYTES: usize = 2 << 20;
/// The most bytes of an encoded page that are accepted.
pub const MAX_PAGE: usize = 32 << 20;

/// Asks for a page.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PageRequest {
    #[prost(uint32, tag = "1")]
    pub group: u32,
    /// The view that an earlier page named; 0 opens a new one.
    #[prost(uint64, tag = "2")]
    pub view: u64,
    /// The last key of the page before; empty for the first page.
    #[prost(bytes = "bytes", tag = "3")]
    pub after: Bytes,
}

/// A page.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Page {
    #[prost(uint64, tag = "1")]
    pub view: u64,
    /// Applied index and its term in the view.
    #[prost(uint64, tag = "2")]
    pub index: u64,
    #[prost(uint64, tag = "3")]
    pub term: u64,
    /// Members in the view: an encoded `ConfState`.
    #[prost(bytes = "bytes", tag = "4")]
    pub conf: Bytes,
    #[prost(message, repeated, tag = "5")]
    pub rows: Vec<Row>,
    /// There is no page after this one.
    #[prost(bool, tag = "6")]
    pub last: bool,
}

/// A row of a group's state.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Row {
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

impl Page {
    /// The members, if they can be read.
    pub(crate) fn members(&self) -> Option<ConfState> {
        ConfState::decode(&*self.conf).ok()
    }

    /// Encodes members for [`Page::conf`].
    pub fn encode_members(conf: &ConfState) -> Bytes {
        conf.encode_to_vec().into()
    }
}
