"""What the tools see of a model: its family and what that opens, its prompt token by token, where
an answer ends, how pictures are prepared: the values of the report of
diagnostic_tools/check_model.py."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageDraw
from PIL.Image import registered_extensions
from transformers import PreTrainedConfig, PreTrainedModel

from vlmdiag import CHECKOUT
from vlmdiag.cli import UsageError
from vlmdiag.families import generic, module_of, read_folder
from vlmdiag.families.assembled import Expanding
from vlmdiag.families.files import reason
from vlmdiag.groups import GROUPS
from vlmdiag.model import memory
from vlmdiag.model.lens import named_end
from vlmdiag.model.prompts import chat_for, guessed_prompt, prompt_for, prompt_source
from vlmdiag.pictures.chats import record_of
from vlmdiag.pictures.mosaic import side_by_side
from vlmdiag.runs.disk import write_bytes
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmdiag.batch import Batch
    from vlmdiag.families import Family
    from vlmdiag.families.contract import Inputs
    from vlmdiag.model.outline import Outline
    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.pictures.samples import Pictures, Sample
    from vlmdiag.types import VLM

# What a family can have, and what that opens beside the scripts below.
CAPABILITIES = {
    "decoder-only": "one decoder reads prompt and answer",
    "every-layer": "each layer of the decoder attends",
    "causal": "prompts about one picture share its keys and values: the same numbers, sooner",
    "rotary": "the RoPE probe",
    "grid": "vision tokens have their place in the picture",
    "square-pad": "--image_aspect pad",
}
# Commands that load a model -> the capabilities without which they exit with 2.
# tests/test_check_model.py compares this table with what they ask of a model.
COMMANDS = {
    "diagnostic_tools/vlm_token_norms.py": (),
    "scripts/save_post_adapter_acts.py": (),
    "diagnostic_tools/demo_meta.py": ("decoder-only", "every-layer"),
    "diagnostic_tools/evaluate_relevancy.py": ("decoder-only", "every-layer"),
    "diagnostic_tools/hallucination_warning.py": ("decoder-only", "every-layer"),
    "diagnostic_tools/relevancy_maps.py": ("decoder-only", "every-layer"),
    "scripts/logit_lens/create_logit_lens.py": ("decoder-only",),
    "swap_analysis/spatial_tunnel.py": ("decoder-only",),
    "swap_analysis/swap_analysis.py": ("decoder-only",),
    "visualize/run_volcano_with_image_attention.py": ("decoder-only",),
    "diagnostic_tools/psi.py": ("decoder-only", "grid"),
    "diagnostic_tools/viz_attention_image.py": ("decoder-only", "grid"),
    "scripts/ablation_experiment.py": ("decoder-only", "grid"),
    "scripts/ablation_experiment_curate.py": ("decoder-only", "grid"),
    "scripts/attention_experiment_curate.py": ("decoder-only", "every-layer", "grid"),
    "scripts/logit_lens/lens_accuracy.py": ("decoder-only", "grid"),
    "diagnostic_tools/run_coco_diagnostics.py": ("decoder-only", "rotary"),
}
# A flag with which a command does without a capability.
WITHOUT = {("diagnostic_tools/run_coco_diagnostics.py", "rotary"): "--no_rope"}
# What an image processor may say of what it does to a picture.
PREPARATION = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_pad",
    "min_pixels",
    "max_pixels",
    "patch_size",
    "merge_size",
    "max_crops",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
# what a processor, a template or a grid that does not fit raises
_MISFITS = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError)
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers


def family_of(family: Family, path: str, family_file: str | None = None) -> Record:
    """{name, file, because, model_type, architectures}: the family and why it was chosen. path: a
    folder or hub id; family_file: as --family names it."""
    raw: Fields = read_raw(path) or {}
    kind = raw.get("model_type")
    architectures = list(raw.get("architectures") or ())
    of_family = sorted(set(architectures) & set(family.architectures))
    if family_file is not None:
        because = f"--family {family_file} names it"
    elif family.name == "generic":
        because = f"no family file knows model_type {kind!r}: transformers' conventions"
    elif not (Path(path) / "config.json").exists() and Path(path).is_dir():
        because = "it reads this folder, which has no config.json"
    elif family.recognises is not None:
        because = "it recognises the fields of the config"
    elif kind in family.model_types:
        because = f"the config's model_type is {kind!r}"
    else:
        because = f"the config's architectures name {', '.join(of_family)}"
    return {
        "name": family.name,
        "file": file_of(family),
        "because": because,
        "model_type": kind,
        "architectures": architectures,
    }


def end_left_out(vlm: VLM) -> str | None:
    """What the text model's config does to its logits and the model's class leaves out, as a line;
    None where nothing is left out. Costs one pass over a noise picture."""
    if "decoder-only" not in vlm.family.has:
        return None
    scale, softcap = named_end(vlm)
    left_out = []
    if scale != vlm.logit_end.scale:
        left_out.append(f"scale {scale:g}")
    if softcap != vlm.logit_end.softcap:
        left_out.append(f"softcap {softcap:g}")
    if not left_out:
        return None
    return (
        f"{type(vlm.model).__name__} leaves out the config's {' and '.join(left_out)}: greedy"
        " answers are the same, probabilities are not those of training"
    )


def read_raw(path: str) -> Fields | None:
    """config.json of a folder or hub id, or what a family reads of a folder without one; None where
    there is neither."""
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        return read_folder(path)
    return PreTrainedConfig.get_config_dict(path)[0]


def file_of(family: Family) -> str:
    """The file that describes a family, from the repository's root where it lies in there."""
    file = family.file or CHECKOUT / "vlmdiag" / "families" / f"{module_of(family)}.py"
    return str(file.relative_to(CHECKOUT) if file.is_relative_to(CHECKOUT) else file)


