//! One machine's entry, column by column.

use std::collections::BTreeSet;

use super::error::{Cause, Column, MachinesError, MachinesWarning, Place, Quirk};
use super::{BLANKS, Machine, Systems, chars_before};
use crate::nix::host_key::HostKey;
use crate::nix::store_uri::authority::{Authority, Host};
use crate::nix::store_uri::{StoreKind, StoreUri};

/// Reads an entry without blanks around it; what follows column 8 is ignored.
pub(super) fn parse(
    entry: &str,
    place: &Place,
    warnings: &mut Vec<MachinesWarning>,
) -> Result<Machine, MachinesError> {
    let columns = Columns::new(entry, place);
    let mut quirks = Vec::new();
    let uri = uri(&columns, &mut quirks)?;
    let machine = Machine {
        place: place.clone(),
        raw: entry.to_owned(),
        uri,
        systems: match columns.value(Column::Systems) {
            Some(list) => Systems::Listed(set(list)),
            None => Systems::Local,
        },
        max_jobs: max_jobs(&columns)?,
        speed: speed(&columns, &mut quirks)?,
        supported: columns
            .value(Column::Supported)
            .map(set)
            .unwrap_or_default(),
        mandatory: columns
            .value(Column::Mandatory)
            .map(set)
            .unwrap_or_default(),
    };
    warnings.extend(quirks.into_iter().map(|(column, quirk)| MachinesWarning {
        place: columns.place(column),
        quirk,
    }));
    Ok(machine)
}

type Quirks = Vec<(Column, Quirk)>;

/// The words of an entry, with where each begins.
struct Columns<'e> {
    entry: &'e str,
    words: Vec<(usize, &'e str)>,
    place: &'e Place,
}

impl<'e> Columns<'e> {
    fn new(entry: &'e str, place: &'e Place) -> Self {
        let mut words = Vec::new();
        let mut at = 0;
        for word in entry.split(BLANKS) {
            if !word.is_empty() && words.len() < Column::HostKey as usize {
                words.push((at, word));
            }
            at += word.len() + 1;
        }
        Self {
            entry,
            words,
            place,
        }
    }

    /// Returns the value of a column; `None` for `-` and where the line is shorter.
    fn value(&self, column: Column) -> Option<&'e str> {
        let (_, word) = self.words.get(column as usize - 1)?;
        Some(*word).filter(|word| *word != "-")
    }

    fn place(&self, column: Column) -> Place {
        let before = match self.words.get(column as usize - 1) {
            Some((at, _)) => chars_before(self.entry, *at),
            None => 0,
        };
        Place::new(&self.place.origin, self.place.line, self.place.at + before)
    }

    fn error(&self, column: Column, cause: impl Into<Cause>) -> MachinesError {
        MachinesError::Column {
            place: self.place(column),
            column,
            cause: cause.into(),
        }
    }
}

fn uri(columns: &Columns<'_>, quirks: &mut Quirks) -> Result<StoreUri, MachinesError> {
    let refused = |cause| columns.error(Column::Uri, cause);
    let text = columns
        .value(Column::Uri)
        .ok_or_else(|| refused(Cause::NoUri))?;
    let plain = StoreUri::parse(text).map_err(|error| refused(error.into()))?;
    if let StoreKind::Unsupported(scheme) = plain.kind() {
        return Err(refused(Cause::Scheme(scheme.clone())));
    }
    let mut over = Vec::new();
    if let Some(path) = columns.value(Column::SshKey) {
        over.push(("ssh-key", path));
        if !path.starts_with('/') {
            quirks.push((Column::SshKey, Quirk::RelativeSshKey(path.to_owned())));
        }
    }
    if let Some(base64) = columns.value(Column::HostKey) {
        let key = HostKey::parse_base64(base64).map_err(|e| columns.error(Column::HostKey, e))?;
        over.push(("base64-ssh-public-host-key", base64));
        if key.kind().is_none() {
            quirks.push((Column::HostKey, Quirk::HostKeyForm));
        }
    }
    let (StoreKind::Ssh(authority) | StoreKind::SshNg(authority)) = plain.kind() else {
        return Ok(plain);
    };
    quirks.extend(of_authority(authority, text).map(|quirk| (Column::Uri, quirk)));
    StoreUri::parse_with(text, &over).map_err(|error| refused(error.into()))
}

fn of_authority(authority: &Authority, text: &str) -> Option<Quirk> {
    match (authority.port(), authority.host()) {
        (Some(port), _) => Some(Quirk::Port(port)),
        (None, Host::V6(..)) if !text.contains('[') => Some(Quirk::BareIpv6),
        _ => None,
    }
}

fn max_jobs(columns: &Columns<'_>) -> Result<u32, MachinesError> {
    let Some(text) = columns.value(Column::MaxJobs) else {
        return Ok(1);
    };
    let malformed = |_| columns.error(Column::MaxJobs, Cause::MaxJobs(text.to_owned()));
    text.parse().map_err(malformed)
}

fn speed(columns: &Columns<'_>, quirks: &mut Quirks) -> Result<f32, MachinesError> {
    let Some(text) = columns.value(Column::Speed) else {
        return Ok(1.0);
    };
    let speed = text.parse::<f32>().ok();
    let Some(speed) = speed.filter(|speed| speed.is_finite() && *speed >= 0.0) else {
        return Err(columns.error(Column::Speed, Cause::Speed(text.to_owned())));
    };
    if text.parse::<u32>().is_err() {
        quirks.push((Column::Speed, Quirk::FractionalSpeed(text.to_owned())));
    }
    Ok(if speed == 0.0 { 1.0 } else { speed })
}

fn set(list: &str) -> BTreeSet<String> {
    let parts = list.split(',').filter(|part| !part.is_empty());
    parts.map(str::to_owned).collect()
}
