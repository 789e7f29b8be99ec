"""Registration of X-FM with transformers' auto classes: configuration, model and processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from xfm_fast.config import MODEL_TYPE
from xfm_fast.errors import UnavailableError
from xfm_fast.models.processor import XFMProcessor
from xfm_fast.models.xfm import XFM

_BOOKKEEPING = frozenset(
    {"adapter_kwargs", "code_revision", "trust_remote_code", "_commit_hash", "_from_auto"}
)


def register_auto_classes() -> None:
    """Register X-FM with `transformers.AutoModel`, `AutoProcessor` and `AutoConfig`.

    `AutoModel.from_pretrained` then returns an `XFM`, not a `PreTrainedModel`; it accepts `dtype`,
    `heads`, `tokenizer` and the Hub's options, and refuses others, such as `device_map`.
    `AutoProcessor` returns an `XFMProcessor`.

    Raises:
        UnavailableError: `transformers` is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UnavailableError(
            "registering X-FM needs transformers; install it (pip install '.[hf]')"
        ) from None

    class XFMAutoConfig(transformers.PretrainedConfig):
        model_type = MODEL_TYPE

    class XFMAutoModel:
        # transformers 4 compares it with the config of a text model, which does not exist here.
        config_class = XFMAutoConfig

        @staticmethod
        def from_pretrained(name: str | Path, *, config: object = None, **options: Any) -> XFM:
            options = _user_options(options)
            dtype = options.pop("dtype", options.pop("torch_dtype", torch.float32))
            if dtype == "auto":
                dtype = torch.float32
            return XFM.from_pretrained(name, dtype=dtype, **options)

    class XFMAutoProcessor(XFMProcessor):
        @classmethod
        def from_pretrained(cls, folder: str | Path, **options: Any) -> XFMProcessor:
            return XFMProcessor.from_pretrained(folder, **_user_options(options))

    # The library finds the class by its name in `preprocessor_config.json`.
    XFMAutoProcessor.__name__ = XFMProcessor.__name__
    transformers.AutoConfig.register(MODEL_TYPE, XFMAutoConfig, exist_ok=True)
    # It calls only `from_pretrained`.
    transformers.AutoModel.register(XFMAutoConfig, XFMAutoModel, exist_ok=True)
    transformers.AutoProcessor.register(XFMAutoConfig, XFMAutoProcessor, exist_ok=True)


def _user_options(options: dict[str, Any]) -> dict[str, Any]:
    """Drop the options that the auto classes add."""
    return {
        key: value
        for key, value in options.items()
        if key not in _BOOKKEEPING and value is not None
    }
