//! What the probes cost a sandbox: CPU time of unpacking small files with and without them, in turns, and the time of one run of each program.
//!
//! `cargo run -p tidepool-inspector --example cost -- [probe set] [rounds] [files]` as root, on ext4 under `/var/tmp`.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use tidepool_inspector::{Inspector, InspectorOptions, ProbeSet, Target, pid_ns_inode};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let set: ProbeSet = words
        .first()
        .map_or("ext4", String::as_str)
        .parse()
        .expect("a probe set");
    let rounds: usize = words
        .get(1)
        .map_or(Ok(11), |w| w.parse())
        .expect("a number");
    let files: usize = words
        .get(2)
        .map_or(Ok(5000), |w| w.parse())
        .expect("a number");
    let options = InspectorOptions {
        probe_set: Some(set),
        ..InspectorOptions::default()
    };
    let inspector = Inspector::load(&options).expect("loaded");
    let (mut with, mut without, mut takes) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..2 * rounds {
        let watch = (round % 2 == 0) != (round % 4 < 2);
        let (cpu, take) = unpack(watch.then_some(&inspector), files);
        if round < 2 {
            continue; // warming up
        }
        if watch {
            with.push(cpu)
        } else {
            without.push(cpu)
        }
        takes.extend(take);
    }
    with.sort();
    without.sort();
    takes.sort();
    let median = |v: &[Duration]| v[v.len() / 2].as_secs_f64() * 1e3;
    println!(
        "{set}: {files} files: {:.1} ms with, {:.1} ms without, ratio of medians {:.4}, of minima {:.4}; taking {:.2} ms",
        median(&with),
        median(&without),
        median(&with) / median(&without),
        with[0].as_secs_f64() / without[0].as_secs_f64(),
        median(&takes),
    );
    stats();
}

/// Runs and nanoseconds of each program of this process, where the kernel counts them (`sysctl kernel.bpf_stats_enabled=1`).
fn stats() {
    for entry in fs::read_dir("/proc/self/fdinfo").expect("fdinfo").flatten() {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let get = |key: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(key))?;
            line.trim().parse::<u64>().ok()
        };
        if let (Some(id), Some(time), Some(count)) =
            (get("prog_id:"), get("run_time_ns:"), get("run_cnt:"))
            && count > 0
        {
            println!("program {id}: {count} runs, {} ns each", time / count);
        }
    }
}

/// Makes the files in a sandbox; answers its CPU time.
fn unpack(inspector: Option<&Inspector>, files: usize) -> (Duration, Option<Duration>) {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
    for name in ["upper", "work", "merged", "lower"] {
        fs::create_dir(dir.path().join(name)).expect("made");
    }
    let (mut go_r, mut go_w) = std::io::pipe().expect("a pipe");
    let (mut done_r, mut done_w) = std::io::pipe().expect("a pipe");
    // SAFETY: this process has one thread; the middle process only forks and waits, the inner one ends with _exit.
    let middle = unsafe { libc::fork() };
    if middle == 0 {
        // SAFETY: as above.
        unsafe {
            assert_eq!(libc::unshare(libc::CLONE_NEWPID | libc::CLONE_NEWNS), 0);
            let inner = libc::fork();
            if inner == 0 {
                let mut byte = [0];
                mount(dir.path());
                done_w.write_all(b"m").expect("said");
                go_r.read_exact(&mut byte).expect("told");
                work(&dir.path().join("merged"), files);
                done_w.write_all(b"d").expect("said");
                go_r.read_exact(&mut byte).expect("told");
                libc::_exit(0);
            }
            done_w.write_all(&inner.to_ne_bytes()).expect("said");
            let mut status = 0;
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::wait4(inner, &mut status, 0, &mut usage);
            let micros = |t: libc::timeval| t.tv_sec * 1_000_000 + t.tv_usec;
            let cpu = micros(usage.ru_utime) + micros(usage.ru_stime);
            done_w.write_all(&cpu.to_ne_bytes()).expect("said");
            libc::_exit(0);
        }
    }
    let mut pid = [0; 4];
    // The two children's first words come in either order.
    let mut first = [0; 5];
    done_r.read_exact(&mut first).expect("told");
    pid.copy_from_slice(if first[0] == b'm' {
        &first[1..]
    } else {
        &first[..4]
    });
    let pid = i32::from_ne_bytes(pid) as u32;
    let slot = inspector.map(|i| {
        let target = Target {
            pid_ns_inode: pid_ns_inode(pid).expect("a namespace"),
            upper_dir: dir.path().join("upper"),
        };
        let slot = i.register(&target).expect("registered");
        i.take(slot).expect("taken");
        slot
    });
    let mut byte = [0];
    go_w.write_all(b"g").expect("said");
    done_r.read_exact(&mut byte).expect("told");
    let taken = slot.map(|slot| {
        let i = inspector.expect("there");
        let start = Instant::now();
        let effects = i.take(slot).expect("taken");
        let taken = start.elapsed();
        if let tidepool_inspector::FileEffects::Inodes(list) = &effects.files {
            assert!(list.len() > files, "{} of {files}", list.len());
        }
        i.unregister(slot);
        taken
    });
    go_w.write_all(b"g").expect("said");
    let mut cpu = [0; 8];
    done_r.read_exact(&mut cpu).expect("told");
    // SAFETY: no pointers that outlive the call.
    unsafe { libc::waitpid(middle, std::ptr::null_mut(), 0) };
    (Duration::from_micros(i64::from_ne_bytes(cpu) as u64), taken)
}

fn mount(dir: &Path) {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .expect("private");
    let at = |name: &str| dir.join(name).display().to_string();
    let layers = std::ffi::CString::new(format!(
        "lowerdir={},upperdir={},workdir={}",
        at("lower"),
        at("upper"),
        at("work")
    ))
    .expect("a string");
    mount(
        "overlay",
        at("merged"),
        "overlay",
        MountFlags::empty(),
        layers.as_c_str(),
    )
    .expect("mounted");
}

fn work(merged: &Path, files: usize) {
    let bytes = [b'x'; 3000];
    for n in 0..files {
        let dir = merged.join(format!("d{}", n / 50));
        if n % 50 == 0 {
            fs::create_dir(&dir).expect("made");
        }
        let path = dir.join(format!("f{n}"));
        fs::write(&path, bytes).expect("written");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .expect("set");
        let file = fs::File::open(&path).expect("opened");
        file.set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000))
            .expect("set");
    }
}
