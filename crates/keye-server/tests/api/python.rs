//! The clients that people use: run by hand where a Python has them.

use std::process::Command;

use crate::support::{TestServer, config, fixture};

/// `KEYE_TEST_PYTHON=/path/to/python`, with `openai` and `requests`, runs `tests/clients.py`.
#[test]
fn clients_in_python() {
    let Some(python) = std::env::var_os("KEYE_TEST_PYTHON") else {
        eprintln!("KEYE_TEST_PYTHON names no interpreter: not run");
        return;
    };
    let server = TestServer::start(config());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients.py");
    let status = Command::new(python)
        .arg(script)
        .arg(format!("http://{}", server.address))
        .arg(fixture("inputs"))
        .status()
        .expect("the interpreter runs");
    assert!(status.success());
    server.stop();
}
