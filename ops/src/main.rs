//! `tidepool`: the command line of a Tidepool host.
//!
//! It is a client of the host daemon's API (`tidepool_proto::api`) and keeps no state. Arguments are in [`cli`], their
//! long texts in [`help`], the API in [`client`], one module for each noun in [`commands`], and running a command in
//! [`exec`]. What it prints where is decided in [`ui`], with which code it leaves in [`failure`].

mod cli;
mod client;
mod commands;
mod exec;
mod failure;
mod help;
mod human;
mod lines;
mod progress;
mod signals;
mod store;
mod terminal;
mod ui;

use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command, HostCommand};
use crate::client::Client;
use crate::failure::Failure;
use crate::ui::Ui;

fn main() {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version go to stdout, usage errors to stderr; neither may fail on a closed pipe.
            let _ = e.print();
            std::process::exit(e.exit_code());
        }
    };
    terminal::restore_on_panic();
    let ui = cli.global.ui();
    let code = match start(cli, ui) {
        Ok(code) => code,
        Err(failure) => {
            ui.failure(&failure);
            failure.exit_code()
        }
    };
    // Not by returning: a thread may still be waiting for stdin.
    std::process::exit(i32::from(code));
}

fn start(cli: Cli, ui: Ui) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::failed(format!("cannot start: {e}")))?;
    let result = runtime.block_on(run(cli, ui));
    runtime.shutdown_background();
    result
}

async fn run(cli: Cli, ui: Ui) -> Result<u8, Failure> {
    let client = Client::new(&cli.global.socket, ui);
    // An exec has its own way with signals.
    if let Command::Exec(args) = cli.command {
        return exec::run(&client, ui, args).await;
    }
    let mut signals = signals::Signals::new()?;
    tokio::select! {
        result = dispatch(cli.command, &client, ui) => result.map(|()| 0),
        _ = signals.next() => Err(Failure::cancelled("cancelled; what the daemon has begun may still be finished")),
    }
}

async fn dispatch(command: Command, client: &Client, ui: Ui) -> Result<(), Failure> {
    match command {
        Command::Image(command) => commands::image::run(command, client, ui).await,
        Command::Sandbox(command) => commands::sandbox::run(command, client, ui).await,
        Command::Turn(command) => commands::turn::run(command, client, ui).await,
        Command::Checkpoint(command) => commands::checkpoint::run(command, client, ui).await,
        Command::Restore(args) => commands::restore::restore(args, client, ui).await,
        Command::Rollback(args) => commands::restore::rollback(args, client, ui).await,
        Command::Fork(args) => commands::restore::fork(args, client, ui).await,
        Command::Status | Command::Host(HostCommand::Show) => {
            commands::status::run(client, ui).await
        }
        Command::Node(args) => commands::node::run(args, ui).await,
        Command::Gc(command) => commands::gc::run(command, ui).await,
        Command::Retention(command) => commands::retention::run(command, ui).await,
        Command::Scrub(command) => commands::scrub::run(command, ui).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tidepool", &mut script);
            ui.data(&script)
        }
        Command::Exec(_) => Err(Failure::failed("exec is run elsewhere")),
    }
}
