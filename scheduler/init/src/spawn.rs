//! Starting a job: user, environment, streams, and the step from fork to the new program.

use crate::sys;
use crate::users::{self, Identity};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use tidepool_init::message::{ErrorKind, SpawnRequest};

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Added to jobs, so that under memory pressure they end before the process that keeps them does.
const OOM_SCORE: &[u8] = b"100";

/// What jobs get unless they say otherwise.
pub(crate) struct Defaults {
    pub(crate) user: Option<String>,
    pub(crate) cwd: Option<Vec<u8>>,
    pub(crate) env: Vec<Vec<u8>>,
}

/// A started job: its process and our ends of its streams.
pub(crate) struct Spawned {
    pub(crate) pid: libc::pid_t,
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: OwnedFd,
    /// Absent with a terminal.
    pub(crate) stderr: Option<OwnedFd>,
    /// Ends without a byte when the program runs, or gives [`Failure`] as eight bytes.
    pub(crate) exec: OwnedFd,
}

/// What a refused spawn is answered with.
pub(crate) type Refusal = (ErrorKind, String);

/// The step that failed in the child, and its errno.
pub(crate) struct Failure {
    stage: u32,
    errno: i32,
}

const STAGES: [&str; 5] = [
    "set up its session",
    "take its user",
    "enter its directory",
    "set up its streams",
    "run",
];

impl Failure {
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (stage, errno) = bytes.split_at_checked(4)?;
        Some(Self {
            stage: u32::from_le_bytes(stage.try_into().ok()?),
            errno: i32::from_le_bytes(errno.get(..4)?.try_into().ok()?),
        })
    }

    pub(crate) fn text(&self, program: &[u8]) -> String {
        let what = STAGES.get(self.stage as usize).copied().unwrap_or("start");
        let why = io::Error::from_raw_os_error(self.errno);
        format!(
            "could not {what} {}: {why}",
            String::from_utf8_lossy(program)
        )
    }
}

fn failed(what: &str, e: impl std::fmt::Display) -> Refusal {
    (ErrorKind::SpawnFailed, format!("{what}: {e}"))
}

fn name_of(var: &[u8]) -> &[u8] {
    var.split(|b| *b == b'=').next().unwrap_or(var)
}

fn set(env: &mut Vec<Vec<u8>>, var: Vec<u8>, replace: bool) {
    match env.iter_mut().find(|v| name_of(v) == name_of(&var)) {
        Some(old) if replace => *old = var,
        Some(_) => {}
        None => env.push(var),
    }
}

fn environment(defaults: &Defaults, request: &SpawnRequest, identity: &Identity) -> Vec<Vec<u8>> {
    let mut env = Vec::new();
    for var in defaults.env.iter().chain(&request.env) {
        set(&mut env, var.clone(), true);
    }
    set(&mut env, [b"PATH=", DEFAULT_PATH].concat(), false);
    set(
        &mut env,
        format!("HOME={}", identity.home).into_bytes(),
        false,
    );
    if let Some(name) = &identity.name {
        set(&mut env, format!("USER={name}").into_bytes(), false);
        set(&mut env, format!("LOGNAME={name}").into_bytes(), false);
    }
    if request.tty.is_some() {
        set(&mut env, b"TERM=xterm-256color".to_vec(), false);
    }
    env
}

/// Where `program` may be, in order.
fn candidates(program: &[u8], env: &[Vec<u8>]) -> Vec<Vec<u8>> {
    if program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    let path = env
        .iter()
        .find_map(|v| v.strip_prefix(b"PATH="))
        .unwrap_or(DEFAULT_PATH);
    let dirs = path
        .split(|b| *b == b':')
        .map(|d| if d.is_empty() { &b"."[..] } else { d });
    dirs.map(|d| [d, b"/", program].concat()).collect()
}

fn c_strings(list: &[Vec<u8>]) -> Result<Vec<CString>, Refusal> {
    list.iter()
        .map(|s| {
            CString::new(s.clone())
                .map_err(|_| (ErrorKind::Invalid, "a string has a zero byte".into()))
        })
        .collect()
}

