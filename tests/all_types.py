"""Every image-text type of the installed transformers on a small random model: is it measured
rightly, does it refuse in a line, or does it fail?

    python -m tests.all_types                        # all types, a table; 20 minutes on one core
    python -m tests.all_types --types qwen3_5 llama4 --json states.json
    python -m tests.all_types --write                # the table of docs/models.md

right: loaded with the self-check, which compares with the model's own forward on its processor's
complete output, and the shares of its last row are those of eager attention. refuses: one line that
names what the type lacks. fails: an error in one line that names no capability, or (traceback)
none. WRONG: it loads, and the shares differ. not built: no small model of it can be made here.

Each type has a process of its own. Image processors that transformers has on torchvision alone, and
towers of timm, run on stand-ins (tests/stubs).
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
import transformers

import common
from data import make_shapes
from tests import type_builder
from tests.conftest import ROOT, command_module
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.families import module_of
from vlmdiag.groups import VISION
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.probes import GroupMass
from vlmdiag.model.selfcheck import noise_picture, own_inputs
from vlmdiag.pictures.samples import AT_HAND, Sample

STUBS = ROOT / "tests" / "stubs"
PAGE = ROOT / "docs" / "models.md"
BEGIN = "<!-- types: written by python -m tests.all_types --write -->\n"
END = "<!-- end of types -->\n"
SECONDS = 300  # for a type
# what a line says that names a capability
LACKS = re.compile(r"it lacks (.+)|needs (torchvision|timm)|puts no image tokens|no pooler_output")
# types of which tests/random_models has a model: its name there
MADE = {
    "aya_vision": "aya-vision",
    "blip-2": "blip2-opt",
    "deepseek_vl": "deepseek-vl",
    "gemma3": "gemma3",
    "idefics3": "idefics3",
    "instructblip": "instructblip-llama",
    "internvl": "internvl-qwen2",
    "janus": "janus",
    "kosmos-2": "kosmos2",
    "llava": "llava",
    "llava_next": "llava_next",
    "llava_onevision": "llava_onevision",
    "mistral3": "mistral3",
    "molmo2": "molmo2",
    "ovis2": "ovis2",
    "paligemma": "paligemma",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "smolvlm": "smolvlm",
    "vipllava": "vipllava",
}


# --- one type -------------------------------------------------------------------------------------


def build(kind, folder):
    """A small model of a type."""
    if kind in MADE:
        from tests.test_families import BUILDERS

        return BUILDERS[MADE[kind]](folder)
    return type_builder.build(folder, kind)


def rows_of_eager_attention(vlm, inputs):
    """{layer: its last row (H, T)} of one eager pass of the model's own forward."""
    rows = {}
    length = inputs["input_ids"].shape[1]

    def keeping(layer):
        def keep(module, args, output):
            for part in output if isinstance(output, tuple) else ():
                if torch.is_tensor(part) and part.shape[2:] == (length, length):
                    rows[layer] = part[0, :, -1].float()

        return keep

    hooks = [
        module.register_forward_hook(keeping(layer))
        for layer, block in enumerate(vlm.parts.layers)
        for module in block.modules()
    ]
    decoder = vlm.parts.decoder
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        vlm.model(**inputs)
    finally:
        decoder.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    return rows


@torch.inference_mode()
def shares_apart(vlm):
    """(largest difference between our vision shares and those of eager attention, layers compared,
    how sharp these rows are) in the last row of a prompt about a noise picture. Sharp: the largest
    weight of a head in uniform attention's, the mean over heads of the sharpest layer."""
    picture = noise_picture()
    batch = vlm.encode([Sample("0", AT_HAND, "Is there a red circle?")], [picture])
    with capture(vlm, [mass := GroupMass(batch)]):
        generate(vlm, batch, 1)
    rows = rows_of_eager_attention(vlm, own_inputs(vlm, picture, batch.prompts[0]))
    in_picture = batch.groups[0] == VISION
    apart = [
        float((mass.mass[0][layer, 0, : len(row), VISION] - row[:, in_picture].sum(-1)).abs().max())
        for layer, row in rows.items()
    ]
    sharp = [float(row.amax(-1).mean()) * row.shape[-1] for row in rows.values()]
    return max(apart, default=0.0), len(apart), max(sharp, default=0.0)


