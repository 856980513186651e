"""Janus and Janus-Pro (arXiv 2410.13848, 2501.17811), the part that understands pictures: SigLIP on
384 x 384, a connector, a DeepSeek (Llama) text model. The part that draws pictures (VQ codes, their
head) is loaded and not run.

Prompt, from the chat template: system sentence, "<|User|>: ", <begin_of_image>, <image_placeholder>
x 576, <end_of_image>, the question, "<|Assistant|>:". The picture is scaled to 384 along its longer
side and padded to a square, see deepseek_vl.py; one patch of 16 pixels is one token, row-major,
without CLS. A system sentence that the processor would put before the text
(`use_default_system_prompt`) is left to the template and to --system_prompt.

transformers' class keeps get_image_features in its inner model; Janus below hands it on. Tested on
a small random model with a processor made in the tests: tokens against transformers' own processor,
cells by their pixels, logits and greedy answers against transformers' own class. Not tested: we had
no published weights or tokenizers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import JanusForConditionalGeneration, JanusProcessor

from vlmdiag.families import deepseek_vl, generic

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedConfig
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Loaded, LoadOptions


class Janus(JanusForConditionalGeneration):
    """transformers' class with get_image_features."""

    def get_image_features(
        self, pixel_values: Float[Tensor, "B c height width"], **kwargs: object
    ) -> BaseModelOutputWithPooling:
        """The inner model's."""
        return self.model.get_image_features(pixel_values, **kwargs)


LOAD = generic.loader(Janus, JanusProcessor)


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """Janus, its processor without a system sentence of its own."""
    model, processor = LOAD(path, config, **options)
    processor.use_default_system_prompt = False
    return model, processor


FAMILY = replace(
    deepseek_vl.FAMILY,
    name="janus",
    model_types=("janus",),
    architectures=("JanusForConditionalGeneration", "Janus"),
    load=load,
    markup=("<begin_of_image>", "<end_of_image>"),
)
