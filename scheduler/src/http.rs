//! The API: HTTP/1.1 with JSON over a unix socket, as [`tidepool_proto::api`] describes it.
//!
//! Long requests answer with lines of JSON while they work; the work itself runs in tasks of the daemon, so that a client that goes away
//! neither stops a turn half-way nor leaves anything unfinished.
//!
//! Elsewhere on purpose: everything but reading requests and writing answers.

use std::convert::Infallible;
use std::future::Future;
use std::path::Path as FsPath;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tidepool_proto::TurnNo;
use tidepool_proto::api::*;
use tidepool_sandbox::SignalScope;
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use crate::error::{Context, HostError, Result};
use crate::host::Host;

/// Bytes of a JSON request at the most.
const MAX_REQUEST: usize = 4 << 20;
/// Lines that wait for a slow client.
const LINES: usize = 64;

type Shared = State<Arc<Host>>;

impl IntoResponse for HostError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.kind.http_status())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.to_api())).into_response()
    }
}

/// The API's routes.
pub fn router(host: Arc<Host>) -> Router {
    let one = "/v1/sandboxes/{sandbox}";
    let at = |rest: &str| format!("{one}{rest}");
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/images", get(images).post(import_image))
        .route("/v1/sandboxes", get(sandboxes).post(create))
        .route(one, get(sandbox).delete(remove))
        .route(&at("/pause"), post(pause))
        .route(&at("/resume"), post(resume))
        .route(&at("/exec"), post(exec))
        .route(
            &at("/execs/{key}/stdin"),
            post(stdin).layer(DefaultBodyLimit::disable()),
        )
        .route(&at("/execs/{key}/resize"), post(resize))
        .route(&at("/execs/{key}/signal"), post(signal))
        .route(&at("/turns"), get(turns))
        .route(&at("/checkpoints"), get(checkpoints).post(checkpoint_now))
        .route(&at("/checkpoints/{checkpoint}"), get(checkpoint))
        .route(&at("/diff"), get(diff))
        .route(&at("/restore"), post(restore))
        .route(&at("/rollback"), post(rollback))
        .route(&at("/fork"), post(fork))
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .fallback(|| async { HostError::not_found("no such request; see the API's description") })
        .with_state(host)
}

/// Listens on the socket at `path`, root only. A stale socket is replaced, a live one is not.
pub async fn listen(path: &FsPath) -> Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).context(format!("making {}", dir.display()))?;
    }
    if path.exists() {
        if tokio::net::UnixStream::connect(path).await.is_ok() {
            return Err(HostError::conflict(format!(
                "another tidepool-host listens on {}",
                path.display()
            )));
        }
        std::fs::remove_file(path)
            .context(format!("removing the stale socket {}", path.display()))?;
    }
    let listener = UnixListener::bind(path).context(format!("listening on {}", path.display()))?;
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .context("restricting the socket")?;
    Ok(listener)
}

/// Sends progress of a long request; cheap to clone, never blocks.
#[derive(Clone)]
pub struct Reporter(mpsc::Sender<Bytes>);

impl Reporter {
    /// Tells how far a stage is. Dropped where the client is slow: progress is not worth waiting for.
    pub fn progress(&self, stage: &str, done: u64, total: Option<u64>) {
        let event: Event<()> = Event::Progress(Progress {
            stage: stage.to_owned(),
            done,
            total,
        });
        let _ = self.0.try_send(line(&event));
    }
}

fn line(event: &impl Serialize) -> Bytes {
    let mut json = serde_json::to_vec(event).expect("API types have only text keys");
    json.push(b'\n');
    json.into()
}

fn lines(rx: mpsc::Receiver<Bytes>) -> Response {
    let stream = futures::stream::unfold(rx, |mut rx| async {
        let next = rx.recv().await?;
        Some((Ok::<_, Infallible>(next), rx))
    });
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(stream),
    )
        .into_response()
}

/// Runs `work` in a task of its own and answers with its events.
fn long<T, F>(work: impl FnOnce(Reporter) -> F) -> Response
where
    T: Serialize + Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let (tx, rx) = mpsc::channel(LINES);
    let work = work(Reporter(tx.clone()));
    tokio::spawn(async move {
        let last = match tokio::spawn(work)
            .await
            .map_err(HostError::from)
            .and_then(|done| done)
        {
            Ok(result) => line(&Event::Done { result }),
            Err(e) => line(&Event::<()>::Error { error: e.to_api() }),
        };
        let _ = tx.send(last).await;
    });
    lines(rx)
}

async fn status(State(host): Shared) -> Result<Json<HostStatus>> {
    host.status().await.map(Json)
}

async fn images(State(host): Shared) -> Result<Json<Vec<ImageInfo>>> {
    host.images().await.map(Json)
}

async fn import_image(State(host): Shared, Json(request): Json<ImportImage>) -> Response {
    long(|report| async move { host.import_image(request, report).await })
}

async fn sandboxes(State(host): Shared) -> Json<Vec<SandboxInfo>> {
    Json(host.all().iter().map(|s| s.info()).collect())
}

async fn create(State(host): Shared, Json(request): Json<CreateSandbox>) -> Response {
    long(|report| async move { host.create(request, report).await })
}

