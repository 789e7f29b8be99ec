"""XFMConfig: the validated hyper-parameters of an X-FM model, from presets or from the official files."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import psutil
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xfm_fast.errors import ConfigError, explain_types
from xfm_fast.io import MOST_YAML_BYTES, advice, parse_json, parse_yaml, read_bytes

PresetName = Literal["tiny", "base"]

MODEL_TYPE = "xfm"

# Sizes in the official constructors, and the published config.json of roberta-base.
_BEIT_SIZES = {
    "base": {"vision_width": 768, "vision_depth": 12, "vision_heads": 12},
    "large": {"vision_width": 1024, "vision_depth": 24, "vision_heads": 16},
}
_ROBERTA_BASE = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_MAX_INTEGER = 2**31 - 1
# Memory of a layer's Python objects, in numbers of 4 bytes.
_LAYER = 10_000
_PRESETS: dict[str, dict[str, Any]] = {
    "base": {},
    "tiny": {
        "image_size": 32,
        "patch_size": 8,
        "vision_width": 64,
        "vision_depth": 3,
        "vision_heads": 4,
        "text_width": 64,
        "text_layers": 3,
        "text_heads": 4,
        "text_intermediate": 128,
        "vocab_size": 512,
        "max_positions": 66,
        "fusion_layers": 3,
        "embed_dim": 32,
        "num_masking_patches": 6,
        "min_num_patches": 2,
    },
}


class XFMConfig(BaseModel):
    """Hyper-parameters of an X-FM model (arXiv 2301.05065). The defaults are the base model.

    Build one with `XFMConfig.preset`, `XFMConfig.from_official` or by keyword. Instances are immutable;
    `replace` returns a changed copy. An impossible combination raises `ConfigError`, and so does a model
    whose weights exceed the memory of this machine, because the numbers may come from an untrusted file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    image_size: int = Field(
        224, gt=0, description="input resolution in pixels, a multiple of patch_size"
    )
    patch_size: int = Field(16, gt=0)
    vision_width: int = Field(768, gt=0)
    vision_depth: int = Field(12, gt=0)
    vision_heads: int = Field(12, gt=0)
    vision_mlp_ratio: float = Field(4.0, gt=0)
    vision_layer_norm_eps: float = Field(1e-6, gt=0)
    layer_scale_init: float = Field(
        0.1, gt=0, description="initial LayerScale gamma of every vision block"
    )
    drop_path_rate: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth of the last block; linear from 0"
    )
    local_attn_depth: int = Field(
        -1,
        description="number of last vision blocks in which a region attends only to its patches; "
        "<= 0 pools the patches of the region instead",
    )

    text_width: int = Field(768, gt=0)
    text_layers: int = Field(12, ge=0)
    text_heads: int = Field(12, gt=0)
    text_intermediate: int = Field(3072, gt=0)
    text_layer_norm_eps: float = Field(1e-5, gt=0)
    vocab_size: int = Field(50265, gt=4)
    max_positions: int = Field(
        514, gt=2, description="rows of the position table; the first pad_token_id+1 hold no token"
    )
    type_vocab_size: int = Field(1, gt=0)
    pad_token_id: int = Field(1, ge=0)
    bos_token_id: int = Field(0, ge=0)
    eos_token_id: int = Field(2, ge=0)
    hidden_dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.1, ge=0, lt=1)

    mask_token: int | None = Field(
        None,
        ge=0,
        description="id of the token that stands for a hidden word; by default the last of the vocabulary",
    )

    fusion_layers: int = Field(12, ge=0)
    fusion_layer_norm_eps: float | None = Field(
        None, gt=0, description="by default that of the text encoder"
    )
    embed_dim: int = Field(256, gt=0, description="width of the contrastive space")
    head_layer_norm_eps: float = Field(1e-5, gt=0)
    temperature: float = Field(
        0.07, gt=0, description="initial temperature of the contrastive loss"
    )
    min_temperature: float = Field(0.001, gt=0)
    max_temperature: float = Field(0.5, gt=0)
    learnable_temperature: bool = True

    num_masking_patches: int = Field(
        75, gt=0, description="patches hidden by masked image modelling"
    )
    min_num_patches: int = Field(
        16, gt=0, description="smallest block that the mask generator draws"
    )
    mim_patches_only: bool = Field(
        False, description="leave the pooled image token out of the MIM loss"
    )
    codebook_size: int = Field(
        8192, gt=1, description="codes of an image tokenizer, for the head `codes` of MIM"
    )
    detach_text_for_mlm: bool = Field(
        True, description="stop the gradient of image-conditioned MLM at the text encoder"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) > _MAX_INTEGER:
                raise ValueError(f"{name}={value} is too large; use at most {_MAX_INTEGER:,}")
        for width, heads in (("vision_width", "vision_heads"), ("text_width", "text_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width}={getattr(self, width)} is not divisible by {heads}={getattr(self, heads)}; change one"
                )
        if self.image_size % self.patch_size:
            lower = self.image_size // self.patch_size * self.patch_size
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; "
                f"use {lower or self.patch_size} or {lower + self.patch_size}"
            )
        if self.local_attn_depth > self.vision_depth:
            raise ValueError(
                f"local_attn_depth={self.local_attn_depth} exceeds vision_depth={self.vision_depth}; "
                f"use at most {self.vision_depth}"
            )
        if self.pad_token_id + 1 >= self.max_positions:
            raise ValueError(
                f"max_positions={self.max_positions} ends at pad_token_id; use at least {self.pad_token_id + 2}"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token"):
            if (getattr(self, name) or 0) >= self.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} lies outside vocab_size={self.vocab_size}"
                )
        if not self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError(
                f"temperature={self.temperature} lies outside "
                f"[min_temperature={self.min_temperature}, max_temperature={self.max_temperature}]"
            )
        if self.num_masking_patches > self.num_patches:
            raise ValueError(
                f"num_masking_patches={self.num_masking_patches} exceeds {self.num_patches} patches; lower it"
            )
        self._check_memory()
        return self

    def _check_memory(self) -> None:
        """Refuse a model that exceeds memory, by a lower bound of its fp32 size, before anything is allocated."""
        text, vision, inner = self.text_width, self.vision_width, self.text_intermediate
        # Python integers are unbounded, floats are not.
        mlp = int(min(vision * self.vision_mlp_ratio, 1e30))
        vision_block = 4 * vision**2 + 2 * vision * mlp + _LAYER
        tables = (2 * self.grid - 1) ** 2 * self.vision_heads * self.vision_depth
        text_layer = 4 * text**2 + 2 * text * inner + _LAYER
        fusion_layer = 6 * text**2 + 2 * text * (inner + vision) + _LAYER
        numbers = {
            "vision_depth vision_width vision_mlp_ratio": self.vision_depth * vision_block,
            "image_size patch_size vision_depth": tables + self.num_image_tokens**2,
            "patch_size vision_width": 3 * self.patch_size**2 * vision,
            "text_layers text_width text_intermediate": self.text_layers * text_layer,
            "fusion_layers text_width text_intermediate": self.fusion_layers * fusion_layer,
            "vocab_size text_width": self.vocab_size * text,
            "max_positions text_width": self.max_positions * text,
            "type_vocab_size text_width": self.type_vocab_size * text,
            "embed_dim vision_width text_width": self.embed_dim * (vision + text),
        }
        needed, available = 4 * sum(numbers.values()), _available_memory()
        if needed > available:
            largest = max(numbers, key=numbers.__getitem__)
            fields = ", ".join(f"{name}={getattr(self, name)}" for name in largest.split())
            raise ValueError(
                f"{fields}: the model needs {needed / 1e9:,.1f} GB and this machine has "
                f"{available / 1e9:,.1f}; use smaller sizes"
            )

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def num_image_tokens(self) -> int:
        """Output tokens of the vision encoder: the image token and the patches."""
        return self.num_patches + 1

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token, the last one of RoBERTa's vocabulary."""
        return self.vocab_size - 1 if self.mask_token is None else self.mask_token

    @property
    def max_text_length(self) -> int:
        """Longest sequence that the position table covers."""
        return self.max_positions - self.pad_token_id - 1

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' Trainer disables the cache on every model's config; this model has no such field.
        if name != "use_cache":
            super().__setattr__(name, value)

    def replace(self, **changes: Any) -> XFMConfig:
        """Return a copy with some fields changed, validated again."""
        return XFMConfig(**(self.model_dump() | changes))

    def resized(self, image_size: int | None) -> XFMConfig:
        """Return a copy for another resolution; `num_masking_patches` is limited to its patches."""
        if image_size in (None, self.image_size):
            return self
        masked = max(1, min(self.num_masking_patches, (image_size // self.patch_size) ** 2))
        return self.replace(image_size=image_size, num_masking_patches=masked)

    @classmethod
    @explain_types
    def preset(cls, name: PresetName, **overrides: Any) -> XFMConfig:
        """Return `base` (the published model) or `tiny` (same structure, runs in milliseconds), overriding fields."""
        if name not in _PRESETS:
            raise ConfigError(
                f"preset {name!r} is unknown; choose one of {', '.join(sorted(_PRESETS))}"
            )
        return cls(**(_PRESETS[name] | overrides))

    @classmethod
    @explain_types
    def from_official(
        cls,
        source: dict[str, Any] | str | Path,
        *,
        roberta: dict[str, Any] | str | Path | None = None,
        **overrides: Any,
    ) -> XFMConfig:
        """Read the official description of a model.

        Args:
            source: a mapping, or the path of a YAML or JSON file: the official training YAML
                (`image_res`, `use_beit_v2`, `vision_config`, `text_encoder`, ...) or the flat form with
                `vision_width`, `text_width`, ...
            roberta: RoBERTa's `config.json` (mapping or path), for the YAML form. By default it is read
                from the folder in `text_encoder`; if that folder is missing and called `roberta-base`,
                the published sizes are used.
            overrides: fields of this class that take precedence.
        """
        folder = Path.cwd()
        if not isinstance(source, dict):
            folder = Path(source).resolve().parent
            source = _read_mapping(Path(source))
        try:
            if "text_width" in source:
                fields = _read_flat(source)
            else:
                fields = _read_training_yaml(source, roberta, folder)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            # A value of another type, for example a list for a number.
            raise ConfigError(
                f"the official configuration has a value of the wrong type ({error}); correct it"
            ) from None
        return cls(**(fields | overrides))

    @classmethod
    @explain_types
    def load(cls, path: str | Path) -> XFMConfig:
        """Read a `config.json` written by `save_pretrained`."""
        values = _read_mapping(Path(path))
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ConfigError(
                f"{path} has model_type {model_type!r}, not {MODEL_TYPE!r}; give a folder written by save_pretrained"
            )
        return cls(**values)

    def to_json(self) -> str:
        """Serialise to a `config.json` that `load` reads; `model_type` identifies it to other libraries."""
        return json.dumps({"model_type": MODEL_TYPE, **self.model_dump()}, indent=2) + "\n"


@cache
def _available_memory() -> int:
    """Return the memory available to this process, in bytes."""
    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):
        # The container's limit, or "max".
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(map(str, problem["loc"]))
        message = advice(problem)
        if not field:
            lines.append(message)
        elif problem["type"] == "extra_forbidden":
            names = ", ".join(sorted(XFMConfig.model_fields))
            lines.append(f"{field} is not a field of XFMConfig (fields: {names})")
        else:
            lines.append(f"{field}={problem['input']!r}: {message}")
    return "; ".join(lines)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        # YAML reads JSON too, but reads 1e-06 as a string; the suffix decides.
        text = read_bytes(path, MOST_YAML_BYTES)
        value = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except OSError as error:
        raise ConfigError(
            f"configuration {path} cannot be read ({error}); check the path"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"configuration {path} is not valid {path.suffix.lstrip('.') or 'YAML'}: {error}"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"configuration {path} is a {type(value).__name__}; give a mapping of names to values"
        )
    for name in value:
        if not isinstance(name, str):
            raise ConfigError(f"configuration {path} has the key {name!r}; keys must be strings")
    return value


def _require(source: dict[str, Any], name: str) -> Any:
    if name not in source:
        raise ConfigError(
            f"the official configuration lacks {name!r}; add it or pass an XFMConfig built by keyword"
        )
    return source[name]


def _check_fusion_split(source: dict[str, Any], text_layers: int) -> None:
    """Refuse X-VLM layouts, where language and fusion layers share a stack: the same keys describe other models."""
    text_start = source.get("text_fusion_start_at", text_layers)
    if text_start < text_layers:
        raise ConfigError(
            f"text_fusion_start_at={text_start} adds cross-attention to the text encoder; set it to {text_layers}"
        )
    fusion_start = source.get("fusion_fusion_start_at", 0)
    if fusion_start != 0:
        raise ConfigError(
            f"fusion_fusion_start_at={fusion_start} omits cross-attention in fusion layers; set it to 0"
        )


_ROBERTA_KEYS = {
    "hidden_size": "text_width",
    "num_attention_heads": "text_heads",
    "intermediate_size": "text_intermediate",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "text_layer_norm_eps",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_SHARED_KEYS = {
    "embed_dim": "embed_dim",
    "temp": "temperature",
    "min_temp": "min_temperature",
    "max_temp": "max_temperature",
    "learnable_temp": "learnable_temperature",
    "num_masking_patches": "num_masking_patches",
    "min_num_patches": "min_num_patches",
    "mim_cls_only": "mim_patches_only",
    "codebook_size": "codebook_size",
    "detach_text_forMLM": "detach_text_for_mlm",
    "local_attn_depth": "local_attn_depth",
}


# Keys of the flat form that differ from ours, and keys that it may omit.
_FLAT_KEYS = {"image_size": "image_res", "vocab_size": "vocab", "max_positions": "max_pos"}
_OPTIONAL_FLAT_KEYS = {
    "layer_scale_init": "init_values",
    "head_layer_norm_eps": "head_mlp_layer_norm_eps",
}


def _shared_fields(source: dict[str, Any]) -> dict[str, Any]:
    fields = {}
    for key, name in _SHARED_KEYS.items():
        if key in source:
            value = source[key]
            # YAML 1.1 reads "1e-3" as a string.
            fields[name] = float(value) if isinstance(value, str) else value
    return fields


def _read_flat(source: dict[str, Any]) -> dict[str, Any]:
    fields = _shared_fields(source)
    for name in (
        "image_size",
        "patch_size",
        "vision_width",
        "vision_depth",
        "vision_heads",
        "text_width",
        "text_layers",
        "text_heads",
        "text_intermediate",
        "fusion_layers",
        "vocab_size",
        "max_positions",
    ):
        fields[name] = _require(source, _FLAT_KEYS.get(name, name))
    for name in (
        "vision_mlp_ratio",
        "layer_scale_init",
        "vision_layer_norm_eps",
        "text_layer_norm_eps",
        "head_layer_norm_eps",
        "type_vocab_size",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ):
        key = _OPTIONAL_FLAT_KEYS.get(name, name)
        if key in source:
            fields[name] = source[key]
    _check_fusion_split(source, fields["text_layers"])
    return fields


def _read_training_yaml(
    source: dict[str, Any], roberta: dict[str, Any] | str | Path | None, folder: Path
) -> dict[str, Any]:
    for option in ("use_clip_vit", "use_swin"):
        if source.get(option):
            raise ConfigError(
                f"{option}=True selects another vision encoder; xfm-fast builds BEiT-v2: set use_beit_v2"
            )
    if not source.get("use_beit_v2"):
        raise ConfigError("use_beit_v2 is not set; xfm-fast builds the BEiT-v2 vision encoder only")
    vision_config = str(_require(source, "vision_config"))
    size = next((name for name in _BEIT_SIZES if name in Path(vision_config).name), None)
    if size is None:
        raise ConfigError(
            f"vision_config={vision_config!r} names neither a base nor a large BEiT-v2"
        )
    text = _read_roberta(roberta, str(_require(source, "text_encoder")), folder)
    # Image classification runs without text, and GLUE without fusion layers: 0 is a legal number of layers.
    text_layers = source.get("text_num_hidden_layers", 12)
    _check_fusion_split(source, text_layers)
    fields = _shared_fields(source) | _BEIT_SIZES[size]
    for key, name in _ROBERTA_KEYS.items():
        fields[name] = text[key]
    return fields | {
        "image_size": _require(source, "image_res"),
        "patch_size": _require(source, "patch_size"),
        "text_layers": text_layers,
        "fusion_layers": _require(source, "fusion_num_hidden_layers"),
    }


def _read_roberta(
    source: dict[str, Any] | str | Path | None, text_encoder: str, folder: Path
) -> dict[str, Any]:
    """Read RoBERTa's configuration from `source`, or else from the folder `text_encoder`."""
    if isinstance(source, dict):
        return _ROBERTA_BASE | source
    if source is not None:
        path = Path(source)
        return _ROBERTA_BASE | _read_mapping(path / "config.json" if path.is_dir() else path)
    for path in (folder / text_encoder / "config.json", Path(text_encoder) / "config.json"):
        if path.is_file():
            return _ROBERTA_BASE | _read_mapping(path)
    if Path(text_encoder).name == "roberta-base":
        return dict(_ROBERTA_BASE)
    raise ConfigError(
        f"text_encoder={text_encoder!r} has no config.json; pass roberta=<its config.json>"
    )
