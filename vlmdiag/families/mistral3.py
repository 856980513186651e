"""Pixtral (arXiv 2410.07073; in transformers a LLaVA with Pixtral's tower), Mistral 3, Mistral
Large 4 and LightOn OCR: the picture at its own proportions, [IMG_BREAK] after each row (LightOn
OCR: no breaks).

Prompt: per row [IMG] x columns [IMG_BREAK], behind the last row [IMG_END] in place of the break.
The picture is scaled down to the longest side that the processor allows and stretched to whole
patches (Mistral 3: to whole groups of spatial_merge_size x spatial_merge_size patches, which its
connector merges into one vision token), nothing is cropped. The tower has no CLS and sees the
pictures of a batch as one sequence under a block mask, so relevancy does not go on into it.

Tekken, their tokenizer: the published tokenizer.json of Mistral-Small-3.1 splits text with another
regex than it was trained with, which transformers mends when it is asked to (fix_mistral_regex),
for folders of type mistral3 that a version before 5 wrote; others are read as they are. Where
mistral-common is installed, its tokenizer without offsets would be taken, but for this option. A
template may write today's date: a run that is resumed on another day goes on with the date of its
first one by --system_prompt, as the refusal says.

A side that is scaled down is rounded down, as in transformers, and not to the nearest pixel as in
mistral-common: of 100 large pictures, 2 or 3 have a row or column of vision tokens less.

Tested on small random models with processors made in the tests: the contract; on Tekken and the
sizes of Mistral-Small-3.1 and Pixtral-12b, prompts by mistral-common's own encoder. Not tested: we
had no published weights or templates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import (
    LlavaForConditionalGeneration,
    Mistral3ForConditionalGeneration,
    MistralLarge4ForConditionalGeneration,
)
from transformers.processing_utils import ProcessorMixin

from vlmdiag.families import Family, generic
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Config, Inputs, Loaded, LoadOptions, Size
    from vlmdiag.types import VLM


class RowsProcessor(ProcessorMixin):
    """Pixtral's processor; transformers' own cannot be imported without torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """No video processor."""
        return ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(image_token)

    def _process_images(self, images: object, **options: object) -> object:
        cell = self.patch_size * self.spatial_merge_size
        options["patch_size"] = {"height": cell, "width": cell}
        return super()._process_images(images, **options)

    def replace_image_token(self, image_inputs: Inputs, image_idx: int, **_: object) -> str:
        """What stands for a picture in the prompt."""
        cell = self.patch_size * self.spatial_merge_size
        height, width = image_inputs["image_sizes"][image_idx]
        row = self.image_token * (int(width) // cell)
        return self.image_break_token.join([row] * (int(height) // cell)) + self.image_end_token


# Without mistral-common's own tokenizer, which knows no offsets, and with Tekken's regex.
TOKENIZER = {"fix_mistral_regex": True}
LOADERS = {
    "llava": generic.loader(LlavaForConditionalGeneration, RowsProcessor, **TOKENIZER),
    "mistral3": generic.loader(Mistral3ForConditionalGeneration, RowsProcessor, **TOKENIZER),
    "mistral_large4": generic.loader(
        MistralLarge4ForConditionalGeneration, RowsProcessor, **TOKENIZER
    ),
    "lighton_ocr": generic.load,
}


def recognises(raw: Config) -> bool:
    """The types of this file, and a LLaVA with Pixtral's tower."""
    tower = (raw.get("vision_config") or {}).get("model_type")
    kind = raw.get("model_type")
    return kind in FAMILY.model_types or (kind == "llava" and tower == "pixtral")


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """By the loader of the model's type."""
    return LOADERS[config.model_type](path, config, **options)


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """One regular grid over the whole picture."""
    config = vlm.model.config
    cell = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    height, width = inputs["image_sizes"][0].tolist()
    return PatchGrid.regular(height // cell, width // cell, (0, 0, *size), size)


def variant(config: Config) -> Family:
    """Mistral Large 4's layers keep keys of an index too, so prompts share no keys and values."""
    if config.get("model_type") == "mistral_large4":
        return replace(FAMILY, has=FAMILY.has - {"causal"})
    return FAMILY


FAMILY = Family(
    name="mistral3",
    model_types=("mistral3", "mistral_large4", "lighton_ocr"),
    architectures=("Mistral3ForConditionalGeneration",),
    recognises=recognises,
    variant=variant,
    load=load,
    parts=generic.parts,
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=("[IMG_BREAK]", "[IMG_END]"),
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)
