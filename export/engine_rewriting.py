"""The rewrite of graphs that gives their attention to our plugins; see `plugins` and `plugin_graphs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xfm_fast.errors import ExportError
from xfm_fast.export.engine_library import Library
from xfm_fast.export.engine_profiles import ShapeProfile
from xfm_fast.export.engines import Rewrite
from xfm_fast.export.manifest import GraphRecord
from xfm_fast.export.plugin_graphs import carry_attention
from xfm_fast.export.plugins import register

_WITHOUT_ATTENTION = ("image_memory",)


def with_plugins(library: Library, arch: int, profiles: Sequence[ShapeProfile]) -> Rewrite:
    """Register the plugins and make a rewrite that puts them into graphs.

    Args:
        library: TensorRT.
        arch: compute capability of the engines.
        profiles: of the engines; the longest texts choose between small and large tiles.

    Raises:
        UnavailableError, ExportError: see `plugins.register`.
    """
    register(library, arch)
    longest: dict[str, int] = {}
    for profile in profiles:
        for axis, sizes in profile.axes.items():
            longest[axis] = max(longest.get(axis, 0), sizes.most)

    def rewrite(record: GraphRecord, path: Path) -> None:
        if record.name not in _WITHOUT_ATTENTION and not carry_attention(path, longest=longest):
            raise ExportError(
                f"no attention of graph {record.name!r} has a head dimension that the plugins support; leave out "
                "--plugins"
            )

    return rewrite
