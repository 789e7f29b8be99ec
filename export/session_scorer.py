"""Scores of candidate pairs through a session, for the re-ranking scheduler, which neither knows nor cares."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.packing import ImageGroups, Sequences

if TYPE_CHECKING:
    from xfm_fast.export.session import Session, SessionMemory


class SessionScorer:
    """A `PairScorer` over a session with the graphs `image_memory` and `fusion`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config

    def prepare(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """The fusion graph begins with the text embeddings, so nothing is done ahead."""
        return tokens

    def preparation_flops(self, lengths: Tensor) -> flops.Count:
        """See `PairScorer`."""
        return flops.Count()

    def memory(self, image_embeds: Tensor) -> SessionMemory:
        """Of the images `[B, 1 + N, width]`."""
        return self.session.image_memory(image_embeds)

    def scores(self, tokens: Tensor, sequences: Sequences, memory: SessionMemory, groups: ImageGroups) -> Tensor:
        """Match score of every text with its image: `[P]`."""
        lengths = sequences.cu_seqlens.diff()
        with torch.inference_mode():
            outputs = self.session.fuse_packed(
                tokens.to(self.session.device, self.session.dtype), lengths, memory, _image_of(groups)
            )
        return outputs["match_logits"][:, 1]

    def fusion_flops(self, lengths: Tensor, groups: ImageGroups, image_tokens: int) -> flops.Count:
        """Of `scores`, padding included."""
        first_only = not self.session.manifest.all_tokens
        count = flops.Count()
        for work in self.session.passes(lengths.tolist(), _image_of(groups)):
            padded = [work.length] * (len(work.images) * len(work.texts[0]))
            count += flops.fusion(self.config, padded, image_tokens, first_token_only=first_only)
        return count

    def fingerprint(self) -> str:
        """Of the weights and of what runs them, which decides the last digits."""
        manifest = self.session.manifest
        files = {name for graph in ("image_memory", "fusion") for name in manifest.graph(graph).files}
        sums = sorted(record.sha256 for record in manifest.files if record.name in files)
        facts = [self.session.description, manifest.weights_sha256, *sums]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:16]


def _image_of(groups: ImageGroups) -> list[int]:
    """Image of every text, in their grouped order."""
    counts = groups.cu_texts.diff().long()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts).tolist()
