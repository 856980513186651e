"""Greedy decoding of answers that are about known: a draft is read in a few passes, and only what
the model says otherwise is decoded token by token.

A pass reads the last token of an answer and behind it the draft's next ones. The model's choice
after each shows whether decoding token by token would have gone on so; the first that differs is
the answer's own, and what was read behind it is masked:

    draft        a dog sits here . It is old
    prompt       -                             the model says "a", as the draft does
    pass 1       a dog sits here . It is old   after "a dog" it says "runs"
    pass 2       runs                          "dog runs" is not in the draft; it says "here"
    pass 3       here                          nor is "runs here"; it says "."
    pass 4       . It is old                   "here ." is, so what follows it is tried

A short draft, such as "yes", is read behind the prompt in the same pass.

Speculative decoding (arXiv 2211.17192) with a fixed text as the draft; to go on behind what the
answer repeats of it is known as prompt lookup decoding. An answer that is given (teacher forcing)
is a draft that is never wrong. Under a capture the prompt is read alone, all rows of a batch go on
by the same number of tokens, and nothing that was wrong stays in the cache, so that probes hear of
each step what they would hear of a pass over its token.

Shapes: B rows of a batch, R rows that go on, n tokens of a pass, V vocabulary, K positions in the
cache.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlmdiag.groups import VISION
from vlmdiag.model.attention import Together, is_capturing, reads_passes, together
from vlmdiag.model.cache import RoomyLayer
from vlmdiag.model.prefix import first_positions

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import Cache
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from vlmdiag.batch import Batch
    from vlmdiag.types import VLM

WIDTH = 64  # most tokens of a draft in a pass
SHORT = 16  # most tokens of a draft that are read with the prompt
REPEAT = 2  # last tokens of an answer that the draft has to have, to go on behind them
# what a pass costs, in tokens of a long pass, as measured on a CPU: for itself, and for each row
PASS_COST = 16
ROW_COST = 8
LIKELY = 0.75  # share of what a pass tries that is likely to be right
NEAR = 1e-4  # logits of a tie in float32

# what was decoded with drafts in this process since counted(): "draft_tokens" of answers, those of
# them that were "draft_agreed", "draft_passes", and "draft_near_ties": tokens whose two best logits
# are so close that plain decoding may have chosen the other
_counts: Counter[str] = Counter()


def counted() -> Counter[str]:
    """What was decoded with drafts in this process since the last call."""
    counts = Counter(_counts)
    _counts.clear()
    return counts


def can_verify(vlm: VLM, cache: Cache | None) -> bool:
    """Whether a pass may read several tokens of which some are dropped: every position sees all
    before it and nothing else, by position ids, and no capture is about passes themselves."""
    return (
        _sees_all_before(vlm)
        and not reads_passes()
        and isinstance(cache, DynamicCache)
        and _has_plain_layers(cache)
    )


def _sees_all_before(vlm: VLM) -> bool:
    """Whether every position sees all before it and nothing else, by position ids."""
    config = vlm.parts.decoder.config
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    if "causal" not in vlm.family.has:
        return False
    if "dynamic" in kinds or "longrope" in kinds:  # angles depend on the longest position
        return False
    # the layers that the config asks for, also where the model's cache is made without it
    return _has_plain_layers(DynamicCache(config=config))


def _has_plain_layers(cache: DynamicCache) -> bool:
    return all(type(layer) in (DynamicLayer, RoomyLayer) for layer in cache.layers)


def ahead(
    vlm: VLM, batch: Batch, drafts: Sequence[Sequence[int]], limit: int
) -> list[list[int]] | None:
    """The drafts of all rows, where they are so short that the pass over the prompts reads them
    too; None where it does not, also where a capture is to see the prompts alone."""
    if is_capturing() or not _sees_all_before(vlm):
        return None
    # in a prompt they may stand for a picture, in an answer they are tokens as all others
    special = {*vlm.tokenizer.all_special_ids, *vlm.tokenizer.get_added_vocab().values()}
    special |= {*vlm.eos_ids, *batch.input_ids[batch.groups == VISION].tolist()}

    def is_word(id: int) -> bool:
        return 0 <= id < vlm.vocabulary and id not in special

    guesses = [list(itertools.takewhile(is_word, draft[: limit - 1])) for draft in drafts]
    return guesses if 0 < max(map(len, guesses)) <= SHORT else None


def as_tensor(guesses: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "B n"]:
    """Guesses of all rows; what is behind those of a shorter row is any word."""
    size = max(map(len, guesses))
    (word, *_) = itertools.chain(*guesses)
    return torch.tensor([[*ids, *[word] * (size - len(ids))] for ids in guesses], device=device)


@dataclass
class _Row:
    """The answer of a row in the making."""

    index: int  # in the batch
    draft: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[Float[Tensor, " n"]] = field(default_factory=list)
    next: int = 0  # where the draft goes on
    width: int = 0  # how much of it is worth trying
    is_done: bool = False

    def guesses(self, limit: int) -> list[int]:
        """What a pass may try: behind the last of it, the pass gives one more token."""
        room = limit - len(self.ids) - 1
        return self.draft[self.next : self.next + min(self.width, room)]

    def take(self, said: Sequence[int], ends: set[int]) -> None:
        """Add what the model said after its last token and after right guesses. ends: ids that end
        an answer, of which none is guessed."""
        self.ids += said
        self.is_done = self.ids[-1] in ends
        self._find(self.next + len(said))

    def _find(self, expected: int) -> None:
        """Where the draft goes on: behind as much as possible of the answer's end, of several
        places behind the one nearest to where it is expected. What agreed so far is likely to go on
        for as long again; a draft that was never wrong, to its end."""
        if self.ids == self.draft[: len(self.ids)]:
            self.next = len(self.ids)
            self.width = WIDTH
            return

        def agreed(place: int) -> int:
            """How many of the last tokens stand before a place of the draft."""
            most = min(place, len(self.ids), WIDTH // 2)
            for n in range(1, most + 1):
                if self.draft[place - n] != self.ids[-n]:
                    return n - 1
            return most

        places = range(REPEAT, len(self.draft))
        self.next = max(places, key=lambda at: (agreed(at), -abs(at - expected)), default=0)
        count = agreed(self.next)
        self.width = 2 * count if count >= REPEAT else 0


@dataclass
class _Cache:
    """Keys and values of the rows that go on."""

    vlm: VLM
    batch: Batch
    cache: DynamicCache
    mask: Int[Tensor, "R K"]  # 0 for padding and for tokens of a draft that were wrong
    rows: list[_Row]
    alike: bool  # rows go on by the same number of tokens, those that are done too
    size: int = 0  # tokens of the last pass
    steps: Together = field(default_factory=lambda: Together([]))  # of the last pass

    def guesses(self, limit: int) -> list[list[int]]:
        """What the next pass tries of each row's draft."""
        if not self.alike:
            return _worth_trying([row.guesses(limit) for row in self.rows])
        of_rows = [[] if row.is_done else row.guesses(limit) for row in self.rows]
        going = [not row.is_done for row in self.rows]
        width = min(map(len, itertools.compress(of_rows, going)))
        return [guessed[:width] for guessed in of_rows]

    def read(self, guesses: Sequence[Sequence[int]]) -> Float[Tensor, "R n V"]:
        """Logits after the last token of each row and after its guesses; what stands behind those
        of a row that has fewer than others means nothing."""
        device = self.mask.device
        self.size = 1 + max(map(len, guesses))
        tokens = [
            [row.ids[-1], *guessed, *[row.ids[-1]] * (self.size - 1 - len(guessed))]
            for row, guessed in zip(self.rows, guesses, strict=True)
        ]
        # positions of the answer that were read before
        read = torch.tensor([len(row.ids) - 1 for row in self.rows], device=device)
        start = self.batch.next_position[[row.index for row in self.rows]] + read
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), self.size)], 1)
        self._keep([1 + len(guessed) for guessed in guesses])
        ids = torch.tensor(tokens, device=device)
        with together() as self.steps:
            return _read(self.vlm, self.batch, self.cache, self.mask, ids, start)

    def counts(self, said: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]]) -> list[int]:
        """How many of the tokens that the model said after the last pass each row takes."""
        counts = [1 + _agreed(*pair) for pair in zip(said, guesses, strict=True)]
        if self.alike:
            going = [not row.is_done for row in self.rows]
            counts = [min(itertools.compress(counts, going))] * len(counts)
        return counts

    def take(self, counts: Sequence[int]) -> None:
        """Of the last pass only the first so many positions of each row are seen from now on; all
        others of rows that go on alike are gone."""
        self._keep(counts)
        if self.alike:
            self.steps.tell(counts[0], self.size)
            wrong = self.size - counts[0]
            if wrong:
                self._cut(self.mask[:, :-wrong])

    def _keep(self, counts: Sequence[int]) -> None:
        column = torch.arange(self.size, device=self.mask.device)
        kept = column < torch.tensor(counts, device=self.mask.device)[:, None]
        self.mask[:, -self.size :] = kept.to(self.mask)

    def go_on(self) -> None:
        """Leave out the rows that are done, and the last positions that none of the others sees."""
        left = [place for place, row in enumerate(self.rows) if not row.is_done]
        if left and (self.alike or len(left) == len(self.rows)):
            return
        self.rows = [self.rows[place] for place in left]
        if not left:
            return
        chosen = torch.tensor(left, device=self.mask.device)
        mask = self.mask[chosen]
        length = 1 + int(mask.any(0).nonzero().max())
        self._cut(mask[:, :length], chosen)

    def _cut(self, mask: Int[Tensor, "R K"], rows: Int[Tensor, " R"] | None = None) -> None:
        """Only the first positions, of some rows, are left: those of a mask."""
        left = first_positions(self.vlm, self.cache, mask.shape[1], rows=rows)
        assert left is not None  # can_verify() has seen to it
        self.mask, self.cache = mask, left


