"""NaN and infinity stop a run, by name, and before they reach a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.small_runs import Noise, batch_of, noise, run, small_recipe
from xfm_fast.errors import NonFiniteError, XFMError
from xfm_fast.kernels.cpu import selection
from xfm_fast.models.xfm import XFM
from xfm_fast.training.checkpoints import newest
from xfm_fast.training.guard import Guard
from xfm_fast.training.metrics import Value, mean_by_name
from xfm_fast.training.norms import ModelNorms


class Poisoned(Noise):
    """From a number on, boxes are so large that their distances overflow when they are summed."""

    def batch(self, number: int) -> Any:
        batch = super().batch(number)
        return batch if number < 6 else replace(batch, boxes=torch.full_like(batch.boxes, 3e38))


def test_bad_batch_is_named_and_nothing_is_overwritten(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, steps=12, log={"every": 5})
    sources = noise(recipe) | {"regions": Poisoned("regions", recipe.model, 4)}
    with pytest.raises(
        NonFiniteError, match=r"step 7: loss regions/bbox_l1 is inf: stream regions: the forward operation aten.sum"
    ):
        run(recipe, sources=sources)
    checkpoint = newest(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["step"] == 4
    saved = XFM.from_pretrained(checkpoint.path / "model")
    assert all(bool(parameter.isfinite().all()) for parameter in saved.parameters())
    assert run(recipe).step == 12


def test_bad_parameter_is_named(tmp_path: Path) -> None:
    def poison(step: int, model: XFM) -> None:
        if step == 5:
            with torch.no_grad():
                model.itm_head[0].weight[0, 0] = float("inf")  # type: ignore[union-attr, index]

    with pytest.raises(NonFiniteError, match=r"step 6: loss .*: parameter itm_head.0.weight is not finite"):
        run(small_recipe(tmp_path), on_step=poison)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_packed_weights_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN is the faster library, weights without gradients are kept in a layout that nothing can look into."""
    monkeypatch.setattr(selection, "_selections", {})
    for operation in ("linear", "linear_gelu", "linear_residual"):
        selection.settle(operation, torch.float32, "onednn-packed")
    recipe = small_recipe(tmp_path)
    model = XFM(recipe.model)
    guard, batches = exploding(model, recipe)

    def rerun(_: str, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            hidden = model.encode_image(batch.image)
        return (hidden - hidden.abs().max() - 1).log().mean()

    with pytest.raises(NonFiniteError, match=r"the forward operation aten\.log\.default .* is the first"):
        guard.check([Value(3, "loss/images/mim", float("nan"))], batches, rerun)


def exploding(model: XFM, recipe: Any) -> tuple[Guard, dict[str, Any]]:
    return Guard(model, ModelNorms(model).names), {"images": batch_of(recipe, "images")}


def test_first_operation_is_named(tmp_path: Path) -> None:
    """Of all that is NaN, the logarithm is where it began, right behind the last weight that was read."""
    recipe = small_recipe(tmp_path)
    model = XFM(recipe.model)
    guard, batches = exploding(model, recipe)

    def rerun(_: str, batch: Any) -> torch.Tensor:
        hidden = model.vision_proj(model.encode_image(batch.image)[:, 0])
        return (hidden - hidden.abs().max() - 1).log().mean()

    with pytest.raises(NonFiniteError) as caught:
        guard.check([Value(3, "loss/images/mim", float("nan"))], batches, rerun)
    assert "the forward operation aten.log.default at vision_proj is the first" in str(caught.value)


def test_first_operation_of_the_backward_pass_is_named(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    model = XFM(recipe.model)
    guard, batches = exploding(model, recipe)

    def rerun(_: str, batch: Any) -> torch.Tensor:
        # The square root of zero is finite, its derivative is not.
        return (model.vision_proj.weight * 0).abs().sqrt().sum()

    norms = torch.zeros(len(ModelNorms(model).names))
    at = ModelNorms(model).names.index("vision_proj.weight")
    norms[at] = float("inf")
    guard.watch(3, "images", list(range(len(norms))), norms)
    with pytest.raises(NonFiniteError) as caught:
        guard.check([Value(3, "grad_norm/images", float("inf"))], batches, rerun)
    assert "step 3: grad_norm images is inf: the gradient of vision_proj.weight in update images has norm inf" in str(
        caught.value
    )
    assert "the backward operation aten.div" in str(caught.value)


def test_masks_of_infinity_are_no_fault(tmp_path: Path) -> None:
    """A pass that is fine is found to be fine, though attention hides keys by minus infinity."""
    recipe = small_recipe(tmp_path)
    model = XFM(recipe.model)
    guard, batches = exploding(model, recipe)

    def rerun(_: str, batch: Any) -> torch.Tensor:
        scores = torch.zeros(3, 3).masked_fill(torch.eye(3, dtype=torch.bool), -torch.inf).softmax(1)
        return model.encode_image(batch.image).mean() * scores.mean()

    with pytest.raises(NonFiniteError, match="every tensor of the last batch is finite"):
        guard.check([Value(1, "loss/images/mim", float("nan"))], batches, rerun)


def test_bad_input_is_named(tmp_path: Path) -> None:
    """Losses look at inputs on a CPU alone."""
    recipe = small_recipe(tmp_path)
    guard, batches = exploding(XFM(recipe.model), recipe)
    batches["images"].image[1, 0, 0, 0] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"loss images/mim is nan: image of the batch of stream images is not finite"
    ):
        guard.check([Value(1, "loss/images/mim", float("nan"))], batches)


def test_overflow_of_a_scaled_loss_is_no_fault(tmp_path: Path) -> None:
    """The loss scale takes care of it, until there is none left."""
    recipe = small_recipe(tmp_path)
    model = XFM(recipe.model)
    guard = Guard(model, ModelNorms(model).names, scaled=True)
    overflow = [Value(1, "grad_norm/pairs", float("inf")), Value(1, "loss_scale", 512.0)]
    guard.check(overflow, {})
    assert mean_by_name(overflow) == {"loss_scale": 512.0}
    with pytest.raises(NonFiniteError, match=r"step 2: loss_scale is 0\.5"):
        guard.check([Value(2, "loss_scale", 0.5)], {})
    with pytest.raises(NonFiniteError, match="loss pairs/itc is inf"):
        guard.check([Value(2, "loss/pairs/itc", float("inf"))], {})


def test_finite_values_pass_and_are_forgotten(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    guard, batches = exploding(XFM(recipe.model), recipe)
    guard.watch(1, "pairs", [0], torch.tensor([float("nan")]))
    guard.check([Value(1, "grad_norm/pairs", 1.0)], batches)
    with pytest.raises(NonFiniteError) as caught:
        guard.check([Value(2, "grad_norm/pairs", float("nan"))], {})
    assert "the gradient of" not in str(caught.value)
    assert isinstance(caught.value, XFMError)
