//! Sizes and times as people read them.

use std::time::Duration;

/// Writes a size: `0 B`, `734 B`, `1.2 KiB`, `35 MiB`.
pub(super) fn size(bytes: u64) -> String {
    let mut unit = "B";
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut number = bytes as f64;
    for larger in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if number < 1000.0 {
            break;
        }
        number /= 1024.0;
        unit = larger;
    }
    let digits = usize::from(unit != "B" && number < 9.95);
    format!("{number:.digits$} {unit}")
}

/// Writes a time of some length: `0.4 s`, `12 s`, `5 min`, `2 h 5 min`, `3 d 4 h`.
pub(super) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let pair = |large: u64, what: &str, small: u64, less: &str| match small {
        0 => format!("{large} {what}"),
        small => format!("{large} {what} {small} {less}"),
    };
    match seconds {
        0 if duration < Duration::from_millis(50) => "0 s".to_owned(),
        0 => format!("{:.1} s", duration.as_secs_f64()),
        1..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => pair(seconds / 3600, "h", seconds / 60 % 60, "min"),
        _ => pair(seconds / 86_400, "d", seconds / 3600 % 24, "h"),
    }
}

/// Writes a short time: `0.21 ms`, `4.3 ms`, `120 ms`, `2.5 s`.
pub(super) fn latency(ms: f64) -> String {
    match ms {
        ..0.995 => format!("{ms:.2} ms"),
        ..9.95 => format!("{ms:.1} ms"),
        ..1000.0 => format!("{ms:.0} ms"),
        _ => format!("{:.1} s", ms / 1000.0),
    }
}

/// Writes how much of a whole that is: `80 %`; `-` of nothing. Only all is `100 %`.
pub(super) fn share(part: u64, whole: u64) -> String {
    match part.saturating_mul(100).checked_div(whole) {
        Some(percent) => format!("{percent} %"),
        None => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_two_or_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 KiB"),
            (10_200, "10 KiB"),
            (1_050_000, "1.0 MiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn times_have_two_units_at_most() {
        for (ms, text) in [
            (0, "0 s"),
            (420, "0.4 s"),
            (12_900, "12 s"),
            (300_000, "5 min"),
            (7_500_000, "2 h 5 min"),
            (3_600_000, "1 h"),
            (273_600_000, "3 d 4 h"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
        assert_eq!(latency(0.214), "0.21 ms");
        assert_eq!(latency(4.26), "4.3 ms");
        assert_eq!(latency(2500.0), "2.5 s");
        assert_eq!(share(999, 1000), "99 %");
        assert_eq!(share(0, 0), "-");
    }
}
