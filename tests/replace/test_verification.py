"""`verify` sees the fused code run: it catches a broken form in every kind of model, and names a form that is idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from xfm_fast import accelerate  # noqa: E402
from xfm_fast.errors import InputError  # noqa: E402
from xfm_fast.replace import swap, verification  # noqa: E402
from xfm_fast.replace.layer import FusedLayer  # noqa: E402
from xfm_fast.replace.swap import is_fused  # noqa: E402

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "the",
    "dog",
    "cat",
    "sees",
    "red",
    "car",
    "on",
    "sea",
]
TEXTS = ["a dog", "the cat sees the red car on the sea", "the"]
PAIRS = [("a dog", text) for text in TEXTS]
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "vocab_size": 40,
    "max_position_embeddings": 40,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with its tokenizer, as a folder of transformers."""
    place = tmp_path_factory.mktemp("bert")
    (place / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(
        vocab_file=str(place / "vocab.txt"), vocab=str(place / "vocab.txt")
    )
    tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, num_labels=1)
    )
    model.save_pretrained(place)
    return place


def bi_encoder(folder: Path) -> tuple[nn.Module, Any]:
    module = pytest.importorskip("sentence_transformers", exc_type=ImportError)
    return module.SentenceTransformer(str(folder), device="cpu"), TEXTS


def bi_encoder_by_features(folder: Path) -> tuple[nn.Module, Any]:
    model, texts = bi_encoder(folder)
    prepare: Any = getattr(model, "preprocess", None) or model.tokenize
    return model, (dict(prepare(texts)),)


def cross_encoder(folder: Path) -> tuple[nn.Module, Any]:
    module = pytest.importorskip("sentence_transformers", exc_type=ImportError)
    return module.CrossEncoder(str(folder), device="cpu"), PAIRS


def pipeline(folder: Path) -> tuple[nn.Module, Any]:
    pipe = transformers.pipeline("text-classification", str(folder), device="cpu")
    return pipe.model, pipe.tokenizer(TEXTS, padding=True, return_tensors="pt")


def open_clip(folder: Path) -> tuple[nn.Module, Any]:
    module = pytest.importorskip("open_clip", exc_type=ImportError)
    tower = {"width": 32, "layers": 1}
    vision = tower | {"image_size": 32, "patch_size": 16, "head_width": 16}
    model = module.CLIP(
        16, vision, tower | {"heads": 2, "vocab_size": 49, "context_length": 8}
    ).eval()
    return model, (torch.randn(2, 3, 32, 32), torch.randint(1, 49, (2, 8)))


def timm(folder: Path) -> tuple[nn.Module, Any]:
    module = pytest.importorskip("timm")
    return module.create_model("test_vit", pretrained=False), torch.randn(2, 3, 160, 160)


KINDS = [bi_encoder, bi_encoder_by_features, cross_encoder, pipeline, open_clip, timm]


@pytest.fixture
def broken() -> Iterator[Callable[[], None]]:
    """Noise of three standard deviations in the output of every fused layer, from the call on."""
    with pytest.MonkeyPatch.context() as patch:
        inner = FusedLayer.run

        def noisy(self: FusedLayer, *arguments: Any, **options: Any) -> Tensor:
            out = inner(self, *arguments, **options)
            return out + 3 * out.std() * torch.randn_like(out)

        yield lambda: patch.setattr(FusedLayer, "run", noisy)


@pytest.mark.parametrize("build", KINDS)
def test_a_broken_form_is_caught(build: Any, folder: Path, broken: Callable[[], None]) -> None:
    model, batch = build(folder)
    report = accelerate(model, verify=batch)
    # The embeddings of a pair have a second type of token, which the fused form leaves to the original.
    idle = ["0.model.bert.embeddings"] if build is cross_encoder else []
    assert [path for path, calls in report.runs.items() if calls != 1] == idle
    count = len(report.replaced)
    assert f"{count - len(idle)} of {count} fused modules ran" in str(report)
    assert all(path in report.coverage() for path in idle)
    assert report.differences
    report.revert()
    broken()
    with pytest.raises(InputError, match="reverted"):
        accelerate(model, verify=batch)
    assert not any(map(is_fused, model.modules()))


@pytest.mark.parametrize("build", [bi_encoder, cross_encoder])
def test_texts_are_verified_without_padding_and_packed(build: Any, folder: Path) -> None:
    model, batch = build(folder)
    for freeze in (False, True):
        report = accelerate(model, unpad=True, freeze=freeze, verify=batch)
        assert report.runs["0.model.bert" if build is cross_encoder else "0.model"] == 1
        report.revert()


