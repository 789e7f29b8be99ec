"""Models that people have, opened by name with a batch that fits them: a folder, a name on the Hub, or `timm:NAME`.

Nothing of a folder is run: weights are safetensors or read with weights_only, and remote code is not looked at.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.config import MODEL_TYPE
from xfm_fast.data.images import decode_image
from xfm_fast.documents import read_bytes, read_json
from xfm_fast.errors import CheckpointError, DataError, InputError, UnavailableError

from .photographs import bundled

TIMM = "timm:"
_TEXTS, _IMAGES, _MOST_TOKENS = 32, 8, 512
_MOST_TEXT_BYTES = 64 << 20
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# What a model needs, and no code: the Hub's other files stay there.
_FETCHED = ["*.json", "*.txt", "*.model", "*.safetensors"]


@dataclass
class Batch:
    """Inputs of one call.

    Attributes:
        arguments: by keyword, or the only one under an empty name.
        items, unit: how many of what.
        words: says the amount of work.
        padded: whether some texts are padded.
        notes: what a reader should know about them.
    """

    arguments: dict[str, Tensor]
    items: int
    unit: str
    words: str
    padded: bool = False
    notes: list[str] = field(default_factory=list)

    def run(self, model: nn.Module) -> Any:
        """The model's output, its inputs in the type of its parameters."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.arguments.items()}
        return model(given[""]) if "" in given else model(**given)

    def first(self) -> Batch:
        """The shortest of the texts alone, without its padding; or one image."""
        mask = self.arguments.get("attention_mask")
        place = 0 if mask is None else int(mask.sum(1).argmin())
        length = None if mask is None else int(mask[place].sum())
        chosen = {}
        for name, value in self.arguments.items():
            row = value[place : place + 1]
            chosen[name] = row[:, :length] if mask is not None and value.shape == mask.shape else row
        words = "one image" if mask is None else f"one text of {length} tokens"
        return Batch(chosen, 1, self.unit, words)


@dataclass
class Opened:
    """A model in evaluation mode.

    Attributes:
        name: as it was asked for.
        folder: with its files, where it has one.
        size: of its images, in pixels, if it takes any.
        notes: what a reader should know about it.
    """

    name: str
    model: nn.Module
    folder: Path | None = None
    size: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def takes_texts(self) -> bool:
        return "input_ids" in self._arguments

    @property
    def takes_images(self) -> bool:
        return self.folder is None or "pixel_values" in self._arguments

    @property
    def _arguments(self) -> Mapping[str, Any]:
        return inspect.signature(self.model.forward).parameters


