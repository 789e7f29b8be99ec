"""The paper's experiments in miniature: what can be reproduced on a laptop, and how far it carries."""
