"""Any model that follows the conventions of transformers 5: get_decoder(), get_image_features(),
image_token_id, a processor with a chat template.

The grid of its vision tokens cannot be known from these conventions, so scripts that need a grid
exit with an error. What several family files share is written here: loading, modules, boxes of
tiles, positions.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from vlmdiag.cli import UsageError
from vlmdiag.families import Family, Parts, Rotary
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


def load_processor(path: str, options: LoadOptions) -> ProcessorMixin:
    """The processor of a folder or hub id, or the one in memory."""
    in_memory = options.get("in_memory")
    if in_memory is not None:
        return in_memory[1]
    trusted = options.get("trust_remote_code", False)
    return AutoProcessor.from_pretrained(path, trust_remote_code=trusted, **PIL_BACKEND)


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


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """Model and processor by transformers' Auto classes, or by the checkpoint's own code."""
    trusted = options.get("trust_remote_code", False)
    model_class = auto_class(path, config, trusted)
    more = {"trust_remote_code": trusted} if model_class is AutoModelForImageTextToText else {}
    model = load_model_class(model_class, path, config, options, **more)
    return model, load_processor(path, options)


def image_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A transformers processor class without its video part, which would need torchvision."""

    def get_attributes(cls: type[ProcessorMixin]) -> list[str]:
        return ["image_processor", "tokenizer"]

    methods = {"get_attributes": classmethod(get_attributes)}
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
        processor = image_only(processor_class)
        return model, processor.from_pretrained(path, **PIL_BACKEND, **of_processor)

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


def decoder_parts(
    decoder: PreTrainedModel,
    lm_head: nn.Linear,
    tower: nn.Module | None,
    connector: nn.Module | None,
    vision_blocks: Sequence[nn.Module] = (),
    qformer: QFormer | None = None,
) -> Parts:
    """Parts of a model whose decoder has its blocks in `layers` and its final norm in `norm`."""
    layers = list(decoder.layers)
    return Parts(decoder, layers, decoder.norm, lm_head, tower, connector, qformer, vision_blocks)


CONNECTORS = ("multi_modal_projector", "connector", "mm_projector", "aligner")


def parts(model: PreTrainedModel) -> Parts:
    """Decoder, its layers and final norm, LM head, tower and connector by transformers' own
    accessors; AttributeError where one is missing."""
    tower = None
    with contextlib.suppress(AttributeError, ValueError, TypeError):
        tower = model.get_encoder(modality="image")
    base = getattr(model, "model", model)
    connectors = [getattr(base, name) for name in CONNECTORS if hasattr(base, name)]
    connector = connectors[0] if connectors else None
    return decoder_parts(model.get_decoder(), model.get_output_embeddings(), tower, connector)


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


# --- boxes and patches ----------------------------------------------------------------------------


def patch_sides(inputs: Inputs, patch: int) -> tuple[int, int]:
    """(rows, columns) of patches of `patch` pixels a side in a preprocessed picture."""
    height, width = inputs["pixel_values"].shape[-2:]
    return height // patch, width // patch


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
    base = getattr(vlm.model, "model", vlm.model)
    if hasattr(base, "get_rope_index"):
        types = (input_ids == vlm.image_token_id).int()
        taken = inspect.signature(base.get_rope_index).parameters
        grids = {
            name: tensor.to(input_ids.device)
            for name, tensor in image_inputs.items()
            if name in taken
        }
        ids, _ = base.get_rope_index(
            input_ids, mm_token_type_ids=types, attention_mask=attention_mask, **grids
        )
        return ids, ids[:, :, -1].amax(0) + 1
    ids = attention_mask.cumsum(-1) - 1
    return ids.clamp(min=0), ids[:, -1] + 1


def rotary(vlm: VLM) -> Rotary | None:
    """Half-split rotary positions with one set of frequencies for all layers; None where the
    decoder has none."""
    embedding = getattr(vlm.parts.decoder, "rotary_emb", None)
    frequencies = getattr(embedding, "inv_freq", None)
    return None if frequencies is None else Rotary(frequencies.float())


FAMILY = Family(
    name="generic",
    model_types=(),
    load=load,
    parts=parts,
    positions=positions,
    rotary=rotary,
    has=frozenset({"decoder-only", "rotary"}),
)
