"""No copy of a weight goes stale: an edit of an accelerated model acts as on an untouched twin, or is refused."""

from __future__ import annotations

import copy
import ctypes
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

pytest.importorskip("transformers")

from tests.replace.families import batch, build, make, pixels, randomised, real
from xfm_fast import accelerate
from xfm_fast.errors import InputError
from xfm_fast.kernels import caching
from xfm_fast.kernels.cpu import gemm, int8

# Sizes that all kernels take, and of which weights are too large to be compared whole.
_SIZES: dict[str, Any] = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 256}


def _query(model: Any) -> Any:
    return model.encoder.layer[0].attention.self.query


def _of_data(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """An edit of the query's weight past the version counter."""
    return lambda model: change(_query(model).weight.data)


def _of_array(change: Callable[[np.ndarray], Any]) -> Callable[[Any], Any]:
    return lambda model: change(_query(model).weight.detach().numpy())


def _add(array: np.ndarray) -> None:
    array += 0.2


def _counted(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """An edit that the version counter sees."""
    return torch.no_grad()(lambda model: change(_query(model).weight))


def _assign(model: Any, times: int) -> None:
    for _ in range(times):
        _query(model).weight.data = _query(model).weight.data * 1.5


def _transposed(model: Any) -> None:
    _query(model).weight.data = _query(model).weight.data.t()


def _swap_tensors(model: Any) -> None:
    layer = _query(model)
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach() * 1.5))


def _vector(model: Any) -> None:
    parameters = [*model.encoder.layer[0].parameters()]
    vector = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(vector * 1.1, parameters)


def _average(model: Any) -> None:
    for parameter in model.encoder.parameters():
        parameter.data.lerp_(torch.full_like(parameter, 0.1), 0.2)


def _foreach(model: Any) -> None:
    torch._foreach_mul_([parameter.data for parameter in model.encoder.parameters()], 1.1)


