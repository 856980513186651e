"""Adapters that peft wrote, such as LoRA: which model they belong to, and their merge into its
weights.

Merged, a model has the modules, names and classes of its base, so that whatever reads or edits it
works as without an adapter: a LoRA's W becomes W + (alpha / r) B A. What an adapter's settings mean
is peft's business; which module of the model each of its tensors belongs to is found here, because
names differ between the authors' layouts, versions of transformers and the classes of this package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors.torch import load_file
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils.peft_utils import find_adapter_config_file

from vlmdiag.cli import UsageError
from vlmdiag.families.files import (
    Rename,
    State,
    base_name,
    fetch,
    folder_of,
    is_hub_id,
    read_pickle,
    renamed,
)
from vlmdiag.families.folders import WEIGHTS, broken_files, names_of, read_object, refuse_no_folder
from vlmdiag.families.weights import left_out

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
# what is read of an adapter or a base on the hub
READ = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.bin")
# what LLaVA's training saves beside a LoRA: the projector and whatever else was trained whole
TRAINED = "non_lora_trainables.bin"


class Sources(NamedTuple):
    """Where a model's parts lie: `base` has the weights, `adapter` is a folder or None, `trained` a
    file of whole parameters that belong to the adapter, or None."""

    base: str
    adapter: Path | None = None
    trained: Path | None = None


def sources_of(path: str | Path, base_model: str | Path | None, to_merge: bool = True) -> Sources:
    """What a folder or hub id consists of: itself, with an adapter beside its weights or without;
    or an adapter, whose base is `base_model`, else the one that adapter_config.json names.
    UsageError where there is no base, or peft, which is needed to merge, is not installed."""
    refuse_no_folder(path)
    if find_adapter_config_file(str(path)) is None:
        if base_model is not None:
            raise UsageError(f"{path} is no adapter (no {CONFIG}), so --base_model has no use")
        _refuse_left_overs(Path(path))
        return Sources(str(path))
    folder = Path(path) if Path(path).is_dir() else fetch(str(path), READ)
    if any(WEIGHTS.fullmatch(name) for name in names_of(folder)):
        if base_model is not None:
            raise UsageError(f"{path} has an adapter beside whole weights: leave --base_model out")
        base = str(path)
    else:
        base = _base_of(folder, base_model)
    if to_merge and importlib.util.find_spec("peft") is None:
        raise UsageError(
            f"{path} holds an adapter ({CONFIG}), which peft merges into the weights: pip install"
            " peft"
        )
    trained = folder / TRAINED
    return Sources(base, folder, trained if trained.exists() else None)


def _refuse_left_overs(folder: Path) -> None:
    """UsageError for whole weights with parts of an adapter beside them, which would be passed over
    without its config."""
    parts = [name for name in (*FILES, TRAINED) if (folder / name).is_file()]
    if parts and any(WEIGHTS.fullmatch(name) for name in names_of(folder)):
        raise UsageError(
            f"{folder} has {' and '.join(parts)} beside whole weights, and no {CONFIG} that says"
            " how to apply it: copy that too, or take them out of the folder"
        )


def _base_of(folder: Path, base_model: str | Path | None) -> str:
    """The base of an adapter without weights beside it."""
    base = str(base_model or read_object(folder / CONFIG).get("base_model_name_or_path") or "")
    if not base:
        raise UsageError(
            f"{folder} is an adapter, and its {CONFIG} names no base: give --base_model, or merge"
            " the adapter first"
        )
    if not Path(base).is_dir() and (Path(base).exists() or not is_hub_id(base)):
        raise UsageError(
            f"{folder} is an adapter, and its base {base} is no folder here: give --base_model"
        )
    if find_adapter_config_file(base) is not None:
        raise UsageError(f"{folder}: its base {base} has an adapter itself: merge that one first")
    return base


# of tokenizer, processor and template, as training saves them beside an adapter
OF_PROCESSOR = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|spiece|tekken|chat_template"
    r"|preprocessor_config|processor_config|generation_config).*"
)


@contextlib.contextmanager
def with_own_processor(sources: Sources) -> Iterator[str]:
    """The folder or hub id to load: the base, or links to it in which tokenizer, processor,
    template and generation config are the adapter's, where these were saved with it."""
    own = [] if sources.adapter is None else names_of(sources.adapter)
    own = [name for name in own if OF_PROCESSOR.fullmatch(name) and "/" not in name]
    if not own or sources.adapter is None or str(sources.adapter) == sources.base:
        yield sources.base
        return
    base = folder_of(sources.base, READ).absolute()
    with tempfile.TemporaryDirectory() as scratch:
        view = Path(scratch) / base.name
        view.mkdir()
        for beside in base.parent.iterdir():  # a tower may lie beside the base
            if beside.is_dir() and beside != base:
                (view.parent / beside.name).symlink_to(beside)
        for file in base.iterdir():
            if file.name not in own:
                (view / file.name).symlink_to(file.resolve())
        for name in own:
            (view / name).symlink_to((sources.adapter / name).resolve())
        _leave_out_of_base(view, own)
        try:
            yield str(view)
        except UsageError as error:
            raise UsageError(str(error).replace(str(view), sources.base)) from error