def test_only_models_with_a_tokenizer_take_texts(folder: Path) -> None:
    model, _ = pipeline(folder)
    with pytest.raises(InputError, match="BertForSequenceClassification holds no tokenizer"):
        accelerate(model, verify=TEXTS)
    assert not any(map(is_fused, model.modules()))
    model, _ = bi_encoder(folder)
    assert accelerate(model, verify="a dog").runs["0.model.embeddings"] == 1


def test_calls_that_no_form_covers_are_named() -> None:
    model = transformers.BertModel(transformers.BertConfig(**SMALL, attn_implementation="eager"))
    batch = {"input_ids": torch.arange(5, 11)[None], "output_attentions": True}
    with pytest.raises(
        InputError, match=r"1 of 3 fused modules ran.* encoder\.layer\.0 and 1 more \(BertLayer\)"
    ):
        accelerate(model, verify=batch)
    assert not any(map(is_fused, model.modules()))
    # A part of the model may stay idle, and is named.
    both = nn.ModuleDict({"a": model.encoder.layer[0], "b": model.encoder.layer[1]})
    both.forward = lambda x: both["a"](x)
    report = accelerate(both, verify=torch.randn(1, 4, 48))
    assert report.runs == {"a": 1, "b": 0}
    assert "1 of 2 fused modules ran; the original ran in b (BertLayer)" in str(report)


class Careless(nn.Module):
    """Writes into its arguments, and returns the memory of its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.output = torch.empty(2, 3, 16)

    def forward(self, features: dict[str, Any]) -> Tensor:
        if "states" not in features:
            features["states"] = self.layer(features["x"].mul_(2), src_mask=features.get("mask"))
        return self.output.copy_(features["states"])


@pytest.mark.parametrize("inference", [False, True])
def test_what_a_model_writes_does_not_reach_the_next_run(
    inference: bool, broken: Callable[[], None]
) -> None:
    with torch.inference_mode(inference):
        x = torch.randn(2, 3, 16)
    batch = ({"x": x, "mask": None},)
    kept = x.clone()
    report = accelerate(Careless(), verify=batch)
    assert report.runs == {"layer": 1}
    assert list(batch[0]) == ["x", "mask"]
    assert torch.equal(x, kept)
    broken()
    with pytest.raises(InputError, match="differs"):
        accelerate(Careless(), verify=batch)


def test_aliases_within_a_batch_stay_aliases() -> None:
    model, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 3, 16)
    whole = torch.randn(2, 3, 16, requires_grad=True) * 2  # no leaf
    for each in (x, whole, x[:1].expand(2, 3, 16)):
        report = accelerate(
            model, verify={"query": each, "key": each, "value": each, "need_weights": False}
        )
        assert report.runs == {"": 1}
    with pytest.raises(InputError, match="compared the original with itself"):
        accelerate(model, verify=(x, x, x))


@pytest.mark.parametrize(
    "options", [{}, {"freeze": True}, {"dtype": torch.float32}], ids=["plain", "freeze", "dtype"]
)
def test_the_speed_is_a_range_of_rounds_in_turn(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, ran = transformers.BertModel(transformers.BertConfig(**SMALL)).eval(), []
    batch = {"input_ids": torch.randint(5, 40, (2, 7))}
    wanted = model(**batch).last_hidden_state
    fused = iter([9.0, 0.01, 0.01, 0.1, 0.005, 0.01])  # the first warms up

    def seconds(model: nn.Module, batch: Any, calls: int) -> float:
        assert calls == 1
        with verification.inference(model), swap.counted() as runs:
            torch.testing.assert_close(model(**batch).last_hidden_state, wanted, rtol=0, atol=1e-5)
        ran.append(bool(runs))
        return next(fused) if runs else 0.02

    monkeypatch.setattr(verification, "_time_calls", seconds)
    monkeypatch.setattr(verification, "_MAX_ROUNDS", 5)
    report = accelerate(model, verify=batch, **options)
    assert ran == [False, True] * 6
    assert report.speedups == pytest.approx([0.2, 2, 2, 2, 4])
    assert report.speedup == pytest.approx(2)
    assert "ran 2.0× as fast (5 rounds, before and after in turn)" in str(report)
    report.speedups = [0.5, 1.94, 2.04, 2.26, 7.0]
    assert "ran 1.9–2.3× as fast" in str(report)
    report.revert()
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert torch.equal(model(**batch).last_hidden_state, wanted)


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, time_calls = [], verification._time_calls

    def count(model: nn.Module, batch: Any, calls: int) -> float:
        counts.append(calls)
        time_calls(model, batch, calls)
        return calls * (1e-3 if swap.is_fused(model) else 3e-3)

    monkeypatch.setattr(verification, "_time_calls", count)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    report = accelerate(layer, verify=torch.randn(2, 3, 16))
    assert counts[:4] == [1, 1, 5, 5]
    assert {*counts[2:]} == {5}
    assert report.speedup == pytest.approx(3)
