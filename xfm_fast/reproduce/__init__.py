"""The paper's experiments on tiny models and generated data."""
