"""A generated, seeded, offline dataset with everything that X-FM trains on.

    python -c "from xfm_fast.data.shapes import write_world; write_world('shapes-world', seed=0)"

writes 10,000 training, 500 validation and 500 test scenes in the official formats; `render(scene(seed, index, split))`
and `captions(scene)` give the same data in memory.
"""

from xfm_fast.data.shapes.language import VOCABULARY, captions, true_shares
from xfm_fast.data.shapes.scenes import Scene, Split, render, scene
from xfm_fast.data.shapes.world import WORLD_FILE, write_world

__all__ = ["VOCABULARY", "WORLD_FILE", "Scene", "Split", "captions", "render", "scene", "true_shares", "write_world"]
