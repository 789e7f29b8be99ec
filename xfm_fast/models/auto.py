"""X-FM among transformers' Auto classes; `import xfm_fast` registers it when they are imported."""

from __future__ import annotations

from functools import cache
from typing import Any

from xfm_fast.config import MODEL_TYPE, XFMConfig
from xfm_fast.errors import UnavailableError, needs

with needs("hf"):
    import transformers
    from transformers.configuration_utils import PretrainedConfig


class XFMAutoConfig(PretrainedConfig):
    """The fields of `XFMConfig`, and the names that other libraries read.

    Until an instance is created, as every Auto class does first, only this class is registered: while
    transformers is being imported, the modules that the others need may be incomplete.
    """

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012
        "projection_dim": "embed_dim",
        "hidden_size": "text_width",
        "max_position_embeddings": "max_positions",
    }

    def __init__(self, **options: Any) -> None:
        register_auto_classes()
        fields = {name: options.pop(name) for name in XFMConfig.model_fields if name in options}
        super().__init__(**options)
        for name, value in XFMConfig(**fields):
            setattr(self, name, value)


@cache
def register_auto_classes() -> None:
    """Register X-FM with the Auto classes of transformers; the first use of its configuration does it.

    They are `AutoModel`, `AutoModelForZeroShotImageClassification`, `AutoProcessor`, `AutoTokenizer`
    and `AutoImageProcessor`. The model is an `XFMModel`: an `XFM` under the interface of CLIP. Raises
    `UnavailableError` for transformers 4.
    """
    if transformers.__version__.startswith("4."):
        raise UnavailableError(
            f"X-FM needs transformers 5, and {transformers.__version__} is installed; upgrade it"
        )
    from transformers.models.auto import modeling_auto

    from xfm_fast.models import auto_classes

    model, images = auto_classes.XFMModel, auto_classes.XFMImageProcessor
    model.config_class = XFMAutoConfig
    transformers.AutoModel.register(XFMAutoConfig, model)
    transformers.AutoModelForZeroShotImageClassification.register(XFMAutoConfig, model)
    transformers.AutoProcessor.register(XFMAutoConfig, auto_classes.XFMAutoProcessor)
    transformers.AutoTokenizer.register(XFMAutoConfig, tokenizer_class=auto_classes.XFMTokenizer)
    try:
        by_backend = {"torchvision": images, "pil": images}
        transformers.AutoImageProcessor.register(XFMAutoConfig, image_processor_classes=by_backend)
    except TypeError:  # the first releases of transformers 5
        transformers.AutoImageProcessor.register(XFMAutoConfig, images)
    # The pipeline prints an error for models that are not in this list.
    names: Any = modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    names[MODEL_TYPE] = model.__name__
