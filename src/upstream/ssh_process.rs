//! One running `ssh`: its pipes, the end of what it said, and its end.
//!
//! It never reads from a terminal: it runs in a process group of its own, and whatever would ask
//! (a jump host's ssh does not inherit `BatchMode`) gets a helper that answers nothing. It ends
//! when its [`Process`] is dropped, and when Muster dies: then its input ends.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::Error;
use super::ssh_diagnosis::{Evidence, diagnose, fell_silent, meaningful, remedy};
use super::wire::{Bounds, Output};

/// How long a lost ssh may take to say why.
pub const EXPLAIN_WITHIN: Duration = Duration::from_millis(500);

/// A running ssh; killed when dropped, and reaped in either case.
pub struct Process {
    host: String,
    pinned: bool,
    tail: Arc<Tail>,
    exit: watch::Receiver<Option<ExitStatus>>,
    group: Option<Pid>,
    // Owns the child; aborted when the process is dropped, which kills the child.
    keeper: JoinHandle<()>,
}

/// A process that was just started, with its pipes.
pub struct Started {
    /// Its input.
    pub stdin: ChildStdin,
    /// Its output.
    pub stdout: ChildStdout,
    /// The process.
    pub process: Process,
}

/// An ssh that ended, by itself or because it failed.
pub struct Attempt {
    /// What came of it.
    pub output: Output,
    process: Process,
}

/// The last bytes of an error output, at most [`TAIL_BYTES_MAX`].
#[derive(Default)]
struct Tail(Mutex<VecDeque<u8>>);

impl Process {
    /// Starts ssh with pipes; `host` is for messages, `pinned` says that one host key is accepted.
    pub fn start(
        program: &Path,
        arguments: &[OsString],
        host: String,
        pinned: bool,
    ) -> Result<Started, Error> {
        let failed = |e: &dyn std::fmt::Display| {
            Error::Down(format!("cannot run {}: {e}", program.display()).into())
        };
        let mut child = command(program, arguments)
            .spawn()
            .map_err(|e| failed(&e))?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
            return Err(failed(&"it has no pipes"));
        };
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        let tail = Arc::new(Tail::default());
        let (sender, exit) = watch::channel(None);
        let process = Self {
            host,
            pinned,
            tail: tail.clone(),
            exit,
            group: pid.and_then(Pid::from_raw),
            keeper: tokio::spawn(keep(child, stderr, tail, sender)),
        };
        Ok(Started {
            stdin,
            stdout,
            process,
        })
    }

    /// Puts ssh's own words and the remedy in place of a bare "connection lost".
    ///
    /// A host that fell silent is [`Error::Down`]: nobody is to wait until it is connected to anew. Waits for
    /// ssh to end, at most [`EXPLAIN_WITHIN`].
    pub async fn explain(&self, error: Error) -> Error {
        let status = timeout(EXPLAIN_WITHIN, self.exited()).await.ok().flatten();
        match (error, self.diagnosis(status)) {
            (error, None) => error,
            (Error::Protocol(text), Some(said)) => {
                Error::Protocol(format!("{text}; {said}").into())
            }
            (Error::Down(_), Some(said)) => Error::Down(said.into()),
            (_, Some(said)) if fell_silent(&self.tail.text()) => Error::Down(said.into()),
            (_, Some(said)) => Error::Lost(said.into()),
        }
    }

    /// Returns what ssh has said so far with the remedy; `None`: nothing.
    pub fn words(&self) -> Option<String> {
        let status = *self.exit.borrow();
        self.diagnosis(status)
    }

    fn diagnosis(&self, status: Option<ExitStatus>) -> Option<String> {
        diagnose(&Evidence {
            host: &self.host,
            stderr: &self.tail.text(),
            exit_code: status.and_then(|s| s.code()),
            pinned: self.pinned,
        })
    }

    async fn exited(&self) -> Option<ExitStatus> {
        let mut exit = self.exit.clone();
        let status = exit.wait_for(Option::is_some).await.ok()?;
        *status
    }
}

