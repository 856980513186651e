"""Prompts of several samples as one batch, padded on the left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS, VISION
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.pictures.samples import Sample


@dataclass
class Batch:
    """Prompts of several samples, padded on the left. T: longest prompt. On the model's device,
    except grids and image inputs."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    position_ids: Int[Tensor, "... B T"]  # as the model takes them: (B, T) or (axes, B, T)
    next_position: Int[Tensor, " B"]  # position of the first generated token
    groups: Int[Tensor, "B T"]  # index into GROUPS, PAD for padding
    # per picture, those of a sample one after the other (of_sample()); one picture each but where a
    # sample has a chat: pixel_values and what else get_image_features takes
    image_rows: list[dict[str, Tensor]]
    pictures: list[bytes]  # per picture: digest of its image inputs; the tower runs once for each
    prompts: list[str]  # text as given to the processor
    lengths: list[int]  # prompt length without padding
    grids: list[PatchGrid | None]  # per picture
    samples: list[Sample]
    # what else the processor says of each token and the model's forward takes, such as its type; 0
    # for padding and for what is generated
    token_inputs: dict[str, Int[Tensor, "B T"]] = field(default_factory=dict)
    # where a sample has a chat, else None: the number of the picture in its sample that a vision
    # token or a mark around it belongs to, -1 for other tokens; the turn of each token, from 0, the
    # answer's marks of its role in the one behind the last, -1 for what is before them (BOS, system
    # prompt) and for padding
    numbers: Int[Tensor, "B T"] | None = None
    turns: Int[Tensor, "B T"] | None = None

    def of_sample(self, row: int) -> slice:
        """Where the pictures of a sample are among those of the batch."""
        counts = [1 if sample.chat is None else len(sample.chat.images) for sample in self.samples]
        return slice(sum(counts[:row]), sum(counts[: row + 1]))

    def in_pictures(self) -> Iterator[Bool[Tensor, " T"]]:
        """Where the vision tokens of each picture of the batch are in its row."""
        for row, of_row in enumerate(self.groups == VISION):
            pictures = self.of_sample(row)
            for number in range(pictures.stop - pictures.start):
                of_picture = of_row
                if self.numbers is not None:
                    of_picture = of_row & (self.numbers[row] == number)
                yield of_picture

    @property
    def image_inputs(self) -> dict[str, Tensor]:
        """The image inputs of all samples, joined as the model's forward takes them."""
        return joined(self.image_rows)

    def repeat(self, count: int) -> Batch:
        """A batch of one prompt, `count` times."""
        return replace(
            self,
            input_ids=self.input_ids.expand(count, -1),
            attention_mask=self.attention_mask.expand(count, -1),
            position_ids=self.position_ids.expand(*self.position_ids.shape[:-2], count, -1),
            next_position=self.next_position.expand(count),
            groups=self.groups.expand(count, -1),
            image_rows=self.image_rows * count,
            pictures=self.pictures * count,
            prompts=self.prompts * count,
            lengths=self.lengths * count,
            grids=self.grids * count,
            samples=self.samples * count,
            token_inputs={
                name: value.expand(count, -1) for name, value in self.token_inputs.items()
            },
            numbers=None if self.numbers is None else self.numbers.expand(count, -1),
            turns=None if self.turns is None else self.turns.expand(count, -1),
        )

    def spans(self, row: int) -> dict[str, list[list[int]]]:
        """{group: [[start, end), ...]} over the prompt of one sample without its padding."""
        return {GROUPS[code]: spans for code, spans in self._runs(row, self.groups).items()}

    def _runs(self, row: int, of_tokens: Int[Tensor, "B T"]) -> dict[int, list[list[int]]]:
        """{code: [[start, end), ...]} of equal codes over a prompt without its padding."""
        codes = of_tokens[row, of_tokens.shape[1] - self.lengths[row] :].tolist()
        runs: dict[int, list[list[int]]] = {}
        start = 0
        for end in range(1, len(codes) + 1):
            if end == len(codes) or codes[end] != codes[start]:
                runs.setdefault(codes[start], []).append([start, end])
                start = end
        return runs

    def parts(self, row: int) -> Record:
        """Where the pictures and turns of a chat are in its prompt without the padding, {} without
        a chat. pictures: [{"turn", "spans" of its vision tokens}]; turns: [{"role", "spans"}], the
        first of them what is before the first turn, with the role "", the last the answer's."""
        chat = self.samples[row].chat
        if chat is None or self.numbers is None or self.turns is None:
            return {}
        numbers = self.numbers.where(self.groups == VISION, -1)
        of_pictures, of_turns = self._runs(row, numbers), self._runs(row, self.turns)
        places = [n for n, turn in enumerate(chat.turns) for part in turn.parts if part is None]
        roles = ["", *(turn.role for turn in chat.turns), "assistant"]
        return {
            "pictures": [
                {"turn": turn, "spans": of_pictures.get(number, [])}
                for number, turn in enumerate(places)
            ],
            "turns": [
                {"role": role, "spans": of_turns.get(number - 1, [])}
                for number, role in enumerate(roles)
            ],
        }

    def places(self, row: int) -> tuple[Record, dict[str, np.ndarray]]:
        """Where the vision tokens of a sample lie, for a run: ({"grid": {"shape", "size"}},
        {"boxes": (P, 4)}); of a chat {"grids": one for each picture} and beside the boxes, in
        pixels of their own picture, "picture": (P,) its number. None and no array where it is
        unknown."""
        grids = self.grids[self.of_sample(row)]
        known = [grid for grid in grids if grid is not None]
        of_grids = [{"shape": grid.shape, "size": grid.size} for grid in known]
        if self.samples[row].chat is None:
            arrays = {"boxes": known[0].boxes} if known else {}
            return {"grid": of_grids[0] if known else None}, arrays
        if len(known) < len(grids):
            return {"grid": None, "grids": None}, {}
        counts = [len(grid.boxes) for grid in known]
        return {"grid": None, "grids": of_grids}, {
            "boxes": np.concatenate([grid.boxes for grid in known]),
            "picture": np.repeat(np.arange(len(known), dtype=np.int32), counts),
        }

    def text_positions(self, positions: Int[Tensor, "R n"]) -> Int[Tensor, "... R n"]:
        """Positions of text behind prompts in the form of position_ids: (R, n), or the same on
        every axis, (axes, R, n)."""
        if self.position_ids.ndim == 2:
            return positions
        return positions[None].expand(len(self.position_ids), -1, -1)

    def vision_positions(self, row: int) -> Int[Tensor, " P"]:
        """Positions of the vision tokens in the padded row."""
        return (self.groups[row] == VISION).nonzero()[:, 0]

    def one_picture(self) -> None:
        """UsageError where a sample has several pictures or turns, for measures of one question
        about one picture."""
        if self.numbers is not None:
            raise UsageError("this measure is of one question about one picture each")


def joined(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Image inputs of several samples as one batch, along their first dimension.

    What differs in another size (the number of tiles, pictures of several sizes, the text that a
    connector reads) is filled up with 0 at its end, as transformers' processors do. A sample may
    lack what others have, such as tiles.
    """
    inputs = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        tensors = [row[name] for row in rows if name in row]
        shapes = [tensor.shape[1:] for tensor in tensors]
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        inputs[name] = torch.cat([_filled_up(tensor, largest) for tensor in tensors])
    return inputs


def _filled_up(tensor: Tensor, shape: list[int]) -> Tensor:
    """A tensor (n, ...) with zeros at the end of each dimension up to (n, *shape)."""
    if list(tensor.shape[1:]) == shape:
        return tensor
    padding: list[int] = []  # from the last dimension to the first: (before, after)
    for size, wanted in zip(reversed(tensor.shape[1:]), reversed(shape), strict=True):
        padding += [0, wanted - size]
    return nn.functional.pad(tensor, padding)
