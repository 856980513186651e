"""Random BLIP-2 and InstructBLIP by text model."""

from functools import partial

from tests.building import build_blip

MODELS = {
    f"{kind}-{text}": partial(build_blip, instruct=kind == "instructblip", text=text)
    for kind, text in (
        ("blip2", "opt"),
        ("blip2", "t5"),
        ("instructblip", "llama"),
        ("instructblip", "t5"),
    )
}
