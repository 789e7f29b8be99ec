"""The paper's experiments in miniature, as far as a laptop can reproduce them."""
