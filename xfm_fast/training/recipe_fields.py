"""Recipe sections: streams, optimizer, schedule, method, checkpoints, logs. Defaults are the official values."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from xfm_fast.data.options import (
    ImageStreamOptions,
    PairStreamOptions,
    RegionStreamOptions,
    StreamOptions,
    TextStreamOptions,
)

LossName = Literal["itc", "itm", "imlm", "mim", "mlm", "bbox_l1", "bbox_giou"]

MOST_ITEMS = 1 << 20
"""Largest batch of one process, and largest number of images or scenes."""

LOSSES_OF_KIND: dict[str, tuple[LossName, ...]] = {
    "pairs": ("itc", "itm", "imlm", "mim"),
    "regions": ("itc", "itm", "imlm", "bbox_l1", "bbox_giou"),
    "images": ("mim",),
    "text": ("mlm",),
}
"""Losses of each stream kind, in the order of the official sums."""


Paths = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]


class Section(BaseModel):
    """Frozen section that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Stream(StreamOptions):
    """Keys of every stream, beside its options; relative paths refer to the recipe's `data` folder."""

    paths: Paths = Field(description="files, folders or glob patterns")
    batch_size: int = Field(
        gt=0, le=MOST_ITEMS, description="per rank and update, before accumulation splits it"
    )
    weight: float = Field(
        default=1.0,
        ge=0,
        description="factor of the stream's summed losses, including box losses (the official code excludes "
        "them; its published weights are 1)",
    )
    every: int = Field(
        default=1, gt=0, description="steps from one draw to the next: 4 draws in a quarter of them"
    )
    losses: tuple[LossName, ...] = Field(default=(), description="default: all losses of the kind")

    @model_validator(mode="after")
    def _losses_exist(self) -> Self:
        stream = type(self).model_fields["kind"].default
        applicable = LOSSES_OF_KIND[stream]
        if wrong := [loss for loss in self.losses if loss not in applicable]:
            raise ValueError(
                f"a stream of {stream} cannot give {', '.join(wrong)}; choose from {', '.join(applicable)}"
            )
        if len(set(self.losses)) != len(self.losses):
            raise ValueError(f"losses {', '.join(self.losses)} name one twice; name each once")
        return self


class TextStream(Stream, TextStreamOptions):
    """Text only: masked language modelling."""


class PairStream(Stream, PairStreamOptions):
    """Image-caption pairs."""


class RegionStream(Stream, RegionStreamOptions):
    """Images with region captions; `batch_size` counts captions, not images."""


class ImageStream(Stream, ImageStreamOptions):
    """Images only: masked image modelling."""


AnyStream = Annotated[
    TextStream | PairStream | RegionStream | ImageStream, Field(discriminator="kind")
]


class Init(Section):
    """Sources of the initial weights; weights without a source are random."""

    roberta: str | None = Field(
        default=None, description="Hugging Face RoBERTa state dict for the language encoder"
    )
    beit2: str | None = Field(default=None, description="BEiT-v2 checkpoint for the vision encoder")
    checkpoint: str | None = Field(
        default=None, description="official X-FM file, or a save_pretrained folder"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.checkpoint and (self.roberta or self.beit2):
            raise ValueError(
                "checkpoint fills the encoders too; leave roberta and beit2 out, or checkpoint"
            )
        return self


class OptimizerRecipe(Section):
    """AdamW and its parameter groups, as in the official code."""

    kind: Literal["transformers", "torch"] = Field(
        default="transformers",
        description="AdamW of transformers 4.12, or that of PyTorch (official for image classification only)",
    )
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    decay_all: bool = Field(
        default=False,
        description="decay biases and norms too (official for ImageNet fine-tuning only)",
    )
    lr_mult: float = Field(
        default=2.0, gt=0, description="learning-rate factor of heads and temperature"
    )
    table_lr_mult: float = Field(
        default=1.0,
        gt=0,
        description="learning-rate factor of image position tables, which start at zero and need a larger rate "
        "from scratch",
    )
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="maximum global gradient norm per update"
    )
    zero_grad: Literal["none", "zeros"] = Field(
        default="none",
        description="zeros: parameters without a gradient keep moving by momentum and decay, as in the official "
        "code under torch < 2.0",
    )

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both must lie in [0, 1)")
        return betas


class ScheduleRecipe(Section):
    """Linear warm-up from 0, then decay."""

    kind: Literal["linear", "cosine"] = "linear"
    steps: int | None = Field(
        default=None, gt=0, description="length of the schedule; default: length of the run"
    )
    warmup: int | float = Field(
        default=0, ge=0, description="number of steps, or a fraction below 1"
    )
    min_lr: float = Field(default=0.0, ge=0, description="final learning rate")

    @field_validator("warmup")
    @classmethod
    def _steps_or_share(cls, warmup: int | float) -> int | float:
        if isinstance(warmup, float) and warmup >= 1:
            raise ValueError("give a whole number of steps, or a fraction of them below 1")
        return warmup

    def warmup_steps(self, steps: int) -> int:
        """Warm-up steps of a run of `steps`."""
        return self.warmup if isinstance(self.warmup, int) else int(self.warmup * steps)


class Method(Section):
    """The X-FM training method (arXiv 2301.05065) and its ablations."""

    stop_gradient: bool = Field(
        default=True, description="block gradients of ITM, IMLM and BBP to the language encoder"
    )
    mim_guidance: bool = Field(
        default=True,
        description="MIM predicts the unmasked output of the guided vision encoder; false removes MIM from every "
        "stream",
    )
    official_itc_gradient: bool = Field(
        default=False,
        description="scale the contrastive gradient by 1 / world size, as the official gathering does",
    )
    official_itm_negatives: bool = Field(
        default=False,
        description="draw hard negatives from one process, as in the official code, not from all",
    )


class CheckpointRecipe(Section):
    """Run folder and checkpoint settings."""

    folder: str = Field(description="run folder, not shared with other runs")
    every: int = Field(default=1000, gt=0, description="steps")
    keep: int = Field(default=2, gt=0, description="number of newest checkpoints to keep")


class LogRecipe(Section):
    """Logging settings; `log.jsonl` is always written."""

    every: int = Field(default=50, gt=0, description="steps")
    tensorboard: bool = False
    wandb: str | None = Field(default=None, description="project name; needs the wandb package")


class ShapesWorldRecipe(Section):
    """A shapes dataset, generated in the `data` folder by the first run that needs it."""

    seed: int = Field(default=0, ge=0)
    train: int = Field(default=10_000, gt=0, le=MOST_ITEMS, description="scenes")
    val: int = Field(default=500, gt=0, le=MOST_ITEMS, description="scenes")
    test: int = Field(default=500, gt=0, le=MOST_ITEMS, description="scenes")
    known: int = Field(
        default=0,
        ge=0,
        le=MOST_ITEMS,
        description="scenes of the extra split with training combinations",
    )
    resolution: int = Field(default=64, gt=0, le=16384, description="image side in pixels")

    def write(self, folder: str) -> None:
        """Write the dataset into a folder if it is missing."""
        from xfm_fast.data.shapes import Split, write_world

        images: dict[Split, int] = {"train": self.train, "val": self.val, "test": self.test}
        if self.known:
            images["known"] = self.known
        write_world(folder, seed=self.seed, images=images, resolution=self.resolution)
