"""A generated, seeded, offline dataset with everything that X-FM trains on.

`write_world(folder, seed=0)` writes 10,000 training, 500 validation and 500 test scenes in the
official formats; `render(scene(seed, index, split))` and `captions(scene)` give the same data in
memory.
"""

from xfm_fast.data.shapes.language import VOCABULARY, captions
from xfm_fast.data.shapes.scenes import Scene, Split, render, scene
from xfm_fast.data.shapes.world import write_world

__all__ = ["VOCABULARY", "Scene", "Split", "captions", "render", "scene", "write_world"]