def _leave_out_of_base(view: Path, own: Sequence[str]) -> None:
    """Take templates and image processor of the base out of a folder of links in which the files
    `own` are an adapter's that has such ones: transformers may prefer the base's by their names."""
    files = {name: read_object(view / name) for name in own if name.endswith(".json")}
    has_template = any(name.startswith("chat_template") for name in own)
    has_template |= any("chat_template" in content for content in files.values())
    has_images = "preprocessor_config.json" in own
    has_images |= "image_processor" in files.get("processor_config.json", {})
    keys = ["chat_template"] * has_template + ["image_processor"] * has_images
    for file in list(view.iterdir()):
        if file.name in own:
            continue
        is_template = has_template and file.name.startswith("chat_template")
        if is_template or (has_images and file.name == "preprocessor_config.json"):
            file.unlink()
        elif file.name in ("processor_config.json", "tokenizer_config.json"):
            content = read_object(file)
            kept = {key: value for key, value in content.items() if key not in keys}
            if kept != content:
                file.unlink()
                file.write_text(json.dumps(kept))


def names_in(model: PreTrainedModel, layouts: Sequence[Rename]) -> Rename:
    """(stored name of a parameter) -> its name in the model: the same, that of one of the layouts,
    or what transformers renames it to; None where the model has no such parameter or module."""
    renamings = [
        entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)
    ]
    modules = {name for name, _ in model.named_modules()}

    def name_of(key: str) -> str | None:
        candidates = [key, *(layout(key) for layout in layouts)]
        candidates += [
            rename_source_key(name, renamings, [])[0] for name in candidates if name is not None
        ]
        for name in candidates:
            if name is not None and name.rpartition(".")[0] in modules:
                return name
        return None

    return name_of


def load_trained(model: PreTrainedModel, file: Path, layouts: Sequence[Rename]) -> None:
    """Put the parameters of LLaVA's non_lora_trainables.bin in the place of the model's."""
    name_of = names_in(model, layouts)
    state = read_pickle(file)
    places = {key: name_of(base_name(key)) for key in state}
    _refuse_strangers(file, [key for key, name in places.items() if name is None])
    result = model.load_state_dict(renamed(state, places.__getitem__), strict=False)
    _refuse_strangers(file, result.unexpected_keys)


