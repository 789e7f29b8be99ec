"""Whole calls of sentence-transformers on a CPU: `encode` and `predict` in batches of equal work.

The library pads every 32 texts, pools padded states and stacks single rows. Here texts are tokenised
without padding, by a thread while the model runs, batched by their tokens, and pooled as they are
packed. Other inputs, hooked and compiled models run the library's code.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from itertools import chain
from operator import attrgetter, is_, itemgetter
from os import cpu_count
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.io import ahead
from xfm_fast.plans.recording import Pooling, PoolingKind
from xfm_fast.replace.heads import FusedMaskedLM
from xfm_fast.replace.swap import (
    Fused,
    Settings,
    observed,
    original_class,
    short_name,
)
from xfm_fast.replace.unpadded import UnpaddedEncoder, reading_first_tokens

_DEFAULT_TEXTS = 32  # the library's `batch_size`, in place of which tokens limit a batch
_BATCH_TOKENS = 2048
_WINDOW = 512  # texts that are tokenised at once
_TRANSFORMERS = ("sentence_transformers.Transformer", "sentence_transformers.MLMTransformer")
_UNPADDED = {"text": {"padding": False}, "common": {"return_tensors": None}}
_OPTIONS = {
    *("prompt", "batch_size", "show_progress_bar", "task", "save_to_cpu"),
    *("output_value", "normalize_embeddings", "truncate_dim"),
    *("activation_fn", "apply_softmax"),
    *("convert_to_sparse_tensor", "max_active_dims"),
}
_LENGTHS = {"max_length", "truncation"}
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
_TOKENS, _SENTENCE = "token_embeddings", "sentence_embedding"
_POOLING: dict[str, PoolingKind] = {"mean": "mean", "cls": "first", "max": "max"}
_AFTER_POOLING = ("Dense", "Dropout", "LayerNorm", "Normalize")
_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}


class Snapshot:
    """What a model consists of, while it is in evaluation mode on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        modules = [*model.modules()]
        # The state of the model itself may refer to it, which would keep it alive.
        self._states = [module.__dict__ for module in modules[1:]]
        self._tables = [
            table
            for module in modules
            for table in (module._modules, module._parameters, module._buffers)
        ]
        self._values = [value for table in self._tables for value in table.values()]
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]

    def is_current(self) -> bool:
        """Return whether the model has the same modules and tensors, in the same mode and place."""
        values = chain.from_iterable(map(dict.values, self._tables))
        return (
            not any(map(itemgetter("training"), self._states))
            and sum(map(len, self._tables)) == len(self._values)
            and all(map(is_, values, self._values))
            and all(map(attrgetter("is_cpu"), self._tensors))
        )


_snapshots: weakref.WeakKeyDictionary[nn.Module, Snapshot] = weakref.WeakKeyDictionary()


