"""The official code's process, with a clone of the test's own: its interface is the official one, its inside ours."""

from __future__ import annotations

import pytest
import torch

from xfm_fast.benchmarks.backends import Engine, Pairs, SearchIndex
from xfm_fast.benchmarks.backends.official_code import official_code_engine
from xfm_fast.benchmarks.backends.official_finetuning import official_engine
from xfm_fast.loading import Source
from xfm_fast.models.xfm import XFM
from xfm_fast.testing import SharedWeights

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
CLONE = """
import json, sys
from pathlib import Path
import torch
from xfm_fast.benchmarks.backends.official_algorithm import OfficialTwin
from xfm_fast.testing import HEADS
from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM

class XFMForRetrieval(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("the official code talks while it is built")
        self.inner = XFM(XFMConfig(**json.loads(Path(__file__).with_name("sizes.json").read_text())), heads=HEADS)
        self.twin = OfficialTwin(self.inner)
        self.itm_head = self.inner.itm_head
    def load_state_dict(self, state, strict):
        named = {n.replace("text_encoder.", "text_encoder.roberta.", 1) if ".lm_head" not in n else n: t
                 for n, t in state.items()}
        return self.inner.load_state_dict(named, strict=strict)
    def get_vision_embeds(self, image):
        return self.twin.encode_image(image), None
    def get_text_embeds(self, ids, atts):
        return self.twin.encode_text(ids, atts)
    def get_cross_embeds(self, image_embeds, image_atts, text_ids, text_atts, text_embeds):
        if image_embeds.shape[0] > 50:
            raise RuntimeError("too many pairs for this clone")
        return self.twin.fuse_pairs(text_embeds, text_atts, image_embeds)
"""


@pytest.fixture(scope="module")
def model() -> XFM:
    return SharedWeights.open(Source(random="tiny"), {}).model(32, torch.float32)


@pytest.fixture(scope="module")
def engine(model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    clone = tmp_path_factory.mktemp("clone")
    (clone / "models").mkdir()
    for name in ("__init__", "xfm"):
        (clone / "models" / f"{name}.py").write_text("")
    (clone / "models" / "beit2.py").write_text("class VisionTransformer: pass\n")
    (clone / "models" / "model_retrieval.py").write_text(CLONE)
    (clone / "models" / "sizes.json").write_text(model.config.model_dump_json())
    return official_code_engine(model, clone)


def test_answers_are_those_of_the_clone(engine: Engine, model: XFM) -> None:
    twin = official_engine(model)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    ids = torch.randint(3, 500, (3, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])
    ids = ids.where(mask.bool(), torch.tensor(1))
    with torch.inference_mode():
        images = twin.embed_images(pixels)
        texts = twin.embed_texts(ids, mask)
        torch.testing.assert_close(engine.embed_images(pixels), images, rtol=0, atol=1e-5)
        torch.testing.assert_close(engine.embed_texts(ids, mask), texts, rtol=0, atol=1e-5)
        pairs = Pairs(images, texts, mask, torch.tensor([0, 0, 1]))
        torch.testing.assert_close(engine.rerank(pairs), twin.rerank(pairs), rtol=0, atol=1e-5)
        index = SearchIndex(images, model.project_image(images))
        clone, official = (backend.search(ids, mask, index, 2) for backend in (engine, twin))
        assert torch.equal(clone.indices, official.indices)
        torch.testing.assert_close(clone.scores, official.scores, rtol=0, atol=1e-5)
