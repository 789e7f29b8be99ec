"""The models under test: one set of weights at every resolution and dtype, each with its official twin."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from xfm_fast import checkpoint
from xfm_fast.checkpoint.position_table import window_of
from xfm_fast.config import PresetName, XFMConfig
from xfm_fast.errors import CheckpointError
from xfm_fast.models.xfm import XFM, Head

from ..contenders.official_algorithm import OfficialTwin

HEADS: tuple[Head, ...] = ("contrastive", "matching")
_TABLE = ".relative_position_bias_table"


class Subjects:
    """Models and twins of one set of weights, built when first asked for.

    Resolutions share every tensor but the position tables, which are interpolated from the weights as given;
    every dtype has one converted copy. The twin of a model reads the model's own tensors.

    Attributes:
        origin: where the weights come from, for reports.
        trained: whether they come from a checkpoint.
        device: of the models; set it before the first is built.
    """

    def __init__(self, config: XFMConfig, state: Mapping[str, Tensor], origin: str, *, trained: bool) -> None:
        self.config = config
        self.origin = origin
        self.trained = trained
        self.device = torch.device("cpu")
        self._state = state
        self._shared: dict[torch.dtype, dict[str, nn.Parameter]] = {}
        self._models: dict[tuple[int, torch.dtype], XFM] = {}

    @classmethod
    def chosen(cls, preset: PresetName, checkpoint_path: Path | None, seed: int) -> Subjects:
        """Weights of a checkpoint, or random ones where there is none."""
        return cls.random(preset_config(preset), seed) if checkpoint_path is None else cls.load(checkpoint_path, preset)

    @classmethod
    def random(cls, config: XFMConfig, seed: int) -> Subjects:
        """The weights of `random_state`."""
        return cls(config, random_state(config, HEADS, seed), f"random weights (seed {seed})", trained=False)

    @classmethod
    def load(cls, path: str | Path, preset: PresetName) -> Subjects:
        """Weights of an official checkpoint (then the preset gives the sizes) or of a folder that xfm-fast saved.

        Raises:
            CheckpointError: it cannot be read, or does not fit.
        """
        path = Path(path)
        if path.is_dir():
            files = checkpoint.load_pretrained_files(path)
            config, state = files.config, dict(files.state)
        else:
            config = XFMConfig.preset(preset)
            state = checkpoint.read_state_dict(path)
            table = next((t for name, t in state.items() if name.endswith(_TABLE)), None)
            if table is not None:
                config = config.replace(image_size=window_of(table) * config.patch_size)
            state, _ = checkpoint.to_ours(state, config)
        state = checkpoint.select_heads(state, HEADS)
        with torch.device("meta"):
            probe = XFM(config, heads=HEADS)
        probe = probe.to_empty(device="cpu").eval()
        known = set(probe.state_dict())
        checkpoint.load_into(probe, state, what=f"checkpoint {path}", surplus=_task_heads(state, known))
        return cls(config, probe.state_dict(), f"checkpoint {path}", trained=True)

    def model(self, image_size: int, dtype: torch.dtype) -> XFM:
        """The model for a resolution and a dtype, in evaluation mode."""
        key = (image_size, dtype)
        if key not in self._models:
            config = self.config.replace(image_size=image_size)
            with torch.device("meta"):
                model = XFM(config, heads=HEADS)
            model.load_state_dict(self._parameters(config, dtype), assign=True)
            self._models[key] = model.eval().requires_grad_(False)
        return self._models[key]

    def twin(self, image_size: int, dtype: torch.dtype) -> OfficialTwin:
        """The official algorithm on the tensors of the model for this resolution and dtype."""
        return OfficialTwin(self.model(image_size, dtype))

    def _parameters(self, config: XFMConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        if dtype not in self._shared:
            self._shared[dtype] = {
                name: nn.Parameter(tensor.to(self.device, dtype), requires_grad=False)
                for name, tensor in self._state.items()
                if not name.endswith(_TABLE)
            }
        window = (config.grid, config.grid)
        tables = {
            name: nn.Parameter(checkpoint.interpolate_table(tensor, window).to(self.device, dtype), requires_grad=False)
            for name, tensor in self._state.items()
            if name.endswith(_TABLE)
        }
        return {**self._shared[dtype], **tables}


def preset_config(preset: PresetName) -> XFMConfig:
    """A preset with a vocabulary that gives captions their usual length: tiny's own would cut words into letters."""
    return XFMConfig.preset(preset, **({"vocab_size": 2048} if preset == "tiny" else {}))


def random_state(config: XFMConfig, heads: Iterable[Head], seed: int) -> dict[str, Tensor]:
    """Random weights. Unlike in a fresh model nothing is zero, so that every term takes part in comparisons."""
    with torch.device("meta"):
        shapes = XFM(config, heads=heads).state_dict()
    return {name: _random(name, tensor.shape, seed) for name, tensor in shapes.items()}


def _task_heads(state: Mapping[str, Tensor], known: set[str]) -> list[str]:
    """Entries of a fine-tuned checkpoint outside the encoders, which the measurements have no use for."""
    encoders = ("vision_encoder.", "text_encoder.", "fusion_encoder.")
    surplus = [name for name in state if name not in known and not name.startswith(encoders)]
    if len(surplus) == len(state):
        raise CheckpointError("the checkpoint holds no encoder of X-FM; give an X-FM checkpoint")
    return surplus


def _random(name: str, shape: torch.Size, seed: int) -> Tensor:
    if name == "temp":
        return torch.tensor(0.07)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    tensor = torch.empty(shape)
    if name.endswith(_TABLE):
        return tensor.normal_(0, 0.2, generator=generator)
    if ".gamma_" in name:
        return tensor.normal_(0.1, 0.01, generator=generator)
    if len(shape) == 1 and name.endswith("weight"):
        return tensor.normal_(1, 0.05, generator=generator)
    return tensor.normal_(0, 0.02, generator=generator)
