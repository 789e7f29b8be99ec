"""Writes the shapes dataset in the official file formats: line JSON, JSON arrays, TSV and CSV."""

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
    """Write a dataset folder atomically; the same arguments give the same bytes (with the same Pillow version).

    For every split: `images/<split>/*.png`, and

    - `pairs_<split>.jsonl` (`binary`, `desc`: four paraphrases), `regions_<split>.jsonl` (`binary`, `caption`, `elems`)
      and the fine-tuning files `vqa_`, `nlvr_`, `retrieval_`, `grounding_` and `captioning_<split>.json`,
      `text_<split>.tsv` and `image_<split>.csv`, all of the same scenes;
    - `captioning_<split>_gt.json` except for train: references in COCO's format;
    - `images_<split>.jsonl` (`binary`) and `texts_<split>.jsonl` (`desc`): the same number of other scenes.

    The text task (`entailments`) is balanced. The image task is the shape of the largest object, balanced in all splits
    but train. `answers.json` lists the answers, `world.json` (returned) the arguments and the rows of every file. An
    identical existing dataset is reused.
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
    """Metadata of an existing identical dataset."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        found = read_json(folder / WORLD_FILE)
    except (OSError, ValueError):
        raise DataError(
            f"{folder} exists and is no shapes world; choose another folder or remove it"
        ) from None
    differing = [
        f"{name} {found.get(name)}, not {value}"
        for name, value in world.items()
        if found.get(name) != value
    ]
    if differing:
        raise DataError(
            f"{folder} holds another shapes world ({'; '.join(differing)}); choose another folder or remove it"
        )
    return found


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
    before = scene(seed, count - 1, split)
    paths = [f"images/{split}/{index:06d}.png" for index in range(count)]
    described: set[str] = set()
    for index, path in enumerate(paths):
        made = scene(seed, index, split)
        png = _png(made, resolution)
        (folder / path).write_bytes(png)
        binary, texts = base64.b64encode(png).decode(), captions(made)
        elements = region_elements(made, resolution)
        lines["pairs"].append({"binary": binary, "desc": texts, "image_id": index})
        if elements:
            lines["regions"].append({"binary": binary, "caption": texts, "elems": elements})
        other = _png(scene(seed, count + index, split), resolution)
        lines["images"].append({"binary": base64.b64encode(other).decode()})
        lines["texts"].append({"desc": captions(scene(seed, 2 * count + index, split))[index % 4]})
        arrays["vqa"] += [
            {
                "image": path,
                "question": question,
                "answer": [answer],
                "question_id": number,
                "dataset": "vqa",
            }
            for number, (question, answer) in enumerate(questions(made, split), len(arrays["vqa"]))
        ]
        # True and false statements about two consecutive scenes alternate.
        truth = index % 2 == 0
        sentences = [
            sentence for sentence, true in statements(before, made, split) if true == truth
        ]
        # 7 shares no factor with the lengths that occur often, so all kinds of statement come up.
        sentence = sentences[7 * index % len(sentences)]
        arrays["nlvr"].append(
            {"images": [paths[index - 1], path], "sentence": sentence, "label": str(truth)}
        )
        first = len(arrays["grounding"])
        for number, element in enumerate(elements, first):
            name = element["caption"]
            name = (
                f"{element['attributes']} {name}"
                if "attributes" in element
                else name[first % len(name)]
            )
            arrays["grounding"].append(
                {"image": path, "text": name, "bbox": element["bb"], "ref_id": number}
            )
        if split == "train":
            arrays["retrieval"] += [
                {"image": path, "caption": each, "image_id": path} for each in texts
            ]
        elif texts[0] not in described:
            # Evaluation counts one right answer: a second image with the same description would be another.
            described.add(texts[0])
            arrays["retrieval"].append({"image": path, "caption": texts[:1]})
        arrays["captioning"] += [
            {"image": path, "caption": each, "image_id": index}
            for each in (texts if split == "train" else [texts])
        ]
        text += [
            (caption, claim, "yes" if true else "no")
            for caption, claim, true in entailments(made, before, index)
        ]
        large = [thing for thing in made.things if thing.size == "large" or len(made.things) == 1]
        if len(large) == 1:
            image.append((path, large[0].shape))
        before = made
    if split != "train":
        truths = [
            (index, caption)
            for index in range(count)
            for caption in arrays["captioning"][index]["caption"]
        ]
        coco = {
            "images": [{"id": index, "file_name": path} for index, path in enumerate(paths)],
            "annotations": [
                {"id": number, "image_id": index, "caption": each}
                for number, (index, each) in enumerate(truths)
            ],
        }
        (folder / f"captioning_{split}_gt.json").write_text(json.dumps(coco) + "\n")
        # The first rows of every label, as many as the rarest label has.
        labels = [label for _, label in image[1:]]
        least = min(Counter(labels).values(), default=0)
        balanced = [row for at, row in enumerate(image[1:]) if labels[:at].count(row[1]) < least]
        image = [image[0], *balanced]
    rows = {f"{name}_{split}.jsonl": each for name, each in lines.items()}
    for name, each in rows.items():
        (folder / name).write_text(
            "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in each)
        )
    for name, each in arrays.items():
        rows[f"{name}_{split}.json"] = each
        (folder / f"{name}_{split}.json").write_bytes(_json_array(each))
    for name, table, separator in (
        (f"text_{split}.tsv", text, "\t"),
        (f"image_{split}.csv", image, ","),
    ):
        rows[name] = table[1:]
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, delimiter=separator, lineterminator="\n").writerows(table)
    return {name: len(each) for name, each in rows.items()}


def region_elements(made: Scene, resolution: int) -> list[dict[str, Any]]:
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


def _json_array(rows: Any) -> bytes:
    return (
        "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]\n"
    ).encode()
