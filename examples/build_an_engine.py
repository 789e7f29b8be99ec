"""Export a model, run the export, and build an engine of TensorRT for RTX where its builder is installed.

python examples/build_an_engine.py MODEL_FOLDER OUT
"""

import sys
from pathlib import Path

import torch

from xfm_fast import XFM
from xfm_fast.errors import UnavailableError
from xfm_fast.export import Session, export_engines, export_onnx

model, out = XFM.from_pretrained(sys.argv[1]), Path(sys.argv[2])
made = export_onnx(model, out / "onnx", consumer="onnxruntime", dtype="fp32", graphs=("vision",))
print(f"{out / 'onnx'}: {', '.join(made.graph_names)}")
pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
with torch.inference_mode():
    error = (
        (Session.load(out / "onnx").encode_image(pixels) - model.encode_image(pixels)).abs().max()
    )
print(f"ONNX Runtime differs from the model by {error:.1e}")
try:
    # No GPU is needed to build for one.
    engines = export_engines(
        model, out / "engines", "tensorrt-rtx", graphs=("vision",), dtype="bf16", sm=("80",)
    )
    print(f"{out / 'engines'}: {', '.join(engines.graph_names)} for sm_80")
except UnavailableError as error:
    print(f"no engine: {error}")