impl Attempt {
    /// Tells whether ssh failed itself, not the remote command.
    pub fn ssh_failed(&self) -> bool {
        let code = self.output.status.code();
        code.is_none_or(|code| code == SSH_FAILED)
    }

    /// Returns the last lines of its error output that say something, in one.
    pub fn said(&self) -> String {
        meaningful(&self.output.stderr)
    }

    /// Returns what the operator can do; `None`: the cause is not known.
    pub fn remedy(&self) -> Option<String> {
        remedy(&Evidence {
            host: &self.process.host,
            stderr: &self.output.stderr,
            exit_code: self.output.status.code(),
            pinned: self.process.pinned,
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The group holds ssh's own helpers (ProxyCommand) too. A child that was reaped is gone
        // from it, and its number may be another's.
        if self.exit.borrow().is_none()
            && let Some(group) = self.group
        {
            let _ = kill_process_group(group, Signal::TERM);
        }
        self.keeper.abort();
    }
}

impl Started {
    /// Runs the command to its end with nothing on its input.
    ///
    /// Dropped, it ends the process.
    pub async fn output(self, bounds: Bounds) -> Result<Output, Error> {
        let Attempt { output, process } = self.attempt(bounds).await?;
        if output.status.code().is_none_or(|code| code == SSH_FAILED) {
            return Err(process.explain(Error::Lost("ssh failed".into())).await);
        }
        Ok(output)
    }

    /// Runs it likewise, and gives what came of it even if ssh itself failed.
    pub async fn attempt(self, bounds: Bounds) -> Result<Attempt, Error> {
        let Self {
            stdin,
            mut stdout,
            process,
        } = self;
        drop(stdin);
        let whole = async {
            let stdout = read_bounded(&mut stdout, bounds.output_bytes_max).await?;
            let status = process.exited().await;
            Ok::<_, Error>((stdout, status))
        };
        let (stdout, status) =
            timeout(bounds.time, whole)
                .await
                .map_err(|_| Error::TimedOut {
                    question: "a command over ssh",
                    after: bounds.time,
                })??;
        let status = status.ok_or_else(|| Error::Lost("ssh was not waited for".into()))?;
        let output = Output {
            status,
            stdout: stdout.into(),
            stderr: process.tail.text(),
        };
        Ok(Attempt { output, process })
    }
}

impl Tail {
    fn push(&self, bytes: &[u8]) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(bytes);
        let surplus = tail.len().saturating_sub(TAIL_BYTES_MAX);
        tail.drain(..surplus);
    }

    fn text(&self) -> String {
        let tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = tail.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn command(program: &Path, arguments: &[OsString]) -> Command {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        // Ctrl-C at Muster's terminal is for Muster, which ends its transfers in order.
        .process_group(0)
        // With `force`, ssh 8.4 and later never open the terminal; `false` answers nothing.
        .env("SSH_ASKPASS_REQUIRE", "force")
        .env("SSH_ASKPASS", "false");
    // Distributions send the locale along (SendEnv); builders may not have it and would warn.
    for name in LOCALE {
        command.env_remove(name);
    }
    command
}

/// Collects the error output until the child ends, then tells how it ended.
async fn keep(
    mut child: Child,
    mut stderr: ChildStderr,
    tail: Arc<Tail>,
    exit: watch::Sender<Option<ExitStatus>>,
) {
    let status = tokio::select! {
        status = child.wait() => status,
        () = drain(&mut stderr, &tail) => child.wait().await,
    };
    // What it said last may still be in the pipe, which a helper of ssh's may hold open.
    tokio::select! {
        () = drain(&mut stderr, &tail) => {}
        () = sleep(LAST_WORDS) => {}
    }
    exit.send_replace(status.ok());
}

async fn drain(stderr: &mut ChildStderr, tail: &Tail) {
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
        tail.push(buffer.get(..count).unwrap_or_default());
    }
}

async fn read_bounded(
    reader: &mut (impl AsyncRead + Unpin),
    bytes_max: usize,
) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX);
    let lost = |e: std::io::Error| Error::Lost(e.to_string().into());
    let mut reader = reader.take(limit.saturating_add(1));
    let count = reader.read_to_end(&mut bytes).await.map_err(lost)?;
    if count > bytes_max {
        let text = format!("its output is longer than {bytes_max} bytes");
        return Err(Error::Unsupported(text.into()));
    }
    Ok(bytes)
}

