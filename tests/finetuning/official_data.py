"""Made-up data where the published files look for theirs: a shapes world's annotations, GLUE's
tables, image sets.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
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
    """Write the arrays of retrieval, VQA, NLVR2, RefCOCO+ with refer's files, and captioning."""

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
                world / f"captioning_{split}_gt.json",
                data / "coco_karpathy" / f"coco_karpathy_{split}_gt.json",
            )
            captions = [{"image": caption["image"]} for caption in captions]
        write(data / "coco_karpathy" / f"coco_karpathy_{split}.json", captions)
        expressions = rows("grounding", split)
        for element in expressions:
            index = len(refs)
            image = sizes.setdefault(element["image"], len(sizes))
            boxes.append({"id": index, "bbox": element.pop("bbox")})
            said = [{"sent": element["text"], "tokens": [], "raw": "", "sent_id": index}]
            name = ("testA", "testB")[index % 2] if split == "test" else split
            refs.append(
                {
                    "ref_id": index,
                    "ann_id": index,
                    "image_id": image,
                    "split": name,
                    "sentences": said,
                }
            )
            element["ref_id"] = index
        write(data / f"refcoco+_{split}.json", expressions)
    (data / "refcoco+").mkdir()
    (data / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    answered = [
        {"id": index, "file_name": name, "width": 32, "height": 32} for name, index in sizes.items()
    ]
    write(data / "refcoco+" / "instances.json", {"images": answered, "annotations": boxes})
    genome = [
        each | {"dataset": "vg", "answer": each["answer"][0]} for each in rows("vqa", "train")
    ]
    write(data / "vg_qa.json", genome)
    answers = json.loads((world / "answers.json").read_text())
    write(data / "answer_list.json", [*answers, *(f"answer {index}" for index in range(130))])


def write_glue(folder: Path) -> None:
    """Write two texts of every class for each split, in the tables of the official zips."""
    for name, form in GLUE.items():
        classes = form.classes or ("0.5", "4.5")
        columns = [column for column in (form.text, form.text2, form.label) if column]
        for split in (
            "train",
            "dev",
            "dev_matched",
            "dev_mismatched",
            "test",
            "test_matched",
            "test_mismatched",
        ):
            lines = [
                [f"text {index} of {label}"] * (len(columns) - 1) + [label]
                for label in classes
                for index in range(2)
            ]
            if name == "cola" and not split.startswith("test"):
                table = [["x", label, "", text] for text, label in lines]
            else:
                table = [columns, *lines]
            if split.startswith("test"):
                # The truth of GLUE's test files is not published.
                table = [
                    ["index", *columns[:-1]],
                    *([str(row), *line[:-1]] for row, line in enumerate(lines)),
                ]
            write(folder / name / f"{split}.tsv", "".join("\t".join(line) + "\n" for line in table))


def class_folders(
    root: Path, names: Sequence[str], file: str = "{}.jpg", each: int = 3
) -> list[Path]:
    paths = [root / name / file.format(index) for name in names for index in range(1, each + 1)]
    for index, path in enumerate(paths):
        picture(path, 40 * index)
    return paths


def mat(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("scipy.io").savemat(path, values)


def cifar(root: Path, folder: str, files: Sequence[str], label: str, meta: str, names: str) -> None:
    batches = root / folder
    batches.mkdir(parents=True)
    for file in files:
        pixels = np.arange(3 * 3072).reshape(3, 3072).astype(np.uint8)
        (batches / file).write_bytes(pickle.dumps({"data": pixels, label: [0, 1, 1]}))
    (batches / meta).write_bytes(pickle.dumps({names: ["ant", "bee"]}))


def cars(root: Path) -> None:
    mat(
        root / "stanford_cars/devkit/cars_meta.mat",
        {"class_names": np.array(["ant", "bee"], dtype=object)},
    )
    dtype = [("fname", object), ("class", int)]
    for split, file in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        paths = class_folders(root / "stanford_cars", [f"cars_{split}"])
        rows = np.array(
            [(path.name, 1 + index % 2) for index, path in enumerate(paths)], dtype=dtype
        )
        mat(root / "stanford_cars" / file, {"annotations": rows})


def fer(root: Path) -> None:
    usages = ["Training"] * 4 + ["PublicTest"] * 3 + ["PrivateTest"] * 2
    lines = [f"{index % 7},{' '.join(['90'] * 2304)},{usage}" for index, usage in enumerate(usages)]
    write(root / "fer2013/fer2013.csv", "\n".join(["emotion,pixels,Usage", *lines, ""]))


def flowers(root: Path) -> None:
    class_folders(root, ["flowers-102/jpg"], "image_{:05d}.jpg", each=6)
    mat(root / "flowers-102/imagelabels.mat", {"labels": [1, 2, 1, 2, 1, 2]})
    mat(root / "flowers-102/setid.mat", {"trnid": [1, 2, 3], "valid": [4], "tstid": [5, 6]})


def food(root: Path) -> None:
    paths = class_folders(root / "food-101/images", ["ant", "bee"])
    names = {name: [f"{name}/{path.stem}" for path in paths[:3]] for name in ("ant", "bee")}
    for split in ("train", "test"):
        write(root / f"food-101/meta/{split}.json", names)


def gtsrb(root: Path) -> None:
    class_folders(root / "gtsrb/GTSRB/Training", ["00000", "00001"], "{}.ppm")
    paths = class_folders(root / "gtsrb/GTSRB", ["Final_Test/Images"], "{}.ppm")
    lines = [f"{path.name};{index % 2}" for index, path in enumerate(paths)]
    write(root / "gtsrb/GT-final_test.csv", "\n".join(["Filename;ClassId", *lines, ""]))


def mnist(root: Path) -> None:
    """Eight images of two digits to train on, and two to test on."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, labels in (("train", [0, 1] * 4), ("t10k", [1, 0])):
        pixels = np.stack([np.full((28, 28), 40 + 170 * label, np.uint8) for label in labels])
        head = struct.pack(">iiii", 0x803, len(labels), 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">ii", 0x801, len(labels)) + bytes(labels)
        )


def pets(root: Path) -> None:
    paths = class_folders(root / "oxford-iiit-pet", ["images"], "Ant_{}.jpg", each=2)
    paths += class_folders(root / "oxford-iiit-pet", ["images"], "Bee_{}.jpg", each=2)
    lines = [f"{path.stem} {1 + index // 2} 1 1\n" for index, path in enumerate(paths)]
    for split in ("trainval", "test"):
        write(root / f"oxford-iiit-pet/annotations/{split}.txt", "".join(lines))


def pcam(root: Path) -> None:
    """HDF5's place is taken by NumPy's archives; see `arrays_for_h5py`."""
    for split in ("train", "test"):
        arrays: dict[str, Any] = {
            "x": np.zeros((3, 96, 96, 3), np.uint8),
            "y": np.array([0, 1, 1]).reshape(3, 1, 1, 1),
        }
        for name, values in arrays.items():
            path = root / f"pcam/camelyonpatch_level_2_split_{split}_{name}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                np.savez(file, **{name: values})


def stl(root: Path) -> None:
    binary = root / "stl10_binary"
    binary.mkdir(parents=True)
    for split in ("train", "test"):
        (binary / f"{split}_X.bin").write_bytes(bytes(3 * 3 * 96 * 96))
        (binary / f"{split}_y.bin").write_bytes(bytes([1, 2, 2]))
    (binary / "unlabeled_X.bin").touch()
    write(binary / "class_names.txt", "ant\nbee\n")


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    paths = class_folders(data, ["images"], "{:07d}.jpg")
    write(data / "variants.txt", "ant\nbee\n")
    for split in ("train", "test"):
        lines = [f"{path.stem} {('ant', 'bee')[index % 2]}\n" for index, path in enumerate(paths)]
        write(data / f"images_variant_{split}.txt", "".join(lines))


def textures(root: Path) -> None:
    paths = class_folders(root / "dtd/dtd/images", ["ant", "bee"])
    for split in ("train", "test"):
        lines = [f"{path.parent.name}/{path.name}\n" for path in paths]
        write(root / f"dtd/dtd/labels/{split}1.txt", "".join(lines))


def scenes(root: Path) -> None:
    class_folders(root / "SUN397", ["a/ant", "b/bee"], "sun_{}.jpg")
    write(root / "SUN397/ClassName.txt", "/a/ant\n/b/bee\n")


# With what writes each set, as torchvision reads it, into a folder.
WRITERS: dict[str, Callable[[Path], object]] = {
    "caltech101": lambda root: class_folders(
        root / "caltech101/101_ObjectCategories", ["BACKGROUND_Google", "ant", "bee"], "image_{:04d}.jpg"
    ),
    "cifar10": lambda root: cifar(
        root, "cifar-10-batches-py", [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"], "labels",
        "batches.meta", "label_names",
    ),
    "cifar100": lambda root: cifar(
        root, "cifar-100-python", ["train", "test"], "fine_labels", "meta", "fine_label_names"
    ),
    "country211": lambda root: [class_folders(root / "country211" / split, ["AA", "BB"]) for split in SPLITS],
    "dtd": textures, "fer2013": fer, "fgvcaircraft": aircraft, "flowers102": flowers,
    "food101": food, "gtsrb": gtsrb, "mnist": mnist, "oxfordiiitpet": pets, "pcam": pcam,
    "renderedsst2": lambda root: [
        class_folders(root / "rendered-sst2" / split, ["negative", "positive"], "{}.png") for split in SPLITS
    ],
    "stanfordcars": cars, "stl10": stl, "sun397": scenes,
}  # fmt: skip


def write_image_set(values: dict[str, Any], cwd: Path) -> None:
    """Write the set of images that a published file names, in the folders that the official code
    gives torchvision.
    """
    root, name = cwd / values["dataset"], values["task_name"]
    if name == "imagenet":
        for split in ("train", "val"):
            class_folders(root / split, ["n01", "n02"])
    elif name in ("caltech101", "sun397", "fer2013"):
        WRITERS[name](root)
    else:
        for split in ("train", "val"):
            WRITERS[name](root / split)


class ArraysForH5py:
    """`h5py` as torchvision's PCAM uses it."""

    @staticmethod
    def File(path: Path) -> Any:
        return np.load(path)


def accept_made_up_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision read files whose checksums are not those of the published sets, and PCAM
    without h5py.
    """
    monkeypatch.setitem(sys.modules, "h5py", ArraysForH5py)
    for module in ("cifar", "fer2013", "flowers102", "stl10"):
        dataset_module = getattr(torchvision.datasets, module)
        monkeypatch.setattr(
            dataset_module, "check_integrity", lambda path, md5=None: Path(path).exists()
        )


def write_official_world(folder: Path, world: Path, tokenizer: CaptionTokenizer) -> Path:
    """Everything but the sets of images; returns the folder that the official code runs in."""
    cwd, data = folder / "xfm", folder / "data" / "finetune"
    cwd.mkdir()
    (data / "coco_karpathy").mkdir(parents=True)
    write_annotations(data, world)
    for name in ("regions_train.jsonl", "pairs_train.jsonl"):
        shutil.copy(world / name, data / name)
    for images in ("coco", "", "nlvr2", "visualgenome"):
        shutil.copytree(world / "images", folder / "images" / images / "images")
    write_glue(folder / "glue" / "glue_datasets")
    (folder / "data/roberta-base").mkdir()
    tokenizer.save(folder / "data/roberta-base/tokenizer.json")
    return cwd