def commands(shapes, out):
    """{measure: (script, its arguments)} on a set of shapes."""
    coco = (
        *("--image_dir", shapes / "val2017"),
        *("--ann_file", shapes / "annotations" / "captions_val2017.json"),
        *("--max_images", 2, "--batch_size", 2, "--max_new_tokens", 2),
    )
    questions = ("--coco_root", shapes, "--clean_questions_file", shapes / "clean_questions.json")
    run_coco = "diagnostic_tools/run_coco_diagnostics.py"
    return {
        "shares": (run_coco, (*coco, "--no_rope", "--out_root", out / "shares")),
        "RoPE": (run_coco, (*coco, "--out_root", out / "rope")),
        "norms": (
            run_coco,
            (*coco, "--no_rope", "--probe_hidden_norms", "--out_root", out / "norms"),
        ),
        "lens": (
            "scripts/logit_lens/create_logit_lens.py",
            (
                *("--image_folder", shapes / "val2017", "--save_folder", out / "pages"),
                *("--num_images", 2, "--batch_size", 2, "--out_root", out),
            ),
        ),
        "relevancy": (
            "diagnostic_tools/relevancy_maps.py",
            (
                *("--image_folder", shapes / "val2017", "--num_images", 1),
                *("--max_new_tokens", 2, "--out_root", out),
            ),
        ),
        "knockout": (
            "scripts/attention_experiment_curate.py",
            (*questions, "--max_images", 1, "--pairs", "image:last_token", "--out_root", out),
        ),
        "volcano": (
            "visualize/run_volcano_with_image_attention.py",
            (
                *("--input", shapes / "mmhal_shapes.json", "--output-dir", out / "volcano"),
                *("--log", "", "--max_iterations", 1, "--max_new_tokens", 2),
                *("--instance-idx", "0", "--hidden-top-k", 1, "--out_root", out),
            ),
        ),
    }


def ran(vlm, script, folder, arguments):
    """(state of a measure, the line of its refusal or failure)."""
    flags = ("--model_path", folder, "--no_self_check", *arguments)
    module = command_module(ROOT / script)
    err = io.StringIO()
    quiet = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err))
    # the scripts take the model that is loaded
    loads = mock.patch.object(module, "load_from_args", lambda *_, **__: vlm)
    with quiet[0], quiet[1], loads:
        try:
            cli.run(lambda: module.main([str(flag) for flag in flags]))
        except SystemExit as end:
            code = end.code
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
    if code == 0:
        return "yes", ""
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    if code == 2 and lines:
        return "-", lines[-1]
    said = err.getvalue().strip().splitlines() or [""]
    return "FAILS", f"{code}: {said[-1][:300]}"


