"""A generated, seeded, offline dataset with everything that X-FM trains on.

    python -c "from xfm_fast.data.shapes import write_world; write_world('shapes-world', seed=0)"

writes 10,000 training, 500 validation and 500 test scenes in the official formats; `render_batch([scene(seed, index,
split) for index in ...])` and `captions(scene)` give the same data in memory.
"""

from xfm_fast.data.shapes.language import (
    ANSWERS,
    VOCABULARY,
    CaptionFacts,
    Fact,
    Reference,
    caption_facts,
    captions,
    entailments,
    questions,
    references,
    statements,
    true_shares,
)
from xfm_fast.data.shapes.rendering import pixel_box, render, render_batch
from xfm_fast.data.shapes.scenes import CANVAS, HELD_OUT, SPLITS, Scene, Split, Thing, allowed_pairs, scene
from xfm_fast.data.shapes.world import write_world

__all__ = [
    "ANSWERS",
    "CANVAS",
    "HELD_OUT",
    "SPLITS",
    "VOCABULARY",
    "CaptionFacts",
    "Fact",
    "Reference",
    "Scene",
    "Split",
    "Thing",
    "allowed_pairs",
    "caption_facts",
    "captions",
    "entailments",
    "pixel_box",
    "questions",
    "references",
    "render",
    "render_batch",
    "scene",
    "statements",
    "true_shares",
    "write_world",
]
