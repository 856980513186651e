"""Load a vision-language model and encode prompts, the same way for every script.

    python common.py checkpoints/tiny-llava PICTURE "Is there a red circle in the image?"

prints every token of the prompt with its position and group and draws the grid of vision tokens on the picture: the first step for a new model."""

import hashlib
import importlib.util
import inspect
import logging
import os
import pickle
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import logging as hf_logging

import cli
from cli import UsageError
from groups import GROUPS, PAD
from models import find_family, generic, known_types, read_folder
from rundirs import slug
from selfcheck import check

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_QUESTION, _SYSTEM = "\ue010\ue011", "\ue012\ue013"  # stand-ins of private use while a template is rendered


@dataclass
class VLM:
    """A loaded model and what its family file says of it."""

    model: object
    processor: object
    family: object
    path: str
    options: dict = field(default_factory=dict)  # system_prompt, prompt_template, image_aspect, quantize_type as given

    @cached_property
    def parts(self):
        return self.family.parts(self.model)

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def device(self):
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self):
        return self.model.get_input_embeddings().weight.dtype

    @property
    def image_token_id(self):
        return self.model.config.image_token_id

    @property
    def eos_ids(self):
        """Ids that end an answer."""
        ids = self.model.generation_config.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return {ids} if isinstance(ids, int) else set(ids or ())

    def text(self, ids):
        """An answer's text, without the token that ended it: MiniGPT-4's "###" is no special token."""
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids, skip_special_tokens=True).strip()

    @property
    def rotary(self):
        """How positions turn queries and keys (models.Rotary); UsageError for a model without rotary positions."""
        rotary = self.family.rotary(self) if self.family.rotary else None
        if rotary is None:
            raise UsageError(f"{self.path}: {self.family.name} has no rotary positions, which this measure needs")
        return rotary

    def need(self, *capabilities):
        """UsageError that names a capability this family lacks."""
        missing = [c for c in capabilities if c not in self.family.has]
        if missing:
            raise UsageError(f"{self.path}: this measure needs {', '.join(missing)}, which the family {self.family.name} lacks")

    def encode(self, samples, images, **options):
        return encode(self, samples, images, **options)

    def vision(self, batch):
        """Image features, once per picture of the batch: the tower's output, its pooler_output a list of (P, d) per sample."""
        first = list(dict.fromkeys(batch.pictures))
        rows = [batch.image_rows[batch.pictures.index(picture)] for picture in first]
        inputs = {key: value.to(self.device) for key, value in joined(rows).items()}
        wanted = inspect.signature(self.model.get_image_features).parameters
        accepts = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
        inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in inputs.items() if accepts or k in wanted}
        features = self.model.get_image_features(**inputs, return_dict=True)
        features.was_tensor = torch.is_tensor(features.pooler_output)  # some families take it back as one tensor, see capturing.prefill
        pooled = torch.cat([part.flatten(0, -2) for part in features.pooler_output])
        counts = [int((batch.groups[batch.pictures.index(picture)] == GROUPS.index("vision")).sum()) for picture in first]
        if sum(counts) != len(pooled):
            raise ValueError(f"the prompts have {sum(counts)} vision tokens, get_image_features of {self.family.name} gives {len(pooled)}")
        pooled = dict(zip(first, pooled.split(counts), strict=True))
        features.pooler_output = [pooled[picture] for picture in batch.pictures]
        if self.family.deepstack:
            deep = [dict(zip(first, torch.cat(list(part)).split(counts), strict=True)) for part in features.deepstack_features]
            features.deepstack_features = [[part[picture] for picture in batch.pictures] for part in deep]
        return features


# --- loading ----------------------------------------------------------------------------------------------------------------