def _step(model: Any, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    taught = optimizer(model.encoder.parameters(), lr=0.05)
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(True).grad = torch.ones_like(parameter)
    taught.step()
    taught.zero_grad()


def _load(model: Any, assign: bool) -> None:
    state = {
        name: value * 1.1 if "query" in name else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=assign)


def _new_parameter(model: Any) -> None:
    _query(model).weight = nn.Parameter(_query(model).weight.detach() * 1.5)


def _new_layer(model: Any) -> None:
    torch.manual_seed(3)
    model.encoder.layer[0].attention.self.query = nn.Linear(192, 192).eval()


def _tie(model: Any) -> None:
    attention = model.encoder.layer[0].attention.self
    attention.query.weight = attention.key.weight


def _prune_and_remove(model: Any) -> None:
    prune.ln_structured(_query(model), "weight", 0.5, n=2, dim=1)
    prune.remove(_query(model), "weight")


def _weight_norm(model: Any) -> None:
    nn.utils.weight_norm(_query(model))
    _query(model).weight_g.data.mul_(1.5)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _parametrize(model: Any, leave: bool) -> None:
    parametrize.register_parametrization(_query(model), "weight", _Doubled())
    if leave:
        parametrize.remove_parametrizations(_query(model), "weight")


def _orthogonal(model: Any) -> None:
    torch.manual_seed(4)
    parametrizations.orthogonal(_query(model))


@torch.no_grad()
def _other_memory(model: Any) -> None:
    weight = _query(model).weight
    weight.set_((weight * 1.5).untyped_storage(), 0, weight.shape, weight.stride())


def _storage(model: Any) -> None:
    weight = _query(model).weight
    weight.untyped_storage().copy_((weight.detach() * 1.5).untyped_storage())


def _address(model: Any) -> None:
    weight = _query(model).weight
    scaled = (weight.detach() * 1.5).contiguous()
    ctypes.memmove(weight.data_ptr(), scaled.data_ptr(), scaled.nbytes)


def _shared_memory(model: Any) -> None:
    _query(model).weight.share_memory_()
    _query(model).weight.data[:, 1:].mul_(1.5)


def _thread(model: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: _query(model).weight.data[:, 1:].mul_(1.5)).result()


@torch.inference_mode()
def _in_inference_mode(model: Any) -> None:
    _query(model).weight.mul_(1.5)


def _random_elements(weight: Tensor) -> None:
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = 0


def _bias(model: Any) -> None:
    _query(model).bias.data[77] += 3


def _norm(model: Any) -> None:
    model.encoder.layer[0].attention.output.LayerNorm.weight.data[40:60] *= 2


def _mlp(model: Any) -> None:
    model.encoder.layer[1].intermediate.dense.weight.data[100:130] *= 2
    model.encoder.layer[1].output.dense.weight.detach().numpy()[:, 150:170] *= 2


EDITS: dict[str, Callable[[Any], Any]] = {
    # Past the version counter.
    "whole": _of_data(lambda weight: weight.mul_(2)),
    "all columns but one": _of_data(lambda weight: weight[:, 1:].mul_(2)),
    "all rows but one": _of_data(lambda weight: weight[1:].mul_(2)),
    "pruned columns": _of_data(lambda weight: weight[:, 5::7].zero_()),
    "pruned rows": _of_data(lambda weight: weight[3::5].zero_()),
    "one row": _of_data(lambda weight: weight[37].add_(0.5)),
    "one column": _of_data(lambda weight: weight[:, 41].add_(0.5)),
    "last row": _of_data(lambda weight: weight[-1].add_(0.5)),
    "last column": _of_data(lambda weight: weight[:, -1].add_(0.5)),
    "a head": _of_data(lambda weight: weight[64:128].zero_()),
    "a block": _of_data(lambda weight: weight[70:100, 10:40].add_(0.5)),
    "upper triangle": _of_data(lambda weight: weight.triu_(1)),
    "diagonal": _of_data(lambda weight: weight.add_(torch.eye(192, dtype=weight.dtype))),
    "random elements": _of_data(_random_elements),
    "clamped": _of_data(lambda weight: weight.clamp_(-0.1, 0.1)),
    "rounded": _of_data(lambda weight: weight.copy_((weight * 4).round() / 4)),
    "drawn": _of_data(lambda weight: weight.normal_(generator=torch.Generator().manual_seed(2))),
    "an array": _of_array(_add),
    "an array's row": _of_array(lambda array: _add(array[12])),
    "an array's column": _of_array(lambda array: _add(array[:, 12])),
    "an array's block": _of_array(lambda array: _add(array[50:80, 50:80])),
    "DLPack": lambda model: torch.from_dlpack(_query(model).weight.detach())[:, 3:].mul_(2),
    "storage": _storage,
    "address": _address,
    "thread": _thread,
    "shared memory": _shared_memory,
    "moving average": _average,
    "several at once": _foreach,
    "vector_to_parameters": _vector,
    "bias": _bias,
    "norm": _norm,
    "MLP": _mlp,
    # Counted, other memory, other parameters, other layers.
    "in place": _counted(lambda weight: weight.mul_(1.5)),
    "one element": _counted(lambda weight: weight[3, 100].add_(9.0)),
    "copy_": _counted(lambda weight: weight.copy_(weight * 1.5)),
    "init": lambda model: nn.init.trunc_normal_(
        _query(model).weight, generator=torch.Generator().manual_seed(2)
    ),
    "detached": lambda model: _query(model).weight.detach().mul_(1.5),
    "inference mode": _in_inference_mode,
    "other data": partial(_assign, times=1),
    "other data twice": partial(_assign, times=2),
    "transposed data": _transposed,
    "set_": _other_memory,
    "swap_tensors": _swap_tensors,
    "SGD": partial(_step, optimizer=torch.optim.SGD),
    "AdamW": partial(_step, optimizer=torch.optim.AdamW),
    "load_state_dict": partial(_load, assign=False),
    "load_state_dict, assigned": partial(_load, assign=True),
    "parameter": _new_parameter,
    "layer": _new_layer,
    "tied": _tie,
    "prune": lambda model: prune.l1_unstructured(_query(model), "weight", 0.5),
    "pruned for good": _prune_and_remove,
    "weight_norm": _weight_norm,
    "parametrized": partial(_parametrize, leave=False),
    "parametrized for good": partial(_parametrize, leave=True),
    "orthogonal": _orthogonal,
    "narrow and back": lambda model: model.encoder.to(torch.float16).to(torch.float32),
}


# Loops over all parameters pass by the weights of a frozen model, as its report says.
_OF_PARAMETERS = (
    "moving average",
    "several at once",
    "vector_to_parameters",
    "SGD",
    "AdamW",
    "narrow and back",
)


def _lora(model: Any, *names: str) -> Any:
    peft = pytest.importorskip("peft")
    made = None
    for name in names or ("default",):
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["query", "value", "output.dense"]
        )
        torch.manual_seed(len(name))
        if made is None:
            made = peft.get_peft_model(model, config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    assert made is not None
    generator = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return made.eval()


def _train_adapter(model: Any) -> None:
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in factors:
        parameter.grad = torch.full_like(parameter, 0.5)
    torch.optim.SGD(factors, lr=1.0).step()


def _columns_of_adapter(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data[:, 1:].mul_(2)


def _base_under_adapter(model: Any) -> None:
    model.base_model.model.encoder.layer[0].attention.self.query.base_layer.weight.data[:, 1:].mul_(
        2
    )


def _merge_and_part(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def _scaled(model: Any) -> None:
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("one", 0.3)


def _weighted(model: Any) -> None:
    model.add_weighted_adapter(["one", "two"], [0.7, 0.2], "both", combination_type="linear")
    model.set_adapter("both")


# Stages of a model with the adapters "one", active, and "two"; what they return is the model from then on.
STAGES: dict[str, Callable[[Any], Any]] = {
    "training step": _train_adapter,
    "columns of a factor": _columns_of_adapter,
    "base weight": _base_under_adapter,
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload, safely": lambda model: model.merge_and_unload(safe_merge=True),
    "unload": lambda model: model.unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "unmerge_adapter": _merge_and_part,
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "other adapter": lambda model: model.set_adapter("two"),
    "both": lambda model: model.base_model.set_adapter(["one", "two"]),
    "delete the active": lambda model: model.delete_adapter("one"),
    "scale": _scaled,
    "weighted": _weighted,
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no gradient": torch.no_grad,
    "inference": torch.inference_mode,
    "gradient": torch.enable_grad,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "unpadded": {"unpad": True},
    "bf16": {"dtype": torch.bfloat16, "unpad": True},
    "int8": {"dtype": "int8"},
    "frozen": {"freeze": True},
    "in panels": {"freeze": True, "unpad": True},
    # Products in floats that keep a packed copy of every weight, as a processor may choose them.
    "packed": {"unpad": True},
}


@pytest.fixture(params=OPTIONS)
def options(
    request: pytest.FixtureRequest,
    int8_chosen: None,
    monkeypatch: pytest.MonkeyPatch,
    freeze_in: Callable[[gemm.Layout], None],
) -> dict[str, Any]:
    """Options, with int8 wherever it runs, and weights frozen in oneDNN's layout and in panels."""
    if request.param == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    if request.param == "int8" and int8.why_not() is not None:
        pytest.skip(f"no int8 products here: {int8.why_not()}")
    freeze_in("panels" if request.param == "in panels" else "onednn")
    if request.param == "packed":
        monkeypatch.setattr(gemm, "_choose", lambda operation, weight, rows: "onednn-packed")
    return OPTIONS[request.param]


def _states(model: Any, given: dict[str, Any], mode: str) -> Tensor:
    with MODES[mode]():
        found = real(model(**given).last_hidden_state, given.get("attention_mask"))
    with torch.inference_mode(False):
        return found.detach().float().clone()


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _refusal(edit: Callable[[Any], Any], model: Any) -> Exception | None:
    try:
        edit(model)
    except (InputError, RuntimeError, ValueError) as error:
        return error
    return None


def _assert_followed(
    original: Any,
    edit: Callable[[Any], Any],
    options: dict[str, Any],
    given: dict[str, Any],
    mode: str,
) -> None:
    """The edit acts on an accelerated copy that has run as on one that is accelerated after it; or it is refused."""
    fast, twin = copy.deepcopy(original), copy.deepcopy(original)
    accelerate(fast, **options)
    before = _states(fast, given, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = _refusal(edit, fast)
        if refusal is not None:
            assert options.get("freeze"), refusal
            # Nothing was half written.
            assert torch.equal(_states(fast, given, mode), before)
            return
        edit(twin)
    found, untouched = _states(fast, given, mode), _states(twin, given, mode)
    assert _error(found, before) > 1e-4, "the edit left no trace"
    if not options.get("dtype"):
        assert _error(found, untouched) < 2e-5
        return
    accelerate(twin, **options)
    wanted = _states(twin, given, mode)
    assert _error(found, wanted) < 2.0**-6
    assert _error(found, untouched) < 0.25


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_followed_or_refused(edit: str, options: dict[str, Any]) -> None:
    if options.get("freeze") and edit in _OF_PARAMETERS:
        pytest.skip("the weights of a frozen model are no parameters")
    original = make("BertModel", torch.float32, **_SIZES).eval()
    for mode in MODES:
        _assert_followed(original, EDITS[edit], options, batch(), mode)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_of_adapters_is_followed_or_refused(stage: str, options: dict[str, Any]) -> None:
    original = make("BertModel", torch.float32, **_SIZES).eval()
    for mode in MODES:
        fast, twin = copy.deepcopy(original), copy.deepcopy(original)
        report = accelerate(fast, **options)
        bare = _states(fast, batch(), mode)
        fast, twin = _lora(fast, "one", "two"), _lora(twin, "one", "two")
        bound = 2e-5 if not options.get("dtype") else 0.06
        before, wanted = _states(fast, batch(), mode), _states(twin, batch(), mode)
        assert _error(before, bare) > 1e-2
        assert _error(before, wanted) < bound
        if options.get("freeze") and ("merge" in stage or stage == "base weight"):
            with pytest.raises(InputError, match=r"report\.revert\(\)"):
                STAGES[stage](fast)
            report.revert()
        fast = STAGES[stage](fast) or fast
        twin = STAGES[stage](twin) or twin
        wanted = _states(twin, batch(), mode)
        assert _error(_states(fast, batch(), mode), wanted) < bound
        assert stage in (
            "merge_and_unload",
            "merge_and_unload, safely",
            "merge_adapter",
            "unmerge_adapter",
        ) or (_error(before, wanted) > 1e-3)


_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "BEiT": ("BeitModel", {"use_relative_position_bias": True}),
    "ViT": ("ViTModel", {}),
}


def _every_matrix(model: Any) -> None:
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.weight.data[:, 1:].mul_(1.5)
    for name, parameter in model.named_parameters():
        if "table" in name:
            parameter.data[1:].mul_(3.0)


@pytest.mark.parametrize("family", _TABLES)
def test_edits_of_images(family: str, options: dict[str, Any]) -> None:
    name, changes = _TABLES[family]
    sizes = {
        "image_size": 64,
        "patch_size": 8,
        "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.0,
        **_SIZES,
    }
    original = randomised(build(name, sizes, **changes), torch.float32)
    options = {key: value for key, value in options.items() if key != "unpad"}
    for mode in MODES:
        _assert_followed(
            original, _every_matrix, options, {"pixel_values": pixels(torch.float32, 64)}, mode
        )


@pytest.mark.parametrize(
    ("rows", "columns"), [(128, 128), (192, 128), (128, 192), (100, 77), (70, 300), (5000, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("compiled", [True, False])
def test_every_row_column_and_block_is_seen(
    rows: int, columns: int, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(caching, "_has_words", lambda tensor: False)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    turned = weight.t()
    for tensor in (weight, turned):
        for number in range(tensor.shape[0]):
            seen = caching.Sources([turned if tensor is turned else weight])
            tensor.data[number] *= 2
            assert not seen.unchanged([tensor])
            if number > 300:
                break
    side = int((6 * max(rows, columns)) ** 0.5) + 1
    generator = torch.Generator().manual_seed(2)
    for _ in range(50 if side < min(rows, columns) else 0):
        row, column = (
            int(torch.randint(size - side, (), generator=generator)) for size in (rows, columns)
        )
        seen = caching.Sources([weight])
        weight.data[row : row + side, column : column + side] *= 2
        assert not seen.unchanged([weight])
    assert caching.Sources([weight]).unchanged([weight])
