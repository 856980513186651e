"""Hidden states of swapped questions at the last prompt token, and the answers. Section 8 of our study: pictures go through the vision tower once, all prompts
about one share the keys and values of their beginning, and one transfer a batch takes the states into a memory-mapped array."""

import math
from types import SimpleNamespace

import numpy as np
import torch
from pairs import OPPOSITE, SPELLED, WORDS, picture_at, read_answer

from capturing import LastStates, answer_ids, capture, embeddings, first_positions, generate, padded_after, shared_start
from samples import Sample


def open_states(path, shape, dtype):
    """A memory-mapped array of a shape (n, prompts, layers, d), made on disk where it is not there yet; ValueError for another shape."""
    if path.exists():
        states = np.lib.format.open_memmap(path, mode="r+")
        if states.shape != tuple(shape) or states.dtype != np.dtype(dtype):
            raise ValueError(f"{path} has shape {states.shape} and {states.dtype}, wanted {tuple(shape)} and {dtype}")
        return states
    path.parent.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(path, mode="w+", shape=tuple(shape), dtype=dtype)


def word_ids(vlm, prompt):
    """{category: ids of the first token of every spelling of its words after this prompt}."""
    found = {}
    for category, words in WORDS.items():
        spelled = {form for word in words for form in (word, word.capitalize())}
        found[category] = sorted({answer_ids(vlm, prompt, form)[0] for form in spelled})
    return found


class Prompts:
    """Asks several questions about each picture of a batch, one round of questions at a time; the first round gives the beginning that the others share."""

    def __init__(self, vlm, images, layers, max_new_tokens):
        self.vlm, self.images, self.layers, self.limit = vlm, images, layers, max_new_tokens
        self.features, self.start, self.cache, self.prefix = None, 0, None, None

    def __call__(self, rows, questions):
        """[(states (layers, d), text, log-probabilities of the first step (V,), prompt), ...] of some pictures (rows), a question each."""
        vlm = self.vlm
        batch = vlm.encode([Sample(str(row), None, question) for row, question in zip(rows, questions, strict=True)], [self.images[row] for row in rows])
        if self.features is None:
            self.features = vlm.vision(batch).pooler_output
        start = shared_start([batch])
        batch = padded_after(batch, start) if start else batch
        chosen, cache = torch.tensor(rows, device=vlm.device), None
        if self.cache is not None and start == self.start and torch.equal(batch.input_ids[:, :start], self.prefix[chosen]):
            cache = first_positions(vlm, self.cache, start, rows=chosen)
        embeds = embeddings(vlm, batch, SimpleNamespace(pooler_output=[self.features[row] for row in rows]))
        with capture(vlm, [probe := LastStates(self.layers)]):
            found = generate(vlm, batch, self.limit, cache=cache, embeds=embeds)
        if self.cache is None and start and len(rows) == len(self.images):
            self.cache, self.start, self.prefix = first_positions(vlm, found.cache, start), start, batch.input_ids[:, :start]
        texts = [vlm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found.ids]
        return [(probe.states[k], texts[k], found.first[k], batch.prompts[k]) for k in range(len(rows))]


def make_process(vlm, layers, states, quad_states, quad_of, max_new_tokens):
    """process([(item, picture), ...]) -> [(record, {}), ...]; writes the states of item.row, and of its quad, before the record is committed."""

    @torch.inference_mode()
    def process(loaded):
        items, images = zip(*loaded, strict=True)
        ask, rows = Prompts(vlm, images, layers, max_new_tokens), list(range(len(items)))
        rounds = [ask(rows, [item.pair["questions"][k] for item in items]) for k in (0, 1)]
        kept = torch.stack([torch.stack([found[0] for found in one]) for one in rounds], 1).float().cpu().numpy()  # (B, 2, layers, d)
        for row, item in enumerate(items):
            states[item.row] = kept[row]
        quads = [(row, quad_of[item.id]) for row, item in enumerate(items) if item.id in quad_of]
        if quads:
            own = [row for row, _ in quads]
            vertical = [ask(own, [quad["questions"][k] for _, quad in quads]) for k in (0, 1)]
            both = torch.stack([torch.stack([found[0] for found in one]) for one in vertical], 1).float().cpu().numpy()
            for k, (row, quad) in enumerate(quads):
                quad_states[quad["row"], :2], quad_states[quad["row"], 2:] = both[k], kept[row]
        for part in (states, quad_states):
            if part is not None:
                part.flush()
        return [record(item, [one[row] for one in rounds]) for row, item in enumerate(items)]

    def record(item, found):
        pair, out = item.pair, {}
        expected = (pair["category"], OPPOSITE[pair["category"]])
        for name, want, (_, text, first, prompt) in zip(("orig", "swap"), expected, found, strict=True):
            said, note = read_answer(text, pair["category"])
            ids = word_ids(vlm, prompt)
            margin = (first[ids[want]].logsumexp(0) - first[ids[OPPOSITE[want]]].logsumexp(0)).item()
            out |= {f"pred_{name}": text, f"read_{name}": said, f"note_{name}": note, f"is_correct_{name}": said == want}
            out[f"margin_{name}"] = margin if math.isfinite(margin) else None
        facts = {name: pair[name] for name in ("index", "question_id", "image_id", "group", "category", "split")}
        return facts | out | {"questions": pair["questions"], "answers": [SPELLED.get(word, word) for word in expected], "caption": out["pred_orig"]}, {}

    return process


def load_picture(path):
    """load(item) -> (item, picture) for a table."""
    return lambda item: (item, picture_at(path, item.pair["offset"]))
