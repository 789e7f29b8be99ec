"""A model repository of NVIDIA's Triton Inference Server, made from an export, and what its Python models run."""