def add_model_arguments(parser, path=True):
    """The flags every script that loads a model has."""
    if path:
        parser.add_argument("--model_path", required=True, help="folder or hub id of the model")
    parser.add_argument("--device", default=None, help="cuda, cuda:1, cpu; default: a GPU where there is one")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: float32 on a CPU, the checkpoint's on a GPU")
    parser.add_argument("--device_map", default=None, help="'auto' spreads the model over several GPUs")
    parser.add_argument(
        "--quantize_type", choices=["fp16", "4bit", "int8"], help="4bit, int8: linear layers of the decoder quantised by bitsandbytes; fp16: --dtype float16"
    )
    parser.add_argument("--vision_tower_path", default=None, help="vision tower for checkpoints that do not hold it")
    parser.add_argument("--conv_mode", default=None, help="conversation template for LLaVA checkpoints whose config names none")
    parser.add_argument("--system_prompt", default=None, help="system prompt in place of the model's own")
    parser.add_argument("--prompt_template", default=None, help="whole prompt, with the fields {system} {image} {question}")
    parser.add_argument("--image_aspect", default="processor", choices=["processor", "pad"], help="pad: pad pictures to a square first, as the LLaVA papers do")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the checkpoint's own code run")
    parser.add_argument("--no_self_check", action="store_true", help="skip the checks after loading")


def load_from_args(args, path=None):
    """load_model with the flags of add_model_arguments."""
    names = (
        "device",
        "dtype",
        "device_map",
        "quantize_type",
        "vision_tower_path",
        "conv_mode",
        "system_prompt",
        "prompt_template",
        "image_aspect",
        "trust_remote_code",
    )
    return load_model(path or args.model_path, self_check=not args.no_self_check, **{name: getattr(args, name) for name in names})


def load_model(
    path, device=None, dtype="auto", device_map=None, quantize_type=None, vision_tower_path=None, conv_mode=None, system_prompt=None, prompt_template=None,
    image_aspect="processor", trust_remote_code=False, self_check=True,
):  # fmt: skip
    """Load a VLM from a folder or hub id. UsageError where the type is unknown, files or parameters are missing, or the self-check fails."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    config, family = read_config(path, trust_remote_code)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no GPU is visible here; use --device cpu")
    dtype = (
        torch.float16
        if quantize_type == "fp16"
        else DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else getattr(config, "dtype", None) or torch.float16)
    )
    quantized = quantization(quantize_type, dtype)
    if quantized is not None and device_map is None:
        device_map = {"": device}
    try:
        model, processor = family.load(
            str(path), config, dtype=dtype, device_map=device_map, vision_tower_path=vision_tower_path, conv_mode=conv_mode,
            trust_remote_code=trust_remote_code, quantization_config=quantized,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        known = (
            f"; known types: {', '.join(known_types())}; for another one write models/<family>.py (README, 'your own model')"
            if family.name == "generic"
            else ""
        )
        raise UsageError(f"{path} (type {config.model_type!r}) cannot be loaded: {' '.join(str(error).split())[:400]}{known}") from error
    model = model.eval().requires_grad_(False)
    if device_map is None:
        model = model.to(device)
    options = {"system_prompt": system_prompt, "prompt_template": prompt_template, "image_aspect": image_aspect, "conv_mode": conv_mode}
    options |= {"quantize_type": quantize_type}
    vlm = VLM(model, processor, family, str(path), options)
    if quantized is not None:
        check_quantized(vlm)
    if image_aspect == "pad":
        if not hasattr(processor.image_processor, "do_pad") or "square-pad" not in family.has:
            raise UsageError(f"{path}: --image_aspect pad works for LLaVA-type image processors only")
        processor.image_processor.do_pad = True
    if self_check:
        if note := check(vlm):
            print(f"{path}: {note}")
    return vlm


def quantization(kind, dtype):
    """transformers' quantization config for --quantize_type, None for fp16 and None; products of 4-bit weights are made in dtype. Linear layers of the decoder
    are quantised and nothing else: tower, connector and LM head stay as they are. UsageError without bitsandbytes."""
    if kind not in ("4bit", "int8"):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"--quantize_type {kind} needs bitsandbytes (pip install bitsandbytes); --dtype float16 does without")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells at every int8 product that float32 becomes float16
    kept = [r"(?!.*\b(language_model|text_model)\.).*", "lm_head"]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept)


def check_quantized(vlm):
    """UsageError where no linear layer of the decoder was quantised."""
    of = lambda model: [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    if not of(vlm.parts.decoder):
        raise UsageError(f"{vlm.path}: --quantize_type 4bit and int8 find no linear layer in {type(vlm.parts.decoder).__name__}; --dtype float16 does without")
    for layer in of(vlm.model):
        layer.support_avx512bf16_for_cpu = False  # that kernel has no gradient, and packs the weights for good at the first pass


def read_config(path, trust_remote_code=False):
    """A model's config and its family; UsageError in one line where there is none."""
    raw = None
    if os.path.isdir(path) and not (Path(path) / "config.json").exists():
        try:
            raw = read_folder(path)
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error
        if raw is None:
            raise UsageError(f"{path}: no config.json in this folder, so it is no model")
    if not os.path.isdir(path) and (str(path).startswith((".", "/", "~")) or str(path).count("/") > 1):
        raise UsageError(f"{path}: no such folder")
    try:
        raw = raw or PreTrainedConfig.get_config_dict(path)[0]
        family = find_family(raw) or generic.FAMILY
        if family.read_config is not None:
            return family.read_config(str(path), raw), family
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code), family
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: the config cannot be read ({' '.join(str(error).split())[:300]}); known types: {', '.join(known_types())}") from error


