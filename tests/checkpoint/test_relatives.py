"""X²-VLM's and CCLM's checkpoints compute here what plain PyTorch computes of them; X-VLM's and BLIP's are refused.

The checkpoints are random numbers under the names and shapes of the published ones, in small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.checkpoint import relative_of, relative_position_index
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, DataError
from xfm_fast.models.convert import to_xfm_folder
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer

IMAGE, PATCH, VISION, VISION_HEADS, TEXT, TEXT_HEADS, HIDDEN, VOCABULARY = (
    32,
    8,
    24,
    3,
    16,
    2,
    40,
    120,
)
LANGUAGE, FUSION = 3, 2
State = dict[str, Tensor]


def linear(state: State, name: str, inputs: int, outputs: int) -> None:
    state[f"{name}.weight"] = torch.randn(outputs, inputs) / math.sqrt(inputs)
    state[f"{name}.bias"] = torch.randn(outputs) * 0.1


def norm(state: State, name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = (
        torch.rand(width) + 0.5,
        torch.randn(width) * 0.1,
    )


def text_layer(state: State, name: str, *, looks: bool) -> None:
    for branch in ("attention", "crossattention") if looks else ("attention",):
        seen = VISION if branch == "crossattention" else TEXT
        linear(state, f"{name}.{branch}.self.query", TEXT, TEXT)
        linear(state, f"{name}.{branch}.self.key", seen, TEXT)
        linear(state, f"{name}.{branch}.self.value", seen, TEXT)
        linear(state, f"{name}.{branch}.output.dense", TEXT, TEXT)
        norm(state, f"{name}.{branch}.output.LayerNorm", TEXT)
    linear(state, f"{name}.intermediate.dense", TEXT, HIDDEN)
    linear(state, f"{name}.output.dense", HIDDEN, TEXT)
    norm(state, f"{name}.output.LayerNorm", TEXT)


def embeddings(state: State, name: str, *, types: int, positions: int) -> None:
    state[f"{name}.position_ids"] = torch.arange(positions)[None]
    state[f"{name}.word_embeddings.weight"] = torch.randn(VOCABULARY, TEXT)
    state[f"{name}.position_embeddings.weight"] = torch.randn(positions, TEXT)
    state[f"{name}.token_type_embeddings.weight"] = torch.randn(types, TEXT)
    norm(state, f"{name}.LayerNorm", TEXT)


def vocabulary_head(state: State, name: str) -> None:
    state[f"{name}.bias"] = torch.randn(VOCABULARY)
    linear(state, f"{name}.transform.dense", TEXT, TEXT)
    norm(state, f"{name}.transform.LayerNorm", TEXT)
    state[f"{name}.decoder.weight"] = torch.randn(VOCABULARY, TEXT)


def vision(state: State) -> None:
    window = IMAGE // PATCH
    state["vision_encoder.cls_token"] = torch.randn(1, 1, VISION)
    linear(state, "vision_encoder.patch_embed.proj", 3 * PATCH * PATCH, VISION)
    state["vision_encoder.patch_embed.proj.weight"] = state[
        "vision_encoder.patch_embed.proj.weight"
    ].view(VISION, 3, PATCH, PATCH)
    for index in range(2):
        block = f"vision_encoder.blocks.{index}"
        for gamma in ("gamma_1", "gamma_2"):
            state[f"{block}.{gamma}"] = torch.rand(VISION)
        norm(state, f"{block}.norm1", VISION)
        norm(state, f"{block}.norm2", VISION)
        state[f"{block}.attn.q_bias"], state[f"{block}.attn.v_bias"] = torch.randn(2, VISION) * 0.1
        state[f"{block}.attn.relative_position_bias_table"] = torch.randn(
            (2 * window - 1) ** 2 + 3, VISION_HEADS
        )
        state[f"{block}.attn.relative_position_index"] = relative_position_index(window)
        state[f"{block}.attn.qkv.weight"] = torch.randn(3 * VISION, VISION) / math.sqrt(VISION)
        linear(state, f"{block}.attn.proj", VISION, VISION)
        linear(state, f"{block}.mlp.fc1", VISION, 4 * VISION)
        linear(state, f"{block}.mlp.fc2", 4 * VISION, VISION)
    norm(state, "vision_encoder.fc_norm", VISION)


def heads(state: State) -> None:
    linear(state, "vision_proj", VISION, 12)
    linear(state, "text_proj", TEXT, 12)
    state["temp"] = torch.tensor(0.06)
    for name, outputs in (("itm_head", 2), ("bbox_head", 4)):
        linear(state, f"{name}.0", TEXT, 2 * TEXT)
        norm(state, f"{name}.1", 2 * TEXT)
        linear(state, f"{name}.3", 2 * TEXT, outputs)


def x2vlm(seed: int = 0) -> State:
    """Make a pretraining checkpoint: one BERT with cross-attention in its last layers, in a masked language model."""
    torch.manual_seed(seed)
    state: State = {"absolute_frame_pos_embed": torch.randn(1, 3, 1, VISION)}
    vision(state)
    embeddings(state, "text_encoder.bert.embeddings", types=2, positions=20)
    for index in range(LANGUAGE + FUSION):
        text_layer(state, f"text_encoder.bert.encoder.layer.{index}", looks=index >= LANGUAGE)
    vocabulary_head(state, "text_encoder.cls.predictions")
    state["text_encoder.cls.predictions.decoder.weight"] = state[
        "text_encoder.bert.embeddings.word_embeddings.weight"
    ]
    heads(state)
    return state


def x2vlm_retrieval() -> State:
    """Make a fine-tuning checkpoint: the same BERT without its masked language model, and fewer heads."""
    return {
        name.replace("text_encoder.bert.", "text_encoder."): value
        for name, value in x2vlm().items()
        if not name.startswith(("text_encoder.cls.", "bbox_head.", "absolute_frame"))
    }


def cclm() -> State:
    """XLM-R for language, and BERT's layers, apart from it, for fusion."""
    torch.manual_seed(1)
    state: State = {}
    vision(state)
    embeddings(state, "text_encoder.embeddings", types=1, positions=22)
    for index in range(LANGUAGE):
        text_layer(state, f"text_encoder.encoder.layer.{index}", looks=False)
    for index in range(FUSION):
        text_layer(state, f"cross_encoder.encoder.layer.{index}", looks=True)
    vocabulary_head(state, "mlm_head.predictions")
    heads(state)
    return state


