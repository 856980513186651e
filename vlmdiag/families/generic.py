"""Any model that follows the conventions of transformers 5: get_decoder(), get_image_features(),
image_token_id, a processor with a chat template.

The grid of its vision tokens cannot be known from these conventions, so scripts that need a grid
exit with an error. What several family files share is written here: loading, modules, boxes of
tiles, positions.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file

from vlmdiag.cli import UsageError
from vlmdiag.families import Family, Parts, Rotary
from vlmdiag.families.folders import read_object
from vlmdiag.families.weights import checked
from vlmdiag.pictures.grid import PatchGrid, cells

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Inputs, Loaded, LoadOptions, QFormer, Size
    from vlmdiag.pictures.grid import Region
    from vlmdiag.types import VLM

# Image processors on PIL, also where torchvision is installed, so that numbers agree between
# machines.
PIL_BACKEND = {"backend": "pil"}
# of cached_file(): None where a file is not there
QUIETLY = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
# packages that some types need, each an extra of pyproject.toml
EXTRAS = ("timm", "torchvision")


# --- loading --------------------------------------------------------------------------------------


def load_model_class(
    model_class: type[PreTrainedModel],
    path: str | None,
    config: PreTrainedConfig,
    options: LoadOptions,
    **more: object,
) -> PreTrainedModel:
    """The model of a class by its from_pretrained(), which gets `more` too; ValueError that names
    parameters no file filled. A model that is in memory already is that one; ValueError where it is
    of another class."""
    in_memory = options.get("in_memory")
    if in_memory is not None:
        return of_class(in_memory[0], model_class)
    try:
        loaded = model_class.from_pretrained(
            path,
            config=config,
            output_loading_info=True,
            dtype=options["dtype"],
            device_map=options.get("device_map"),
            quantization_config=options.get("quantization_config"),
            ignore_mismatched_sizes=True,  # checked() names them
            # with peft, transformers would put an adapter beside the weights into the model
            # (vlmdiag.model.adapters does, and merges it): it looks in this folder
            adapter_kwargs={"subfolder": "no-adapter"},
            **more,
        )
    except NotImplementedError as error:
        if "aten::equal" not in str(error):
            raise
        # tied parameters that were both left without values
        raise ValueError(
            "embedding table and LM head are of another shape than vocab_size and hidden_size of"
            " config.json say"
        ) from error
    return checked(loaded)


def of_class(model: PreTrainedModel, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A model in memory; ValueError where it is not of the class that its family needs."""
    if model_class is not AutoModelForImageTextToText and not isinstance(model, model_class):
        raise ValueError(
            f"it is a {type(model).__name__}, and this family needs {model_class.__name__} of"
            f" {model_class.__module__}: save it and load the folder"
        )
    return model


def load_processor(path: str, options: LoadOptions, kind: str | None = None) -> ProcessorMixin:
    """The processor of a folder or hub id, or the one in memory; of it, what reads pictures and
    text. kind: config.model_type, which says the class where the files do not."""
    in_memory = options.get("in_memory")
    if in_memory is not None:
        return in_memory[1]
    trusted = options.get("trust_remote_code", False)
    processor_class = processor_class_of(path, kind)
    if processor_class is None:  # of the checkpoint's own code, or none
        return AutoProcessor.from_pretrained(path, trust_remote_code=trusted, **PIL_BACKEND)
    return image_only(processor_class).from_pretrained(path, trust_remote_code=trusted)


# files that may name the class of a processor, as transformers reads them
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def processor_class_of(path: str, kind: str | None) -> type[ProcessorMixin] | None:
    """transformers' class of a checkpoint's processor: the one that its files name, else that of
    the type; None where it has none of these names. ImportError in one line where it needs a
    package that is missing."""
    names = []
    for name in PROCESSOR_FILES:
        file = cached_file(path, name, **QUIETLY)
        if file is not None:
            said = read_object(Path(file))
            if "auto_map" in said and "AutoProcessor" in said["auto_map"]:
                return None
            names.append(said.get("processor_class"))
    names.append(PROCESSOR_MAPPING_NAMES.get(kind))
    known = next(filter(None, names), None)
    processor_class: Any = known and getattr(transformers, known, None)
    if not processor_class:
        return None
    if getattr(processor_class, "is_dummy", False):
        raise ImportError(f"{known} needs {', '.join(processor_class._backends)}")
    return processor_class


# as a checkpoint's auto_map names its own classes, those that write text first
AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForVision2Seq",  # of transformers 4
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)