def capabilities_of(family: Family, model: PreTrainedModel | None) -> Record:
    """{has, lacks, commands}: commands {command: {"needs", "lacks", "without"}}, without: the flag
    with which it runs all the same, or None. model: its config says which layers attend."""
    has = family.has | {"every-layer"}
    if model is not None:
        decoder = model.config.get_text_config()
        depth = getattr(decoder, "num_hidden_layers", 0)
        has -= {"every-layer"} if generic.without_attention(decoder, depth) else set()
    commands = {}
    for command, needs in COMMANDS.items():
        lacking = [name for name in needs if name not in has]
        flags = [WITHOUT[command, name] for name in lacking if (command, name) in WITHOUT]
        runs = len(flags) == len(lacking) > 0
        commands[command] = {
            "needs": list(needs),
            "lacks": lacking,
            "without": " ".join(flags) if runs else None,
        }
    return {"has": sorted(has), "lacks": sorted(set(CAPABILITIES) - has), "commands": commands}


def prompt_of(vlm: VLM, batch: Batch) -> Record:
    """The prompt of a batch of one: {source, guess, text, length, image_tokens, system,
    system_from, template_system, ids, tokens, groups, spans}, of a chat {numbers, turns, chat} too;
    length and spans in tokens, guess: of guessed_prompt()."""
    ids = batch.input_ids[0].tolist()
    groups = [GROUPS[code] for code in batch.groups[0].tolist()]
    question, chat = batch.samples[0].question, batch.samples[0].chat
    rendered = prompt_for(vlm, question) if chat is None else chat_for(vlm, chat)
    own = template_system(vlm, question)
    system = rendered.text[slice(*rendered.system)] if rendered.system else ""
    system_from = ""
    if chat is not None and chat.system is not None:
        system_from = "the messages"
    elif vlm.options.get("system_prompt") is not None:
        system_from = "--system_prompt"
    elif system and system != own:
        system_from = "the family's default"
    elif system:
        system_from = "the model's own template"
    return {
        "source": prompt_source(vlm),
        "guess": guessed_prompt(vlm),
        "text": batch.prompts[0],
        "length": len(ids),
        "image_tokens": groups.count("vision"),
        "system": system,
        "system_from": system_from,
        "template_system": own,
        "ids": ids,
        "tokens": vlm.tokenizer.convert_ids_to_tokens(ids),
        "groups": groups,
        "spans": batch.spans(0),
        **_of_chat(batch),
    }


def _of_chat(batch: Batch) -> Record:
    """{numbers, turns, pictures, chat}: of each token its picture and its turn, and where they are,
    see Batch; {} where the prompt is one question about one picture."""
    if batch.numbers is None or batch.turns is None:
        return {}
    of_tokens = {"numbers": batch.numbers[0].tolist(), "turns": batch.turns[0].tolist()}
    return of_tokens | {"chat": record_of(batch.samples[0]) | batch.parts(0)}


def template_system(vlm: VLM, question: str) -> str:
    """The system prompt that the model's own template writes by itself, "" where it writes none."""
    plain_vlm = copy.copy(vlm)
    plain_vlm.options = vlm.options | {"system_prompt": None}
    plain_vlm.family = replace(vlm.family, default_system=None)
    try:
        rendered = prompt_for(plain_vlm, question)
    except (UsageError, ValueError):  # no template of its own
        return ""
    return rendered.text[slice(*rendered.system)] if rendered.system else ""


def endings_of(vlm: VLM) -> list[Record]:
    """[{id, token, from}] of the ids that end an answer."""
    return [
        {"id": id, "token": vlm.tokenizer.convert_ids_to_tokens(id), "from": sources}
        for id, sources in sorted(vlm.answer_ends.items())
    ]


