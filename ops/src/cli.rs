//! The command line: what can be asked for, checked as far as it can be without the daemon.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tidepool_proto::api::{ImageKind, MountSpec};
use tidepool_proto::turn::MAX_KEY;

use crate::commands::gc::GcCommand;
use crate::commands::retention::RetentionCommand;
use crate::commands::scrub::ScrubCommand;
use crate::help;
use crate::human;
use crate::ui::Ui;

/// Where the daemon listens unless told otherwise.
const DEFAULT_SOCKET: &str = "/run/tidepool/host.sock";

#[derive(Debug, Parser)]
#[command(
    name = "tidepool",
    version,
    about = "Durable agent sandboxes: every turn checkpointed, every checkpoint restorable",
    long_about = help::LONG_ABOUT,
    after_help = help::AFTER,
    after_long_help = help::AFTER_LONG,
    disable_help_subcommand = false,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// The host daemon's socket
    #[arg(long, global = true, env = "TIDEPOOL_SOCKET", value_name = "PATH", default_value = DEFAULT_SOCKET, hide_env_values = true)]
    pub(crate) socket: PathBuf,
    /// Print the result as one line of JSON on stdout (a failure too, as {"error": ...})
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No notes and no progress on stderr; warnings and errors stay
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Tell on stderr what is asked of the daemon and how long it takes
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    pub(crate) verbose: bool,
}

impl Global {
    pub(crate) fn ui(&self) -> Ui {
        Ui {
            json: self.json,
            quiet: self.quiet,
            verbose: self.verbose,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Import and list images, the file systems sandboxes start from
    #[command(subcommand, arg_required_else_help = true)]
    Image(ImageCommand),
    /// Create, list, show, pause, resume and remove sandboxes
    #[command(subcommand, arg_required_else_help = true)]
    Sandbox(SandboxCommand),
    /// Run a command in a sandbox as one turn
    #[command(long_about = help::EXEC, after_help = help::EXEC_AFTER)]
    Exec(ExecArgs),
    /// The turns of a sandbox: what each changed and what was captured for it
    #[command(subcommand, arg_required_else_help = true)]
    Turn(TurnCommand),
    /// Take, list, show and compare checkpoints
    #[command(subcommand, arg_required_else_help = true)]
    Checkpoint(CheckpointCommand),
    /// Bring a sandbox back from a checkpoint, the newest unless one is named
    #[command(long_about = help::RESTORE, after_help = help::RESTORE_AFTER)]
    Restore(RestoreArgs),
    /// Take a sandbox back to an earlier checkpoint
    #[command(long_about = help::ROLLBACK, after_help = help::ROLLBACK_AFTER)]
    Rollback(RollbackArgs),
    /// Make a new sandbox from a checkpoint of another
    #[command(long_about = help::FORK, after_help = help::FORK_AFTER)]
    Fork(ForkArgs),
    /// The nodes of the store cluster: list, let one join, drain, remove
    #[command(arg_required_else_help = true, after_help = help::NODE_AFTER)]
    Node(NodeArgs),
    /// The host daemon, its store, and what does not work on this host
    #[command(after_help = help::STATUS_AFTER)]
    Status,
    /// This host
    #[command(subcommand, arg_required_else_help = true)]
    Host(HostCommand),
    /// Collect chunks of the store that nothing needs any more
    #[command(subcommand, arg_required_else_help = true)]
    Gc(GcCommand),
    /// Which checkpoints stay: rules, plans, and what they do
    #[command(subcommand, arg_required_else_help = true)]
    Retention(RetentionCommand),
    /// Read and verify every stored body, and mend what is damaged
    #[command(subcommand, arg_required_else_help = true, after_help = help::SCRUB_AFTER)]
    Scrub(ScrubCommand),
    /// Print a completion script for a shell
    #[command(after_help = help::COMPLETIONS_AFTER)]
    Completions {
        /// The shell the script is for
        shell: clap_complete::Shell,
    },
}

/// How to reach the store.
#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    /// The address of a node of the store; several are tried in turn
    #[arg(
        long,
        global = true,
        env = "TIDEPOOL_STORE",
        value_name = "ADDRESS",
        value_delimiter = ',',
        default_value = "127.0.0.1:7480"
    )]
    pub(crate) store: Vec<std::net::SocketAddr>,
    /// The directory with an operator's certificate for it
    #[arg(
        long,
        global = true,
        env = "TIDEPOOL_IDENTITY",
        value_name = "DIR",
        default_value = "/etc/tidepool/operator"
    )]
    pub(crate) identity: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    #[command(subcommand)]
    pub(crate) command: NodeCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// List the nodes, and ask each how it is
    List,
    /// Print a token with which new nodes join the cluster
    Join {
        /// How long it is valid
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=43200))]
        minutes: u64,
        /// How many nodes may join with it
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
        uses: u32,
    },
    /// Have a node give its shards away, so that it can be removed
    Drain {
        /// The node's number
        node: u64,
        /// Let it keep shards again
        #[arg(long)]
        undo: bool,
    },
    /// Remove a node, for ever: one that is drained, or one that is lost
    Remove {
        /// The node's number
        node: u64,
        /// It is lost with its data and will not come back: it is removed although it had shards
        #[arg(long)]
        dead: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// What it runs on: kernel, probes and why not better ones, runc, CRIU, store
    #[command(after_help = help::STATUS_AFTER)]
    Show,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Import an image from this host
    #[command(long_about = help::IMAGE_IMPORT, after_help = help::IMAGE_IMPORT_AFTER)]
    Import(ImportArgs),
    /// List the imported images
    #[command(after_help = help::IMAGE_LIST_AFTER)]
    List,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The image's name
    pub(crate) name: String,
    /// A directory, a tar (plain, gzip or zstd) or an OCI layout (directory or tar)
    pub(crate) source: PathBuf,
    /// What the source is, where looking at it does not tell
    #[arg(long, value_enum)]
    pub(crate) kind: Option<Kind>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    Directory,
    Tar,
    OciLayout,
}

