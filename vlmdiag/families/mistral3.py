"""Pixtral (arXiv 2410.07073; in transformers a LLaVA with Pixtral's tower) and Mistral 3: the
picture at its own proportions, [IMG_BREAK] after each row.

Prompt: per row [IMG] x columns [IMG_BREAK], behind the last row [IMG_END] in place of the break.
The picture is scaled down to the longest side that the processor allows and stretched to whole
patches (Mistral 3: to whole groups of spatial_merge_size x spatial_merge_size patches, which its
connector merges into one vision token), nothing is cropped. The tower has no CLS and sees the
pictures of a batch as one sequence under a block mask, so relevancy does not go on into it.

Checked on small random models with processors made in the tests: the contract. Not checked, for
want of the files: the published weights and the tokenizers of Mistral (tekken)."""

from transformers import LlavaForConditionalGeneration, Mistral3ForConditionalGeneration
from transformers.processing_utils import ProcessorMixin

from vlmdiag.families import Family, generic
from vlmdiag.pictures.grid import PatchGrid

KINDS = {"llava": LlavaForConditionalGeneration, "mistral3": Mistral3ForConditionalGeneration}


class RowsProcessor(ProcessorMixin):
    """Pixtral's processor; transformers' own cannot be imported without torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=16,
        spatial_merge_size=1,
        chat_template=None,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size, self.spatial_merge_size = patch_size, spatial_merge_size
        self.image_token, self.image_break_token, self.image_end_token = (
            image_token,
            image_break_token,
            image_end_token,
        )
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    def _process_images(self, images, **options):
        cell = self.patch_size * self.spatial_merge_size
        return super()._process_images(
            images, **options | {"patch_size": {"height": cell, "width": cell}}
        )

    def replace_image_token(self, image_inputs, image_idx, **_):
        """What stands for a picture in the prompt."""
        rows, columns = (
            int(edge) // (self.patch_size * self.spatial_merge_size)
            for edge in image_inputs["image_sizes"][image_idx]
        )
        return (
            self.image_break_token.join([self.image_token * columns] * rows) + self.image_end_token
        )


def recognises(raw):
    """Mistral 3, and a LLaVA with Pixtral's tower. raw: config.json as a dict."""
    return raw.get("model_type") == "mistral3" or (
        raw.get("model_type") == "llava"
        and (raw.get("vision_config") or {}).get("model_type") == "pixtral"
    )


def load(path, config, **options):
    return generic.loader(KINDS[config.model_type], RowsProcessor)(path, config, **options)


def grid(vlm, size, inputs):
    """One regular grid over the whole picture."""
    config = vlm.model.config
    cell = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    height, width = inputs["image_sizes"][0].tolist()
    return PatchGrid.regular(height // cell, width // cell, (0, 0, *size), size)


FAMILY = Family(
    name="mistral3",
    model_types=("mistral3",),
    architectures=("Mistral3ForConditionalGeneration",),
    recognises=recognises,
    load=load,
    parts=generic.parts,
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=("[IMG_BREAK]", "[IMG_END]"),
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)
