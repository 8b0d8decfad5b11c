//! The same checks from within the service: its user, credentials and sandbox.
//!
//! The unit's text (`systemctl cat`, drop-ins included) gives the settings, `systemd-run` starts this
//! program under them. What would disturb the running service is left out or named differently: its
//! runtime directory, which systemd removes at the end, and all that says when and how it is started.
//! Source: systemd.exec(5), systemd-run(1).

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, bail};
use clap::Parser as _;

use crate::cli::settings::Settings;
use crate::cli::{Cli, Command as Subcommand};

/// What a unit says of how it runs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Unit {
    /// `Name=value`, in their order.
    properties: Vec<String>,
    /// The command that it starts, split into words.
    start: Vec<String>,
}

/// The names of the unit and of the one that checks in its stead, without `.service`.
struct Names {
    unit: String,
    check: String,
}

/// Runs the check again as the service; its output and exit status are this one's.
pub(super) fn run(unit: &str, more: &[String]) -> anyhow::Result<ExitCode> {
    let text = text(unit)?;
    let names = Names {
        unit: unit.strip_suffix(".service").unwrap_or(unit).to_owned(),
        check: format!("muster-check-{}", std::process::id()),
    };
    let read = Unit::read(&text, &names);
    let settings = read.settings().with_context(|| {
        format!("{unit} does not start `muster serve`; name the right unit: --as-service=UNIT")
    })?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new("systemd-run");
    command.args([
        "--pipe",
        "--wait",
        "--collect",
        "--quiet",
        "--service-type=exec",
        &format!("--unit={}", names.check),
    ]);
    for property in &read.properties {
        command.arg(format!("--property={property}"));
    }
    command
        .arg(program)
        .arg("check")
        .args(settings.words())
        .args(more);
    let status = command
        .stdin(Stdio::null())
        .status()
        .context("cannot run systemd-run: --as-service needs a running systemd")?;
    match status.code() {
        Some(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
        None => bail!("systemd-run was killed"),
    }
}

fn text(unit: &str) -> anyhow::Result<String> {
    let output = Command::new("systemctl")
        .args(["cat", "--no-pager", "--", unit])
        .output()
        .context("cannot run systemctl: --as-service needs a running systemd")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().map(str::trim).collect::<Vec<_>>().join("; ");
        if said.contains("No files found") {
            bail!("systemd knows no unit {unit}; name the right one: --as-service=UNIT");
        }
        bail!("cannot ask systemd for {unit}, and --as-service needs a running systemd: {said}");
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Unit {
    fn read(text: &str, names: &Names) -> Self {
        let mut unit = Self::default();
        let mut in_service = false;
        let mut dynamic = false;
        let mut user = false;
        for line in lines(text) {
            if line.starts_with('[') {
                in_service = line == "[Service]";
                continue;
            }
            let Some((key, value)) = line.split_once('=').filter(|_| in_service) else {
                continue;
            };
            let (key, value) = (key.trim(), value.trim());
            match key {
                "ExecStart" if value.is_empty() => unit.start.clear(),
                "ExecStart" => unit.start = shlex::split(value).unwrap_or_default(),
                "RuntimeDirectory" => {
                    let property = format!("RuntimeDirectory={}", names.check);
                    unit.properties.push(property);
                }
                _ if !is_of_the_process(key) => {}
                _ => {
                    dynamic |= key == "DynamicUser" && is_yes(value);
                    user |= key == "User" && !value.is_empty();
                    let value = names.expand(value);
                    unit.properties.push(format!("{key}={value}"));
                }
            }
        }
        if dynamic && !user {
            // A dynamic user is named after its unit: the state directory must stay its own.
            unit.properties.push(format!("User={}", names.unit));
        }
        unit
    }

    /// Reads the flags of the `muster serve` that it starts.
    fn settings(&self) -> anyhow::Result<Settings> {
        let program = self.start.first().context("it has no ExecStart=")?;
        // systemd's prefixes, see "Command lines" in systemd.service(5).
        let program = program.trim_start_matches(['@', '-', ':', '+', '!']);
        let rest = self.start.iter().skip(1).map(String::as_str);
        let words = std::iter::once(program).chain(rest);
        match Cli::try_parse_from(words)?.command {
            Subcommand::Serve(args) => Ok(Settings::of_serve(&args)),
            _ => bail!("it starts another command"),
        }
    }
}

impl Names {
    /// Puts values in the place of specifiers, which `systemd-run` does not.
    fn expand(&self, value: &str) -> String {
        let mut expanded = String::new();
        let mut chars = value.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                expanded.push(c);
                continue;
            }
            match chars.next() {
                Some('d') => expanded.push_str(&format!("/run/credentials/{}.service", self.check)),
                Some('n') => expanded.push_str(&format!("{}.service", self.unit)),
                Some('N' | 'p') => expanded.push_str(&self.unit),
                Some('t') => expanded.push_str("/run"),
                Some('S') => expanded.push_str("/var/lib"),
                Some('C') => expanded.push_str("/var/cache"),
                Some('L') => expanded.push_str("/var/log"),
                Some('T') => expanded.push_str("/tmp"),
                Some('V') => expanded.push_str("/var/tmp"),
                Some('%') => expanded.push('%'),
                other => expanded.extend(std::iter::once('%').chain(other)),
            }
        }
        expanded
    }
}

