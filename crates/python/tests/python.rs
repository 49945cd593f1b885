//! Runs the tests of the Python package on the module that this build has made.
//!
//! They need Python 3.10 or later with numpy and pytest: `python3`, or the interpreter that
//! `BYOL_PYTHON` names. Tests of other packages, such as torchvision, are skipped where these are
//! missing.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

/// The package with the module, in a folder of its own.
fn assemble(folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/byol");
    let package = folder.join("byol");
    fs::create_dir_all(&package).unwrap();
    for file in fs::read_dir(source).unwrap().map(|entry| entry.unwrap().path()) {
        if file.is_file() {
            fs::copy(&file, package.join(file.file_name().unwrap())).unwrap();
        }
    }
    // Beside this program, in target/PROFILE/deps.
    let built = env::current_exe().unwrap().parent().unwrap().to_owned();
    let (prefix, suffix) = (env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    let extension = if cfg!(windows) { "pyd" } else { "abi3.so" };
    let library = built.join(format!("{prefix}_byol{suffix}"));
    fs::copy(&library, package.join(format!("_byol.{extension}")))
        .unwrap_or_else(|error| panic!("{}: {error}", library.display()));
    folder.to_owned()
}

#[test]
fn package_passes_its_tests() {
    let python = env::var_os("BYOL_PYTHON").unwrap_or_else(|| "python3".into());
    let can_run = |code: &str| Command::new(&python).args(["-c", code]).output().is_ok_and(|o| o.status.success());
    if !can_run("import sys, numpy, pytest; assert sys.version_info >= (3, 10)") {
        assert!(env::var_os("BYOL_REQUIRE_ALL").is_none(), "no Python with numpy and pytest");
        // Past libtest's capture, so that a skip is always visible.
        let reason = "SKIPPED package_passes_its_tests: no Python 3.10 or later with numpy and pytest\n";
        let _ = std::io::stderr().write_all(reason.as_bytes());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let status = Command::new(&python)
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider"])
        .arg(tests)
        .env("PYTHONPATH", assemble(folder.path()))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .status()
        .unwrap();
    assert!(status.success());
}