def fingerprint(path):
    """What tells one model from another: config, weight index, and size, first and last bytes of each weight file of a folder and its
    subfolders; the name of a hub id."""
    if not os.path.isdir(path):
        return f"hub:{path}"
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
        name = str(file.relative_to(path))
        if file.name in ("config.json", "config.yaml") or file.name.endswith(".index.json"):
            digest.update(name.encode() + file.read_bytes())
        elif file.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            with open(file, "rb") as stream:
                head = stream.read(65536)
                stream.seek(max(0, file.stat().st_size - 65536))
                digest.update(f"{name} {file.stat().st_size}".encode() + head + stream.read())
    return digest.hexdigest()[:16]


def identity_of(vlm):
    """What a run keeps of its model and goes on with only if it is the same: {model_name, fingerprint, dtype}; dtype says how weights are rounded too."""
    kind = vlm.options.get("quantize_type")
    dtype = str(vlm.dtype).removeprefix("torch.") + (f" {kind}" if kind in ("4bit", "int8") else "")
    return {"model_name": slug(vlm.path), "fingerprint": fingerprint(vlm.path), "dtype": dtype}


# --- encoding ---------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Prompts of several samples, padded on the left. T: longest prompt. On the model's device, except grids and image inputs."""

    input_ids: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T)
    position_ids: torch.Tensor  # as the model takes them: (B, T) or (axes, B, T)
    next_position: torch.Tensor  # (B,) position of the first generated token
    groups: torch.Tensor  # (B, T) index into GROUPS, PAD for padding
    image_rows: list  # per sample: pixel_values and what else get_image_features takes
    pictures: list  # per sample: digest of its image inputs, to run the tower once per picture
    prompts: list  # text as given to the processor
    lengths: list  # prompt length without padding
    grids: list  # PatchGrid or None
    samples: list

    @property
    def image_inputs(self):
        """The image inputs of all samples, joined as the model's forward takes them."""
        return joined(self.image_rows)

    def repeat(self, count):
        """A batch of one prompt, `count` times."""
        return replace(
            self, input_ids=self.input_ids.expand(count, -1), attention_mask=self.attention_mask.expand(count, -1),
            position_ids=self.position_ids.expand(*self.position_ids.shape[:-2], count, -1), next_position=self.next_position.expand(count),
            groups=self.groups.expand(count, -1), image_rows=self.image_rows * count, pictures=self.pictures * count, prompts=self.prompts * count,
            lengths=self.lengths * count, grids=self.grids * count, samples=self.samples * count,
        )  # fmt: skip

    def spans(self, row):
        """{group: [[start, end), ...]} over the prompt of one sample without its padding."""
        codes, spans = self.groups[row, self.groups.shape[1] - self.lengths[row] :].tolist(), {}
        start = 0
        for i in range(1, len(codes) + 1):
            if i == len(codes) or codes[i] != codes[start]:
                spans.setdefault(GROUPS[codes[start]], []).append([start, i])
                start = i
        return spans

    def vision_positions(self, row):
        """(P,) positions of the vision tokens in the padded row."""
        return (self.groups[row] == GROUPS.index("vision")).nonzero()[:, 0]


