//! Builds `tidepool-init` for the inside of sandboxes: static, stripped, and always from the sources of this very tree, so that
//! the host and the init it hands out speak the same protocol.
//!
//! A nested cargo with its own target directory does it: the outer one holds the lock of the usual directory, and builds
//! the library of that crate dynamically linked and for the host's own use.

use std::path::PathBuf;
use std::process::{Command, exit};
use std::{env, fs};

fn required(name: &str) -> PathBuf {
    env::var_os(name)
        .map(PathBuf::from)
        .unwrap_or_else(|| fail(&format!("{name} is not set")))
}

fn fail(what: &str) -> ! {
    eprintln!("tidepool-init was not built: {what}");
    exit(1)
}

fn main() {
    let init = required("CARGO_MANIFEST_DIR").join("../init");
    let out = required("OUT_DIR");
    let target = env::var("TARGET").unwrap_or_else(|_| fail("TARGET is not set"));
    let target_dir = out.join("init-target");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", init.join("src").display());
    println!(
        "cargo::rerun-if-changed={}",
        init.join("Cargo.toml").display()
    );

    let mut cargo = Command::new(required("CARGO"));
    // What the outer build set for itself (its flags, clippy as the compiler) is not meant for this one.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        let ours = name.starts_with("CARGO_PROFILE") || name.starts_with("CARGO_BUILD");
        if ours
            || name.starts_with("RUSTC")
            || name == "CARGO_TARGET_DIR"
            || name == "CARGO_ENCODED_RUSTFLAGS"
        {
            cargo.env_remove(&*name);
        }
    }
    cargo
        .args(["build", "--offline", "--release", "--bin", "tidepool-init"])
        .args(["--target", &target, "--manifest-path"])
        .arg(init.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir)
        .args([
            "--config",
            "profile.release.panic='abort'",
            "--config",
            "profile.release.strip=true",
        ])
        .args([
            "--config",
            "profile.release.opt-level='s'",
            "--config",
            "profile.release.lto=true",
        ])
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("cargo ended with {status}")),
        Err(e) => fail(&format!("cargo did not start: {e}")),
    }
    let built = target_dir.join(target).join("release/tidepool-init");
    if let Err(e) = fs::copy(&built, out.join("tidepool-init")) {
        fail(&format!("{}: {e}", built.display()));
    }
}