class Autocast(Fused):
    """Fused form of a root model: modules that are not fused run in autocast under an explicit dtype."""

    computes: ClassVar[bool] = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.count()
        with self.autocast():
            return super().forward(*args, **kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of modules that are not fused."""
        if self.settings.dtype is None:
            return nullcontext()
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        return torch.autocast(device.type, self.settings.dtype)


class FirstTokenClassifier(Fused):
    """A classifier that reads the first token of a text, the only one that the last layer computes."""

    benefit: ClassVar[str] = "last layer only for the token that is read"
    replaces: ClassVar[Any] = (
        "albert.AlbertForSequenceClassification",
        "bert.BertForSequenceClassification",
        "camembert.CamembertForSequenceClassification",
        "data2vec.Data2VecTextForSequenceClassification",
        "distilbert.DistilBertForSequenceClassification",
        "electra.ElectraForSequenceClassification",
        "roberta.RobertaForSequenceClassification",
        "xlm_roberta.XLMRobertaForSequenceClassification",
    )
    multiplies_in_eight_bits: ClassVar[bool] = False
    computes: ClassVar[bool] = False

    @classmethod
    def adapted(cls, original: Any) -> dict[str, Any]:
        library = vars(sys.modules[original.__module__])
        heads = (value for name, value in library.items() if name.endswith("ClassificationHead"))
        return {
            "bypassed": {original.base_model_prefix: nn.Module, "classifier": (nn.Linear, *heads)}
        }

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return None if settings.unpad else "it computes padding; unpad=True skips it"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.intact():
            return super().forward(*args, **kwargs)
        self.count()
        with reading_first_tokens():
            return super().forward(*args, **kwargs)


class WholeCall(Autocast):
    """A model of sentence-transformers, whose calls it computes in batches of equal work."""

    benefit: ClassVar[str] = "batches by tokens, pooled without padding"
    output: ClassVar[str] = _SENTENCE

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        old = "its calls run the library's loop; sentence-transformers 6.2 or newer has one to replace"
        return None if hasattr(module, "_inference") else old

    @classmethod
    def adapted(cls, original: Any) -> dict[str, Any]:
        # The processes of a pool find it by the name of its class.
        return {"_multi_process_worker": staticmethod(original._multi_process_worker)}

    def declines(self) -> str | None:
        model: Any = self
        if model._compiled_call_impl is not None:
            return "it is compiled"
        for module in (self, *self.children()):
            if observed(module):
                return f"its {type(module).__name__} has hooks"
        return super().declines()

    @torch.inference_mode()
    def _inference(self, inputs: list[Any], *, device: Any = None, **options: Any) -> Any:
        if not self.covers(inputs, device, options):
            model: Any = super()
            return model._inference(inputs, device=device, **options)
        batches, rows = zip(*self._batches(inputs, options), strict=True)
        indices = [*chain.from_iterable(batches)]
        if len(rows) == 1 and indices == [*range(len(inputs))]:
            return rows[0]
        return torch.cat(rows).index_select(0, torch.tensor(indices).argsort())

    def covers(self, inputs: list[Any], device: Any, options: dict[str, Any]) -> bool:
        """Return whether the library would tokenise, pad and run these inputs on the CPU."""
        model: Any = self
        transformer: Any = next(self.children(), None)
        if not inputs or not all(map(self.is_text, inputs)):
            return False
        if options.keys() - _OPTIONS or model.get_model_kwargs():
            return False
        if short_name(original_class(transformer)) not in _TRANSFORMERS or self.declines():
            return False
        tokenizer = transformer.tokenizer
        if transformer.processor is not tokenizer or "message" in transformer.modality_config:
            return False
        settings = transformer.processing_kwargs
        if settings.keys() - {"text"} or settings.get("text", {}).keys() - _LENGTHS:
            return False
        if getattr(transformer, "query_expansion", None) or transformer.backend != "torch":
            return False
        if tokenizer.padding_side != "right" or tokenizer.pad_token_id is None:
            return False
        if not {"input_ids", "attention_mask"} <= {*tokenizer.model_input_names} <= _INPUTS:
            return False
        if device is not None and torch.device(device).type != "cpu":
            return False
        snapshot = _snapshots.get(self)
        if snapshot is not None and not self.training and snapshot.is_current():
            return True
        self.eval()
        if model._resolve_inference_device(device).type != "cpu":
            return False
        _snapshots[self] = Snapshot(self)
        return True

    def is_text(self, value: Any) -> bool:
        """Return whether an input is text that this model takes."""
        return isinstance(value, str)

    def compute(self, features: dict[str, Any]) -> Tensor:
        """Return the output of each text, or other input, of a padded batch."""
        if features.get("modality") == "text" and features["input_ids"].is_cpu:
            tokenizer = cast(Any, self)[0].tokenizer
            if tokenizer.padding_side == "right" and not self.declines():
                return self._compute(features)
        return self(features)[self.output]

    def _compute(self, features: dict[str, Any]) -> Tensor:
        """Return the output of each text of a batch, which is known to be one of texts."""
        rows = self.pooled(features)
        return self(features)[self.output] if rows is None else rows

    def pooled(self, features: dict[str, Any]) -> Tensor | None:
        """Compute the output from packed states; None for modules that must be called."""

    def finish(self, rows: Tensor, options: dict[str, Any]) -> Tensor:
        """Convert the output of a batch as the options of the call say."""
        return rows

    def _batches(
        self, inputs: list[Any], options: dict[str, Any]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the indices and the outputs of batches, the longest texts first."""
        from tqdm.autonotebook import tqdm

        model: Any = self
        size, count = options["batch_size"], len(inputs)
        order = sorted(range(count), key=lambda index: -model._input_length(inputs[index]))
        windows = [order[start : start + _WINDOW] for start in range(0, count, _WINDOW)]
        tokenised = (
            self._tokenise([inputs[index] for index in window], options) for window in windows
        )
        if len(windows) > 1 and cpu_count() != 1:
            tokenised = ahead(tokenised)
        limit = count if size == _DEFAULT_TEXTS else size
        hidden = not options["show_progress_bar"]
        with (
            closing(tokenised),
            tqdm(total=-(-count // size), desc="Batches", disable=hidden) as bar,
        ):
            done = 0
            for window, tokens in zip(windows, tokenised, strict=True):
                ids = tokens["input_ids"]
                by_length = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
                start = 0
                while start < len(by_length):
                    longest = len(ids[by_length[start]])
                    texts = min(limit, max(1, _BATCH_TOKENS // max(1, longest)))
                    batch = by_length[start : start + texts]
                    rows = self._compute(self._pad(tokens, batch))
                    yield [window[row] for row in batch], self.finish(rows, options)
                    start += texts
                    done += len(batch)
                    bar.update(-(-done // size) - bar.n)

    def _tokenise(self, texts: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        """Return the features of texts without padding, as lists."""
        model: Any = self
        return model.preprocess(
            texts, options["prompt"], processing_kwargs=_UNPADDED, task=options.get("task")
        )

    def _pad(self, tokens: dict[str, Any], batch: Sequence[int]) -> dict[str, Any]:
        """Return the padded features of some texts."""
        tokenizer = cast(Any, self)[0].tokenizer
        padding = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
            "attention_mask": 0,
        }
        features = {name: value for name, value in tokens.items() if name not in padding}
        lists = {
            name: [tokens[name][row] for row in batch] for name in padding.keys() & tokens.keys()
        }
        lengths = [*map(len, lists["input_ids"])]
        if min(lengths) == max(lengths):
            # Lists without an element would become floats.
            make = partial(torch.tensor, dtype=torch.int64)
            return features | {name: make(rows) for name, rows in lists.items()}
        real = np.arange(max(lengths)) < np.array(lengths)[:, None]
        for name, rows in lists.items():
            table = np.full(real.shape, padding[name])
            table[real] = [*chain.from_iterable(rows)]
            features[name] = torch.from_numpy(table)
        return features


class WholeEncode(WholeCall):
    """`SentenceTransformer.encode`: mean, first or largest states are pooled as they are packed."""

    replaces: ClassVar[Any] = ("sentence_transformers.SentenceTransformer",)

    def covers(self, inputs: list[Any], device: Any, options: dict[str, Any]) -> bool:
        is_sentence = options.get("output_value") == _SENTENCE
        return is_sentence and super().covers(inputs, device, options)

    def finish(self, rows: Tensor, options: dict[str, Any]) -> Tensor:
        rows = rows[..., : options["truncate_dim"]]
        return F.normalize(rows, dim=1) if options["normalize_embeddings"] else rows

    def pooled(self, features: dict[str, Any]) -> Tensor | None:
        modules: list[Any] = [*self.children()]
        if len(modules) < 2 or not _is_library(modules[1], "Pooling"):
            return None
        transformer, pooling, *behind = modules
        encoder = transformer.model
        if pooling.pooling_mode not in _POOLING or not isinstance(encoder, UnpaddedEncoder):
            return None
        if transformer.modality_config["text"] != _TEXT:
            return None
        if transformer.module_output_name != _TOKENS:
            return None
        if not pooling.include_prompt and "prompt_length" in features:
            return None
        if not all(_is_library(module, *_AFTER_POOLING) for module in behind):
            return None
        if any(getattr(module, "module_input_name", _SENTENCE) != _SENTENCE for module in behind):
            return None
        normalised = bool(behind) and _is_library(behind[0], "Normalize")
        if normalised and getattr(behind[0], "module_output_name", _SENTENCE) != _SENTENCE:
            return None
        pooled = Pooling(_POOLING[pooling.pooling_mode], normalised)
        rows = encoder.pooled(_model_inputs(features), pooled)
        if rows is None or len(behind) == normalised:
            return rows
        features[_SENTENCE] = rows
        with self.autocast():
            for module in behind[normalised:]:
                features = module(features)
        return features[_SENTENCE]


class WholePredict(WholeCall):
    """`CrossEncoder.predict`."""

    replaces: ClassVar[Any] = ("sentence_transformers.CrossEncoder",)
    output: ClassVar[str] = "scores"

    def is_text(self, value: Any) -> bool:
        is_pair = isinstance(value, (list, tuple)) and len(value) == 2
        return is_pair and all(map(super().is_text, value))

    def finish(self, rows: Tensor, options: dict[str, Any]) -> Tensor:
        scores = rows
        if scores.is_floating_point() and torch.finfo(scores.dtype).bits < 32:
            scores = scores.float()
        if options["activation_fn"] is not None:
            scores = options["activation_fn"](scores)
        model: Any = self
        if model.num_labels == 1 and scores.ndim > 1:
            scores = scores.squeeze(-1)
        return F.softmax(scores, 1) if options["apply_softmax"] and scores.ndim > 1 else scores


class WholeSparse(WholeCall):
    """`SparseEncoder.encode`: SPLADE (arXiv 2109.10086) without the logits of every token at once."""

    replaces: ClassVar[Any] = ("sentence_transformers.SparseEncoder",)

    def finish(self, rows: Tensor, options: dict[str, Any]) -> Tensor:
        from sentence_transformers.util import select_max_active_dims

        rows = select_max_active_dims(rows, options["max_active_dims"])
        return rows.to_sparse() if options["convert_to_sparse_tensor"] else rows

    def pooled(self, features: dict[str, Any]) -> Tensor | None:
        modules: list[Any] = [*self.children()]
        if len(modules) != 2 or not _is_library(modules[1], "SpladePooling"):
            return None
        model, pooling = modules[0].model, modules[1]
        if pooling.pooling_strategy != "max" or not isinstance(model, FusedMaskedLM):
            return None
        if modules[0].modality_config["text"]["method_output_name"] != "logits":
            return None
        rows = model.largest_logits(_model_inputs(features))
        if rows is None:
            return None
        if pooling.embedding_dimension is None:
            pooling.embedding_dimension = rows.shape[1]
        # The activations are monotone.
        rows = rows.relu_().log1p_()
        return rows.log1p_() if pooling.activation_function == "log1p_relu" else rows


def _is_library(module: Any, *names: str) -> bool:
    """Return whether a module is of one of these classes of sentence-transformers."""
    return short_name(original_class(module)) in [f"sentence_transformers.{name}" for name in names]


def _model_inputs(features: dict[str, Any]) -> dict[str, Any]:
    return {name: features[name] for name in _INPUTS & features.keys()}