def embedded(vlm: VLM, ids: Int[Tensor, "R n"]) -> Float[Tensor, "R n d"]:
    """What the decoder gets for tokens of answers."""
    # one by one, for a family may give tokens of a prompt other embeddings than generated ones
    embeds: Tensor = vlm.model.get_input_embeddings()(ids.reshape(-1, 1))
    return embeds.view(*ids.shape, -1)


def _read(
    vlm: VLM,
    batch: Batch,
    cache: Cache,
    mask: Int[Tensor, "R K"],
    ids: Int[Tensor, "R n"],
    start: Int[Tensor, " R"],
) -> Float[Tensor, "R n V"]:
    """Logits after each of some tokens of answers. mask: with these tokens; start: the position of
    each row's first one."""
    column = torch.arange(ids.shape[1], device=ids.device)
    output = vlm.model(
        inputs_embeds=embedded(vlm, ids),
        attention_mask=mask,
        position_ids=batch.text_positions(start[:, None] + column),
        past_key_values=cache,
        use_cache=True,
    )
    logits: Tensor = output.logits
    return logits


def read_given(
    vlm: VLM, batch: Batch, output: CausalLMOutputWithPast, answers: Sequence[Sequence[int]]
) -> Float[Tensor, "B N"]:
    """Read answers by teacher forcing, many tokens in a pass. Returns their log-probabilities.

    output: of prefill(), for whose cache can_verify() holds; what is read is added to it. answers:
    ids of each row, one at least. Behind the end of a shorter one, whose last id is repeated, what
    is returned and measured means nothing.
    """
    longest = max(map(len, answers))
    rows = [[*ids, *[ids[-1]] * (longest - len(ids))] for ids in answers]
    ids = torch.tensor(rows, device=vlm.device)
    mask = batch.attention_mask
    logprobs = [_of_chosen(output.logits[:, -1:], ids[:, :1])]
    for at in range(0, longest - 1, WIDTH):
        read = ids[:, at : min(at + WIDTH, longest - 1)]
        size = read.shape[1]
        mask = torch.cat([mask, mask.new_ones(read.shape)], 1)
        with together() as steps:
            logits = _read(vlm, batch, output.past_key_values, mask, read, batch.next_position + at)
        steps.tell(size, size)
        chosen = ids[:, at + 1 : at + 1 + size]
        # row by row, for in float32 a row is as long as n vocabularies
        of_rows = [_of_chosen(*row) for row in zip(logits, chosen, strict=True)]
        logprobs.append(torch.stack(of_rows))
    return torch.cat(logprobs, 1)