def auto_class(path: str, config: PreTrainedConfig, trusted: bool) -> type[PreTrainedModel]:
    """The class that loads a type without a file here: transformers' Auto class; where the
    checkpoint's own code is trusted, the one of that code."""
    own = getattr(config, "auto_map", None) or {}
    name = next((name for name in AUTO_CLASSES if name in own), None)
    if name is None or not trusted:
        return AutoModelForImageTextToText
    # {Auto class: "module.Class"}, or a list of which the first is the model's
    reference = own[name] if isinstance(own[name], str) else own[name][0]
    model_class = get_class_from_dynamic_module(reference, path)
    return add_generation_mixin_to_remote_model(model_class)


def lacking(config: PreTrainedConfig) -> str | None:
    """What a type of transformers lacks that every measure needs, in words; None where nothing is
    known to be missing."""
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if name is None:
        return None
    if config.is_encoder_decoder or name == "VisionEncoderDecoderModel":
        return (
            "decoder-only (an encoder reads the prompt, and the decoder sees it by cross-attention)"
        )
    if config.model_type in NEITHER:
        return NEITHER[config.model_type]
    taken = set(inspect.signature(getattr(transformers, name).forward).parameters)
    if taken & {"mm_encoder_outputs"} or "get_image_features" in dir(getattr(transformers, name)):
        return None
    if taken & {"cross_attention_mask", "image_attention_mask"}:
        return "vision tokens (its decoder sees the picture by layers of cross-attention)"
    if not taken & {"pixel_values", "flattened_patches"}:
        return "vision tokens (it reads no pictures)"
    return "vision tokens (its forward takes no image features in place of image tokens)"


# types that are listed among those that read pictures and write text, and lack what measures need
NEITHER = {
    "fuyu": "offsets of a prompt's tokens (its processor writes image tokens among the ids)",
    "instructblipvideo": "pictures (its processor reads videos)",
    "diffusion_gemma": "greedy decoding (it writes blocks of text by diffusion)",
    "inkling2": "a residual stream (its layers and its end read a mix of earlier blocks' outputs)",
    "pi0": "text answers (it writes a robot's actions)",
    "shieldgemma2": "a prompt of its own (a classifier whose processor writes one per policy; load"
    " its weights as gemma3)",
}


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """Model and processor by transformers' Auto classes, or by the checkpoint's own code.
    UsageError for a type that lacks what every measure needs."""
    trusted = options.get("trust_remote_code", False)
    missing = None if options.get("in_memory") else lacking(config)
    if missing is not None:
        raise UsageError(
            f"{path}: type {config.model_type!r} cannot be measured, it lacks {missing}"
        )
    model_class = auto_class(path, config, trusted)
    more = {"trust_remote_code": trusted} if model_class is AutoModelForImageTextToText else {}
    try:
        model = load_model_class(model_class, path, config, options, **more)
        return model, load_processor(path, options, config.model_type)
    except (ImportError, ValueError) as error:
        said = str(error).lower()
        wanted = [name for name in EXTRAS if name in said and find_spec(name) is None]
        if not wanted:
            raise
        raise UsageError(
            f"{path}: type {config.model_type!r} needs {wanted[0]}, which is not installed: pip"
            f" install {wanted[0]}, or this package with its extra [{wanted[0]}]"
        ) from error


class _LeftOut:
    """In the place of a part of a processor that reads no pictures."""

    model_input_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


# parts of processors that read videos and sound; the first would need torchvision
LEFT_OUT = ("video_processor", "feature_extractor")


def image_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A transformers processor class without its parts for videos and sound, whose pictures are
    prepared on PIL where transformers has that."""
    attributes = processor_class.get_attributes()
    without = set(LEFT_OUT) & set(attributes) if "image_processor" in attributes else set()

    def _get_arguments_from_pretrained(
        _: type[ProcessorMixin], /, path: str, processor_dict: object = None, **kwargs: object
    ) -> list[object]:
        arguments: list[object] = []
        for name in attributes:
            if name in without:
                arguments.append(_LeftOut())
                continue
            methods = {"get_attributes": classmethod(lambda _, name=name: [name])}
            one: Any = type(processor_class.__name__, (processor_class,), methods)
            options = kwargs | PIL_BACKEND if "image_processor" in name else kwargs
            arguments += one._get_arguments_from_pretrained(path, processor_dict, **options)
        return arguments

    def check_argument_for_proper_class(
        self: ProcessorMixin, argument_name: str, argument: object
    ) -> object:
        if argument_name in without and (argument is None or isinstance(argument, _LeftOut)):
            return _LeftOut
        return processor_class.check_argument_for_proper_class(self, argument_name, argument)

    def to_dict(self: ProcessorMixin) -> dict[str, object]:
        settings = processor_class.to_dict(self)
        return {name: value for name, value in settings.items() if name not in without}

    def save_pretrained(self: ProcessorMixin, *args: object, **kwargs: object) -> object:
        saved = copy.copy(self)
        of_class = {"get_attributes": classmethod(lambda _: [*filter(is_kept, attributes)])}
        saved.__class__ = type(processor_class.__name__, (processor_class,), of_class)
        return saved.save_pretrained(*args, **kwargs)

    def is_kept(name: str) -> bool:
        return name not in without

    methods = {
        "save_pretrained": save_pretrained,
        "_get_arguments_from_pretrained": classmethod(_get_arguments_from_pretrained),
        "check_argument_for_proper_class": check_argument_for_proper_class,
        "to_dict": to_dict,
        "get_attributes": classmethod(lambda _: list(attributes)),
    }
    return type(processor_class.__name__, (processor_class,), methods)


def loader(
    model_class: type[PreTrainedModel],
    processor_class: type[ProcessorMixin],
    **of_processor: object,
) -> Callable[..., Loaded]:
    """Family.load for a class of transformers with an image-only processor, whose from_pretrained()
    gets `of_processor` too."""

    def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
        model = load_model_class(model_class, path, config, options)
        if options.get("in_memory"):
            return model, load_processor(path, options)
        return model, image_only(processor_class).from_pretrained(path, **of_processor)

    return load


def refuse_conv_mode(path: str, options: LoadOptions, layout: str) -> None:
    """UsageError where --conv_mode is given for a checkpoint of another layout than LLaVA's."""
    mode = options.get("conv_mode")
    if mode is not None:
        raise UsageError(
            f"--conv_mode {mode}: for checkpoints in LLaVA's original layout; {path} is in"
            f" {layout}: give --prompt_template"
        )