impl From<Kind> for ImageKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Directory => ImageKind::Directory,
            Kind::Tar => ImageKind::Tar,
            Kind::OciLayout => ImageKind::OciLayout,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum SandboxCommand {
    /// Create a sandbox from an image and start it
    #[command(after_help = help::SANDBOX_CREATE_AFTER)]
    Create(Box<CreateArgs>),
    /// List the sandboxes this host knows, running or not
    #[command(after_help = help::SANDBOX_LIST_AFTER)]
    List,
    /// Show one sandbox
    #[command(after_help = help::SANDBOX_SHOW_AFTER)]
    Show {
        #[command(flatten)]
        sandbox: Sandbox,
    },
    /// Stop sandboxes and free what they hold on this host; their checkpoints stay restorable
    #[command(long_about = help::SANDBOX_RM, after_help = help::SANDBOX_RM_AFTER)]
    Rm(RmArgs),
    /// Freeze all processes of a sandbox
    #[command(after_help = help::SANDBOX_PAUSE_AFTER)]
    Pause {
        #[command(flatten)]
        sandbox: Sandbox,
    },
    /// Let a paused sandbox go on
    #[command(after_help = help::SANDBOX_RESUME_AFTER)]
    Resume {
        #[command(flatten)]
        sandbox: Sandbox,
    },
}

