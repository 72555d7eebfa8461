//! The thread of a vCPU in the vault: it carries out the requests on the vCPU's page.

use super::page::{Answering, Page, Pages};
use super::protocol::{Failure, Given, Malformed, Reply, Request};
use super::server::RefusalBudget;
use crate::error::chain;
use crate::local::LocalVcpu;
use cvm_core::memory::LeftAs;
use cvm_core::{Answer, Error as CoreError, Kick, PageState, Vcpu};
use std::sync::Arc;

/// What the thread of one vCPU owns.
pub(super) struct VcpuThread {
    vcpu: LocalVcpu,
    /// Those of all vCPUs.
    kickers: Arc<[Arc<dyn Kick>]>,
    budget: Arc<RefusalBudget>,
}

impl VcpuThread {
    pub(super) fn new(vcpu: LocalVcpu, kickers: Arc<[Arc<dyn Kick>]>, budget: Arc<RefusalBudget>) -> Self {
        Self { vcpu, kickers, budget }
    }

    /// Carries out the requests on the vCPU's page, until the process ends.
    pub(super) fn serve(mut self, pages: &Pages) {
        let page: Page<'_> = pages.page(self.vcpu.index());
        let mut answering = Answering::default();
        loop {
            let reply = match answering.next(page).map(|(message, text)| Request::decode(&message, &text)) {
                Some(Ok(request)) => self.carry_out(request),
                Some(Err(malformed @ Malformed { .. })) => Reply::Refused(malformed.to_string()),
                None => Reply::Refused("the request is out of order".into()),
            };
            if matches!(reply, Reply::Refused(_)) {
                self.budget.spend();
            }
            answering.answer(page, reply.encode());
        }
    }

    fn carry_out(&mut self, request: Request) -> Reply {
        let index = self.vcpu.index();
        match request {
            Request::Run(given) => self.run(given),
            Request::Convert { range, to } => match self.vcpu.engine().convert_part(index, range, to) {
                Ok(()) => Reply::Done,
                // The VMM may have answered the guest meanwhile, on another thread.
                Err(error @ CoreError::NotAsked { .. }) => Reply::Outdated(chain(&error)),
                Err(error) => {
                    if self.vcpu.engine().is_lost() {
                        self.kickers.iter().for_each(|kicker| kicker.kick());
                    }
                    let map = self.vcpu.engine().memory().map();
                    let unchanged = map.first_not_in(range, PageState::from(to.other())).is_none();
                    let left_as = if unchanged { LeftAs::Before } else { LeftAs::Unknown };
                    Reply::NotConverted { left_as, reason: chain(&error) }
                }
            },
            Request::Poison(range) => {
                // A conversion that fails half-way poisons its pages here, and no VMM may take others from the guest.
                let map = self.vcpu.engine().memory().map();
                match map.first_not_in(range, PageState::Poisoned) {
                    None if !self.vcpu.engine().is_lost() => Reply::Done,
                    _ => Reply::Outdated("the pages are not poisoned, or not out of the guest's reach".into()),
                }
            }
            Request::Register(register) => Reply::Register(self.vcpu.exposed(register)),
            Request::Inject(event) => match self.vcpu.inject(event) {
                Ok(()) => Reply::Done,
                Err(CoreError::InjectionRefused { reason, .. }) => Reply::InjectionRefused(reason),
                Err(error) => Reply::Failed(Failure::Host(chain(&error))),
            },
        }
    }

    fn run(&mut self, given: Given) -> Reply {
        let answered = match given {
            Given::Nothing => Ok(()),
            Given::Value(value) => self.vcpu.answer_read(value),
            Given::Answer(answer) => match self.vcpu.engine().conclude(self.vcpu.index(), answer) {
                Ok(conversion) => self.vcpu.answer_conversion(conversion),
                // Another vCPU may have converted the pages back since.
                Err(error @ CoreError::NotAsked { .. }) if answer == Answer::Done => {
                    return Reply::Outdated(chain(&error));
                }
                Err(error) => Err(error),
            },
        };
        match answered.and_then(|()| self.vcpu.run()) {
            Ok(exit) => Reply::Exit(exit),
            Err(CoreError::MmioRefused { gpa, write, .. }) => Reply::Failed(Failure::Mmio { gpa, write }),
            Err(CoreError::MissingConversion { gpa, .. }) => Reply::Failed(Failure::MissingConversion { gpa }),
            Err(CoreError::UnknownDoorbell { register, access, .. }) => {
                Reply::Failed(Failure::UnknownDoorbell { register, access })
            }
            Err(CoreError::Crashed { reason, .. }) => Reply::Failed(Failure::Crashed(reason)),
            Err(CoreError::Lost) => Reply::Failed(Failure::Lost),
            Err(error @ (CoreError::Protocol { .. } | CoreError::NotAsked { .. })) => Reply::Refused(chain(&error)),
            Err(error) => Reply::Failed(Failure::Host(chain(&error))),
        }
    }
}
