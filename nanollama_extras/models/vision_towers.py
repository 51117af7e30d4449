"""Image processors and vision towers of transformers, for models whose text part runs here.

Adds       `Tower`: transformers' own image processor, on Pillow alone, and its own model class with
           the weights of the vision part only: the text part is made without layers and with a
           vocabulary of a few tokens, so that nothing of it is read.
Seam       models.vision makes one. Code of a model's repository never runs, and pickles are never
           read (trust_remote_code=False, use_safetensors=True).
Remove     delete this file with vision.py.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanollama import (
    CheckpointError,
    Decoder,
    NanollamaError,
    PackageError,
    RequestError,
    extra,
    first_line,
    memory_errors,
    read_json,
)

if TYPE_CHECKING:
    from nanollama import Json, ModelConfig
    from nanollama_extras.models.vision import Encoded, VisionFamily

INSTALL = "pip install 'nanollama[vision]'"
FEW = 8  # tokens of the text part's vocabulary
# Settings of a text part that list something for each of its layers
BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
TEXT_PART = re.compile(r"(^|\.)(language_model|text_model|lm_head)\.")


def library() -> Any:
    """transformers. Raises PackageError."""
    try:
        import PIL  # noqa: F401
        import transformers
    except ImportError as error:
        raise PackageError(f"images need {error.name}; run: {INSTALL}") from None
    return transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars, and its warnings about the text part, which is left out on
    purpose. Raises PackageError."""
    messages = library().utils.logging
    level, has_bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.CRITICAL)
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if has_bars:
            messages.enable_progress_bar()


@contextlib.contextmanager
def errors_of_files(path: Path) -> Iterator[None]:
    """Turn an error of transformers about a model's files into a CheckpointError."""
    try:
        with memory_errors():
            yield
    except NanollamaError:
        raise
    except ImportError as error:
        if "torchvision" in str(error).lower():  # which some image processors need
            problem = "images of this model need torchvision; run: pip install torchvision"
            raise PackageError(problem) from None
        raise PackageError(f"images of this model need more: {first_line(error)}") from None
    except Exception as error:  # of files that others wrote, of any kind
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{path}: its vision part cannot be read: {problem}") from None


class TextWatch:
    """A tokenizer that notes the text it gets: what a processor makes of a placeholder."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.text = tokenizer, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        return self.tokenizer(text, **options)


def open_processor(path: Path, model_type: str) -> Any:
    """The model's processor, without the one for videos, which would need torchvision."""
    transformers = library()
    named = (
        read_json(path / f"{part}_config.json", required=False).get("processor_class")
        for part in ("processor", "preprocessor", "tokenizer")
    )
    usual = transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES[model_type]
    name = str(next(filter(None, named), usual))
    parts: dict[str, Any] = {
        "image_processor": image_processor(path, model_type),
        "tokenizer": TextWatch(
            transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        ),
    }
    values, _ = transformers.ProcessorMixin.get_processor_dict(path)
    if name == "PixtralProcessor":
        pixtral = extra("models.pixtral", "an image for this model")
        return pixtral.Processor(**parts, settings=values)
    if name == "LlavaProcessor" and values.get("patch_size") is None:
        values |= llava_settings(read_json(path / "config.json"))
    return new_processor(getattr(transformers, name), parts, values)


def image_processor(path: Path, model_type: str) -> Any:
    """The model's image processor on Pillow. Raises PackageError and CheckpointError."""
    transformers = library()
    if model_type not in ("lfm2_vl", "gemma4_unified"):
        return transformers.AutoImageProcessor.from_pretrained(
            path, backend="pil", trust_remote_code=False
        )
    # transformers has these for torchvision alone
    values, _ = transformers.ImageProcessingMixin.get_image_processor_dict(path)
    if model_type == "lfm2_vl":
        return extra("models.lfm2_pixels", "an image for this model").Processor(values)
    # its patches are those of Gemma 4 that are pooled there
    factor = values.get("pooling_kernel_size", 3)
    values |= {"patch_size": values.get("patch_size", 16) * factor, "pooling_kernel_size": 1}
    return transformers.Gemma4ImageProcessorPil.from_dict(values)


def new_processor(base: Any, parts: dict[str, Any], values: dict[str, Any]) -> Any:
    """A processor of the class `base` with these parts alone, and settings."""
    unchecked = {"check_argument_for_proper_class": lambda self, name, argument: None}
    kind: Any = type(base.__name__, (base,), unchecked)
    return kind.from_args_and_dict([parts.get(name) for name in kind.get_attributes()], values)


def llava_settings(config: Json) -> Json:
    """The settings of LLaVA's processor, which its older files have in config.json alone."""
    vision: Json = config.get("vision_config") or {}
    strategy = config.get("vision_feature_select_strategy", "default")
    has_class = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
    patch = {
        "patch_size": vision.get("patch_size", 14),
        "num_additional_image_tokens": int(has_class),
    }
    return {**patch, "vision_feature_select_strategy": strategy}


