"""Commands on a model that lies on a pretended GPU, or on two.

    python -m tests.second_device LIBRARY one COMMANDS.json   # [["script.py", "--flag", ...], ...]

There is no GPU where tests run, and what breaks on one is mostly a tensor that was left on the CPU
or on the other device. tests/second_device.cpp is a device that refuses those as a GPU does.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import torch
from accelerate import dispatch_model
from torch.utils import cpp_extension

from vlmdiag.interp import mean_vector
from vlmdiag.model import loading

SOURCE = Path(__file__).with_suffix(".cpp")
ROOT = SOURCE.parents[1]
FIRST, SECOND = "pretend:0", "pretend:1"


def build(library):
    """Compile the device into a library."""
    libraries = cpp_extension.library_paths()
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-std=c++20", "-O0", str(SOURCE), "-o", str(library)]
        + [f"-I{path}" for path in cpp_extension.include_paths()]
        + [flag for path in libraries for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        + ["-ltorch", "-ltorch_cpu", "-lc10"],
        check=True,
    )


def install(library):
    """Make the devices pretend:0 and pretend:1 of this process."""
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend("pretend")
    module = types.ModuleType("pretend")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 2
    module.current_device = torch.ops.second_device.current
    module.set_device = torch.ops.second_device.choose
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = list
    module.empty_cache = module.synchronize = lambda *_: None
    torch._register_device_module("pretend", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    mean_vector.WITHOUT_FLOAT64.add("pretend")


def place(vlm, how):
    """Put a model there: `one`, all of it on the second device; `tower`, vision tower, the upper
    half of the layers and what follows them on the second, by accelerate's hooks as --device_map
    does; `offload`, these and the embeddings on the CPU until they are needed; `cpu`: nothing."""
    if how == "cpu":
        return
    if how == "one":
        vlm.model.to(SECOND)
        return
    second = "cpu" if how == "offload" else SECOND
    parts, model = vlm.parts, vlm.model
    names = {id(module): name for name, module in model.named_modules()}
    half = len(parts.layers) // 2
    placed = {
        names[id(layer)]: FIRST if index < half else second
        for index, layer in enumerate(parts.layers)
    }
    upper = [parts.norm]
    embeddings = model.get_input_embeddings()
    if parts.lm_head.weight is not embeddings.weight:
        upper.append(parts.lm_head)
        if how == "offload":
            upper.append(embeddings)
    if parts.tower is not None:
        upper.append(parts.tower)
    placed |= {names[id(module)]: second for module in upper if id(module) in names}
    devices = {}

    def spread(name, module):
        if name in placed:
            devices[name] = placed[name]
        elif any(not name or part.startswith(f"{name}.") for part in placed):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            devices.update({f"{name}.{tensor}".lstrip("."): FIRST for tensor, _ in own})
            for child, inner in module.named_children():
                spread(f"{name}.{child}".lstrip("."), inner)
        else:
            devices[name] = FIRST

    spread("", model)
    vlm.model = dispatch_model(model, devices, main_device=FIRST, force_hooks=True)


def run(command):
    """A script's exit code, by its path in the repository and its flags."""
    script, *flags = command
    sys.argv = [str(ROOT / script), *flags]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def main():
    library, how, commands = sys.argv[1:]
    install(library)
    prepare = loading.prepare

    def placed(vlm):
        place(vlm, how)
        prepare(vlm)

    loading.prepare = placed
    codes = [run(command) for command in json.loads(Path(commands).read_text())]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
