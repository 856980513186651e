"""Janus and Janus-Pro (arXiv 2410.13848, 2501.17811), the part that understands pictures: SigLIP on
384 x 384, a connector, a DeepSeek (Llama) text model. The part that draws pictures (VQ codes, their
head) is loaded and not run.

Prompt, from the chat template: system sentence, "<|User|>: ", <begin_of_image>, <image_placeholder>
x 576, <end_of_image>, the question, "<|Assistant|>:". The picture is scaled to 384 along its longer
side and padded to a square, see models/deepseek_vl.py; one patch of 16 pixels is one token,
row-major, without CLS. A system sentence that the processor would put before the text
(`use_default_system_prompt`) is left to the template and to --system_prompt.

transformers' class keeps get_image_features in its inner model; Janus below hands it on. Checked on
a small random model with a processor made in the tests: tokens against transformers' own processor,
cells by their pixels, logits and greedy answers against transformers' own class. Not checked, for
want of the files: published weights and their tokenizers.
"""

from dataclasses import replace

from transformers import JanusForConditionalGeneration, JanusProcessor

from vlmdiag.families import deepseek_vl, generic


class Janus(JanusForConditionalGeneration):
    def get_image_features(self, pixel_values, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)


def load(path, config, **options):
    model, processor = generic.loader(Janus, JanusProcessor)(path, config, **options)
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
