"""Types that several rooms speak of: JSON's objects, and what the rooms ask of a loaded model
(common.VLM is one, so no room has to import common.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from vlmdiag.batch import Batch
    from vlmdiag.families import Family, Parts, Rotary
    from vlmdiag.model.lens import End
    from vlmdiag.pictures.samples import Pictures, Sample

# An object of a JSON file: a measurement, settings, an annotation, a row of a table. Its values are
# of many types, and whoever reads one knows which: the one Any that signatures have.
Record = dict[str, Any]
Fields = Mapping[str, Any]  # a Record that is only read


class ImageFeatures(Protocol):
    """The output of get_image_features: what the decoder gets in place of the image tokens."""

    pooler_output: list[Tensor]  # (P, d) per sample
    was_tensor: bool  # the model gave one tensor and takes one back
    of_picture: tuple[int, ...]  # its shape but for the first dimension
    deepstack_features: list[list[Tensor]]  # the same for each of the first layers, if any


class VLM(Protocol):
    """A loaded model and what its family file says of it."""

    model: PreTrainedModel
    processor: ProcessorMixin
    family: Family
    path: str
    options: Record  # system_prompt, prompt_template, image_aspect, quantize_type as given

    @property
    def parts(self) -> Parts:
        """The modules of the model that the tools read."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""

    @property
    def device(self) -> torch.device:
        """Where the input embeddings lie."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the input embeddings."""

    @property
    def vocabulary(self) -> int:
        """How many ids the model can read."""

    @property
    def image_token_id(self) -> int:
        """Id that stands for a vision token in a prompt."""

    @property
    def answer_ends(self) -> dict[int, list[str]]:
        """The ids that end an answer, and where each comes from."""

    @property
    def eos_ids(self) -> set[int]:
        """Ids that end an answer."""

    @property
    def end_id(self) -> int:
        """The id that a given answer ends with."""

    @property
    def rotary(self) -> Mapping[int, Rotary]:
        """How positions turn queries and keys of each layer that attends; UsageError for a model
        without rotary positions."""

    @property
    def logit_end(self) -> End:
        """What comes behind the LM head (vlmdiag.model.lens)."""

    def text(self, ids: Sequence[int]) -> str:
        """An answer's text, without the token that ended it."""

    def need(self, *capabilities: str) -> None:
        """UsageError that names a capability which the family lacks."""

    def encode(
        self, samples: Sequence[Sample], images: Sequence[Pictures], strip_system: bool = False
    ) -> Batch:
        """The prompts of samples about their pictures, padded on the left."""

    def vision(self, batch: Batch) -> ImageFeatures:
        """Image features, computed once per picture of the batch."""
