"""Faults of the machine, put into real work: a process dies, the power goes, the disk is full, the clock jumps.

Work of every kind runs in processes of its own. A fault strikes at the n-th operation on the files of the work (opening
one to write, flushing it to the disk, renaming, removing, making a folder), so that every moment can be had again, or
kills all processes at a moment that the clock chooses. Then the work is begun again, and its result must be that of
work to which nothing happened, to the bit.

A power cut is a kill after which the disk has forgotten what was never flushed to it. The shim notes each flush and
each renaming, and `lose` takes the rest away in one of the ways in which file systems do: the tail of a file is gone,
or zeros, or a file is empty, or has the name that it had before. It needs inodes that are not used twice, which a
file system in memory has (`/dev/shm`).
"""

from __future__ import annotations

import argparse
import builtins
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tests.training.small_runs import in_processes, join_group, noise, numbers, process_of_a_run, small_recipe
from xfm_fast.errors import XFMError

REFUSED = 3
"""Exit code of work that ended in an error of ours; 1 is a traceback."""
SHARED_MEMORY = Path("/dev/shm")

Kind = Literal["none", "kill", "power", "full", "clock"]
Loss = Literal["tail", "zeros", "empty", "names"]
LOSSES: tuple[Loss, ...] = ("tail", "zeros", "empty", "names")


@dataclass(frozen=True)
class Fault:
    """What happens, at which of the operations on files, counted from 1, of which process."""

    kind: Kind = "none"
    at: int = 0
    rank: int = 0


