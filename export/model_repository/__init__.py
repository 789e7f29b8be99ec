"""A model repository of NVIDIA's Triton Inference Server, made from an export."""
