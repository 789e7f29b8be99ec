"""Tiny models of sentence-transformers with random weights, as folders that the library reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from xfm_fast.data.shapes import VOCABULARY
from xfm_fast.encoders import LibraryEncoder

_SIZES: dict[str, int] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
_MAX_TOKENS = 48


def embed(encoder: LibraryEncoder, items: Sequence[Any], **options: Any) -> Tensor:
    """Compute features by the library's own loop, with an encoder's model and prompts."""
    role, prompt = options.pop("role", None), options.pop("prompt", None)
    prompt = encoder.prompt(role) if prompt is None else prompt
    options |= {"prompt": prompt, "convert_to_tensor": True, "show_progress_bar": False}
    return encoder.model.encode([*items], task=role, **options).float().cpu()


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer of whole words and letters; returns the size of its vocabulary."""
    import transformers

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "!"]
    words = [*marks, *letters, *(f"##{letter}" for letter in letters)]
    words += sorted({word.lower() for word in VOCABULARY} - {*words})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    vocabulary: Any = str(folder / "vocab.txt")
    tokenizer: Any = cast("Any", transformers).BertTokenizerFast(
        vocab=vocabulary, model_max_length=_MAX_TOKENS
    )
    tokenizer.save_pretrained(folder)
    return len(words)


def _write_bert(folder: Path, architecture: str, **settings: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=write_tokenizer(folder), max_position_embeddings=64, **_SIZES, **settings
    )
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Features of the initial weights hardly differ.
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.1)
    model.save_pretrained(folder)
    return folder


def write_embedder(folder: Path, **settings: Any) -> Path:
    """Write a `SentenceTransformer` of texts with prompts, of 64 normalised numbers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(_write_bert(folder / "bert", "BertModel")))
    modules = [transformer, Pooling(64, "mean"), Normalize()]
    prompts = {"query": "query: ", "document": ""}
    SentenceTransformer(
        modules=modules, device="cpu", **{"prompts": prompts, **settings}
    ).save_pretrained(str(folder / "embedder"))
    return folder / "embedder"


def write_reranker(folder: Path, labels: int = 1) -> Path:
    """Write a `CrossEncoder`."""
    return _write_bert(folder, "BertForSequenceClassification", num_labels=labels)


def write_sparse(folder: Path) -> Path:
    """Write a `SparseEncoder` of SPLADE's form."""
    from sentence_transformers import SparseEncoder

    bert = _write_bert(folder / "bert", "BertForMaskedLM")
    SparseEncoder(str(bert), device="cpu").save_pretrained(str(folder / "sparse"))
    return folder / "sparse"


def write_clip(folder: Path) -> Path:
    """Write a CLIP of texts and of images, of 32 numbers."""
    import transformers

    torch.manual_seed(0)
    size = write_tokenizer(folder)
    text = {**_SIZES, "vocab_size": size, "eos_token_id": 3, "max_position_embeddings": 48}
    vision = {**_SIZES, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    transformers.CLIPModel(config).save_pretrained(folder)
    images: Any = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(str(folder))
    return folder