class Shim:
    """Between the work in this process and the files of a folder: counts, notes and strikes.

    Args:
        folder: of the work.
        fault: that strikes.
        notes: file outside of the folder that receives what was flushed and renamed, for `lose`.
    """

    def __init__(self, folder: Path, fault: Fault, notes: Path) -> None:
        self.folder, self.fault, self.notes = str(folder.resolve()), fault, notes
        self.count = 0
        self._offset = 0.0
        self._backups = notes.with_suffix(".kept")
        self._backups.mkdir(parents=True, exist_ok=True)
        self._sync, self._replace, self._time, self._time_ns = os.fsync, os.replace, time.time, time.time_ns
        self._quiet = False

    def install(self) -> None:
        """Strike from now on, until the process ends."""
        sys.addaudithook(self._hear)
        os.fsync = self._fsync
        os.replace = os.rename = self._rename
        if self.fault.kind == "clock":
            time.time = lambda: self._time() + self._offset
            time.time_ns = lambda: self._time_ns() + int(self._offset * 1e9)

    def _inside(self, path: Any) -> bool:
        with suppress(TypeError, ValueError, OSError):
            return os.path.abspath(os.fsdecode(path)).startswith(self.folder)
        return False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._quiet:
            return
        if event == "open" and not isinstance(arguments[0], int):
            writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and self._inside(arguments[0]):
                self._strike()
        elif event in ("os.remove", "os.mkdir", "os.rmdir") and self._inside(arguments[0]):
            self._strike()

    def _fsync(self, file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        if self._inside(path):
            self._strike()
        status = os.fstat(number)
        self._note({"flushed": status.st_ino, "bytes": status.st_size, "folder": path if os.path.isdir(path) else None})
        self._sync(number)

    def _rename(self, source: Any, target: Any, **options: Any) -> None:
        if self._inside(target):
            self._strike()
            kept = None
            if os.path.isfile(target):
                kept = str(self._backups / f"{os.getpid()}-{self.count}")
                os.link(target, kept)
            self._note({"from": os.fspath(source), "to": os.fspath(target), "kept": kept})
        self._replace(source, target, **options)

    def _note(self, what: dict[str, Any]) -> None:
        self._quiet = True
        with builtins.open(self.notes, "a", encoding="utf-8") as file:
            file.write(json.dumps(what, default=os.fsdecode) + "\n")
        self._quiet = False

    def _strike(self) -> None:
        self.count += 1
        if self.fault.kind == "none" or self.count != self.fault.at:
            return
        if self.fault.kind in ("kill", "power"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault.kind == "full":
            raise OSError(28, "No space left on device")
        # A day back at every second blow, a day ahead at the others.
        self._offset = 86_400.0 * (1 if self.fault.at % 2 else -1)

    def told(self) -> None:
        """Leave the number of operations for the parent."""
        self._quiet = True
        self.notes.with_suffix(f".{os.getpid()}.count").write_text(str(self.count))


def lose(folder: Path, notes: Path, loss: Loss) -> None:
    """Take from a folder what was never flushed to the disk, in one of the ways in which a power cut does."""
    flushed: dict[int, int] = {}
    pending: list[dict[str, Any]] = []
    for line in notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []:
        said = json.loads(line)
        if "to" in said:
            pending.append(said)
        elif said["folder"] is not None:
            pending = [each for each in pending if os.path.dirname(each["to"]) != said["folder"]]
        else:
            flushed[said["flushed"]] = said["bytes"]
    if loss == "names":
        for each in reversed(pending):
            if os.path.exists(each["to"]) and not os.path.exists(each["from"]):
                with suppress(OSError):
                    os.rename(each["to"], each["from"])
                    if each["kept"] is not None:
                        os.link(each["kept"], each["to"])
    for path in [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]:
        status = path.stat()
        safe = flushed.get(status.st_ino, 0)
        if status.st_size <= safe:
            continue
        with path.open("r+b") as file:
            if loss == "zeros":
                file.seek(safe)
                file.write(bytes(status.st_size - safe))
            else:
                file.truncate(safe if loss == "empty" else (safe + status.st_size) // 2)


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
    weights = [(folder / "run" / name / "model.safetensors").read_bytes() for name in ("model", "average")]
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
    return numbers(folder / "run"), weights, (folder / "run/evaluation/test/metrics.json").read_text()


def _evaluate(folder: Path, rank: int, world_size: int) -> None:
    from xfm_fast.finetuning.run import evaluate

    evaluate(_recipe(folder, "retrieval"), folder.parent / "material/pretrained", "test", folder / "out")


def _evaluated(folder: Path) -> Any:
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.name != ".lock"}


def _index(folder: Path, rank: int, world_size: int) -> None:
    from xfm_fast.search import index, open_model
    from xfm_fast.training.distributed import join_processes

    index._PART = 2
    material = folder.parent / "material"
    with join_processes("cpu") as processes:
        model = open_model(material / "pretrained")
        index.build_index(material / "world/images/val", model, folder / "index", batch_size=1, processes=processes)


def _indexed(folder: Path) -> Any:
    from xfm_fast.search import open_index

    found = open_index(folder / "index")
    left = sorted(path.name for path in (folder / "index").glob("part-*"))
    return [entry.name for entry in found.entries], found.features.tobytes(), found.faults, left


def _rerank(folder: Path, rank: int, world_size: int) -> None:
    from xfm_fast.io import write_bytes
    from xfm_fast.models.xfm import XFM
    from xfm_fast.tasks.retrieval import rerank

    torch.manual_seed(0)
    model = XFM.from_pretrained(folder.parent / "material/pretrained")
    config = model.config
    images = torch.randn(6, config.num_image_tokens, config.vision_width)
    texts, mask = torch.randn(9, 7, config.text_width), torch.ones(9, 7)
    result = rerank(images, texts, mask, model=model, k=4, token_budget=20, resume=folder / "scores")
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
    rank: int, world_size: int, meeting_point: Path, name: str, folder: Path, fault: Fault, notes: Path
) -> None:
    """One process of a work, struck by a fault; what `in_processes` calls."""
    join_group(rank, world_size, meeting_point)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    shim = Shim(folder, fault if rank == fault.rank else Fault(), notes)
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
    shim.told()
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


def _same(found: Any, expected: Any, what: str) -> None:
    if found != expected:
        parts = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        told = "; ".join(f"{str(a)[:400]} instead of {str(b)[:400]}" for a, b in parts if a != b)
        raise AssertionError(f"{what} has another result: {told}")


class Bench:
    """A folder with the material of all works, in which they are done undisturbed and disturbed.

    Args:
        place: with room for them; in memory, for power cuts.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        prepare(place)
        self._whole: dict[tuple[str, int], tuple[Any, int, float]] = {}
        self._number = 0

    def _attempt(self, name: str, world_size: int, folder: Path, fault: Fault, stop: float | None = None) -> list[int]:
        self._number += 1
        meet, notes = self.place / f"meet-{self._number}", self.place / f"notes-{self._number}"
        return in_processes(process, world_size, meet, name, folder, fault, notes, kill_after=stop)

    def whole(self, name: str, world_size: int = 1) -> tuple[Any, int, float]:
        """The result of work that nothing happens to, how many operations on files it does, and its seconds."""
        if (name, world_size) not in self._whole:
            folder = self.place / f"whole-{len(self._whole)}"
            folder.mkdir()
            begun = time.perf_counter()
            codes = self._attempt(name, world_size, folder, Fault())
            assert codes == [0] * world_size, f"{name} by {world_size} processes ended with {codes}"
            seconds = time.perf_counter() - begun
            counts = self.place.glob(f"notes-{self._number}.*.count")
            most = max(int(path.read_text()) for path in counts)
            self._whole[name, world_size] = (WORKS[name].result(folder), most, seconds)
        return self._whole[name, world_size]

    def disturbed(self, name: str, fault: Fault, world_size: int = 1, loss: Loss = "tail") -> str:
        """Work that a fault strikes and that is begun again; how it first ended.

        Raises:
            AssertionError: a traceback, a second failure, or another result than that of undisturbed work.
        """
        expected = self.whole(name, world_size)[0]
        folder = self.place / f"work-{self._number}"
        folder.mkdir()
        codes = self._attempt(name, world_size, folder, fault)
        wanted = {"kill": -9, "power": -9, "full": REFUSED}.get(fault.kind, 0)
        # Processes that lose another one may say so in any way.
        assert codes[fault.rank] in (wanted, 0), f"{name} by {fault} ended with {codes}"
        if fault.kind == "power":
            lose(folder, self.place / f"notes-{self._number}", loss)
        again = self._attempt(name, world_size, folder, Fault())
        assert again == [0] * world_size, f"{name} does not go on after {fault} ({loss}): {again}"
        _same(WORKS[name].result(folder), expected, f"{name} after {fault} ({loss})")
        shutil.rmtree(folder)
        return "killed" if codes[fault.rank] == -9 else "refused" if codes[fault.rank] == REFUSED else "finished"

    def killed(self, name: str, after: float, world_size: int = 1) -> str:
        """Work whose processes are all killed at a moment, and that is begun again."""
        expected = self.whole(name, world_size)[0]
        folder = self.place / f"work-{self._number}"
        folder.mkdir()
        codes = self._attempt(name, world_size, folder, Fault(), after)
        assert codes == [0] * world_size or -9 in codes, f"{name} ended with {codes}"
        again = self._attempt(name, world_size, folder, Fault())
        assert again == [0] * world_size, f"{name} does not go on after a kill at {after:.2f} s: {again}"
        _same(WORKS[name].result(folder), expected, f"{name} after a kill at {after:.2f} s")
        shutil.rmtree(folder)
        return "killed" if -9 in codes else "finished"


def soak(bench: Bench, *, runs: int, every: int, random_numbers: random.Random, works: list[str]) -> Iterator[str]:
    """All faults, one after the other; a line for each kind of work.

    Args:
        bench: to work on.
        runs: kills at moments of the clock, of each kind of work with one process and with two.
        every: strike at each n-th operation; 1 for all of them.
        random_numbers: where the moments come from.
        works: names of those that are done.
    """
    for name in works:
        for world_size in (1, 2):
            if name == "re-ranking" and world_size == 2:
                continue
            _, operations, last = bench.whole(name, world_size)
            ends: Counter[str] = Counter()
            for _ in range(runs):
                moment = random_numbers.uniform(0, last)
                end = bench.killed(name, moment, world_size)
                ends[end] += 1
                # The first run of all takes longest: what ended before its kill is killed earlier the next time.
                last = moment if end == "finished" else last
            yield f"{name}, {world_size} processes, killed at a moment: {dict(ends)}, all the same in the end"
            if world_size == 2:
                continue
            for kind in ("kill", "power", "full", "clock"):
                ends = Counter()
                for at in range(1 + random_numbers.randrange(every), operations + 1, every):
                    for loss in LOSSES if kind == "power" else LOSSES[:1]:
                        ends[bench.disturbed(name, Fault(kind, at), world_size, loss)] += 1
                yield f"{name}, {operations} operations, {kind}: {dict(ends)}, all the same in the end"
    yield f"pretraining by 1, 2, 4 and 1 processes: {change_world(bench.place / 'sizes')} steps, each once"


def change_world(folder: Path, sizes: tuple[int, ...] = (1, 2, 4, 1)) -> int:
    """A run that is killed and goes on with another number of processes, again and again; the steps in its log.

    Raises:
        AssertionError: it does not go on, a step is missing or twice, or a number is not finite.
    """
    folder.mkdir()
    steps = 3 * len(sizes)
    for number, size in enumerate(sizes):
        last = number == len(sizes) - 1
        checkpoint = {"folder": str(folder), "every": 2, "keep": 2}
        recipe = small_recipe(folder, steps=steps, checkpoint=checkpoint, parallel=("fsdp", "ddp")[number % 2])
        options = {} if last else {"kill_at": 3 * (number + 1)}
        codes = in_processes(process_of_a_run, size, folder / f"meet-{number}", recipe, options)
        assert codes == [0 if last else -9] * size, f"{size} processes after {sizes[:number]} ended with {codes}"
    lines = numbers(folder)
    assert [line["step"] for line in lines] == [*range(1, steps + 1)], lines
    assert all(math.isfinite(value) for line in lines for value in line.values())
    return len(lines)


def main() -> int:
    """The soak: every fault at every operation, and kills at moments without number; 1 where work ends differently."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="kills of each kind of work, by one and by two processes")
    parser.add_argument("--every", type=int, default=1, help="strike at each n-th operation on files")
    parser.add_argument("--work", default="", help=f"only those whose name holds this, of {', '.join(WORKS)}")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    works = [name for name in WORKS if options.work in name]
    random_numbers = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="xfm-soak-", dir=SHARED_MEMORY) as place:
        bench = Bench(Path(place))
        for line in soak(bench, runs=options.runs, every=options.every, random_numbers=random_numbers, works=works):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
