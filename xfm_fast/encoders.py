"""`open_encoder`: a model that serves, indexes and embeds: of sentence-transformers, accelerated, or an X-FM.

A `LibraryEncoder` wraps a `SentenceTransformer`, `CrossEncoder` or `SparseEncoder`, so pooling, prompts, truncation and
normalisation are the library's. An `XFMEncoder` wraps an X-FM, or the session of its export, which need no
sentence-transformers and also match texts with images. PyTorch is imported when a model is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from xfm_fast.errors import CheckpointError, InputError, UnavailableError, needs
from xfm_fast.export.request import USES, Use
from xfm_fast.io import read_json
from xfm_fast.loading import (
    MANIFEST_FILE,
    EncoderSource,
    Source,
    local_path,
    open_model,
    open_session,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from xfm_fast.tasks.reranking import Rank
    from xfm_fast.tokenizer import CaptionTokenizer

Modality = Literal["text", "image"]
Role = Literal["query", "document"]
"""What a text is to a search: selects the model's prompt for it."""

# Counts changes of X-FM's image transform, which change features too.
_TRANSFORM_VERSION = 2
_FEATURE_WEIGHTS = ("vision_encoder.", "vision_proj.", "text_encoder.roberta.", "text_proj.")
_CLASSES: dict[Use, str] = {use: name for name, use in USES.items()}


def batch_tokens(device: torch.device) -> int:
    """Return the default tokens of a batch on a device."""
    return 4096 if device.type == "cpu" else 65536


class LibraryEncoder:
    """A model of sentence-transformers in evaluation mode.

    Args:
        model: The model, accelerated or not.
        source: The options that opened it.
        origin: Origin of the weights and how they run, for messages.
        fingerprint: Digest of everything that features depend on; by default computed from the model,
            before it is accelerated.

    Attributes:
        name: Name in answers and messages.
        use: What it computes.
    """

    def __init__(
        self, model: Any, source: Source, origin: str = "", fingerprint: str | None = None
    ) -> None:
        self.model, self.source, self.origin = model.eval(), source, origin
        self.name = source.label
        classes = {cls.__name__ for cls in type(model).__mro__}
        self.use: Use = next(use for use, name in _CLASSES.items() if name in classes)
        self.fingerprint = fingerprint or _fingerprint(model)
        # A call of a tokenizer changes its settings, which another thread must not see.
        self._lock = threading.Lock()

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What it embeds."""
        return tuple(name for name in ("text", "image") if name in self.model.modalities)

    @cached_property
    def width(self) -> int:
        """Numbers of a feature; entries of the vocabulary for sparse ones."""
        if self.use == "ranking":
            return self.model.num_labels
        from PIL import Image

        # The configuration may not say it, or say that of another layer.
        sample: Any = "a" if "text" in self.modalities else Image.new("RGB", (32, 32))
        return self.run(self.prepare([sample])).shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device

    @property
    def prompts(self) -> Mapping[str, str]:
        """The model's prompts by name."""
        return {name: prompt for name, prompt in self.model.prompts.items() if prompt}

    @property
    def max_tokens(self) -> int | None:
        """Tokens that the model reads of a text."""
        return self.model.max_seq_length

    @cached_property
    def whole_tokenizer(self) -> Any:
        """A fast tokenizer without truncation and padding, which threads share; None if there is no fast one."""
        tokenizer = deepcopy(getattr(self.model.tokenizer, "backend_tokenizer", None))
        if tokenizer is not None:
            tokenizer.no_truncation()
            tokenizer.no_padding()
        return tokenizer

    def token_ids(self, texts: Sequence[str | tuple[str, str]]) -> list[list[int]]:
        """Return the ids of whole texts or pairs, special ones included, for counting; safe in every thread."""
        if self.whole_tokenizer is not None:
            return [encoding.ids for encoding in self.whole_tokenizer.encode_batch_fast([*texts])]
        with self._lock:
            return self.model.tokenizer([*texts])["input_ids"]

    def prompt(self, role: Role | None = None, name: str | None = None) -> str | None:
        """Return the prompt of a name, else that of a role, else the model's default; raises `InputError`."""
        prompts = self.model.prompts
        if name is not None and name not in prompts:
            raise InputError(
                f"{self.name} has no prompt {name!r}; give one of {', '.join(prompts) or 'none'}, or leave it out"
            )
        candidates = (name, role, "passage" if role == "document" else None)
        default = self.model.default_prompt_name
        name = next((candidate for candidate in candidates if candidate in prompts), default)
        return prompts.get(name) or None

    def prepare(
        self, items: Sequence[Any], role: Role | None = None, prompt: str | None = None
    ) -> Any:
        """Make the inputs of `run` from texts or from images, in any thread; a prompt replaces that of the role.

        Raises `DataError`.
        """
        if prompt is None:
            prompt = self.prompt(role)
        with self._lock:
            return self.model.preprocess([*items], prompt=prompt, task=role)

    def run(self, inputs: Any, normalise: bool = False) -> Tensor:
        """Compute features `[items, width]` on the CPU in float32, in one thread at a time; `normalise` divides rows by
        their L2 norms.
        """
        import torch
        from sentence_transformers.util import batch_to_device
        from torch.nn.functional import normalize

        from xfm_fast.replace.calls import WholeCall

        with torch.inference_mode():
            inputs = batch_to_device({**inputs}, self.device)
            if isinstance(self.model, WholeCall):
                features = self.model.compute(inputs)
            else:
                output = "scores" if self.use == "ranking" else "sentence_embedding"
                features = self.model(inputs)[output]
            if getattr(self.model, "truncate_dim", None):
                features = features[..., : self.model.truncate_dim]
            features = features.float()
            return (normalize(features) if normalise else features).cpu()


