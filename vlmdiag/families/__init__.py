"""The model families: which one describes a model, those of this package and a user's own.

One file per family defines FAMILY (contract.py says what a family is). generic.py serves every
other type that follows the conventions of transformers 5. A user's own family is a file in models/
of the repository, in the folder that VLMDIAG_FAMILIES names, or the one given by --family
(models/README.md).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from vlmdiag import CHECKOUT
from vlmdiag.cli import UsageError
from vlmdiag.families.contract import Config, Family, Parts, QFormer, Rotary

__all__ = [
    "Family",
    "Parts",
    "QFormer",
    "Rotary",
    "family_of_file",
    "find_family",
    "known_types",
    "left_out",
    "read_folder",
]

# In the order in which they are asked: a family that recognises its models by more than a type,
# such as the original layout of LLaVA (its type is "llava" too), comes before the others.
FAMILIES = (
    "nvila",
    "convllava",
    "llava_original",
    "mistral3",
    "llava",
    "llava_next",
    "idefics3",
    "internvl",
    "aya_vision",
    "paligemma",
    "gemma3",
    "qwen_vl",
    "blip2",
    "instructblip",
    "minigpt4",
    "mplug_owl2",
    "molmo",
    "molmo2",
    "ovis2",
    "deepseek_vl",
    "janus",
    "kosmos2",
    "rows",
    "square",
    "tiles",
)


def user_files() -> list[Path]:
    """The files of a user's own families, sorted by name: those of models/ in the repository (never
    of the working folder) and of VLMDIAG_FAMILIES that define FAMILY."""
    folders = []
    named = os.environ.get("VLMDIAG_FAMILIES")
    if named:
        if not Path(named).is_dir():
            raise UsageError(f"VLMDIAG_FAMILIES: {named} is no folder")
        folders.append(Path(named))
    if (CHECKOUT / "pyproject.toml").exists():  # not where a wheel was installed
        folders.append(CHECKOUT / "models")
    files: list[Path] = []
    for folder in folders:
        files += [file for file in sorted(folder.glob("*.py")) if _defines_family(file)]
    return files


def _defines_family(file: Path) -> bool:
    """Whether a file assigns FAMILY; helpers beside a family do not."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as Python: {error}") from error
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if any(isinstance(name, ast.Name) and name.id == "FAMILY" for name in targets):
            return True
    return False


@cache
def family_of_file(file: Path) -> Family:
    """The FAMILY of a user's file. UsageError where the file does not run or defines none."""
    name = f"vlmdiag_own_families.{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UsageError(f"--family {file}: a Python file that defines FAMILY was wanted")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{file} does not run: {type(error).__name__}: {error}") from error
    family = getattr(module, "FAMILY", None)
    if not isinstance(family, Family):
        raise UsageError(f"{file}: FAMILY is to be a vlmdiag.families.Family")
    return replace(family, file=file)


def all_families() -> Iterator[Family]:
    """A user's own families, then those of this package in the order of FAMILIES."""
    for file in user_files():
        yield family_of_file(file.resolve())
    for name in FAMILIES:
        yield importlib.import_module(f"vlmdiag.families.{name}").FAMILY


def module_of(family: Family) -> str:
    """The name of the module here that describes a family; "generic" for every other type."""
    for name in FAMILIES if family.model_types else ():
        if importlib.import_module(f"{__name__}.{name}").FAMILY.model_types == family.model_types:
            return name
    return "generic"


def _describes(family: Family, config: Config) -> bool:
    if family.recognises is not None:
        return family.recognises(config)
    if config.get("model_type") in family.model_types:
        return True
    return bool(set(config.get("architectures") or ()) & set(family.architectures))


def variant_of(family: Family, config: Config) -> Family:
    """The family as it is for one config."""
    if family.variant is None:
        return family
    return replace(family.variant(config), file=family.file)


def find_family(config: Config) -> Family | None:
    """The family of a config.json; None where no file describes it."""
    for family in all_families():
        if _describes(family, config):
            return variant_of(family, config)
    return None


def read_folder(folder: str | Path) -> Config | None:
    """The config of a folder without config.json that a family knows how to read; None where none
    does."""
    for family in all_families():
        config = family.reads(str(folder)) if family.reads else None
        if config is not None:
            return config
    return None


def known_types() -> list[str]:
    """All model types that have a file, sorted."""
    return sorted({kind for family in all_families() for kind in family.model_types})