def joined(rows):
    """Image inputs of several samples as one batch, along their first dimension. What differs in another size, the number of tiles, pictures of several
    sizes, the text that a connector reads, is filled up with 0 at its end, as transformers' processors do."""
    found = {}
    for key in rows[0]:
        parts = [row[key] for row in rows]
        sizes = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        fill = lambda part, sizes=sizes: [n for have, want in zip(reversed(part.shape[1:]), reversed(sizes), strict=True) for n in (0, want - have)]
        found[key] = torch.cat([torch.nn.functional.pad(part, fill(part)) if list(part.shape[1:]) != sizes else part for part in parts])
    return found


def prompt_for(vlm, question, strip_system=False):
    """The prompt of a question as text, and the character spans of system prompt and question: (text, (start, end) or None, (start, end)).

    From --prompt_template, the processor's chat template, or the family's own. strip_system leaves the system prompt out."""
    template, system = vlm.options.get("prompt_template"), vlm.options.get("system_prompt")
    if system is None and vlm.family.default_system:
        system = vlm.family.default_system(vlm)

    def render(system):
        if template is not None:
            image = getattr(vlm.processor, "image_token", "<image>")
            return template.replace("{system}", system or "").replace("{image}", image).replace("{question}", _QUESTION).replace("\\n", "\n")
        if getattr(vlm.processor, "chat_template", None) is None:
            if vlm.family.prompt is None:
                raise UsageError(f"{vlm.path} has no chat template; give the prompt with --prompt_template '... {{image}} ... {{question}} ...'")
            return vlm.family.prompt(vlm, _QUESTION, system)
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}
        messages = ([{"role": "system", "content": [{"type": "text", "text": system}]}] if system is not None else []) + [user]
        return vlm.processor.apply_chat_template(messages, add_generation_prompt=True)

    if template is not None and "{question}" not in template:
        raise UsageError("--prompt_template has no {question}")
    text = render(None if strip_system or (system is None) else _SYSTEM)
    if system is None or strip_system:
        marked = render(_SYSTEM)
        before, _, after = marked.partition(_SYSTEM)
        own = text[len(before) : len(text) - len(after)] if marked != before and text.startswith(before) and text.endswith(after) else ""
        if strip_system and own:  # the template writes a system prompt of its own
            text = render("")
            own = ""
        system, text = own, text if not own else before + _SYSTEM + after
    if _QUESTION not in text:
        raise UsageError(f"{vlm.path}: the chat template does not keep the question as it is; give --prompt_template")
    where = {}
    for name, stand_in, value in sorted((("system", _SYSTEM, system or ""), ("question", _QUESTION, question)), key=lambda part: text.find(part[1])):
        at = text.find(stand_in)
        if at >= 0:
            text = text[:at] + value + text[at + len(stand_in) :]
            where[name] = (at, at + len(value))
    span = where.get("system")
    return text, span if span and span[0] < span[1] else None, where["question"]