@dataclass(frozen=True)
class XFMEncoder:
    """An X-FM with a contrastive head, whose features are L2-normalised; members are those of `LibraryEncoder`.

    Attributes:
        model: An `XFM`, or the `Session` of an export.
        rank: Ranking rule of its run, see `xfm_fast.tasks.reranking`.
    """

    model: Any
    source: Source
    fingerprint: str
    name: str = ""
    origin: str = ""
    rank: Rank = "match"
    use: ClassVar[Use] = "embedding"

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return ("image",) if self.tokenizer is None else ("text", "image")

    @cached_property
    def width(self) -> int:
        return self.model.config.embed_dim

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_tokens(self) -> int:
        from xfm_fast.models.processor import token_limit

        return token_limit(self.model.config)

    @property
    def tokenizer(self) -> CaptionTokenizer | None:
        """Tokenizer of the texts."""
        processor = getattr(self.model, "processor", None)
        return self.model.tokenizer if processor is None else processor.tokenizer

    def prepare(self, items: Sequence[Any], role: Role | None = None) -> Any:
        from xfm_fast.models.processor import image_pixels, text_tokens

        if isinstance(items[0], str):
            return text_tokens(items, self.tokenizer, self.model.config)
        return image_pixels(items, self.model.config.image_size)

    def run(self, inputs: Any) -> Tensor:
        import torch

        with torch.no_grad():
            if isinstance(inputs, tuple):
                input_ids, mask = (tensor.to(self.device) for tensor in inputs)
                features = self.model.project_text(self.model.encode_text(input_ids, mask))
            else:
                embeds = self.model.encode_image(inputs.to(self.device))
                features = self.model.project_image(embeds)
        return features.float().cpu()


Encoder = LibraryEncoder | XFMEncoder
"""A model behind the doors: `prepare` may run in any thread, `run` in one at a time."""


