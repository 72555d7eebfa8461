//! What threads that work at once do not share, although it lies side by side.

/// Alone in its cache lines (two, which processors fetch together).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Padded<T>(pub(super) T);
