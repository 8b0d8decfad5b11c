//! The formats and words of Nix: pure values and texts, without I/O, async or a clock.
