"""Checkpoints: load official files and third-party encoders, save ours, and convert back."""

from xfm_fast.checkpoint.files import (
    load_pretrained_files,
    read_state_dict,
    save_pretrained,
    write_safetensors,
)
from xfm_fast.checkpoint.loading import (
    LoadResult,
    assign_into,
    beit2_state,
    compare,
    initialise,
    load_into,
    random_tensors,
    require_depth,
    without_values,
)
from xfm_fast.checkpoint.names import (
    HEAD_PREFIXES,
    Head,
    LoadReport,
    config_of,
    heads_in,
    interpolate_table,
    relative_position_index,
    select_heads,
    to_official,
    to_ours,
    underivable,
)
from xfm_fast.checkpoint.relatives import Relative, read_x2vlm, refuse_relative, relative_of

__all__ = [
    "HEAD_PREFIXES",
    "Head",
    "LoadReport",
    "LoadResult",
    "Relative",
    "assign_into",
    "beit2_state",
    "compare",
    "config_of",
    "heads_in",
    "initialise",
    "interpolate_table",
    "load_into",
    "load_pretrained_files",
    "random_tensors",
    "read_state_dict",
    "read_x2vlm",
    "refuse_relative",
    "relative_of",
    "relative_position_index",
    "require_depth",
    "save_pretrained",
    "select_heads",
    "to_official",
    "to_ours",
    "underivable",
    "without_values",
    "write_safetensors",
]
