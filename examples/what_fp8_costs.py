"""What products in fp8 do to embeddings of one's own photographs; a CPU shows it, slowly, before a GPU is there.

    python examples/what_fp8_costs.py FOLDER [MODEL]

MODEL is a folder that save_pretrained wrote, or a name on the Hugging Face Hub; without one the weights are random.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from xfm_fast import XFM, XFMConfig
from xfm_fast.kernels import ops

folder, *rest = sys.argv[1:]
model = XFM.from_pretrained(rest[0]) if rest else XFM(XFMConfig.preset("tiny"))
files = [
    path
    for path in sorted(Path(folder).iterdir())
    if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
]
photos = [Image.open(path).convert("RGB") for path in files]
exact = model.eval().encode(photos)
with ops.use_fp8():
    rounded = model.encode(photos)
cosines = torch.nn.functional.cosine_similarity(exact, rounded, dim=-1)
worst = int(cosines.argmin())
print(
    f"{len(files)} photographs: cosine {cosines.mean():.5f}, at least {cosines[worst]:.5f} ({files[worst].name})"
)
order, other = ((e @ e.t()).fill_diagonal_(-2).argmax(1) for e in (exact, rounded))
print(f"{int((order == other).sum())} of them keep the photograph that is most like them")
