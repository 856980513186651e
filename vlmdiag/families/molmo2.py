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
tokens too, see each other (mm_token_type_ids), so this family does not declare `causal`. Layers
outside the config's rope_scaling_layers have frequencies of their own.

transformers has no image processor without torchvision for this type; ImageProcessor below does the
same steps (its bilinear resize without antialiasing is torch's own). Videos are not read. Tested on
small random models with processors made in the tests: pixels, pooling and grids of the image
processor against transformers' own steps with torch's interpolation in torchvision's place; cells
by their pixels; logits and greedy answers against transformers' own class. Not tested: we had no
published weights or tokenizers; the image processor against torchvision itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

from vlmdiag.families import Family, generic
from vlmdiag.pictures.grid import PatchGrid, cells

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from typing_extensions import Unpack

    from vlmdiag.batch import Batch
    from vlmdiag.families.contract import Inputs, Loaded, LoadOptions, Size
    from vlmdiag.types import VLM


# --- pictures -------------------------------------------------------------------------------------


class ImageProcessor(PilBackend):
    """Molmo2's preprocessing without torchvision. pixel_values (crops, patches, 3 * patch size^2);
    image_token_pooling (P, 4) indices of the patches of each token among all patches of the
    picture, -1 for none; image_grids (1, 4) rows and columns of the whole picture's tokens and of
    the canvas's.
    """

    valid_kwargs = Molmo2ImageProcessorKwargs
    model_input_names = ["pixel_values", "image_token_pooling", "image_grids", "image_num_crops"]
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 378, "width": 378}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    max_crops = 8
    overlap_margins = [4, 4]
    patch_size = 14
    pooling_size = [2, 2]

    @property
    def side(self) -> int:
        """Patches on a crop's side."""
        return self.size["height"] // self.patch_size

    @property
    def window(self) -> int:
        """Patches by which crops follow each other."""
        return self.side - sum(self.overlap_margins)

    def tiling(self, size: Size) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of windows and (height, width) of the canvas in pixels for a picture of
        `size`."""
        width, height = size
        rows, columns, canvas_height, canvas_width = compute_crop_geometry(
            height,
            width,
            self.max_crops,
            self.overlap_margins,
            self.size["height"],
            self.patch_size,
        )
        return (rows, columns), (canvas_height, canvas_width)

    def resized(
        self, image: UInt8[np.ndarray, "3 h w"], height: int, width: int
    ) -> Float[Tensor, "height width 3"]:
        """A picture squeezed to (height, width), scaled and normalised."""
        squeezed = torch.nn.functional.interpolate(
            torch.from_numpy(image)[None].float(),
            (height, width),
            mode="bilinear",
            align_corners=False,
            antialias=False,
        )
        pixels = squeezed.round().clamp(0, 255)[0].permute(1, 2, 0)
        pixels = pixels * (self.rescale_factor if self.do_rescale else 1)
        if not self.do_normalize:
            return pixels
        return (pixels - torch.tensor(self.image_mean)) / torch.tensor(self.image_std)

    def _preprocess(
        self,
        images: list[UInt8[np.ndarray, "3 h w"]],
        return_tensors: str | None = None,
        **_: object,
    ) -> BatchFeature:
        edge = self.size["height"]
        if len(images) != 1 or edge != self.size["width"]:
            raise ValueError(
                f"one picture and a square size are wanted, not {len(images)} and {self.size}"
            )
        image = images[0]
        _, height, width = image.shape
        (rows, columns), canvas = self.tiling((width, height))
        picture = self.resized(image, *canvas)
        step = self.window * self.patch_size
        corners = [(i * step, j * step) for i in range(rows) for j in range(columns)]
        crops = [picture[y : y + edge, x : x + edge] for y, x in corners]
        whole = self.resized(image, edge, edge)
        patches = batch_pixels_to_patches(torch.stack([whole, *crops]), self.patch_size)

        in_whole = torch.arange(self.side**2).view(self.side, self.side)
        in_crops = self._owners(rows, columns, canvas) + self.side**2
        low, *low_shape = arange_for_pooling(in_whole, *self.pooling_size)
        high, *high_shape = arange_for_pooling(in_crops, *self.pooling_size)
        data = {
            "pixel_values": patches,
            "image_token_pooling": torch.cat([low, high]),
            "image_grids": torch.tensor([[*low_shape, *high_shape]]),
            "image_num_crops": torch.tensor([len(patches)]),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _owners(
        self, rows: int, columns: int, canvas: tuple[int, int]
    ) -> Int[Tensor, "height width"]:
        """For each patch of the canvas its number among the patches of all crops: it is taken from
        the crop whose window holds it."""
        before, _ = self.overlap_margins

        def owner(count: int, length: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
            """Along one side: the crop of each patch, and its place in that crop."""
            place = torch.arange(length // self.patch_size)
            crop = ((place - before).clamp(min=0) // self.window).clamp(max=count - 1)
            return crop, place - crop * self.window

        row, y = owner(rows, canvas[0])
        column, x = owner(columns, canvas[1])
        crop = row[:, None] * columns + column
        return (crop * self.side + y[:, None]) * self.side + x


class ImageOnlyProcessor(Molmo2Processor):
    """Molmo2's processor without its video part. Prompts of the chat template begin with the BOS
    that it would add, so that offsets count from it."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """No video processor."""
        return ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor: ImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        image_use_col_tokens: bool = True,
        use_single_crop_col_tokens: bool | None = None,
        use_single_crop_start_token: bool = True,
        **_: object,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            # in the video processor's place: the base class sets as many as it has attributes
            tokenizer,
            chat_template,
            image_use_col_tokens,
            use_single_crop_col_tokens,
            use_single_crop_start_token,
        )

    def apply_chat_template(self, *args: object, **kwargs: object) -> str:
        """The template's text behind the BOS."""
        text = super().apply_chat_template(*args, **kwargs)
        bos = self.tokenizer.bos_token or self.tokenizer.eos_token
        return text if text.startswith(bos) else bos + text


