"""Faults of the machine, put into real work: a process dies, or the disk is full.

Work of every kind runs in processes of its own. A fault strikes at the n-th operation on the files of the work (opening
one to write, flushing it to the disk, renaming, removing, making a folder), so that every moment can be had again, or
kills all processes at a moment that the clock chooses. Then the work is begun again, and its result must be that of
undisturbed work, to the bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tests.training.small_runs import in_processes, join_group, noise, numbers, small_recipe
from xfm_fast.errors import XFMError

REFUSED = 3
"""Exit code of work that ended in an error of ours; 1 is a traceback."""
Kind = Literal["none", "kill", "full"]


@dataclass(frozen=True)
class Fault:
    """What happens, at which of the operations on files, counted from 1, of which process."""

    kind: Kind = "none"
    at: int = 0
    rank: int = 0


class Shim:
    """Counts the operations of this process on the files of a folder, and strikes at one of them."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        self.folder, self.fault, self.count = f"{folder.resolve()}{os.sep}", fault, 0
        self._sync = os.fsync

    def install(self) -> None:
        """Strike from now on, until the process ends."""
        sys.addaudithook(self._hear)
        os.fsync = self._fsync

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(arguments[0], int):
            if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._strike(arguments[0])
        elif event == "os.rename":
            self._strike(arguments[1])
        elif event in ("os.remove", "os.mkdir", "os.rmdir"):
            self._strike(arguments[0])

    def _fsync(self, file: Any) -> None:
        self._strike(
            os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
        )
        self._sync(file)

    def _strike(self, path: Any) -> None:
        if not os.path.abspath(os.fsdecode(path)).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.fault.at and self.fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count == self.fault.at and self.fault.kind == "full":
            raise OSError(28, "No space left on device")


@dataclass(frozen=True)
class Work:
    """Work in a folder, by one of several processes, and the digest of its result.

    Attributes:
        run: called with the folder, the rank and the number of processes.
        result: of a folder in which the work is done; compared with `==`.
    """

    run: Callable[[Path, int, int], None]
    result: Callable[[Path], Any]


def _pretrain(folder: Path, rank: int, world_size: int, parallel: str = "ddp") -> None:
    from xfm_fast.training.loop import train

    recipe = small_recipe(
        folder / "run", steps=5, parallel=parallel, ema=0.9,
        checkpoint={"folder": str(folder / "run"), "every": 2, "keep": 1},
    )  # fmt: skip
    train(recipe, sources=noise(recipe, rank))


def _shard(folder: Path, rank: int, world_size: int) -> None:
    _pretrain(folder, rank, world_size, "fsdp")


def _trained(folder: Path) -> Any:
    weights = [
        (folder / "run" / name / "model.safetensors").read_bytes() for name in ("model", "average")
    ]
    return numbers(folder / "run"), weights


def _recipe(folder: Path, kind: str) -> Any:
    from xfm_fast.finetuning.recipe import FinetuneRecipe

    material = folder.parent / "material"
    stem = {"nlvr2": "nlvr_{}.json", "retrieval": "retrieval_{}.json"}[kind]
    values: dict[str, Any] = {
        "task": {"kind": kind},
        "init": {"checkpoint": str(material / "pretrained")},
        "data": {
            "root": str(material / "world"), "train": stem.format("train"), "splits": {"test": stem.format("test")},
        },
        "epochs": 1, "batch_size": 8, "eval_batch_size": 4, "optimizer": {"lr": 1e-3}, "device": "cpu",
        "checkpoint": {"folder": str(folder / "run"), "every": 2}, "log": {"every": 1},
    }  # fmt: skip
    return FinetuneRecipe(**values)


def _finetune(folder: Path, rank: int, world_size: int) -> None:
    from xfm_fast.finetuning.run import finetune

    finetune(_recipe(folder, "nlvr2"))


def _finetuned(folder: Path) -> Any:
    weights = (folder / "run/model/model.safetensors").read_bytes()
    return (
        numbers(folder / "run"),
        weights,
        (folder / "run/evaluation/test/metrics.json").read_text(),
    )


