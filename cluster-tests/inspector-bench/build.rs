//! Compiles the reference tracer (`bpf/tracer.bpf.c`), with the same tools as the inspector's own programs.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed=TIDEPOOL_CLANG");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=bpf/tracer.bpf.c");
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let out = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?;
    let object = PathBuf::from(out).join("tracer.o");
    let clang = clang().ok_or(
        "no clang found to compile the eBPF programs: install clang (14 or newer) or name one in TIDEPOOL_CLANG",
    )?;
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let output = Command::new(&clang)
        .args(["-target", "bpf", "-O2", "-g", "-Wall", "-Werror", "-c"])
        .arg(format!("-idirafter/usr/include/{arch}-linux-gnu"))
        .arg("bpf/tracer.bpf.c")
        .arg("-o")
        .arg(object)
        .output()
        .map_err(|e| format!("{clang} could not be started: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{clang} could not compile the tracer:\n{}",
        String::from_utf8_lossy(&output.stderr)
    ))
}

fn clang() -> Option<String> {
    let candidates = match env::var("TIDEPOOL_CLANG") {
        Ok(chosen) => vec![chosen],
        Err(_) => std::iter::once("clang".to_owned())
            .chain((14..=24).rev().map(|v| format!("clang-{v}")))
            .collect(),
    };
    candidates.into_iter().find(|c| {
        let answer = Command::new(c).arg("--version").output();
        answer.is_ok_and(|o| o.status.success())
    })
}
