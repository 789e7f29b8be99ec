"""Made-up data where the published files look for theirs: a shapes world's annotations, GLUE's tables, image sets."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xfm_fast.data.tables import GLUE
from xfm_fast.tokenizer import CaptionTokenizer

SPLITS = "train", "val", "test"


def picture(path: Path, colour: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), (colour, 60, 200 - colour)).save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_annotations(data: Path, world: Path) -> None:
    """The arrays of retrieval, VQA, NLVR2, RefCOCO+ with refer's files, and captioning."""

    def rows(name: str, split: str) -> list[Any]:
        return json.loads((world / f"{name}_{split}.json").read_text())

    refs: list[Any] = []
    boxes, sizes = [], {}
    for split in SPLITS:
        for name in ("coco", "flickr30k"):
            write(data / f"{name}_{split}.json", rows("retrieval", split))
        write(data / f"nlvr_{'dev' if split == 'val' else split}.json", rows("nlvr", split))
        write(data / f"vqa_{split}.json", rows("vqa", split))
        captions = rows("captioning", split)
        if split != "train":
            shutil.copy(
                world / f"captioning_{split}_gt.json", data / "coco_karpathy" / f"coco_karpathy_{split}_gt.json"
            )
            captions = [{"image": each["image"]} for each in captions]
        write(data / "coco_karpathy" / f"coco_karpathy_{split}.json", captions)
        expressions = rows("grounding", split)
        for element in expressions:
            number = len(refs)
            image = sizes.setdefault(element["image"], len(sizes))
            boxes.append({"id": number, "bbox": element.pop("bbox")})
            said = [{"sent": element["text"], "tokens": [], "raw": "", "sent_id": number}]
            name = ("testA", "testB")[number % 2] if split == "test" else split
            refs.append({"ref_id": number, "ann_id": number, "image_id": image, "split": name, "sentences": said})
            element["ref_id"] = number
        write(data / f"refcoco+_{split}.json", expressions)
    (data / "refcoco+").mkdir()
    (data / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    known = [{"id": number, "file_name": name, "width": 32, "height": 32} for name, number in sizes.items()]
    write(data / "refcoco+" / "instances.json", {"images": known, "annotations": boxes})
    genome = [each | {"dataset": "vg", "answer": each["answer"][0]} for each in rows("vqa", "train")]
    write(data / "vg_qa.json", genome)
    answers = json.loads((world / "answers.json").read_text())
    write(data / "answer_list.json", [*answers, *(f"answer {number}" for number in range(130))])


def write_glue(folder: Path) -> None:
    """Two texts of every class for each split, in the tables of the official zips."""
    for name, form in GLUE.items():
        classes = form.classes or ("0.5", "4.5")
        columns = [column for column in (form.text, form.text2, form.label) if column]
        for split in ("train", "dev", "dev_matched", "dev_mismatched", "test", "test_matched", "test_mismatched"):
            lines = [
                [f"text {number} of {label}"] * (len(columns) - 1) + [label] for label in classes for number in range(2)
            ]
            if name == "cola" and not split.startswith("test"):
                table = [["x", label, "", text] for text, label in lines]
            else:
                table = [columns, *lines]
            if split.startswith("test"):
                # The truth of GLUE's test files is not published.
                table = [["index", *columns[:-1]], *([str(row), *line[:-1]] for row, line in enumerate(lines))]
            write(folder / name / f"{split}.tsv", "".join("\t".join(line) + "\n" for line in table))


def class_folders(root: Path, names: Sequence[str], file: str = "{}.jpg", each: int = 3) -> list[Path]:
    paths = [root / name / file.format(number) for name in names for number in range(1, each + 1)]
    for number, path in enumerate(paths):
        picture(path, 40 * number)
    return paths


def fer(root: Path) -> None:
    usages = ["Training"] * 4 + ["PublicTest"] * 3 + ["PrivateTest"] * 2
    lines = [f"{number % 7},{' '.join(['90'] * 2304)},{usage}" for number, usage in enumerate(usages)]
    write(root / "fer2013/fer2013.csv", "\n".join(["emotion,pixels,Usage", *lines, ""]))


def mnist(root: Path) -> None:
    """Eight images of two digits to train on, and two to test on."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, labels in (("train", [0, 1] * 4), ("t10k", [1, 0])):
        pixels = np.stack([np.full((28, 28), 40 + 170 * label, np.uint8) for label in labels])
        head = struct.pack(">iiii", 0x803, len(labels), 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, len(labels)) + bytes(labels))


def pets(root: Path) -> None:
    paths = class_folders(root / "oxford-iiit-pet", ["images"], "Ant_{}.jpg", each=2)
    paths += class_folders(root / "oxford-iiit-pet", ["images"], "Bee_{}.jpg", each=2)
    lines = [f"{path.stem} {1 + number // 2} 1 1\n" for number, path in enumerate(paths)]
    for split in ("trainval", "test"):
        write(root / f"oxford-iiit-pet/annotations/{split}.txt", "".join(lines))


def write_image_set(values: dict[str, Any], cwd: Path) -> None:
    """ImageNet's classes, or the pets of torchvision, in the folders that the official code gives torchvision."""
    for split in ("train", "val"):
        if values["task_name"] == "imagenet":
            class_folders(cwd / values["dataset"] / split, ["n01", "n02"])
        else:
            pets(cwd / values["dataset"] / split)


def write_official_world(folder: Path, world: Path, tokenizer: CaptionTokenizer) -> Path:
    """Everything but the sets of images; returns the folder that the official code runs in."""
    cwd, data = folder / "xfm", folder / "data" / "finetune"
    cwd.mkdir()
    (data / "coco_karpathy").mkdir(parents=True)
    write_annotations(data, world)
    for name in ("regions_train.jsonl", "pairs_train.jsonl"):
        shutil.copy(world / name, data / name)
    for place in ("coco", "", "nlvr2", "visualgenome"):
        shutil.copytree(world / "images", folder / "images" / place / "images")
    write_glue(folder / "glue" / "glue_datasets")
    (folder / "data/roberta-base").mkdir()
    tokenizer.save(folder / "data/roberta-base/tokenizer.json")
    return cwd
