//! A real nginx on a loopback port that serves a folder; ends when dropped.

#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test binary uses its own part"
)]

use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub struct Nginx {
    pub port: u16,
    _folder: tempfile::TempDir,
    child: Child,
}

impl Nginx {
    pub fn new(root: &Path) -> Self {
        Self::start(root, "", "")
    }

    /// With TLS and HTTP/2; certificate and key are files.
    pub fn secure(root: &Path, certificate: &Path, key: &Path) -> Self {
        let lines = format!(
            "ssl_certificate {};\nssl_certificate_key {};\n",
            certificate.display(),
            key.display()
        );
        Self::start(root, "ssl http2", &lines)
    }

    fn start(root: &Path, listen: &str, lines: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let port = super::builder::free_port();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|name| format!("{name}_temp_path {};\n", path(name)))
            .collect();
        let text = format!(
            "daemon off;\nmaster_process off;\npid {pid};\nerror_log {log};\nevents {{}}\n\
             http {{\naccess_log off;\nsendfile on;\n{temporary}\
             server {{\nlisten 127.0.0.1:{port} {listen};\nroot {root};\n{lines}}}\n}}\n",
            pid = path("pid"),
            log = path("log"),
            root = root.display(),
        );
        let file = folder.path().join("nginx.conf");
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new("/usr/sbin/nginx");
        command.arg("-c").arg(&file).arg("-p").arg(folder.path());
        command.stdin(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("nginx is needed");
        super::builder::wait_for("nginx", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self {
            port,
            _folder: folder,
            child,
        }
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}
