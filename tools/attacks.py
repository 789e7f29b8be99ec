"""Attacks on every surface: the command line, the Python API, configurations, and paths that are no files.

An attack is a call with something that cannot be meant. It is repelled where an error of ours says so in a printable
sentence and the folder that it worked in is as it was before. Otherwise it ends as a traceback, silently, as a hang, or
half-written, and of these there may be none. `python -m tools.attacks` prints the table; files of every
format are attacked by `fuzz`, and running work by `injection`.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

import xfm_fast
from tests.cli.runner import invoke
from tests.data.record_files import tiny_tokenizer
from xfm_fast.checkpoint import read_state_dict
from xfm_fast.cli.app import app
from xfm_fast.cli.options import mentions
from xfm_fast.config import XFMConfig
from xfm_fast.data.collection import open_collection, retrieval_rows
from xfm_fast.data.images import decode_image
from xfm_fast.data.records import open_records
from xfm_fast.encoders import open_encoder
from xfm_fast.errors import XFMError, wrong_argument
from xfm_fast.export import export_onnx
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.session import Session
from xfm_fast.models.processor import XFMProcessor
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.search import build_index, nearest, open_index, search, write_sheet
from xfm_fast.tasks.retrieval import Retriever, rerank
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.recipe import load_recipe

End = Literal["repelled", "traceback", "silent", "hang", "half-written"]
_SECONDS = 60


class Attack(NamedTuple):
    """A call that shall be refused, working in a folder that it gets."""

    surface: str
    name: str
    call: Callable[[Path], Any]


class _Silent(Exception):
    """A command that took what it should refuse."""


def _command(arguments: list[str], _: Path) -> None:
    done = invoke(arguments)
    if done.exit_code == 0:
        raise _Silent(done.output[-300:])
    if (
        done.exit_code != 2
        or not done.stderr.startswith("xfm-fast: ")
        or "internal error" in done.stderr
    ):
        raise RuntimeError(f"exit code {done.exit_code}: {done.output[-1000:]}")
    # A warning may come before it.
    *before, said = done.stderr.splitlines()
    if not all(line.startswith("xfm-fast: ") for line in (*before, said)):
        raise RuntimeError(f"not one line: {done.stderr}")
    raise XFMError(said)


def _commands(
    group: Any = app, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    if group.default_command is not None:
        yield path, group
    for name in group:
        if not name.startswith("-"):
            yield from _commands(group[name], (*path, name))


def on_the_command_line() -> Iterator[Attack]:
    """Options of every command with values that they cannot have, and positionals that lead nowhere."""
    for path, command in _commands():
        words = " ".join(path)
        arguments = [each for each in command.assemble_argument_collection() if not each.children]
        positional = [each for each in arguments if not each.field_info.is_keyword]
        for each in arguments:
            if not each.field_info.is_keyword or not each.name.startswith("--"):
                continue
            wrong = (
                ["x", "1,x", "٣x"] if mentions(each.hint, int) or mentions(each.hint, float) else []
            )
            if mentions(each.hint, float):
                wrong.append("nan" if not mentions(each.hint, tuple) else "0,x")
            if mentions(each.hint, int) and not mentions(each.hint, float):
                wrong += ["1.5", "1e3", "--"]
            for value in wrong:
                call = partial(_command, [*path, *["./absent"] * len(positional), each.name, value])
                yield Attack("command line", f"{words} {each.name} {value}", call)
        # What a command writes may have any name.
        for value in (
            ("./absent", "x" * 300, "a\udcff", "/dev/null/x", "./a\nb")
            if positional and path != ("data", "shapes")
            else ()
        ):
            call = partial(_command, [*path, *[value] * len(positional)])
            yield Attack("command line", f"{words} {value[:12]!r}", call)
        for value in ("--no-such-option", "--=", "---", "--no-such-option=\udcff"):
            yield Attack("command line", f"{words} {value!r}", partial(_command, [*path, value]))


@cache
def _model() -> XFM:
    torch.manual_seed(0)
    return XFM(XFMConfig.preset("tiny", vision_depth=1, text_layers=1, fusion_layers=1)).eval()


def on_the_model() -> Iterator[Attack]:
    """Methods of a model with tensors of wrong kinds, shapes, types and contents."""
    config = XFMConfig.preset("tiny")
    size, width = config.image_size, config.vision_width
    image = torch.zeros(2, 3, size, size)
    strange: dict[str, Any] = {
        "list": [[1]], "scalar": torch.ones(()), "bool": torch.ones(2, 3, dtype=torch.bool),
        "complex": torch.zeros(2, 3, size, size, dtype=torch.complex64), "meta": torch.zeros(2, 3, 5, device="meta"),
    }  # fmt: skip
    pixels = {
        "integers": image.long(), "one channel": image[:, :1], "another size": torch.zeros(2, 3, size * 2, size),
        "odd size": torch.zeros(2, 3, size + 1, size), "NaN": image + math.nan, "infinity": image + math.inf,
        "without pixels": image[..., :0],
    }  # fmt: skip
    for name, value in (strange | pixels).items():
        yield Attack("model", f"encode_image {name}", lambda _, v=value: _model().encode_image(v))
    ids, mask = torch.full((2, 5), 7), torch.ones(2, 5)
    texts = {
        "floats": ids.float(), "negative": -ids, "beyond the vocabulary": ids + 10**6, "one dimension": ids[0],
        "three dimensions": ids[None], "too long": torch.full((1, 10_000), 7), "no tokens": ids[:, :0],
    }  # fmt: skip
    for name, value in (strange | texts).items():
        yield Attack("model", f"encode_text {name}", lambda _, v=value: _model().encode_text(v))
    masks = {
        "another shape": mask[:, :3], "NaN": mask + math.nan, "additive": mask - 1e4, "minus": mask - math.inf,
        "all hidden": mask * 0, "one hidden": torch.tensor([[1.0] * 5, [0.0] * 5]), "text": "x", "list": [[1] * 5] * 2,
    }  # fmt: skip
    for name, value in masks.items():
        yield Attack("model", f"mask {name}", lambda _, v=value: _model().encode_text(ids, v))
        yield Attack(
            "model", f"fuse, mask {name}", lambda _, v=value: _model().fuse(
                torch.zeros(2, 5, config.text_width), v, _model().image_memory(torch.zeros(2, 17, width))
            )
        )  # fmt: skip
    for method in (
        "project_image",
        "project_text",
        "image_memory",
        "match_logits",
        "predict_boxes",
    ):
        for name, value in (strange | {"another width": torch.zeros(2, 5, width + 1)}).items():
            yield Attack(
                "model", f"{method} {name}", lambda _, m=method, v=value: getattr(_model(), m)(v)
            )
    places = {
        "too many": torch.tensor([0, 5]),
        "negative": torch.tensor([-1, 0]),
        "floats": mask[0, :2],
    }
    for name, value in places.items():
        yield Attack(
            "model", f"image_index {name}", lambda _, v=value: _model().fuse(
                torch.zeros(2, 5, config.text_width), mask, _model().image_memory(torch.zeros(2, 17, width)), v
            )
        )  # fmt: skip
    options: dict[str, tuple[Any, ...]] = {
        "encoders": (("x",), "vision", ("vision", "Text")), "heads": (("x",), "mlm", ("itm",)),
    }  # fmt: skip
    for name, values in options.items():
        for value in values:
            yield Attack(
                "model",
                f"{name}={value!r}",
                lambda _, n=name, v=value: XFM(_model().config, **{n: v}),
            )
    sizes: tuple[Any, ...] = (0, -8, 33, 10**9, math.nan)
    for new in sizes:
        yield Attack(
            "model",
            f"set_image_size {new}",
            lambda _, n=new: XFM(_model().config).set_image_size(n),
        )


def on_retrieval() -> Iterator[Attack]:
    """Re-ranking with numbers and shapes that do not belong together, and `accelerate` with what is no model."""
    config = XFMConfig.preset("tiny")
    images, texts = (
        torch.zeros(3, config.num_image_tokens, config.vision_width),
        torch.zeros(4, 5, config.text_width),
    )
    mask = torch.ones(4, 5)
    call = partial(rerank, model=_model())
    wrong: dict[str, Callable[[], Any]] = {
        "k=0": lambda: call(images, texts, mask, k=0),
        "k=-1": lambda: call(images, texts, mask, k=-1),
        "token_budget=0": lambda: call(images, texts, mask, token_budget=0),
        "token_budget=-5": lambda: call(images, texts, mask, token_budget=-5),
        "another mask": lambda: call(images, texts, mask[:2]),
        "an empty text": lambda: call(images, texts, mask * torch.tensor([[1.0], [1], [1], [0]])),
        "a mask of NaN": lambda: call(images, texts, mask + math.nan),
        "narrow images": lambda: call(images[..., :5], texts, mask),
        "flat images": lambda: call(images[0], texts, mask),
        "narrow texts": lambda: call(images, texts[..., :5], mask),
        "no images": lambda: Retriever(_model()).embed_images([]),
        "no texts": lambda: Retriever(_model()).embed_texts([]),
        "a file without a count": lambda: Retriever(_model()).embed_images([images], path="x"),
    }
    for name, attack in wrong.items():
        yield Attack("retrieval", name, lambda _, a=attack: a())
    options: dict[str, dict[str, Any]] = {
        "kernels": {"kernels": "x"}, "dtype": {"dtype": torch.int8}, "include": {"include": "nothing"},
        "exclude": {"exclude": "nothing"}, "nothing": {}, "a type": {"include": torch.nn.Conv2d},
    }  # fmt: skip
    for name, each in options.items():
        yield Attack(
            "accelerate", name, lambda _, o=each: xfm_fast.accelerate(torch.nn.Linear(2, 2), **o)
        )


def public_calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Public functions and methods with arguments of right types."""
    model, picture = _model(), Image.new("RGB", (8, 8))
    config, retriever = model.config, Retriever(model)
    texts, mask = torch.zeros(1, 5, config.text_width), torch.ones(1, 5)
    images, ids = (
        torch.zeros(1, config.num_image_tokens, config.vision_width),
        torch.full((1, 5), 7),
    )
    pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    sheet = {"path": "a.html", "query": "a cat", "result": (), "index": None}
    return {
        "XFM": (XFM, {"config": config, "heads": ("matching",), "encoders": ("text",)}),
        "XFM.from_pretrained": (XFM.from_pretrained, {"folder": "absent"}),
        "XFM.from_official": (XFM.from_official, {"source": "absent", "config": config}),
        "XFM.from_x2vlm": (XFM.from_x2vlm, {"source": "absent"}),
        "XFM.save_pretrained": (model.save_pretrained, {"folder": "it"}),
        "XFM.encode": (model.encode, {"items": "a cat", "batch_size": 2}),
        "XFM.match": (model.match, {"image": picture, "texts": "a cat", "batch_size": 2}),
        "XFM.ground": (model.ground, {"image": picture, "text": "a cat"}),
        "XFM.similarity": (model.similarity, {"images": picture, "texts": "a cat"}),
        "XFM.encode_image": (model.encode_image, {"pixels": pixels}),
        "XFM.encode_text": (model.encode_text, {"input_ids": ids, "attention_mask": mask}),
        "XFM.fuse": (
            model.fuse,
            {"text_embeds": texts, "attention_mask": mask, "memory": model.image_memory(images)},
        ),
        "XFM.set_image_size": (XFM(config).set_image_size, {"image_size": 48}),
        "XFMConfig.preset": (XFMConfig.preset, {"name": "tiny"}),
        "XFMConfig.load": (XFMConfig.load, {"path": "absent"}),
        "XFMConfig.from_official": (XFMConfig.from_official, {"source": "absent"}),
        "XFMProcessor": (XFMProcessor, {"config": config, "tokenizer": tiny_tokenizer()}),
        "XFMProcessor.__call__": (
            XFMProcessor(config, tiny_tokenizer()),
            {"images": picture, "text": "a cat"},
        ),
        "XFMProcessor.from_pretrained": (XFMProcessor.from_pretrained, {"folder": "absent"}),
        "CaptionTokenizer.from_files": (CaptionTokenizer.from_files, {"path": "absent"}),
        "load": (xfm_fast.load, {"folder": "absent"}),
        "accelerate": (xfm_fast.accelerate, {"model": torch.nn.Linear(2, 2)}),
        "pretraining_losses": (pretraining_losses, {"model": model, "batch": None}),
        "Retriever": (Retriever, {"model": model, "token_budget": 5}),
        "Retriever.embed_images": (retriever.embed_images, {"batches": [pixels]}),
        "Retriever.embed_texts": (retriever.embed_texts, {"batches": [(ids, None)]}),
        "rerank": (
            rerank,
            {"image_embeds": images, "text_embeds": texts, "attention_mask": mask, "model": model},
        ),
        "build_index": (build_index, {"path": "absent", "encoder": None}),
        "open_index": (open_index, {"path": "absent"}),
        "search": (search, {"index": None, "encoder": None, "query": "a cat"}),
        "nearest": (nearest, {"index": None, "feature": np.zeros(2), "top": 3}),
        "open_encoder": (open_encoder, {"source": "absent"}),
        "write_sheet": (write_sheet, sheet),
        "open_collection": (open_collection, {"path": "absent"}),
        "open_records": (open_records, {"data": "absent"}),
        "export_onnx": (export_onnx, {"model": model, "folder": "out"}),
        "Session": (Session.load, {"folder": "absent"}),
    }


