"""Batches by their number: the same in every process, every row once an epoch, broken rows replaced."""

import json
import multiprocessing
import os
import pickle
import runpy
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.record_files import (
    base64_picture,
    pairs,
    region,
    tiny_config,
    tiny_tokenizer,
    write_lines,
)
from xfm_fast.batches import Batch, PairBatch, TextBatch
from xfm_fast.data import streams
from xfm_fast.data.masking import MaskingOptions
from xfm_fast.data.options import STREAM_KINDS
from xfm_fast.data.streams import Stream, load_batches
from xfm_fast.errors import DataError

CONFIG, TOKENIZER = tiny_config(), tiny_tokenizer()


SHORT: dict[str, Any] = {"max_tokens": 40, "masking": MaskingOptions(0.15, 5)}


def _open(kind: str, data: Any, **arguments: Any) -> Stream[Any]:
    arguments = {"tokenizer": TOKENIZER, "config": CONFIG, "batch_size": 4, "seed": 1, **arguments}
    options = {
        name: arguments.pop(name) for name in STREAM_KINDS[kind].model_fields if name in arguments
    }
    return Stream(data, STREAM_KINDS[kind](**options), **arguments)


def _pairs(data: Any, **options: Any) -> Stream[PairBatch]:
    return _open("pairs", data, **options)


def _texts(data: Any, **options: Any) -> Stream[TextBatch]:
    return _open("text", data, **SHORT | options)


def _numbers(batch: TextBatch) -> list[int]:
    """Return the numbers in the texts of these tests."""
    return [int(TOKENIZER.decode(row).split()[-1]) for row in batch.input_ids.tolist()]


def _numbered(count: int) -> list[dict[str, Any]]:
    return [{"desc": f"a cat {index}"} for index in range(count)]


def _same(first: Batch, second: Batch) -> bool:
    pairs_of = [
        (getattr(first, batch.name), getattr(second, batch.name)) for batch in fields(first)
    ]
    tensors = [(a, b) for a, b in pairs_of if isinstance(a, Tensor)]
    assert tensors
    return all(torch.equal(a, b) for a, b in tensors)


def _sources(tmp_path: Path) -> dict[str, Stream[Any]]:
    regions = write_lines(tmp_path / "regions.jsonl", (region(index) for index in range(12)))
    pictures = write_lines(tmp_path / "pairs.jsonl", pairs(12))
    texts = write_lines(tmp_path / "texts.jsonl", _numbered(12))
    return {
        "pairs": _pairs(pictures),
        "regions": _open("regions", regions, max_images=3),
        "images": _open("images", pictures, tokenizer=None),
        "text": _texts(texts),
    }


def test_a_batch_depends_on_nothing_but_its_number(tmp_path: Path) -> None:
    for source in _sources(tmp_path).values():
        expected = [source.batch(index) for index in range(5)]
        torch.manual_seed(123)
        assert _same(source.batch(3), expected[3])
        again = pickle.loads(pickle.dumps(source))
        assert all(_same(again.batch(index), expected[index]) for index in (4, 0, 2))
        # Epochs and places differ.
        assert not _same(source.batch(0), source.batch(len(source)))


def test_epochs_visit_every_row_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", _numbered(10))
    write_lines(tmp_path / "b.jsonl", [{"desc": f"a cat {index}"} for index in range(10, 16)])
    for window in (None, 4):
        source = _texts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], window=window)
        assert len(source) == 4
        epochs = [
            [n for batch in range(4) for n in _numbers(source.batch(4 * epoch + batch))]
            for epoch in range(3)
        ]
        assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
    plain = _texts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], shuffle=False)
    assert [n for batch in range(8) for n in _numbers(plain.batch(batch))] == [
        *range(16),
        *range(16),
    ]


def test_ranks_share_the_global_batch(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", pairs(16))
    single = _pairs(data, batch_size=8)
    ranks = [_pairs(data, batch_size=2, rank=rank, world_size=4) for rank in range(4)]
    assert {len(shard) for shard in ranks} == {len(single)}
    for index in range(3):
        together = torch.cat([shard.batch(index).image for shard in ranks])
        assert torch.equal(together, single.batch(index).image)


def test_workers_give_the_same_batches(tmp_path: Path) -> None:
    for source in _sources(tmp_path).values():
        plain = load_batches(source, start=2)
        expected = [next(plain) for _ in range(5)]
        loaded = load_batches(source, start=2, workers=2)
        assert all(_same(next(loaded), batch) for batch in expected)
        loaded.close()  # type: ignore[attr-defined]
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


def test_a_signal_to_all_processes_leaves_the_workers(tmp_path: Path) -> None:
    """Keep workers alive: the main process finishes its step, and needs batches for it."""
    source = _sources(tmp_path)["pairs"]
    plain, loaded = load_batches(source), load_batches(source, workers=2)
    assert _same(next(loaded), next(plain))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
    # More than what was made ahead.
    assert all(_same(next(loaded), next(plain)) for _ in range(8))
    loaded.close()  # type: ignore[attr-defined]
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0


def test_broken_rows_are_replaced_and_listed(tmp_path: Path) -> None:
    rows: list[Any] = _numbered(400)
    broken = {5: "{cut", 17: {"desc": ""}, 23: {"other": "x"}, 42: {"desc": ["", ""]}}
    for row, content in broken.items():
        rows[row] = content
    data = write_lines(tmp_path / "a.jsonl", rows)
    list_file = tmp_path / "q.jsonl"
    source = _texts(data, batch_size=10, quarantine=list_file)
    batches = [source.batch(index) for index in range(len(source))]
    assert all(len(set(_numbers(batch))) == 10 for batch in batches)
    seen = [index for batch in batches for index in _numbers(batch)]
    assert set(seen) <= set(range(400)) - set(broken)
    # Those that stand in for broken rows come a second time in this epoch.
    assert len(seen) - len(set(seen)) == 4
    listed = [json.loads(line) for line in list_file.read_text().splitlines()]
    assert sorted(entry["row"] for entry in listed) == [row + 1 for row in broken]
    # Another process, which knows nothing of them, gives the same batches; nothing is listed twice.
    again = _texts(data, batch_size=10, quarantine=list_file)
    assert all(_same(again.batch(index), batches[index]) for index in range(len(source)))
    assert len(list_file.read_text().splitlines()) == 4


def test_ids_that_were_made_before_are_not_made_again() -> None:
    text = "picture number 3 of a cat"
    (ids,) = TOKENIZER.encode_ids([text], 40)
    plain = {"binary": base64_picture(0), "desc": text}
    for options in (ids, ids[1:-1]):
        tokenised = {"binary": base64_picture(0), "input_ids": options}
        assert _same(
            _pairs([tokenised], batch_size=1).batch(0), _pairs([plain], batch_size=1).batch(0)
        )
        assert _same(_texts([tokenised]).batch(0), _texts([plain]).batch(0))
    for wrong in ([5, 10**6], [-1], "5", [1.5], [True], [], [0, 2]):
        with pytest.raises(DataError):
            _texts([{"input_ids": wrong}] * 3).batch(0)


def test_a_system_without_hangups_imports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(signal, "pthread_sigmask")
    assert "Stream" in runpy.run_path(streams.__file__)
