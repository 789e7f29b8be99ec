"""The gain of `accelerate` for one's own model: opened, accelerated in each way, verified, timed in rounds.

A model is a folder, a name on the Hugging Face Hub or `timm:NAME`. Nothing of a folder is executed: weights are
safetensors or read with weights_only, and remote code is ignored.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.checkpoint.files import model_folder
from xfm_fast.config import MODEL_TYPE
from xfm_fast.data.images import decode_image
from xfm_fast.errors import CheckpointError, DataError, InputError, UnavailableError
from xfm_fast.io import read_bytes, read_json
from xfm_fast.kernels.cpu import int8
from xfm_fast.loading import MANIFEST_FILE
from xfm_fast.replace import accelerate
from xfm_fast.testing import bundled, captions_table

from ..measure import Backend, Call, Case, Progress, Run, benchmark
from ..options import TryOptions
from ..record import UNTOUCHED, Document, Extra
from ..timing import DTYPES, one_line
from .drop_in import INT8_BAND, TITLE

TIMM = "timm:"
_EXAMPLES, _PHOTOS, _MOST_TOKENS = 32, 8, 512
_MOST_TEXT_BYTES = 64 << 20
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Configuration, tokenizer and weights, and no code.
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors"]
# A gain within what chance makes of two runs of one thing is none.
_WORTH = 1.03
# Calls of `accelerate` as source code, with their options.
_TEXT_CALLS: dict[str, dict[str, Any]] = {
    "accelerate(model)": {},
    "accelerate(model, unpad=True)": {"unpad": True},
    "accelerate(model, unpad=True, freeze=True)": {"unpad": True, "freeze": True},
    'accelerate(model, unpad=True, dtype="int8")': {"unpad": True, "dtype": "int8"},
}
_IMAGE_CALLS: dict[str, dict[str, Any]] = {
    "accelerate(model)": {}, 'accelerate(model, dtype="int8")': {"dtype": "int8"}
}  # fmt: skip


@dataclass
class Batch:
    """Inputs of one call by keyword (or one input under an empty name): `items` of a `unit`, `words` for readers."""

    arguments: dict[str, Tensor]
    items: int
    unit: str
    words: str
    notes: list[str] = field(default_factory=list)

    def run(self, model: nn.Module) -> Any:
        """The model's output, with floating-point inputs in the dtype of its parameters."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.arguments.items()}
        return model(inputs[""]) if "" in inputs else model(**inputs)

    def first(self) -> Batch:
        """The shortest text without padding, or one image."""
        mask = self.arguments.get("attention_mask")
        if mask is None:
            return Batch(
                {name: value[:1] for name, value in self.arguments.items()},
                1,
                self.unit,
                "one image",
            )
        row = int(mask.sum(1).argmin())
        length = int(mask[row].sum())
        chosen = {
            name: value[row : row + 1, :length]
            if value.shape == mask.shape
            else value[row : row + 1]
            for name, value in self.arguments.items()
        }
        return Batch(chosen, 1, self.unit, f"one text of {length} tokens")


@dataclass
class Opened:
    """A model in evaluation mode; `size` is the side of its images in pixels, `notes` are for readers."""

    name: str
    model: nn.Module
    folder: Path | None = None
    size: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def takes_texts(self) -> bool:
        """True if the model has an argument `input_ids`."""
        return "input_ids" in inspect.signature(self.model.forward).parameters

    @property
    def takes_images(self) -> bool:
        """True for models of timm, and with an argument `pixel_values`."""
        return (
            self.folder is None
            or "pixel_values" in inspect.signature(self.model.forward).parameters
        )


