"""Random models of types of square.py: codes of a VQ-VAE, SAM's tower."""

from functools import partial

from tests.type_builder import build

MODELS = {kind: partial(build, kind=kind) for kind in ("chameleon",)}
