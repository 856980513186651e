"""Random Qwen2.5-VL."""

from conftest import build_qwen

MODELS = {"qwen2_5_vl": build_qwen}
