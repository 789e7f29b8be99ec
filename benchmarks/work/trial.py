"""The gain of `accelerate` for one's own model: opened, accelerated in each way, verified, timed in rounds.

A model is a folder, a name on the Hugging Face Hub or `timm:NAME`. Nothing of a folder is executed: weights are
safetensors or read with weights_only, and remote code is ignored. What `--against` names runs the encoder behind the
same tokenizer and pooling, in the same rounds.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.data.images import decode_image
from xfm_fast.encoders import is_library_model, open_encoder
from xfm_fast.errors import (
    CheckpointError,
    DataError,
    InputError,
    UnavailableError,
    XFMError,
    needs,
)
from xfm_fast.io import read_bytes, read_json
from xfm_fast.kernels.cpu import int8
from xfm_fast.loading import EncoderSource
from xfm_fast.replace import accelerate
from xfm_fast.testing import bundled, captions_table

from ..backends import graph
from ..measure import Backend, Benchmark, Call, Case, Progress, Run
from ..options import TryOptions
from ..record import OURS, UNTOUCHED, Document, Extra, Result
from ..timing import DTYPES, one_line, why_not_compiled
from .drop_in import INT8_BAND, TITLE, Subject, other_runtimes

TIMM = "timm:"
_EXAMPLES, _PHOTOS, _MAX_TOKENS = 32, 8, 512
_MAX_TEXT_BYTES = 64 << 20
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Configuration, tokenizer and weights, and no code.
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors"]
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")
# A smaller gain may be chance: two runs of one thing differ by as much.
_MIN_GAIN = 1.03
# What `--against` names, with its packages.
_RIVALS: dict[str, tuple[str, ...]] = {
    "compile": (),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torchao": ("torchao",),
}
# Errors allowed of others, which are reported: in fp32 rounding in another order, else whatever their users get.
_RIVAL_BANDS = {"fp32": 1e-4, "bf16": 2.0, "int8": 2.0}
# Calls of `accelerate` as source code, with their options.
_TEXT_CALLS: dict[str, dict[str, Any]] = {
    "accelerate(model)": {},
    "accelerate(model, unpad=True)": {"unpad": True},
    "accelerate(model, unpad=True, freeze=True)": {"unpad": True, "freeze": True},
    'accelerate(model, unpad=True, dtype="int8")': {"unpad": True, "dtype": "int8"},
}
_IMAGE_CALLS: dict[str, dict[str, Any]] = {
    "accelerate(model)": {},
    'accelerate(model, dtype="int8")': {"dtype": "int8"},
}


@dataclass
class Batch:
    """Inputs of one call by keyword (or one input under an empty name): `items` of a `unit`, `words` for readers.

    `texts` are those that were encoded.
    """

    arguments: dict[str, Tensor]
    items: int
    unit: str
    words: str
    notes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def mask(self) -> Tensor | None:
        """The attention mask of texts."""
        return self.arguments.get("attention_mask")

    def run(self, model: nn.Module) -> Any:
        """Call the model, with floating-point inputs in the dtype of its parameters."""
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = next(floats, torch.float32)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.arguments.items()}
        return model(inputs[""]) if "" in inputs else model(**inputs)

    def first(self) -> Batch:
        """Return the shortest text without padding, or one image."""
        row, length, words = 0, None, "one image"
        if self.mask is not None:
            row = int(self.mask.sum(1).argmin())
            length = int(self.mask[row].sum())
            words = f"one text of {length} tokens"
        item = {}
        for name, value in self.arguments.items():
            item[name] = value[row : row + 1]
            if self.mask is not None and value.shape == self.mask.shape:
                item[name] = item[name][:, :length]
        return Batch(item, 1, self.unit, words)


@dataclass
class WholeCall:
    """A call of a model of sentence-transformers as its users make it: `encode` of texts, or `predict` of pairs."""

    method: str
    texts: list[Any]
    mask: ClassVar[None] = None

    @property
    def items(self) -> int:
        """Number of texts or pairs."""
        return len(self.texts)

    @property
    def unit(self) -> str:
        """Name of an item."""
        return "texts" if self.method == "encode" else "pairs"

    @property
    def words(self) -> str:
        """Description of the call, for readers."""
        sizes = sorted(map(_word_count, self.texts))
        if len(sizes) == 1:
            return f"{self.method}, one {self.unit[:-1]} of {sizes[0]} words"
        return f"{self.method}, {len(sizes)} {self.unit} of {sizes[0]} to {sizes[-1]} words"

    def run(self, model: Any) -> Any:
        """Call the model."""
        return getattr(model, self.method)(self.texts)

    def first(self) -> WholeCall:
        """Return the shortest text or pair."""
        return WholeCall(self.method, [min(self.texts, key=_word_count)])


def _word_count(item: str | tuple[str, str]) -> int:
    return len((item if isinstance(item, str) else " ".join(item)).split())


@dataclass
class Opened:
    """A model in evaluation mode; `size` is the side of its images in pixels, `notes` are for readers.

    `root` is the folder of a model of sentence-transformers, and `folder` that of its encoder.
    """

    name: str
    model: nn.Module
    root: Path | None = None
    folder: Path | None = None
    size: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def takes_texts(self) -> bool:
        """Whether the model has an argument `input_ids`."""
        return "input_ids" in inspect.signature(self.model.forward).parameters

    @property
    def takes_images(self) -> bool:
        """Whether the model is of timm or has an argument `pixel_values`."""
        parameters = inspect.signature(self.model.forward).parameters
        return self.folder is None or "pixel_values" in parameters


def open_model(name: str) -> Opened:
    """Open a model.

    Raises `CheckpointError` if there is no model of that name or its files do not fit, `UnavailableError` for a package
    that is not installed, `InputError` for a class that is unknown here.
    """
    if name.startswith(TIMM):
        return _open_timm(name)
    root = _model_folder(name)
    folder = _encoder_folder(root)
    if not is_library_model(EncoderSource(str(folder))):
        raise InputError(
            f"{name} is an X-FM, which needs no accelerate; xfm-fast bench --model measures it"
        )
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder} has no config.json; give the folder that save_pretrained wrote"
        )
    with needs("hf"):
        import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    architectures = [item for item in config.get("architectures") or [] if isinstance(item, str)]
    classes: list[Any] = [getattr(transformers, item, None) for item in architectures] or [None]
    if "auto_map" in config and None in classes:
        raise InputError(
            f"{name} brings code of its own for {', '.join(architectures)}, which is not run; open it yourself and "
            "call xfm_fast.accelerate(model, verify=batch)"
        )
    model_class = next(filter(None, classes), transformers.AutoModel)
    try:
        model = model_class.from_pretrained(str(folder), local_files_only=True, weights_only=True)
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
    size = size[0] if isinstance(size, list | tuple) else size
    # transformers 5 opens a model in the dtype of its file.
    return Opened(name, model.float().eval(), root, folder, size)


def _open_timm(name: str) -> Opened:
    with needs("hf"):
        import timm
        from timm.data import resolve_model_data_config
    architecture = name.removeprefix(TIMM)
    if not timm.is_model(architecture.split(".")[0]):
        near = ", ".join(get_close_matches(architecture, timm.list_models(), n=3))
        near = near or "none, see timm.list_models()"
        raise InputError(f"timm has no model {architecture!r}; near it are {near}")
    # The values of weights do not change times.
    model = timm.create_model(architecture, pretrained=False).eval()
    size = resolve_model_data_config(model)["input_size"][-1]
    return Opened(name, model, size=size, notes=["its weights are random: they change no time"])


def _model_folder(name: str) -> Path:
    """Return the folder of a path, or of a model of the Hub, downloaded if it is not in the cache."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{name} is a file; give its folder, or a file of X-FM to xfm-fast bench --model"
        )
    with needs("hf"):
        import huggingface_hub
    try:
        if "/" not in name and not huggingface_hub.repo_exists(name):
            name = f"sentence-transformers/{name}"
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_DOWNLOADED))
    except Exception as error:  # its HTTP libraries raise errors of their own
        raise CheckpointError(
            f"{name} is no folder here, and cannot be fetched from the Hugging Face Hub ({one_line(error)}); check the "
            "name and the connection, or download it and give the folder"
        ) from error


