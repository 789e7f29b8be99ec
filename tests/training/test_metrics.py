"""What a run tells: log lines, norms, rates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.small_runs import Noise, batch_of, noise, numbers, run, small_recipe
from xfm_fast.errors import NonFiniteError
from xfm_fast.kernels.cpu import selection
from xfm_fast.models.xfm import XFM
from xfm_fast.training.checkpoints import newest
from xfm_fast.training.metrics import Guard, ModelNorms, Value, Work, mean_by_name


def test_log_lines_are_means_since_the_last_one(tmp_path: Path) -> None:
    run(small_recipe(tmp_path / "every", steps=4))
    run(
        small_recipe(
            tmp_path / "second",
            steps=4,
            log={"every": 2},
            checkpoint={"folder": str(tmp_path / "second")},
        )
    )
    each, second = numbers(tmp_path / "every"), numbers(tmp_path / "second")
    assert [line["step"] for line in second] == [2, 4]
    assert [line["steps"] for line in second] == [2, 2]
    for name in ("loss/pairs/itm", "loss/text/mlm", "grad_norm/regions+images"):
        for number, line in enumerate(second):
            mean = sum(part[name] for part in each[2 * number : 2 * number + 2]) / 2
            assert line[name] == pytest.approx(mean, rel=1e-6)
    # Norms that need work of their own are those of the step itself.
    assert second[0]["update_norm/all"] == pytest.approx(each[1]["update_norm/all"], rel=1e-6)
    assert {name for name in second[0] if name.startswith("loss/")} == {
        "loss/text/mlm", "loss/images/mim",
        *(f"loss/regions/{loss}" for loss in ("itc", "itm", "imlm", "bbox_l1", "bbox_giou")),
        *(f"loss/pairs/{loss}" for loss in ("itc", "itm", "imlm", "mim")),
    }  # fmt: skip


def test_norms_are_those_of_all_parameters() -> None:
    model = XFM(small_recipe(Path("nowhere")).model).double()
    norms = ModelNorms(model)
    before, was = norms.copy(), torch.cat([p.detach().flatten() for p in model.parameters()])
    model.vision_proj.weight.grad = torch.randn_like(model.vision_proj.weight)
    model.text_encoder.roberta.embeddings.LayerNorm.weight.grad = torch.randn(
        64, dtype=torch.float64
    )
    having, each = norms.gradients()
    assert [norms.names[i] for i in having] == [
        n for n, p in model.named_parameters() if p.grad is not None
    ]
    parts = norms.by_encoder(each, having)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    torch.testing.assert_close(parts["all"], expected)
    torch.testing.assert_close(
        parts["text_encoder"], model.text_encoder.roberta.embeddings.LayerNorm.weight.grad.norm()
    )
    assert parts["vision_encoder"] == 0
    torch.testing.assert_close(norms.values()["all"], was.norm())

    twin = [gradient.clone() for gradient in gradients]
    norms.clip_(parts["all"], 0.5)
    torch.testing.assert_close(
        [p.grad for p in model.parameters() if p.grad is not None],
        [gradient * (0.5 / (expected + 1e-6)) for gradient in twin],
    )
    norms.clip_(norms.gradients()[1].norm(), 100.0)
    torch.testing.assert_close(
        norms.gradients()[1].norm(), torch.tensor(0.5, dtype=torch.float64), rtol=1e-5, atol=0
    )

    with torch.no_grad():
        model.temp.add_(0.25)
    assert norms.updates(before)["all"] == pytest.approx(0.25)
    assert norms.updates(before)["fusion_encoder"] == 0


def test_rates_count_all_processes() -> None:
    work, batch = Work(world_size=2), batch_of(small_recipe(Path("nowhere")), "pairs")
    for _ in range(2):
        work.count(batch)
    tokens = int(batch.attention_mask.sum())
    assert work.rates(2, 4.0) == {
        "seconds": 2.0,
        "images_per_s": 2 * 2 * 4 / 4.0,
        "tokens_per_s": 2 * 2 * tokens / 4.0,
    }
    assert work.rates(1, 1.0)["images_per_s"] == 0


def test_bad_batch_is_named_and_nothing_is_overwritten(tmp_path: Path) -> None:
    class Poisoned(Noise):
        """From a number on, boxes are so large that their distances overflow when they are summed."""

        def batch(self, number: int) -> Any:
            batch = super().batch(number)
            return batch if number < 6 else replace(batch, boxes=torch.full_like(batch.boxes, 3e38))

    recipe = small_recipe(tmp_path, steps=12, log={"every": 5})
    sources = noise(recipe) | {"regions": Poisoned("regions", recipe.model, 4)}
    with pytest.raises(NonFiniteError, match=r"step 7.*regions/bbox_l1.*inf.*regions.*aten.sum"):
        run(recipe, sources=sources)
    checkpoint = newest(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.state["step"] == 4
    saved = XFM.from_pretrained(checkpoint.path / "model")
    assert all(bool(parameter.isfinite().all()) for parameter in saved.parameters())
    assert run(recipe).step == 12


def test_bad_parameter_is_named(tmp_path: Path) -> None:
    def poison(step: int, model: XFM, _: object) -> None:
        if step == 5:
            with torch.no_grad():
                model.itm_head[0].weight[0, 0] = float("inf")  # type: ignore[union-attr, index]

    with pytest.raises(NonFiniteError, match=r"step 6.*itm_head.0.weight"):
        run(small_recipe(tmp_path), on_step=poison)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_packed_weights_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN is the faster library, weights without gradients are kept in a layout that nothing can look into."""
    monkeypatch.setattr(selection, "_selections", {})
    for operation in ("linear", "linear_gelu", "linear_residual"):
        selection.set_choice(operation, torch.float32, "onednn-packed")
    model, guard, batches = exploding(tmp_path)

    def rerun(_: str, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            hidden = model.encode_image(batch.image)
        return (hidden - hidden.abs().max() - 1).log().mean()

    with pytest.raises(NonFiniteError, match=r"aten\.log\.default"):
        guard.check([Value(3, "loss/images/mim", float("nan"))], batches, rerun)


def exploding(folder: Path) -> tuple[XFM, Guard, dict[str, Any]]:
    recipe = small_recipe(folder)
    model = XFM(recipe.model)
    return model, Guard(model, ModelNorms(model).names), {"images": batch_of(recipe, "images")}


def test_first_operation_of_the_backward_pass_is_named(tmp_path: Path) -> None:
    model, guard, batches = exploding(tmp_path)

    def rerun(_: str, batch: Any) -> torch.Tensor:
        # The square root of zero is finite, its derivative is not.
        return (model.vision_proj.weight * 0).abs().sqrt().sum()

    norms = torch.zeros(len(ModelNorms(model).names))
    at = ModelNorms(model).names.index("vision_proj.weight")
    norms[at] = float("inf")
    guard.watch("images", list(range(len(norms))), norms)
    with pytest.raises(NonFiniteError) as caught:
        guard.check([Value(3, "grad_norm/images", float("inf"))], batches, rerun)
    assert (
        "step 3: grad_norm images is inf: the gradient of vision_proj.weight in update images has norm inf"
        in str(caught.value)
    )
    assert "backward operation aten.div" in str(caught.value)


def test_masks_of_infinity_are_no_fault(tmp_path: Path) -> None:
    """A pass that is fine is found to be fine, though attention hides keys by minus infinity."""
    model, guard, batches = exploding(tmp_path)

    def rerun(_: str, batch: Any) -> torch.Tensor:
        scores = (
            torch.zeros(3, 3).masked_fill(torch.eye(3, dtype=torch.bool), -torch.inf).softmax(1)
        )
        return model.encode_image(batch.image).mean() * scores.mean()

    with pytest.raises(NonFiniteError, match="batch"):
        guard.check([Value(1, "loss/images/mim", float("nan"))], batches, rerun)


def test_overflow_of_a_scaled_loss_is_no_fault(tmp_path: Path) -> None:
    """The loss scale takes care of it, until there is none left."""
    recipe = small_recipe(tmp_path)
    model = XFM(recipe.model)
    guard = Guard(model, ModelNorms(model).names, scaled=True)
    overflow = [Value(1, "grad_norm/pairs", float("inf")), Value(1, "loss_scale", 512.0)]
    guard.check(overflow, {})
    assert mean_by_name(overflow) == {"loss_scale": 512.0}
    with pytest.raises(NonFiniteError, match=r"step 2.*loss_scale.*0\.5"):
        guard.check([Value(2, "loss_scale", 0.5)], {})
    with pytest.raises(NonFiniteError, match=r"pairs/itc.*inf"):
        guard.check([Value(2, "loss/pairs/itc", float("inf"))], {})