def picture_alone(vlm: VLM, image: Image) -> Inputs:
    """The image inputs of a picture without a prompt, for want of a tokenizer. UsageError where the
    image processor does not take it."""
    try:
        if isinstance(vlm.processor, Expanding):
            return vlm.processor.picture(image)[2]
        return dict(vlm.processor.image_processor(images=image, return_tensors="pt"))
    except _MISFITS as error:
        raise UsageError(
            f"{vlm.path}: its image processor does not take a picture ({reason(error)})"
        ) from error


def pictures_of(vlm: VLM, inputs: Inputs) -> Record:
    """{processor, settings, inputs}: what is done to a picture, and the shapes that come out."""
    processor = getattr(vlm.processor, "image_processor", None)
    settings: Record = {}
    for name in PREPARATION:
        value = getattr(processor, name, None)
        if value is not None:
            settings[name] = sizes_of(value)
    if isinstance(settings.get("resample"), int):
        settings["resample"] = RESAMPLING[settings["resample"]]
    shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
    return {"processor": type(processor).__name__, "settings": settings, "inputs": shapes}


def sizes_of(value: object) -> object:
    """A size as {"height": ..., "width": ...} of what is set; anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: length for name, length in value.items() if length is not None}
    return value


def grid_of(vlm: VLM, inputs: Sequence[Inputs], images: Sequence[Image], out: str) -> Record | None:
    """{tokens, boxed, shape, size, file} of the grid, which is drawn to `out`: vision tokens, those
    with a box, (rows, columns) or None, width and height of the picture; of several pictures shape
    and size are lists, and they are drawn side by side. None where it is unknown. UsageError where
    it cannot be made."""
    if vlm.family.grid is None:
        return None
    try:
        grids = [
            vlm.family.grid(vlm, image.size, of_image)
            for image, of_image in zip(images, inputs, strict=True)
        ]
    except _MISFITS as error:
        raise UsageError(f"{vlm.path}: its grid cannot be made ({reason(error)})") from error
    known = [grid for grid in grids if grid is not None]
    if len(known) < len(grids):
        return None
    one = len(known) == 1
    shown, grid = (images[0], known[0]) if one else side_by_side(images, known)
    write_grid(out, grid, shown)
    return {
        "tokens": len(grid.boxes),
        "boxed": sum(int(grid.has_box.sum()) for grid in known),
        "shape": known[0].shape if one else [grid.shape for grid in known],
        "size": known[0].size if one else [grid.size for grid in known],
        "file": out,
    }


def write_grid(path: str | Path, grid: PatchGrid, image: Image) -> None:
    """The picture with the box of each vision token, in the format of the path's ending, else PNG.
    UsageError where it cannot be written."""
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    for x0, y0, x1, y1 in grid.boxes[grid.has_box].tolist():
        draw.rectangle([x0, y0, x1, y1], outline=(255, 0, 0))
    content = io.BytesIO()
    drawn.save(content, registered_extensions().get(Path(path).suffix.lower(), "PNG"))
    write_bytes(path, content.getvalue())


def weights_of(outline: Outline) -> Record:
    """{parameters, names, stored, index_bytes, not_compared, dtype, bytes, missing, unexpected,
    misshapen}: what the model has, what its files say, and names of what does not fit. bytes: of
    the model in the config's dtype; not_compared: why not, "" where they were."""
    model = outline.model
    names = list(model.state_dict()) if model is not None else []
    dtype = outline.dtype
    return {
        "parameters": outline.parameters,
        "names": len(names),
        "stored": outline.stored,
        "index_bytes": outline.index_bytes,
        "not_compared": outline.not_compared,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": outline.parameters * dtype.itemsize,
        "missing": outline.missing,
        "unexpected": outline.unexpected,
        "misshapen": outline.misshapen,
    }


def memory_of(outline: Outline, prompt: Fields | None) -> Record:
    """{weights, measures, prompt_tokens, image_tokens}: bytes, see memory.py; measures only where
    the length of the prompt is known. UsageError where the family does not find the decoder."""
    try:
        parts = outline.family.parts(outline.model)
    except _MISFITS as error:
        raise UsageError(f"{outline.path}: its parts are not found ({reason(error)})") from error
    weights = memory.weights_of(outline.parameters, parts.decoder)
    record: Record = {"weights": weights, "measures": []}
    if prompt is not None:
        length, vision = prompt["length"], prompt["image_tokens"]
        sizes = memory.sizes_of(parts, length, vision)
        record["measures"] = memory.measures_of(weights, sizes)
        record |= {"prompt_tokens": length, "image_tokens": vision}
    return record


def encoded(vlm: VLM, sample: Sample, image: Pictures) -> Batch:
    """The prompt of one sample; UsageError where prompt, processor and grid do not fit together."""
    try:
        return vlm.encode([sample], [image])
    except _MISFITS as error:
        raise UsageError(f"{vlm.path}: the prompt cannot be made ({reason(error)})") from error