def _encoder_folder(root: Path) -> Path:
    """Return the folder of the encoder: the root, or for sentence-transformers one that modules.json names."""
    modules = _read_json(root / "modules.json")
    encoder = modules[0].get("path") if isinstance(modules, list) and modules else None
    if isinstance(encoder, str) and (root / encoder / "config.json").is_file():
        return root / encoder
    return root


def _open_library(opened: Opened) -> tuple[nn.Module, str] | None:
    """Open the model of sentence-transformers around an encoder, with the name of its call; None if there is none.

    The encoder of `opened` becomes that of the model, which has the same weights.
    """
    root, config = opened.root, getattr(opened.model, "config", None)
    if root is None:
        return None
    scores_pairs = type(opened.model).__name__.endswith("ForSequenceClassification")
    scores_pairs = scores_pairs and getattr(config, "num_labels", 0) == 1
    if not (scores_pairs or (root / "modules.json").is_file()):
        return None
    try:
        encoder: Any = open_encoder(EncoderSource(str(root), device="cpu", plain=True))
        inner = _inner(encoder.model)
    except (XFMError, AttributeError) as error:
        opened.notes.append(f"whole calls were not measured: {error}")
        return None
    if type(inner) is type(opened.model):
        opened.model = inner
    return encoder.model, "predict" if encoder.use == "ranking" else "encode"


