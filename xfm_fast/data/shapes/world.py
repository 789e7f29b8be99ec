"""Writes the shapes dataset in the official file formats: line JSON, JSON arrays, TSV and CSV."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from xfm_fast.data.files import new_folder
from xfm_fast.data.shapes.language import (
    ANSWERS,
    VOCABULARY,
    Reference,
    captions,
    entailments,
    questions,
    references,
    statements,
)
from xfm_fast.data.shapes.scenes import CANVAS, HELD_OUT, SHAPES, SPLITS, Scene, Split, pixel_box, render, scene
from xfm_fast.errors import DataError, StorageError
from xfm_fast.io import read_json

FORMAT_VERSION = 2
WORLD_FILE = "world.json"
LABELS = {"text": ("no", "yes"), "image": SHAPES}
"""Classes of the two classification tasks, balanced in val and test."""
DEFAULT_IMAGES: Mapping[Split, int] = {"train": 10_000, "val": 500, "test": 500}


def write_world(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    images: Mapping[Split, int] = DEFAULT_IMAGES,
    resolution: int = CANVAS,
) -> dict[str, Any]:
    """Write a dataset folder atomically; the same arguments give the same bytes (with the same Pillow version).

    For every split: `images/<split>/*.png`, and

    - `pairs_<split>.jsonl` (`binary`, `desc`: four paraphrases), `regions_<split>.jsonl` (`binary`, `caption`, `elems`)
      and the fine-tuning files `vqa_`, `nlvr_`, `retrieval_`, `grounding_` and `captioning_<split>.json`,
      `text_<split>.tsv` and `image_<split>.csv`, all of the same scenes;
    - `captioning_<split>_gt.json` except for train: references in COCO's format;
    - `images_<split>.jsonl` (`binary`) and `texts_<split>.jsonl` (`desc`): the same number of other scenes.

    The text task (`entailments`) is balanced, and neither sentence reveals the label. The image task is the shape of
    the largest object, balanced in all splits but train. `answers.json` lists the answers; `world.json` (returned)
    records seed, counts, vocabulary, labels, held-out combinations and the SHA-256 of every file. An identical existing
    dataset is reused.
    """
    folder = Path(folder)
    for split, count in images.items():
        if split not in SPLITS or count < 1:
            raise DataError(
                f"images[{split!r}]={count}: give a positive number for each split out of {', '.join(SPLITS)}"
            )
    counts: dict[Split, int] = {split: images[split] for split in SPLITS if split in images}
    asked = {"format": FORMAT_VERSION, "seed": seed, "resolution": resolution, "images": counts}
    if (existing := _existing(folder, asked)) is not None:
        return existing
    try:
        with new_folder(folder, f"world {folder}") as temporary:
            digests = {"answers.json": _write(temporary / "answers.json", _json_array(ANSWERS))}
            numbers: dict[str, int] = {}
            for split, count in counts.items():
                for name, (rows, data) in _split_files(temporary, seed, split, count, resolution).items():
                    digests[name], numbers[name] = _write(temporary / name, data), rows
            world = asked | {
                "rows": numbers,
                "vocabulary": list(VOCABULARY),
                "answers": list(ANSWERS),
                "labels": {task: list(labels) for task, labels in LABELS.items()},
                "held_out": {split: sorted(" ".join(pair) for pair in HELD_OUT[split]) for split in SPLITS},
                "sha256": digests,
            }
            _write(temporary / WORLD_FILE, (json.dumps(world, indent=1) + "\n").encode())
    except StorageError:
        # Another process may have written the same world meanwhile.
        if (existing := _existing(folder, asked)) is None:
            raise
        return existing
    return world


def _existing(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Metadata of an existing identical dataset."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        found = read_json(folder / WORLD_FILE)
    except (OSError, ValueError):
        raise DataError(f"{folder} exists and is no shapes world; choose another folder or remove it") from None
    differing = [f"{name} {found.get(name)}, not {value}" for name, value in asked.items() if found.get(name) != value]
    if differing:
        raise DataError(
            f"{folder} holds another shapes world ({'; '.join(differing)}); choose another folder or remove it"
        )
    return found


def _split_files(folder: Path, seed: int, split: Split, count: int, resolution: int) -> dict[str, tuple[int, bytes]]:
    """Write the images of a split; returns rows and content of each of its files."""
    (folder / "images" / split).mkdir(parents=True)
    lines: dict[str, list[Any]] = {name: [] for name in ("pairs", "regions", "images", "texts")}
    arrays: dict[str, list[Any]] = {name: [] for name in ("vqa", "nlvr", "retrieval", "grounding", "captioning")}
    tables: dict[str, list[list[str]]] = {"text": [], "image": []}
    before = scene(seed, count - 1, split)
    paths = [f"images/{split}/{index:06d}.png" for index in range(count)]
    described: set[str] = set()
    for index, path in enumerate(paths):
        made = scene(seed, index, split)
        png = _png(made, resolution)
        _write(folder / path, png)
        binary = base64.b64encode(png).decode()
        texts = captions(made)
        elements = region_elements(made, resolution)
        lines["pairs"].append({"binary": binary, "desc": texts, "image_id": index})
        if elements:
            lines["regions"].append({"binary": binary, "caption": texts, "elems": elements})
        arrays["vqa"] += [
            {"image": path, "question": question, "answer": [answer], "question_id": number, "dataset": "vqa"}
            for number, (question, answer) in enumerate(questions(made, split), len(arrays["vqa"]))
        ]
        # True and false statements about two consecutive scenes alternate.
        truth = index % 2 == 0
        sentences = [sentence for sentence, true in statements(before, made, split) if true == truth]
        # 7 shares no factor with the lengths that occur often, so all kinds of statement come up.
        sentence = sentences[7 * index % len(sentences)]
        arrays["nlvr"].append({"images": [paths[index - 1], path], "sentence": sentence, "label": str(truth)})
        first = len(arrays["grounding"])
        for number, element in enumerate(elements, first):
            text = element["caption"]
            text = f"{element['attributes']} {text}" if "attributes" in element else text[first % len(text)]
            arrays["grounding"].append({"image": path, "text": text, "bbox": element["bb"], "ref_id": number})
        if split == "train":
            arrays["retrieval"] += [{"image": path, "caption": text, "image_id": path} for text in texts]
        elif texts[0] not in described:
            # Evaluation counts one right answer: a second image with the same description would be another.
            described.add(texts[0])
            arrays["retrieval"].append({"image": path, "caption": texts[:1]})
        arrays["captioning"] += [
            {"image": path, "caption": each, "image_id": index} for each in (texts if split == "train" else [texts])
        ]
        tables["text"] += [
            [caption, statement, LABELS["text"][true]] for caption, statement, true in entailments(made, before, index)
        ]
        large = [thing for thing in made.things if thing.size == "large"] if len(made.things) > 1 else made.things
        if len(large) == 1:
            tables["image"].append([path, large[0].shape])
        before = made
        other = scene(seed, count + index, split)
        lines["images"].append({"binary": base64.b64encode(_png(other, resolution)).decode()})
        lines["texts"].append({"desc": captions(scene(seed, 2 * count + index, split))[index % 4]})
    files: dict[str, tuple[int, bytes]] = {}
    for name, rows in lines.items():
        data = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        files[f"{name}_{split}.jsonl"] = len(rows), data.encode()
    if split != "train":
        truths = [
            {"id": number, "image_id": index, "caption": caption}
            for number, (index, caption) in enumerate(
                (row["image_id"], caption) for row in arrays["captioning"] for caption in row["caption"]
            )
        ]
        named = [{"id": index, "file_name": path} for index, path in enumerate(paths)]
        content = json.dumps({"images": named, "annotations": truths}) + "\n"
        files[f"captioning_{split}_gt.json"] = len(truths), content.encode()
        # The first rows of every label, as many as the rarest label has.
        labels = [label for _, label in tables["image"]]
        least = min(Counter(labels).values(), default=0)
        rows = enumerate(tables["image"])
        tables["image"] = [row for number, row in rows if labels[:number].count(row[1]) < least]
    for file, columns, separator in (
        (f"text_{split}.tsv", ("sentence1", "sentence2", "label"), "\t"),
        (f"image_{split}.csv", ("image", "label"), ","),
    ):
        rows = tables[file.partition("_")[0]]
        table = io.StringIO()
        csv.writer(table, delimiter=separator, lineterminator="\n").writerows([columns, *rows])
        files[file] = len(rows), table.getvalue().encode()
    return files | {f"{name}_{split}.json": (len(array), _json_array(array)) for name, array in arrays.items()}


def region_elements(made: Scene, resolution: int = CANVAS) -> list[dict[str, Any]]:
    """Region annotations: `bb` (x, y, w, h in pixels) and `caption`, a shape with `attributes` or relations."""
    elements: list[dict[str, Any]] = []
    for index, thing in enumerate(made.things):
        names = references(made, index)
        box = list(pixel_box(thing, resolution))
        whole = Reference(*thing.looks)
        if whole in names:
            elements.append({"bb": box, "attributes": whole.adjectives, "caption": thing.shape})
        if relations := [str(ref) for ref in names if ref.other is not None]:
            elements.append({"bb": box, "caption": relations})
    return elements


def _png(made: Scene, resolution: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(made, resolution)).save(buffer, "PNG")
    return buffer.getvalue()


def _json_array(rows: Iterable[Any]) -> bytes:
    return ("[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n").encode()


def _write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
