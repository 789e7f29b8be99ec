"""The model of an index and its fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from xfm_fast import loading
from xfm_fast.errors import UnavailableError
from xfm_fast.export.session import Session
from xfm_fast.loading import Source
from xfm_fast.models.xfm import PRECISIONS, XFM, Precision
from xfm_fast.tasks.journal import checksum
from xfm_fast.tasks.reranking import Rank
from xfm_fast.tokenizer import CaptionTokenizer

# Counts changes of the image transform, which change features too.
_TRANSFORM_VERSION = 2
_FEATURE_WEIGHTS = ("vision_encoder.", "vision_proj.", "text_encoder.roberta.", "text_proj.")


@dataclass(frozen=True)
class SearchModel:
    """A model in evaluation mode; `rank` is the rule that its run recorded, see `xfm_fast.tasks.reranking`."""

    # An `XFM`, or the `Session` of an export.
    model: Any
    source: Source
    fingerprint: str
    rank: Rank = "match"

    @property
    def tokenizer(self) -> CaptionTokenizer | None:
        """Tokenizer of the queries."""
        return self.model.processor.tokenizer if isinstance(self.model, Session) else self.model.tokenizer


def open_model(
    source: str | Path | Source, *, device: str | torch.device | None = None, dtype: Precision | None = None
) -> SearchModel:
    """Load a model with a contrastive head; features of another dtype are close enough to search the same index.

    Args:
        source: a run, a folder, a Hub name, an official checkpoint file or an export; or the options of the model.
        device: of the model; by default that of `source`, "cpu" for a name.
        dtype: of the model; by default that of `source`.
    """
    if not isinstance(source, Source):
        source = Source(str(source), device="cpu")
    if source.is_export:
        opened = loading.open_session(source)
        if "contrastive" not in opened.model.heads:
            raise UnavailableError(f"{source} has no contrastive head; export a model that has one")
        return SearchModel(opened.model, source, opened.model.fingerprint()[:32], opened.rank)
    opened = loading.open_model(replace(source, dtype=None), needs=("contrastive",), tasks=("retrieval",), device="cpu")
    # Before the cast, so that an index made in bf16 fits the same model in fp32.
    found = fingerprint(opened.model)
    model = opened.model.to(device or source.choose_device()).cast(dtype or PRECISIONS[source.dtype or "fp32"])
    return SearchModel(model.eval(), source, found, opened.rank)


def fingerprint(model: XFM) -> str:
    """Digest of everything that features depend on: weights, resolution and image transform."""
    digest = hashlib.sha256(f"{_TRANSFORM_VERSION} {model.config.image_size}".encode())
    for name, tensor in model.state_dict().items():
        if name.startswith(_FEATURE_WEIGHTS):
            digest.update(f"{name} {[*tensor.shape]} {checksum(tensor):08x}".encode())
    return digest.hexdigest()[:32]
