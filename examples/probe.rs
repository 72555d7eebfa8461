//! What this host offers of each kind of protection, and what exactly lacks for the rest.

use clap::Parser;
use cvm::Platform;
use cvm::kvm::KvmPlatform;
use cvm::sev::kvm::SevPlatform;
use serde_json::json;

/// Say what this host offers of each kind of protection, and what lacks for the rest and how to get it.
///
/// The exit status is 0 whatever is found.
#[derive(Debug, Parser)]
#[command(name = "probe")]
struct Options {
    /// Print an array of {protection, offered, missing: [{what, remedy}], notes}
    #[arg(long)]
    json: bool,
}

fn main() {
    cvm::kvm::vault::init();
    let options = Options::parse();
    let offers: Vec<_> = KvmPlatform::probe().into_iter().chain(SevPlatform::probe()).collect();
    if options.json {
        let offers = offers.iter().map(|offer| {
            let missing = offer.missing.iter();
            let missing: Vec<_> = missing.map(|m| json!({ "what": m.what, "remedy": m.remedy })).collect();
            let protection = offer.protection.to_string();
            json!({
                "protection": protection, "offered": missing.is_empty(), "missing": missing, "notes": offer.notes,
            })
        });
        println!("{:#}", offers.collect::<serde_json::Value>());
        return;
    }
    for offer in offers {
        let verdict = if offer.missing.is_empty() { "offered" } else { "not offered" };
        println!("{:<18}{verdict}", offer.protection.to_string());
        for missing in offer.missing {
            println!("  lacks  {}\n  needs  {}", missing.what, missing.remedy);
        }
        for note in offer.notes {
            println!("  note   {note}");
        }
    }
}
