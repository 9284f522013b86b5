//! The daemon's process: options, logging, start, signals, end.

use std::future::IntoFuture;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tidepool_scheduler::config::Config;
use tidepool_scheduler::host::Host;
use tidepool_scheduler::http;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let config = Config::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("tidepool-host: error: starting threads: {e}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("tidepool-host: error: {e}");
            ExitCode::from(e.kind.exit_code())
        }
    }
}

async fn run(config: Config) -> tidepool_scheduler::error::Result<()> {
    if config.check {
        return tidepool_scheduler::host::check(&config).await;
    }
    let socket = config.socket.clone();
    let host = Host::start(config).await?;
    // Last: whoever can connect finds a daemon that has adopted what runs.
    let listener = http::listen(&socket).await?;
    tracing::info!(socket = %socket.display(), "ready");
    let stop = async {
        let (mut term, mut int) = match (
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
        ) {
            (Ok(term), Ok(int)) => (term, int),
            _ => return std::future::pending().await,
        };
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        tracing::info!("stopping; sandboxes run on");
    };
    let mut failed = None;
    let serve = axum::serve(listener, http::router(host.clone()));
    // Not graceful towards long answers: turns run in tasks of their own, and `shutdown` waits for those.
    tokio::select! {
        done = serve.into_future() => {
            if let Err(e) = done {
                tracing::error!(error = %e, "the API stopped");
            }
        }
        () = stop => {}
        e = host.store_failed() => failed = Some(e),
    }
    let _ = std::fs::remove_file(&socket);
    host.shutdown().await?;
    failed.map_or(Ok(()), Err)
}
