"""Sets up a run: initial weights, vocabulary and data streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from xfm_fast.checkpoint import heads_in, initialise, load_pretrained_files
from xfm_fast.checkpoint.files import MODEL_FILE, TOKENIZER_FILE, model_folder
from xfm_fast.data.quarantine import Quarantine
from xfm_fast.data.records import open_records
from xfm_fast.data.streams import BatchSource, Stream
from xfm_fast.errors import DataError, XFMError
from xfm_fast.io import make_folder, write_bytes
from xfm_fast.models.hub import PREPROCESSOR_FILE
from xfm_fast.models.processor import preprocessor_json
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption
from xfm_fast.training.distributed import Processes
from xfm_fast.training.recipe import Recipe, Run
from xfm_fast.training.recipe_fields import ImageStream, RegionStream, TextStream

# A vocabulary of a few thousand entries does not change with more.
_TEXTS_TO_LEARN_FROM = 100_000


def autocast(recipe: Run, processes: Processes) -> torch.autocast:
    """Reusable autocast context with the run's precision."""
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    enabled = recipe.precision != "fp32"
    return torch.autocast(processes.device.type, dtype=kinds[recipe.precision], enabled=enabled)


def build_model(recipe: Recipe) -> XFM:
    """Build the model, initialised from the sources in `init` and at random elsewhere."""
    init = recipe.init
    if init.checkpoint is not None:
        place = model_folder(Path(init.checkpoint))
        if place is None:
            return XFM.from_official(init.checkpoint, recipe.model)
        # Our names are the official ones. The sizes are the recipe's, by which data and masks are made, and so is what
        # may differ: the resolution, dropout, the temperature's bounds.
        heads = heads_in(load_pretrained_files(place).state)
        return XFM.from_official(place / MODEL_FILE, recipe.model, heads=heads)
    model = XFM(recipe.model)
    if init.roberta or init.beit2:
        initialise(model, roberta=init.roberta, beit2=init.beit2)
    return model


def open_sources(recipe: Recipe, processes: Processes) -> dict[str, BatchSource[Any]]:
    """Streams of this process; the first process generates the shapes dataset and trains the tokenizer if needed."""
    processes.from_first(recipe.make_world)
    recipe.check_machine(world_size=processes.world_size)
    folder = Path(recipe.checkpoint.folder)
    learnt = folder / TOKENIZER_FILE

    def learn() -> None:
        if not learnt.exists():
            texts = list(islice(_texts(recipe), _TEXTS_TO_LEARN_FROM))
            if not texts:
                raise DataError(
                    "tokenizer=train, but no stream holds text to learn a vocabulary from; name a tokenizer"
                )
            vocabulary = CaptionTokenizer.train_on_texts(texts, recipe.model.vocab_size)
            make_folder(learnt.parent)
            write_bytes({learnt: vocabulary.to_json().encode()})

    if recipe.tokenizer == "train":
        processes.from_first(learn)
    tokenizer = _tokenizer(recipe)
    sources: dict[str, BatchSource[Any]] = {}
    # Numbered by the recipe, so that a stream shows the same batches when an ablation leaves out another one.
    for number, name in enumerate(recipe.streams):
        if recipe.losses_of(name):
            options = recipe.options_of(name)
            quarantine = Quarantine(
                folder / "quarantine" / f"{name}.jsonl",
                tolerate_bad=options.bad_share,
                setting=f"streams.{name}.bad_share",
            )
            sources[name] = Stream(
                recipe.paths_of(name), options, config=recipe.model, tokenizer=tokenizer, number=number,
                batch_size=recipe.micro_batch_size(name), seed=recipe.seed, quarantine=quarantine,
                rank=processes.rank, world_size=processes.world_size,
            )  # fmt: skip
    return sources


def preprocessor_file(model: XFM) -> dict[str, bytes]:
    """`preprocessor_config.json` contents by file name."""
    return {PREPROCESSOR_FILE: preprocessor_json(model.config)}


def tokenizer_file(recipe: Recipe) -> dict[str, bytes]:
    """Vocabulary file contents by file name; call after `open_sources`."""
    return {TOKENIZER_FILE: _tokenizer(recipe).to_json().encode()}


def _tokenizer(recipe: Recipe) -> CaptionTokenizer:
    learnt = Path(recipe.checkpoint.folder) / TOKENIZER_FILE
    return CaptionTokenizer.from_files(learnt if recipe.tokenizer == "train" else recipe.tokenizer)


@contextmanager
def rollback_on_error(folder: Path) -> Iterator[None]:
    """Delete files that the block created in `folder` if it raises an XFMError; the skipped-samples log stays."""
    before = set(folder.iterdir())
    try:
        yield
    except XFMError:
        with suppress(OSError):
            for path in folder.iterdir():
                if path not in before and path.is_file():
                    path.unlink()
        raise


def _texts(recipe: Recipe) -> Iterator[str]:
    for name, options in recipe.streams.items():
        if isinstance(options, ImageStream):
            continue
        key = "desc" if isinstance(options, RegionStream) else options.caption_key
        for rows in open_records(recipe.paths_of(name), **options.record_keys).files:
            for row in range(len(rows)):
                try:
                    record = rows.read(row)
                except DataError:
                    # Whether so many broken rows are tolerable is decided where they are used.
                    continue
                elements = record.get("elems") or []
                for value in (record.get(key), record.get("caption"), *(each.get("caption") for each in elements)):
                    for text in value if isinstance(value, list) else [value]:
                        if isinstance(text, str) and text.strip():
                            text = text.replace(" ##", "") if options.tokenized else text
                            yield text.strip() if isinstance(options, TextStream) else pre_caption(text)
