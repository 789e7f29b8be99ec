"""Writer of the shapes dataset in the official file formats: line JSON, JSON arrays, TSV and CSV."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from xfm_fast.data.files import new_folder
from xfm_fast.data.shapes.language import (
    ANSWERS,
    Reference,
    captions,
    entailments,
    questions,
    references,
    statements,
)
from xfm_fast.data.shapes.scenes import CANVAS, SPLITS, Scene, Split, pixel_box, render, scene
from xfm_fast.errors import DataError, StorageError
from xfm_fast.io import read_json

FORMAT_VERSION = 2
WORLD_FILE = "world.json"
DEFAULT_IMAGES: Mapping[Split, int] = {"train": 10_000, "val": 500, "test": 500}


def write_world(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    images: Mapping[Split, int] = DEFAULT_IMAGES,
    resolution: int = CANVAS,
) -> dict[str, Any]:
    """Write a dataset folder atomically; the same arguments give the same bytes (with the same
    Pillow version).

    For every split: `images/<split>/*.png`, and

    - `pairs_<split>.jsonl` (`binary`, `desc`: four paraphrases), `regions_<split>.jsonl` (`binary`,
      `caption`, `elems`) and the fine-tuning files `vqa_`, `nlvr_`, `retrieval_`, `grounding_` and
      `captioning_<split>.json`, `text_<split>.tsv` and `image_<split>.csv`, all of the same scenes;
    - `captioning_<split>_gt.json` except for train: references in COCO's format;
    - `images_<split>.jsonl` (`binary`) and `texts_<split>.jsonl` (`desc`): the same number of other
      scenes.

    The text task (`entailments`) is balanced. The image task is the shape of the largest object,
    balanced in all splits but train. `answers.json` lists the answers, `world.json` (returned) the
    arguments and the rows of every file. An identical existing dataset is reused.
    """
    folder = Path(folder)
    for split, count in images.items():
        if split not in SPLITS or count < 1:
            raise DataError(
                f"images[{split!r}]={count}: give a positive number for each split out of {', '.join(SPLITS)}"
            )
    counts: dict[Split, int] = {split: images[split] for split in SPLITS if split in images}
    world = {"format": FORMAT_VERSION, "seed": seed, "resolution": resolution, "images": counts}
    if (existing := _existing(folder, world)) is not None:
        return existing
    rows: dict[str, int] = {}
    try:
        with new_folder(folder, f"world {folder}") as temporary:
            for split, count in counts.items():
                rows |= _write_split(temporary, seed, split, count, resolution)
            (temporary / "answers.json").write_bytes(_json_array(ANSWERS))
            (temporary / WORLD_FILE).write_text(json.dumps(world | {"rows": rows}, indent=1) + "\n")
    except StorageError:
        # Another process may have written the same world meanwhile.
        if (existing := _existing(folder, world)) is None:
            raise
        return existing
    return world | {"rows": rows}


def _existing(folder: Path, world: dict[str, Any]) -> dict[str, Any] | None:
    """Read the metadata of an existing identical dataset; None if there is none."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        existing = read_json(folder / WORLD_FILE)
    except (OSError, ValueError):
        raise DataError(
            f"{folder} exists and is not a shapes world; choose another folder or remove it"
        ) from None
    differing = [
        f"{name} {existing.get(name)}, not {value}"
        for name, value in world.items()
        if existing.get(name) != value
    ]
    if differing:
        raise DataError(
            f"{folder} holds another shapes world ({'; '.join(differing)}); choose another folder or remove it"
        )
    return existing


