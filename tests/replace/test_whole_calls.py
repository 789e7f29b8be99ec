"""`encode` and `predict` of accelerated models of sentence-transformers, against the library's."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
library: Any = pytest.importorskip("sentence_transformers", exc_type=ImportError)

from sentence_transformers.sentence_transformer import modules as stack  # noqa: E402

from tests import library_models  # noqa: E402
from xfm_fast import accelerate  # noqa: E402
from xfm_fast.data.shapes import VOCABULARY  # noqa: E402
from xfm_fast.errors import InputError  # noqa: E402
from xfm_fast.replace import calls, unpadded  # noqa: E402
from xfm_fast.replace.layer import FusedLayer  # noqa: E402
from xfm_fast.replace.swap import BANDS, counted  # noqa: E402

BAND = BANDS[torch.float32]


def sample(count: int) -> list[str]:
    """Return texts of 0 to 30 words, in no order."""
    draw = np.random.default_rng(0)
    words = [word.lower() for word in VOCABULARY]
    return [" ".join(draw.choice(words, size=draw.integers(0, 30))) for _ in range(count)]


TEXTS = sample(70)
PAIRS = [(TEXTS[0], text) for text in TEXTS]
Make = Callable[[], Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "embedder": library_models.write_embedder(root / "a"),
        "reranker": library_models.write_reranker(root / "b"),
        "labels": library_models.write_reranker(root / "c", labels=3),
        "sparse": library_models.write_sparse(root / "d"),
        "clip": library_models.write_clip(root / "e"),
    }


@pytest.fixture
def embedder(folders: dict[str, Path]) -> Make:
    return lambda: library.SentenceTransformer(str(folders["embedder"]), device="cpu")


@pytest.fixture
def reranker(folders: dict[str, Path]) -> Make:
    return lambda: library.CrossEncoder(str(folders["reranker"]), device="cpu")


def stacked(folders: dict[str, Path], *modules: nn.Module, **settings: Any) -> Any:
    """Return a model of the tiny BERT and these modules."""
    bert = stack.Transformer(str(folders["embedder"].parent / "bert"))
    return library.SentenceTransformer(modules=[bert, *modules], device="cpu", **settings)


def assert_close(new: Any, old: Any) -> None:
    """Compare two outputs of any of the library's types."""
    assert type(new) is type(old)
    if isinstance(old, list):
        assert len(new) == len(old)
        for pair in zip(new, old, strict=True):
            assert_close(*pair)
        return
    assert (new.shape, new.dtype) == (old.shape, old.dtype)
    if isinstance(old, torch.Tensor):
        assert (new.layout, new.device) == (old.layout, old.device)
        new, old = (tensor.to_dense().float().numpy() for tensor in (new, old))
    scale = float(np.abs(old).max()) if old.size else 1.0
    np.testing.assert_allclose(new, old, rtol=0, atol=BAND * scale)


@pytest.fixture
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of the inputs that the library's own loops got."""
    numbers = list[int]()

    def recorded(inference: Any) -> Any:
        def record(self: Any, inputs: list[Any], **options: Any) -> Any:
            numbers.append(len(inputs))
            return inference(self, inputs, **options)

        return record

    for name in ("SentenceTransformer", "CrossEncoder", "SparseEncoder"):
        original = getattr(library, name)
        monkeypatch.setattr(original, "_inference", recorded(original._inference))
    return numbers


def test_calls_are_reported(embedder: Make) -> None:
    model = embedder()
    report = accelerate(model, unpad=True, verify=TEXTS[:3])
    (entry,) = (entry for entry in report.replaced if entry.path == "")
    assert (entry.class_name, entry.fused, entry.share) == ("SentenceTransformer", "WholeEncode", 0)
    assert report.runs[""] == 1
    # The library never calls the pooler of a model whose states it averages.
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    pooler = model[0].auto_model.pooler.dense.weight.numel()
    assert report.share == pytest.approx(1 - pooler / sum(part.weight.numel() for part in linear))


