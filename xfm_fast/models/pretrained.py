"""Loading of a model from checkpoints, folders and the Hugging Face Hub, and saving."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, Unpack

import torch
from torch import Tensor

from xfm_fast import checkpoint
from xfm_fast.checkpoint import Head
from xfm_fast.checkpoint.files import CARD_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.errors import StorageError, UnavailableError, explain_types
from xfm_fast.models import hub
from xfm_fast.models.precision import Precision, PrecisionMixin, float_type
from xfm_fast.models.processor import XFMProcessor, find_tokenizer, read_tokenizer
from xfm_fast.tokenizer import CaptionTokenizer

ALL_HEADS: tuple[Head, ...] = ("mlm", "imlm", "contrastive", "matching", "boxes")
"""The heads of the paper's model."""

# Inference tensors have no version counter, so tensors computed from such parameters could not be cached.
_outside_inference = torch.inference_mode(False)


class PretrainedMixin(PrecisionMixin):
    """Loading and saving of a model that `cls(config, heads=heads)` builds."""

    config: XFMConfig
    heads: tuple[Head, ...]
    load_report: checkpoint.LoadReport | None = None
    """What was changed or dropped when an official checkpoint was loaded."""

    tokenizer: CaptionTokenizer | None = None
    """Tokenizer of `encode`, `match` and `ground`; saved with the model."""

    @classmethod
    @_outside_inference
    @explain_types
    def from_official(
        cls,
        source: str | Path | Mapping[str, Tensor],
        config: XFMConfig,
        *,
        heads: Iterable[Head] = ALL_HEADS,
        dtype: Precision = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
    ) -> Self:
        """Load an official checkpoint of pretraining or fine-tuning.

        Position tables are interpolated to `config.image_size` and dead weights are dropped, as
        `load_report` lists.

        Args:
            source: a `.th`/`.pth`/`.bin` file (read with `weights_only=True`), a `.safetensors`
                file, or a state dict.
            config: sizes of the model.
            heads: heads to load, since a fine-tuned checkpoint lacks some; the rest is dropped.
            dtype: dtype of the parameters; or "int8" or "fp8", see `quantise`.
            tokenizer: a tokenizer, or a folder with RoBERTa's `vocab.json` and `merges.txt`, or a
                `tokenizer.json`.

        Raises:
            DataError: the tokenizer cannot be read, or belongs to another model.
            CheckpointError: the file cannot be read, or has missing, unexpected or misshapen
                parameters, all listed.
        """
        vocabulary = None if tokenizer is None else read_tokenizer(tokenizer, config)
        name, state = _read_source(source)
        checkpoint.refuse_relative(state, name)
        state, report = checkpoint.to_ours(state, config)
        heads = tuple(heads)
        state = checkpoint.select_heads(state, heads)
        shared = isinstance(source, Mapping)
        model = cls._from_state(config, heads, state, name, dtype, shared=shared)
        model.load_report, model.tokenizer = report, vocabulary
        return model

    @classmethod
    @_outside_inference
    @explain_types
    def from_x2vlm(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        image_size: int | None = None,
        text_heads: int | None = None,
        dtype: Precision = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
    ) -> Self:
        """Load a checkpoint of X²-VLM or CCLM-X²-VLM: the same model with other parameter names.

        Sizes and heads follow from the weights. The mask token of masked image modelling, which
        X²-VLM lacks, is zero, and there is no vocabulary head on the language layers.

        Args:
            source: as for `from_official`.
            image_size: in pixels; by default that of the weights.
            text_heads: attention heads of language and fusion; by default one per 64 columns.
            dtype: dtype of the parameters; or "int8" or "fp8", see `quantise`.
            tokenizer: a folder with BERT's `vocab.txt`, or a `tokenizer.json` (of XLM-R for CCLM).

        Raises:
            DataError: the tokenizer cannot be read, or belongs to another model.
            CheckpointError: the file cannot be read, is incomplete, of an unsupported task, or of an
                incompatible model (X-VLM, ALBEF, BLIP).
        """
        name, source_state = _read_source(source)
        config, state, report = checkpoint.read_x2vlm(
            source_state, what=name, image_size=image_size, text_heads=text_heads
        )
        vocabulary = None if tokenizer is None else read_tokenizer(tokenizer, config)
        heads = checkpoint.heads_in(state)
        shared = isinstance(source, Mapping)
        model = cls._from_state(config, heads, state, name, dtype, shared=shared)
        model.load_report, model.tokenizer = report, vocabulary
        return model

    @classmethod
    @_outside_inference
    @explain_types
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        heads: Iterable[Head] | None = None,
        dtype: Precision | Literal["auto"] = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
        **download: Unpack[hub.Download],
    ) -> Self:
        """Load a folder written by `save_pretrained`, or a model on the Hugging Face Hub, with its tokenizer.

        Parameters in their stored dtype are memory-mapped: replace the file only as
        `save_pretrained` does, and do not write into it while the model lives.

        Args:
            folder: the folder, or the Hub name `"org/name"`.
            heads: heads to load; by default all in the folder.
            dtype: dtype of the parameters; "auto" for that of the file; or "int8" or "fp8", see
                `quantise`.
            tokenizer: replaces the tokenizer of the folder; see `from_official`.
            download: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` of
                the Hub.

        Raises:
            CheckpointError: the folder is missing, or its model is missing or damaged.
            ConfigError: its `config.json` is not a valid model configuration.
            DataError: the tokenizer cannot be read, or belongs to another model.
        """
        path = hub.local_folder(folder, **download)
        files = checkpoint.load_pretrained_files(path)
        heads = checkpoint.heads_in(files.state) if heads is None else tuple(heads)
        state = checkpoint.select_heads(files.state, heads)
        if dtype == "auto":
            dtype = next((tensor.dtype for tensor in state.values()), torch.float32)
        model = cls._from_state(files.config, heads, state, f"model {folder}", dtype)
        model.load_tokenizer(tokenizer, path)
        return model

    @classmethod
    def _from_state(
        cls,
        config: XFMConfig,
        heads: tuple[Head, ...],
        state: Mapping[str, Tensor],
        name: str,
        precision: Precision,
        *,
        shared: bool = False,
    ) -> Self:
        """Build a model from a state dict; tensors shared with the caller are copied."""
        dtype = float_type(precision, torch.device("cpu"))
        checkpoint.require_depth(config, state, what=name)
        # Drawing 300 million random numbers would take longer than reading the file.
        with checkpoint.without_values():
            model = cls(config, heads=heads)
        model = model.to(dtype)
        if shared:
            checkpoint.compare(model, state, what=name)
            model = model.to_empty(device="cpu")
            checkpoint.load_into(model, state, what=name)
        else:
            checkpoint.assign_into(model, state, what=name)
        if not config.learnable_temperature and "contrastive" in heads:
            temperature = torch.tensor(config.temperature, dtype=dtype)
            model.register_buffer("temp", temperature, persistent=False)
        return model.cast(precision).eval()

    def load_tokenizer(self, source: CaptionTokenizer | str | Path | None, folder: Path) -> None:
        """Set the tokenizer from `source`; by default from the folder of the weights, if it has one."""
        if source is None:
            self.tokenizer = find_tokenizer(folder, self.config)
        else:
            self.tokenizer = read_tokenizer(source, self.config)

    @explain_types
    def save_pretrained(self, folder: str | Path, *, name: str | None = None) -> None:
        """Write weights, configuration, tokenizer, a card, and what transformers' libraries need to read them.

        Files are written atomically. Without a tokenizer, `tokenizer.json` is left out.

        Args:
            folder: the folder; a `README.md` in it stays.
            name: name of the model on the card; by default that of the folder.
        """
        files = XFMProcessor(self.config, self.tokenizer).files()
        checkpoint.save_pretrained(self.state_dict(), self.config, folder, files=files, name=name)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload X-FM",
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub as `"org/name"`.

        A model card is added if there is none. Arguments are those of
        `huggingface_hub.PyTorchModelHubMixin`. Returns the address of the commit.

        Raises:
            UnavailableError: `huggingface_hub` is not installed.
            StorageError: the Hub cannot be reached, or refuses.
        """
        try:
            import huggingface_hub
        except ImportError:
            raise UnavailableError(
                "pushing a model needs huggingface_hub; install it (pip install huggingface_hub)"
            ) from None
        api: Any = huggingface_hub.HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, name=name)
            try:
                api.create_repo(name, private=private, exist_ok=True)
                if api.file_exists(name, CARD_FILE):
                    Path(folder, CARD_FILE).unlink()
                commit = api.upload_folder(
                    repo_id=name,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                )
            except (OSError, ValueError) as error:
                raise StorageError(
                    f"{name} cannot be uploaded to the Hub ({hub.first_line(error)}); check the name and hf auth login"
                ) from error
        return str(getattr(commit, "commit_url", commit))


def _read_source(source: str | Path | Mapping[str, Tensor]) -> tuple[str, Mapping[str, Tensor]]:
    """Return the name of a source in messages, and its state dict."""
    if isinstance(source, Mapping):
        return "state dict", source
    return f"checkpoint {source}", checkpoint.read_state_dict(source)