fn pointers(list: &[CString]) -> Vec<*const libc::c_char> {
    list.iter()
        .map(|s| s.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

/// Everything the child needs, made before the fork.
struct Plan {
    programs: Vec<CString>,
    argv: Vec<CString>,
    envp: Vec<CString>,
    /// The arguments of `/bin/sh` for a script without an interpreter line, less its name.
    script: Vec<CString>,
    cwd: CString,
    identity: Identity,
    streams: [OwnedFd; 3],
    tty: bool,
    report: OwnedFd,
}

/// Starts a job.
pub(crate) fn spawn(request: &SpawnRequest, defaults: &Defaults) -> Result<Spawned, Refusal> {
    let Some(program) = request.argv.first().filter(|p| !p.is_empty()) else {
        return Err((ErrorKind::Invalid, "no program is named".into()));
    };
    let user = request
        .user
        .as_deref()
        .or(defaults.user.as_deref())
        .unwrap_or("0");
    let identity = users::lookup(user).map_err(|e| (ErrorKind::SpawnFailed, e))?;
    let env = environment(defaults, request, &identity);
    let cwd = request
        .cwd
        .as_deref()
        .or(defaults.cwd.as_deref())
        .unwrap_or(b"/");
    let to_io = |e: io::Error| failed("no streams for the job", e);
    let (exec, report) = sys::pipe().map_err(to_io)?;
    let (ours, theirs) = streams(request, &identity).map_err(to_io)?;
    let argv = c_strings(&request.argv)?;
    let plan = Plan {
        programs: c_strings(&candidates(program, &env))?,
        script: argv[1..].to_vec(),
        argv,
        envp: c_strings(&env)?,
        cwd: CString::new(cwd).map_err(|_| {
            (
                ErrorKind::Invalid,
                "the directory has a zero byte".to_owned(),
            )
        })?,
        identity,
        streams: theirs,
        tty: request.tty.is_some(),
        report,
    };
    // SAFETY: this process has one thread, so the child may do anything its parent could.
    let pid = sys::check(unsafe { libc::fork() }).map_err(|e| failed("no new process", e))?;
    if pid == 0 {
        become_job(&plan);
    }
    drop(plan);
    let [stdin, stdout, stderr] = ours;
    for fd in [
        stdin.as_ref(),
        stdout.as_ref(),
        stderr.as_ref(),
        Some(&exec),
    ]
    .into_iter()
    .flatten()
    {
        sys::set_nonblocking(fd).map_err(to_io)?;
    }
    let stdout = stdout.ok_or_else(|| failed("no streams for the job", "no output"))?;
    Ok(Spawned {
        pid,
        stdin,
        stdout,
        stderr,
        exec,
    })
}

type Ours = [Option<OwnedFd>; 3];

/// Our ends and the job's ends of stdin, stdout and stderr.
fn streams(request: &SpawnRequest, identity: &Identity) -> io::Result<(Ours, [OwnedFd; 3])> {
    if let Some((cols, rows)) = request.tty {
        let (ours, theirs) = sys::open_pty(cols, rows, identity.uid)?;
        let stdin = request.stdin.then(|| ours.try_clone()).transpose()?;
        return Ok((
            [stdin, Some(ours), None],
            [theirs.try_clone()?, theirs.try_clone()?, theirs],
        ));
    }
    let (in_ours, in_theirs) = if request.stdin {
        let (r, w) = sys::pipe()?;
        (Some(w), r)
    } else {
        (None, std::fs::File::open("/dev/null")?.into())
    };
    let (out_r, out_w) = sys::pipe()?;
    let (err_r, err_w) = sys::pipe()?;
    // Programs that open /dev/stdout again need to own the pipe.
    for fd in [&in_theirs, &out_w, &err_w] {
        if identity.uid != 0 {
            // SAFETY: no pointers; a refusal only matters to programs that open their streams again.
            unsafe { libc::fchown(fd.as_raw_fd(), identity.uid, identity.gid) };
        }
    }
    Ok((
        [in_ours, Some(out_r), Some(err_r)],
        [in_theirs, out_w, err_w],
    ))
}

/// The child's side of the fork: never returns.
fn become_job(plan: &Plan) -> ! {
    let (stage, error) = match try_become(plan) {
        Ok(never) => match never {},
        Err(e) => e,
    };
    let mut message = stage.to_le_bytes().to_vec();
    message.extend_from_slice(&error.raw_os_error().unwrap_or(libc::EIO).to_le_bytes());
    let _ = sys::write(std::os::fd::AsFd::as_fd(&plan.report), &message);
    // SAFETY: ends this child without running the parent's clean-up.
    unsafe { libc::_exit(127) }
}

fn try_become(plan: &Plan) -> Result<std::convert::Infallible, (u32, io::Error)> {
    let at = |stage: u32| move |e: io::Error| (stage, e);
    // SAFETY: plain calls; pointers are to data that `plan` owns, and lists end with a null pointer.
    unsafe {
        sys::check(libc::setsid()).map_err(at(0))?;
        let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
        if plan.tty {
            sys::check(libc::ioctl(plan.streams[0].as_raw_fd(), libc::TIOCSCTTY, 0))
                .map_err(at(0))?;
        }
        for (fd, stream) in plan.streams.iter().enumerate() {
            // The numbers 0 to 2 are taken by /dev/null, so no stream has one of them already.
            sys::check(libc::dup2(stream.as_raw_fd(), fd as libc::c_int)).map_err(at(3))?;
        }
        let id = &plan.identity;
        sys::check(libc::setgroups(id.groups.len(), id.groups.as_ptr())).map_err(at(1))?;
        sys::check(libc::setgid(id.gid)).map_err(at(1))?;
        sys::check(libc::setuid(id.uid)).map_err(at(1))?;
        sys::check(libc::chdir(plan.cwd.as_ptr())).map_err(at(2))?;
        sys::reset_signals();
        let envp = pointers(&plan.envp);
        let argv = pointers(&plan.argv);
        let mut why = io::Error::from_raw_os_error(libc::ENOENT);
        for program in &plan.programs {
            libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr());
            let e = io::Error::last_os_error();
            match e.raw_os_error() {
                Some(libc::ENOEXEC) => {
                    let mut shell = vec![c"/bin/sh".to_owned(), program.clone()];
                    shell.extend(plan.script.iter().cloned());
                    libc::execve(
                        c"/bin/sh".as_ptr(),
                        pointers(&shell).as_ptr(),
                        envp.as_ptr(),
                    );
                    return Err((4, e));
                }
                Some(libc::ENOENT | libc::ENOTDIR) => {}
                // A later directory may have one that can be run, but this is what to report if not.
                Some(libc::EACCES) => why = e,
                _ => return Err((4, e)),
            }
        }
        Err((4, why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ann() -> Identity {
        Identity {
            uid: 1,
            gid: 1,
            groups: vec![],
            name: Some("ann".into()),
            home: "/home/ann".into(),
        }
    }

    #[test]
    fn a_jobs_variables_win_over_the_sandboxes_and_those_over_defaults() {
        let defaults = Defaults {
            user: None,
            cwd: None,
            env: vec![b"A=1".to_vec(), b"PATH=/x".to_vec()],
        };
        let request = SpawnRequest {
            env: vec![b"A=2".to_vec()],
            tty: Some((1, 1)),
            ..SpawnRequest::default()
        };
        let env = environment(&defaults, &request, &ann());
        let text: Vec<_> = env
            .iter()
            .map(|v| String::from_utf8_lossy(v).into_owned())
            .collect();
        let expected = [
            "A=2",
            "PATH=/x",
            "HOME=/home/ann",
            "USER=ann",
            "LOGNAME=ann",
            "TERM=xterm-256color",
        ];
        assert_eq!(text, expected);
    }

    #[test]
    fn programs_are_looked_up_in_the_jobs_path_only_without_a_slash() {
        let env = vec![b"PATH=/a::/b".to_vec()];
        assert_eq!(
            candidates(b"sh", &env),
            vec![b"/a/sh".to_vec(), b"./sh".to_vec(), b"/b/sh".to_vec()]
        );
        assert_eq!(candidates(b"./sh", &env), vec![b"./sh".to_vec()]);
    }

    #[test]
    fn failures_say_what_could_not_be_done() {
        let bytes = [4u32.to_le_bytes(), 2i32.to_le_bytes()].concat();
        let text = Failure::decode(&bytes).map(|f| f.text(b"nope"));
        assert_eq!(
            text.as_deref(),
            Some("could not run nope: No such file or directory (os error 2)")
        );
        assert!(Failure::decode(&bytes[..7]).is_none());
    }
}
