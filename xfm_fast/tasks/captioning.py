"""Image captioning: a decoder on the vision encoder continues a prompt such as "a picture of".

Recipe of the official configuration: 384 pixels, 32 images per GPU, lr 1e-5, 5 epochs, label smoothing 0.1, captions of
at most 20 tokens and at least 5, 3 beams. The official model cannot be constructed (its decoder does not know label
smoothing); this is what it means to be, and its parts were run to check it.
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
    """The vision encoder of X-FM and a decoder; language and fusion encoder are not built.

    Args:
        config: sizes.
        decoder_layers: by default as many as the encoder has whose weights the decoder starts from.
        decoder_from: that encoder. The fusion encoder has learnt to look at images, as the decoder must; the text
            encoder, the official choice, has no cross-attention, so that the decoder's starts at random.
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
        """Start the decoder from `decoder_from` of a pretraining state dict; see `TextDecoder.initialise_from`."""
        return self.text_decoder.initialise_from(state, f"{self.decoder_from}_encoder")

    def _start_own_parts(self, pretrained: Mapping[str, Tensor], fresh: list[str]) -> list[str]:
        return [f"text_decoder.{name}" for name in self.initialise_decoder(pretrained)]

    def decoder_memory(self, pixels: Tensor) -> DecoderMemory:
        """The decoder's memory of images `[B, 3, R, R]`, projected once for all steps and beams."""
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
        """Cross-entropy of every caption token: `[B, L - 1]`, zero for the prompt and for padding.

        Args:
            pixels: `[B, 3, R, R]`.
            caption_ids: `[B, L]`: `<s>`, prompt, caption, `</s>`, padding.
            caption_mask: `[B, L]`, real tokens first; by default everything but padding.
            prompt_length: tokens of `<s>` and prompt, which are given and not learnt; those that
                `CaptionTokenizer.encode_prompt` returns.
            label_smoothing: share of the target probability that is spread over the vocabulary.

        Raises:
            InputError: a caption without a token to predict, or anything the encoder cannot accept.
        """
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
        """Training loss: mean of `token_losses` over the tokens to predict. A scalar."""
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
        """Write captions; greedy with one beam.

        Args:
            pixels: `[B, 3, R, R]`.
            prompt_ids: `[S]` or `[B, S]`: `<s>` and the prompt, without `</s>` and padding, such as
                `CaptionTokenizer.encode_prompt` returns.
            max_length, min_length: in tokens, prompt included; see `models.decoder.generate`.

        Returns:
            `[B, length]` ids with prompt and `</s>`, padded.
        """
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
