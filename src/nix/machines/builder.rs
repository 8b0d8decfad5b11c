//! Machines that share a store, taken for one.

use std::collections::BTreeSet;

use super::{Machine, Place, Systems};
use crate::nix::store_uri::StoreUri;

/// A store that is asked once, however many lines name it.
#[derive(Clone, Debug, PartialEq)]
pub struct Builder {
    /// How it is reached, by its first line.
    pub uri: StoreUri,
    /// The systems of all of its lines.
    pub systems: BTreeSet<String>,
    /// Whether one of its lines leaves the system to the reader's own.
    pub local_system: bool,
    /// Its lines.
    pub places: Vec<Place>,
}

/// Returns the stores in the order of first appearance.
pub(super) fn merge(machines: &[Machine]) -> Vec<Builder> {
    let mut builders: Vec<Builder> = Vec::new();
    for machine in machines {
        let id = machine.uri.id();
        let known = builders.iter_mut().find(|b| b.uri.id() == id);
        match known {
            Some(builder) => builder.add(machine),
            None => {
                let mut builder = Builder {
                    uri: machine.uri.clone(),
                    systems: BTreeSet::new(),
                    local_system: false,
                    places: Vec::new(),
                };
                builder.add(machine);
                builders.push(builder);
            }
        }
    }
    builders
}

impl Builder {
    fn add(&mut self, machine: &Machine) {
        match &machine.systems {
            Systems::Local => self.local_system = true,
            Systems::Listed(systems) => self.systems.extend(systems.iter().cloned()),
        }
        self.places.push(machine.place.clone());
    }
}
