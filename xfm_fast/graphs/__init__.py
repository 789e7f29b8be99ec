"""Inference by CUDA graphs: the work of a model recorded once for each size, then replayed without the host's part.

At batch 1 a GPU computes X-FM faster than Python can ask it to. A CUDA graph is asked for once: `capture` records the
model at a few sizes, and a call takes the smallest of them that it fits into. What is left of it is filled with images,
texts and tokens of nothing, which no real one attends to; their results are cut off. So results are those of the model
itself.

    >>> graphs = capture(model, Shapes(images=(1, 8), texts=((1, 40, 40), (32, 40, 512))))
    >>> embeds = graphs.encode_image(pixels)  # 5 images: those of 8, cut to 5

Offsets and positions of packed texts are values, not sizes, so they may change from replay to replay; how many texts
and tokens there are may not, and is what a size of texts counts.
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