def _encode_one(vlm, image, question, strip_system):
    """ids, groups, image inputs and prompt of one sample; special strings in the question stay text."""
    text, system, (start, end) = prompt_for(vlm, question, strip_system)
    tokenizer, processor = vlm.tokenizer, vlm.processor
    specials = sorted({str(token) for token in tokenizer.all_special_tokens} | set(tokenizer.get_added_vocab()), key=len, reverse=True)
    typed, safe, rest = [], "", text[start:end]
    stand_in = next(chr(code) for code in range(0xE020, 0xF8FF) if chr(code) not in text)
    while rest:  # stand-ins for special strings, put back as text after tokenizing
        found = next((token for token in specials if token and rest.startswith(token)), None)
        safe += stand_in if found else rest[0]
        typed += [found] if found else []
        rest = rest[len(found) if found else 1 :]
    text_safe = text[:start] + safe + text[end:]
    bos = tokenizer.bos_token
    inputs = processor(
        images=image, text=text_safe, return_tensors="pt", return_offsets_mapping=True, add_special_tokens=not (bos and text_safe.startswith(bos)),
    )  # fmt: skip
    ids, offsets = inputs.pop("input_ids")[0].tolist(), inputs.pop("offset_mapping")[0].tolist()
    for key in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        inputs.pop(key, None)
    inputs |= vlm.family.read_text(vlm, text) if vlm.family.read_text else {}
    vision = [i for i, token in enumerate(ids) if token == vlm.image_token_id]
    if not vision:
        raise ValueError(f"the processor put no image token (id {vlm.image_token_id}) into the prompt")
    # characters after the picture's placeholder moved by what it grew
    shift = max(b for _, b in offsets) - len(text_safe)
    placeholder = offsets[vision[0]][0] if offsets[vision[0]][1] else 0
    if processor_token := getattr(processor, "image_token", None):
        placeholder = text_safe.rfind(processor_token, 0, offsets[vision[0]][0] + len(processor_token))
    grown = (placeholder, offsets[vision[-1]][1])
    moved = (start + (shift if start >= placeholder else 0), start + len(safe) + (shift if start >= placeholder else 0))
    markup = {tokenizer.convert_tokens_to_ids(token) for token in vlm.family.markup if token in tokenizer.get_added_vocab()}
    source = lambda a: a - shift if a >= grown[1] else a
    first = next((i for i, token in enumerate(ids) if token != vlm.image_token_id), None)  # BLIP's vision tokens come before the BOS

    def group(i):
        token, (a, b) = ids[i], offsets[i]
        if token == vlm.image_token_id:
            return "vision"
        if token in markup or (grown[0] <= a and b <= grown[1] and a < b):
            return "image_markup"
        if i == first and token == tokenizer.bos_token_id:
            return "bos"
        text_here = text_safe[source(a) : source(a) + b - a]
        places = {a} if text_here and not text_here.strip(" ") else set()  # blanks alone at the question's end are still its own
        a += len(text_here) - len(text_here.lstrip(" "))
        if any(moved[0] <= place < moved[1] for place in places | {a}):
            return "user"
        return "system" if system and system[0] <= source(min(a, b - 1)) < system[1] else "template"

    groups = [GROUPS.index(group(i)) for i in range(len(ids))]
    if typed:
        ids, groups = _put_back(tokenizer, ids, groups, offsets, [moved[0] + i for i, c in enumerate(safe) if c == stand_in], typed)
    return ids, groups, dict(inputs), text


def _put_back(tokenizer, ids, groups, offsets, places, typed):
    """Replace the tokens at each place (character of a stand-in) by the typed special string, encoded as plain text."""
    lead = tokenizer(":", add_special_tokens=False)["input_ids"]
    out_ids, out_groups, done = [], [], set()
    for token, group, (a, b) in zip(ids, groups, offsets, strict=True):
        inside = [k for k, place in enumerate(places) if a <= place < b]
        if not inside:
            out_ids.append(token)
            out_groups.append(group)
        for k in inside:
            if k not in done:
                done.add(k)
                plain = tokenizer(":" + typed[k], add_special_tokens=False, split_special_tokens=True)["input_ids"]
                plain = plain[len(lead) :] if plain[: len(lead)] == lead else plain
                if set(plain) & {
                    *tokenizer.all_special_ids,
                    *tokenizer.get_added_vocab().values(),
                }:  # T5 has its special strings as pieces too, Kosmos-2's tags are not special
                    plain = [id for char in typed[k] for id in tokenizer(":" + char, add_special_tokens=False)["input_ids"][len(lead) :]]
                out_ids += plain
                out_groups += [GROUPS.index("user")] * len(plain)
    return out_ids, out_groups


