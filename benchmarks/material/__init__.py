"""The photographs, captions, weights and texts that benchmarks are made of."""