# --- modules --------------------------------------------------------------------------------------


# where decoders have their final norm
NORMS = ("norm", "embedding_norm", "final_layernorm", "norm_f", "ln_f", "final_layer_norm")


def decoder_parts(
    decoder: PreTrainedModel,
    lm_head: nn.Linear,
    tower: nn.Module | None,
    connector: nn.Module | None,
    vision_blocks: Sequence[nn.Module] = (),
    qformer: QFormer | None = None,
) -> Parts:
    """Parts of a model whose decoder has its blocks in `layers`."""
    layers = list(decoder.layers)
    norms = (getattr(decoder, name) for name in NORMS if hasattr(decoder, name))
    # where it has another end, Lens.check() finds that hidden states do not give the logits
    norm = next(norms, torch.nn.Identity())
    return Parts(
        decoder,
        layers,
        norm,
        lm_head,
        tower,
        connector,
        qformer,
        vision_blocks,
        without_attention(decoder.config, len(layers)),
    )


# of config.layer_types: layers that mix positions otherwise than by attention, or not at all
NO_ATTENTION = ("linear_attention", "conv", "mamba", "mlp", "moe")


def without_attention(config: PreTrainedConfig, count: int) -> dict[int, str]:
    """{layer: its type} of a hybrid decoder's layers that do not attend."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return {i: kind for i, kind in enumerate(kinds[:count]) if kind in NO_ATTENTION}


def owner_of(model: PreTrainedModel, method: str) -> PreTrainedModel | None:
    """The model, or the model within, whichever has a method; None where neither has."""
    for owner in (model, getattr(model, "model", None)):
        if hasattr(owner, method):
            return owner
    return None


def seeing(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or the model within, that has get_image_features; UsageError where neither has."""
    owner = owner_of(model, "get_image_features")
    if owner is None:
        raise UsageError(
            f"{type(model).__name__} has no get_image_features, which every model needs"
        )
    return owner


CONNECTORS = (
    "multi_modal_projector",
    "connector",
    "mm_projector",
    "aligner",
    "embed_vision",
    "resampler_model",
    "visual.merger",
    "vision_tower.merger",
    "vision_tower.patch_merger",
)


def parts(model: PreTrainedModel) -> Parts:
    """Decoder, its layers and final norm, LM head, tower and connector by transformers' own
    accessors; AttributeError where one is missing."""
    tower = None
    with contextlib.suppress(AttributeError, ValueError, TypeError):
        tower = model.get_encoder(modality="image")
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers"):
        decoder = decoder.model  # Llama 4's is a whole text model
    base = getattr(model, "model", model)
    named = dict(base.named_modules())
    connector = next((named[name] for name in CONNECTORS if name in named), None)
    head = model.get_output_embeddings()
    if head is None:  # the text model within writes
        head = model.language_model.get_output_embeddings()
    return decoder_parts(decoder, head, tower, connector)


# where towers of transformers have their blocks
BLOCKS = ("encoder.layers", "encoder.layer", "vision_model.encoder.layers", "layers", "blocks")


def parts_with_tower(model: PreTrainedModel) -> Parts:
    """parts() with the blocks of the tower, for families whose vision tokens are made of its
    positions as Family.sources says."""
    without_blocks = parts(model)
    tower: Any = without_blocks.tower
    for name in BLOCKS:
        with contextlib.suppress(AttributeError):
            return replace(without_blocks, vision_blocks=list(tower.get_submodule(name)))
    raise AttributeError(f"{type(tower).__name__} has its blocks at none of the known places")


