"""Layers known by the names of their parts, whatever their classes.

BERT's code named the parts of a post-norm layer (arXiv 1810.04805), and RoBERTa, ALBEF, X-VLM, X²-VLM, BLIP and X-FM
kept the names: `attention`, `crossattention`, `intermediate` and `output`, with the same submodules.
"""

from __future__ import annotations

from torch import nn

from xfm_fast.replace.swapping import Kinds, find

_BRANCH: dict[str, Kinds] = {
    "self": nn.Module,
    "self.query": nn.Linear,
    "self.key": nn.Linear,
    "self.value": nn.Linear,
    "self.dropout": nn.Dropout,
    "output": nn.Module,
    "output.dense": nn.Linear,
    "output.dropout": nn.Dropout,
    "output.LayerNorm": nn.LayerNorm,
    "output.drop_path": nn.Module,
}
_MLP: dict[str, Kinds] = {
    "intermediate": nn.Module,
    "intermediate.dense": nn.Linear,
    "output": nn.Module,
    "output.dense": nn.Linear,
    "output.dropout": nn.Dropout,
    "output.LayerNorm": nn.LayerNorm,
    "output.drop_path": nn.Module,
}


def _branch(name: str) -> dict[str, Kinds]:
    return {name: nn.Module, **{f"{name}.{part}": kind for part, kind in _BRANCH.items()}}


# Parts of a layer by dotted name, with their classes; nn.Module where any will do.
LAYER_PARTS: dict[str, Kinds] = _branch("attention") | _branch("crossattention") | _MLP


def is_layer(module: nn.Module) -> bool:
    """Whether a module has the parts of such a layer, with cross-attention or without."""
    crosses = has_cross_attention(module)
    # Stochastic depth is X²-VLM's addition.
    required = (name for name in LAYER_PARTS if not name.endswith("drop_path"))
    needed = (name for name in required if crosses or not name.startswith("crossattention"))
    return (
        all(find(module, name) is not None for name in needed)
        and hasattr(find(module, "attention.self"), "num_attention_heads")
        and hasattr(find(module, "intermediate"), "intermediate_act_fn")
    )


def has_cross_attention(layer: nn.Module) -> bool:
    """Whether a layer looks at images, or could."""
    return find(layer, "crossattention") is not None


def drops_paths(layer: nn.Module) -> bool:
    """Whether stochastic depth is in force, which X²-VLM draws for a position of all texts at once."""
    parts = (find(layer, f"{name}output.drop_path") for name in ("attention.", "crossattention.", ""))
    return any(part is not None and part.training and getattr(part, "drop_prob", None) for part in parts)


def why_not_plain(layer: nn.Module) -> str | None:
    """Why the attention of a layer is not that of BERT; None if it is."""
    for name in ("attention.self", "crossattention.self"):
        positions = getattr(find(layer, name), "position_embedding_type", None)
        if positions not in ("absolute", None):
            return f"its attention has {positions} positions"
    if hasattr(layer, "intermediate_query"):
        return "it attends with query tokens beside the text"
    return None