def encode(vlm, samples, images, strip_system=False):
    """samples: objects with .question; images: their PIL pictures -> Batch. The processor sees each sample alone; we pad on the left."""
    rows = [_encode_one(vlm, image, sample.question, strip_system) for sample, image in zip(samples, images, strict=True)]
    longest, size = max(len(ids) for ids, *_ in rows), len(rows)
    pad = vlm.tokenizer.pad_token_id if vlm.tokenizer.pad_token_id is not None else 0
    input_ids, mask = torch.full((size, longest), pad), torch.zeros(size, longest, dtype=torch.long)
    groups = torch.full((size, longest), PAD)
    for row, (ids, codes, _, _) in enumerate(rows):
        input_ids[row, longest - len(ids) :], mask[row, longest - len(ids) :] = torch.tensor(ids), 1
        groups[row, longest - len(ids) :] = torch.tensor(codes)
    image_rows = [{key: value for key, value in inputs.items() if torch.is_tensor(value)} for _, _, inputs, _ in rows]
    pictures = [hashlib.blake2b(b"".join(value.numpy().tobytes() for value in row.values())).digest() for row in image_rows]
    input_ids, mask, groups = (x.to(vlm.device) for x in (input_ids, mask, groups))
    positions, following = vlm.family.positions(vlm, input_ids, mask, joined(image_rows))
    grids = [vlm.family.grid(vlm, image.size, inputs) if vlm.family.grid else None for image, (_, _, inputs, _) in zip(images, rows, strict=True)]
    for grid, row in zip(grids, range(size), strict=True):
        found = int((groups[row] == GROUPS.index("vision")).sum())
        if grid is not None and len(grid.boxes) != found:
            raise ValueError(f"the prompt has {found} vision tokens, the grid of {vlm.family.name} {len(grid.boxes)}")
    prompts, lengths = [text for *_, text in rows], [len(ids) for ids, *_ in rows]
    return Batch(input_ids, mask, positions, following, groups, image_rows, pictures, prompts, lengths, grids, list(samples))


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("model_path")
    parser.add_argument("image")
    parser.add_argument("question", nargs="?", default="Describe the image.")
    parser.add_argument("--out", default="grid.png", help="picture with the grid of vision tokens")
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    from PIL import ImageDraw

    from samples import Sample, load_image

    try:
        image = load_image(args.image)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    vlm = load_from_args(args)
    batch = vlm.encode([Sample("0", Path(args.image), args.question)], [image])
    for position, (token, code) in enumerate(zip(batch.input_ids[0].tolist(), batch.groups[0].tolist(), strict=True)):
        print(f"{position:5d}  {GROUPS[code]:13s} {token:7d}  {vlm.tokenizer.convert_ids_to_tokens(token)!r}")
    print({group: spans for group, spans in batch.spans(0).items()})
    if batch.grids[0] is None:
        print(f"the grid of {vlm.family.name} is unknown, so no picture is drawn")
        return 0
    draw = ImageDraw.Draw(image)
    for x0, y0, x1, y1 in batch.grids[0].boxes[batch.grids[0].has_box].tolist():
        draw.rectangle([x0, y0, x1, y1], outline=(255, 0, 0))
    image.save(args.out)
    print(f"wrote {args.out}: {len(batch.grids[0].boxes)} vision tokens, {int(batch.grids[0].has_box.sum())} with a box")
    return 0


if __name__ == "__main__":
    cli.run(main)
