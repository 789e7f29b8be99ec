"""Recipes: the shipped ones, overrides, and what is refused with which remedy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from xfm_fast.config import XFMConfig
from xfm_fast.errors import ConfigError, UnavailableError
from xfm_fast.training.recipe import Recipe, load_recipe, recipe_names
from xfm_fast.training.recipe_fields import ImageStream, PairStream, RegionStream, TextStream

TINY = "pretrain_tiny_shapes"


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_says_what_to_expect(name: str, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("image,caption\na.png,a dog\nb.png,a cat\n")
    own = ("model.preset=tiny", f"data={tmp_path / 'train.csv'}") if name == "pretrain_csv" else ()
    recipe = load_recipe(name, own)
    text = (Path(__file__).parents[2] / f"xfm_fast/training/recipes/{name}.yaml").read_text()
    header, _, _ = text.partition("\n\n")
    for said in (f"xfm-fast pretrain {name}", "expected time:", "expected number:"):
        assert said in header
    # A dump is a recipe again, which is how checkpoints keep it.
    assert Recipe(**recipe.model_dump(mode="json")) == recipe


def test_base_recipe_has_the_official_numbers() -> None:
    recipe = load_recipe("pretrain_base_4m")
    assert recipe.model == XFMConfig.preset("base")
    assert (
        recipe.model.image_size,
        recipe.model.num_masking_patches,
        recipe.model.min_num_patches,
    ) == (224, 75, 16)
    assert (recipe.model.embed_dim, recipe.model.temperature, recipe.model.drop_path_rate) == (
        256,
        0.07,
        0.1,
    )
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.lr_mult) == (1e-4, 0.01, 2)
    assert (optimizer.betas, optimizer.eps, optimizer.clip_norm) == ((0.9, 0.98), 1e-8, 1.0)
    assert (recipe.schedule.kind, recipe.schedule.warmup_steps(recipe.steps)) == ("linear", 2500)
    # Text has an update of its own; regions and images share one; the image-text pairs have the last.
    assert recipe.active_updates == (("text",), ("regions", "imagenet"), ("pairs",))
    text, regions, images, pairs = (
        recipe.streams[name] for name in ("text", "regions", "imagenet", "pairs")
    )
    assert isinstance(text, TextStream)
    assert isinstance(regions, RegionStream)
    assert isinstance(images, ImageStream)
    assert isinstance(pairs, PairStream)
    assert [stream.batch_size for stream in (text, regions, images, pairs)] == [256, 96, 96, 96]
    assert (text.max_tokens, text.masking.probability, text.masking.most) == (128, 0.15, 20)
    for stream in (regions, pairs):
        assert (stream.max_words, stream.max_tokens) == (30, 30)
        assert (stream.masking.probability, stream.masking.most) == (0.5, 15)
        assert (stream.masking.skipgram_probability, stream.masking.skipgram_size) == (0.2, 3)
        assert not stream.masking.whole_word
    assert (regions.max_images, regions.max_regions, regions.least_visible) == (80, 5, 0.5)
    assert recipe.losses_of("regions") == ("itc", "itm", "imlm", "bbox_l1", "bbox_giou")
    assert recipe.losses_of("pairs") == ("itc", "itm", "imlm", "mim")
    assert recipe.losses_of("imagenet") == ("mim",)
    assert recipe.losses_of("text") == ("mlm",)
    assert recipe.steps == 100 * math.ceil(5_114_489 / (32 * 96)) == 166_500
    assert recipe.method.stop_gradient
    assert recipe.method.mim_guidance
    assert not recipe.method.official_itc_gradient
    assert not recipe.method.official_itm_negatives


# An override, and what the message names: the key or value, and the nearest or known ones.
REFUSED = {
    "streams.pairs.masking.mosts=3": "streams.pairs.masking.mosts is not a key of a recipe (did you mean most?)",
    "model.image_sise=64": "image_size",
    "model.preset=huge": "'huge'",
    "updates=[[tekst], [regions, images], [pairs]]": "tekst is not a stream of a recipe (did you mean text?)",
    "schedule.warmup=5000": "schedule.warmup=5000",
    "streams.images.losses=[itc]": "streams.images",
    "updates=[[text], [regions], [pairs]]": "stream images",
    "precision=fp8": "precision='fp8'",
    "init={checkpoint: a, beit2: b}": "beit2",
    "streams.text.every=0": "streams.text.every=0",
    "steps": "'steps'",
}


@pytest.mark.parametrize("override", REFUSED)
def test_refused(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(TINY, [override])
    assert REFUSED[override] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fp16_needs_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"precision=fp16.*device=cpu.*bf16"):
        load_recipe(TINY, ["precision=fp16", "device=cpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UnavailableError, match="precision=fp16"):
        load_recipe(TINY, ["precision=fp16"]).check_machine()
    with pytest.raises(UnavailableError, match="device=cuda"):
        load_recipe(TINY, ["device=cuda"]).check_machine()


def test_the_shapes_world_is_made_once(tmp_path: Path) -> None:
    sizes = [f"shapes.{split}=4" for split in ("train", "val", "test")]
    recipe = load_recipe(TINY, [f"data={tmp_path}/world", *sizes])
    recipe.make_world()
    recipe.check_machine()
    written = (tmp_path / "world/pairs_train.jsonl").stat().st_mtime_ns
    recipe.make_world()
    assert (tmp_path / "world/pairs_train.jsonl").stat().st_mtime_ns == written
    load_recipe(TINY, [f"data={tmp_path}/other", "shapes=null"]).make_world()
    assert not (tmp_path / "other").exists()


def test_auto_depends_on_whether_there_are_weights(tmp_path: Path) -> None:
    """From random weights: ITC alone, for longer, at 2.5 times the learning rate."""
    rows = "".join(f"{number}.png,a cat\n" for number in range(1600))
    (tmp_path / "train.csv").write_text("image,caption\n" + rows)
    sizes = ("model.preset=tiny", f"data={tmp_path}/train.csv")
    random = load_recipe("pretrain_csv", sizes)
    assert random.losses_of("pairs") == ("itc",)
    assert random.optimizer.lr == pytest.approx(5e-5 * 12**1.5, rel=0.01)
    assert random.steps == 50 * (1440 // 64)
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "config.json").write_text(XFMConfig.preset("tiny").model_dump_json())
    given = load_recipe("pretrain_csv", (*sizes, f"init.checkpoint={tmp_path}"))
    assert given.losses_of("pairs") == ("itc", "itm", "imlm", "mim")
    assert given.optimizer.lr == pytest.approx(2e-5 * 12**1.5, rel=0.01)
    assert given.steps == 20 * (1440 // 64)
    assert load_recipe("pretrain_csv", (*sizes, "init.checkpoint=null")) == random
    assert load_recipe("pretrain_csv", (*sizes, "streams.pairs.losses=[itc, itm]")).losses_of(
        "pairs"
    ) == ("itc", "itm")


def test_ablations() -> None:
    full = load_recipe(TINY)
    unguided = load_recipe(TINY, ["method.mim_guidance=false"])
    assert "mim" in full.losses_of("pairs")
    assert unguided.losses_of("pairs") == tuple(
        loss for loss in full.losses_of("pairs") if loss != "mim"
    )
    # The stream of images alone has nothing left to do.
    assert unguided.losses_of("images") == ()
    assert unguided.active_updates == (("text",), ("regions",), ("pairs",))
    assert unguided.updates == full.updates
    with pytest.raises(ConfigError, match=r"streams\.NAME\.every=1"):
        load_recipe(TINY, [f"streams.{name}.every=2" for name in full.streams])
    with pytest.raises(ConfigError, match="loss"):
        load_recipe(
            TINY,
            [
                "method.mim_guidance=false",
                *(f"streams.{n}=null" for n in ("text", "regions", "pairs")),
            ],
        )


def test_one_pair_of_a_micro_batch_holds_no_negative(tmp_path: Path) -> None:
    for name in ("texts", "regions", "images", "pairs"):
        (tmp_path / f"{name}_train.jsonl").touch()
    recipe = load_recipe(TINY, [f"data={tmp_path}", "streams.pairs.batch_size=4", "accumulate=4"])
    assert recipe.micro_batch_size("pairs") == 1
    recipe.check_machine(world_size=2)
    with pytest.raises(ConfigError, match=r"streams\.pairs.*1 .*itm"):
        recipe.check_machine()
