"""The model of an index and its fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from xfm_fast.checkpoint.files import model_folder
from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import VOCABULARY
from xfm_fast.errors import CheckpointError, UnavailableError
from xfm_fast.models.processor import read_tokenizer
from xfm_fast.models.xfm import XFM, Precision
from xfm_fast.tasks.journal import checksum
from xfm_fast.tasks.reranking import Rank
from xfm_fast.tasks.retrieval import rank_of
from xfm_fast.tasks.task import task_of
from xfm_fast.tokenizer import CaptionTokenizer

# Counts changes of the image transform, which change features too.
_TRANSFORM_VERSION = 2
_FEATURE_WEIGHTS = ("vision_encoder.", "vision_proj.", "text_encoder.roberta.", "text_proj.")
_SEED = 0


@dataclass(frozen=True)
class ModelSource:
    """Source of weights: a run, a `save_pretrained` folder or a Hub name; None for random weights of `size`."""

    weights: str | None = None
    # None for the tokenizer of the folder.
    tokenizer: str | None = None
    size: Literal["tiny", "base"] = "tiny"

    @property
    def random(self) -> bool:
        """True where similarities mean nothing."""
        return self.weights is None

    def __str__(self) -> str:
        return f"a random {self.size} model" if self.weights is None else self.weights


@dataclass(frozen=True)
class SearchModel:
    """A model in evaluation mode; `rank` is the rule that its run recorded, see `xfm_fast.tasks.reranking`."""

    model: XFM
    source: ModelSource
    fingerprint: str
    rank: Rank = "match"


def open_model(
    source: str | Path | ModelSource, *, device: str | torch.device = "cpu", dtype: Precision = torch.float32
) -> SearchModel:
    """Load a model with a contrastive head; features of another dtype are close enough to search the same index."""
    if not isinstance(source, ModelSource):
        source = ModelSource(str(source))
    weights, rank = source.weights, "match"
    if weights is None:
        model = _random_model(source)
    else:
        model, rank = _load(weights, source.tokenizer), rank_of(Path(weights).expanduser())
    if "contrastive" not in model.heads:
        raise UnavailableError(f"{source} has no contrastive head; use a pretrained model or one of retrieval")
    # Before the cast, so that an index made in bf16 fits the same model in fp32.
    found = fingerprint(model)
    return SearchModel(model.to(device).cast(dtype).eval(), source, found, rank)


def fingerprint(model: XFM) -> str:
    """Digest of everything that features depend on: weights, resolution and image transform."""
    digest = hashlib.sha256(f"{_TRANSFORM_VERSION} {model.config.image_size}".encode())
    for name, tensor in model.state_dict().items():
        if name.startswith(_FEATURE_WEIGHTS):
            digest.update(f"{name} {[*tensor.shape]} {checksum(tensor):08x}".encode())
    return digest.hexdigest()[:32]


def _load(weights: str, tokenizer: str | None) -> XFM:
    path = Path(weights).expanduser()
    if path.is_file():
        raise CheckpointError(f"{weights} is a file; give a folder, such as xfm-fast convert makes of it")
    place = model_folder(path)
    if place is not None and (task := task_of(place)) is not None and task.kind != "retrieval":
        raise CheckpointError(f"{weights} is fine-tuned for {task.kind}; use a pretrained model or one of retrieval")
    return XFM.from_pretrained(weights if place is None else place, tokenizer=tokenizer)


def _random_model(source: ModelSource) -> XFM:
    words = CaptionTokenizer.train_on_texts([" ".join(VOCABULARY)], 1000)
    config = XFMConfig.preset(source.size)
    if source.size == "tiny":
        config = config.replace(vocab_size=max(config.vocab_size, words.vocab_size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = XFM(config)
    model.tokenizer = words if source.tokenizer is None else read_tokenizer(source.tokenizer, config)
    return model
