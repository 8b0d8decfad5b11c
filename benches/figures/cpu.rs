//! CPU time of a process and its children, from the accounting of a control group of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A control group; removed when dropped, once its processes are gone.
pub struct CpuGroup {
    dir: PathBuf,
}

impl CpuGroup {
    /// Makes an empty group; needs root, and cgroup v1 with cpuacct, or v2.
    pub fn new(name: &str) -> Self {
        let v1 = Path::new("/sys/fs/cgroup/cpuacct");
        let root = if v1.is_dir() {
            v1
        } else {
            Path::new("/sys/fs/cgroup")
        };
        let dir = root.join(format!("muster-bench-{}-{name}", std::process::id()));
        fs::create_dir(&dir)
            .unwrap_or_else(|e| panic!("cannot make the control group {}: {e}", dir.display()));
        Self { dir }
    }

    /// Takes a process in, with what it starts from now on; one that has ended has no further costs.
    pub fn take(&self, pid: u32) {
        match fs::write(self.dir.join("cgroup.procs"), pid.to_string()) {
            Err(error) if error.raw_os_error() == Some(ESRCH) => {}
            moved => moved.expect("move a process"),
        }
    }

    /// CPU time used by all of the group up to now.
    pub fn used(&self) -> Duration {
        if let Ok(text) = fs::read_to_string(self.dir.join("cpuacct.usage")) {
            return Duration::from_nanos(text.trim().parse().expect("nanoseconds"));
        }
        let text = fs::read_to_string(self.dir.join("cpu.stat")).expect("read cpu.stat");
        let micros = text.lines().find_map(|l| l.strip_prefix("usage_usec "));
        Duration::from_micros(micros.and_then(|n| n.parse().ok()).expect("microseconds"))
    }
}

impl Drop for CpuGroup {
    fn drop(&mut self) {
        let pids = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines() {
            // One that ended meanwhile needs no other group.
            let _ = fs::write(self.dir.join("../cgroup.procs"), pid);
        }
        // Its processes may take a moment to be reaped.
        for _ in 0..100 {
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// No such process.
const ESRCH: i32 = 3;