/// The exit code by which ssh says that it failed itself, and not the remote command.
const SSH_FAILED: i32 = 255;
/// Enough for all that `ssh -v` says of a login.
const TAIL_BYTES_MAX: usize = 16 * 1024;
const LOCALE: &[&str] = &[
    "LANG",
    "LANGUAGE",
    "LC_ADDRESS",
    "LC_ALL",
    "LC_COLLATE",
    "LC_CTYPE",
    "LC_IDENTIFICATION",
    "LC_MEASUREMENT",
    "LC_MESSAGES",
    "LC_MONETARY",
    "LC_NAME",
    "LC_NUMERIC",
    "LC_PAPER",
    "LC_TELEPHONE",
    "LC_TIME",
];
const LAST_WORDS: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Started {
        let arguments = ["-c".into(), script.into()];
        Process::start(Path::new("/bin/sh"), &arguments, "b".into(), false).unwrap()
    }

    const BOUNDS: Bounds = Bounds {
        output_bytes_max: 1000,
        time: Duration::from_secs(5),
    };

    #[tokio::test]
    async fn output_status_and_the_end_of_stderr() {
        let script = "echo out; yes noise | head -c 20000 >&2; echo last >&2; exit 3";
        let output = shell(script).output(BOUNDS).await.unwrap();
        assert_eq!(&output.stdout[..], b"out\n");
        assert_eq!(output.status.code(), Some(3));
        assert_eq!(output.stderr.len(), TAIL_BYTES_MAX);
        assert!(output.stderr.ends_with("last\n"));
    }

    #[tokio::test]
    async fn too_much_output_and_too_long_a_time() {
        let error = shell("yes").output(BOUNDS).await.unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
        let time = Duration::from_millis(50);
        let bounds = Bounds { time, ..BOUNDS };
        let error = shell("sleep 60").output(bounds).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    }

    #[tokio::test]
    async fn dropped_it_ends_with_its_helpers() {
        let Started {
            mut stdout,
            process,
            ..
        } = shell("sleep 60 & echo $!; wait");
        let mut line = [0; 16];
        let count = stdout.read(&mut line).await.unwrap();
        let helper = String::from_utf8_lossy(&line[..count]).trim().to_owned();
        let child = process.group.unwrap().as_raw_nonzero().to_string();
        drop(process);
        for pid in [helper, child] {
            let stat = format!("/proc/{pid}/stat");
            // A helper becomes its reaper's, which in a container may never collect it.
            let ended = || std::fs::read_to_string(&stat).map_or(true, |s| s.contains(") Z"));
            for _ in 0..100 {
                if ended() {
                    break;
                }
                sleep(Duration::from_millis(20)).await;
            }
            assert!(ended(), "{pid} lives on");
        }
    }

    #[tokio::test]
    async fn a_loss_is_explained_by_its_own_words() {
        let started =
            shell("echo 'ssh: connect to host b port 22: Connection refused' >&2; exit 255");
        let error = started.process.explain(Error::Lost("eof".into())).await;
        assert!(error.to_string().contains("Connection refused"), "{error}");
        assert!(matches!(error, Error::Lost(_)), "{error:?}");
    }

    #[tokio::test]
    async fn a_host_that_fell_silent_is_down() {
        let started = shell("echo 'Timeout, server b not responding.' >&2; exit 255");
        let error = started.process.explain(Error::Lost("eof".into())).await;
        assert!(matches!(error, Error::Down(_)), "{error:?}");
    }
}
