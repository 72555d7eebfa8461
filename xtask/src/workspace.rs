//! Where things are in this checkout.

use std::env;
use std::path::{Path, PathBuf};

/// The directory of this crate.
pub const XTASK: &str = env!("CARGO_MANIFEST_DIR");

/// The root of the workspace.
pub fn root() -> &'static Path {
    let xtask = Path::new(XTASK);
    xtask.parent().unwrap_or(xtask)
}

/// Where the tasks keep what is costly to make again.
///
/// This is the workspace's own `target` whatever `CARGO_TARGET_DIR` says, so that every task finds
/// what another one left.
pub fn cache() -> PathBuf {
    root().join("target")
}

/// Where cargo puts its artefacts.
pub fn cargo_target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(cache, PathBuf::from)
}
