"""X-FM in the classes of transformers: model, tokenizer, image processor, and the processor of both.

They read only what `XFM.save_pretrained` writes, and compute what `XFM.encode` computes.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.tokenization_utils_base import TruncationStrategy

from xfm_fast.checkpoint.files import CONFIG_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.errors import DataError, InputError, UnavailableError
from xfm_fast.io import write_bytes
from xfm_fast.models.hub import PREPROCESSOR_FILE, TOKENIZER_SETTINGS, Download, local_folder
from xfm_fast.models.processor import (
    XFMProcessor,
    image_pixels,
    preprocessor_settings,
    token_limit,
)
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import clean_caption

# Options that the Auto classes add.
_BOOKKEEPING = (
    "adapter_kwargs",
    "code_revision",
    "config",
    "trust_remote_code",
    "_commit_hash",
    "_from_auto",
)
_LIMIT = "model_max_length"
# A call of a fast tokenizer changes its settings, which another thread must not see.
_tokenizing = threading.Lock()


def _locate(name: str | Path, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a model, downloaded if necessary, and the options of other purposes."""
    options = {
        key: value
        for key, value in options.items()
        if key not in _BOOKKEEPING and value not in (None, "", False)
    }
    subfolder = options.pop("subfolder", "")
    download = {key: options.pop(key) for key in Download.__annotations__ if key in options}
    return local_folder(name, **download) / subfolder, options


class XFMModel(transformers.PreTrainedModel):
    """An `XFM`, its attribute `xfm`, under the interface of `CLIPModel`.

    Embeddings are L2-normalised, and logits are cosines divided by the temperature. Raises
    `UnavailableError` for a model without the contrastive head.
    """

    input_modalities = ["image", "text"]  # noqa: RUF012

    def __init__(self, config: transformers.PretrainedConfig, xfm: XFM | None = None) -> None:
        super().__init__(config)
        fields = {name: getattr(config, name) for name in XFMConfig.model_fields}
        self.xfm = xfm or XFM(XFMConfig(**fields))
        self.xfm.require_head("contrastive")

    @classmethod
    def from_pretrained(cls, name: str | Path, *inputs: Any, **options: Any) -> XFMModel:
        """Load as `XFM.from_pretrained`; the dtype is by default that of the weights."""
        path, options = _locate(name, options)
        dtype = options.setdefault("dtype", options.pop("torch_dtype", "auto"))
        if isinstance(dtype, str) and "float" in dtype:
            options["dtype"] = getattr(torch, dtype)
        xfm = XFM.from_pretrained(path, **options)
        return cls(transformers.AutoConfig.from_pretrained(path), xfm).eval()

    def save_pretrained(self, save_directory: str | Path, *inputs: Any, **options: Any) -> None:
        """Save as `XFM.save_pretrained`."""
        self.xfm.save_pretrained(save_directory)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Return the states of texts, and their contrastive features as `pooler_output`."""
        states = self.xfm.encode_text(input_ids, attention_mask)
        return BaseModelOutputWithPooling(states, self.xfm.project_text(states))

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Return the states of images, and their contrastive features as `pooler_output`."""
        states = self.xfm.encode_image(pixel_values)
        return BaseModelOutputWithPooling(states, self.xfm.project_image(states))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> CLIPOutput:
        """Compute the embeddings of texts, of images, or of both and their logits."""
        results: dict[str, Any] = {}
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask)
            results |= {"text_embeds": text.pooler_output, "text_model_output": text}
        if pixel_values is not None:
            image = self.get_image_features(pixel_values)
            results |= {"image_embeds": image.pooler_output, "vision_model_output": image}
        if not results:
            raise InputError("neither pixel_values nor input_ids were given; pass one or both")
        if len(results) == 4:
            logits = results["text_embeds"] @ results["image_embeds"].t() / self.xfm.temp
            results |= {"logits_per_text": logits, "logits_per_image": logits.t()}
        return CLIPOutput(**results)