def _evaluate(folder: Path, rank: int, world_size: int) -> None:
    from xfm_fast.finetuning.run import evaluate

    evaluate(
        _recipe(folder, "retrieval"), folder.parent / "material/pretrained", "test", folder / "out"
    )


def _evaluated(folder: Path) -> Any:
    return {
        path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.name != ".lock"
    }


def _index(folder: Path, rank: int, world_size: int) -> None:
    from xfm_fast.search import index, open_encoder

    index._COMMIT_ENTRIES = 2
    material = folder.parent / "material"
    index.build_index(
        material / "world/images/val",
        open_encoder(material / "pretrained"),
        folder / "index",
        batch_size=1,
    )


def _indexed(folder: Path) -> Any:
    from xfm_fast.search import open_index

    with open_index(folder / "index").store.read() as snapshot:
        features = {
            entry.name: snapshot.features[row].tobytes() for row, entry in snapshot.entries()
        }
    left = sorted(path.name for path in (folder / "index").glob("part-*"))
    return features, left


def _rerank(folder: Path, rank: int, world_size: int) -> None:
    from xfm_fast.io import write_bytes
    from xfm_fast.models.xfm import XFM
    from xfm_fast.tasks.retrieval import rerank

    torch.manual_seed(0)
    model = XFM.from_pretrained(folder.parent / "material/pretrained")
    config = model.config
    images = torch.randn(6, config.num_image_tokens, config.vision_width)
    texts, mask = torch.randn(9, 7, config.text_width), torch.ones(9, 7)
    result = rerank(
        images, texts, mask, model=model, k=4, token_budget=20, resume=folder / "scores"
    )
    write_bytes({folder / "result": result.score_i2t.numpy().tobytes()})


def _reranked(folder: Path) -> Any:
    return (folder / "result").read_bytes()


WORKS: dict[str, Work] = {
    "pretraining": Work(_pretrain, _trained),
    "pretraining in shards": Work(_shard, _trained),
    "fine-tuning": Work(_finetune, _finetuned),
    "evaluation": Work(_evaluate, _evaluated),
    "indexing": Work(_index, _indexed),
    "re-ranking": Work(_rerank, _reranked),
}


def process(
    rank: int, world_size: int, meeting_point: Path, name: str, folder: Path, fault: Fault
) -> None:
    """One process of a work, struck by a fault; what `in_processes` calls."""
    join_group(rank, world_size, meeting_point)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shim = Shim(folder, fault if rank == fault.rank else Fault())
    shim.install()
    code = 0
    try:
        WORKS[name].run(folder, rank, world_size)
    except XFMError as error:
        str(error).encode()
        code = REFUSED
    except BaseException:
        traceback.print_exc()
        code = 1
    Path(f"{folder}.{rank}.count").write_text(str(shim.count))
    sys.stderr.flush()
    # What a group of processes holds open at the end is no part of the work.
    os._exit(code)


def prepare(place: Path) -> None:
    """Make the material of all works below a folder: a world of shapes, and a pretrained model."""
    from tests.finetuning.conftest import SMALL
    from xfm_fast.config import XFMConfig
    from xfm_fast.data.shapes import VOCABULARY, write_world
    from xfm_fast.models.xfm import XFM
    from xfm_fast.tokenizer import CaptionTokenizer

    material = place / "material"
    write_world(material / "world", images={"train": 40, "val": 8, "test": 8}, resolution=32)
    tokenizer = CaptionTokenizer.train_on_texts([" ".join(VOCABULARY)], 600)
    torch.manual_seed(0)
    model = XFM(XFMConfig.preset("tiny", vocab_size=tokenizer.vocab_size, **SMALL))
    model.save_pretrained(material / "pretrained")
    tokenizer.save(material / "pretrained" / "tokenizer.json")


