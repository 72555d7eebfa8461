//! What the benchmarks are to reach.

use Measure::*;

/// Something that is measured, and the most that it is to be.
pub(super) struct Target {
    pub(super) name: &'static str,
    pub(super) measure: Measure,
    /// Nothing where it is only reported.
    pub(super) most: Option<f64>,
}

/// Names are criterion's: `group/function/parameter`.
#[derive(Clone, Copy)]
pub(super) enum Measure {
    /// What one benchmark takes as a multiple of another one.
    Ratio(&'static str, &'static str),
    /// What a benchmark takes as a multiple of the floor that took turns with it.
    ToFloor(&'static str),
    /// What a benchmark takes, in nanoseconds.
    Nanoseconds(&'static str),
    /// What a benchmark takes more than its floor, in nanoseconds.
    AboveFloor(&'static str),
}

pub(super) const fn target(name: &'static str, measure: Measure) -> Target {
    Target { name, measure, most: None }
}

impl Target {
    /// The most that it is to be.
    pub(super) const fn most(self, most: f64) -> Self {
        Self { most: Some(most), ..self }
    }
}

/// Every target there is, in the order of the report.
pub(super) const TARGETS: &[Target] = &[
    // Taking a buffer, copying and giving it back, to a plain copy.
    target("bounce to device, 64 B", ToFloor("bounce/to_device/64")).most(2.0),
    target("bounce to device, 256 B", ToFloor("bounce/to_device/256")).most(1.5),
    target("bounce to device, 1500 B", ToFloor("bounce/to_device/1500")).most(1.2),
    target("bounce to device, 4 KiB", ToFloor("bounce/to_device/4096")).most(1.05),
    target("bounce to device, 16 KiB", ToFloor("bounce/to_device/16384")).most(1.05),
    target("bounce to device, 64 KiB", ToFloor("bounce/to_device/65536")).most(1.05),
    target("bounce to device, 256 KiB", ToFloor("bounce/to_device/262144")).most(1.05),
    target("bounce from device, 64 B", ToFloor("bounce/from_device/64")).most(2.0),
    target("bounce from device, 256 B", ToFloor("bounce/from_device/256")).most(1.5),
    target("bounce from device, 1500 B", ToFloor("bounce/from_device/1500")).most(1.2),
    target("bounce from device, 4 KiB", ToFloor("bounce/from_device/4096")).most(1.05),
    target("bounce from device, 16 KiB", ToFloor("bounce/from_device/16384")).most(1.05),
    target("bounce from device, 64 KiB", ToFloor("bounce/from_device/65536")).most(1.05),
    target("bounce from device, 256 KiB", ToFloor("bounce/from_device/262144")).most(1.05),
    target("bounce by ring, 64 B", ToFloor("bounce/ring/64")).most(2.0),
    target("bounce by ring, 256 B", ToFloor("bounce/ring/256")).most(1.5),
    // The same without a copy.
    target("map and release, 64 B", Nanoseconds("bounce/map/64")).most(10.0),
    target("map and release, 256 B", Nanoseconds("bounce/map/256")).most(10.0),
    target("map and release, 1500 B", Nanoseconds("bounce/map/1500")).most(10.0),
    target("map and release, 4 KiB", Nanoseconds("bounce/map/4096")).most(10.0),
    target("map and release, 16 KiB", Nanoseconds("bounce/map/16384")).most(10.0),
    target("map and release, 64 KiB", Nanoseconds("bounce/map/65536")).most(10.0),
    target("map and release, 256 KiB", Nanoseconds("bounce/map/262144")).most(10.0),
    target("map and release, 1500 B, 50% full", Nanoseconds("bounce/map-full-50/1500")).most(10.0),
    target("map and release, 4 KiB, 50% full", Nanoseconds("bounce/map-full-50/4096")).most(10.0),
    target("map and release, 64 KiB, 50% full", Nanoseconds("bounce/map-full-50/65536")).most(10.0),
    target("map and release, 256 KiB, 50% full", Nanoseconds("bounce/map-full-50/262144")).most(10.0),
    target("map and release, 1500 B, 90% full", Nanoseconds("bounce/map-full-90/1500")).most(10.0),
    target("map and release, 4 KiB, 90% full", Nanoseconds("bounce/map-full-90/4096")).most(10.0),
    target("map and release, 64 KiB, 90% full", Nanoseconds("bounce/map-full-90/65536")).most(10.0),
    target("map and release, 256 KiB, 90% full", Nanoseconds("bounce/map-full-90/262144")).most(10.0),
    // Lending a buffer, of which a header of 64 bytes is read.
    target("lend, 64 B", Nanoseconds("bounce/lend/64")).most(15.0),
    target("lend, 256 B", Nanoseconds("bounce/lend/256")).most(15.0),
    target("lend, 1500 B", Nanoseconds("bounce/lend/1500")).most(15.0),
    target("lend, 4 KiB", Nanoseconds("bounce/lend/4096")).most(15.0),
    target("lend, 16 KiB", Nanoseconds("bounce/lend/16384")).most(15.0),
    target("lend, 64 KiB", Nanoseconds("bounce/lend/65536")).most(15.0),
    target("lend, 256 KiB", Nanoseconds("bounce/lend/262144")).most(15.0),
    // In and out of other circumstances: how full the pool is, how many are in flight, where payloads come from.
    target("bounce to device, 1500 B, 50% full", ToFloor("bounce/to_device-full-50/1500")).most(1.2),
    target("bounce to device, 4 KiB, 50% full", ToFloor("bounce/to_device-full-50/4096")).most(1.05),
    target("bounce to device, 64 KiB, 50% full", ToFloor("bounce/to_device-full-50/65536")).most(1.05),
    target("bounce to device, 256 KiB, 50% full", ToFloor("bounce/to_device-full-50/262144")).most(1.05),
    target("bounce to device, 1500 B, 90% full", ToFloor("bounce/to_device-full-90/1500")).most(1.2),
    target("bounce to device, 4 KiB, 90% full", ToFloor("bounce/to_device-full-90/4096")).most(1.05),
    target("bounce to device, 64 KiB, 90% full", ToFloor("bounce/to_device-full-90/65536")).most(1.05),
    target("bounce to device, 256 KiB, 90% full", ToFloor("bounce/to_device-full-90/262144")).most(1.05),
    target("bounce to device, 1500 B, 1 in flight", ToFloor("bounce/to_device-depth-1/1500")).most(1.2),
    target("bounce to device, 4 KiB, 1 in flight", ToFloor("bounce/to_device-depth-1/4096")).most(1.05),
    target("bounce to device, 1500 B, 8 in flight", ToFloor("bounce/to_device-depth-8/1500")).most(1.2),
    target("bounce to device, 4 KiB, 8 in flight", ToFloor("bounce/to_device-depth-8/4096")).most(1.05),
    target("bounce to device, 1500 B, 32 in flight", ToFloor("bounce/to_device-depth-32/1500")).most(1.2),
    target("bounce to device, 4 KiB, 32 in flight", ToFloor("bounce/to_device-depth-32/4096")).most(1.05),
    target("bounce to device, 4 KiB, from DRAM", ToFloor("bounce/to_device-dram/4096")).most(1.05),
    target("bounce to device, 64 KiB, from DRAM", ToFloor("bounce/to_device-dram/65536")).most(1.05),
    // While another core reads or writes all that is shared.
    target("bounce to device, 4 KiB, watched", ToFloor("bounce/to_device-watched/4096")).most(1.05),
    target("bounce from device, 4 KiB, watched", ToFloor("bounce/from_device-watched/4096")).most(1.05),
    target("lend, 4 KiB, watched", Nanoseconds("bounce/lend-watched/4096")).most(150.0),
    // As many on each of two threads as on one: 1.9 times as many in all. Taken on one CPU and released on another.
    target("map and release on two threads", ToFloor("bounce/threads/two")).most(1.05),
    target("release on another cpu, 4 KiB", Nanoseconds("bounce/across/4096")).most(80.0),
    target("gather 16 x 4 KiB, above the copy", AboveFloor("bounce/gather/65536")).most(80.0),
    // What options cost.
    target("bounce to device, 1500 B, zero on release", ToFloor("bounce/to_device-zeroed/1500")),
    target("bounce to device, 4 KiB, zero on release", ToFloor("bounce/to_device-zeroed/4096")),
    target("bounce to device, 64 KiB, zero on release", ToFloor("bounce/to_device-zeroed/65536")),
    target("bounce to device, 1500 B, random slots", ToFloor("bounce/to_device-random/1500")),
    target("bounce to device, 4 KiB, random slots", ToFloor("bounce/to_device-random/4096")),
    target("bounce to device, 64 KiB, random slots", ToFloor("bounce/to_device-random/65536")),
    // An access to the shared view, with a pin for many and with one for each, to one by vm-memory alone.
    target("view, read 8 B", ToFloor("read/view/8")).most(1.15),
    target("view, read 64 B", ToFloor("read/view/64")).most(1.15),
    target("view, read 4 KiB", ToFloor("read/view/4096")).most(1.15),
    target("view, write 8 B", ToFloor("write/view/8")).most(1.15),
    target("view, write 64 B", ToFloor("write/view/64")).most(1.15),
    target("view, write 4 KiB", ToFloor("write/view/4096")).most(1.15),
    target("view, pin and read 8 B", ToFloor("read/pinned/8")).most(1.5),
    target("view, pin and read 64 B", ToFloor("read/pinned/64")).most(1.5),
    target("view, pin and read 4 KiB", ToFloor("read/pinned/4096")).most(1.5),
    target("view, pin and write 8 B", ToFloor("write/pinned/8")).most(1.5),
    target("view, pin and write 64 B", ToFloor("write/pinned/64")).most(1.5),
    target("view, pin and write 4 KiB", ToFloor("write/pinned/4096")).most(1.5),
    // Without a backend; an iteration is two conversions. On two threads, as many on each as on one: 1.8 times as many.
    target("states of 512 pages", Nanoseconds("map/lookup/512")).most(1024.0),
    target("convert 4 KiB, there and back", Nanoseconds("convert/4KiB")).most(600.0),
    target("convert 2 MiB, there and back", Nanoseconds("convert/2MiB")).most(600.0),
    target("convert on two threads", ToFloor("convert/two/threads")).most(1.11),
    target("convert on two threads, an engine each", ToFloor("convert/apart/threads")),
    // The launch digest of SEV-SNP, to SHA-384 of the same bytes on as many threads.
    target("measure snp, one thread", ToFloor("measure/snp/1")).most(1.1),
    target("measure snp, two threads", ToFloor("measure/snp/2")).most(1.1),
    target("launch by pages, above their hashes", ToFloor("measure/launch/pages")),
    target("launch at once, above their hashes", ToFloor("measure/launch/image")),
    // An exit, to one by the bare ioctl; where a process of its own holds the vCPU, to one where this process does.
    target("exit, none", Ratio("none/exit", "raw/exit")),
    target("exit, guest-memfd", Ratio("guest-memfd/exit", "raw/exit")),
    target("exit, vault to none", Ratio("vault/exit", "none/exit")).most(2.0),
    // An interrupt by descriptor, and the guest's doorbell by descriptor for it: no process but the kernel is in the way.
    target("device i/o, vault to none", Ratio("vault/io", "none/io")).most(1.1),
    // Sharing a range and taking it back, to the system calls and exits that this cannot do without.
    target("convert 4 KiB, none", Ratio("none/convert/4KiB", "raw/convert-file/4KiB")).most(1.3),
    target("convert 4 KiB touched, none", Ratio("none/convert-touched/4KiB", "raw/convert-file-touched/4KiB"))
        .most(1.3),
    target("convert 2 MiB, none", Ratio("none/convert/2MiB", "raw/convert-file/2MiB")).most(1.3),
    target("convert 64 MiB, none", Ratio("none/convert/64MiB", "raw/convert-file/64MiB")).most(1.3),
    target("convert 4 KiB, guest-memfd", Ratio("guest-memfd/convert/4KiB", "raw/convert-guest-memfd/4KiB")).most(1.3),
    target(
        "convert 4 KiB touched, guest-memfd",
        Ratio("guest-memfd/convert-touched/4KiB", "raw/convert-guest-memfd-touched/4KiB"),
    )
    .most(1.3),
    target("convert 2 MiB, guest-memfd", Ratio("guest-memfd/convert/2MiB", "raw/convert-guest-memfd/2MiB")).most(1.3),
    target("convert 64 MiB, guest-memfd", Ratio("guest-memfd/convert/64MiB", "raw/convert-guest-memfd/64MiB"))
        .most(1.3),
    target("convert 4 KiB, vault", Ratio("vault/convert/4KiB", "raw/convert-file/4KiB")).most(1.3),
    target("convert 4 KiB touched, vault", Ratio("vault/convert-touched/4KiB", "raw/convert-file-touched/4KiB"))
        .most(1.3),
    target("convert 2 MiB, vault", Ratio("vault/convert/2MiB", "raw/convert-file/2MiB")).most(1.3),
    target("convert 64 MiB, vault", Ratio("vault/convert/64MiB", "raw/convert-file/64MiB")).most(1.3),
    // From nothing to a guest's first exit, to the same by bare ioctls.
    target("boot, none", Ratio("none/boot", "raw/boot")),
    target("boot, guest-memfd", Ratio("guest-memfd/boot", "raw/boot")),
    target("boot, vault", Ratio("vault/boot", "raw/boot")),
];
