"""Molmo2 (arXiv 2601.10611), pictures only: SigLIP 2 on overlapping crops, attention pooling, a
Qwen3 or OLMo 3 text model.

Prompt: <low_res_im_start>, the whole picture's <im_patch> tokens with <im_col> at the end of each
row, <im_end>, <im_start>, those of the crops' canvas, again with <im_col>, <im_end>; then the
question, from the chat template, all behind a BOS that the processor adds (the EOS where the
tokenizer has no BOS). The picture is squeezed once to one crop (378 x 378, 27 x 27 patches of 14
pixels) and once to a canvas of up to 8 windows of 19 x 19 patches and a margin of 4 around them;
crops are a window and its margins, and of the margins between two crops each patch is used from the
crop whose window holds it. Patches are pooled 2 x 2 by attention (the query is their mean). Where a
side is odd there is one padded row or column at its end, so the last token of a row stands for 2 x
1 patches and its box reaches past the picture: 14 x 14 tokens of the whole picture, then the canvas
as one grid, both row by row.

A vision token's embedding is the picture's feature PLUS the embedding of <im_patch>.
move_placeholder() makes the sum the feature and 0 the embedding: the same inputs, and features are
all that the decoder reads at vision tokens. All picture tokens, <im_col> and the start and end
tokens too, see each other (mm_token_type_ids), so "causal" is not had. Layers outside the config's
rope_scaling_layers have frequencies of their own; then "rotary" is not had.

transformers has no image processor without torchvision for this type; ImageProcessor below does the
same steps (its bilinear resize without antialiasing is torch's own). Videos are not read. Checked
on small random models with processors made in the tests: pixels, pooling and grids of the image
processor against transformers' own steps with torch's interpolation in torchvision's place; cells
by their pixels; logits and greedy answers against transformers' own class. Not checked, for want of
the files: published weights and their tokenizers; the image processor against torchvision itself.
"""

from dataclasses import replace

import numpy as np
import torch
from transformers import AutoTokenizer, Molmo2ForConditionalGeneration, Molmo2Processor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
)
from transformers.models.molmo2.image_processing_molmo2 import (
    Molmo2ImageProcessorKwargs,
    arange_for_pooling,
    batch_pixels_to_patches,
    compute_crop_geometry,
)

from vlmdiag.families import Family, checked, generic
from vlmdiag.pictures.grid import PatchGrid, cells