def test_a_library_without_the_loop_is_reported(
    embedder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before sentence-transformers 6.2, `encode` has no part that can be replaced."""
    for owner in library.SentenceTransformer.__mro__:
        if "_inference" in vars(owner):
            monkeypatch.delattr(owner, "_inference")
    report = accelerate(embedder(), unpad=True)
    (entry,) = (entry for entry in report.left if entry.path == "")
    assert "6.2" in (entry.reason or "")
    assert str(entry.reason) in str(report)
    assert report.share > 0.9


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 7},
        {"normalize_embeddings": True},
        {"truncate_dim": 5},
        {"truncate_dim": 5, "normalize_embeddings": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"prompt": "red car "},
        {"prompt_name": "query"},
        {"task": "query"},
        {"precision": "int8"},
        {"precision": "ubinary"},
        {"output_value": "token_embeddings"},
        {"output_value": None, "convert_to_numpy": False},
        {"processing_kwargs": {"text": {"max_length": 6}}},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_encode_equals_the_library(embedder: Make, options: dict[str, Any], unpad: bool) -> None:
    model = embedder()
    with torch.no_grad():
        # Otherwise the embeddings of texts of a few letters differ only by rounding.
        old = model.encode(TEXTS, **options)
    accelerate(model, unpad=unpad)
    new = model.encode(TEXTS, **options)
    if "precision" in options:
        differences = np.abs(np.asarray(new, int) - np.asarray(old, int))
        assert (differences > 0).mean() < 0.02
    elif options.get("output_value", "") is None:
        assert_close(
            [row["sentence_embedding"] for row in new], [row["sentence_embedding"] for row in old]
        )
    else:
        assert_close(new, old)
    assert not model.training


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize(
    "inputs",
    [[], "two red cars", "", [""], ["", "a"], TEXTS[:1], tuple(TEXTS[:3]), np.array(TEXTS[:3])],
    ids=repr,
)
def test_inputs(embedder: Make, inputs: Any, unpad: bool) -> None:
    model = embedder()
    old = model.encode(inputs)
    accelerate(model, unpad=unpad)
    assert_close(model.encode(inputs), old)
    if len(old):
        assert_close(model.encode(inputs, convert_to_tensor=True), torch.as_tensor(old))


def test_roles_have_their_prompts(embedder: Make) -> None:
    model = embedder()
    old = model.encode_query(TEXTS), model.encode_document(TEXTS)
    accelerate(model, unpad=True)
    assert_close(model.encode_query(TEXTS), old[0])
    assert_close(model.encode_document(TEXTS), old[1])
    assert np.abs(old[0] - old[1]).max() > 0.01


@pytest.mark.parametrize(
    "mode", ["mean", "cls", "max", "lasttoken", "weightedmean", ("mean", "max")]
)
@pytest.mark.parametrize("tail", ["nothing", "dense", "norm"])
def test_stacks(folders: dict[str, Path], mode: Any, tail: str, fallbacks: list[int]) -> None:
    torch.manual_seed(0)
    pooling = stack.Pooling(64, mode)
    width = pooling.get_embedding_dimension()
    modules = {"nothing": [], "dense": [stack.Dense(width, 9)], "norm": [stack.Normalize()]}[tail]
    model = stacked(folders, pooling, *modules)
    old = model.encode(TEXTS)
    fallbacks.clear()
    accelerate(model, unpad=True)
    new = model.encode(TEXTS)
    assert_close(new, old)
    assert not fallbacks


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_prompt_out_of_the_mean(folders: dict[str, Path], mode: Any) -> None:
    model = stacked(folders, stack.Pooling(64, mode, include_prompt=False))
    old = model.encode(TEXTS, prompt="red car ")
    accelerate(model, unpad=True)
    assert_close(model.encode(TEXTS, prompt="red car "), old)
    assert_close(
        model.encode(TEXTS[:3]), stacked(folders, stack.Pooling(64, mode)).encode(TEXTS[:3])
    )


def test_states_are_pooled_as_they_are_packed(
    embedder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = embedder()
    accelerate(model, unpad=True)
    monkeypatch.setattr(stack.Pooling, "forward", None)
    assert model.encode(TEXTS).shape == (len(TEXTS), 64)


@pytest.mark.parametrize("unpad", [True, False])
def test_the_library_runs_what_it_alone_can(
    folders: dict[str, Path], embedder: Make, fallbacks: list[int], unpad: bool
) -> None:
    model = embedder()
    report = accelerate(model, unpad=unpad)
    old = model.encode(TEXTS)
    assert not fallbacks
    for module in (model, model[0], model[1]):
        seen = list[int]()
        handle = module.register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        assert_close(model.encode(TEXTS), old)
        assert "" in report.declining
        handle.remove()
        assert len(seen) == 3, "three batches of 32 texts"
    assert fallbacks == [len(TEXTS)] * 3
    assert "" not in report.declining
    model._compiled_call_impl = model._call_impl  # as after `compile`, which takes a minute
    assert_close(model.encode(TEXTS[:3]), old[:3])
    assert len(fallbacks) == 4
    report.revert()
    model._compiled_call_impl = None
    assert_close(model.encode(TEXTS), old)
    assert len(fallbacks) == 5


def test_mode_and_modules_may_change(folders: dict[str, Path], embedder: Make) -> None:
    model = embedder()
    accelerate(model, unpad=True)
    old = model.encode(TEXTS)
    for module in (model, model[0].model.encoder):
        module.train()
        assert_close(model.encode(TEXTS), old)
        assert not any(module.training for module in model.modules())
    with torch.no_grad():
        model[0].model.embeddings.word_embeddings.weight.mul_(-1)
    assert np.abs(model.encode(TEXTS) - old).max() > 0.01
    torch.manual_seed(0)
    dense = stack.Dense(64, 9)
    model.append(dense)
    assert model.encode(TEXTS).shape == (len(TEXTS), 9)
    model[3].train()
    model.encode(TEXTS)
    assert not dense.training
    model.max_seq_length = 5
    plain = embedder()
    plain.max_seq_length = 5
    plain.append(dense)
    with torch.no_grad():
        plain[0].model.embeddings.word_embeddings.weight.mul_(-1)
    assert_close(model.encode(TEXTS), plain.encode(TEXTS))


def test_windows_are_tokenised_ahead(
    embedder: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = embedder()
    old = model.encode(TEXTS)
    accelerate(model, unpad=True)
    monkeypatch.setattr(calls, "_WINDOW", 16)
    monkeypatch.setattr(calls, "_BATCH_TOKENS", 100)
    new = model.encode(TEXTS, show_progress_bar=True)
    assert_close(new, old)
    bar = capsys.readouterr().err
    assert "Batches: 100%" in bar
    assert "3/3" in bar
    assert_close(model.encode(TEXTS, batch_size=3), old)

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("the tokenizer")

    monkeypatch.setattr(type(model[0].tokenizer), "_encode_plus", fail)
    with pytest.raises(RuntimeError, match="the tokenizer"):
        model.encode(TEXTS)


@pytest.mark.parametrize("size", [1, 5, 31, 33])
def test_batch_size_is_a_bound(embedder: Make, size: int) -> None:
    model, sizes = embedder(), list[int]()
    accelerate(model)
    compute = model._compute

    def recorded(features: dict[str, Any]) -> Any:
        sizes.append(len(features["input_ids"]))
        return compute(features)

    model.__dict__["_compute"] = recorded
    model.encode(TEXTS, batch_size=size)
    assert max(sizes) <= size
    assert sum(sizes) == len(TEXTS)


def test_copies_and_nesting(embedder: Make) -> None:
    model = embedder()
    old = model.encode(TEXTS)
    outer = nn.ModuleDict({"inner": model})
    accelerate(outer, unpad=True)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin).__bases__[0] is calls.WholeEncode
        assert_close(twin.encode(TEXTS), old)
    reference = weakref.ref(twin)
    del twin
    gc.collect()
    assert reference() is None


@pytest.mark.slow
def test_pool(embedder: Make) -> None:
    model = embedder()
    old = model.encode(TEXTS)
    accelerate(model, unpad=True)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        assert_close(model.encode(TEXTS, pool=pool), old)
    finally:
        model.stop_multi_process_pool(pool)


def test_images(folders: dict[str, Path]) -> None:
    from PIL import Image

    model = library.SentenceTransformer(str(folders["clip"]), device="cpu")
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    old = model.encode(images), model.encode(TEXTS)
    accelerate(model, unpad=True)
    assert_close(model.encode(images), old[0])
    assert_close(model.encode(TEXTS), old[1])


@pytest.mark.parametrize("labels", ["reranker", "labels"])
@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 7},
        {"activation_fn": nn.Identity()},
        {"activation_fn": nn.Tanh(), "apply_softmax": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"prompt": "red "},
    ],
    ids=str,
)
def test_predict_equals_the_library(
    folders: dict[str, Path], labels: str, options: dict[str, Any], unpad: bool
) -> None:
    model = library.CrossEncoder(str(folders[labels]), device="cpu")
    old = model.predict(PAIRS, **options), model.predict(PAIRS[0], **options)
    accelerate(model, unpad=unpad)
    assert_close(model.predict(PAIRS, **options), old[0])
    assert_close(model.predict([*map(list, PAIRS)], **options), old[0])
    assert_close(model.predict(PAIRS[0], **options), old[1])


def test_predictions_without_pairs(reranker: Make) -> None:
    model = reranker()
    old = model.predict([]), model.rank("red car", TEXTS)
    accelerate(model, unpad=True)
    assert_close(model.predict([]), old[0])
    ranks = model.rank("red car", TEXTS)
    assert {row["corpus_id"] for row in ranks} == {*range(len(TEXTS))}
    np.testing.assert_allclose(
        [row["score"] for row in ranks], [row["score"] for row in old[1]], atol=BAND
    )


@pytest.mark.parametrize("options", [{}, {"freeze": True}, {"dtype": torch.float32}], ids=str)
def test_last_layer_for_the_first_token(reranker: Make, options: dict[str, Any]) -> None:
    model = reranker()
    classifier = model[0].model
    batch = model.preprocess(PAIRS)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    left = {name: tensor.flip(1) for name, tensor in batch.items()}
    with torch.no_grad():
        old, old_left = classifier(**batch).logits, classifier(**left).logits
        everything = classifier(**batch, output_hidden_states=True)
    accelerate(model, unpad=True, **options)
    widths = list[int]()
    layer = classifier.bert.encoder.layer[-1]
    hidden = type(layer).executor

    def executor(self: Any, attend: Any, *args: Any) -> Any:
        widths.append(getattr(attend, "longest_q", 0))
        return hidden(self, attend, *args)

    type(layer).executor = executor
    try:
        with torch.no_grad(), counted() as runs:
            assert_close(classifier(**batch).logits, old)
            assert runs[layer] == runs[classifier.bert] == 1
            assert widths[-1] == 1
            assert_close(classifier(**left).logits, old_left)
            again = classifier(**batch, output_hidden_states=True)
            assert_close(list(again.hidden_states), list(everything.hidden_states))
            assert_close(again.logits, old)
            states = classifier.bert(**batch).last_hidden_state
        assert states.shape == (*batch["input_ids"].shape, 64)
        del widths[:]
        if not options.get("freeze"):
            assert_close(classifier(**batch).logits.detach(), old)
            assert 1 not in widths
    finally:
        type(layer).executor = hidden


def test_other_heads_read_every_token(reranker: Make) -> None:
    class Head(nn.Linear):
        pass

    model = reranker()
    report = accelerate(model, unpad=True)
    classifier = model[0].model
    for name, module in (("classifier", Head(64, 1)), ("bert.pooler", Mean())):
        owner, _, child = name.rpartition(".")
        owner = classifier.get_submodule(owner)
        before = getattr(owner, child)
        setattr(owner, child, module)
        accelerated = model.predict(PAIRS)
        report.revert()
        assert_close(accelerated, model.predict(PAIRS))
        setattr(owner, child, before)
        report = accelerate(model, unpad=True)


class Mean(nn.Module):
    """A pooler of all states."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, :2].mean(1)


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 7},
        {"convert_to_sparse_tensor": False},
        {"max_active_dims": 9},
        {"convert_to_tensor": False},
        {"save_to_cpu": True},
    ],
    ids=str,
)
def test_sparse_equals_the_library(
    folders: dict[str, Path], options: dict[str, Any], unpad: bool
) -> None:
    model = library.SparseEncoder(str(folders["sparse"]), device="cpu")
    old = model.encode(TEXTS, **options), model.encode(TEXTS[1], **options), model.encode([])
    width = model.get_embedding_dimension()
    accelerate(model, unpad=unpad)
    assert_close(model.encode(TEXTS, **options), old[0])
    assert_close(model.encode(TEXTS[1], **options), old[1])
    assert_close(model.encode([]), old[2])
    assert model.get_embedding_dimension() == width


