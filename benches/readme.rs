//! Puts what the benchmarks have found into the README, and their pictures beside them; run by `benches/readme`.
//!
//! The README holds a pair of comments for each benchmark; what stands between them is written anew.

mod figures;

use std::env;
use std::fs;
use std::path::Path;

use figures::Figures;
use serde_json::Value;

/// One benchmark and its picture.
struct Page {
    name: &'static str,
    title: &'static str,
}

const PAGES: [Page; 5] = [
    Page {
        name: "compare",
        title: "Muster beside nginx with the same files",
    },
    Page {
        name: "lan",
        title: "A closure on one LAN",
    },
    Page {
        name: "wan",
        title: "Builders at a distance",
    },
    Page {
        name: "scale",
        title: "How the cost grows",
    },
    Page {
        name: "sign-all",
        title: "Signing whole stores",
    },
];

#[test]
fn readme() {
    let Ok(json_dir) = env::var("MUSTER_README_JSON") else {
        return;
    };
    let mut text = fs::read_to_string(README).expect("read the README");
    fs::create_dir_all(PLOTS).expect("make the folder of the plots");
    for page in PAGES {
        let file = Path::new(&json_dir).join(format!("{}.json", page.name));
        let Ok(saved) = fs::read_to_string(&file) else {
            println!("{}: not there, left as it is", file.display());
            continue;
        };
        let saved: Value = serde_json::from_str(&saved).expect("JSON");
        let about = saved["about"].as_str().expect("words about it");
        let read = Figures::read(&saved["figures"]).expect("figures as this version writes them");
        let (table, picture) = page.render(&read, about);
        text = between(&text, page.name, &format!("{about}.\n\n{table}"));
        let plot = format!("{PLOTS}/{}.svg", page.name);
        fs::write(&plot, picture).expect("write a plot");
        println!("{} and {plot}", file.display());
    }
    fs::write(README, text).expect("write the README");
}

impl Page {
    fn render(&self, read: &Figures, about: &str) -> (String, String) {
        match self.name {
            "scale" => {
                let curves = figures::SCALE_CURVES;
                let tables = format!("{}\n{}", read.markdown_curves(&curves), read.markdown());
                (tables, read.curves(self.title, about, &curves))
            }
            _ => (read.markdown(), read.picture(self.title, about)),
        }
    }
}

/// Puts a text in place of what stands between two comments.
fn between(text: &str, name: &str, new: &str) -> String {
    let (begin, end) = (
        format!("<!-- figures of benches/{name} -->"),
        format!("<!-- end of benches/{name} -->"),
    );
    let (before, rest) = text.split_once(&begin).expect("the README has the comment");
    let (_, after) = rest.split_once(&end).expect("the README has the comment");
    format!("{before}{begin}\n\n{new}\n{end}{after}")
}

/// The README has a place for each.
#[test]
fn every_benchmark_has_its_place() {
    let text = fs::read_to_string(README).expect("read the README");
    for page in PAGES {
        assert!(between(&text, page.name, "| new |").contains("| new |"));
    }
}

/// What is saved is read again as it was, and shows its goals.
#[test]
fn saved_figures_are_read_again() {
    use figures::{Goal, Unit};
    let mut figures = Figures::default();
    for (muster, nginx) in [(0.5, 1.0), (0.6, 1.0), (0.9, 1.5)] {
        figures.add("a closure", "2.8", "muster", Unit::Seconds, muster);
        figures.add("a closure", "2.8", "nginx", Unit::Seconds, nginx);
    }
    figures.set_goal("a closure", "2.8", "muster", Goal::Times(0.7, "nginx"));
    figures.set_goal("a closure", "2.8", "muster", Goal::Plus(-0.5, "nginx"));
    for (muster, zstd) in [(3.1, 3.1), (3.0, 3.1), (3.0, 3.0)] {
        figures.add("a NAR, ratio", "", "muster", Unit::Ratio, muster);
        figures.add("a NAR, ratio", "", "zstd", Unit::Ratio, zstd);
    }
    figures.set_goal("a NAR, ratio", "", "muster", Goal::AtLeast(0.99, "zstd"));
    figures.set_goal("a NAR, ratio", "", "muster", Goal::AtLeast(1.01, "zstd"));
    let read = Figures::read(&figures.json()).expect("it was just written");
    assert_eq!(read.json(), figures.json());
    let table = read.markdown();
    let rows = [
        "| a closure, Nix 2.8 | nginx 1.000 s | 0.600 s | 0.60 × (0.50 to 0.60) | ≤ 0.7 × | ✓ |",
        "| a closure, Nix 2.8 | nginx 1.000 s | 0.600 s | -0.500 s (-0.600 to -0.400) | ≤ +-0.5 s | ✓ |",
        "| a NAR, ratio | zstd 3.10 | 3.00 | 1.00 × (0.97 to 1.00) | ≥ 0.99 × | ✓ |",
        "| a NAR, ratio | zstd 3.10 | 3.00 | 1.00 × (0.97 to 1.00) | ≥ 1.01 × | ✗ |",
    ];
    for row in rows {
        assert!(table.contains(row), "{table}");
    }
    let picture = read.picture("Title", "below");
    assert!(picture.contains("0.60") && picture.contains("≥ 0.99"));
}

/// Words beside a bar ran into it.
#[test]
fn words_end_before_the_bars_begin() {
    use figures::{Goal, Unit};
    let mut figures = Figures::default();
    let (what, anchor) = (
        ["word"; 15].join(" "),
        "over the line, no catalog, level by level",
    );
    for (via, seconds) in [(&*["way"; 10].join(", "), 0.5), (anchor, 1.0)] {
        figures.add(&what, "2.34", via, Unit::Seconds, seconds);
    }
    let via = ["way"; 10].join(", ");
    figures.set_goal(&what, "2.34", &via, Goal::Times(0.7, anchor));
    let picture = figures.picture("Title", "below");
    let beside = picture.lines().filter(|line| {
        let is_words = line.starts_with("<text x=\"20\"");
        is_words && !line.contains("title") && !line.contains(">below<")
    });
    let words = beside.filter_map(|line| line.split_once('>')?.1.strip_suffix("</text>"));
    let words: Vec<_> = words.collect();
    assert!(words.len() >= 4, "{words:?}");
    assert!(words.iter().all(|line| line.len() <= 61), "{words:?}");
    let all = words.join(" ");
    let expected = format!("{what}, Nix 2.34 {via} 0.500 s, {anchor} 1.000 s");
    assert_eq!(all, expected);
}

const README: &str = "README.md";
const PLOTS: &str = "benches/plots";
