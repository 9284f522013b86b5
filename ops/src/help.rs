//! The long texts of `--help`. Each command has an example.

pub(crate) const LONG_ABOUT: &str = "\
Tidepool runs agent sandboxes whose work survives the death of the process, the host daemon and the host. Every command \
run in a sandbox is a turn. At the end of a turn Tidepool looks at what the turn changed, captures only that (files, \
processes, both or nothing), and commits it to the store before the command's exit code is handed out.

This program talks to the host daemon, tidepool-host, over a unix socket and does nothing on its own.";

pub(crate) const AFTER: &str = "\
`tidepool --help` shows a first session and the exit codes; `tidepool COMMAND --help` explains a command.";

pub(crate) const AFTER_LONG: &str = "\
A first session:

  Start the host daemon as root and look whether everything works on this host:
    tidepool-host --state-dir /var/lib/tidepool &
    tidepool status

  Import a root file system as an image: a directory, a tar or an OCI layout:
    tidepool image import debian ./rootfs.tar

  Create a sandbox and work in it. Each exec is one turn:
    tidepool sandbox create web --image debian
    tidepool exec web -- sh -c 'echo hello >/root/note'
    tidepool exec web -- cat /root/note
    tidepool exec -it web -- bash

  See what each turn changed, and that the turn which only read was skipped as clean:
    tidepool turn list web
    tidepool turn list web --evidence
    tidepool checkpoint diff web @1

  Lose it, and bring it back; `restore` works the same after a crash of the sandbox or the daemon:
    tidepool sandbox rm web
    tidepool restore web
    tidepool exec web -- cat /root/note

  Go back in time, or try something on a copy:
    tidepool rollback web --to @2
    tidepool fork web experiment

  Remove it and everything that was kept of it:
    tidepool sandbox rm web experiment --forget

Naming things:
  A SANDBOX is a name, an id, or at least 4 digits of an id.
  A CHECKPOINT is an id, a unique prefix of one, or @N for the state at the end of turn N;
  turn 1 is the creation.

Output:
  Data goes to stdout, everything else to stderr. With --json stdout is one line of JSON,
  also for a failure: {\"error\":{\"kind\":...,\"message\":...,\"exit_code\":...}}.
  Tables are for people and may change; scripts use --json.
  Times are UTC, sizes in base-2 units.

Exit codes:
  0    done
  1    failed, or not allowed
  2    wrong usage, or a request the daemon finds wrong
  3    partly done: of several things asked for, some failed
  10   what was named does not exist
  11   fenced or in conflict with what exists
  12   unavailable: no daemon, or it cannot serve now; trying again may help
  13   stored bytes are corrupt
  130  cancelled
  `exec` leaves with the code of the command it ran; see `tidepool exec --help`.";

pub(crate) const IMAGE_IMPORT: &str = "\
Import an image from this host. The source is read once, cut into chunks and stored; chunks that the store already has \
are not sent again. The source is a directory, a tar (plain, gzip or zstd) or an OCI layout (a directory or a tar of \
one); it may be removed afterwards. Paths that lead out of the image are refused.";

pub(crate) const IMAGE_IMPORT_AFTER: &str = "\
Examples:
  tidepool image import debian ./rootfs.tar.gz
  tidepool image import tools /srv/tools --kind directory";

pub(crate) const IMAGE_LIST_AFTER: &str = "\
Examples:
  tidepool image list
  tidepool image list --json | jq -r '.[].name'";

pub(crate) const SANDBOX_CREATE_AFTER: &str = "\
Examples:
  tidepool sandbox create web --image debian
  tidepool sandbox create web debian --memory 2GiB --pids 512 --network -e LANG=C.UTF-8
  tidepool sandbox create web debian --mount ./data:/data:ro";

pub(crate) const SANDBOX_LIST_AFTER: &str = "\
A sandbox that is `dead` does not run here and can be restored from its last checkpoint.

Examples:
  tidepool sandbox list
  tidepool sandbox list --json | jq -r '.[] | select(.state == \"dead\") | .name'";

pub(crate) const SANDBOX_SHOW_AFTER: &str = "\
Example:
  tidepool sandbox show web";

pub(crate) const SANDBOX_RM: &str = "\
Stop sandboxes and free everything they hold on this host: processes, mounts, namespaces, files. What happened since \
the last checkpoint is lost. Their checkpoints and turns are kept: `tidepool restore SANDBOX` brings one back. With \
--forget these are dropped too, and nothing can be restored afterwards.

When several are named and only some could be removed, the exit code is 3.";

pub(crate) const SANDBOX_RM_AFTER: &str = "\
Examples:
  tidepool sandbox rm web                 keeps its checkpoints
  tidepool sandbox rm web api --forget    drops everything
  tidepool sandbox rm web --dry-run       only tells what would be lost";

pub(crate) const SANDBOX_PAUSE_AFTER: &str = "\
Example:
  tidepool sandbox pause web && tidepool sandbox resume web";

pub(crate) const SANDBOX_RESUME_AFTER: &str = "\
Example:
  tidepool sandbox resume web";

pub(crate) const EXEC: &str = "\
Run a command in a sandbox as one turn. Its output appears as it is written. When it has ended, the turn is captured and \
committed, and only then does `tidepool exec` end: an exit code that was seen is safe.

Each turn has an idempotency key, made up unless --key gives one. Should the connection break, the same command with \
the same key is safe to run again: if the turn was committed, the recorded output and exit code are returned and \
nothing runs a second time; if not, nothing of the turn was kept by a restore.

With -it the terminal is handed to the command; Ctrl-] pressed three times in a row gives up waiting. Without -t, \
Ctrl-C sends SIGINT to the command, and a second Ctrl-C within 2 seconds stops waiting. In both cases the command may \
still run in the sandbox.";