/// The unit's lines without comments, continued ones joined.
fn lines(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut begun = String::new();
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with(['#', ';']) {
            continue;
        }
        match line.strip_suffix('\\') {
            Some(part) => {
                begun.push_str(part);
                begun.push(' ');
            }
            None => {
                begun.push_str(line);
                lines.push(std::mem::take(&mut begun));
            }
        }
    }
    lines.retain(|line| !line.is_empty());
    lines
}

/// Tells whether a setting is of the process's surroundings, not of when it is started and stopped.
fn is_of_the_process(key: &str) -> bool {
    const PREFIXES: [&str; 11] = [
        "Exec",
        "Restart",
        "Timeout",
        "Watchdog",
        "Standard",
        "Syslog",
        "Log",
        "FileDescriptorStore",
        "StartLimit",
        "Kill",
        "OOM",
    ];
    const NAMES: [&str; 10] = [
        "Type",
        "NotifyAccess",
        "Sockets",
        "PIDFile",
        "BusName",
        "RemainAfterExit",
        "GuessMainPID",
        "SuccessExitStatus",
        "RuntimeMaxSec",
        "RuntimeDirectoryPreserve",
    ];
    !NAMES.contains(&key)
        && !key.starts_with("X-")
        && !PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

fn is_yes(value: &str) -> bool {
    matches!(
        value.to_ascii_lowercase().as_str(),
        "yes" | "true" | "1" | "on"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names {
            unit: "muster".to_owned(),
            check: "c".to_owned(),
        }
    }

    #[test]
    fn a_unit_gives_its_surroundings_and_its_flags() {
        let text = "# /etc/systemd/system/muster.service\n[Unit]\nDescription=x\n[Service]\nType=notify\n\
                    ExecStart=/usr/bin/muster serve --config /etc/m.json \\\n  --no-machines --priority 20\n\
                    DynamicUser=yes\nLoadCredential=key:/root/key\nSystemCallFilter=@system-service\n\
                    SystemCallFilter=~@privileged\nRuntimeDirectory=muster\nRestart=on-failure\n\
                    # /etc/systemd/system/muster.service.d/more.conf\n[Service]\nEnvironment=\"A=%d/b c%%\"\n\
                    [Install]\nAlias=y\n";
        let unit = Unit::read(text, &names());
        assert_eq!(
            unit.properties,
            [
                "DynamicUser=yes",
                "LoadCredential=key:/root/key",
                "SystemCallFilter=@system-service",
                "SystemCallFilter=~@privileged",
                "RuntimeDirectory=c",
                "Environment=\"A=/run/credentials/c.service/b c%\"",
                "User=muster",
            ]
        );
        let words = unit.settings().unwrap().words();
        assert_eq!(words, ["--config", "/etc/m.json", "--no-machines"]);
    }

    #[test]
    fn a_unit_that_starts_something_else_is_refused() {
        for start in [
            "",
            "ExecStart=/bin/sleep 1",
            "ExecStart=/usr/bin/muster key public",
        ] {
            let unit = Unit::read(&format!("[Service]\n{start}\n"), &names());
            assert!(unit.settings().is_err(), "{start}");
        }
    }
}
