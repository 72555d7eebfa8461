//! Guests of AMD SEV, SEV-ES and SEV-SNP.
//!
//! | | SEV | SEV-ES | SEV-SNP |
//! |---|---|---|---|
//! | exits | by themselves | by the GHCB | by the GHCB |
//! | conversions | hypercall | hypercall | page state change, [`Validate`] around it |
//! | memory that was not loaded | undefined | undefined | [`accepted`](Acceptance) when it is first needed, then undefined |
//! | CPUID | the host's | the host's | [`CpuidTable`], which the secure processor vouches for |
//! | vCPUs started by the guest | none | none | from a [`StatePage`] |
//! | evidence | none | none | reports (feature `report`) |
//!
//! [`Protection::of`] says which of them it is. The page tables map all memory twice, so that the guest never edits them: a
//! page is reached at its own address while it is private, and at `shared_at` above it while it is shared.
//!
//! Numbers are those of AMD publications 56421 (GHCB standardization), 56860 (SEV-SNP firmware ABI) and 24593 (APM
//! volume 2). [`Exit`] and [`Validate`] stand for the instructions, so that all of this runs in ordinary tests too.

mod acceptance;
mod ap;
mod cpuid;
mod detect;
mod event;
mod fault;
mod ghcb;
#[cfg(target_arch = "x86_64")]
mod instructions;
mod msr;
mod page_state;
#[cfg(feature = "report")]
mod report;
mod validate;
mod vcpu;

pub use acceptance::{Acceptance, BlockRecord};
pub use ap::StatePage;
pub use cpuid::{CpuidLeaf, CpuidTable};
pub use detect::Protection;
pub use fault::Fault;
use ghcb::Ghcb;
pub use ghcb::GhcbPage;
#[cfg(target_arch = "x86_64")]
pub(crate) use instructions::sev_status;
#[cfg(target_arch = "x86_64")]
pub use instructions::{Pvalidate, Vmgexit};
#[cfg(target_arch = "x86_64")]
pub(crate) use msr::terminate;
pub use msr::{Exit, Termination, cpuid_by_msr};
#[cfg(feature = "report")]
pub use report::{REPORT_LEN, Report, Reporter, SecretsPage};
pub use validate::{PageSize, Validate, Validated};
pub use vcpu::GhcbVcpu;

#[cfg(all(test, not(loom)))]
mod fake;
