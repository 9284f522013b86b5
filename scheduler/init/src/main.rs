//! `tidepool-init`: PID 1 of a sandbox.
//!
//! It reaps every orphan, starts what the host asks for and owns the pipes and pseudo-terminals of what it started, so
//! that all of it belongs to one process tree that can be dumped and restored as a whole. One thread, one `ppoll` loop,
//! plain descriptors only: nothing here is hard on a process dumper. Sockets that die in a restore are dropped like any
//! other broken connection, and the listener goes on.
//!
//! Nothing inside the sandbox is trusted: files that are read here (users, groups, `/proc`) are bounded and never waited for,
//! and only a holder of the key is obeyed.

mod conn;
mod job;
mod ring;
mod server;
mod spawn;
mod sys;
mod users;

use std::io::Read;
use std::process::ExitCode;
use tidepool_init::message::Setup;

fn main() -> ExitCode {
    // Exit codes are all a host can see of a failed start: standard error is not a place to write to here.
    let mut input = Vec::new();
    let read = std::io::stdin()
        .take(Setup::MAX as u64 + 1)
        .read_to_end(&mut input);
    let setup = match (read, Setup::decode(&input)) {
        (Ok(n), Ok(setup)) if n <= Setup::MAX => setup,
        _ => return ExitCode::from(64),
    };
    input.fill(0);
    if sys::detach_stdio().is_err() {
        return ExitCode::from(65);
    }
    sys::prepare_process();
    let Ok(mut server) = server::Server::bind(setup) else {
        return ExitCode::from(66);
    };
    loop {
        if server.step().is_err() {
            // Only `ppoll` itself can fail, and only for lack of memory: wait rather than end every job.
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}