class ImageProcessor(PilBackend):
    """Molmo2's preprocessing without torchvision. pixel_values (crops, patches, 3 * patch size^2);
    image_token_pooling (P, 4) indices of the patches of each token among all patches of the
    picture, -1 for none; image_grids (1, 4) rows and columns of the whole picture's tokens and of
    the canvas's.
    """

    valid_kwargs = Molmo2ImageProcessorKwargs
    model_input_names = ["pixel_values", "image_token_pooling", "image_grids", "image_num_crops"]
    resample, image_mean, image_std, size = (
        PILImageResampling.BILINEAR,
        IMAGENET_STANDARD_MEAN,
        IMAGENET_STANDARD_STD,
        {"height": 378, "width": 378},
    )
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    max_crops, overlap_margins, patch_size, pooling_size = 8, [4, 4], 14, [2, 2]

    def tiling(self, size):
        """(rows, columns) of windows and (height, width) of the canvas in pixels for a picture of
        `size` (width, height)."""
        found = compute_crop_geometry(
            *size[::-1], self.max_crops, self.overlap_margins, self.size["height"], self.patch_size
        )
        return found[:2], found[2:]

    def resized(self, image, height, width):
        """uint8 (3, h, w) squeezed to (height, width), as float scaled and normalised (height,
        width, 3)."""
        image = torch.nn.functional.interpolate(
            torch.from_numpy(image)[None].float(),
            (height, width),
            mode="bilinear",
            align_corners=False,
            antialias=False,
        )
        image = image.round().clamp(0, 255)[0].permute(1, 2, 0) * (
            self.rescale_factor if self.do_rescale else 1
        )
        return (
            (image - torch.tensor(self.image_mean)) / torch.tensor(self.image_std)
            if self.do_normalize
            else image
        )

    def _preprocess(self, images, return_tensors=None, **_):
        if len(images) != 1 or self.size["height"] != self.size["width"]:
            raise ValueError(
                f"one picture and a square size are wanted, not {len(images)} and {self.size}"
            )
        edge, (before, after), patch = self.size["height"], self.overlap_margins, self.patch_size
        side = edge // patch
        (rows, columns), canvas = self.tiling(images[0].shape[:0:-1])
        picture, step = self.resized(images[0], *canvas), (side - before - after) * patch
        crops = [
            picture[i * step : i * step + edge, j * step : j * step + edge]
            for i in range(rows)
            for j in range(columns)
        ]
        patches = batch_pixels_to_patches(
            torch.stack([self.resized(images[0], edge, edge), *crops]), patch
        )

        def owner(count, length):
            """For each patch of the canvas along one side: the window it is taken from, and its
            place in that window's crop."""
            place = torch.arange(length // patch)
            window = ((place - before).clamp(min=0) // (side - before - after)).clamp(max=count - 1)
            return window, place - window * (side - before - after)

        (row, y), (column, x) = owner(rows, canvas[0]), owner(columns, canvas[1])
        index = ((row[:, None] * columns + column) * side + y[:, None]) * side + x
        low, *low_shape = arange_for_pooling(
            torch.arange(side * side).view(side, side), *self.pooling_size
        )
        high, *high_shape = arange_for_pooling(index + side * side, *self.pooling_size)
        grids = torch.tensor([[*low_shape, *high_shape]])
        data = {
            "pixel_values": patches,
            "image_token_pooling": torch.cat([low, high]),
            "image_grids": grids,
            "image_num_crops": torch.tensor([len(patches)]),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)


class ImageOnlyProcessor(Molmo2Processor):
    """Molmo2's processor without its video part. Prompts of the chat template begin with the BOS
    that it would add, so that offsets count from it."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_use_col_tokens=True,
        use_single_crop_col_tokens=None,
        use_single_crop_start_token=True,
        **_,
    ):
        parts = (
            image_processor,
            tokenizer,
            tokenizer,
        )  # the second in the video processor's place: of three parts the base class sets as many as there are
        super().__init__(
            *parts,
            chat_template,
            image_use_col_tokens,
            use_single_crop_col_tokens,
            use_single_crop_start_token,
        )

    def apply_chat_template(self, *args, **kwargs):
        text, bos = (
            super().apply_chat_template(*args, **kwargs),
            self.tokenizer.bos_token or self.tokenizer.eos_token,
        )
        return text if text.startswith(bos) else bos + text


class Molmo2(Molmo2ForConditionalGeneration):
    """transformers' class for several pictures joined as ImageProcessor gives each: their patches
    are counted from 0 in every one."""

    def get_image_features(
        self, pixel_values, image_token_pooling, image_grids, image_num_crops, **kwargs
    ):
        tokens, patches = (
            image_grids[:, 0] * image_grids[:, 1] + image_grids[:, 2] * image_grids[:, 3],
            image_num_crops * pixel_values.shape[1],
        )
        first = (patches.cumsum(0) - patches).repeat_interleave(tokens)[:, None]
        pooling = torch.where(
            image_token_pooling < 0, image_token_pooling, image_token_pooling + first
        )
        return self.model.get_image_features(pixel_values, pooling, image_grids, **kwargs)


def move_placeholder(model):
    """Take the placeholder's embedding out of the table, which is 0 there then, and add it to every
    feature."""
    table, token = model.get_input_embeddings().weight.data, model.config.image_token_id
    placeholder = table[token].clone()
    table[token] = 0

    def add(module, args, output):
        output.last_hidden_state = output.last_hidden_state + placeholder.to(
            output.last_hidden_state
        )
        return output

    model.model.multi_modal_projector.register_forward_hook(add)


def load(
    path, config, dtype, device_map=None, trust_remote_code=False, quantization_config=None, **_
):
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    model = checked(
        Molmo2.from_pretrained(path, config=config, output_loading_info=True, **options)
    )
    move_placeholder(model)
    tokenizer, (settings, _) = (
        AutoTokenizer.from_pretrained(path),
        ImageOnlyProcessor.get_processor_dict(path),
    )
    settings.setdefault("chat_template", tokenizer.chat_template)
    return model, ImageOnlyProcessor.from_args_and_dict(
        [ImageProcessor.from_pretrained(path), tokenizer], settings
    )


def grid(vlm, size, inputs):
    """Pooled patches of the whole picture, then of the canvas, both squeezed to the picture."""
    processor, (width, height) = vlm.processor.image_processor, size
    pool_rows, pool_columns = processor.pooling_size
    edge, boxes = processor.size["height"], []
    for (rows, columns), sides in zip(
        inputs["image_grids"].view(2, 2).tolist(),
        ((edge, edge), processor.tiling(size)[1]),
        strict=True,
    ):
        down, across = (side // processor.patch_size for side in sides)
        top, left = (
            (rows * pool_rows - down) // 2,
            (columns * pool_columns - across) // 2,
        )  # padded patches before the first
        x, y = width / across, height / down
        region = (
            -left * x,
            -top * y,
            (columns * pool_columns - left) * x,
            (rows * pool_rows - top) * y,
        )
        boxes.append(cells(rows, columns, region).reshape(-1, 4))
    return PatchGrid(np.concatenate(boxes), None, tuple(size))


def sources(vlm, size, inputs):
    """Up to 2 x 2 patches of the crops."""
    return inputs["image_token_pooling"].numpy()


def inputs(vlm, batch):
    """mm_token_type_ids (B, T): 1 at picture tokens and what stands around and between them."""
    return {
        "mm_token_type_ids": (
            torch.isin(
                batch.input_ids,
                torch.tensor(vlm.processor.image_token_ids, device=batch.input_ids.device),
            ).long()
        )
    }


def variant(config):
    """The family without rotary positions where only some layers' are scaled. config: config.json
    as a dict."""
    text = config.get("text_config") or {}
    layers = text.get("rope_scaling_layers")
    one = layers is None or len(layers) == text.get("num_hidden_layers")
    return FAMILY if one else replace(FAMILY, rotary=None, has=FAMILY.has - {"rotary"})


FAMILY = Family(
    name="molmo2",
    model_types=("molmo2",),
    architectures=("Molmo2ForConditionalGeneration", "Molmo2"),
    variant=variant,
    load=load,
    parts=generic.parts_with_tower,
    grid=grid,
    sources=sources,
    positions=generic.positions,
    inputs=inputs,
    rotary=generic.rotary,
    markup=("<im_start>", "<low_res_im_start>", "<im_end>", "<im_col>"),
    has=frozenset({"decoder-only", "rotary", "grid"}),
)
