"""Which loss trains which encoder: the norms of its gradients, and zeros where the method of X-FM stops them.

    python examples/gradient_flow.py [MODEL]

MODEL is a folder that save_pretrained wrote, or a name on the Hugging Face Hub; without one the weights are random.
Exit code 1: a loss reaches an encoder that the method keeps it from, or misses one that it trains.
"""

import sys
from typing import Any

import torch

from xfm_fast import XFM, XFMConfig
from xfm_fast.objectives import PairBatch, TextBatch, pretraining_losses

TRAINED = {"mlm": "language", "itc": "language vision", "itm": "vision fusion", "mim": "vision"}
TRAINED["imlm"] = TRAINED["itm"]
model = XFM.from_pretrained(sys.argv[1]) if sys.argv[1:] else XFM(XFMConfig.preset("tiny"))
config = model.eval().config
encoders = {
    "language": model.text_encoder.roberta,
    "vision": model.vision_encoder,
    "fusion": model.fusion_encoder.roberta.encoder,
}
ids, masked = torch.randint(4, config.mask_token_id, (4, 12)), torch.tensor([3, 5])
text: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
text["masked_input_ids"] = ids.index_fill(1, masked, config.mask_token_id)
text["masked_positions"] = masked.expand(4, 2)
text["masked_labels"] = ids[:, masked]
image = torch.randn(4, 3, config.image_size, config.image_size)
wrong = []
print("loss      ", *(f"{name:>10}" for name in encoders))
for batch in (TextBatch(**text), PairBatch(image=image, **text)):
    for loss, value in pretraining_losses(model, batch).items():
        norms = {}
        for name, encoder in encoders.items():
            weights = [*encoder.parameters()]
            gradients = torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True)
            norms[name] = sum(float(g.norm()) ** 2 for g in gradients if g is not None) ** 0.5
        print(f"{loss:10}", *(f"{norm:10.3g}" for norm in norms.values()))
        reached = {name for name, norm in norms.items() if norm > 0}
        wrong += [f"{loss}: {name}" for name in sorted(reached ^ {*TRAINED[loss].split()})]
if wrong:
    sys.exit(f"gradients are not those of the method: {', '.join(wrong)}")
