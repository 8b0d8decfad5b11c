//! Derivations as `.drv` files hold them, as far as a closure of them needs: what they make and need.
//!
//! ```text
//! Derive([("out","/nix/store/…","","")],[("/nix/store/….drv",["out"])],["/nix/store/…"],"system","builder",[args],[("NAME","value")])
//!         outputs                        input derivations             input sources
//! ```
//!
//! A path is empty where it is known after building only (content-addressed outputs). What follows the
//! input sources is not read. Source: `parseDerivation` in `libstore/derivations.cc`.

use super::store_path::{StoreDir, StorePath};

/// What a derivation makes, and what it is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Derivation {
    /// Its outputs by name, with their paths where those are known.
    pub outputs: Vec<(String, Option<StorePath>)>,
    /// Derivations it needs, each with the outputs that it needs of it.
    pub input_derivations: Vec<(StorePath, Vec<String>)>,
    /// Paths it needs as they are.
    pub input_sources: Vec<StorePath>,
}

/// A text that is no derivation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {at} of the derivation: {expected} is expected")]
pub struct DerivationError {
    at: usize,
    expected: &'static str,
}

impl Derivation {
    /// Reads the text of a `.drv` file of a store in this directory.
    pub fn parse(text: &str, store_dir: &StoreDir) -> Result<Self, DerivationError> {
        let mut reader = Reader {
            text,
            at: 0,
            store_dir,
        };
        reader.word("Derive(")?;
        let outputs = reader.list(|reader| {
            reader.word("(")?;
            let name = reader.string()?;
            reader.word(",")?;
            let path = match reader.string()?.as_str() {
                "" => None,
                path => Some(reader.parse(path)?),
            };
            for _ in 0..2 {
                reader.word(",")?;
                reader.string()?;
            }
            reader.word(")")?;
            Ok((name, path))
        })?;
        reader.word(",")?;
        let input_derivations = reader.list(|reader| {
            reader.word("(")?;
            let path = reader.path()?;
            reader.word(",")?;
            let names = reader.list(Reader::string)?;
            reader.word(")")?;
            Ok((path, names))
        })?;
        reader.word(",")?;
        let input_sources = reader.list(Reader::path)?;
        Ok(Self {
            outputs,
            input_derivations,
            input_sources,
        })
    }
}

struct Reader<'t> {
    text: &'t str,
    at: usize,
    store_dir: &'t StoreDir,
}

impl Reader<'_> {
    fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn word(&mut self, word: &'static str) -> Result<(), DerivationError> {
        if !self.rest().starts_with(word) {
            return Err(self.expected(word));
        }
        self.at += word.len();
        Ok(())
    }

    fn list<T>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<T, DerivationError>,
    ) -> Result<Vec<T>, DerivationError> {
        self.word("[")?;
        let mut items = Vec::new();
        while !self.rest().starts_with(']') {
            if !items.is_empty() {
                self.word(",")?;
            }
            items.push(item(self)?);
        }
        self.word("]")?;
        Ok(items)
    }

    fn string(&mut self) -> Result<String, DerivationError> {
        self.word("\"")?;
        let mut string = String::new();
        let mut chars = self.rest().char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.at += at + 1;
                    return Ok(string);
                }
                '\\' => match chars.next() {
                    Some((_, 'n')) => string.push('\n'),
                    Some((_, 'r')) => string.push('\r'),
                    Some((_, 't')) => string.push('\t'),
                    Some((_, c)) => string.push(c),
                    None => break,
                },
                c => string.push(c),
            }
        }
        Err(self.expected("the end of a string"))
    }

    fn path(&mut self) -> Result<StorePath, DerivationError> {
        let path = self.string()?;
        self.parse(&path)
    }

    fn parse(&self, path: &str) -> Result<StorePath, DerivationError> {
        let parsed = self.store_dir.parse(path);
        parsed.map_err(|_| self.expected("a store path before it"))
    }

    fn expected(&self, expected: &'static str) -> DerivationError {
        let at = self.at;
        DerivationError { at, expected }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "1q8w6gl1ll0mwfkqc3c2yx005s6wwfrl-a";
    const B: &str = "0mdqa9w1p6cmli6976v4wi0sw9r4p5pr-b.drv";

    fn parse(text: &str) -> Result<Derivation, DerivationError> {
        Derivation::parse(text, &StoreDir::default())
    }

    #[test]
    fn outputs_inputs_and_sources() {
        let text = format!(
            "Derive([(\"lib\",\"\",\"r:sha256\",\"\"),(\"out\",\"/nix/store/{A}\",\"\",\"\")],\
             [(\"/nix/store/{B}\",[\"dev\",\"out\"])],[\"/nix/store/{A}\"],\"x86_64-linux\",\"/bin/sh\",[\"-c\"],\
             [(\"text\",\"a\\\"]\\n\")])"
        );
        let found = parse(&text).unwrap();
        let a: StorePath = A.parse().unwrap();
        assert_eq!(
            found.outputs,
            [
                ("lib".to_owned(), None),
                ("out".to_owned(), Some(a.clone()))
            ]
        );
        let needed = vec!["dev".to_owned(), "out".to_owned()];
        assert_eq!(found.input_derivations, [(B.parse().unwrap(), needed)]);
        assert_eq!(found.input_sources, [a]);
    }

    #[test]
    fn whatever_is_cut_off_is_refused() {
        let text =
            format!("Derive([(\"out\",\"/nix/store/{A}\",\"\",\"\")],[],[\"/nix/store/{A}\"],");
        assert!(parse(&text).is_ok());
        let end = text.len() - 1;
        for length in 0..end {
            let cut = text.get(..length).unwrap();
            assert!(parse(cut).is_err(), "{cut}");
        }
        for text in [
            "",
            "DrvWithVersion(\"x\",[",
            "Derive([],[],[\"/etc/passwd\"])",
            "Derive([,],[],[])",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
