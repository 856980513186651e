"""Blocks of a model as they ran: kept in one pass, run again one by one to carry gradients of their
output on to their input.

Shapes: B rows (1, but in a tower that reads tiles), N positions, d width, C gradients that are
carried together, R rows for each that are multiplied by its Ā. docs/studies/stethoscope.md, section
5.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmdiag.relevancy.attention_gradient import ROWS, AttentionCall, Rows, attention_of, calls_of
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

Argument = Any  # of a block: tensors, tuples of them, caches, numbers
ModuleOutput = Any  # hidden states, or a tuple that starts with them


@dataclass
class Block:
    """A block as it ran: input with whatever graph led to it, output a leaf."""

    module: nn.Module
    owner: PreTrainedModel  # the model that it belongs to, whose config names the attention
    args: tuple[Argument, ...]  # behind the hidden states
    options: Fields
    input: Float[Tensor, "B N d"]
    output: Float[Tensor, "B N d"]

    def tile(self, index: int) -> Block:
        """The block as it ran on one of its B rows."""
        count = len(self.input)
        if count == 1:
            return self
        row = slice(index, index + 1)

        def row_of(value: Argument) -> Argument:
            """A tensor with one entry for each row, cut; everything else as it is."""
            per_row = torch.is_tensor(value) and value.ndim > 0 and len(value) == count
            return value[row] if per_row else value

        return Block(
            self.module,
            self.owner,
            tuple(row_of(value) for value in self.args),
            {name: row_of(value) for name, value in self.options.items()},
            self.input[row],
            self.output[row],
        )

    def run(
        self, states: Float[Tensor, "1 N d"]
    ) -> tuple[Float[Tensor, "1 N d"], list[AttentionCall]]:
        """(output, attention calls) from given input states, attention cut out of the graph."""
        with calls_of(self.owner) as calls:
            output = self.module(states, *self.args, **self.options)
        return first_of(output), calls

    @torch.no_grad()
    def attention(self, rows: Rows = slice(None)) -> Float[Tensor, "r N"]:
        """Some rows of the mean attention over heads of the block's only attention call."""
        calls = self.run(self.input.detach())[1]
        return calls[0].mean(rows)

    def pull(
        self, d_states: Float[Tensor, "C N d"], rows: Float[Tensor, "C R N"], budget: int
    ) -> Float[Tensor, "C R N"]:
        """Carry C gradients of the output of a block of one row on to its input, in place.

        Returns rows Ā (rule 5 of rules.py). The block runs once; `budget` bytes hold what so many
        gradients at a time are made of, those of one at least.
        """
        with torch.enable_grad():
            states = self.input.detach().requires_grad_()
            output, calls = self.run(states)
        length, width = self.input.shape[1:]
        size = max(1, budget // bytes_of_one(length, width))
        carried = torch.zeros_like(rows)
        for start in range(0, len(d_states), size):
            some = slice(start, start + size)
            d_states[some], of_some = _descended(states, output, calls, d_states[some], rows[some])
            if of_some is not None:
                carried[some] = of_some
        return carried


def bytes_of_one(length: int, width: int) -> int:
    """About what pull() holds for one gradient while it carries it through a block: float32 of the
    widths of an MLP and of the rows of a map."""
    return 4 * length * (12 * width + 4 * ROWS)


def _descended(
    states: Float[Tensor, "1 N d"],
    output: Float[Tensor, "1 N d"],
    calls: Sequence[AttentionCall],
    d_output: Float[Tensor, "C N d"],
    rows: Float[Tensor, "C R N"],
) -> tuple[Float[Tensor, "C N d"], Float[Tensor, "C R N"] | None]:
    """(gradients of the states that a block read, rows Ā) from gradients of its output. Without an
    attention call that the output is made of there is no Ā."""
    # The graph is cut behind each attention call:
    #   states -> q, k, v of call 0 | its output -> q, k, v of call 1 | its output -> output
    # so gradients go from leaf to leaf, the last call first.
    leaves = [states, *(call.output for call in calls)]
    d_leaves = vector_products([output], leaves, [d_output.to(output)[:, None]])
    carried = None
    for index in reversed(range(len(calls))):
        call = calls[index]
        d_call = d_leaves.pop()  # (C, 1, N, H, D)
        if d_call is None:
            continue
        carried, *d_inputs = call.backward(d_call[:, 0], rows)
        through = vector_products([call.query, call.key, call.value], leaves[: index + 1], d_inputs)
        d_leaves = [added(a, b) for a, b in zip(d_leaves, through, strict=True)]
    d_states = d_leaves[0]
    if d_states is None:
        raise ValueError("a block's output is not made of its input")
    return d_states[:, 0], carried


def first_of(output: ModuleOutput) -> Tensor:
    """The hidden states of what a module gives back."""
    return output[0] if isinstance(output, tuple) else output


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, None where both are; None counts as 0."""
    if a is None:
        return b
    return a if b is None else a + b


def vector_products(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], d_outputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients (C, *input.shape) of each input for C gradients (C, *output.shape) of each output,
    all C in one call; None where no graph leads from an input to the outputs."""
    pairs = [
        (output, d_output)
        for output, d_output in zip(outputs, d_outputs, strict=True)
        if output.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [output for output, _ in pairs],
            inputs,
            [d_output for _, d_output in pairs],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
    )


@contextlib.contextmanager
def recording(owner: PreTrainedModel, modules: Sequence[nn.Module]) -> Iterator[list[Block]]:
    """Within the context each of a model's modules is kept as it runs, and the graph is cut after
    it."""
    blocks: list[Block] = []
    hooks: list[RemovableHandle] = []

    def keep(
        module: nn.Module, args: tuple[Tensor, ...], options: Record, output: ModuleOutput
    ) -> object:
        more = {name: value for name, value in options.items() if name != "hidden_states"}
        states = args[0] if args else options["hidden_states"]
        leaf = first_of(output).detach().requires_grad_()
        blocks.append(Block(module, owner, args[1:], more, states, leaf))
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    hook: Callable[..., Any] = keep
    try:
        for module in modules:
            hooks.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        with attention_of(owner):
            yield blocks
    finally:
        for handle in hooks:
            handle.remove()