def open_model(name: str) -> Opened:
    """Open a model.

    Raises `CheckpointError` if there is no model of that name or its files do not fit, `UnavailableError` for a package
    that is not installed, `InputError` for a class that is unknown here.
    """
    if name.startswith(TIMM):
        return _open_timm(name)
    folder = _model_folder(name)
    config = _read_json(folder / "config.json")
    own = model_folder(folder)
    sizes = _read_json(own / "config.json") if own else None
    if (folder / MANIFEST_FILE).is_file() or (
        isinstance(sizes, dict) and sizes.get("model_type") == MODEL_TYPE
    ):
        raise InputError(
            f"{name} is an X-FM, which needs no accelerate; xfm-fast bench --model measures it"
        )
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder} has no config.json; give the folder that save_pretrained wrote"
        )
    try:
        import transformers
    except ImportError:
        raise UnavailableError(f"{name} needs transformers; pip install '.[hf]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not config.get("model_type"):
        raise InputError(
            f"{folder / 'config.json'} has no model_type, which selects the class of transformers"
        )
    architectures = [kind for kind in config.get("architectures") or [] if isinstance(kind, str)]
    known = [getattr(transformers, kind, None) for kind in architectures] or [None]
    if "auto_map" in config and None in known:
        raise InputError(
            f"{name} brings code of its own for {', '.join(architectures)}, which is not run; open it yourself and "
            "call xfm_fast.accelerate(model, verify=batch)"
        )
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise CheckpointError(
            f"{folder} has no model.safetensors; give the folder that save_pretrained wrote"
        )
    kind: Any = next(filter(None, known), transformers.AutoModel)
    try:
        model = kind.from_pretrained(str(folder), local_files_only=True, weights_only=True)
    except Exception as error:  # transformers raises anything for a foreign file
        raise CheckpointError(
            f"{name} cannot be opened by transformers ({one_line(error)}); check its files"
        ) from error
    missing = sorted(key for key, p in model.named_parameters() if p.is_meta)
    if missing:
        raise CheckpointError(
            f"{name} lacks weights of {missing[0]} and {len(missing) - 1} more; give complete files"
        )
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
    # transformers 5 opens a model in the dtype of its file.
    return Opened(
        name, model.float().eval(), folder, size[0] if isinstance(size, list | tuple) else size
    )


def _open_timm(name: str) -> Opened:
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError:
        raise UnavailableError(f"{name} needs timm; pip install '.[hf]'") from None
    kind = name.removeprefix(TIMM)
    if not timm.is_model(kind.split(".")[0]):
        near = ", ".join(get_close_matches(kind, timm.list_models(), n=3))
        raise InputError(
            f"timm has no model {kind!r}; near it are {near or 'none, see timm.list_models()'}"
        )
    # The values of weights do not change times.
    model = timm.create_model(kind, pretrained=False).eval()
    size = resolve_model_data_config(model)["input_size"][-1]
    return Opened(name, model, size=size, notes=["its weights are random: they change no time"])


def _model_folder(name: str) -> Path:
    """The folder of a path, or of a model of the Hub, which is downloaded if it is not in the cache."""
    path = Path(name)
    if path.is_dir():
        # sentence-transformers keeps the encoder in this folder, or in one that modules.json names.
        modules = _read_json(path / "modules.json")
        first = modules[0].get("path") if isinstance(modules, list) and modules else None
        inner = isinstance(first, str) and first and (path / first / "config.json").is_file()
        return path / str(first) if inner else path
    if path.exists():
        raise CheckpointError(
            f"{name} is a file; give its folder, or a file of X-FM to xfm-fast bench --model"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} is no folder; check the path")
    try:
        import huggingface_hub
    except ImportError:
        raise UnavailableError(
            f"{name} is no folder here; if it is a model on the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_DOWNLOADED))
    except Exception as error:  # its HTTP libraries raise errors of their own
        raise CheckpointError(
            f"{name} is no folder here, and cannot be fetched from the Hugging Face Hub ({one_line(error)}); check the "
            "name and the connection, or download it and give the folder"
        ) from error


def _read_json(file: Path) -> Any:
    """The content of a file, or None if there is none."""
    try:
        return read_json(file) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({one_line(error)}); check the file"
        ) from error


def read_texts(file: Path) -> list[str]:
    """The lines of a UTF-8 file that are not empty; raises `DataError`."""
    try:
        content = read_bytes(file, _MOST_TEXT_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(
            f"--inputs {file} cannot be read ({one_line(error)}); give a UTF-8 file, a text a line"
        ) from error
    texts = [line.strip() for line in content.splitlines() if line.strip()]
    if not texts:
        raise DataError(f"--inputs {file} has no line with text; give a text a line")
    return texts


def example_texts() -> list[str]:
    """Texts of mixed length: one to six captions of the package's photographs in a row."""
    table = captions_table()
    captions = cycle([caption for photo in table["photos"] for caption in photo["captions"]])
    return [", ".join(islice(captions, 1 + number % 6)) for number in range(_EXAMPLES)]


def text_batch(opened: Opened, texts: list[str]) -> Batch:
    """Texts as a model reads them, padded to the longest; raises `DataError` for a tokenizer that does not fit."""
    # The text tower of a model with two.
    tower: Any = getattr(opened.model, "text_model", opened.model)
    known = int(tower.get_input_embeddings().weight.shape[0])
    config: Any = opened.model.config
    config = getattr(config, "text_config", config)
    pad = getattr(config, "pad_token_id", None) or 0
    # The positions of RoBERTa begin behind that of its padding.
    positions = (getattr(config, "max_position_embeddings", None) or _MOST_TOKENS) - (
        2 if pad else 0
    )
    most = max(1, min(_MOST_TOKENS, positions))
    notes: list[str] = []
    assert opened.folder is not None
    if any(
        (opened.folder / file).is_file()
        for file in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")
    ):
        import transformers

        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                str(opened.folder), local_files_only=True
            )
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
            encoded = dict(
                tokenizer(
                    texts, padding=True, truncation=True, max_length=most, return_tensors="pt"
                )
            )
        except Exception as error:  # tokenizers raises anything for a foreign file
            reason = one_line(error)
            raise DataError(
                f"the tokenizer of {opened.name} cannot be used ({reason}); check its files"
            ) from error
        arguments = {"attention_mask": torch.ones_like(encoded["input_ids"]), **encoded}
    else:
        notes.append(
            "it has no tokenizer, so ids are made up: as many as the texts have words, and a third more"
        )
        sizes = torch.tensor([min(most, 2 + len(text.split()) * 4 // 3) for text in texts])
        mask = torch.arange(int(sizes.max())) < sizes[:, None]
        ids = torch.randint(
            min(5, known - 1), known, mask.shape, generator=torch.Generator().manual_seed(0)
        )
        arguments = {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long()}
    highest = int(arguments["input_ids"].max())
    if highest >= known:
        raise DataError(
            f"the tokenizer of {opened.name} does not fit it: it gives the id {highest}, and the model knows {known} "
            "ids; give the tokenizer that it was trained with"
        )
    mask = arguments["attention_mask"]
    lengths, share = mask.sum(1).tolist(), float(mask.float().mean())
    notes.append(f"{1 - share:.0%} of the tokens of the batch are padding")
    accepted = inspect.signature(opened.model.forward).parameters
    words = f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens"
    return Batch(
        {k: v for k, v in arguments.items() if k in accepted}, len(texts), "texts", words, notes
    )


def image_batch(opened: Opened, folder: Path | None) -> Batch:
    """Images at the model's size, scaled to about [-1, 1]; raises `DataError` for a folder without images."""
    from torchvision.transforms.functional import normalize, resize, to_tensor

    notes: list[str] = []
    images: list[Any] = []
    if folder is None:
        try:
            images = bundled().images[:_PHOTOS]
        except DataError:
            notes.append(
                "no photographs are installed, so the images are noise: they change no time"
            )
    else:
        try:
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)[
                :_PHOTOS
            ]
        except OSError as error:
            raise DataError(
                f"--inputs {folder} cannot be read ({one_line(error)}); check its permissions"
            ) from error
        if not files:
            raise DataError(
                f"--inputs {folder} holds no image ({', '.join(_SUFFIXES)}); name a folder of images"
            )
        images = [decode_image(file, file.name) for file in files]
    size = opened.size or 224
    pixels = [
        normalize(resize(to_tensor(i.convert("RGB")), [size, size]), [0.5] * 3, [0.5] * 3)
        for i in images
    ]
    noise = torch.randn(_PHOTOS, 3, size, size, generator=torch.Generator().manual_seed(0))
    batch = torch.stack(pixels) if pixels else noise
    name = "" if opened.folder is None else "pixel_values"
    return Batch(
        {name: batch}, len(batch), "images", f"{len(batch)} images at {size} px", notes=notes
    )


@dataclass(frozen=True)
class Line:
    """Python to paste, with its speed over the untouched model in that model's dtype.

    `outputs` are the same but for rounding in that dtype, or within a percentage of the largest value.
    """

    outputs: str
    speedup: float
    code: str


@dataclass
class Trial:
    """The result of trying a model, with notes for the reader.

    `lines` are the fastest call with the same outputs, and calls in other dtypes that are faster still. The list is
    empty if the untouched model is as fast.
    """

    document: Document
    lines: list[Line]
    notes: list[str]


def run(
    name: str, options: TryOptions, progress: Progress | None = None, command: Sequence[str] = ()
) -> Trial:
    """Try a model by its name, as `open_model` takes it. Ctrl-C keeps what was measured."""
    opened = open_model(name)
    batch = _batch(opened, options)
    # What is not recognised is reported before anything is timed; the copy shares the weights, and is thrown away.
    report = accelerate(_shared_copy(opened.model))
    document = _trial(options, progress, command, model=name, opened=opened, batch=batch)
    begins = (f"{len(report.replaced)} modules replaced", "unknown: ")
    notes = [
        *opened.notes,
        *batch.notes,
        *(line for line in str(report).splitlines() if line.startswith(begins)),
    ]
    return Trial(document, *advice(document, batch.words, notes))


@benchmark("try", title=TITLE, reference=UNTOUCHED)
def _trial(run: Run, model: str, opened: Opened, batch: Batch) -> Iterator[Case]:
    run.progress.begin(2)
    run.probe()
    quick = run.options.quick
    rounded = run.options.dtype in ((), ("auto",)) and int8.why_not() is None
    calls = _TEXT_CALLS if batch.unit == "texts" else _IMAGE_CALLS
    calls = {
        call: options
        for call, options in calls.items()
        if rounded or options.get("dtype") != "int8"
    }
    for one in (batch, batch.first()):
        run.progress.stage(one.words)
        backends, reports = _backends(opened, one, calls, run.dtypes)

        def count(
            backend: Backend, result: object, reports: dict[str, list[str]] = reports
        ) -> Extra:
            return {"replaced": reports[backend.name]} if backend.name in reports else {}

        yield Case(
            "try", one.words, backends, one.unit, one.items, judge=UNTOUCHED,
            reference=lambda dtype, one=one: _output(one, copy.deepcopy(opened.model).to(DTYPES[dtype])),
            count=count, rounds=2 if quick else 5, budget_s=0.0 if quick else 15.0,
        )  # fmt: skip
        row = next(
            (row for row in run.document.rows if (row.backend, row.name) == (UNTOUCHED, one.words)),
            None,
        )
        if row is not None and row.status == "failed":
            raise InputError(
                f"{opened.name} does not run on {one.words} as it is ({row.reason}); give another batch"
            )


def _backends(
    opened: Opened, batch: Batch, calls: dict[str, dict[str, Any]], dtypes: Sequence[str]
) -> tuple[list[Backend], dict[str, list[str]]]:
    """Backends of every call in every dtype and of the untouched model; the reports of calls, filled in when built."""
    models: dict[str, nn.Module] = {"fp32": opened.model}
    reports: dict[str, list[str]] = {}

    def untouched(dtype: str) -> nn.Module:
        if dtype not in models:
            models[dtype] = copy.deepcopy(opened.model).to(DTYPES[dtype])
        return models[dtype]

    def accelerated(call: str, options: dict[str, Any], dtype: str) -> Call:
        changes_weights = options.get("freeze") or options.get("dtype") == "int8"
        fast = (
            copy.deepcopy(untouched(dtype)) if changes_weights else _shared_copy(untouched(dtype))
        )
        reports[call] = str(accelerate(fast, **options)).splitlines()
        return partial(_output, batch, fast)

    found = []
    for dtype in dtypes:
        for call, options in calls.items():
            build = partial(accelerated, call, options, dtype)
            if options.get("dtype") != "int8":
                found.append(Backend(call, dtype, build))
            elif dtype == dtypes[0]:
                found.append(Backend(call, "int8", build, band=INT8_BAND, optional=True))
    for dtype in dtypes:
        found.append(
            Backend(UNTOUCHED, dtype, lambda dtype=dtype: partial(_output, batch, untouched(dtype)))
        )
    return found, reports


def advice(document: Document, words: str, notes: list[str]) -> tuple[list[Line], list[str]]:
    """Return the lines to paste and the sentences, by the times of the whole batch."""
    rows = [row for row in document.rows if row.measured and row.name == words and row.rate]
    # The model as it is, unless another dtype was asked for.
    own = "fp32" if any(row.dtype == "fp32" for row in rows) else "bf16"
    untouched = next((row.rate for row in rows if not row.ours and row.dtype == own), None)
    if untouched is None:
        return [], [*notes, "the model was not measured; give a smaller batch"]
    lines: list[Line] = []
    best = untouched
    for dtype in (own, *(each for each in ("bf16", "int8") if each != own)):
        ours = [row for row in rows if row.ours and row.dtype == dtype]
        row = max(ours, key=lambda row: row.rate or 0.0, default=None)
        if row is None or row.rate is None or row.rate < _WORTH * best:
            continue
        best = row.rate
        error = 1.0 if row.parity is None or row.parity.error is None else row.parity.error
        convert = "import torch; model.to(torch.bfloat16); " if dtype == "bf16" else ""
        outputs = "same outputs" if dtype == own else f"within {max(1, math.ceil(100 * error))}%"
        lines.append(
            Line(outputs, best / untouched, f"{convert}import xfm_fast; xfm_fast.{row.backend}")
        )
    return lines, notes if lines else [*notes, "no gain here; leave the model as it is"]


def _batch(opened: Opened, options: TryOptions) -> Batch:
    """The inputs of the options, or examples of what the model takes; for both towers of CLIP texts and images."""
    inputs, kind = options.inputs, f"{opened.name} ({type(opened.model).__name__})"
    if not (opened.takes_texts or opened.takes_images):
        raise InputError(
            f"{kind} takes neither input_ids nor pixel_values, so no batch can be made for it; call "
            "xfm_fast.accelerate(model, verify=batch) with one of yours"
        )
    images = inputs if inputs is not None and inputs.is_dir() else None
    texts = inputs if images is None else None
    if images is not None and not opened.takes_images:
        raise InputError(
            f"--inputs {inputs} is a folder of images, and {kind} takes none; give a file of texts"
        )
    if texts is not None and not opened.takes_texts:
        raise InputError(
            f"--inputs {inputs} is no folder of images, and {kind} takes no texts; give one"
        )
    if not opened.takes_texts:
        return image_batch(opened, images)
    lines = example_texts() if texts is None else read_texts(texts)
    batch = text_batch(opened, lines[:4] if options.quick else lines)
    if opened.takes_images:
        pixels = image_batch(opened, images)
        batch.arguments |= pixels.arguments
        batch.words += f" and {pixels.words}"
        batch.notes += pixels.notes
    return batch


def _shared_copy(model: nn.Module) -> nn.Module:
    """The same model in other modules, with the same parameters and buffers."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _output(batch: Batch, model: nn.Module) -> Tensor:
    """All floating-point outputs in one vector, without those of padding, which have no meaning."""
    output, mask = batch.run(model), batch.arguments.get("attention_mask")
    leaves = output.to_tuple() if hasattr(output, "to_tuple") else output
    parts = []
    for leaf in pytree.tree_leaves(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            part = leaf[mask.bool()] if mask is not None and leaf.shape[:2] == mask.shape else leaf
            # Each output is compared with its own largest value.
            largest = part.detach().abs().max().clamp(min=torch.finfo(part.dtype).tiny)
            parts.append((part / largest).flatten())
    if not parts:
        raise InputError(f"{type(model).__name__} returned no numbers that could be compared")
    return torch.cat(parts)
