//! HTTPS with a certificate made for the test.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use keye_processor::{Overrides, Processor};
use keye_server::{ServeError, Server, ServerConfig, TlsFiles};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, crypto::ring};

use crate::support::{TestServer, config, defaults, fixture, shared};

/// A key and a certificate that it signed itself, for 127.0.0.1.
fn identity(folder: &Path, name: &str) -> TlsFiles {
    let files =
        TlsFiles { certificates: folder.join(format!("{name}.cert.pem")), key: folder.join(format!("{name}.key.pem")) };
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=keye", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(&files.key)
        .arg("-out")
        .arg(&files.certificates)
        .output()
        .expect("openssl is installed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    files
}

#[test]
fn https_is_spoken_with_the_certificate() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files = identity(folder.path(), "own");
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&files.certificates).expect("a certificate")).expect("a root");
    let server = TestServer::start(ServerConfig { tls: Some(files), ..config() });

    let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1").expect("a name");
    let connection = ClientConnection::new(Arc::new(client), name).expect("a client");
    let socket = TcpStream::connect(server.address).expect("a connection");
    let mut stream = StreamOwned::new(connection, socket);
    let body = r#"{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "stream": true}"#;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n";
    write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an orderly end");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("data: [DONE]"), "{answer}");

    // Who speaks plain HTTP is let go, and nobody else notices.
    let mut plain = TcpStream::connect(server.address).expect("a connection");
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").expect("sent");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    server.stop();
}

#[test]
fn files_that_are_no_identity_are_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (own, other) = (identity(folder.path(), "own"), identity(folder.path(), "other"));
    let missing = folder.path().join("missing.pem");
    let empty = folder.path().join("empty.pem");
    std::fs::write(&empty, "nothing\n").expect("written");
    for (files, named) in [
        (TlsFiles { certificates: missing.clone(), key: own.key.clone() }, &missing),
        (TlsFiles { certificates: empty.clone(), key: own.key.clone() }, &empty),
        (TlsFiles { certificates: own.certificates.clone(), key: empty.clone() }, &empty),
        (TlsFiles { certificates: own.certificates.clone(), key: other.key }, &own.certificates),
    ] {
        assert!(matches!(files.check(), Err(ServeError::Tls { path, .. }) if path == *named));
        let processor = Arc::new(Processor::load(&fixture("model"), &Overrides::default()).expect("a processor"));
        let tls = ServerConfig { tls: Some(files), ..config() };
        match Server::bind(shared().engine.clone(), processor, defaults(), tls) {
            Err(ServeError::Tls { path, reason }) => assert!(path == *named && !reason.is_empty(), "{path:?} {reason}"),
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("{named:?} is no identity"),
        }
    }
}
