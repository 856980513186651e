"""Load a vision-language model and measure inside it: what a script or a notebook imports.

    from common import GroupMass, Sample, capture, generate, load_image, load_model

    vlm = load_model("checkpoints/tiny-llava")
    picture = load_image("picture.jpg")
    batch = vlm.encode([Sample("0", None, "Is there a red circle in the image?")], [picture])
    with capture(vlm, [mass := GroupMass(batch, 8)]):
        answer = generate(vlm, batch, 8)

diagnostic_tools/check_model.py is the first step for a new model: what these calls see of it.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.types import Record

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from vlmdiag.batch import Batch
    from vlmdiag.families import Family, Parts, Rotary
    from vlmdiag.groups import GROUPS, VISION
    from vlmdiag.model.attention import Block, capture, edit
    from vlmdiag.model.decoding import generate
    from vlmdiag.model.lens import End
    from vlmdiag.model.probes import GroupMass, HiddenNorms, HiddenStates, Probe, VisionRows
    from vlmdiag.pictures.samples import Chat, Pictures, Sample, Turn, load_image
    from vlmdiag.types import ImageFeatures

# Named here, written in vlmdiag/ and imported at first use, so that a command parses its arguments
# before torch is loaded.
NAMED = {
    "Block": "vlmdiag.model.attention",
    "capture": "vlmdiag.model.attention",
    "edit": "vlmdiag.model.attention",
    "generate": "vlmdiag.model.decoding",
    "GroupMass": "vlmdiag.model.probes",
    "HiddenNorms": "vlmdiag.model.probes",
    "HiddenStates": "vlmdiag.model.probes",
    "Probe": "vlmdiag.model.probes",
    "VisionRows": "vlmdiag.model.probes",
    "Sample": "vlmdiag.pictures.samples",
    "Chat": "vlmdiag.pictures.samples",
    "Turn": "vlmdiag.pictures.samples",
    "load_image": "vlmdiag.pictures.samples",
    "GROUPS": "vlmdiag.groups",
    "VISION": "vlmdiag.groups",
}
__all__ = [
    "VLM",
    "UsageError",
    "add_model_arguments",
    "load_from_args",
    "load_model",
    "Block",
    "GroupMass",
    "HiddenNorms",
    "HiddenStates",
    "Probe",
    "Sample",
    "Chat",
    "Turn",
    "VisionRows",
    "capture",
    "edit",
    "generate",
    "load_image",
    "GROUPS",
    "VISION",
]


def __getattr__(name: str) -> object:
    """The names of NAMED, from where they are written."""
    if name not in NAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(NAMED[name]), name)


@dataclass
class VLM:
    """A loaded model and what its family file says of it (vlmdiag.types.VLM)."""

    model: PreTrainedModel
    processor: ProcessorMixin
    family: Family
    path: str
    # system_prompt, prompt_template, image_aspect, conv_mode, quantize_type as given, or as the
    # checkpoint is stored; adapter: the folder that was merged into the weights of base_model, None
    # without one
    options: Record = field(default_factory=dict)

    @cached_property
    def parts(self) -> Parts:
        """The modules of the model that the tools read."""
        return self.family.parts(self.model)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the input embeddings lie, or come to for each pass where they are offloaded."""
        import torch

        embeddings = self.model.get_input_embeddings()
        device = embeddings.weight.device
        if device.type == "meta":
            device = torch.device(embeddings._hf_hook.execution_device)
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the input embeddings."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def vocabulary(self) -> int:
        """How many ids the model can read: rows of its input embeddings."""
        embeddings = self.model.get_input_embeddings()
        # peft's wrappers have no such number
        count: int = getattr(embeddings, "num_embeddings", None) or len(embeddings.weight)
        return count

    @property
    def image_token_id(self) -> int:
        """Id that stands for a vision token in a prompt; UsageError where none does."""
        id = getattr(self.model.config, "image_token_id", None)
        if id is None:
            id = getattr(self.processor, "image_token_id", None)
        if id is None:
            raise UsageError(
                f"{self.path}: {self.model.config.model_type} puts no image tokens into its prompt,"
                " so there are no vision tokens to measure"
            )
        return id

    @cached_property
    def _turn_end(self) -> str | None:
        from vlmdiag.model.prompts import turn_end

        return turn_end(self)  # renders the template several times

    @property
    def answer_ends(self) -> dict[int, list[str]]:
        """The ids that end an answer, and where each comes from: a model's files may disagree, so
        all of them do."""
        ends: dict[int, list[str]] = {}
        if self._turn_end is not None:
            of_turn = self.tokenizer.convert_tokens_to_ids(self._turn_end)
            ends[of_turn] = ["the end of a turn in the prompt's template"]
        if self.tokenizer.eos_token_id is not None:
            ends.setdefault(self.tokenizer.eos_token_id, []).append("the tokenizer's EOS")
        of_config = self.model.generation_config.eos_token_id
        for id in [of_config] if isinstance(of_config, int) else of_config or ():
            ends.setdefault(id, []).append("the generation config")
        rows = self.vocabulary
        return {id: sources for id, sources in ends.items() if 0 <= id < rows}

    @property
    def eos_ids(self) -> set[int]:
        """Ids that end an answer."""
        return set(self.answer_ends)

    @property
    def end_id(self) -> int:
        """The id that a given answer ends with, the first of answer_ends; UsageError where none
        does."""
        ends = self.answer_ends
        if not ends:
            raise UsageError(f"{self.path}: neither its files nor its template end an answer")
        return next(iter(ends))

    def text(self, ids: Sequence[int]) -> str:
        """An answer's text, without the token that ended it: MiniGPT-4's "###" is no special
        token."""
        ended = len(ids) > 0 and ids[-1] in self.eos_ids
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        return text.strip()

    @cached_property
    def _rotary(self) -> dict[int, Rotary] | None:
        from vlmdiag.model.rotary import rotary_of

        return rotary_of(self)

    @property
    def rotary(self) -> dict[int, Rotary]:
        """How positions turn queries and keys of each layer that attends (families.Rotary);
        UsageError for a model without rotary positions."""
        if self._rotary is None:
            raise UsageError(
                f"{self.path}: {self.family.name} has no rotary positions, which this measure needs"
            )
        return self._rotary

    @cached_property
    def logit_end(self) -> End:
        """What comes behind the LM head (vlmdiag.model.lens)."""
        from vlmdiag.model.lens import end_of

        return end_of(self)

    def need(self, *capabilities: str) -> None:
        """UsageError that names a capability this model lacks: one of Family.has, or "every-layer",
        attention in every layer."""
        without = self.parts.without_attention
        if "every-layer" in capabilities and without:
            raise UsageError(
                f"{self.path}: this measure needs attention in every layer, and layers"
                f" {', '.join(map(str, without))} of {len(self.parts.layers)} have none"
                f" ({', '.join(sorted({*without.values()}))})"
            )
        missing = [
            name for name in capabilities if name not in self.family.has and name != "every-layer"
        ]
        if missing:
            raise UsageError(
                f"{self.path}: this measure needs {', '.join(missing)}, which the family"
                f" {self.family.name} lacks"
            )

    def encode(
        self, samples: Sequence[Sample], images: Sequence[Pictures], strip_system: bool = False
    ) -> Batch:
        """The prompts of samples about their pictures as a batch, padded on the left. images: a
        picture each, of a sample with a chat the tuple of its pictures."""
        from vlmdiag.model.encoding import encode

        return encode(self, samples, images, strip_system)

    def vision(self, batch: Batch) -> ImageFeatures:
        """Image features: the tower's output, its pooler_output a list of (P, d) per sample. The
        tower runs once per picture of the batch."""
        from vlmdiag.model.vision import image_features

        return image_features(self, batch)