class XFMTokenizer(transformers.PreTrainedTokenizerFast):
    """Tokenizer that cleans and truncates texts as `XFM.encode`; a text without words is `<s></s>`.

    Threads may share it.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, processor: XFMProcessor, **options: Any) -> None:
        if processor.tokenizer is None:
            raise UnavailableError(
                "the model reads images only: it has no tokenizer.json; save it with a tokenizer"
            )
        self.processor = processor
        vocabulary = processor.tokenizer.fast_options()
        limit = options[_LIMIT] = options.get(_LIMIT) or token_limit(processor.config)
        if type(limit) is not int or limit < 3:
            raise DataError(f"{TOKENIZER_SETTINGS} has {_LIMIT}={limit!r}; give 3 tokens or more")
        super().__init__(**vocabulary, add_bos_token=True, add_eos_token=True, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, *inputs: Any, **options: Any) -> Any:
        """Load as `XFMProcessor.from_pretrained`."""
        path, options = _locate(name, options)
        options = {_LIMIT: get_tokenizer_config(path).get(_LIMIT), **options}
        return cls(XFMProcessor.from_pretrained(path), **options)

    def save_pretrained(self, save_directory: str | Path, *inputs: Any, **options: Any) -> Any:
        """Save as `XFMProcessor.save_pretrained`, with the token limit."""
        self.processor.save_pretrained(save_directory)
        settings = json.dumps({_LIMIT: self.model_max_length})
        write_bytes({Path(save_directory, TOKENIZER_SETTINGS): settings.encode()})

    def _encode_plus(self, text: Any, text_pair: Any = None, *inputs: Any, **options: Any) -> Any:
        options["truncation_strategy"] = TruncationStrategy.LONGEST_FIRST
        options["max_length"] = options.get("max_length") or self.model_max_length
        with _tokenizing:
            return super()._encode_plus(
                _clean(text), text_pair and _clean(text_pair), *inputs, **options
            )


def _clean(text: Any) -> Any:
    """Clean a text, or the texts of a list."""
    return [*map(_clean, text)] if isinstance(text, list | tuple) else clean_caption(text)


class XFMImageProcessor(transformers.BaseImageProcessor):
    """Image transform of `XFM.encode`, for files, URLs, PIL images and arrays."""

    size: dict[str, int]

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """Return the stored settings, or those of the model in a folder of weights alone."""
        path, options = _locate(pretrained_model_name_or_path, options)
        if (path / PREPROCESSOR_FILE).is_file():
            return super().get_image_processor_dict(path)[0], options
        return preprocessor_settings(XFMConfig.load(path / CONFIG_FILE)), options

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Download images and convert arrays; files stay names, which `XFM.encode` opens otherwise."""
        images = image_url_or_urls
        if isinstance(images, list | tuple):
            return [*map(self.fetch_images, images)]
        if not isinstance(images, str | Path):
            return to_pil_image(images)
        return images if os.path.isfile(images) else load_image(str(images))

    def preprocess(self, images: Any, *inputs: Any, **options: Any) -> Any:
        """Return `pixel_values` `[B, 3, R, R]` of one or several images."""
        pictures = self.fetch_images(images if isinstance(images, list | tuple) else [images])
        pixels = image_pixels(pictures, self.size["height"])
        return transformers.BatchFeature({"pixel_values": pixels})


class XFMAutoProcessor(transformers.ProcessorMixin):
    """Image processor and tokenizer of X-FM."""

    def __init__(self, image_processor: XFMImageProcessor, tokenizer: XFMTokenizer) -> None:
        super().__init__(image_processor, tokenizer)

    @classmethod
    def from_pretrained(cls, name: str | Path, *inputs: Any, **options: Any) -> Any:
        """Load both; of a model without a tokenizer, return the image processor alone."""
        path, _ = _locate(name, options)
        images = XFMImageProcessor.from_pretrained(path)
        if XFMProcessor.from_pretrained(path).tokenizer is None:
            return images
        return cls(images, XFMTokenizer.from_pretrained(name, **options))

    def save_pretrained(self, save_directory: str | Path, *inputs: Any, **options: Any) -> Any:
        """Save as the tokenizer."""
        self.tokenizer.save_pretrained(save_directory)