def open_model(name: str) -> Opened:
    """The model of a folder, of a name on the Hub, or of timm.

    Raises:
        CheckpointError: no such folder or model, files that cannot be read, or weights that do not fit.
        UnavailableError: a package is not installed.
        InputError: its class is not known here.
    """
    if name.startswith(TIMM):
        return _timm(name)
    folder = _folder(name)
    config = _config(folder)
    try:
        import transformers
    except ImportError:
        raise UnavailableError(f"{name} needs transformers; pip install 'xfm-fast[hf]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if config.get("model_type") == MODEL_TYPE:
        raise InputError(
            f"{name} is an X-FM, which these kernels compute already; xfm-fast bench --checkpoint {name} compares it "
            "with the official code"
        )
    kinds = config.get("architectures") or []
    known = [getattr(transformers, kind, None) for kind in kinds if isinstance(kind, str)]
    if not config.get("model_type"):
        raise InputError(f"{folder / 'config.json'} names no model_type, so no class of transformers can be told")
    if "auto_map" in config and None in (known or [None]):
        raise InputError(
            f"{name} brings code of its own for {', '.join(map(str, kinds))}, which is not run; open it yourself and "
            "call xfm_fast.accelerate(model, verify=batch)"
        )
    kind: Any = next((one for one in known if one is not None), transformers.AutoModel)
    files = [f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")]
    if not files:
        raise CheckpointError(f"{folder} has no model.safetensors; give the folder that save_pretrained wrote")
    try:
        model = kind.from_pretrained(str(folder), local_files_only=True, weights_only=True)
    except Exception as error:  # transformers raises whatever it comes upon in a foreign file
        raise CheckpointError(f"{name} cannot be opened by transformers ({_line(error)}); check its files") from error
    lost = sorted(key for key, p in model.named_parameters() if p.is_meta)
    if lost:
        raise CheckpointError(f"{name} lacks weights of {lost[0]} and {len(lost) - 1} more; give whole files")
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", None)
    return Opened(name, model.eval(), folder, size[0] if isinstance(size, list | tuple) else size)


def _timm(name: str) -> Opened:
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError:
        raise UnavailableError(f"{name} needs timm; pip install 'xfm-fast[hf]'") from None
    wanted = name.removeprefix(TIMM)
    if not timm.is_model(wanted.split(".")[0]):
        from difflib import get_close_matches

        near = get_close_matches(wanted, timm.list_models(), n=3)
        raise InputError(f"timm has no model {wanted!r}; " + (f"near it are {', '.join(near)}" if near else "see timm"))
    # The values of weights change no time, so nothing is fetched for them.
    model = timm.create_model(wanted, pretrained=False).eval()
    size = resolve_model_data_config(model)["input_size"][-1]
    return Opened(name, model, size=size, notes=["its weights are random: they change no time"])


def _folder(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        inner = path / "modules.json"
        # sentence-transformers keeps the encoder in a folder of its own, or beside this file.
        if inner.is_file():
            modules = _json(inner)
            first = modules[0].get("path") if isinstance(modules, list) and modules else ""
            if isinstance(first, str) and first and (path / first / "config.json").is_file():
                return path / first
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file; give its folder, with config.json beside the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} is no folder; check the path")
    try:
        import huggingface_hub
    except ImportError:
        raise UnavailableError(
            f"{name} is no folder here; if it is a model on the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FETCHED))
    except Exception as error:  # its HTTP libraries raise errors of their own
        raise CheckpointError(
            f"{name} is no folder here, and cannot be fetched from the Hugging Face Hub ({_line(error)}); check the "
            "name and the connection, or download it and give the folder"
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} has no config.json; give the folder that save_pretrained wrote")
    config = _json(file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds no names with values; give the folder that save_pretrained wrote")
    return config


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({_line(error)}); check the file") from error


def read_texts(file: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: it cannot be read, is not UTF-8, or has none.
    """
    try:
        content = read_bytes(file, _MOST_TEXT_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"--texts {file} cannot be read ({_line(error)}); give a UTF-8 file, a text a line") from error
    texts = [line.strip() for line in content.splitlines() if line.strip()]
    if not texts:
        raise DataError(f"--texts {file} has no line with text; give a text a line")
    return texts


def example_texts() -> list[str]:
    """Texts of mixed length: captions of the package's photographs, one to six of them in a row."""
    table = json.loads(Path(__file__).with_name("captions.json").read_text(encoding="utf-8"))
    captions = [caption for photo in table["photos"] for caption in photo["captions"]]
    texts, start = [], 0
    for number in range(_TEXTS):
        count = 1 + number % 6
        texts.append(", ".join(captions[(start + i) % len(captions)] for i in range(count)))
        start += count
    return texts


def text_batch(opened: Opened, texts: list[str]) -> Batch:
    """Texts as a model reads them, padded to the longest.

    Raises:
        DataError: the tokenizer cannot be read, or has ids that the model lacks.
    """
    # The text tower of a model with two.
    tower: Any = getattr(opened.model, "text_model", opened.model)
    known = int(tower.get_input_embeddings().weight.shape[0])
    config: Any = opened.model.config
    text = getattr(config, "text_config", config)
    # RoBERTa counts positions from behind its pad.
    places = (getattr(text, "max_position_embeddings", None) or _MOST_TOKENS) - 2
    most = max(1, min(_MOST_TOKENS, places if getattr(text, "pad_token_id", None) else places + 2))
    notes: list[str] = []
    assert opened.folder is not None
    if any((opened.folder / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")):
        arguments = _tokenised(opened, texts, most)
    else:
        notes.append("it has no tokenizer, so ids are made up: as many as the texts have words, and a third more")
        lengths = torch.tensor([min(most, 2 + len(one.split()) * 4 // 3) for one in texts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(min(5, known - 1), known, mask.shape, generator=generator)
        arguments = {"input_ids": torch.where(mask, ids, getattr(text, "pad_token_id", None) or 0)}
        arguments["attention_mask"] = mask.long()
    highest = int(arguments["input_ids"].max())
    if highest >= known:
        raise DataError(
            f"the tokenizer of {opened.name} does not fit it: it gives the id {highest}, and the model knows {known} "
            "ids; put the tokenizer beside the model that it was trained with"
        )
    mask = arguments["attention_mask"]
    lengths = mask.sum(1)
    low, high = int(lengths.min()), int(lengths.max())
    share = float(mask.float().mean())
    words = f"{len(texts)} texts of {low} to {high} tokens"
    notes.append(f"{1 - share:.0%} of the tokens of the batch are padding")
    accepted = inspect.signature(opened.model.forward).parameters
    return Batch({k: v for k, v in arguments.items() if k in accepted}, len(texts), "texts", words, share < 1, notes)


def _tokenised(opened: Opened, texts: list[str], most: int) -> dict[str, Tensor]:
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(opened.folder), local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        made = tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
    except Exception as error:  # tokenizers raises whatever it comes upon in a foreign file
        raise DataError(f"the tokenizer of {opened.name} cannot be used ({_line(error)}); check its files") from error
    arguments = dict(made)
    arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    return arguments


def image_batch(opened: Opened, folder: Path | None) -> Batch:
    """Images as a model sees them, scaled to its size and to about [-1, 1].

    Raises:
        DataError: the folder cannot be read or holds no image.
    """
    from torchvision.transforms.functional import normalize, resize, to_tensor

    notes: list[str] = []
    if folder is None:
        try:
            images = bundled().images[:_IMAGES]
        except DataError:
            images = []
            notes.append("no photographs are installed, so the images are noise: they change no time")
    else:
        if not folder.is_dir():
            raise DataError(f"--images {folder} is not a folder; name a folder of images")
        try:
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)[:_IMAGES]
        except OSError as error:
            raise DataError(f"--images {folder} cannot be read ({_line(error)}); check its permissions") from error
        if not files:
            raise DataError(f"--images {folder} holds no image ({', '.join(_SUFFIXES)}); name a folder of images")
        images = [decode_image(file, file.name) for file in files]
    size = opened.size or 224
    if images:
        pixels = [normalize(resize(to_tensor(i.convert("RGB")), [size, size]), [0.5] * 3, [0.5] * 3) for i in images]
        stacked = torch.stack(pixels)
    else:
        stacked = torch.randn(_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    name = "" if opened.folder is None else "pixel_values"
    return Batch({name: stacked}, len(stacked), "images", f"{len(stacked)} images at {size} px", notes=notes)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