def is_library_model(source: Source) -> bool:
    """Return whether a source is no X-FM: no file, and its configuration, if it has one, is of another model.

    Of a name on the Hub, only the small configuration is downloaded.
    """
    from xfm_fast.checkpoint.files import model_folder
    from xfm_fast.config import MODEL_TYPE

    if source.model is None:
        return False
    path = local_path(source.model)
    if source.is_export:
        manifest = _read_object(str(path), MANIFEST_FILE) or {}
        return manifest.get("use") is not None
    config = _read_object(str(model_folder(path) or source.model), "config.json") or {}
    return not path.is_file() and config.get("model_type") != MODEL_TYPE


def open_encoder(source: str | Path | Source, *, device: str | None = None) -> Encoder:
    """Load a model that embeds or ranks, accelerated unless `source.plain`.

    Args:
        source: The options of the model; or its name, for the CPU: a folder of sentence-transformers or
            transformers, a run or folder of X-FM, an official checkpoint file, an export, or a name on the Hub.
        device: Replaces the device of the options.

    Raises:
        InputError: The options name no model or two, or do not apply to it.
        CheckpointError: The model cannot be read.
        UnavailableError: The X-FM has no contrastive head; a package, device or dtype is missing here.
    """
    if not isinstance(source, Source):
        source = EncoderSource(str(source), device="cpu")
    if device is not None:
        source = replace(source, device="cpu" if device == "cpu" else "cuda")
    if not is_library_model(source):
        return _open_xfm(source)
    return _open_export(source) if source.is_export else _open_library(source)


def _open_export(source: Source) -> LibraryEncoder:
    from xfm_fast.export.library import open_exported
    from xfm_fast.export.session.graphs import GraphSession

    source.check()
    folder = local_path(source.model or "")
    device = None if source.device == "auto" else source.device
    session = GraphSession.load(folder, getattr(source, "runtime", "auto"), device)
    manifest = session.manifest
    arithmetic = manifest.options.get("arithmetic", manifest.dtype)
    origin = f"{manifest.source}, exported in {arithmetic}, by {session.description}"
    return LibraryEncoder(open_exported(session), source, origin, session.fingerprint()[:32])


def _open_xfm(source: Source) -> XFMEncoder:
    from xfm_fast.models.xfm import PRECISIONS

    if source.is_export:
        opened = open_session(source)
        if "contrastive" not in opened.model.heads:
            raise UnavailableError(f"{source} has no contrastive head; export a model that has one")
        fingerprint = opened.model.fingerprint()[:32]
    else:
        opened = open_model(
            replace(source, dtype=None), needs=("contrastive",), tasks=("retrieval",), device="cpu"
        )
        # Before the cast, so that an index made in bf16 fits the same model in fp32.
        fingerprint = xfm_fingerprint(opened.model)
        opened.model.to(source.choose_device()).cast(PRECISIONS[source.dtype or "fp32"]).eval()
    return XFMEncoder(opened.model, source, fingerprint, opened.name, opened.origin, opened.rank)


def _open_library(source: Source) -> LibraryEncoder:
    import torch

    with needs("hf"):
        import sentence_transformers
        import transformers
    from xfm_fast.models.xfm import PRECISIONS

    if not hasattr(sentence_transformers.SentenceTransformer, "preprocess"):
        raise UnavailableError(
            f"sentence-transformers {sentence_transformers.__version__} is installed; 6 or newer opens {source} here"
        )
    source.check()
    for name in ("config", "image_size", "tokenizer"):
        if getattr(source, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} applies to X-FM, and {source} is another model; leave it out"
            )
    assert source.model is not None
    path = local_path(source.model)
    location = str(path) if path.is_dir() else source.model
    device = source.choose_device()
    # The libraries repeat each request for 20 s.
    download = {} if path.is_dir() or _reaches_hub(location) else {"local_files_only": True}
    use = _use_of(location, **download)
    transformers.utils.logging.disable_progress_bar()
    try:
        model: Any = getattr(sentence_transformers, _CLASSES[use])(
            location, device="cpu", **download
        )
    except Exception as error:  # the libraries raise anything for a foreign file
        from xfm_fast.models.hub import first_line

        raise CheckpointError(
            f"{source} cannot be opened by sentence-transformers ({first_line(error)}); check its name and files"
        ) from error
    missing = next((name for name, value in model.named_parameters() if value.is_meta), None)
    if missing is not None:
        raise CheckpointError(f"{source} lacks the weights of {missing}; give complete files")
    fingerprint = _fingerprint(model)
    precision = PRECISIONS[source.dtype or "fp32"]
    # The libraries open a model in the dtype of its file.
    model.to(device, precision if isinstance(precision, torch.dtype) else torch.float32)
    origin = _accelerate(model.requires_grad_(False).eval(), source, precision)
    return LibraryEncoder(model, source, f"{source}, {origin}", fingerprint)


