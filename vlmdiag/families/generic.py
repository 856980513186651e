"""Any model that follows the conventions of transformers 5: get_decoder(), get_image_features(),
image_token_id, a processor with a chat template.

The grid of its vision tokens cannot be known from these conventions: what needs one says so. Parts
that a family file shares are defined here.
"""

import contextlib
import inspect
from dataclasses import replace

import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmdiag.families import Family, Parts, Rotary, checked

PIL_BACKEND = {
    "backend": "pil"
}  # image processors on PIL, also where torchvision is installed, so that numbers agree between machines


def load(
    path, config, dtype, device_map=None, trust_remote_code=False, quantization_config=None, **_
):
    options = {
        "dtype": dtype,
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
        "quantization_config": quantization_config,
    }
    model = checked(
        AutoModelForImageTextToText.from_pretrained(
            path, config=config, output_loading_info=True, **options
        )
    )
    return model, load_processor(path, trust_remote_code)


def load_processor(path, trust_remote_code=False):
    return AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code, **PIL_BACKEND)


def image_only(kind):
    """A transformers processor class without its video part, which would need torchvision."""
    return type(
        kind.__name__,
        (kind,),
        {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])},
    )


def loader(model_class, processor_class):
    """Family.load for a class of transformers with an image-only processor."""

    def load(
        path, config, dtype, device_map=None, trust_remote_code=False, quantization_config=None, **_
    ):
        options = {
            "dtype": dtype,
            "device_map": device_map,
            "quantization_config": quantization_config,
        }
        model = checked(
            model_class.from_pretrained(path, config=config, output_loading_info=True, **options)
        )
        return model, image_only(processor_class).from_pretrained(path, **PIL_BACKEND)

    return load


def parts(model):
    """Decoder, its layers and final norm, LM head, tower and connector by transformers' own
    accessors; AttributeError where one is missing."""
    decoder = model.get_decoder()
    tower = None
    with contextlib.suppress(AttributeError, ValueError, TypeError):
        tower = model.get_encoder(modality="image")
    base = getattr(model, "model", model)
    connector = next(
        (
            getattr(base, name)
            for name in ("multi_modal_projector", "connector", "mm_projector", "aligner")
            if hasattr(base, name)
        ),
        None,
    )
    return Parts(
        decoder, list(decoder.layers), decoder.norm, model.get_output_embeddings(), tower, connector
    )


def parts_with_tower(model):
    """parts() with the blocks of the tower, for families whose vision tokens are made of its
    positions as Family.sources says."""
    found = parts(model)
    for name in (
        "encoder.layers",
        "encoder.layer",
        "vision_model.encoder.layers",
        "layers",
        "blocks",
    ):
        with contextlib.suppress(AttributeError):
            return replace(found, vision_blocks=list(found.tower.get_submodule(name)))
    raise AttributeError(f"{type(found.tower).__name__} has its blocks at none of the known places")


def merged(rows, columns, factor, tiles=1, cls=0):
    """Family.sources of tiles of rows x columns vision tokens, each made of factor x factor
    patches: (tiles * rows * columns, factor ** 2). cls: positions of the tower before a tile's
    patches."""
    patch = (
        np.arange(rows * columns * factor**2)
        .reshape(rows, factor, columns, factor)
        .transpose(0, 2, 1, 3)
        .reshape(rows * columns, factor**2)
    )
    return np.concatenate([tile * (cls + patch.size) + cls + patch for tile in range(tiles)])


def positions(vlm, input_ids, attention_mask, image_inputs):
    """Positions as the model takes them and the next one (B,): 0, 1, 2, ... of each row without its
    padding, (B, T); or, for models with positions in time, height and width, (3, B, T) by their own
    get_rope_index. These would silently fall back to one dimension if they were left to themselves.
    """
    base = getattr(vlm.model, "model", vlm.model)
    if hasattr(base, "get_rope_index"):
        types = (input_ids == vlm.image_token_id).int()
        wanted = inspect.signature(base.get_rope_index).parameters
        grids = {
            key: value.to(input_ids.device) for key, value in image_inputs.items() if key in wanted
        }
        ids, _ = base.get_rope_index(
            input_ids, mm_token_type_ids=types, attention_mask=attention_mask, **grids
        )
        return ids, ids[:, :, -1].amax(0) + 1
    ids = attention_mask.cumsum(-1) - 1
    return ids.clamp(min=0), ids[:, -1] + 1


def rotary(vlm):
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
