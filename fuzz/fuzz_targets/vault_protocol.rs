//! What a vault and its VMM hear from each other: every message has one meaning or none, and each meaning one message.

#![no_main]

use cvm_backend_kvm::vault::protocol::{Encoded, MOST_TEXT, Malformed, Message, Order, Reply, Report, Request};
use libfuzzer_sys::fuzz_target;
use std::fmt::Debug;
use zerocopy::FromBytes;

/// Whether it decodes; then it has to be what its meaning encodes to.
fn means<T: Debug>(
    message: &Message,
    text: &[u8],
    decoded: Result<T, Malformed>,
    encode: impl Fn(&T) -> Encoded,
) -> bool {
    let Ok(said) = decoded else { return false };
    let (again, its_text) = encode(&said);
    assert_eq!(Message { sequence: message.sequence, ..again }, *message, "{said:?}");
    assert_eq!(its_text.as_bytes(), text, "{said:?}");
    assert!(text.len() <= MOST_TEXT, "{said:?}");
    true
}

fuzz_target!(|bytes: &[u8]| {
    let Ok((message, text)) = Message::read_from_prefix(bytes) else { return };
    // Once as it came, and once with the length that its text has: most would fail at that alone.
    for declared in [message.text, text.len() as u16] {
        let message = Message { text: declared, ..message };
        let meanings = [
            means(&message, text, Request::decode(&message, text), Request::encode),
            means(&message, text, Reply::decode(3, &message, text), Reply::encode),
            means(&message, text, Order::decode(&message, text), Order::encode),
            means(&message, text, Report::decode(&message, text), Report::encode),
        ];
        assert!(meanings.iter().filter(|means| **means).count() <= 1, "{message:?} means several things");
    }
});
