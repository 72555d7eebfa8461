//! Chapter 1: what a host offers.

mod trust;

use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::quality;
use cvm_core::{BoxError, Offer, Platform, Protection};
use std::error::Error;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    let mut clauses = vec![
        Clause::new("1.1", "what a host lacks is named together with a remedy", remedies),
        Clause::new("1.2", "what is offered runs guests and what is not is refused as the probe says", offered),
    ];
    clauses.extend(trust::clauses());
    clauses
}

/// A line for users: not empty, without an end.
#[track_caller]
fn assert_line(text: &str) {
    assert!(!text.trim().is_empty() && !text.contains('\n') && !text.ends_with('.'), "the probe says: {text:?}");
}

fn offers<P: Platform>() -> Vec<Offer> {
    P::probe()
}

/// What `offers` say that `protection` lacks; nothing if they do not know it.
fn lacks(offers: &[Offer], protection: Protection) -> Option<&Offer> {
    offers.iter().find(|offer| offer.protection == protection)
}

fn remedies<P: Platform>(_: &Bench<'_, P>) -> Verdict {
    let offers = offers::<P>();
    assert!(!offers.is_empty(), "the platform knows of no protection");
    for (index, offer) in offers.iter().enumerate() {
        let twice = offers[..index].iter().any(|earlier| earlier.protection == offer.protection);
        assert!(!twice, "{} is answered for twice", offer.protection);
        for missing in &offer.missing {
            assert_line(&missing.what);
            assert_line(&missing.remedy);
            assert_ne!(missing.what, missing.remedy);
        }
        offer.notes.iter().for_each(|note| assert_line(note));
    }
    Verdict::Met
}

fn offered<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let found = || {
        let offers = offers::<P>();
        let offer = lacks(&offers, bench.protection).expect("the platform does not know what it was opened as");
        offer.missing.clone()
    };
    assert_eq!(found(), [], "it was opened, although something lacks");
    let mut guest = bench.guest(bench.config(1), |a| a.end(0));
    guest.end();
    assert_eq!(found(), [], "it is offered no more after a guest has run");
    Verdict::Met
}

/// Clause 1.2 for a protection that could not be opened, which no other clause can be tried with.
pub(crate) fn is_refused_as_probed<P: Platform>(
    protection: Protection,
    why: &(dyn Error + 'static),
) -> Result<(), BoxError> {
    let (offers, told) = (offers::<P>(), quality::told(why));
    let Some(offer) = lacks(&offers, protection) else { return Ok(()) };
    if offer.missing.is_empty() {
        return Err(format!("{protection} is offered, and cannot be opened: {told}").into());
    }
    let is_told = |text: &str| told.contains(text);
    match offer.missing.iter().find(|missing| !is_told(&missing.what) && !is_told(&missing.remedy)) {
        Some(missing) => Err(format!("{protection} lacks this: {}; and its refusal is: {told}", missing.what).into()),
        None => Ok(()),
    }
}