def open_model(path: Path, config: Any, own: ModelConfig, dtype: torch.dtype) -> Any:
    """transformers' model of a config with the vision part's weights. own: the text part's config.
    Raises CheckpointError."""
    config = without_text(config)
    with torch.device("meta"):
        sketch = library().AutoModelForImageTextToText.from_config(config)
    weights = None
    if own.packing:
        reader = extra("models.vision_weights", "an image for a quantized model")
        weights = reader.float_weights(path, own, dtype)
    if weights is not None:
        shapes = {name: tensor.shape for name, tensor in sketch.state_dict().items()}
        weights = reader.fitted(weights, shapes)
    model, report = type(sketch).from_pretrained(
        path if weights is None else None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    check_whole(path, report)
    return model.eval().requires_grad_(False).model


def without_text(config: Any) -> Any:
    """A config whose text part has no layers and few tokens."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for part in (config, text):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, FEW, 0
    for key in filter(lambda key: getattr(text, key, None) is not None, BY_LAYER):
        setattr(text, key, type(getattr(text, key))())
    return config


def check_whole(path: Path, report: Any) -> None:
    """Raise CheckpointError for a tensor of the vision part that was not in the files, or was of
    another shape."""
    absent = dict.fromkeys(report["missing_keys"], "is missing")
    other = "has another shape than its config says"
    absent |= {key: other for key, *_ in report["mismatched_keys"]}
    for name in sorted(key for key in absent if not TEXT_PART.search(key)):
        raise CheckpointError(f"{path}: tensor {name} of its vision part {absent[name]}")


def open_directory(path: Path, own: ModelConfig, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The config, the processor and the model of a directory. own: the text part's config. Raises
    PackageError and CheckpointError."""
    config = library().AutoConfig.from_pretrained(path, trust_remote_code=False)
    return config, open_processor(path, config.model_type), open_model(path, config, own, dtype)


class Tower:
    """The image processor and the vision tower of a model's files.

    read: gives the config, the processor and the model in a type, as `open_directory` does"""

    def __init__(
        self,
        path: Path,
        family: VisionFamily,
        decoder: Decoder,
        read: Callable[[torch.dtype], tuple[Any, Any, Any]],
    ) -> None:
        """Raises PackageError and CheckpointError."""
        self.path, self.family, self.device = path, family, decoder.device
        with quiet(), errors_of_files(path):
            config, self.processor, model = read(decoder.dtype)
            self.model = model.to(self.device)
        ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        self.image_id: int = next(i for i in ids if i is not None)
        self.placeholder: str = self.processor.image_token
        padding = getattr(config.get_text_config(), "pad_token_id", None) or 0
        self.stand_in = padding if family.id_of_padding else self.image_id
        self.width = decoder.config.n_embd
        self.takes = inspect.signature(self.model.get_image_features).parameters

    def encode(
        self, pixels: Any, where: str
    ) -> tuple[str, Tensor, tuple[Tensor, ...], Tensor | None]:
        """An image -> the text of its placeholder, its rows (n, C), tensors (n, C) to add after the
        first layers, and its grid (1, 3). Raises RequestError, which names `where`."""
        with quiet(), torch.inference_mode(), memory_errors():
            try:
                inputs = self.processor(
                    images=[pixels], text=[self.placeholder], return_tensors="pt"
                )
            except (ValueError, ZeroDivisionError, TypeError, RuntimeError) as error:
                size = "x".join(map(str, pixels.size))
                problem = f"{where}, of {size} pixels, is refused by the model's image processor"
                raise RequestError(f"{problem}: {first_line(error)}", "messages") from None
            given = {key: x.to(self.device) for key, x in inputs.items() if key in self.takes}
            out = self.model.get_image_features(**given)
            deep = getattr(out, "deepstack_features", None) or ()
            rows, *added = (self.joined(x) for x in (out.pooler_output, *deep))
        return self.processor.tokenizer.text, rows, tuple(added), inputs.get("image_grid_thw")

    def joined(self, rows: Any) -> Tensor:
        """Rows (.., C), or a list of such tensors, as one tensor (n, C) of its own."""
        parts = [rows] if isinstance(rows, torch.Tensor) else list(rows)
        return torch.cat([part.reshape(-1, self.width) for part in parts]).contiguous()

    def places(self, ids: list[int], images: list[Encoded]) -> list[list[int]] | None:
        """Each token's positions in time, height and width; None in other families."""
        if not self.family.in_three:
            return None
        grids = [image.grid for image in images if image.grid is not None]
        tokens = torch.tensor([ids])
        kinds = (tokens == self.image_id).int()
        found, _ = self.model.get_rope_index(tokens, kinds, image_grid_thw=torch.cat(grids))
        listed: list[list[int]] = found[:, 0].T.tolist()
        return listed