@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_splade_pooling(folders: dict[str, Path], activation: Any, strategy: Any) -> None:
    model = library.SparseEncoder(str(folders["sparse"]), device="cpu")
    model[1].activation_function, model[1].pooling_strategy = activation, strategy
    old = model.encode(TEXTS)
    accelerate(model, unpad=True)
    assert_close(model.encode(TEXTS), old)


def test_unknown_layers_are_not_accelerated_by_their_calls(folders: dict[str, Path]) -> None:
    model = library.SentenceTransformer(modules=[stack.BoW(["a", "red"])], device="cpu")
    with pytest.raises(InputError, match="no module"):
        accelerate(model)


@pytest.mark.parametrize(
    "family",
    [
        "Albert",
        "Bert",
        "Camembert",
        "Data2VecText",
        "DistilBert",
        "Electra",
        "Roberta",
        "XLMRoberta",
    ],
)
def test_classifiers_of_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    widths, run = list[int](), unpadded._run_for_first

    def recorded(*args: Any) -> Any:
        x = run(*args)
        widths.append(len(x))
        return x

    monkeypatch.setattr(unpadded, "_run_for_first", recorded)

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    if family == "DistilBert":
        sizes = {"dim": 48, "n_layers": 3, "n_heads": 3, "hidden_dim": 63}
    config: Any = getattr(transformers, f"{family}Config")(
        **sizes, intermediate_size=63, vocab_size=99, max_position_embeddings=64, num_labels=3
    )
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    ids = torch.randint(5, 99, (7, 40))
    mask = torch.arange(40) < torch.tensor([[40], [3], [17], [9], [1], [30], [22]])
    batch = {"input_ids": ids.where(mask, config.pad_token_id), "attention_mask": mask.long()}
    with torch.no_grad():
        old = model(**batch).logits
    report = accelerate(model, unpad=True, verify=batch)
    assert report.replaced[0].fused == "FirstTokenClassifier"
    assert report.runs[""] == 1
    with torch.no_grad(), counted() as runs:
        assert_close(model(**batch).logits, old)
    layer = [module for module in model.modules() if isinstance(module, FusedLayer)][-1]
    assert runs[model.base_model] == 1
    assert runs[layer] == (3 if family == "Albert" else 1)
    assert widths[-1] == len(ids)


def test_saved_models_are_the_library_s(embedder: Make, tmp_path: Path) -> None:
    model = embedder()
    old = model.encode(TEXTS)
    accelerate(model, unpad=True)
    model.save_pretrained(str(tmp_path))
    saved = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert type(saved) is library.SentenceTransformer
    assert_close(saved.encode(TEXTS), old)
