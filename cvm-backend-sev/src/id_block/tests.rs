//! Against `snp-create-id-block` of the Python package sev-snp-measure 0.0.13, given the keys here and the launch digest
//! `00 01 .. 2f`. Signatures of its are random, so they are checked here.

use super::*;

/// The numbers 1 to 48 as a private key, in PKCS #8.
const ID: &str = "\
-----BEGIN PRIVATE KEY-----
MIG2AgEAMBAGByqGSM49AgEGBSuBBAAiBIGeMIGbAgEBBDABAgMEBQYHCAkKCwwN
Dg8QERITFBUWFxgZGhscHR4fICEiIyQlJicoKSorLC0uLzChZANiAATHbyKD3alc
1JsO2ecz0pBEdONyFvEk4T0smrTPAQIcSa2cq7PQuXSZrvLwqzE/oCgmvB+DRRtc
iWKnXK/3NYjUQApilkNhVPs0PDk+kQSKbHvLrcg82KXyb+rogxVvkqE=
-----END PRIVATE KEY-----";

/// The numbers 2 to 49, in SEC 1.
const AUTHOR: &str = "\
-----BEGIN EC PRIVATE KEY-----
MIGkAgEBBDACAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygp
KissLS4vMDGgBwYFK4EEACKhZANiAAQ+wq3lIyTK9KGQwBusyCgCSYRKshXrk37U
ZFNwVio4IDppA2msb89Yx3nolJqFdjssPe7pmuZgVVpTjE89rk+2yAwlo2rYhECT
F/y5EktLq1fq3Ap4xFtABiJ36O6nRx4=
-----END EC PRIVATE KEY-----";

const ID_DIGEST: &str =
    "d5bc92fff8a089b72b054ce337ceb5744a937755adf3afa2a228a1f1d5909f20937600d257dd462415d34be047231639";
const AUTHOR_DIGEST: &str =
    "58d9deb7d92e2e193c907421f496b757c5db819143c97e9eccf866635841718f9e0810648fecfb378d50ab5168260053";

/// Its signatures' numbers, little endian: of the block, of the key.
const SIGNATURES: [[&str; 2]; 2] = [
    [
        "edef3072e6cd7f93fd8d1578476eb574a898c1acf935d513e385fa7cbe01acd9461b3e110ad389e8bcc1079b85f6fd5e",
        "fe4d41201f25f4059950345c5995b15c29adeeb0e8db9934fcaccfdef8688efe0c83f5c7dc84aaf31a403a89b5346138",
    ],
    [
        "ab066f284d064c746e42bdca16dc54f81971442a8bd81aa93b2d3f1f0472808ba49fbefdbde223f7dd5fccbef88fa380",
        "7a618ff714eac7102133d33260d0695eaaba0ac0a6f39a03d5b7ba3c5c6c8cf376f7480190f0b2985cb323c3efac85e3",
    ],
];

fn bytes(hex: &str) -> Vec<u8> {
    hex.as_bytes().chunks(2).map(|byte| u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 16).unwrap()).collect()
}

fn block() -> IdBlock {
    let digest = Measurement(std::array::from_fn(|index| index as u8));
    let policy = SnpPolicy::from_bits(0x3_0000).unwrap();
    IdBlock { digest, family: [0; 16], image: [0; 16], svn: 0, policy }
}

pub(crate) fn keys() -> (PrivateKey, PrivateKey) {
    (PrivateKey::from_pem(ID).unwrap(), PrivateKey::from_pem(AUTHOR).unwrap())
}

#[test]
fn block_and_key_digests_are_those_of_the_other_implementation() {
    let mut expected: Vec<u8> = (0..48).chain([0; 48]).collect();
    (expected[0x50], expected[0x5a]) = (1, 3);
    assert_eq!(block().to_bytes().to_vec(), expected);
    let (id, author) = keys();
    assert_eq!(id.public().digest().to_vec(), bytes(ID_DIGEST));
    assert_eq!(author.public().digest().to_vec(), bytes(AUTHOR_DIGEST));
}

#[test]
fn signatures_of_the_other_implementation_are_right() {
    let (id, author) = keys();
    let mut theirs = IdAuth::sign(&block(), &id, Some(&author));
    for (at, numbers) in [BLOCK_SIGNATURE, KEY_SIGNATURE].into_iter().zip(SIGNATURES) {
        theirs.put(at, &bytes(numbers[0]));
        theirs.put(at + NUMBER_BYTES, &bytes(numbers[1]));
    }
    assert_ne!(theirs, IdAuth::sign(&block(), &id, Some(&author)));
    assert_eq!(theirs.verify(&block()).unwrap(), (id.public(), Some(author.public())));
}

/// What `snpguest` 0.11.0 makes of keys in its folder: the numbers 1 to 48 and 2 to 49, and two whose public keys have a number
/// that is shorter by a byte. For each, with another as its author's:
///
/// ```text
/// snpguest generate key-digest KEY.pem -d KEY.digest
/// snpguest generate id-block KEY.pem AUTHOR.pem 0x000102..2f -f 000102..0f -m f0f1f2..ff -s 7 -p 0xb0137 -i BLOCK -a AUTH
/// base64 -d BLOCK > block; base64 -d AUTH > KEY.auth
/// ```
macro_rules! snpguest {
    ($($key:literal),*) => {
        [$((
            include_str!(concat!("snpguest/", $key, ".pem")),
            include_str!(concat!("snpguest/", $key, ".digest")),
            include_bytes!(concat!("snpguest/", $key, ".auth")),
        )),*]
    };
}

