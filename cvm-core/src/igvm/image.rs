//! What of an IGVM file a launch can start.

use super::{Context, Directive, Igvm, IgvmError, IgvmPlatform, Parameter, native, refuse};
use crate::boot::Interface;
use crate::launch::Loader;
use crate::memory::Slots;
use crate::x86::VcpuState;
use crate::{Error, Gpa, GpaRange, Launch, PAGE_SIZE, PageKind};
use std::collections::BTreeMap;

const PAGE: usize = PAGE_SIZE as usize;

/// The most that is loaded at once, in bytes.
const MOST: usize = 2 << 20;

/// An `IGVM_VHS_MMIO_RANGES` that says that there are none.
const NO_MMIO_RANGES: [u8; 32] = [0; 32];

/// An IGVM file whose vCPUs can all start from the states that it has for them.
#[derive(Debug, Clone)]
pub struct IgvmImage<'a> {
    igvm: Igvm<'a>,
    states: BTreeMap<u32, VcpuState>,
}

impl<'a> IgvmImage<'a> {
    /// For backends: a file with what `state` makes of each vCPU's.
    ///
    /// # Errors
    /// Those of `state`; [`IgvmError::Header`] for a vCPU that has two, and for a file that wants memory to be shared at the start,
    /// which all is private then.
    pub fn new<E: From<IgvmError>>(
        igvm: Igvm<'a>,
        state: impl Fn(&Context<'a>) -> Result<VcpuState, E>,
    ) -> Result<Self, E> {
        let mut states = BTreeMap::new();
        for (offset, directive) in igvm.directives() {
            if let Directive::Shared { range } = directive {
                return Err(refuse(offset, format!("it wants {range} shared, and all is private at first")).into());
            }
        }
        for (offset, context) in igvm.contexts() {
            if states.insert(context.vcpu.into(), state(context)?).is_some() {
                return Err(refuse(offset, format!("vcpu {} has two states", context.vcpu)).into());
            }
        }
        Ok(Self { igvm, states })
    }

    /// A file for [`IgvmPlatform::Native`].
    ///
    /// # Errors
    /// As [`Igvm::parse`] and [`IgvmImage::new`]; [`IgvmError::State`].
    pub fn native(file: &'a [u8]) -> Result<Self, IgvmError> {
        Self::new(Igvm::parse(file, IgvmPlatform::Native)?, native::state)
    }

    /// The file.
    pub fn igvm(&self) -> &Igvm<'a> {
        &self.igvm
    }

    /// The first states of vCPUs, by their indices.
    pub fn states(&self) -> &BTreeMap<u32, VcpuState> {
        &self.states
    }
}

