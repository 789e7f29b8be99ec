"""Image captioning: a decoder over vision features continues a prompt, e.g. "a picture of".

Official recipe: 384 pixels, 32 images per GPU, lr 1e-5, 5 epochs, label smoothing 0.1, captions of 5 to 20 tokens, 3
beams. The official model class cannot be constructed (its decoder lacks label smoothing); this is its intended
behaviour, verified by parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.models import inputs
from xfm_fast.models.decoder import DecoderMemory, TextDecoder, generate
from xfm_fast.packing import ImageGroups
from xfm_fast.tasks.task_model import TaskModel


class CaptioningModel(TaskModel):
    """Vision encoder with a text decoder; the language and fusion encoders are not built.

    The decoder is initialised from `decoder_from`: the fusion encoder, or the text encoder (official), which leaves
    cross-attention random. `decoder_layers` defaults to the depth of that encoder.
    """

    own_parts = ("text_decoder.",)

    def __init__(
        self,
        config: XFMConfig,
        *,
        decoder_layers: int | None = None,
        decoder_from: Literal["fusion", "text"] = "fusion",
    ) -> None:
        depths = {"fusion": config.fusion_layers, "text": config.text_layers}
        if decoder_from not in depths:
            raise InputError(f"decoder_from={decoder_from!r} is no encoder to start from; choose from fusion, text")
        super().__init__(config, heads=(), encoders=("vision",))
        self.decoder_from = decoder_from
        layers = depths[decoder_from] if decoder_layers is None else decoder_layers
        self.text_decoder = TextDecoder(config, layers, config.vision_width)

    def initialise_decoder(self, state: Mapping[str, Tensor]) -> list[str]:
        """Initialise the decoder from `decoder_from` of a pretraining state dict."""
        return self.text_decoder.initialise_from(state, f"{self.decoder_from}_encoder")

    def _start_own_parts(self, pretrained: Mapping[str, Tensor], fresh: list[str]) -> list[str]:
        return [f"text_decoder.{name}" for name in self.initialise_decoder(pretrained)]

    def decoder_memory(self, pixels: Tensor) -> DecoderMemory:
        """Keys and values of images `[B, 3, R, R]`, projected once for all steps and beams."""
        return self.text_decoder.memory(self.encode_image(pixels))

    def token_losses(
        self,
        pixels: Tensor,
        caption_ids: Tensor,
        caption_mask: Tensor | None = None,
        *,
        prompt_length: int,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy per caption token `[B, L - 1]`, zero for the prompt (`prompt_length` tokens) and padding."""
        mask = inputs.check_tokens(caption_ids, caption_mask, self.config)
        images, length = caption_ids.shape
        if pixels.shape[0] != images:
            raise InputError(f"there are {pixels.shape[0]} images for {images} captions")
        if not 1 <= prompt_length < length:
            raise InputError(f"prompt_length={prompt_length}; captions of {length} tokens need 1 to {length - 1}")
        if mask.device.type == "cpu" and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise InputError("caption_mask has gaps; the real tokens of a caption come first")
        groups = ImageGroups(torch.arange(images + 1, device=mask.device))
        return self.text_decoder.token_losses(
            caption_ids, mask, self.decoder_memory(pixels), groups, given=prompt_length, label_smoothing=label_smoothing
        )

    def forward(
        self,
        pixels: Tensor,
        caption_ids: Tensor,
        caption_mask: Tensor | None = None,
        *,
        prompt_length: int,
        label_smoothing: float = 0.1,
    ) -> Tensor:
        """Mean of `token_losses` over predicted tokens."""
        mask = inputs.check_tokens(caption_ids, caption_mask, self.config)
        losses = self.token_losses(
            pixels, caption_ids, mask, prompt_length=prompt_length, label_smoothing=label_smoothing
        )
        return losses.sum() / mask[:, prompt_length:].sum().clamp_min(1)

    def generate(
        self,
        pixels: Tensor,
        prompt_ids: Tensor,
        *,
        max_length: int = 20,
        min_length: int = 5,
        num_beams: int = 3,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> Tensor:
        """Generate captions `[B, length]` from prompt ids `[S]` or `[B, S]`; lengths include the prompt."""
        if prompt_ids.ndim == 1:
            prompt_ids = prompt_ids.expand(pixels.shape[0], -1)
        inputs.check_tokens(prompt_ids, None, self.config)
        with torch.no_grad():
            memory = self.decoder_memory(pixels)
        return generate(
            self.text_decoder,
            memory,
            prompt_ids,
            max_length=max_length,
            min_length=min_length,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            pad_token_id=self.config.pad_token_id,
            eos_token_id=self.config.eos_token_id,
        )