# --- the model ------------------------------------------------------------------------------------


class Molmo2(Molmo2ForConditionalGeneration):
    """transformers' class for several pictures joined as ImageProcessor gives each: their patches
    are counted from 0 in every one."""

    def get_image_features(
        self,
        pixel_values: Float[Tensor, "crops patches pixels"],
        image_token_pooling: Int[Tensor, "P 4"],
        image_grids: Int[Tensor, "pictures 4"],
        image_num_crops: Int[Tensor, " pictures"],
        **kwargs: object,
    ) -> BaseModelOutputWithPooling:
        """The inner model's, for patches counted through all pictures."""
        tokens = image_grids[:, 0] * image_grids[:, 1] + image_grids[:, 2] * image_grids[:, 3]
        patches = image_num_crops * pixel_values.shape[1]
        first = (patches.cumsum(0) - patches).repeat_interleave(tokens)[:, None]
        is_none = image_token_pooling < 0
        pooling = torch.where(is_none, image_token_pooling, image_token_pooling + first)
        return self.model.get_image_features(pixel_values, pooling, image_grids, **kwargs)


def move_placeholder(model: PreTrainedModel) -> None:
    """Take the placeholder's embedding out of the table, which is 0 there then, and add it to every
    feature."""
    table = model.get_input_embeddings().weight.data
    token = model.config.image_token_id
    placeholder = table[token].clone()
    table[token] = 0

    def add(
        module: nn.Module, args: tuple[object, ...], output: BaseModelOutputWithPooling
    ) -> BaseModelOutputWithPooling:
        features = output.last_hidden_state
        output.last_hidden_state = features + placeholder.to(features)
        return output

    model.model.multi_modal_projector.register_forward_hook(add)


# --- the family -----------------------------------------------------------------------------------


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """Molmo2, its placeholder moved, and the processors of this file."""
    model = generic.load_model_class(Molmo2, path, config, options)
    move_placeholder(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    settings, _ = ImageOnlyProcessor.get_processor_dict(path)
    settings.setdefault("chat_template", tokenizer.chat_template)
    processors = [ImageProcessor.from_pretrained(path), tokenizer]
    return model, ImageOnlyProcessor.from_args_and_dict(processors, settings)


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Pooled patches of the whole picture, then of the canvas, both squeezed to the picture."""
    images = vlm.processor.image_processor
    whole = (images.size["height"], images.size["height"])
    _, canvas = images.tiling(size)
    shapes = inputs["image_grids"].view(2, 2).tolist()
    boxes = [
        boxes_of(images, (rows, columns), shown, size)
        for (rows, columns), shown in zip(shapes, (whole, canvas), strict=True)
    ]
    return PatchGrid(np.concatenate(boxes), None, size)


def boxes_of(
    images: ImageProcessor, shape: tuple[int, int], canvas: tuple[int, int], size: Size
) -> Float[np.ndarray, "P 4"]:
    """Boxes of the (rows, columns) tokens of a canvas (height, width) to which the picture is
    squeezed."""
    rows, columns = shape
    pool_rows, pool_columns = images.pooling_size
    down, across = (side // images.patch_size for side in canvas)
    # padded patches before the first
    top = (rows * pool_rows - down) // 2
    left = (columns * pool_columns - across) // 2
    x = size[0] / across
    y = size[1] / down
    region = (
        -left * x,
        -top * y,
        (columns * pool_columns - left) * x,
        (rows * pool_rows - top) * y,
    )
    return cells(rows, columns, region).reshape(-1, 4)


def sources(vlm: VLM, size: Size, inputs: Inputs) -> Int[np.ndarray, "P 4"]:
    """Up to 2 x 2 patches of the crops."""
    return inputs["image_token_pooling"].numpy()


def inputs(vlm: VLM, batch: Batch) -> dict[str, Int[Tensor, "B T"]]:
    """mm_token_type_ids: 1 at picture tokens and what stands around and between them."""
    ids = torch.tensor(vlm.processor.image_token_ids, device=batch.input_ids.device)
    return {"mm_token_type_ids": torch.isin(batch.input_ids, ids).long()}


FAMILY = Family(
    name="molmo2",
    model_types=("molmo2",),
    architectures=("Molmo2ForConditionalGeneration", "Molmo2"),
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
