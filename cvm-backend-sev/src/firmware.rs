//! What the secure processor's firmware answers when it does not do what it was asked to.

use std::fmt;

/// Makes the enum, with each status' number, name and meaning in one place.
macro_rules! statuses {
    ($($variant:ident = $number:literal, $name:literal, $meaning:literal;)*) => {
        /// A status other than success: of SEV (AMD publication 55766, "Status Codes") and of SEV-SNP (AMD publication 56860,
        /// "Status Codes"), which number them alike.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum FirmwareError {
            $(#[doc = concat!($name, ": ", $meaning, ".")] $variant,)*
            /// A status that is not known here.
            Unknown(u32),
        }

        impl FirmwareError {
            /// The error that a status stands for; nothing for success, and where the firmware was not called.
            pub fn from_status(status: u32) -> Option<Self> {
                match status {
                    SUCCESS | NO_FIRMWARE_CALL => None,
                    $($number => Some(Self::$variant),)*
                    unknown => Some(Self::Unknown(unknown)),
                }
            }

            /// Its number.
            pub fn status(self) -> u32 {
                match self {
                    $(Self::$variant => $number,)*
                    Self::Unknown(status) => status,
                }
            }

            /// Its name in the specification.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                    Self::Unknown(_) => "a status that is not known here",
                }
            }

            /// What it means, in a few words.
            pub fn meaning(self) -> &'static str {
                match self {
                    $(Self::$variant => $meaning,)*
                    Self::Unknown(_) => "no specification that was read for this has it",
                }
            }
        }
    };
}

const SUCCESS: u32 = 0;

/// What Linux says when it did not get as far as the firmware (include/uapi/linux/psp-sev.h, `SEV_RET_NO_FW_CALL`).
const NO_FIRMWARE_CALL: u32 = u32::MAX;

statuses! {
    InvalidPlatformState = 0x1, "INVALID_PLATFORM_STATE", "the platform's state does not permit the command";
    InvalidGuestState = 0x2, "INVALID_GUEST_STATE", "the guest's state does not permit the command";
    InvalidConfig = 0x3, "INVALID_CONFIG", "the platform's configuration does not permit the command";
    InvalidLength = 0x4, "INVALID_LENGTH", "a buffer is too short";
    AlreadyOwned = 0x5, "ALREADY_OWNED", "the platform has an owner";
    InvalidCertificate = 0x6, "INVALID_CERTIFICATE", "a certificate is invalid";
    PolicyFailure = 0x7, "POLICY_FAILURE", "the guest's policy does not allow it";
    Inactive = 0x8, "INACTIVE", "the guest is not active";
    InvalidAddress = 0x9, "INVALID_ADDRESS", "an address is invalid";
    BadSignature = 0xa, "BAD_SIGNATURE", "a signature is wrong";
    BadMeasurement = 0xb, "BAD_MEASUREMENT", "a measurement is another one than expected";
    AsidOwned = 0xc, "ASID_OWNED", "the ASID belongs to another guest";
    InvalidAsid = 0xd, "INVALID_ASID", "the ASID is invalid";
    WbinvdRequired = 0xe, "WBINVD_REQUIRED", "caches have to be written back first";
    DfFlushRequired = 0xf, "DF_FLUSH_REQUIRED", "the data fabric has to be flushed first";
    InvalidGuest = 0x10, "INVALID_GUEST", "there is no such guest";
    InvalidCommand = 0x11, "INVALID_COMMAND", "there is no such command";
    Active = 0x12, "ACTIVE", "the guest is active";
    HwerrorPlatform = 0x13, "HWERROR_PLATFORM", "the hardware has failed, and the platform is safe";
    HwerrorUnsafe = 0x14, "HWERROR_UNSAFE", "the hardware has failed, and the platform may be unsafe";
    Unsupported = 0x15, "UNSUPPORTED", "the firmware does not have the feature";
    InvalidParam = 0x16, "INVALID_PARAM", "a parameter is invalid";
    ResourceLimit = 0x17, "RESOURCE_LIMIT", "the firmware has run out of a resource";
    SecureDataInvalid = 0x18, "SECURE_DATA_INVALID", "the firmware's own data failed its check";
    InvalidPageSize = 0x19, "INVALID_PAGE_SIZE", "a page has another size than expected";
    InvalidPageState = 0x1a, "INVALID_PAGE_STATE", "a page is in another state than expected";
    InvalidMdataEntry = 0x1b, "INVALID_MDATA_ENTRY", "the metadata of a page is invalid";
    InvalidPageOwner = 0x1c, "INVALID_PAGE_OWNER", "a page belongs to another guest";
    AeadOflow = 0x1d, "AEAD_OFLOW", "the counter of guest messages has overflown";
    RbModeExited = 0x1f, "RB_MODE_EXITED", "the ring buffer was left";
    RmpInitRequired = 0x20, "RMP_INIT_REQUIRED", "the reverse map has to be initialised first";
    BadSvn = 0x21, "BAD_SVN", "the firmware's security version is too low";
    BadVersion = 0x22, "BAD_VERSION", "the firmware's version is too low";
    ShutdownRequired = 0x23, "SHUTDOWN_REQUIRED", "the platform has to be shut down first";
    UpdateFailed = 0x24, "UPDATE_FAILED", "the firmware's update failed";
    RestoreRequired = 0x25, "RESTORE_REQUIRED", "the firmware has to be restored";
    RmpInitializationFailed = 0x26, "RMP_INITIALIZATION_FAILED", "the reverse map could not be initialised";
    InvalidKey = 0x27, "INVALID_KEY", "a key is invalid";
}

impl fmt::Display for FirmwareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:#x}): {}", self.name(), self.status(), self.meaning())
    }
}

impl std::error::Error for FirmwareError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_keeps_its_number_and_only_success_is_none() {
        assert_eq!(FirmwareError::from_status(NO_FIRMWARE_CALL), None);
        assert_eq!(FirmwareError::from_status(0), None);
        for status in (1..0x40).chain([0xffff]) {
            assert_eq!(FirmwareError::from_status(status).map(FirmwareError::status), Some(status));
        }
        let known =
            (1..0x40).filter(|status| !matches!(FirmwareError::from_status(*status), Some(FirmwareError::Unknown(_))));
        assert_eq!(known.count(), 38);
        assert_eq!(
            FirmwareError::PolicyFailure.to_string(),
            "POLICY_FAILURE (0x7): the guest's policy does not allow it"
        );
    }
}
