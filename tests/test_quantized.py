"""--quantize_type 4bit and int8 on every family, by bitsandbytes on a CPU; skipped where it is not
installed."""

import pytest
import torch

import common
from tests.conftest import ROOT, in_process
from tests.test_families import BUILDERS, NAMES
from vlmdiag.cli import UsageError
from vlmdiag.model import precision
from vlmdiag.model.decoding import generate
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample
from vlmdiag.relevancy import methods as attribution
from vlmdiag.relevancy.gradients import trace

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.types

KINDS = ("4bit", "int8")


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    return BUILDERS[request.param](tmp_path_factory.mktemp("quantized") / request.param)


def restored(layer):
    """The weight of a quantised layer as numbers."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    # moved at the first pass
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.float() * scales[:, None] / 127


def rounded_layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__module__.startswith("bitsandbytes.")
    }


def encoded(vlm, picture):
    return vlm.encode([Sample("0", None, "What color is the circle?")], [picture])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_computes_with_rounded_weights_and_nothing_else_is_rounded(
    folder, kind, pictures
):
    """4 bits: the logits of the plain model with the rounded weights in it. int8 rounds what enters
    a layer too: each layer by itself."""
    plain = common.load_model(folder, self_check=False)
    vlm = common.load_model(folder, quantize_type=kind)
    layers = rounded_layers(vlm.parts.decoder)
    everywhere = rounded_layers(vlm.model)
    linear = {
        name
        for name, module in plain.parts.decoder.named_modules()
        if type(module) is torch.nn.Linear
    }
    # transformers leaves a T5's wo alone
    assert set(layers) <= linear
    assert all(name.endswith(("lm_head", ".wo")) for name in linear - set(layers))
    # a T5's encoder reads the prompt
    assert len(everywhere) == len(layers) or "decoder-only" not in vlm.family.has
    seen = []
    hooks = [
        layer.register_forward_hook(
            lambda module, args, output: seen.append((module, args[0], output))
        )
        for layer in everywhere.values()
    ]
    rounded = prefill(vlm, encoded(vlm, pictures[1])).logits[0, -1].float()
    for hook in hooks:
        hook.remove()
    assert len({id(module) for module, *_ in seen}) == len(everywhere)
    before = prefill(plain, encoded(plain, pictures[1])).logits[0, -1].float()
    for name, layer in everywhere.items():
        plain.model.get_submodule(name).weight.copy_(restored(layer))
    exact = prefill(plain, encoded(plain, pictures[1])).logits[0, -1].float()
    size = exact.abs().max()
    assert (rounded - before).abs().max() > 1e-3 * size, "rounding shows"
    if kind == "4bit":
        assert (rounded - exact).abs().max() < 1e-4 * size
    for module, given, output in seen:
        expected = torch.nn.functional.linear(given.float(), restored(module).float(), module.bias)
        assert (output - expected).norm() < (1e-4 if kind == "4bit" else 0.03) * expected.norm()
    assert len(generate(vlm, encoded(vlm, pictures[1]), 3).ids[0]) >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_through_rounded_weights(tmp_path, kind, pictures):
    from tests.random_models import mplug_owl2

    path = mplug_owl2.MODELS["mplug_owl2"](tmp_path / "model")
    plain = common.load_model(path, self_check=False)
    vlm = common.load_model(path, quantize_type=kind)
    for name, layer in rounded_layers(vlm.parts.decoder).items():
        plain.parts.decoder.get_submodule(name).weight.data.copy_(restored(layer))
    exact, rounded = (
        attribution.relevancy(trace(model, encoded(model, pictures[1]), [40, 41]), [0, 1])
        for model in (plain, vlm)
    )
    for name in ("rows", "image", "cells"):
        expected, other = (torch.from_numpy(getattr(result, name)) for result in (exact, rounded))
        assert expected.abs().max() > 0
        if kind == "4bit":
            assert torch.allclose(expected, other, atol=1e-4 * float(expected.abs().max()))
        else:
            assert torch.corrcoef(torch.stack([expected.flatten(), other.flatten()]))[0, 1] > 0.95


def test_a_script_runs_on_rounded_weights_and_does_not_go_on_with_others(folders, tmp_path):
    make = in_process(ROOT / "data" / "make_shapes.py")
    coco = in_process(ROOT / "diagnostic_tools" / "run_coco_diagnostics.py")
    assert (
        make(
            "--num_images",
            "3",
            "--num_train",
            "0",
            "--num_workers",
            "1",
            "--out_dir",
            tmp_path / "set",
        ).returncode
        == 0
    )
    where = [
        "--image_dir",
        tmp_path / "set" / "val2017",
        "--ann_file",
        tmp_path / "set" / "annotations" / "captions_val2017.json",
        "--out_root",
        tmp_path,
    ]
    flags = ["--model_path", folders["llava"], *where, "--max_images", 2, "--max_new_tokens", 2]
    done = coco(*flags, "--quantize_type", "int8")
    assert done.returncode == 0 and "MatMul8bit" not in done.stderr, done.stderr
    for other in ([], ["--quantize_type", "4bit"]):
        again = coco(*flags, *other, "--max_images", 3)
        assert again.returncode == 2, again.stderr
        assert "dtype" in again.stderr, again.stderr
        assert "float32 int8" in again.stderr, again.stderr


def test_without_the_library_the_message_names_it(folders, monkeypatch):
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        common.load_model(folders["llava"], quantize_type="4bit")
