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

TRAINED = {
    "mlm": "language",
    "itc": "language vision",
    "itm": "vision fusion",
    "imlm": "vision fusion",
    "mim": "vision",
}
model = XFM.from_pretrained(sys.argv[1]) if sys.argv[1:] else XFM(XFMConfig.preset("tiny"))
config, wrong = model.eval().config, []
parts = {
    "language": "text_encoder.roberta.",
    "vision": "vision_encoder.",
    "fusion": "fusion_encoder.roberta.encoder.",
}
weights = {
    part: [p for n, p in model.named_parameters() if n.startswith(prefix)]
    for part, prefix in parts.items()
}
ids = torch.randint(4, config.mask_token_id, (4, 12))
text: dict[str, Any] = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "masked_labels": ids[:, [3, 5]],
}
text["masked_input_ids"] = ids.index_fill(1, torch.tensor([3, 5]), config.mask_token_id)
text["masked_positions"] = torch.tensor([[3, 5]]).expand(4, 2)
image = torch.randn(4, 3, config.image_size, config.image_size)
print("loss      ", *(f"{part:>10}" for part in parts))
for batch in (TextBatch(**text), PairBatch(image=image, **text)):
    for loss, value in pretraining_losses(model, batch).items():
        norms = {}
        for part, of_part in weights.items():
            found = torch.autograd.grad(value, of_part, allow_unused=True, retain_graph=True)
            norms[part] = (
                sum(float(gradient.norm()) ** 2 for gradient in found if gradient is not None)
                ** 0.5
            )
        print(f"{loss:10}", *(f"{norm:10.3g}" for norm in norms.values()))
        reached = {part for part, norm in norms.items() if norm > 0}
        wrong += [f"{loss}: {part}" for part in sorted(reached ^ set(TRAINED[loss].split()))]
if wrong:
    sys.exit(f"gradients are not those of the method: {', '.join(wrong)}")