pub(crate) const EXEC_AFTER: &str = "\
Exit codes:
  The command's own code; 128 + N when signal N ended it; 124 when --timeout was over.
  141 when nobody reads the output any more.

  Where `tidepool exec` itself fails it leaves with one of its own codes (1, 2, 10 to 13, 130;
  see `tidepool --help`), which a command could have returned too. A failure of `tidepool exec`
  is told by a line on stderr that starts with `tidepool: error:`, and with --json by the
  document on stdout, which is then {\"error\": ...}.

With --json nothing is streamed. One line of JSON comes at the end, with status, turn, replayed,
stdout_base64 and stderr_base64; stdout_truncated or stderr_truncated says that an output was
over 64 MiB and only its head is given.

Examples:
  tidepool exec web -- ls -la /root
  tidepool exec -it web -- bash
  tar c src | tidepool exec -i web -w /root -- tar x
  tidepool exec web --timeout 5m -e CI=1 -- make test
  tidepool exec web --key build-42 -- make install    safe to repeat";

pub(crate) const TURN_LIST: &str = "\
List the turns of a sandbox, oldest first. VERDICT is what was captured: clean (nothing that a recovery would miss), \
files, processes, or full (both). CAPTURED is what was read for it, SENT what the store did not have yet, FROZEN how \
long the sandbox stood still, WAITED how long the turn's end was held back until the commit.";

pub(crate) const TURN_LIST_AFTER: &str = "\
Examples:
  tidepool turn list web
  tidepool turn list web --last 1 --evidence
  tidepool turn list web --json | jq '.[] | {turn, verdict}'";

pub(crate) const CHECKPOINT_CREATE_AFTER: &str = "\
Every exec ends with a checkpoint of what it changed; this one is for changes made by processes in between.

Example:
  tidepool checkpoint create web";

pub(crate) const CHECKPOINT_LIST_AFTER: &str = "\
Example:
  tidepool checkpoint list web";

pub(crate) const CHECKPOINT_SHOW_AFTER: &str = "\
Examples:
  tidepool checkpoint show web @3
  tidepool checkpoint show web 1f2e3d4c";

pub(crate) const CHECKPOINT_DIFF_AFTER: &str = "\
Examples:
  tidepool checkpoint diff web @2        from turn 2 to the newest
  tidepool checkpoint diff web @2 @5";

pub(crate) const RESTORE: &str = "\
Bring a sandbox back from a checkpoint, the newest unless one is named: its files, and its processes where the \
checkpoint has them. The restored file tree is walked again and compared with the checkpoint. Connections to outside are \
closed. A sandbox that runs here is refused (exit code 11) unless --force stops it first.";

pub(crate) const RESTORE_AFTER: &str = "\
Examples:
  tidepool restore web
  tidepool restore web --checkpoint @3 --force
  tidepool restore web --dry-run";

pub(crate) const ROLLBACK: &str = "\
Take a sandbox back to an earlier checkpoint. If it runs it is stopped first, and what it did after that checkpoint is \
undone. Later checkpoints are listed by `tidepool checkpoint list` as long as they are kept.";

pub(crate) const ROLLBACK_AFTER: &str = "\
Examples:
  tidepool rollback web --to @3
  tidepool rollback web --to @3 --dry-run    lists the paths that would change";

pub(crate) const FORK: &str = "\
Make a new sandbox from a checkpoint of another. Without --checkpoint one is taken now if the sandbox runs, so that the \
copy starts where the original stands; the original goes on. Both share what did not change.";

pub(crate) const FORK_AFTER: &str = "\
Examples:
  tidepool fork web experiment
  tidepool fork web before --checkpoint @2";

pub(crate) const STATUS_AFTER: &str = "\
The exit code is 12 if the daemon does not answer or its store is not ready.

Examples:
  tidepool status
  tidepool status --json | jq -r '.warnings[]'";

pub(crate) const COMPLETIONS_AFTER: &str = "\
Examples:
  tidepool completions bash > /etc/bash_completion.d/tidepool
  tidepool completions zsh > \"${fpath[1]}/_tidepool\"
  tidepool completions fish > ~/.config/fish/completions/tidepool.fish";

pub(crate) const NODE_AFTER: &str = "\
Example: a node more, and another one replaced after it was lost:
  tidepool node --store 10.0.0.1:7480 --identity ./operator join
  tidepool node --store 10.0.0.1:7480 --identity ./operator remove 2 --dead";

pub(crate) const SCRUB_AFTER: &str = "\
Each node verifies what it keeps. What is damaged is fetched from another node; where none has a good copy it is put into quarantine,
the command says so and leaves with 13, and an upload of the same data heals it.

Example: every node at 64 MiB a second, and how far they are:
  tidepool scrub start --store 10.0.0.1:7480 --identity ./operator --pace 64MiB
  tidepool scrub status --store 10.0.0.1:7480 --identity ./operator";
