"""The models of `xfm-fast try`: a folder, a name on the Hugging Face Hub or `timm:NAME`, with a batch that fits.

Nothing of a folder is executed: weights are safetensors or read with weights_only, and remote code is ignored.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.checkpoint.files import model_folder
from xfm_fast.config import MODEL_TYPE
from xfm_fast.data.images import decode_image
from xfm_fast.errors import CheckpointError, DataError, InputError, UnavailableError
from xfm_fast.io import read_bytes, read_json
from xfm_fast.loading import MANIFEST_FILE

from ..inputs import bundled, captions_table
from ..timing import one_line

TIMM = "timm:"
_TEXTS, _IMAGES, _MOST_TOKENS = 32, 8, 512
_MOST_TEXT_BYTES = 64 << 20
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Configuration, tokenizer and weights, and no code.
_DOWNLOADED = ["*.json", "*.txt", "*.model", "*.safetensors"]


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
            return Batch({name: value[:1] for name, value in self.arguments.items()}, 1, self.unit, "one image")
        row = int(mask.sum(1).argmin())
        length = int(mask[row].sum())
        chosen = {
            name: value[row : row + 1, :length] if value.shape == mask.shape else value[row : row + 1]
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
        return self.folder is None or "pixel_values" in inspect.signature(self.model.forward).parameters


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
    if (folder / MANIFEST_FILE).is_file() or (isinstance(sizes, dict) and sizes.get("model_type") == MODEL_TYPE):
        raise InputError(f"{name} is an X-FM, which needs no accelerate; xfm-fast bench --model measures it")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder} has no config.json; give the folder that save_pretrained wrote")
    try:
        import transformers
    except ImportError:
        raise UnavailableError(f"{name} needs transformers; pip install 'xfm-fast[hf]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not config.get("model_type"):
        raise InputError(f"{folder / 'config.json'} has no model_type, which selects the class of transformers")
    architectures = [kind for kind in config.get("architectures") or [] if isinstance(kind, str)]
    known = [getattr(transformers, kind, None) for kind in architectures] or [None]
    if "auto_map" in config and None in known:
        raise InputError(
            f"{name} brings code of its own for {', '.join(architectures)}, which is not run; open it yourself and "
            "call xfm_fast.accelerate(model, verify=batch)"
        )
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise CheckpointError(f"{folder} has no model.safetensors; give the folder that save_pretrained wrote")
    kind: Any = next(filter(None, known), transformers.AutoModel)
    try:
        model = kind.from_pretrained(str(folder), local_files_only=True, weights_only=True)
    except Exception as error:  # transformers raises anything for a foreign file
        raise CheckpointError(
            f"{name} cannot be opened by transformers ({one_line(error)}); check its files"
        ) from error
    missing = sorted(key for key, p in model.named_parameters() if p.is_meta)
    if missing:
        raise CheckpointError(f"{name} lacks weights of {missing[0]} and {len(missing) - 1} more; give complete files")
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
    return Opened(name, model.eval(), folder, size[0] if isinstance(size, list | tuple) else size)


def _open_timm(name: str) -> Opened:
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError:
        raise UnavailableError(f"{name} needs timm; pip install 'xfm-fast[hf]'") from None
    kind = name.removeprefix(TIMM)
    if not timm.is_model(kind.split(".")[0]):
        near = ", ".join(get_close_matches(kind, timm.list_models(), n=3))
        raise InputError(f"timm has no model {kind!r}; near it are {near or 'none, see timm.list_models()'}")
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
        raise CheckpointError(f"{name} is a file; give its folder, or a file of X-FM to xfm-fast bench --model")
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
        raise CheckpointError(f"{file} cannot be read ({one_line(error)}); check the file") from error


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
    return [", ".join(islice(captions, 1 + number % 6)) for number in range(_TEXTS)]


def text_batch(opened: Opened, texts: list[str]) -> Batch:
    """Texts as a model reads them, padded to the longest; raises `DataError` for a tokenizer that does not fit."""
    # The text tower of a model with two.
    tower: Any = getattr(opened.model, "text_model", opened.model)
    known = int(tower.get_input_embeddings().weight.shape[0])
    config: Any = opened.model.config
    config = getattr(config, "text_config", config)
    pad = getattr(config, "pad_token_id", None) or 0
    # The positions of RoBERTa begin behind that of its padding.
    positions = (getattr(config, "max_position_embeddings", None) or _MOST_TOKENS) - (2 if pad else 0)
    most = max(1, min(_MOST_TOKENS, positions))
    notes: list[str] = []
    assert opened.folder is not None
    if any((opened.folder / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")):
        import transformers

        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(opened.folder), local_files_only=True)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
            encoded = dict(tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt"))
        except Exception as error:  # tokenizers raises anything for a foreign file
            reason = one_line(error)
            raise DataError(f"the tokenizer of {opened.name} cannot be used ({reason}); check its files") from error
        arguments = {"attention_mask": torch.ones_like(encoded["input_ids"]), **encoded}
    else:
        notes.append("it has no tokenizer, so ids are made up: as many as the texts have words, and a third more")
        sizes = torch.tensor([min(most, 2 + len(text.split()) * 4 // 3) for text in texts])
        mask = torch.arange(int(sizes.max())) < sizes[:, None]
        ids = torch.randint(min(5, known - 1), known, mask.shape, generator=torch.Generator().manual_seed(0))
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
    return Batch({k: v for k, v in arguments.items() if k in accepted}, len(texts), "texts", words, notes)


def image_batch(opened: Opened, folder: Path | None) -> Batch:
    """Images at the model's size, scaled to about [-1, 1]; raises `DataError` for a folder without images."""
    from torchvision.transforms.functional import normalize, resize, to_tensor

    notes: list[str] = []
    images: list[Any] = []
    if folder is None:
        try:
            images = bundled().images[:_IMAGES]
        except DataError:
            notes.append("no photographs are installed, so the images are noise: they change no time")
    else:
        try:
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)[:_IMAGES]
        except OSError as error:
            raise DataError(f"--inputs {folder} cannot be read ({one_line(error)}); check its permissions") from error
        if not files:
            raise DataError(f"--inputs {folder} holds no image ({', '.join(_SUFFIXES)}); name a folder of images")
        images = [decode_image(file, file.name) for file in files]
    size = opened.size or 224
    pixels = [normalize(resize(to_tensor(i.convert("RGB")), [size, size]), [0.5] * 3, [0.5] * 3) for i in images]
    noise = torch.randn(_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    batch = torch.stack(pixels) if pixels else noise
    name = "" if opened.folder is None else "pixel_values"
    return Batch({name: batch}, len(batch), "images", f"{len(batch)} images at {size} px", notes=notes)