DTYPES = ("float32", "float16", "bfloat16")


def add_model_arguments(parser: argparse.ArgumentParser, path: bool = True) -> None:
    """The flags every script that loads a model has; without --model_path where path is False."""
    if path:
        parser.add_argument("--model_path", required=True, help="folder or hub id of the model")
    parser.add_argument(
        "--device",
        default=None,
        help="cuda, cuda:1, cpu; default: a GPU where there is one",
        type=cli.device,
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="auto: float32 on a CPU, the checkpoint's on a GPU",
    )
    parser.add_argument(
        "--device_map",
        type=cli.device_map,
        default=None,
        help="'auto' spreads the model over several GPUs",
    )
    parser.add_argument(
        "--quantize_type",
        choices=["fp16", "4bit", "int8"],
        help="4bit, int8: linear layers of the decoder quantised by bitsandbytes; fp16: --dtype"
        " float16",
    )
    parser.add_argument(
        "--base_model",
        default=None,
        help="base of an adapter, where its adapter_config.json does not name it",
    )
    parser.add_argument(
        "--vision_tower_path", default=None, help="vision tower for checkpoints that do not hold it"
    )
    parser.add_argument(
        "--conv_mode",
        default=None,
        help="conversation template for LLaVA checkpoints whose config names none",
    )
    parser.add_argument(
        "--system_prompt", default=None, help="system prompt in place of the model's own"
    )
    parser.add_argument(
        "--prompt_template",
        default=None,
        help="whole prompt, with the fields {system} {image} {question}",
    )
    parser.add_argument(
        "--image_aspect",
        default="processor",
        choices=["processor", "pad"],
        help="pad: pad pictures to a square first, as the LLaVA papers do",
    )
    parser.add_argument(
        "--family", default=None, help="Python file with a FAMILY of your own (models/README.md)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let the checkpoint's own code run"
    )
    parser.add_argument(
        "--no_self_check", action="store_true", help="skip the checks after loading"
    )