def on_the_api() -> Iterator[Attack]:
    """Every public function with one argument of a type that its annotation does not have."""
    wrong: dict[str, Any] = {
        "None": None, "an integer": 5, "a float": 2.5, "bytes": b"x", "a list": [], "a mapping": {}, "floats": [0.5],
        "an object": object(), "a tensor": torch.zeros(2), "mixed": [3, None],
    }  # fmt: skip
    for name, (call, arguments) in public_calls().items():
        for parameter in arguments:
            for kind, value in wrong.items():
                changed = arguments | {parameter: value}
                if wrong_argument(call, (), {parameter: value}) is not None:
                    yield Attack(
                        "api", f"{name} {parameter}={kind}", lambda _, c=call, a=changed: c(**a)
                    )


def on_configurations() -> Iterator[Attack]:
    """Every number of a configuration with values that no model has."""
    for name, field in XFMConfig.model_fields.items():
        kind = field.annotation
        values: tuple[Any, ...] = ("x", [1], {}, math.nan, math.inf, -math.inf)
        if mentions(kind, int) and name not in (
            "local_attn_depth",
            "num_masking_patches",
            "min_num_patches",
        ):
            values += (-7, 10**12, 2.5, 10**400)
        elif mentions(kind, float) and not mentions(kind, int):
            values += (-0.5, 1e300 if "ratio" in name else -1e300)
        if kind is bool:
            values = ("x", 7, [1], math.nan)
        for value in values:
            yield Attack(
                "configuration", f"{name}={str(value)[:12]}",
                lambda _, n=name, v=value: XFMConfig.preset("tiny", **{n: v}),
            )  # fmt: skip
    presets: tuple[Any, ...] = ("", "huge", "Base", "../tiny", "tiny\n")
    for name in presets:
        yield Attack("configuration", f"preset {name!r}", lambda _, n=name: XFMConfig.preset(n))


