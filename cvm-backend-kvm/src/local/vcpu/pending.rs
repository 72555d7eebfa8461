//! Interrupts that wait for a guest which has no interrupt controller.

/// A bit for each vector, vector 0 first.
type Vectors = [u64; 4];

/// The vectors that wait for a guest.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pending {
    /// Injected edges that the guest has not taken yet.
    edges: Vectors,
    /// Those whose lines are asserted.
    lines: Vectors,
}

/// Sets a vector's bit or clears it.
fn set(vectors: &mut Vectors, vector: u8, on: bool) {
    let (word, bit) = (usize::from(vector / 64), 1 << (vector % 64));
    vectors[word] = if on { vectors[word] | bit } else { vectors[word] & !bit };
}

impl Pending {
    pub(super) fn edge(&mut self, vector: u8) {
        set(&mut self.edges, vector, true);
    }

    pub(super) fn line(&mut self, vector: u8, asserted: bool) {
        set(&mut self.lines, vector, asserted);
    }

    /// The guest has `vector`, of which an edge is over, and a line is what it was.
    pub(super) fn taken(&mut self, vector: u8) {
        set(&mut self.edges, vector, false);
    }

    /// The vector that comes next: the highest one.
    pub(super) fn next(&self) -> Option<u8> {
        let vectors: Vectors = std::array::from_fn(|word| self.edges[word] | self.lines[word]);
        let word = vectors.iter().rposition(|word| *word != 0)?;
        Some((64 * word as u32 + vectors[word].ilog2()) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_vector_comes_next_and_a_line_stays_when_it_is_taken() {
        let mut pending = Pending::default();
        assert_eq!(pending.next(), None);
        pending.edge(0x21);
        pending.edge(0xff);
        pending.line(0x80, true);
        for expected in [0xff, 0x80, 0x80] {
            assert_eq!(pending.next(), Some(expected));
            pending.taken(expected);
        }
        pending.line(0x80, false);
        assert_eq!(pending.next(), Some(0x21));
    }
}