def load_from_args(
    args: argparse.Namespace, path: str | None = None, decoder_layers: int | None = None
) -> VLM:
    """load_model with the flags of add_model_arguments."""
    return load_model(
        path or args.model_path,
        device=args.device,
        dtype=args.dtype,
        device_map=args.device_map,
        quantize_type=args.quantize_type,
        base_model=args.base_model,
        vision_tower_path=args.vision_tower_path,
        conv_mode=args.conv_mode,
        system_prompt=args.system_prompt,
        prompt_template=args.prompt_template,
        image_aspect=args.image_aspect,
        family=args.family,
        trust_remote_code=args.trust_remote_code,
        self_check=not args.no_self_check,
        decoder_layers=decoder_layers,
    )


def load_model(
    path: str | Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    device_map: str | Record | None = None,
    quantize_type: str | None = None,
    vision_tower_path: str | None = None,
    conv_mode: str | None = None,
    system_prompt: str | None = None,
    prompt_template: str | None = None,
    image_aspect: str = "processor",
    family: str | Path | None = None,
    trust_remote_code: bool = False,
    self_check: bool = True,
    decoder_layers: int | None = None,
    base_model: str | Path | None = None,
    model: PreTrainedModel | None = None,
    processor: ProcessorMixin | None = None,
) -> VLM:
    """Load a VLM from a folder or hub id, or take `model` and `processor` that are in memory.

    A folder with an adapter of peft (adapter_config.json) is that adapter merged into the weights
    beside it, else into base_model, else into the base that it names itself. family: a file that
    defines FAMILY, for a type of your own. decoder_layers: keep only so many of the decoder's first
    layers, 0 for what tower and connector compute by themselves; there is no self-check then.
    A model in memory may be peft's, its adapters at work; it stays on its device, in its dtype, and
    is in eval mode then. UsageError where the type is unknown, files or parameters are missing,
    have no place or cannot be read, or the self-check fails.
    """
    from vlmdiag.model import errors, loading
    from vlmdiag.model.selfcheck import check

    options: Record = {
        "system_prompt": system_prompt,
        "prompt_template": prompt_template,
        "image_aspect": image_aspect,
        "conv_mode": conv_mode,
        "quantize_type": quantize_type,
        "vision_tower_path": vision_tower_path,
    }
    if model is not None:
        path = path or loading.name_in_memory(model)
        of_files = (device, device_map, quantize_type, vision_tower_path, conv_mode, base_model)
        if any(of_files) or dtype != "auto" or trust_remote_code or decoder_layers is not None:
            raise UsageError(f"{path}: a model in memory is taken as it is, in its dtype and place")
    elif path is None or processor is not None:
        raise UsageError("load_model() takes a path, or model= and processor=")
    with errors.as_usage_error(path):
        if model is not None:
            model, processor, described = loading.in_memory(model, processor, path, family)
            vlm = VLM(model, processor, described, str(path), options | {"in_memory": True})
        else:
            vlm = _from_files(
                str(path),
                options,
                device=device,
                dtype=dtype,
                device_map=device_map,
                family=family,
                trust_remote_code=trust_remote_code,
                decoder_layers=decoder_layers,
                base_model=base_model,
            )
        loading.prepare(vlm)
    with errors.as_usage_error(path, "the checks after loading failed"):
        notes = [loading.check_prompt(vlm), loading.left_out_of_decoding(vlm)]
        if self_check and decoder_layers is None:
            notes.append(check(vlm))
    for note in filter(None, notes):
        print(f"{path}: {note}")
    return vlm