def _inner(model: Any) -> nn.Module:
    """Return the encoder of a model of sentence-transformers."""
    return model[0].auto_model


def _read_json(file: Path) -> Any:
    """Read a file, or return None if there is none."""
    try:
        return read_json(file) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({one_line(error)}); check the file"
        ) from error


def read_texts(file: Path) -> list[str]:
    """Read the lines of a UTF-8 file that are not empty; raises `DataError`."""
    try:
        content = read_bytes(file, _MAX_TEXT_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(
            f"--inputs {file} cannot be read ({one_line(error)}); give a UTF-8 file, a text a line"
        ) from error
    texts = [line.strip() for line in content.splitlines() if line.strip()]
    if not texts:
        raise DataError(f"--inputs {file} has no line with text; give a text a line")
    return texts


def example_texts() -> list[str]:
    """Return texts of mixed length: one to six captions of the package's photographs in a row."""
    table = captions_table()
    captions = cycle([caption for photo in table["photos"] for caption in photo["captions"]])
    return [", ".join(islice(captions, 1 + index % 6)) for index in range(_EXAMPLES)]


def text_batch(opened: Opened, texts: list[str]) -> Batch:
    """Encode texts as a model reads them, padded to the longest; raises `DataError` if its tokenizer does not fit."""
    # The text tower of a model with two.
    tower: Any = getattr(opened.model, "text_model", opened.model)
    vocabulary = int(tower.get_input_embeddings().weight.shape[0])
    config: Any = opened.model.config
    config = getattr(config, "text_config", config)
    pad = getattr(config, "pad_token_id", None) or 0
    positions = getattr(config, "max_position_embeddings", None) or _MAX_TOKENS
    # The positions of RoBERTa begin behind that of its padding.
    longest = max(1, min(_MAX_TOKENS, positions - (2 if pad else 0)))
    notes: list[str] = []
    assert opened.folder is not None
    if any((opened.folder / file).is_file() for file in _TOKENIZER_FILES):
        arguments = _tokenize(opened, texts, longest)
    else:
        notes.append(
            "it has no tokenizer, so ids are made up: as many as the texts have words, and a third more"
        )
        sizes = torch.tensor([min(longest, 2 + len(text.split()) * 4 // 3) for text in texts])
        mask = torch.arange(int(sizes.max())) < sizes[:, None]
        generator = torch.Generator().manual_seed(0)
        low = min(5, vocabulary - 1)
        ids = torch.randint(low, vocabulary, mask.shape, generator=generator)
        arguments = {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long()}
    highest = int(arguments["input_ids"].max())
    if highest >= vocabulary:
        raise DataError(
            f"the tokenizer of {opened.name} does not fit it: it gives the id {highest}, and the model has "
            f"{vocabulary} ids; give the tokenizer that it was trained with"
        )
    mask = arguments["attention_mask"]
    lengths, padding = mask.sum(1).tolist(), 1 - float(mask.float().mean())
    notes.append(f"{padding:.0%} of the tokens of the batch are padding")
    accepted = inspect.signature(opened.model.forward).parameters
    words = f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens"
    arguments = {name: tensor for name, tensor in arguments.items() if name in accepted}
    return Batch(arguments, len(texts), "texts", words, notes)


def _tokenize(opened: Opened, texts: list[str], longest: int) -> dict[str, Tensor]:
    """Encode texts by the tokenizer in a model's folder."""
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            str(opened.folder), local_files_only=True
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        encoded = tokenizer(
            texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        return {"attention_mask": torch.ones_like(encoded["input_ids"]), **encoded}
    except Exception as error:  # tokenizers raises anything for a foreign file
        raise DataError(
            f"the tokenizer of {opened.name} cannot be used ({one_line(error)}); check its files"
        ) from error


def image_batch(opened: Opened, folder: Path | None) -> Batch:
    """Read images at the model's size, scaled to about [-1, 1]; raises `DataError` for a folder without images."""
    from torchvision.transforms.functional import normalize, resize, to_tensor

    notes: list[str] = []
    if folder is not None:
        images = _read_images(folder)
    else:
        try:
            images = bundled().images[:_PHOTOS]
        except DataError:
            images = []
            notes.append(
                "no photographs are installed, so the images are noise: they change no time"
            )
    size = opened.size or 224
    if images:
        half = [0.5] * 3
        tensors = (resize(to_tensor(image.convert("RGB")), [size, size]) for image in images)
        pixels = torch.stack([normalize(tensor, half, half) for tensor in tensors])
    else:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(_PHOTOS, 3, size, size, generator=generator)
    name = "" if opened.folder is None else "pixel_values"
    words = f"{len(pixels)} images at {size} px"
    return Batch({name: pixels}, len(pixels), "images", words, notes)


def _read_images(folder: Path) -> list[Any]:
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    except OSError as error:
        raise DataError(
            f"--inputs {folder} cannot be read ({one_line(error)}); check its permissions"
        ) from error
    if not files:
        raise DataError(
            f"--inputs {folder} holds no image ({', '.join(_SUFFIXES)}); name a folder of images"
        )
    return [decode_image(file, file.name) for file in files[:_PHOTOS]]


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
    empty if the untouched model is as fast. `charts` are of the batch and of one item.
    """

    document: Document
    lines: list[Line]
    notes: list[str]
    charts: list[Chart]


class Chart(NamedTuple):
    """The fastest result of each backend and dtype, best first, by how far its outputs are from those of `base`."""

    title: str
    groups: dict[str, list[Result]]
    base: Result


def run(
    name: str, options: TryOptions, progress: Progress | None = None, command: Sequence[str] = ()
) -> Trial:
    """Try a model by its name, as `open_model` takes it. Ctrl-C keeps what was measured."""
    _check_rivals(options)
    opened = open_model(name)
    batch = _batch(opened, options)
    subjects: list[tuple[nn.Module, Batch | WholeCall]] = []
    if batch.texts and (library := _open_library(opened)) is not None:
        model, method = library
        query, *passages = texts = batch.texts
        pairs = [(query, passage) for passage in passages or texts]
        subjects.append((model, WholeCall(method, texts if method == "encode" else pairs)))
    subjects.append((opened.model, batch))
    # Unrecognised modules are reported before anything is timed; the copy shares the weights, and is thrown away.
    report = accelerate(_shared_copy(opened.model))
    benchmark = Benchmark("try", TITLE, UNTOUCHED, _cases)
    document = benchmark(options, progress, command, model=name, subjects=subjects)
    begins = (f"{len(report.replaced)} modules replaced", "unknown: ")
    replaced = [line for line in str(report).splitlines() if line.startswith(begins)]
    notes = [*opened.notes, *batch.notes, *replaced]
    inputs = subjects[0][1]
    charts = _charts(document, [inputs.words, inputs.first().words])
    return Trial(document, *advice(document, inputs.words, notes), charts)


def _check_rivals(options: TryOptions) -> None:
    """Raise `InputError` for an unknown name, `UnavailableError` for one that is not installed."""
    missing = {
        name: [package for package in packages if find_spec(package) is None]
        for name, packages in _RIVALS.items()
    }
    for name in options.against:
        if name not in _RIVALS:
            raise InputError(f"--against {name} is unknown; choose from {', '.join(_RIVALS)}")
        if missing[name]:
            present = ", ".join(rival for rival, packages in missing.items() if not packages)
            raise UnavailableError(
                f"--against {name} needs {', '.join(missing[name])}, not installed; pip install "
                f"{' '.join(missing[name])}, or choose from {present}"
            )
    if "compile" in options.against and (reason := why_not_compiled(torch.device("cpu"))):
        raise UnavailableError(f"--against compile: {reason}; install one")
    if "torchao" in options.against and not _measures_int8(options):
        raise InputError("--against torchao is int8, which --dtype leaves out; leave --dtype out")


def _measures_int8(options: TryOptions) -> bool:
    return options.dtype in ((), ("auto",))


def _cases(
    run: Run, model: str, subjects: list[tuple[nn.Module, Batch | WholeCall]]
) -> Iterator[Case]:
    """Yield the batch, and one item of it: in whole calls, if the model has them, then in the forward pass."""
    calls = [
        (subject, inputs)
        for subject, batch in subjects
        for inputs in ([batch, batch.first()] if batch.items > 1 else [batch])
    ]
    run.progress.begin(len(calls))
    run.probe()
    for subject, inputs in calls:
        run.progress.stage(inputs.words)
        yield _case(run, subject, inputs, against=subject is subjects[0][0])
        for row in run.document.rows:
            untouched = (row.backend, row.name) == (UNTOUCHED, inputs.words)
            if untouched and row.status == "failed":
                raise InputError(
                    f"{model} does not run on {inputs.words} as it is ({row.reason}); give another batch"
                )


def _case(run: Run, subject: nn.Module, inputs: Batch | WholeCall, *, against: bool) -> Case:
    """Return the case of every call in every dtype, of the untouched model, and of others."""
    # torch.compile keeps few versions of a function and then runs it eagerly: forget those of other cases.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    dtypes, quick, int8_too = run.dtypes, run.options.quick, _measures_int8(run.options)
    models: dict[str, nn.Module] = {"fp32": subject}
    facts: dict[tuple[str, str], Extra] = {}

    def model(dtype: str) -> nn.Module:
        if dtype not in models:
            models[dtype] = copy.deepcopy(subject).to(DTYPES[dtype])
        return models[dtype]

    def backend(
        name: str, dtype: str, prepare: Callable[[], Any], label: str = "", **fields: Any
    ) -> Backend:
        prepared: list[Any] = []

        def build() -> Call:
            start = time.perf_counter()
            prepared.append(prepare())
            inputs.run(prepared[0])
            facts.setdefault((name, dtype), {})["build_s"] = time.perf_counter() - start
            return partial(inputs.run, prepared[0])

        return Backend(name, dtype, build, label, lambda: _output(inputs, prepared[0]), **fields)

    def accelerated(call: str, options: dict[str, Any], dtype: str, key: str) -> nn.Module:
        changes_weights = options.get("freeze") or options.get("dtype") == "int8"
        fast = copy.deepcopy(model(dtype)) if changes_weights else _shared_copy(model(dtype))
        facts[call, key] = {"replaced": str(accelerate(fast, **options)).splitlines()}
        return fast

    def reference(dtype: str) -> Tensor:
        return _output(inputs, copy.deepcopy(subject).to(DTYPES[dtype]))

    backends = []
    for dtype in dtypes:
        for call, options in (_IMAGE_CALLS if inputs.unit == "images" else _TEXT_CALLS).items():
            if options.get("dtype") != "int8":
                prepare = partial(accelerated, call, options, dtype, dtype)
                backends.append(backend(call, dtype, prepare))
            elif dtype == dtypes[0] and int8_too and int8.why_not() is None:
                prepare = partial(accelerated, call, options, dtype, "int8")
                backends.append(backend(call, "int8", prepare, band=INT8_BAND, optional=True))
    backends += [backend(UNTOUCHED, dtype, partial(model, dtype)) for dtype in dtypes]
    if against:
        backends += _rivals(run, subject, inputs, model, backend)
    return Case(
        "try",
        inputs.words,
        backends,
        inputs.unit,
        inputs.items,
        judge=UNTOUCHED,
        reference=reference,
        count=lambda backend, result: facts.get((backend.name, backend.dtype), {}),
        rounds=2 if quick else 5,
        budget_s=0.0 if quick else 15.0,
    )


def _rivals(
    run: Run,
    subject: nn.Module,
    inputs: Batch | WholeCall,
    model: Callable[[str], nn.Module],
    backend: Callable[..., Backend],
) -> list[Backend]:
    """Return what `--against` names, in the dtypes to measure."""
    names, encoder = run.options.against, _inner if isinstance(inputs, WholeCall) else _itself
    dtypes = [*run.dtypes, *(["int8"] if _measures_int8(run.options) else [])]

    def adapted(change: Callable[[nn.Module], None], dtype: str) -> nn.Module:
        copied = _shared_copy(model(dtype))
        change(encoder(copied))
        return copied

    backends = []
    if "compile" in names:
        for dtype in run.dtypes:
            prepare = partial(adapted, graph.compile_module, dtype)
            backends.append(backend("compile", dtype, prepare, "torch.compile"))
    runtimes = [item for item in graph.RUNTIMES if item.name in names and item.dtype in dtypes]
    if runtimes:
        run.progress.step("exporting to ONNX")
        work = Subject(subject, inputs.run, inputs.items, encoder)
        backends += other_runtimes(work, runtimes, run.scratch / "model.onnx", backend)
    if "torchao" in names:
        prepare = partial(adapted, graph.quantize_module, run.dtypes[0])
        backends.append(backend("torchao", "int8", prepare, "torchao"))
    for rival in backends:
        # In the only dtype that was asked for, rounding is no excuse.
        rival.band = None if rival.dtype == "bf16" == dtypes[0] else _RIVAL_BANDS[rival.dtype]
    return backends


def _itself(model: nn.Module) -> nn.Module:
    return model


def advice(document: Document, words: str, notes: list[str]) -> tuple[list[Line], list[str]]:
    """Return the lines to paste and the notes, by the times of the whole batch."""
    rows = [row for row in document.measured if row.name == words]
    base = _base(rows)
    if base is None or base.rate is None:
        return [], [*notes, "the model was not measured; give a smaller batch"]
    lines: list[Line] = []
    best = base.rate
    for dtype in dict.fromkeys((base.dtype, "bf16", "int8")):
        ours = [row for row in rows if row.ours and row.dtype == dtype]
        row = max(ours, key=lambda row: row.rate or 0.0, default=None)
        if row is None or row.rate is None or row.rate < _MIN_GAIN * best:
            continue
        best = row.rate
        code = f"import xfm_fast; xfm_fast.{row.backend}"
        if row.dtype == "bf16":
            code = f"import torch; model.to(torch.bfloat16); {code}"
        lines.append(Line(_outputs(_percent(row, base)), best / base.rate, code))
    return lines, notes if lines else [*notes, "no gain here; leave the model as it is"]


def _base(rows: Sequence[Result]) -> Result | None:
    """Return the row of the model as it is: in fp32, unless another dtype was asked for."""
    untouched = {row.dtype: row for row in rows if row.backend == UNTOUCHED}
    return untouched.get("fp32") or untouched.get("bf16")


def _percent(row: Result, base: Result) -> int:
    """Return how far outputs in another dtype are from those of `base`."""
    if row.dtype == base.dtype:
        return 0
    error = 1.0 if row.parity is None or row.parity.error is None else row.parity.error
    return max(1, math.ceil(100 * error))


def _outputs(percent: int) -> str:
    return f"within {percent}%" if percent else "same outputs"


def _charts(document: Document, names: Sequence[str]) -> list[Chart]:
    """Return a chart of each case by its name; those without numbers are left out."""
    charts = []
    for name in dict.fromkeys(names):
        rows = [row for row in document.measured if row.name == name]
        base = _base(rows)
        if base is None:
            continue
        best: dict[tuple[str, str], Result] = {}
        for row in sorted(rows, key=lambda row: row.rate or 0.0, reverse=True):
            best.setdefault((OURS if row.ours else row.backend, row.dtype), row)
        percents = sorted({_percent(row, base) for row in best.values()})
        groups = {
            _outputs(percent): [row for row in best.values() if _percent(row, base) == percent]
            for percent in percents
        }
        charts.append(Chart(name, groups, base))
    return charts


def _batch(opened: Opened, options: TryOptions) -> Batch:
    """Return the inputs of the options, or examples; texts and images for a model with two towers."""
    inputs, model = options.inputs, f"{opened.name} ({type(opened.model).__name__})"
    if not (opened.takes_texts or opened.takes_images):
        raise InputError(
            f"{model} takes neither input_ids nor pixel_values, so no batch can be made for it; call "
            "xfm_fast.accelerate(model, verify=batch) with one of yours"
        )
    images = inputs if inputs is not None and inputs.is_dir() else None
    texts = inputs if images is None else None
    if images is not None and not opened.takes_images:
        raise InputError(
            f"--inputs {inputs} is a folder of images, and {model} takes none; give a file of texts"
        )
    if texts is not None and not opened.takes_texts:
        raise InputError(
            f"--inputs {inputs} is no folder of images, and {model} takes no texts; give one"
        )
    if not opened.takes_texts:
        return image_batch(opened, images)
    lines = example_texts() if texts is None else read_texts(texts)
    lines = lines[:4] if options.quick else lines
    batch = text_batch(opened, lines)
    batch.texts = lines
    if opened.takes_images:
        pixels = image_batch(opened, images)
        batch.arguments |= pixels.arguments
        batch.words += f" and {pixels.words}"
        batch.notes += pixels.notes
    return batch


def _shared_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model, which share its parameters and buffers."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _output(inputs: Batch | WholeCall, model: nn.Module) -> Tensor:
    """Return all floating-point outputs in one vector, without those of padding, which have no meaning."""
    output, mask, values = inputs.run(model), inputs.mask, list[Tensor]()
    leaves = output.to_tuple() if hasattr(output, "to_tuple") else output
    for leaf in pytree.tree_leaves(leaves):
        if isinstance(leaf, np.ndarray):
            leaf = torch.from_numpy(leaf)
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        leaf = leaf.to_dense()
        if mask is not None and leaf.shape[:2] == mask.shape:
            leaf = leaf[mask.bool()]
        # Each output is compared with its own largest value.
        largest = leaf.detach().abs().max().clamp(min=torch.finfo(leaf.dtype).tiny)
        values.append((leaf / largest).flatten())
    if not values:
        raise InputError(f"{type(model).__name__} returned no numbers that could be compared")
    return torch.cat(values)
