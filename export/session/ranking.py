"""A session as a `xfm_fast.tasks.ranking.RankModel`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xfm_fast.packing import Packing

from .session import Session, SessionMemory


class SessionRanks:
    """A `RankModel` over a session with `vision`, `text`, `image_memory` and `fusion`; the session batches inputs."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = session.config
        self.dtype_name: str = session.manifest.dtype

    @property
    def token_budget(self) -> int:
        """Caption tokens of a pass of the session."""
        return self.session.limits.budget

    def captions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.session.encode_text(input_ids, attention_mask)
        return Packing.from_mask(attention_mask.to(embedded.device)).pack(embedded)

    def images(self, pixels: Tensor) -> Tensor:
        return self.session.encode_image(pixels)

    def memories(self, embeds: Tensor) -> list[SessionMemory]:
        memory = self.session.image_memory(embeds)
        return [
            SessionMemory({name: layer[row : row + 1].clone() for name, layer in memory.layers.items()})
            for row in range(memory.images)
        ]

    def logits(
        self, tokens: Tensor, lengths: Tensor, memories: Sequence[SessionMemory], counts: Sequence[int]
    ) -> Tensor:
        memory = SessionMemory.joined(memories)
        image_of = [image for image, count in enumerate(counts) for _ in range(count)]
        return self.session.fuse_packed(tokens, lengths, memory, image_of)["match_logits"]

    def caption_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.session.project_text(self.session.encode_text(input_ids, attention_mask))

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.session.project_image(self.session.encode_image(pixels))