def _of_chosen(logits: Float[Tensor, "... V"], ids: Int[Tensor, ...]) -> Float[Tensor, ...]:
    """Log-probabilities of ids, where they are."""
    of_all = logits.float().log_softmax(-1)
    return of_all.gather(-1, ids[..., None].to(logits.device))[..., 0].to(ids.device)


def decode(
    vlm: VLM,
    batch: Batch,
    output: CausalLMOutputWithPast,
    drafts: Sequence[Sequence[int]],
    limit: int,
    stop: Callable[[list[list[int]]], Sequence[bool]] | None = None,
    guesses: list[list[int]] | None = None,
) -> tuple[list[list[int]], list[Float[Tensor, " n"]]]:
    """(ids, their log-probabilities) of each row, as decoding token by token gives them.

    output: of prefill(), for whose cache can_verify() holds; it is kept up to the first row that
    ends. drafts: ids for each row, of any length, [] for none. limit, stop: as in generate().
    guesses: those of ahead(), where that pass read as_tensor() of them behind the prompts.
    """
    ends = vlm.eos_ids
    rows = []
    words = output.logits.shape[-1]
    for index, draft in enumerate(drafts):
        # up to what ends an answer, stands for a picture, or is no word of the model's
        is_over = [id in ends or id == vlm.image_token_id or not 0 <= id < words for id in draft]
        rows.append(_Row(index, list(draft[: [*is_over, True].index(True)])))
    guesses = guesses or [[] for _ in rows]
    size = max(map(len, guesses))
    mask = torch.cat([batch.attention_mask, batch.attention_mask.new_ones(len(rows), size)], 1)
    state = _Cache(vlm, batch, output.past_key_values, mask, rows, is_capturing(), size)
    logits = output.logits[:, -1 - size :]
    ties = torch.zeros((), dtype=torch.long, device=vlm.device)
    while state.rows:
        before = [len(row.ids) for row in rows]
        said = logits.argmax(-1).tolist()
        counts = state.counts(said, guesses)
        for row, ids, count, of_row in zip(state.rows, said, counts, logits, strict=True):
            if row.is_done:
                continue
            row.take(ids[:count], ends)
            values = of_row[:count]
            row.logprobs.append(_of_chosen(values, values.argmax(-1)).to(vlm.device))
            ties += _near_ties(values.float(), of_row.dtype).to(vlm.device)
            row.is_done |= len(row.ids) >= limit
            if state.size:
                _counts["draft_tokens"] += count
                _counts["draft_agreed"] += count - 1
        if stop is not None:
            _stop(rows, before, stop)
        if any(before):
            _counts["draft_passes"] += 1
            state.take(counts)
        elif size:  # of the prompts' pass, whose cache holds no token of an answer but the guesses
            state.take([count - 1 for count in counts])
        state.go_on()
        if state.rows:
            guesses = state.guesses(limit)
            logits = state.read(guesses)
    _counts["draft_near_ties"] += int(ties)
    return ([row.ids for row in rows], [torch.cat(row.logprobs)[: len(row.ids)] for row in rows])