def merge(model: PreTrainedModel, adapter: Path, layouts: Sequence[Rename]) -> PreTrainedModel:
    """The model with an adapter merged into its weights; UsageError where a tensor of the adapter
    belongs to no module of the model, or the adapter has no weights to merge."""
    # which peft imports, and which says what it cannot do on a CPU
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import (
        PeftConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    config = PeftConfig.from_pretrained(str(adapter))
    if config.is_prompt_learning or getattr(config, "layer_replication", None):
        raise UsageError(
            f"{adapter}: an adapter of type {config.peft_type.value} that adds tokens or layers"
            " cannot be merged into weights"
        )
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    name_of = names_in(model, layouts)
    kept = getattr(model.config, "layers_kept", None)
    stored = read_adapter(adapter)
    _resize(model, stored, name_of)
    whole = _whole(config, stored, name_of)
    model.load_state_dict(renamed(stored, whole.get), strict=False)
    of_adapter = {key: tensor for key, tensor in stored.items() if key not in whole}
    state, targets = _placed(adapter, of_adapter, prefix, name_of, kept)
    if not state:
        return model
    _direct(config, targets, name_of)
    for target in targets:
        _untie(model, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rounding where 4-bit weights are merged into
        adapted = get_peft_model(model, config)
        result = set_peft_model_state_dict(adapted, state)
        _refuse_strangers(adapter, result.unexpected_keys)
        # of all that peft saves, which leaves out what is tied or counted again
        empty = sorted(
            set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - {*state}
        )
        if empty:
            raise UsageError(
                f"{adapter}: {len(empty)} parameters of the adapter are in no file, such as"
                f" {', '.join(empty[:3])}"
            )
        return adapted.merge_and_unload()


def read_adapter(folder: Path) -> State:
    """The tensors of an adapter's folder by their stored names."""
    file = next((folder / name for name in FILES if (folder / name).exists()), None)
    if file is None:
        raise UsageError(f"{folder}: {CONFIG} without {' or '.join(FILES)}")
    broken = broken_files(folder, [file.name])
    if broken is not None:
        raise UsageError(f"{folder}: {broken}")
    return load_file(file) if file.suffix == ".safetensors" else read_pickle(file)


def _resize(model: PreTrainedModel, stored: State, name_of: Rename) -> None:
    """Give a model the vocabulary of an adapter that was trained with more words, or fewer, and has
    their embeddings or LM head whole."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    for key, tensor in stored.items():
        name = name_of(re.sub(r"\.(base_layer|modules_to_save)\.", ".", base_name(key)))
        if name is None or not name.endswith(".weight"):
            continue
        module = model.get_submodule(name.removesuffix(".weight"))
        if any(module is table for table in tables) and len(tensor) != len(module.weight):
            model.resize_token_embeddings(len(tensor), mean_resizing=False)
            return


def _whole(config: PeftConfig, stored: State, name_of: Rename) -> dict[str, str]:
    """{stored name: name in the model} of parameters that were saved whole beside an adapter's: the
    weight below a LoRA on an embedding (X.base_layer.weight), trained biases."""
    with_biases = getattr(config, "bias", "none") != "none"
    whole = {}
    for key in stored:
        name = base_name(key)
        plain = name.replace(".base_layer.", ".")
        known = name_of(plain)
        if known is not None and (plain != name or (with_biases and name.endswith(".bias"))):
            whole[key] = known
    return whole


def _placed(
    adapter: Path, stored: State, prefix: str, name_of: Rename, layers_kept: int | None
) -> tuple[State, list[str]]:
    """(tensors under the names that peft gives them in this model, modules that are adapted), both
    empty where the adapter is for decoder layers alone that were left out. UsageError where one has
    no module."""
    state: State = {}
    targets: set[str] = set()
    strangers = []
    for key, tensor in stored.items():
        if key.startswith("base_model.") and not key.startswith("base_model.model."):
            state[key] = tensor  # of the adapter as a whole: VeRA's projections
            continue
        name = base_name(key)
        # of X.lora_A.weight it is X.weight that the model knows
        part = re.search(rf"\.({prefix}|token_adapter\b)", name)
        known = name_of(f"{name[: part.start()]}.weight" if part else name)
        if known is None:
            if not left_out(key, layers_kept):
                strangers.append(key)
            continue
        if part:
            module = known.removesuffix(".weight")
            known = module + name[part.start() :]
            if part[1] == prefix:
                targets.add(module)
        state[f"base_model.model.{known}"] = tensor
    _refuse_strangers(adapter, strangers)
    if not targets and (state or layers_kept is None):
        raise UsageError(f"{adapter}: the adapter holds no tensor of the type it names ({prefix})")
    return state, sorted(targets)


def _refuse_strangers(file: Path, keys: Sequence[str]) -> None:
    if keys:
        raise UsageError(
            f"{file}: {len(keys)} of the adapter's parameters match no module of the model, such as"
            f" {', '.join(keys[:2])}: it was trained on another base"
        )


def _direct(config: PeftConfig, targets: Sequence[str], name_of: Rename) -> None:
    """Make a config's settings about modules speak of this model's modules."""
    config.target_modules = set(targets)
    config.task_type = None  # some types ask for methods that only a language model has
    config.inference_mode = True
    if hasattr(config, "bias"):
        config.bias = "none"  # trained ones are in the model already
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if hasattr(config, name):
            setattr(config, name, None)
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name, None) or {}
        if patterns:
            known = {key: name_of(f"{key}.weight") or key for key in patterns}
            of_modules = {known[key].removesuffix(".weight"): patterns[key] for key in patterns}
            setattr(config, name, of_modules)


def _untie(model: PreTrainedModel, target: str) -> None:
    """Give a module its own weight where it shares one: a LoRA on the LM head was trained with an
    embedding table that stayed as it was."""
    module = model.get_submodule(target)
    weight = getattr(module, "weight", None)
    sharing = [
        other
        for other in (model.get_input_embeddings(), model.get_output_embeddings())
        if other is not None and other is not module and other.weight is weight
    ]
    if sharing and isinstance(weight, nn.Parameter):
        module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