#[test]
fn blocks_and_key_digests_are_those_of_snpguest_byte_for_byte_and_its_signatures_are_right() {
    let all = snpguest!("numbers-1", "numbers-2", "short-x", "short-y");
    let keys = all.map(|(pem, ..)| PrivateKey::from_pem(pem).unwrap());
    let family = std::array::from_fn(|index| index as u8);
    let image = std::array::from_fn(|index| 0xf0 + index as u8);
    let block = IdBlock { family, image, svn: 7, policy: SnpPolicy::from_bits(0xb_0137).unwrap(), ..block() };
    assert_eq!(&block.to_bytes(), include_bytes!("snpguest/block"));
    for (index, (_, digest, auth)) in all.into_iter().enumerate() {
        // The first two sign for each other, and so do the others.
        let (id, author) = (&keys[index], &keys[index ^ 1]);
        assert_eq!(id.public().digest().to_vec(), bytes(digest));
        let mut ours = IdAuth::sign(&block, id, Some(author));
        // Its signatures are random.
        for at in [BLOCK_SIGNATURE, KEY_SIGNATURE] {
            ours.put(at, &auth[at..at + 2 * NUMBER_BYTES]);
        }
        assert_eq!(ours.as_bytes(), auth);
        assert_eq!(ours.verify(&block).unwrap(), (id.public(), Some(author.public())));
    }
}

#[test]
fn an_id_block_comes_back_from_its_bytes() {
    let block = IdBlock { family: [1; 16], image: [2; 16], svn: 7, ..block() };
    assert_eq!(IdBlock::from_bytes(&block.to_bytes()), Ok(block));
    for (at, value) in [(0x50, 2), (0x5a, 1), (0x5f, 1)] {
        let mut bytes = block.to_bytes();
        bytes[at] = value;
        assert!(IdBlock::from_bytes(&bytes).is_err(), "{value} at {at:#x}");
    }
}

#[test]
fn every_change_of_what_is_signed_or_reserved_in_a_part_is_noticed() {
    let (id, author) = keys();
    let auth = IdAuth::sign(&block(), &id, Some(&author));
    assert_eq!(auth.verify(&block()).unwrap(), (id.public(), Some(author.public())));
    assert!(auth.verify(&IdBlock { svn: 1, ..block() }).is_err());
    let parts = [(0, 8), (BLOCK_SIGNATURE, SIGNATURE_BYTES), (ID_KEY, KEY_BYTES), (KEY_SIGNATURE, SIGNATURE_BYTES)];
    for (start, len) in parts.into_iter().chain([(AUTHOR_KEY, KEY_BYTES)]) {
        for at in [start, start + 4, start + len / 8, start + len - 1] {
            let mut bytes = *auth.as_bytes();
            bytes[at] ^= 0x55;
            assert!(IdAuth::from_bytes(&bytes).verify(&block()).is_err(), "{at:#x}");
        }
    }
}

#[test]
fn an_author_need_not_be() {
    let (id, _) = keys();
    let auth = IdAuth::sign(&block(), &id, None);
    assert_eq!(auth.verify(&block()).unwrap(), (id.public(), None));
}

/// What `openssl ecparam -name secp384r1 -genkey` writes before the key.
const PARAMETERS: &str = "\
-----BEGIN EC PARAMETERS-----
BgUrgQQAIg==
-----END EC PARAMETERS-----
";

#[test]
fn a_private_key_is_found_in_what_tools_write() {
    for (pem, key) in [ID, AUTHOR].into_iter().zip(<[PrivateKey; 2]>::from(keys())) {
        let expected = key.public();
        let attributes = format!("Bag Attributes\n    friendlyName: owner\n{pem}\n");
        let certificate = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        for text in [
            format!("{PARAMETERS}{pem}"),
            format!("{PARAMETERS}{pem}\n").replace('\n', "\r\n"),
            attributes,
            format!("{certificate}{pem}\n{certificate}"),
        ] {
            assert_eq!(PrivateKey::from_pem(&text).map(|key| key.public()), Ok(expected), "{text}");
        }
        let (_, der) = p384::pkcs8::SecretDocument::from_pem(pem).unwrap();
        assert_eq!(PrivateKey::from_der(der.as_bytes()).map(|key| key.public()), Ok(expected));
        assert!(PrivateKey::from_der(&der.as_bytes()[1..]).is_err());
    }
    assert_eq!(PrivateKey::from_pem(&format!("{ID}\n{AUTHOR}")).unwrap().public(), keys().0.public());
}

#[test]
fn private_keys_are_zeroed_when_they_are_dropped_and_not_printed() {
    fn are_zeroed<T: zeroize::ZeroizeOnDrop>() {}
    are_zeroed::<SigningKey>();
    assert_eq!(format!("{:?}", keys().0), "PrivateKey { .. }");
}

#[test]
fn what_is_no_key_is_refused() {
    for (pem, problem) in [
        (ID.replace("MIG2", "MIG3"), "not one of P-384"),
        // The curve P-256.
        (ID.replace("BSuBBAAi", "BSuBBAAj"), "not one of P-384"),
        (ID.replace("PRIVATE", "ENCRYPTED PRIVATE"), "is encrypted"),
        (PARAMETERS.to_owned(), "no private key"),
        (ID[..100].to_owned(), "has no end"),
        (ID.replace("END PRIVATE", "END EC PRIVATE"), "has no end"),
        (String::new(), "no private key"),
    ] {
        let error = PrivateKey::from_pem(&pem).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
    assert!(PublicKey::from_bytes(&[0; KEY_BYTES]).is_err());
}
