"""The place of exporters. This version exports through `xfm_fast.checkpoint`; ONNX and TensorRT are to follow here."""
