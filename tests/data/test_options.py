"""Options of streams: what a recipe says is what the readers do."""

from pathlib import Path
from typing import Any, get_args

from tests.data.record_files import pair, pairs, picture, write_lines
from xfm_fast.data.options import STREAM_KINDS
from xfm_fast.training.distributed import join_processes
from xfm_fast.training.loop import open_sources
from xfm_fast.training.recipe import load_recipe
from xfm_fast.training.recipe_fields import AnyStream


def _recipe(folder: Path, *overrides: str) -> Any:
    return load_recipe(
        "pretrain_tiny_shapes",
        [
            "shapes=null",
            f"data={folder}",
            f"checkpoint.folder={folder}/run",
            "streams.images=null",
            *overrides,
        ],
    )


def test_a_recipe_has_every_option_of_a_stream() -> None:
    streams = {
        stream.model_fields["kind"].default: stream for stream in get_args(get_args(AnyStream)[0])
    }
    assert set(streams) == set(STREAM_KINDS)
    for kind, options in STREAM_KINDS.items():
        assert issubclass(streams[kind], options)


def test_fields_and_folders_of_a_recipe_reach_the_reader(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(50):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(picture(index))
        rows.append({"file": f"{index}.jpg", "said": pair(index)["desc"]})
    write_lines(tmp_path / "pairs_train.jsonl", rows)
    write_lines(tmp_path / "plain.jsonl", pairs(50))
    more = ["streams.regions=null", "streams.text=null"]
    settings = [
        f"streams.pairs.{setting}"
        for setting in ("image_key=file", "caption_key=said", "image_root=images")
    ]
    with join_processes("cpu") as processes:
        by_path = open_sources(_recipe(tmp_path, *more, *settings), processes)["pairs"].batch(0)
        plain = _recipe(tmp_path, *more, "streams.pairs.paths=plain.jsonl")
        inside = open_sources(plain, processes)["pairs"].batch(0)
    assert by_path.image.equal(inside.image)
    assert by_path.input_ids.equal(inside.input_ids)
