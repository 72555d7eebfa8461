//! What an error has to say, whatever it is of.

use std::any::Any;
use std::error::Error;

/// What a panic said.
pub(crate) fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked")
}

/// An error with its sources.
pub(crate) fn told(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let said = source.to_string();
        // One that is transparent says what its source says.
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        next = source.source();
    }
    text
}

/// That an error and all its sources are such as go behind a program's name and a colon: one line each that is not empty,
/// starts small and ends without a full stop; no type's name or debug output in it; and what its source says is left to that.
#[track_caller]
pub(crate) fn assert_good(error: &(dyn Error + 'static)) {
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if let Some(fault) = fault(&text) {
            panic!("an error says: {text:?}, and {fault}");
        }
        let source = error.source().map(ToString::to_string);
        // One that is transparent says what its source says, and nothing else.
        let repeats = source.is_some_and(|source| text != source && text.contains(&source));
        assert!(!repeats, "an error says what its source says too: {text:?}");
        next = error.source();
    }
}

/// What is wrong with a message.
fn fault(text: &str) -> Option<&'static str> {
    // The system's own words begin with a capital.
    let is_systems = text.contains("(os error ") || text.contains("errno");
    let words = || text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    let is_type = |word: &str| {
        if word.ends_with("iB") {
            // A unit.
            return false;
        }
        let (first, rest) = word.split_at(word.len().min(1));
        let mixed = rest.contains(|letter: char| letter.is_ascii_uppercase());
        first.contains(|letter: char| letter.is_ascii_uppercase())
            && rest.contains(|letter: char| letter.is_ascii_lowercase())
            && (mixed || text.contains(&format!("{word}(")) || text.contains(&format!("{word} {{")))
    };
    match text {
        "" => Some("that is nothing"),
        _ if text.trim() != text => Some("has blanks around it"),
        _ if text.contains(['\n', '\r', '\t']) => Some("is more than a line"),
        _ if text.ends_with(['.', ':', ',', ';']) => Some("does not end as it should"),
        _ if text.contains("::") || words().any(is_type) => Some("has the name of a type in it"),
        _ if text.starts_with(|first: char| first.is_uppercase()) && !is_systems => Some("begins with a capital"),
        _ => None,
    }
}

/// That a text tells nothing of a secret of two halves: neither the whole nor a half, in whatever notation or order.
#[track_caller]
pub(crate) fn assert_keeps(text: &str, secret: u64) {
    let text = text.to_lowercase();
    let halves = [secret as u32, (secret >> 32) as u32];
    let numbers = halves.into_iter().flat_map(|half| [half, half.swap_bytes()]).map(u64::from);
    for number in numbers.chain([secret, secret.swap_bytes()]) {
        for form in [format!("{number:x}"), number.to_string()] {
            assert!(!text.contains(&form), "a text tells a secret: {text}");
        }
    }
    for half in halves {
        let bytes = half.to_le_bytes();
        for form in [format!("{bytes:?}"), format!("{bytes:x?}"), format!("{bytes:#x?}")] {
            let form = form.trim_matches(['[', ']']).to_owned();
            assert!(!text.contains(&form), "a text tells the bytes of a secret: {text}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_plain_line() {
        for good in [
            "vcpu 1 cannot read doorbell register 0x5",
            "failed to run KVM_CREATE_VM",
            "Too many open files (os error 24)",
            "sev-snp: SNP_LAUNCH_FINISH failed",
            "it is not aligned to pages of 4 KiB",
            "converting 0x1000..0x2000 would leave more than 3 runs",
        ] {
            assert_eq!(fault(good), None, "{good}");
        }
        for bad in [
            "",
            "it failed.",
            "it failed: ",
            "it failed:",
            "two\nlines",
            "It failed",
            "the range GpaRange is wrong",
            "a write of Write(65)",
            "a failure: Os { code: 2 }",
            "cvm::vm failed",
        ] {
            assert!(fault(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn a_secret_is_found_in_whatever_notation() {
        const SECRET: u64 = 0x5ec2_e75e_c2e7_5ed3;
        for form in ["0x5EC2E75E", "5ec2e75ec2e75ed3", "3269942995", "[211, 94, 231, 194]", "[1, d3, 5e, e7, c2, 0]"] {
            assert!(std::panic::catch_unwind(|| assert_keeps(form, SECRET)).is_err(), "{form}");
        }
        assert_keeps("vcpu 1: 0xd3", SECRET);
    }
}
