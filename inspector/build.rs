//! Compiles the eBPF programs in `bpf/` to objects that the library embeds.
//!
//! Needs a clang with the bpf target and libbpf's headers; the kernel of the build machine plays no part.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The forms in which the programs are compiled; see `bpf/effects.bpf.c`.
const SETS: [&str; 5] = ["CTIME", "EXT4", "EXT4_RAW", "TRAMPOLINE", "SYSCALLS"];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-env-changed=TIDEPOOL_CLANG");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=bpf");
    let entries = fs::read_dir("bpf").map_err(|e| format!("cannot read inspector/bpf: {e}"))?;
    for entry in entries {
        let entry = entry.map_err(|e| format!("cannot read inspector/bpf: {e}"))?;
        println!("cargo::rerun-if-changed={}", entry.path().display());
    }

    let out = env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?;
    let out = PathBuf::from(out);
    let clang = find(&tools("TIDEPOOL_CLANG", "clang")).ok_or(
        "no clang found to compile the eBPF programs: install clang (14 or newer) or name one in TIDEPOOL_CLANG",
    )?;
    // Without it the objects work too; they only carry ten times their size in debug information.
    let strip = find(&tools("TIDEPOOL_LLVM_STRIP", "llvm-strip"));
    if strip.is_none() {
        println!(
            "cargo::warning=no llvm-strip found: the embedded eBPF objects keep their debug information"
        );
    }
    for set in SETS {
        let object = out.join(format!("{set}.o"));
        compile(&clang, set, &object)?;
        if let Some(strip) = &strip {
            let status = Command::new(strip).arg("-g").arg(&object).status();
            if !status.is_ok_and(|s| s.success()) {
                return Err(format!("{strip} could not strip {}", object.display()));
            }
        }
    }
    Ok(())
}

fn compile(clang: &str, set: &str, object: &Path) -> Result<(), String> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let output = Command::new(clang)
        // v3: atomic operations that fetch, which are ordered; Linux 5.12.
        .args(["-target", "bpf", "-mcpu=v3", "-O2", "-g"])
        .args(["-Wall", "-Werror", "-c"])
        .arg(format!("-D{set}"))
        // Where multiarch distributions keep <asm/types.h>, which <linux/bpf.h> wants.
        .arg(format!("-idirafter/usr/include/{arch}-linux-gnu"))
        .arg("bpf/effects.bpf.c")
        .arg("-o")
        .arg(object)
        .output()
        .map_err(|e| format!("{clang} could not be started: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let hint = if stderr.contains("bpf/bpf_helpers.h") {
        " (libbpf's headers are missing: install libbpf-dev)"
    } else {
        ""
    };
    Err(format!(
        "{clang} could not compile the eBPF programs{hint}:\n{stderr}"
    ))
}

/// The named tool from the environment, or the plain name and then its versioned ones, newest first.
fn tools(variable: &str, name: &str) -> Vec<String> {
    if let Ok(chosen) = env::var(variable) {
        return vec![chosen];
    }
    let versioned = (14..=24).rev().map(|v| format!("{name}-{v}"));
    std::iter::once(name.to_owned()).chain(versioned).collect()
}

fn find(candidates: &[String]) -> Option<String> {
    candidates
        .iter()
        .find(|c| {
            Command::new(c)
                .arg("--version")
                .output()
                .is_ok_and(|o| o.status.success())
        })
        .cloned()
}
