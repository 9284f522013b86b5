//! `tidepool status` and `tidepool host show`.

use tidepool_proto::api::HostStatus;

use crate::client::{Client, path};
use crate::failure::Failure;
use crate::human;
use crate::ui::{Ui, fields};

pub(crate) async fn run(client: &Client, ui: Ui) -> Result<(), Failure> {
    let status: HostStatus = client.get(&path(&["status"])).await?;
    ui.result(&status, || describe(&status))?;
    if !status.store.ready {
        return Err(Failure::unavailable("the store is not ready").told());
    }
    Ok(())
}

fn describe(s: &HostStatus) -> String {
    let tool = |version: &Option<String>| {
        version
            .as_deref()
            .map_or("missing".to_owned(), human::clean)
    };
    let store = &s.store;
    let warnings: Vec<String> = s.warnings.iter().map(|w| human::clean(w)).collect();
    let mut probes = vec![human::clean(&s.probe_set)];
    probes.extend(s.probe_fallbacks.iter().map(|w| human::clean(w)));
    fields(&[
        ("host", human::clean(&s.host)),
        (
            "daemon",
            format!(
                "{}, up {}",
                human::clean(&s.version),
                human::duration(s.uptime_s)
            ),
        ),
        ("state", human::clean(&s.state_dir)),
        ("kernel", human::clean(&s.kernel)),
        ("probes", probes.join("\n")),
        ("runc", tool(&s.runc)),
        ("criu", tool(&s.criu)),
        (
            "store",
            format!(
                "{}, {}; {}, {}",
                human::clean(&store.endpoint),
                if store.ready { "ready" } else { "not ready" },
                human::count(store.chunks, "chunk", "chunks"),
                human::size(store.chunk_bytes)
            ),
        ),
        (
            "sandboxes",
            format!("{} running of {}", s.sandboxes_running, s.sandboxes_total),
        ),
        ("warnings", warnings.join("\n")),
    ])
}
