"""Random LLaVA: with as many key as query heads, and with grouped queries."""

from conftest import build_llava

MODELS = {"llava": build_llava, "llava-gqa": lambda folder: build_llava(folder, num_key_value_heads=2)}