def _first_record(path: Path) -> Any:
    rows, row = open_records(path).locate(0)
    return rows.read(row)


READERS: dict[str, Callable[[Path], Any]] = {
    "load": xfm_fast.load,
    "XFM.from_pretrained": XFM.from_pretrained,
    "XFM.from_official": lambda path: XFM.from_official(path, _model().config),
    "XFMConfig.load": XFMConfig.load,
    "read_state_dict": read_state_dict,
    "load_recipe": lambda path: load_recipe(str(path)),
    "CaptionTokenizer": CaptionTokenizer.from_files,
    "Session.load": Session.load,
    "Manifest.load": Manifest.load,
    "open_index": open_index,
    "open_records": _first_record,
    "retrieval_rows": lambda path: [*retrieval_rows(path)[0].records()],
    "decode_image": decode_image,
}


def _is_no_file(name: str, folder: Path) -> Path:
    path = folder / "it"
    if name == "pipe":
        os.mkfifo(path)
    elif name == "circle":
        path.symlink_to("it")
    elif name == "dangling":
        path.symlink_to("nowhere")
    elif name == "empty":
        path.touch()
    elif name == "zeros":
        path.write_bytes(bytes(4096))
    elif name == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(4096))
    elif name == "folder":
        path.mkdir()
    else:
        return Path(
            {"device": "/dev/zero", "long": "x" * 300, "below-a-file": __file__ + "/x"}.get(
                name, name
            )
        )
    return path