class Bench:
    """A folder with the material of all works, in which they are done undisturbed and disturbed."""

    def __init__(self, place: Path) -> None:
        self.place = place
        prepare(place)
        self._whole: dict[tuple[str, int], tuple[Any, int, float]] = {}
        self._number = 0

    def _folder(self) -> Path:
        self._number += 1
        folder = self.place / f"work-{self._number}"
        folder.mkdir()
        return folder

    def _attempt(
        self, name: str, world_size: int, folder: Path, fault: Fault, stop: float | None = None
    ) -> list[int]:
        self._number += 1
        meet = self.place / f"meet-{self._number}"
        return in_processes(process, world_size, meet, name, folder, fault, kill_after=stop)

    def whole(self, name: str, world_size: int = 1) -> tuple[Any, int, float]:
        """The result of undisturbed work, how many operations on files it does, and its seconds."""
        if (name, world_size) not in self._whole:
            folder, begun = self._folder(), time.perf_counter()
            codes = self._attempt(name, world_size, folder, Fault())
            assert codes == [0] * world_size, f"{name} by {world_size} processes ended with {codes}"
            seconds = time.perf_counter() - begun
            most = max(
                int(Path(f"{folder}.{rank}.count").read_text()) for rank in range(world_size)
            )
            self._whole[name, world_size] = (WORKS[name].result(folder), most, seconds)
        return self._whole[name, world_size]

    def disturbed(
        self, name: str, fault: Fault, world_size: int = 1, stop: float | None = None
    ) -> str:
        """Work that a fault strikes, or a kill after `stop` seconds, and that is begun again; how it first ended.

        Raises:
            AssertionError: a traceback, a second failure, or another result than that of undisturbed work.
        """
        expected, folder = self.whole(name, world_size)[0], self._folder()
        codes = self._attempt(name, world_size, folder, fault, stop)
        # Processes that lose another one may say so in any way.
        assert codes[fault.rank] in (REFUSED if fault.kind == "full" else -9, 0) or -9 in codes, (
            f"{fault}: {codes}"
        )
        again = self._attempt(name, world_size, folder, Fault())
        assert again == [0] * world_size, f"{name} does not go on after {fault}, {stop} s: {again}"
        found = WORKS[name].result(folder)
        if found != expected:
            parts = (
                zip(found, expected, strict=True)
                if isinstance(found, tuple)
                else [(found, expected)]
            )
            differing = "; ".join(
                f"{str(a)[:400]} instead of {str(b)[:400]}" for a, b in parts if a != b
            )
            raise AssertionError(f"{name} after {fault}, {stop} s has another result: {differing}")
        shutil.rmtree(folder)
        return {-9: "killed", REFUSED: "refused"}.get(codes[fault.rank], "finished")


def main() -> int:
    """Strike at every n-th operation, and kill at moments of the clock; fails where work ends differently."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=50,
        help="kills of each kind of work, by one and by two processes",
    )
    parser.add_argument(
        "--every", type=int, default=1, help="strike at each n-th operation on files"
    )
    parser.add_argument(
        "--work", default="", help=f"only those whose name holds this, of {', '.join(WORKS)}"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="xfm-soak-") as place:
        bench = Bench(Path(place))
        for name in (name for name in WORKS if options.work in name):
            operations = bench.whole(name)[1]
            kinds: tuple[Kind, ...] = ("kill", "full")
            faults = [
                Fault(kind, at) for kind in kinds for at in range(1, operations + 1, options.every)
            ]
            ends = Counter(bench.disturbed(name, fault) for fault in faults)
            print(
                f"{name}, struck at {operations} operations: {dict(ends)}, all the same in the end",
                flush=True,
            )
            for world_size in (1,) if name in ("re-ranking", "indexing") else (1, 2):
                seconds = bench.whole(name, world_size)[2]
                moments = [random.uniform(0, seconds) for _ in range(options.runs)]
                ends = Counter(
                    bench.disturbed(name, Fault(), world_size, moment) for moment in moments
                )
                print(
                    f"{name}, killed in {world_size} processes: {dict(ends)}, all the same in the end",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