/// Checks that a processor can have the state that a vCPU has in a file, whose `fields` are there with their offsets.
///
/// # Errors
/// [`IgvmError::State`] with the first field that no processor has so.
pub fn possible(
    context: &Context<'_>,
    state: &VcpuState,
    fields: impl IntoIterator<Item = (usize, &'static str)>,
) -> Result<(), IgvmError> {
    state.check().map_err(|field| {
        let at = fields.into_iter().find(|(_, name)| *name == field).map_or(0, |(at, _)| at);
        IgvmError::State { vcpu: context.vcpu.into(), field, at }
    })
}

/// Checks that a vCPU's state in a file is the page `expected`, whose `fields` are there with their offsets, in order.
///
/// # Errors
/// [`IgvmError::State`] with the first byte that differs and its field.
pub fn difference(
    context: &Context<'_>,
    expected: &[u8; PAGE],
    fields: &[(usize, &'static str)],
) -> Result<(), IgvmError> {
    match context.contents.iter().zip(expected).position(|(has, expected)| has != expected) {
        None => Ok(()),
        Some(at) => {
            let field = fields[..fields.partition_point(|(start, _)| *start <= at)].last();
            let field = field.map_or("field", |(_, name)| name);
            Err(IgvmError::State { vcpu: context.vcpu.into(), field, at })
        }
    }
}

impl<L: Loader> Launch<L> {
    /// Loads what an IGVM file says, in its order, with `command_line` for a guest that asks for one; then every vCPU's first
    /// state. What the guest is told of its machine is not measured.
    ///
    /// A file says nothing to its guest of doorbells and conversions. What needs to know has a boot page among its pages, made
    /// for a configuration like this launch's.
    ///
    /// # Errors
    /// [`Error::Config`] for a file that was read for another platform than this launch is on; [`Error::Igvm`] when it asks for
    /// tables of ACPI or a device tree, which guests do not have here, or has no room for what it asks for; as [`Launch::load`]
    /// and [`Launch::set_vcpu`].
    pub fn load_igvm(&mut self, image: &IgvmImage<'_>, command_line: &str) -> Result<(), Error> {
        let platform = image.igvm.platform();
        let fits = match platform {
            IgvmPlatform::Native => *self.interface() == Interface::from(self.transport()),
            IgvmPlatform::SevSnp => self.interface().vouched_pages,
        };
        if !fits {
            return Err(Error::Config(format!("the igvm file was read for {}, and this is not", platform.name())));
        }
        let memory = Slots::new(&self.config().memory)?;
        let machine = Machine { vcpus: self.config().vcpus, memory: memory.ranges(), command_line };
        let mut run = Run { start: Gpa(0), kind: PageKind::Measured, contents: Vec::new() };
        for (offset, directive) in image.igvm.directives() {
            if let Directive::Page { gpa, kind: kind @ (PageKind::Measured | PageKind::Unmeasured), contents } =
                directive
            {
                if !run.goes_on(*gpa, *kind) {
                    run.load(self)?;
                    run = Run { start: *gpa, kind: *kind, contents: Vec::new() };
                }
                run.contents.extend_from_slice(contents.unwrap_or(&[0; PAGE]));
                continue;
            }
            run.load(self)?;
            match directive {
                Directive::Page { gpa, kind, .. } => {
                    let range = GpaRange::new(gpa.0, PAGE_SIZE).map_err(|error| Error::Layout(error.to_string()))?;
                    self.submit(range, &[], *kind)?;
                }
                Directive::Parameters { range, initial, parameters } => {
                    memory.check(*range)?;
                    let mut area = vec![0; range.len() as usize];
                    area[..initial.len()].copy_from_slice(initial);
                    for (parameter, at) in parameters {
                        machine.tell(&mut area, *parameter, *at as usize).map_err(|problem| refuse(offset, problem))?;
                    }
                    self.load(range.start(), &area, PageKind::Unmeasured)?;
                }
                Directive::Required { range } => memory.check(*range)?,
                Directive::Shared { .. } | Directive::Vcpu(_) | Directive::IdBlock(_) => {}
            }
        }
        run.load(self)?;
        image.states.iter().try_for_each(|(vcpu, state)| self.set_vcpu(*vcpu, state))
    }
}

/// Pages that follow each other, and are alike.
struct Run {
    start: Gpa,
    kind: PageKind,
    contents: Vec<u8>,
}

impl Run {
    fn goes_on(&self, gpa: Gpa, kind: PageKind) -> bool {
        let len = self.contents.len();
        len < MOST && self.kind == kind && self.start.0.checked_add(len as u64) == Some(gpa.0)
    }

    /// Loads it, and leaves nothing of it.
    fn load<L: Loader>(&mut self, launch: &mut Launch<L>) -> Result<(), Error> {
        if self.contents.is_empty() {
            return Ok(());
        }
        let loaded = launch.load(self.start, &self.contents, self.kind);
        self.contents.clear();
        loaded
    }
}

/// What a guest can be told.
pub(super) struct Machine<'a> {
    pub(super) vcpus: u32,
    /// In order.
    pub(super) memory: &'a [GpaRange],
    pub(super) command_line: &'a str,
}

impl Machine<'_> {
    /// Writes a parameter to its place.
    pub(super) fn tell(&self, area: &mut [u8], parameter: Parameter, at: usize) -> Result<(), String> {
        let value = match parameter {
            Parameter::VcpuCount => self.vcpus.to_le_bytes().to_vec(),
            Parameter::MmioRanges => NO_MMIO_RANGES.to_vec(),
            Parameter::MemoryMap => self.memory_map(),
            Parameter::CommandLine if self.command_line.contains('\0') => {
                return Err("the command line has a zero in it".into());
            }
            Parameter::CommandLine => [self.command_line.as_bytes(), &[0]].concat(),
            // Memory is private.
            Parameter::Environment => vec![0; 4],
            Parameter::Srat | Parameter::Madt | Parameter::Slit | Parameter::Pptt | Parameter::DeviceTree => {
                return Err(format!("it asks for a table, {parameter:?}, that guests do not have here"));
            }
        };
        let place = area.get_mut(at..).and_then(|rest| rest.get_mut(..value.len()));
        place.ok_or_else(|| format!("its area has no room at {at:#x} for {parameter:?}"))?.copy_from_slice(&value);
        Ok(())
    }

    /// An `IGVM_VHS_MEMORY_MAP_ENTRY` for each range, and one without pages: page number, how many pages, type and flags, which
    /// are 0 for memory.
    fn memory_map(&self) -> Vec<u8> {
        let ranges = self.memory.iter().map(|range| [range.start().0 / PAGE_SIZE, range.pages(), 0]);
        ranges.chain([[0; 3]]).flatten().flat_map(u64::to_le_bytes).collect()
    }
}