def on_paths() -> Iterator[Attack]:
    """Every reader with paths that lead to no file, or to one without sense."""
    names = "absent pipe circle dangling empty zeros noise folder device long below-a-file"
    for reader, read in READERS.items():
        for name in names.split():
            yield Attack(
                "paths", f"{reader} {name}", lambda f, r=read, n=name: r(_is_no_file(n, f))
            )


def attacks() -> list[Attack]:
    """All of them."""
    groups = (
        on_the_command_line,
        on_the_model,
        on_retrieval,
        on_the_api,
        on_configurations,
        on_paths,
    )
    return [
        *{(attack.surface, attack.name): attack for group in groups for attack in group()}.values()
    ]


def _tree(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.lstat().st_mode for path in sorted(folder.rglob("*"))
    }


class _Hang(BaseException):
    """Not an Exception: no handler of what is attacked may take it for its own."""


def _interrupt(*_: object) -> None:
    raise _Hang


def end_of(attack: Attack) -> tuple[End, str]:
    """How an attack ends, and what was said."""
    with tempfile.TemporaryDirectory(prefix="xfm-attack-") as place, chdir(place):
        before = _tree(Path(place))
        old = signal.signal(signal.SIGALRM, _interrupt)
        signal.alarm(_SECONDS)
        try:
            with torch.no_grad():
                answer = attack.call(Path(place))
            return "silent", f"returned {str(answer)[:100]}"
        except _Silent as taken:
            return "silent", str(taken)
        except XFMError as error:
            said = str(error)
            try:
                # A name that is no text is shown by its number where it is printed.
                said.encode(errors="backslashreplace")
            except UnicodeEncodeError:
                return "traceback", "what it says cannot be printed"
        except OSError as error:
            # Who gives a path knows the errors of the system, as long as they name it.
            if error.filename is None:
                return "traceback", str(error)
            said = str(error)
        except _Hang:
            return "hang", f"after {_SECONDS} s"
        except BaseException as error:
            return "traceback", f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)
        # Besides what was attacked, and the index of lines that readers keep beside a file.
        made = {
            name
            for name in _tree(Path(place)).keys() - before.keys()
            if name not in ("it", ".it.index")
        }
        return ("half-written", f"left {sorted(made)}") if made else ("repelled", said)


def main() -> int:
    """Print how many attacks on each surface end in which way; 1 where one was not repelled."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ends: Counter[tuple[str, End]] = Counter()
    for attack in attacks():
        end, message = end_of(attack)
        ends[attack.surface, end] += 1
        if end != "repelled":
            print(f"{end}: {attack.surface}: {attack.name}: {message[:300]}", flush=True)
    for (surface, end), count in ends.items():
        print(f"{surface}: {count} {end}")
    return int(any(end != "repelled" for _, end in ends))


if __name__ == "__main__":
    sys.exit(main())