def examine(kind, shapes, measures=True):
    """All that the table says of one type, as a dict."""
    found = {"type": kind, "prepared by": prepared_by(kind)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / kind
        try:
            build(kind, folder)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return found | {"state": "not built", "said": reason[:300]}
        try:
            vlm = common.load_model(folder)
        except UsageError as error:
            named = LACKS.search(str(error))
            said = " ".join(str(error).replace(str(folder), kind).split())[:300]
            return found | {"state": "refuses" if named else "fails", "said": said}
        apart, compared, sharp = 0.0, 0, 0.0
        if "decoder-only" in vlm.family.has:
            apart, compared, sharp = shares_apart(vlm)
        found |= {
            "file": module_of(vlm.family),
            "grid": "grid" in vlm.family.has,
            "rotary": "rotary" in vlm.family.has,
            "layers": len(vlm.parts.layers),
            "attending": len(vlm.parts.attending),
            "compared": compared,
            "apart": apart,
            "sharp": sharp,
            "state": "right" if apart < 1e-4 else "WRONG",
            "said": "",
        }
        if compared < len(vlm.parts.attending) and "decoder-only" in vlm.family.has:
            found["said"] = f"{compared} of {found['attending']} layers gave eager rows"
        if measures:
            of_measures = {
                name: ran(vlm, script, folder, arguments)
                for name, (script, arguments) in commands(shapes, Path(scratch)).items()
            }
            found["measures"] = {name: state for name, (state, _) in of_measures.items()}
            found["lines"] = {name: line for name, (_, line) in of_measures.items() if line}
    return found


def prepared_by(kind):
    """What prepares a type's pictures, and its tower where that is not transformers' own."""
    if not type_builder.needs_torchvision(kind) or kind in MADE:
        return "PIL"
    backends = type_builder.image_processors_of(kind)
    by = "PIL" if "pil" in backends else "torchvision (stand-in)"
    return f"{by}, tower of timm (stand-in)" if kind in type_builder.TIMM else by


# --- all of them ----------------------------------------------------------------------------------


def in_child(kind, shapes, measures):
    """examine() in a process of its own, so that a crash or a hang ends no more than itself."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        pid = os.fork()
        if pid == 0:
            os.close(1)
            os.open(os.devnull, os.O_WRONLY)
            try:
                found = examine(kind, shapes, measures)
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                place = f"{Path(where.filename).name}:{where.lineno}"
                found = {"state": "fails (traceback)", "said": f"{said} at {place}"}
            answer.write_text(json.dumps(found))
            os._exit(0)
        end = time.monotonic() + SECONDS
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > end:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
                return {"type": kind, "state": "fails (traceback)", "said": f"over {SECONDS} s"}
            time.sleep(0.05)
        if not answer.exists():
            return {"type": kind, "state": "fails (traceback)", "said": "the process died"}
        return {"type": kind, "prepared by": prepared_by(kind)} | json.loads(answer.read_text())


def on_stand_ins(kinds, measures):
    """The states of types that need torchvision, from a process that has the stand-ins."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        path = os.pathsep.join([str(ROOT), str(STUBS)])
        more = [] if measures else ["--no_measures"]
        subprocess.run(
            [sys.executable, "-m", "tests.all_types", "--json", answer, *more, "--types", *kinds],
            env=os.environ | {"PYTHONPATH": path},
            cwd=ROOT,
            check=True,
        )
        return json.loads(answer.read_text())


def states_of(kinds, measures=True):
    """[what is found of each type], in the order of `kinds`."""
    has_torchvision = find_spec("torchvision") is not None
    here = [
        kind
        for kind in kinds
        if has_torchvision or kind in MADE or not type_builder.needs_torchvision(kind)
    ]
    there = [k for k in kinds if k not in here]
    with tempfile.TemporaryDirectory() as scratch:
        shapes = Path(scratch) / "shapes"
        if measures:
            sizes = ["--num_images", "6", "--num_train", "0", "--num_workers", "1"]
            with contextlib.redirect_stdout(io.StringIO()):
                make_shapes.main(["--out_dir", str(shapes), *sizes])
                examine("llava", shapes)  # imports once what every child needs
        found = []
        for kind in here:
            found.append(in_child(kind, shapes, measures))
            print(line_of(found[-1]), flush=True)
    if there:
        found += on_stand_ins(there, measures)
    return sorted(found, key=lambda state: kinds.index(state["type"]))


MEASURES = tuple(commands(Path(), Path()))


def line_of(found):
    """A line for people."""
    measures = found.get("measures", {})
    run = [name for name, state in measures.items() if state == "yes"]
    failed = [name for name, state in measures.items() if state == "FAILS"]
    words = [found["type"], found["state"]]
    if "grid" in found:
        words.append("grid" if found["grid"] else "no grid")
        words.append(f"{found['attending']} of {found['layers']} layers attend")
    if run:
        words.append("runs " + " ".join(run))
    if failed:
        words.append("FAILS " + " ".join(failed))
    return " | ".join([*words, found.get("said", "")]).rstrip(" |")


def table(states):
    """The table of docs/models.md and its totals."""
    counts = {}
    for found in states:
        counts[found["state"]] = counts.get(found["state"], 0) + 1
    grids = sum(bool(found.get("grid")) for found in states if found["state"] == "right")
    total = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    text = f"transformers {transformers.__version__}: {len(states)} types, {total};"
    text += f" {grids} with a grid.\n\n"
    measures = " | ".join(MEASURES)
    text += f"| type | state | file | grid | layers that attend | {measures} | pictures by |\n"
    text += "|---" * (6 + len(MEASURES)) + "|\n"
    for found in states:
        measures = found.get("measures", {})
        cells = [found["type"], found["state"]]
        if "file" in found:
            attending, layers = found["attending"], found["layers"]
            cells += [
                f"`{found['file']}.py`",
                "yes" if found["grid"] else "-",
                "all" if attending == layers else f"{attending} of {layers}",
                *(measures.get(name, "") for name in MEASURES),
            ]
        else:
            cells += [""] * (3 + len(MEASURES))
        text += "| " + " | ".join([*cells, found.get("prepared by", "")]) + " |\n"
    text += "\nWhat those that are not right say:\n\n"
    for found in states:
        if found["state"] != "right":
            said = found["said"].replace("|", "\\|")
            text += f"- {found['type']} ({found['state']}): {said}\n"
    return text


def main(argv=None):
    """Exit code 0 where no type is wrong or ends in a traceback, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", choices=list(type_builder.NAMES), metavar="TYPE")
    parser.add_argument("--json", type=Path, help="write what is found here too")
    parser.add_argument("--no_measures", action="store_true", help="loading and shares only")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    states = states_of(args.types or list(type_builder.NAMES), not args.no_measures)
    if args.json:
        args.json.write_text(json.dumps(states, indent=1))
    if args.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(before + BEGIN + table(states) + END + rest.split(END)[1])
    elif not args.types:
        print(table(states))
    return int(any(found["state"] in ("WRONG", "fails (traceback)") for found in states))


if __name__ == "__main__":
    sys.exit(main())