def _write_split(
    folder: Path, seed: int, split: Split, count: int, resolution: int
) -> dict[str, int]:
    """Write the images and files of a split; returns the rows of each file."""
    (folder / "images" / split).mkdir(parents=True)
    lines: dict[str, list[Any]] = {name: [] for name in ("pairs", "regions", "images", "texts")}
    arrays: dict[str, list[Any]] = {
        name: [] for name in ("vqa", "nlvr", "retrieval", "grounding", "captioning")
    }
    text, image = [("sentence1", "sentence2", "label")], [("image", "label")]
    previous = scene(seed, count - 1, split)
    paths = [f"images/{split}/{index:06d}.png" for index in range(count)]
    described: set[str] = set()
    for index, path in enumerate(paths):
        current = scene(seed, index, split)
        png = _png(current, resolution)
        (folder / path).write_bytes(png)
        binary, texts = base64.b64encode(png).decode(), captions(current)
        elements = region_elements(current, resolution)
        lines["pairs"].append({"binary": binary, "desc": texts, "image_id": index})
        if elements:
            lines["regions"].append({"binary": binary, "caption": texts, "elems": elements})
        unpaired = _png(scene(seed, count + index, split), resolution)
        lines["images"].append({"binary": base64.b64encode(unpaired).decode()})
        lines["texts"].append({"desc": captions(scene(seed, 2 * count + index, split))[index % 4]})
        for question, answer in questions(current, split):
            fields = {"image": path, "question": question, "answer": [answer]}
            identity = {"question_id": len(arrays["vqa"]), "dataset": "vqa"}
            arrays["vqa"].append(fields | identity)
        # True and false statements about two consecutive scenes alternate.
        truth = index % 2 == 0
        claims = statements(previous, current, split)
        sentences = [claim for claim, true in claims if true == truth]
        # 7 shares no factor with the frequent lengths, so that all statements occur.
        sentence = sentences[7 * index % len(sentences)]
        images = [paths[index - 1], path]
        arrays["nlvr"].append({"images": images, "sentence": sentence, "label": str(truth)})
        arrays["grounding"] += _expressions(path, elements, len(arrays["grounding"]))
        if split == "train":
            for caption in texts:
                arrays["retrieval"].append({"image": path, "caption": caption, "image_id": path})
        elif texts[0] not in described:
            # Evaluation counts one right answer, so that no two images may have the same
            # description.
            described.add(texts[0])
            arrays["retrieval"].append({"image": path, "caption": texts[:1]})
        for caption in texts if split == "train" else [texts]:
            arrays["captioning"].append({"image": path, "caption": caption, "image_id": index})
        for caption, claim, true in entailments(current, previous, index):
            text.append((caption, claim, "yes" if true else "no"))
        large = [
            thing for thing in current.things if thing.size == "large" or len(current.things) == 1
        ]
        if len(large) == 1:
            image.append((path, large[0].shape))
        previous = current
    if split != "train":
        coco = _coco_captions(paths, [element["caption"] for element in arrays["captioning"]])
        (folder / f"captioning_{split}_gt.json").write_text(json.dumps(coco) + "\n")
        # The first rows of every label, as many as the rarest label has.
        labels = [label for _, label in image[1:]]
        count = min(Counter(labels).values(), default=0)
        balanced = [row for at, row in enumerate(image[1:]) if labels[:at].count(row[1]) < count]
        image = [image[0], *balanced]
    files: dict[str, list[Any]] = {}
    for name, rows in lines.items():
        files[name := f"{name}_{split}.jsonl"] = rows
        encoded = [json.dumps(row, separators=(",", ":")) + "\n" for row in rows]
        (folder / name).write_text("".join(encoded))
    for name, rows in arrays.items():
        files[name := f"{name}_{split}.json"] = rows
        (folder / name).write_bytes(_json_array(rows))
    for name, table, separator in (
        (f"text_{split}.tsv", text, "\t"),
        (f"image_{split}.csv", image, ","),
    ):
        files[name] = table[1:]
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, delimiter=separator, lineterminator="\n").writerows(table)
    return {name: len(rows) for name, rows in files.items()}


def _expressions(path: str, elements: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    """Make the grounding elements of an image, numbered from `first`."""
    rows = []
    for number, element in enumerate(elements, first):
        text = element["caption"]
        if "attributes" in element:
            text = f"{element['attributes']} {text}"
        else:
            text = text[first % len(text)]
        rows.append({"image": path, "text": text, "bbox": element["bb"], "ref_id": number})
    return rows


def _coco_captions(paths: list[str], captions: list[list[str]]) -> dict[str, Any]:
    """Make the content of a COCO caption file."""
    images = [{"id": index, "file_name": path} for index, path in enumerate(paths)]
    annotations: list[dict[str, Any]] = []
    for index, texts in enumerate(captions):
        for text in texts:
            annotations.append({"id": len(annotations), "image_id": index, "caption": text})
    return {"images": images, "annotations": annotations}


def region_elements(scene: Scene, resolution: int) -> list[dict[str, Any]]:
    """Make region annotations: `bb` (x, y, w, h in pixels) and `caption`, a shape with `attributes` or relations."""
    elements: list[dict[str, Any]] = []
    for index, thing in enumerate(scene.things):
        names = references(scene, index)
        box = list(pixel_box(thing, resolution))
        full = Reference(*thing.looks)
        if full in names:
            elements.append({"bb": box, "attributes": full.adjectives, "caption": thing.shape})
        if relations := [str(ref) for ref in names if ref.anchor is not None]:
            elements.append({"bb": box, "caption": relations})
    return elements


def _png(scene: Scene, resolution: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene, resolution)).save(buffer, "PNG")
    return buffer.getvalue()


def _json_array(rows: Any) -> bytes:
    encoded = [json.dumps(row, separators=(",", ":")) for row in rows]
    return ("[\n" + ",\n".join(encoded) + "\n]\n").encode()