def _from_files(
    path: str,
    options: Record,
    *,
    device: str | None,
    dtype: str,
    device_map: str | Record | None,
    family: str | Path | None,
    trust_remote_code: bool,
    decoder_layers: int | None,
    base_model: str | Path | None,
) -> VLM:
    """The model of a folder or hub id, an adapter merged into it."""
    from vlmdiag.families.folders import refuse_no_folder
    from vlmdiag.model import configs, loading, precision
    from vlmdiag.model.adapters import sources_of, with_own_processor

    quantize_type = options["quantize_type"]
    sources = sources_of(path, base_model)
    config, described, adapted = configs.config_of(sources, trust_remote_code, family)
    if described.read_config is None:  # other layouts may have their tower elsewhere
        configs.refuse_larger_than(sources.base, config)
        if options["vision_tower_path"] is not None:
            refuse_no_folder(options["vision_tower_path"])
            print(f"{path}: its vision tower is in the checkpoint, --vision_tower_path is not read")
    if decoder_layers is not None:
        configs.shorten_decoder(config, decoder_layers)
    place = precision.device_of(device)
    chosen = precision.dtype_of(dtype, quantize_type, place, config)
    stored = precision.stored_quantization(path, config, quantize_type, chosen)
    quantized = precision.quantization(quantize_type, chosen)
    if (stored or quantized) and device_map is None:
        device_map = {"": place}
    with with_own_processor(sources) as folder:
        model, processor = loading.load_family(
            described,
            folder,
            config,
            dtype=chosen,
            device_map=device_map,
            vision_tower_path=options["vision_tower_path"],
            conv_mode=options["conv_mode"],
            trust_remote_code=trust_remote_code,
            quantization_config=quantized,
            trained=sources.trained,
        )
    model = model.requires_grad_(False)
    if device_map is None:
        model = model.to(place)
    more = {
        "quantize_type": stored or quantize_type,
        "adapter": sources.adapter and str(sources.adapter),
        "base_model": sources.adapter and sources.base,
    }
    vlm = VLM(model, processor, described, path, options | more)
    loading.apply_adapter(vlm, sources, adapted)
    if stored or quantized:
        precision.check_quantized(vlm, stored is not None, chosen)
    return vlm
