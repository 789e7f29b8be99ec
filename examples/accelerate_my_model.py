"""Give a Hugging Face model fused forms, see that its outputs stay, and how much faster it is.

    python examples/accelerate_my_model.py [MODEL_FOLDER_OR_NAME]

Without a model a small random BERT is taken. Needs transformers.
"""

import sys
import time

import torch
from transformers import AutoModel, BertConfig, BertModel

import xfm_fast


def seconds(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """The time of a pass, the best of seven."""
    found = []
    for _ in range(7):
        begun = time.perf_counter()
        model(**batch)
        found.append(time.perf_counter() - begun)
    return min(found)


name = sys.argv[1] if len(sys.argv) > 1 else None
model = AutoModel.from_pretrained(name) if name else BertModel(BertConfig(num_hidden_layers=2))
model.eval()
lengths = torch.randint(5, 40, (16, 1))
batch = {
    "input_ids": torch.randint(1000, 2000, (16, 40)),
    "attention_mask": (torch.arange(40) < lengths).long(),
}
with torch.inference_mode():
    before = seconds(model, batch)
    report = xfm_fast.accelerate(
        model, unpad=True, verify=batch
    )  # raises where outputs differ by more than rounding
    after = seconds(model, batch)
print(report)
print(
    f"{before * 1000:.1f} ms before, {after * 1000:.1f} ms after: {before / after:.2f} times as fast"
)
report.revert()
