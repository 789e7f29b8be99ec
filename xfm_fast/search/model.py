"""The model of an index, and what tells it from others."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import VOCABULARY
from xfm_fast.errors import CheckpointError, UnavailableError
from xfm_fast.finetuning.kinds import model_folder, rank_of, task_of
from xfm_fast.models.processor import read_tokenizer
from xfm_fast.models.xfm import XFM, Precision
from xfm_fast.tasks.reranking import Rank, checksum
from xfm_fast.tokenizer import CaptionTokenizer

Size = Literal["tiny", "base"]
# A change of how images are prepared would make the features others.
_PREPARATION = 2
_OF_FEATURES = ("vision_encoder.", "vision_proj.", "text_encoder.roberta.", "text_proj.")
_SEED = 0


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of an index come from.

    Attributes:
        weights: a run, a folder that `save_pretrained` wrote, or a name on the Hugging Face Hub; None for random ones.
        tokenizer: of texts; None for that of the folder.
        size: of random weights, which are the same each time.
    """

    weights: str | None = None
    tokenizer: str | None = None
    size: Size = "tiny"

    @property
    def random(self) -> bool:
        """True where similarities mean nothing."""
        return self.weights is None

    def __str__(self) -> str:
        return f"a random {self.size} model" if self.weights is None else self.weights


@dataclass(frozen=True)
class SearchModel:
    """A model in evaluation mode, where it comes from, and a digest of all that decides its features.

    Attributes:
        rank: the rule that its run recorded; see `xfm_fast.tasks.reranking.rank_score`.
    """

    model: XFM
    source: ModelSource
    fingerprint: str
    rank: Rank = "match"


def open_model(
    source: str | Path | ModelSource, *, device: str | torch.device = "cpu", dtype: Precision = torch.float32
) -> SearchModel:
    """Load a model to search with.

    Args:
        source: see `ModelSource`.
        device, dtype: of the model; dtype may be "int8" or "fp8", see `XFM.quantise`. Features of another dtype are
            near enough to search each other's indexes.

    Raises:
        CheckpointError: there is no such model, it is damaged, or of a task that does not retrieve.
        UnavailableError: it has no contrastive head.
        DataError: the tokenizer cannot be read, or is of another model.
    """
    if not isinstance(source, ModelSource):
        source = ModelSource(str(source))
    model = (
        _random(source.size, source.tokenizer) if source.weights is None else _stored(source.weights, source.tokenizer)
    )
    if "contrastive" not in model.heads:
        raise UnavailableError(
            f"{source} has no contrastive head, by whose features images are found; give a pretrained model, or one "
            "fine-tuned for retrieval"
        )
    # Of the stored weights, so that an index made in bf16 is that of the same model.
    found = fingerprint(model)
    rank = "match" if source.weights is None else rank_of(Path(source.weights).expanduser())
    return SearchModel(model.to(device).cast(dtype).eval(), source, found, rank)


def fingerprint(model: XFM) -> str:
    """A digest of all that decides features: weights, resolution, and how images are prepared."""
    digest = hashlib.sha256(f"{_PREPARATION} {model.config.image_size}".encode())
    for name, tensor in model.state_dict().items():
        if name.startswith(_OF_FEATURES):
            digest.update(f"{name} {[*tensor.shape]} {checksum(tensor):08x}".encode())
    return digest.hexdigest()[:32]


def _stored(weights: str, tokenizer: str | None) -> XFM:
    path = Path(weights).expanduser()
    if path.is_file():
        raise CheckpointError(
            f"{weights} is a file; give a folder: xfm-fast convert makes one of an official checkpoint"
        )
    place = model_folder(path)
    if place is not None and (task := task_of(place)) is not None and task.kind != "retrieval":
        raise CheckpointError(
            f"{weights} was fine-tuned for the task {task.kind}; images are found with a pretrained model, or one "
            "fine-tuned for retrieval"
        )
    return XFM.from_pretrained(weights if place is None else place, tokenizer=tokenizer)


def _random(size: Size, tokenizer: str | None) -> XFM:
    words = CaptionTokenizer.train_on_texts([" ".join(VOCABULARY)], 1000)
    config = XFMConfig.preset(size)
    if size == "tiny":
        config = config.replace(vocab_size=max(config.vocab_size, words.vocab_size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = XFM(config)
    model.tokenizer = words if tokenizer is None else read_tokenizer(tokenizer, config)
    return model
