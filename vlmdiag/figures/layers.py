"""What layers and hidden states are called in every file, figure and page: layers are counted from
0, hidden state 0 is the embeddings, and hidden state l + 1 is the output of layer l."""

from __future__ import annotations

LAYER_AXIS = "layer, from 0"
STATE_AXIS = "hidden state (0: embeddings, l + 1: output of layer l)"
OUTPUT_AXIS = "output of layer, from 0 (emb: the embeddings)"


def state_name(state: int) -> str:
    """The hidden state by the layer that puts it out: 'embeddings', 'layer 0'."""
    return f"layer {state - 1}" if state else "embeddings"


def state_tick(state: int) -> str:
    """The same where there is room for a number: 'emb', '0'."""
    return str(state - 1) if state else "emb"


def mean_state_name(state: float) -> str:
    """The same of a mean over hidden states: 'layer 3.5', 'embeddings' for 0, 'layer -0.5' between
    the embeddings and layer 0."""
    return f"layer {state - 1:.3g}" if state else "embeddings"
