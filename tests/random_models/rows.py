"""Random models of types of rows.py: half-split and interleaved rotary positions, experts by the
type of a token, a hybrid decoder, pictures that see themselves in both directions."""

from functools import partial

from tests.type_builder import build

KINDS = ("glm4v", "ernie4_5_vl_moe", "qwen3_5", "gemma4", "hunyuan_vl")
MODELS = {kind: partial(build, kind=kind) for kind in KINDS}
