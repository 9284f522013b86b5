//! Clears up after groups that left this node: their replicas delete rows and log, but bodies are stored for all groups together.
//!
//! When a group that was here is not any more, the names of all bodies are walked through once, and those of groups that are not here are
//! deleted on the driver's thread, which knows whether the group has come back. Once at the start too: the node may have been stopped in
//! between.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tidepool_proto::ChunkName;

use crate::requests::{Failure, Shared};

const EVERY: Duration = Duration::from_secs(5);
/// Names looked at together.
const PAGE: usize = 1024;
/// Between two pages, so that nobody is held up.
const PAUSE: Duration = Duration::from_millis(5);

/// Runs until it is aborted.
pub(crate) async fn clear(shared: Arc<Shared>) {
    let mut before: Option<BTreeSet<u32>> = None;
    loop {
        tokio::time::sleep(EVERY).await;
        let here = groups(&shared);
        let left = before.as_ref().is_none_or(|b| !b.is_subset(&here));
        // A node without any group has not heard of its cluster yet.
        if left && !here.is_empty() && here.len() < shared.map.groups().len() {
            match walk(&shared).await {
                Ok(0) => {}
                Ok(n) => tracing::info!(bodies = n, "deleted bodies of groups that moved away"),
                Err(e) => {
                    tracing::warn!(error = ?e, "bodies of groups that moved away are still here");
                    continue;
                }
            }
        }
        before = Some(here);
    }
}

fn groups(shared: &Shared) -> BTreeSet<u32> {
    shared.driver.status().iter().map(|s| s.group).collect()
}

async fn walk(shared: &Arc<Shared>) -> Result<u64, Failure> {
    let mut deleted = 0;
    let mut after: Option<ChunkName> = None;
    loop {
        let page = shared
            .blocking(move |shared| Ok(shared.bodies.page(after.as_ref(), PAGE)?))
            .await?;
        let Some((last, _)) = page.last() else {
            return Ok(deleted);
        };
        after = Some(*last);
        let here = groups(shared);
        let mut by_group = std::collections::BTreeMap::<u32, Vec<ChunkName>>::new();
        for (name, _) in page {
            let group = shared.map.of_chunk(&name);
            if !here.contains(&group) {
                by_group.entry(group).or_default().push(name);
            }
        }
        for (group, names) in by_group {
            deleted += shared.driver.delete_orphans(group, names).await;
        }
        tokio::time::sleep(PAUSE).await;
    }
}
