//! Ends the sessions of uploads that died: collections would wait for them.

use std::sync::Arc;
use std::time::Duration;

use tidepool_store_core::keys::{Table, table};
use tidepool_store_core::{Command, META_GROUP, SessionState, op};

use crate::driver::now_ms;
use crate::requests::Shared;

const EVERY: Duration = Duration::from_secs(30);
/// Sessions ended by one command.
const AT_ONCE: usize = 4096;

/// Looks for sessions that are over, again and again.
pub(crate) async fn expire(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(EVERY).await;
        let led = shared.driver.status();
        let led = led.iter().filter(|s| s.leads && s.group != META_GROUP);
        for group in led.map(|s| s.group) {
            let over = shared.blocking(move |shared| find(shared, group)).await;
            let sessions = match over {
                Ok(sessions) if sessions.is_empty() => continue,
                Ok(sessions) => sessions,
                Err(e) => {
                    tracing::warn!(group, error = ?e, "sessions could not be read");
                    continue;
                }
            };
            let command = Command::new(
                0,
                op::Op::ExpireSessions(op::ExpireSessions {
                    sessions: sessions.into(),
                }),
            );
            // Not done now is done the next time.
            let _ = shared.driver.propose(group, command).await;
        }
    }
}

/// The ids of sessions that are over, concatenated.
fn find(shared: &Shared, group: u32) -> Result<Vec<u8>, crate::requests::Failure> {
    let now = now_ms();
    let prefix = table(Table::Session);
    let mut out = Vec::new();
    shared
        .db
        .scan_state(group, &prefix, &prefix, |key, value| {
            let over = |v: Vec<u8>| SessionState::decode(&v).is_ok_and(|s| s.expires_ms <= now);
            if value.is_ok_and(over) {
                out.extend_from_slice(&key[1..]);
            }
            out.len() < AT_ONCE * 16
        })?;
    Ok(out)
}
