//! The suite and `docs/contract.md` have the same clauses.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use cvm_conformance::clauses;
use cvm_core::Error;
use cvm_core::launch::{Launch, Rehearsal, VmConfig};
use cvm_core::platform::{Offer, Platform, Powers, TrustModel};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A platform that starts nothing: only the list of clauses is wanted.
struct Nowhere;

impl Platform for Nowhere {
    type Loader = Rehearsal;

    fn probe() -> Vec<Offer> {
        Vec::new()
    }

    fn trust_model(&self) -> TrustModel {
        TrustModel::new(|_, _| Powers::all())
    }

    fn launch(&self, _: VmConfig) -> Result<Launch<Rehearsal>, Error> {
        Err(Error::Config("nothing starts nowhere".into()))
    }
}

/// "4.1" and "A name" of each clause in the suite, as a sentence begins.
fn in_suite() -> Vec<(String, String)> {
    let capital = |name: &str| {
        let first = name.chars().next().map(|first| first.to_ascii_uppercase());
        first.into_iter().chain(name.chars().skip(1)).collect()
    };
    clauses::<Nowhere>().iter().map(|clause| (clause.number.to_owned(), capital(clause.name))).collect()
}

/// Those of each bold beginning of a line in the prose: `**4.1 A name.** Words.`
fn in_prose() -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/contract.md");
    let text = fs::read_to_string(path).unwrap();
    // A name may go on in the next line.
    let text = text.replace("\n\n", "\0").replace('\n', " ");
    let bold = text.split('\0').filter_map(|paragraph| Some(paragraph.strip_prefix("**")?.split_once(".**")?.0));
    bold.map(|bold| {
        let (number, name) = bold.split_once(' ').expect("a number and a name");
        (number.to_owned(), name.to_owned())
    })
    .collect()
}

#[test]
fn every_clause_is_explained_and_everything_that_is_explained_is_tried() {
    let (suite, prose) = (in_suite(), in_prose());
    let odd = |one: &[(String, String)], other: &[(String, String)]| -> Vec<_> {
        one.iter().filter(|clause| !other.contains(clause)).cloned().collect()
    };
    assert_eq!(odd(&suite, &prose), [], "they are in the suite alone");
    assert_eq!(odd(&prose, &suite), [], "they are in docs/contract.md alone");
    assert_eq!(suite, prose, "they are in another order");
}

#[test]
fn numbers_rise_and_neither_they_nor_names_come_twice() {
    let suite = in_suite();
    let number = |text: &str| -> Vec<u32> { text.split('.').map(|part| part.parse().unwrap()).collect() };
    assert!(suite.windows(2).all(|pair| number(&pair[0].0) < number(&pair[1].0)), "{suite:?}");
    let names: BTreeSet<_> = suite.iter().map(|(_, name)| name).collect();
    assert_eq!(names.len(), suite.len());
}