class Twin:
    """The published computation, in plain PyTorch on a state dict in fp64."""

    def __init__(
        self, state: State, *, text: str, fusion: str, first: int, eps: float, shift: int
    ) -> None:
        self.state = {
            name: value.double() if value.is_floating_point() else value
            for name, value in state.items()
        }
        self.text, self.fusion, self.first, self.eps, self.shift = text, fusion, first, eps, shift

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps
        )

    def images(self, pixels: Tensor) -> Tensor:
        state = self.state
        projected = F.conv2d(
            pixels, state["vision_encoder.patch_embed.proj.weight"], state["vision_encoder.patch_embed.proj.bias"],
            stride=PATCH,
        )  # fmt: skip
        x = projected.flatten(2).mT
        x = torch.cat([state["vision_encoder.cls_token"].expand(len(x), -1, -1), x], 1)
        for index in range(2):
            block = f"vision_encoder.blocks.{index}"
            bias = torch.cat(
                [state[f"{block}.attn.q_bias"], torch.zeros(VISION), state[f"{block}.attn.v_bias"]]
            )
            inner = self._norm(f"{block}.norm1", x, 1e-6)
            qkv = F.linear(inner, state[f"{block}.attn.qkv.weight"], bias)
            q, k, v = qkv.unflatten(-1, (3, VISION_HEADS, -1)).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT / math.sqrt(VISION // VISION_HEADS)
            table = state[f"{block}.attn.relative_position_bias_table"]
            scores = scores + table[state[f"{block}.attn.relative_position_index"]].permute(2, 0, 1)
            attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + state[f"{block}.gamma_1"] * self._linear(f"{block}.attn.proj", attended)
            inner = F.gelu(self._linear(f"{block}.mlp.fc1", self._norm(f"{block}.norm2", x, 1e-6)))
            x = x + state[f"{block}.gamma_2"] * self._linear(f"{block}.mlp.fc2", inner)
        patches = self._norm("vision_encoder.fc_norm", x[:, 1:], 1e-6)
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)

    def _attend(
        self, name: str, x: Tensor, seen: Tensor, hidden: Tensor | None, eps: float
    ) -> Tensor:
        q, k, v = (
            self._linear(f"{name}.self.{projection}", source)
            .unflatten(-1, (TEXT_HEADS, -1))
            .transpose(1, 2)
            for projection, source in (("query", x), ("key", seen), ("value", seen))
        )
        scores = q @ k.mT / math.sqrt(TEXT // TEXT_HEADS)
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], -math.inf)
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self._norm(
            f"{name}.output.LayerNorm", self._linear(f"{name}.output.dense", context) + x, eps
        )

    def _layer(
        self, name: str, x: Tensor, mask: Tensor, images: Tensor | None, eps: float
    ) -> Tensor:
        x = self._attend(f"{name}.attention", x, x, ~mask, eps)
        if images is not None:
            x = self._attend(f"{name}.crossattention", x, images, None, eps)
        inner = self._linear(
            f"{name}.output.dense", F.gelu(self._linear(f"{name}.intermediate.dense", x))
        )
        return self._norm(f"{name}.output.LayerNorm", inner + x, eps)

    def texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(1) - 1 + self.shift).clamp_min(0)
        embedded = (
            F.embedding(ids, self.state[f"{self.text}embeddings.word_embeddings.weight"])
            + F.embedding(
                positions, self.state[f"{self.text}embeddings.position_embeddings.weight"]
            )
            + self.state[f"{self.text}embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(f"{self.text}embeddings.LayerNorm", embedded, self.eps)
        for index in range(LANGUAGE):
            x = self._layer(f"{self.text}encoder.layer.{index}", x, mask, None, self.eps)
        return x

    def fuse(self, texts: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        for index in range(FUSION):
            texts = self._layer(
                f"{self.fusion}encoder.layer.{index + self.first}", texts, mask, images, 1e-12
            )
        return texts

    def head(self, name: str, fused: Tensor) -> Tensor:
        return self._linear(
            f"{name}.3",
            F.gelu(self._norm(f"{name}.1", self._linear(f"{name}.0", fused[:, 0]), 1e-5)),
        )

    def words(self, name: str, fused: Tensor) -> Tensor:
        inner = F.gelu(self._linear(f"{name}.transform.dense", fused))
        inner = self._norm(f"{name}.transform.LayerNorm", inner, self.eps)
        return F.linear(inner, self.state[f"{name}.decoder.weight"], self.state[f"{name}.bias"])


KINDS: dict[str, tuple[Callable[[], State], dict[str, object], str | None]] = {
    "pretraining": (
        x2vlm,
        {
            "text": "text_encoder.bert.",
            "fusion": "text_encoder.bert.",
            "first": LANGUAGE,
            "eps": 1e-12,
            "shift": 0,
        },
        "text_encoder.cls.predictions",
    ),
    "retrieval": (
        x2vlm_retrieval,
        {
            "text": "text_encoder.",
            "fusion": "text_encoder.",
            "first": LANGUAGE,
            "eps": 1e-12,
            "shift": 0,
        },
        None,
    ),
    "cclm": (
        cclm,
        {"text": "text_encoder.", "fusion": "cross_encoder.", "first": 0, "eps": 1e-5, "shift": 2},
        "mlm_head.predictions",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_function_is_the_same(name: str) -> None:
    make, form, words = KINDS[name]
    state = make()
    twin = Twin(state, **form)  # type: ignore[arg-type]
    model = XFM.from_x2vlm(state, text_heads=TEXT_HEADS, dtype=torch.float64)
    assert set(model.heads) == {"contrastive", "matching"} | (
        set() if words is None else {"imlm", "boxes"}
    )
    assert model.config.mask_token_id == (103 if name != "cclm" else VOCABULARY - 1)

    pad = model.config.pad_token_id
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    ids = torch.randint(4, VOCABULARY, (3, 9)).masked_fill(~mask, pad)
    pixels = torch.randn(3, 3, IMAGE, IMAGE).double()
    with torch.no_grad():
        images, texts = model.encode_image(pixels), model.encode_text(ids, mask)
        torch.testing.assert_close(images, twin.images(pixels))
        expected = twin.texts(ids, mask)
        torch.testing.assert_close(texts[mask], expected[mask])
        fused = model.fuse(texts, mask, model.image_memory(images))
        of_twin = twin.fuse(expected, mask, twin.images(pixels))
        torch.testing.assert_close(fused[mask], of_twin[mask])
        torch.testing.assert_close(model.match_logits(fused), twin.head("itm_head", of_twin))
        features = F.normalize(twin._linear("text_proj", expected[:, 0]), dim=-1)
        torch.testing.assert_close(model.project_text(texts), features)
        torch.testing.assert_close(
            model.project_image(images),
            F.normalize(twin._linear("vision_proj", images[:, 0]), dim=-1),
        )
        if words is not None:
            torch.testing.assert_close(
                model.predict_boxes(fused), twin.head("bbox_head", of_twin).sigmoid()
            )
            torch.testing.assert_close(
                model.imlm_logits(fused)[mask], twin.words(words, of_twin)[mask]
            )


def test_word_pieces(tmp_path: Path) -> None:
    words = [
        "[PAD]",
        *(f"[unused{index}]" for index in range(99)),
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
    ]
    words += ["a", "dog", "##s", "beach", "on"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = CaptionTokenizer.from_files(tmp_path)
    ids = tokenizer.encode_ids(["a dogs on a Beach"], 40)[0]
    assert ids == [101, 104, 105, 106, 108, 104, 107, 102]
    assert tokenizer.word_starts(ids) == [True, True, True, False, True, True, True, True]
    assert tokenizer.decode(ids) == "a dogs on a beach"
    assert tokenizer.mask_token_id == 103
    model = XFM.from_x2vlm(x2vlm(), text_heads=2, tokenizer=tmp_path)
    assert model.encode("dogs on a beach").shape == (12,)
    model.save_pretrained(tmp_path / "folder")
    assert json.loads((tmp_path / "folder/config.json").read_text())["mask_token"] == 103
    again = XFM.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(again.encode("a dog"), model.encode("a dog"))
    with pytest.raises(DataError, match="BERT"):
        tokenizer.encode_pair("a dog", "a beach")
    with pytest.raises(DataError, match="bos_token_id is 101"):
        tokenizer.check(XFMConfig.preset("tiny"))


def x_vlm() -> State:
    """List the names of X-VLM: Swin for images, six and six layers of BERT."""
    state: State = {
        "vision_encoder.patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
        "vision_encoder.layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(169, 4),
        "vision_encoder.layers.0.blocks.0.attn.qkv.weight": torch.zeros(24, 8),
        "vision_encoder.norm.weight": torch.zeros(8),
        "vision_proj.weight": torch.zeros(12, 8),
    }
    embeddings(state, "text_encoder.bert.embeddings", types=2, positions=20)
    for index in range(12):
        text_layer(state, f"text_encoder.bert.encoder.layer.{index}", looks=index >= 6)
    return state


def blip(first: int = 0) -> State:
    """List the names of BLIP, or of ALBEF with a later first layer of cross-attention."""
    state: State = {
        "visual_encoder.cls_token": torch.zeros(1, 1, VISION),
        "visual_encoder.pos_embed": torch.zeros(1, 17, VISION),
        "visual_encoder.blocks.0.attn.qkv.weight": torch.zeros(3 * VISION, VISION),
    }
    embeddings(state, "text_encoder.embeddings", types=2, positions=20)
    for index in range(2):
        text_layer(state, f"text_encoder.encoder.layer.{index}", looks=index >= first)
    return state


@pytest.mark.parametrize(
    ("state", "name", "reason"),
    [
        (x_vlm(), "X-VLM", "Swin transformer"),
        (blip(), "BLIP", "absolute positions, .*word"),
        (blip(1), "ALBEF", "absolute positions"),
    ],
)
def test_what_computes_something_else_is_refused(
    state: State, name: str, reason: str, tmp_path: Path
) -> None:
    assert relative_of(state) == name
    torch.save(state, tmp_path / "theirs.pth")
    for call in (
        lambda: XFM.from_x2vlm(state),
        lambda: XFM.from_official(state, XFMConfig.preset("tiny")),
        lambda: to_xfm_folder(tmp_path / "theirs.pth", tmp_path / "ours", XFMConfig.preset("tiny")),
    ):
        with pytest.raises(CheckpointError, match=rf"{name}.*{reason}.*accelerate"):
            call()
    assert not (tmp_path / "ours").exists()


def test_another_resolution() -> None:
    model = XFM.from_x2vlm(x2vlm(), image_size=48, text_heads=2)
    assert model.load_report is not None
    assert model.load_report.interpolated
    assert model.encode_image(torch.randn(1, 3, 48, 48)).shape[1] == 37