async fn sandbox(State(host): Shared, Path(name): Path<String>) -> Result<Json<SandboxInfo>> {
    Ok(Json(host.find(&name)?.info()))
}

#[derive(Deserialize)]
struct Remove {
    #[serde(default)]
    forget: bool,
}

async fn remove(
    State(host): Shared,
    Path(name): Path<String>,
    Query(q): Query<Remove>,
) -> Result<Json<serde_json::Value>> {
    // In a task: a client that goes away must not leave a sandbox half removed.
    tokio::spawn(async move { host.remove(&name, q.forget).await }).await??;
    Ok(Json(serde_json::json!({})))
}

async fn pause(State(host): Shared, Path(name): Path<String>) -> Result<Json<SandboxInfo>> {
    tokio::spawn(async move { host.set_paused(&name, true).await })
        .await?
        .map(Json)
}

async fn resume(State(host): Shared, Path(name): Path<String>) -> Result<Json<SandboxInfo>> {
    tokio::spawn(async move { host.set_paused(&name, false).await })
        .await?
        .map(Json)
}

async fn exec(
    State(host): Shared,
    Path(name): Path<String>,
    Json(request): Json<ExecRequest>,
) -> Result<Response> {
    let sandbox = host.find(&name)?;
    let request = crate::exec::checked(request)?;
    let (tx, rx) = mpsc::channel::<ExecEvent>(LINES);
    tokio::spawn(async move { sandbox.exec(host, request, tx).await });
    let stream = futures::stream::unfold(rx, |mut rx| async {
        let next = rx.recv().await?;
        Some((Ok::<_, Infallible>(line(&next)), rx))
    });
    Ok((
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(stream),
    )
        .into_response())
}

async fn stdin(
    State(host): Shared,
    Path((name, key)): Path<(String, String)>,
    body: Body,
) -> Result<Json<serde_json::Value>> {
    let control = host.find(&name)?.control(&key)?;
    let mut stream = body.into_data_stream();
    while let Some(data) = stream.next().await {
        let data = match data {
            Ok(data) => data,
            Err(e) => {
                // Whoever typed is gone, and half an input must not pass for a whole one: as when a terminal hangs up.
                control.signal(libc::SIGHUP, SignalScope::Session).await?;
                control.close_stdin().await?;
                return Err(HostError::invalid(format!(
                    "input of exec {key} was cut off: {e}"
                )));
            }
        };
        control.stdin(&data).await?;
    }
    control.close_stdin().await?;
    Ok(Json(serde_json::json!({})))
}

async fn resize(
    State(host): Shared,
    Path((name, key)): Path<(String, String)>,
    Json(size): Json<Resize>,
) -> Result<Json<serde_json::Value>> {
    host.find(&name)?
        .control(&key)?
        .resize(size.cols, size.rows)
        .await?;
    Ok(Json(serde_json::json!({})))
}

async fn signal(
    State(host): Shared,
    Path((name, key)): Path<(String, String)>,
    Json(signal): Json<SendSignal>,
) -> Result<Json<serde_json::Value>> {
    let control = host.find(&name)?.control(&key)?;
    control
        .signal(i32::from(signal.signal), SignalScope::Session)
        .await?;
    Ok(Json(serde_json::json!({})))
}

#[derive(Deserialize)]
struct TurnRange {
    from: Option<u64>,
    limit: Option<u32>,
}

async fn turns(
    State(host): Shared,
    Path(name): Path<String>,
    Query(q): Query<TurnRange>,
) -> Result<Json<Vec<TurnInfo>>> {
    let limit = q.limit.unwrap_or(1000).min(10_000);
    host.turns(&name, TurnNo(q.from.unwrap_or(1)), limit)
        .await
        .map(Json)
}

async fn checkpoints(
    State(host): Shared,
    Path(name): Path<String>,
) -> Result<Json<Vec<CheckpointInfo>>> {
    host.checkpoints(&name).await.map(Json)
}

async fn checkpoint_now(State(host): Shared, Path(name): Path<String>) -> Response {
    long(|_| async move { host.checkpoint_now(&name).await })
}

async fn checkpoint(
    State(host): Shared,
    Path((name, which)): Path<(String, String)>,
) -> Result<Json<CheckpointInfo>> {
    host.checkpoint(&name, &which).await.map(Json)
}

#[derive(Deserialize)]
struct DiffQuery {
    from: String,
    to: Option<String>,
}

async fn diff(
    State(host): Shared,
    Path(name): Path<String>,
    Query(q): Query<DiffQuery>,
) -> Result<Json<CheckpointDiff>> {
    host.diff(&name, &q.from, q.to.as_deref()).await.map(Json)
}

async fn restore(
    State(host): Shared,
    Path(name): Path<String>,
    Json(request): Json<RestoreRequest>,
) -> Response {
    long(|report| async move { host.restore(&name, request, report).await })
}

async fn rollback(
    State(host): Shared,
    Path(name): Path<String>,
    Json(request): Json<RestoreRequest>,
) -> Response {
    long(|report| async move { host.rollback(&name, request, report).await })
}

async fn fork(
    State(host): Shared,
    Path(name): Path<String>,
    Json(request): Json<ForkRequest>,
) -> Response {
    long(|report| async move { host.fork(&name, request, report).await })
}
