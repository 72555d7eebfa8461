//! What an error has to say, whatever it is of.

use std::error::Error;

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

/// That an error and all its sources are such as go behind a program's name and a colon: one line each that is not empty, starts
/// small, ends without a full stop, and has no name of a type in it.
#[track_caller]
pub(crate) fn assert_good(error: &(dyn Error + 'static)) {
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        let bad = text.is_empty()
            || text.contains('\n')
            || text.ends_with('.')
            || text.contains(" { ")
            || text.contains("Some(")
            || text.chars().next().is_some_and(char::is_uppercase) && is_ours(error);
        assert!(!bad, "an error says: {text}");
        next = error.source();
    }
}

/// Whether an error's words are those of these crates: the system's begin with a capital.
fn is_ours(error: &(dyn Error + 'static)) -> bool {
    error.is::<cvm_core::Error>()
}
