"""Inference with CUDA graphs: each size is captured once, then replayed without launch overhead.

At batch 1 a GPU computes X-FM faster than Python launches it. `capture` records the model at a few sizes, and a call
uses the smallest that it fits. The rest is filled with padding images, texts and tokens, which real tokens do not
attend to and whose results are cut off, so results equal the model's.

    >>> graphs = capture(model, Shapes(images=(1, 8), texts=((1, 40, 40), (32, 40, 512))))
    >>> embeds = graphs.encode_image(pixels)  # 5 images: those of 8, cut to 5

Offsets and positions of packed texts are values and may change between replays; the numbers of texts and tokens are
sizes and may not.
"""

from .encoders import Shapes, XFMGraphs, capture
from .recording import CallGraphs, NoHostReads, Recorder, Recording, record, require_gpu, why_not_captured

__all__ = [
    "CallGraphs",
    "NoHostReads",
    "Recorder",
    "Recording",
    "Shapes",
    "XFMGraphs",
    "capture",
    "record",
    "require_gpu",
    "why_not_captured",
]