/// The sandbox a command is about.
#[derive(Debug, Args)]
pub(crate) struct Sandbox {
    /// Its name, its id, or at least 4 digits of its id
    #[arg(value_name = "SANDBOX", value_parser = not_empty)]
    pub(crate) sandbox: String,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The new sandbox's name
    pub(crate) name: String,
    /// The image it starts from (or --image IMAGE)
    #[arg(value_name = "IMAGE", required_unless_present = "image")]
    pub(crate) image_name: Option<String>,
    /// The image it starts from
    #[arg(long, value_name = "IMAGE", conflicts_with = "image_name")]
    pub(crate) image: Option<String>,
    /// A variable for every command run in it; may be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = variable)]
    pub(crate) env: Vec<String>,
    /// Where commands start
    #[arg(short = 'w', long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Who runs commands: uid, uid:gid or a name in the image
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// The memory limit, such as 512M or 2GiB
    #[arg(long, value_name = "SIZE", value_parser = human::parse_size)]
    pub(crate) memory: Option<u64>,
    /// The most processes it may have at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pids: Option<u32>,
    /// Let it reach outside through this host
    #[arg(long)]
    pub(crate) network: bool,
    /// Mount a host directory in; no checkpoint covers what is in it
    #[arg(long, value_name = "SOURCE:TARGET[:ro]", value_parser = mount)]
    pub(crate) mount: Vec<MountSpec>,
    /// A line of gitignore syntax: changes of such paths alone ask for no checkpoint; may be given several times
    #[arg(long, value_name = "PATTERN")]
    pub(crate) ignore: Vec<String>,
    /// The agent that runs inside (aider, claude, codex, gemini, opencode): its own bookkeeping is ignored too
    #[arg(long, value_name = "NAME")]
    pub(crate) agent: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// The sandboxes: names, ids, or at least 4 digits of an id
    #[arg(value_name = "SANDBOX", required = true, value_parser = not_empty)]
    pub(crate) sandboxes: Vec<String>,
    /// Drop the checkpoints and turns too: nothing can be restored afterwards
    #[arg(long)]
    pub(crate) forget: bool,
    /// Print what would be done and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub(crate) sandbox: Sandbox,
    /// Send this command's stdin; without it the command's stdin is closed
    #[arg(short = 'i', long)]
    pub(crate) stdin: bool,
    /// Give the command a pseudo-terminal
    #[arg(short = 't', long)]
    pub(crate) tty: bool,
    /// A variable for the command; may be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = variable)]
    pub(crate) env: Vec<String>,
    /// Where the command starts
    #[arg(short = 'w', long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Who runs it: uid, uid:gid or a name in the image
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Kill the command after this time, such as 30s or 2m; the exit code is then 124
    #[arg(long, value_name = "TIME", value_parser = timeout)]
    pub(crate) timeout: Option<Duration>,
    /// The idempotency key: a key seen before gets its recorded result and nothing runs again
    #[arg(long, value_parser = key)]
    pub(crate) key: Option<String>,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TurnCommand {
    /// List the turns of a sandbox, oldest first
    #[command(long_about = help::TURN_LIST, after_help = help::TURN_LIST_AFTER)]
    List(TurnListArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TurnListArgs {
    #[command(flatten)]
    pub(crate) sandbox: Sandbox,
    /// Print every turn in full, with the paths, processes and reasons seen
    #[arg(long)]
    pub(crate) evidence: bool,
    /// Begin with this turn
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) from: u64,
    /// List at most this many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// List only the newest
    #[arg(long, value_name = "N", conflicts_with_all = ["from", "limit"], value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) last: Option<u64>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// Take a checkpoint now, as a turn without a command
    #[command(after_help = help::CHECKPOINT_CREATE_AFTER)]
    Create {
        #[command(flatten)]
        sandbox: Sandbox,
    },
    /// List the checkpoints of a sandbox
    #[command(after_help = help::CHECKPOINT_LIST_AFTER)]
    List {
        #[command(flatten)]
        sandbox: Sandbox,
    },
    /// Show one checkpoint
    #[command(after_help = help::CHECKPOINT_SHOW_AFTER)]
    Show {
        #[command(flatten)]
        sandbox: Sandbox,
        /// Its id, a unique prefix of it, or a turn as @N
        #[arg(value_parser = not_empty)]
        checkpoint: String,
    },
    /// List the paths that differ between two checkpoints
    #[command(after_help = help::CHECKPOINT_DIFF_AFTER)]
    Diff {
        #[command(flatten)]
        sandbox: Sandbox,
        /// The older one: an id, a unique prefix of it, or a turn as @N
        #[arg(value_parser = not_empty)]
        from: String,
        /// The newer one; the sandbox's newest where absent
        #[arg(value_parser = not_empty)]
        to: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    pub(crate) sandbox: Sandbox,
    /// An id, a unique prefix of it, or a turn as @N; the newest where absent
    #[arg(long, value_parser = not_empty)]
    pub(crate) checkpoint: Option<String>,
    /// Restore even if the sandbox runs here: it is stopped first and loses what no checkpoint holds
    #[arg(long)]
    pub(crate) force: bool,
    /// Print what would be done and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RollbackArgs {
    #[command(flatten)]
    pub(crate) sandbox: Sandbox,
    /// The checkpoint to go back to: an id, a unique prefix of it, or a turn as @N
    #[arg(long, value_name = "CHECKPOINT", value_parser = not_empty)]
    pub(crate) to: String,
    /// Print what would be done and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    #[command(flatten)]
    pub(crate) sandbox: Sandbox,
    /// The new sandbox's name
    #[arg(value_name = "NEWNAME")]
    pub(crate) new_name: String,
    /// An id, a unique prefix of it, or a turn as @N; where absent a checkpoint is taken now if the sandbox runs
    #[arg(long, value_parser = not_empty)]
    pub(crate) checkpoint: Option<String>,
}

fn not_empty(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    Ok(text.to_owned())
}

fn variable(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text.to_owned()),
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

fn timeout(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text)
        .map_err(|e| format!("{e}; write it like 500ms, 30s or 2m"))?;
    if time.as_millis() == 0 {
        return Err("it must be at least 1ms".to_owned());
    }
    if time > Duration::from_secs(366 * 86_400) {
        return Err("it is over a year; leave it out for no limit".to_owned());
    }
    Ok(time)
}

fn key(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > MAX_KEY {
        return Err(format!("a key has 1 to {MAX_KEY} bytes"));
    }
    if text.chars().any(char::is_control) {
        return Err("a key has no control characters".to_owned());
    }
    Ok(text.to_owned())
}

fn mount(text: &str) -> Result<MountSpec, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, read_only) = match parts[..] {
        [source, target] => (source, target, false),
        [source, target, "ro"] => (source, target, true),
        [source, target, "rw"] => (source, target, false),
        _ => return Err(format!("{text:?} is not SOURCE:TARGET or SOURCE:TARGET:ro")),
    };
    if source.is_empty() || !target.starts_with('/') {
        return Err(
            "SOURCE is a directory of this host, TARGET an absolute path in the sandbox".to_owned(),
        );
    }
    let source = std::path::absolute(source).map_err(|e| e.to_string())?;
    let source = source
        .to_str()
        .ok_or("SOURCE is not valid UTF-8")?
        .to_owned();
    Ok(MountSpec {
        source,
        target: target.to_owned(),
        read_only,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn exec_takes_options_before_and_a_command_after() {
        for line in [
            "tidepool exec web -i -t -e A=1 -- ls -la -i --json",
            "tidepool exec -it web -e A=1 ls -la -i --json",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            let Command::Exec(exec) = cli.command else {
                panic!("{line}");
            };
            assert!(exec.stdin && exec.tty && !cli.global.json, "{line}");
            assert_eq!(exec.sandbox.sandbox, "web");
            assert_eq!(exec.command, ["ls", "-la", "-i", "--json"]);
        }
    }

    #[test]
    fn values_are_checked() {
        assert!(variable("A=").is_ok() && variable("=x").is_err() && variable("A").is_err());
        assert!(timeout("30s").is_ok() && timeout("0s").is_err() && timeout("30").is_err());
        assert!(
            key(&"x".repeat(128)).is_ok() && key(&"x".repeat(129)).is_err() && key("a\n").is_err()
        );
        let m = mount("/data:/mnt:ro").unwrap();
        assert!(m.read_only && m.source == "/data" && m.target == "/mnt");
        assert!(mount("/data").is_err() && mount("/a:b").is_err() && mount("/a:/b:zz").is_err());
    }
}
