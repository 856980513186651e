"""Random LLaVA in its authors' own layout, its tower in a folder beside it: the plain one and the
two of Beyond Semantics."""

from functools import partial

from tests.test_llava_original import make_source, to_original, write_tower


def build(folder, variant):
    source = make_source(folder.parent / f"{folder.name}-source", variant)
    write_tower(source, folder.parent / f"{folder.name}-tower")
    return to_original(source, folder, tower=False, mm_vision_tower=f"openai/{folder.name}-tower")


MODELS = {
    f"llava_original-{variant}": partial(build, variant=variant)
    for variant in ("base", "normWmean", "multilayerNorm")
}