def first_layers(vlm: VLM) -> range:
    """Family.deepstack of Qwen3-VL and its like: one layer for each of the tower's that feed it."""
    return range(len(vlm.model.config.vision_config.deepstack_visual_indexes))


# --- boxes and patches ----------------------------------------------------------------------------


def patch_sides(inputs: Inputs, patch: int) -> tuple[int, int]:
    """(rows, columns) of patches of `patch` pixels a side in a preprocessed picture."""
    height, width = inputs["pixel_values"].shape[-2:]
    return height // patch, width // patch


def patch_grid(
    inputs: Inputs, patch: int, region: Region, size: Size, grouped: int = 1
) -> PatchGrid:
    """The grid of a preprocessed picture that shows a region of the original: a cell per patch, or
    per `grouped` patches in a row. No patch sees what is left behind the last whole one, such as 6
    of 384 pixels behind 27 patches of 14."""
    height, width = inputs["pixel_values"].shape[-2:]
    rows, columns = patch_sides(inputs, patch)
    x0, y0, x1, y1 = region
    end_x = x0 + (x1 - x0) * columns * patch / width
    end_y = y0 + (y1 - y0) * rows * patch / height
    return PatchGrid.regular(rows, columns // grouped, (x0, y0, end_x, end_y), size)


def regions(rows: int, columns: int, size: Size) -> list[Region]:
    """Where rows x columns equal tiles lie in a picture of `size`, row by row."""
    boxes = cells(rows, columns, (0, 0, *size)).reshape(-1, 4)
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist()]


def grid_of_tiles(tiles: Iterable[Region], rows: int, columns: int, size: Size) -> PatchGrid:
    """The grid of tiles of rows x columns vision tokens one after the other. tiles: the region of
    the picture that each shows."""
    boxes = [cells(rows, columns, region).reshape(-1, 4) for region in tiles]
    return PatchGrid(np.concatenate(boxes), None, size)


def merged(
    rows: int, columns: int, factor: int, tiles: int = 1, cls: int = 0
) -> Int[np.ndarray, "P k"]:
    """Family.sources of tiles of rows x columns vision tokens, each made of factor x factor
    patches: (tiles * rows * columns, factor ** 2). cls: positions of the tower before a tile's
    patches."""
    # (rows * factor, columns * factor) patches of a tile, numbered row by row, block by block
    numbers = np.arange(rows * columns * factor**2).reshape(rows, factor, columns, factor)
    blocks = numbers.transpose(0, 2, 1, 3).reshape(rows * columns, factor**2)
    step = cls + blocks.size
    return np.concatenate([tile * step + cls + blocks for tile in range(tiles)])


# --- positions ------------------------------------------------------------------------------------


def positions(
    vlm: VLM,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"],
    image_inputs: Inputs,
) -> tuple[Int[Tensor, "... B T"], Int[Tensor, " B"]]:
    """Positions as the model takes them and the next one (B,): 0, 1, 2, ... of each row without its
    padding, (B, T); or, for models with positions in time, height and width, (3, B, T) by their own
    get_rope_index. These would silently fall back to one dimension if they were left to themselves.
    """
    owner = owner_of(vlm.model, "get_rope_index")
    if owner is not None:
        taken = inspect.signature(owner.get_rope_index).parameters
        given = {"mm_token_type_ids": (input_ids == vlm.image_token_id).int(), **image_inputs}
        of_pictures = {
            name: tensor.to(input_ids.device) for name, tensor in given.items() if name in taken
        }
        ids, _ = owner.get_rope_index(input_ids, attention_mask=attention_mask, **of_pictures)
        return ids, ids[:, :, -1].amax(0) + 1
    ids = attention_mask.cumsum(-1) - 1
    return ids.clamp(min=0), ids[:, -1] + 1


def rotary(vlm: VLM) -> list[Rotary]:
    """The ways in which positions may turn queries and keys: each set of frequencies that the
    decoder has, half-split or interleaved, at the beginning of a head or at its end; [] where it
    has none."""
    ways: list[Rotary] = []
    seen: list[Tensor] = []
    for name, frequencies in vlm.parts.decoder.named_buffers():
        is_own = name.endswith("inv_freq") and "original" not in name
        if not is_own or any(torch.equal(frequencies, other) for other in seen):
            continue
        seen.append(frequencies)
        inv_freq = frequencies.float()
        for start in (0, -2 * len(inv_freq)):
            ways += [Rotary(inv_freq, False, start), Rotary(inv_freq, True, start)]
    return ways


FAMILY = Family(
    name="generic",
    model_types=(),
    load=load,
    alone=True,
    parts=parts,
    positions=positions,
    rotary=rotary,
    has=frozenset({"decoder-only", "rotary"}),
)