def _agreed(said: Sequence[int], guesses: Sequence[int]) -> int:
    """How many guesses are what the model said in their place."""
    pairs = zip(said, guesses, strict=False)
    return next((n for n, (own, guess) in enumerate(pairs) if own != guess), len(guesses))


def _worth_trying(guesses: list[list[int]]) -> list[list[int]]:
    """The first tokens of each row's guesses that a pass is to try: as many for all rows as make
    the most tokens for their cost, because the shorter rows are filled up."""

    def gain(width: int) -> float:
        right = LIKELY * sum(min(len(guessed), width) for guessed in guesses)
        cost = PASS_COST + len(guesses) * (ROW_COST + 1 + width)
        return (len(guesses) + right) / cost

    width = max(sorted({0, *map(len, guesses)}), key=gain)
    return [guessed[:width] for guessed in guesses]


def _near_ties(logits: Float[Tensor, "n V"], dtype: torch.dtype) -> Int[Tensor, ""]:
    """How many of n choices are between two logits so close that another order of summing may turn
    them: within NEAR in float32, within two steps of a shorter dtype that made them."""
    best, second = logits.topk(2).values.unbind(-1)
    near: float | Tensor = NEAR
    if dtype != torch.float32:
        near = 2 * torch.finfo(dtype).eps * best.abs().log2().floor().exp2()
    return (best - second <= near).sum()


def _stop(
    rows: Sequence[_Row], before: Sequence[int], stop: Callable[[list[list[int]]], Sequence[bool]]
) -> None:
    """End the answers that are complete after a token of the last pass, as if each had come in a
    step of its own. before: how long the answers were."""
    ids = [row.ids for row in rows]
    longest = max(len(of_row) - start for of_row, start in zip(ids, before, strict=True))
    for step in range(1, longest + 1):
        so_far = [of_row[: start + step] for of_row, start in zip(ids, before, strict=True)]
        for row, part, complete in zip(rows, so_far, stop(so_far), strict=True):
            if complete and len(part) <= len(row.ids):
                row.ids = part
                row.is_done = True