def _accelerate(model: Any, source: Source, precision: torch.dtype | str) -> str:
    """Accelerate a model in place; returns a description of how it runs."""
    from xfm_fast.replace import accelerate

    dtype = source.dtype or "fp32"
    if precision in ("int8", "fp8"):
        report = accelerate(model, dtype=precision, unpad=True)
        return f"{report.share:.0%} accelerated in {dtype}"
    if getattr(source, "plain", False):
        return f"not accelerated, in {dtype}"
    frozen: list[dict[str, Any]] = [{"freeze": True}] if model.device.type == "cpu" else []
    for options in (*frozen, {}):
        try:
            report = accelerate(model, unpad=True, **options)
        except InputError:
            continue
        return f"{report.share:.0%} accelerated in {dtype}"
    return f"not accelerated, since no layer of it is known, in {dtype}"


def _reaches_hub(name: str) -> bool:
    """Return whether the Hub answers, with the model or not."""
    from huggingface_hub import repo_exists

    try:
        repo_exists(name)
    except Exception:  # its HTTP libraries raise errors of their own
        return False
    return True


def _use_of(location: str, **download: Any) -> Use:
    """Return what a model computes, from its files."""
    settings = _read_object(location, "config_sentence_transformers.json", **download) or {}
    for use, name in _CLASSES.items():
        if settings.get("model_type") == name:
            return use
    config = _read_object(location, "config.json", **download) or {}
    architectures = config.get("architectures") or [""]
    is_classifier = str(architectures[0]).endswith("ForSequenceClassification")
    return "ranking" if is_classifier and not settings else "embedding"


def _read_object(location: str, file: str, **download: Any) -> dict[str, Any] | None:
    """Read a JSON object of a folder or a name on the Hub; None if there is none."""
    try:
        path = Path(location, file)
        if not os.path.isdir(location):
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(location, file, **download))
        value = read_json(path)
    except (ImportError, OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _fingerprint(model: Any) -> str:
    """Digest weights, tokenizer and settings of a model of sentence-transformers."""
    settings: list[Any] = [model.prompts, getattr(model, "truncate_dim", None)]
    for module in model:
        config = getattr(module, "get_config_dict", dict)()
        settings.append([type(module).__name__, config])
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    tokenizer = "" if backend is None else backend.to_str()
    return _digest(json.dumps(settings, sort_keys=True, default=str) + tokenizer, model)


def xfm_fingerprint(model: Any) -> str:
    """Digest what features of an X-FM depend on; of its weights in fp32."""
    settings = f"{_TRANSFORM_VERSION} {model.config.image_size}"
    return _digest(settings, model, _FEATURE_WEIGHTS)


def _digest(settings: str, model: Any, names: tuple[str, ...] = ("",)) -> str:
    """Digest settings, and the weights whose names begin so."""
    from xfm_fast.tasks.evaluation import checksum

    digest = hashlib.sha256(settings.encode())
    for name, tensor in model.state_dict().items():
        if name.startswith(names):
            digest.update(f"{name} {[*tensor.shape]} {checksum(tensor):08x}".encode())
    return digest.hexdigest()[:32]
