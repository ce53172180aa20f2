//! Tells the program by which release of Rust it is built: its figures belong to one.

use std::env;
use std::process::Command;

fn main() {
    let rustc = env::var_os("RUSTC").expect("cargo names the compiler");
    let said = Command::new(rustc).arg("--version").output().expect("the compiler that compiled this runs");
    let said = String::from_utf8(said.stdout).expect("a version is ASCII");
    let release = said.split_whitespace().nth(1).expect("rustc RELEASE (COMMIT DATE)");
    println!("cargo::rustc-env=RUSTC_RELEASE={release}");
    // Cargo runs this again when the compiler is another.
    println!("cargo::rerun-if-changed=build.rs");
}
