"""What happens in a vision-language model while it answers? A page: ask about a picture, choose a
token of the answer, look at what it came from.

    python diagnostic_tools/demo_meta.py
    python diagnostic_tools/demo_meta.py --model-name checkpoints/llava-v1.5-7b --part-on-cpu
    python diagnostic_tools/demo_meta.py --host 0.0.0.0 --password_file ~/.stethoscope

Probability of every token with its alternatives, visual contribution, prediction evolution (logit
lens), relevancy over the picture and over words, raw attention by layer and head, which words
looked at chosen patches, two tokens or layers side by side, and all of it as files.
LVLM-Stethoscope's page with its defects left out (README). Everything is computed when it is first
looked at (vlmdiag/stethoscope/analysis.py) and drawn from what is kept (views.py, page.py).

On tiny-llava ask "Describe the image." about the first example: the warm patches of each colour
word lie on the object of that colour, and the last layers agree on every word. A shape word after
it comes from the words before it more than from the picture.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.stethoscope.limits import SESSION_MEMORY, SESSION_MINUTES, TOKEN_LIMIT

ROOT = Path(__file__).resolve().parents[1]
PASSWORD = "STETHOSCOPE_AUTH"  # the environment's user:password
# flags of the model that a calibration depends on
OF_MODEL = (
    "dtype quantize_type base_model vision_tower_path conv_mode system_prompt prompt_template"
    " image_aspect family trust_remote_code"
).split()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model-name",
        "--model-path",
        default=str(ROOT / "checkpoints" / "tiny-llava"),
        help="folder or hub id of the model",
    )
    parser.add_argument(
        "--part-on-cpu",
        action="store_true",
        help="vision tower and connector on the CPU, the rest on the GPU",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any other than this machine's own needs a password",
    )
    parser.add_argument(
        "--port", type=cli.whole(1, 65_535), default=7860, help="where the page listens"
    )
    parser.add_argument(
        "--allowed_host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names under which browsers reach the page, beside this machine's and --host",
    )
    parser.add_argument(
        "--password_file",
        default=None,
        help=f"file with user:password, which the page asks for; or the environment's {PASSWORD}",
    )
    parser.add_argument(
        "--auth",
        default=None,
        help="user:password; other users of this machine can read it in the list of processes",
    )
    parser.add_argument(
        "--session_minutes",
        type=cli.number(0, 10**6, above=True),
        default=SESSION_MINUTES,
        help="for which a visitor's answers are kept after their last use",
    )
    parser.add_argument(
        "--session_memory",
        type=cli.number(0, 10**9, above=True),
        default=SESSION_MEMORY,
        help="MiB that the answers of all visitors may take",
    )
    parser.add_argument(
        "--out_root", default="runs", help="where exports go; with a password they are not kept"
    )
    parser.add_argument(
        "--max-length",
        "--max_new_tokens",
        type=cli.whole(1, TOKEN_LIMIT),
        default=512,
        help=f"most tokens of an answer, at most {TOKEN_LIMIT}",
    )
    parser.add_argument(
        "--do-sample", action="store_true", help="the page starts with sampling switched on"
    )
    parser.add_argument(
        "--temperature",
        type=cli.number(0.1, 2),
        default=1.0,
        help="of sampling, where the page starts",
    )
    parser.add_argument(
        "--top_p", type=cli.number(0.05, 1), default=1.0, help="of sampling, where the page starts"
    )
    parser.add_argument(
        "--num-beams",
        type=cli.positive,
        default=1,
        help="1: a beam has no single row that produced a token",
    )
    parser.add_argument("--load-8bit", action="store_true", help="as --quantize_type int8")
    parser.add_argument("--load-4bit", action="store_true", help="as --quantize_type 4bit")
    parser.add_argument(
        "--cfg-path",
        default=None,
        help=(
            "not needed: a checkpoint's own config.json says all; refused with a line that says so"
        ),
    )
    parser.add_argument("--options", nargs="+", default=None, help="as --cfg-path")
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    if args.cfg_path or args.options:
        parser.error(
            "--cfg-path and --options set up a MiniGPT-4 code base that is not used here: give"
            " --model-name the checkpoint's folder instead"
        )
    if args.num_beams != 1:
        parser.error(
            "--num-beams: beams have no single row that produced a token, so only 1 can be looked"
            " into; try --do-sample for other answers"
        )
    if args.load_8bit + args.load_4bit + (args.quantize_type is not None) > 1:
        parser.error("--load-8bit, --load-4bit and --quantize_type exclude each other")
    if args.load_8bit:
        args.quantize_type = "int8"
    elif args.load_4bit:
        args.quantize_type = "4bit"
    if args.auth is not None and args.password_file is not None:
        parser.error("--auth and --password_file exclude each other")
    return args


def password_of(args: argparse.Namespace) -> str | None:
    """user:password that the page asks for, or None. UsageError where it is no such pair, and where
    a page that other machines reach has none."""
    source, text = password_text(args)
    if text is not None and not all(text.partition(":")[::2]):
        raise UsageError(f"{source}: user:password is wanted")
    if text is None and not loopback(args.host):
        raise UsageError(
            f"--host {args.host} lets other machines in: give a password as well"
            f" (--password_file FILE, or {PASSWORD} in the environment)"
        )
    return text


def password_text(args: argparse.Namespace) -> tuple[str, str | None]:
    """(where it comes from, user:password or None). No child process inherits the environment's."""
    of_environment = os.environ.pop(PASSWORD, None)
    if args.password_file is not None:
        try:
            path = Path(args.password_file).expanduser()
            with open(path, encoding="utf-8") as file:
                text = file.readline(4096).rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = f"cannot be read ({error})"
            raise UsageError(f"--password_file {args.password_file} {reason}") from error
        if path.stat().st_mode & 0o077:
            warn(f"{path} can be read by other users of this machine (chmod 600)")
        return "--password_file", text
    if args.auth is not None:
        warn(
            "other users of this machine can read --auth in the list of processes; use"
            f" --password_file FILE or {PASSWORD} in the environment"
        )
        return "--auth", args.auth
    return PASSWORD, of_environment


def warn(text: str) -> None:
    """A line to whoever started the page."""
    print(f"warning: {text}", file=sys.stderr)


def loopback(host: str) -> bool:
    """Does this address take connections of this machine only?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def to_calibrate(args: argparse.Namespace) -> str:
    """The command that calibrates the hallucination warning of this model, to be run where the page
    was started. Visitors of a page with a password are not at this machine: they see no path."""
    if args.auth is not None:
        return "whoever runs this page runs hallucination_warning.py fit first"
    plain = parse_args([])
    data = ROOT / "data" / "COCO"
    first = ["bash", from_here(ROOT / "data" / "download_coco.sh"), "val", "annotations"]
    if Path(args.model_name).resolve().parent == ROOT / "checkpoints":  # know drawn shapes only
        data = ROOT / "data" / "shapes"
        first = [
            "python",
            from_here(ROOT / "data" / "make_shapes.py"),
            "--out_dir",
            from_here(data),
        ]
    command = ["python", from_here(Path(__file__).with_name("hallucination_warning.py")), "fit"]
    model = args.model_name if not Path(args.model_name).exists() else from_here(args.model_name)
    command += ["--model_path", model]
    command += ["--image_dir", from_here(data / "val2017")]
    command += ["--ann_file", from_here(data / "annotations" / "instances_val2017.json")]
    for name in ("out_root", *OF_MODEL):
        value = getattr(args, name)
        if value != getattr(plain, name):
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    lines = [] if data.exists() else [shlex.join(first)]
    return "\n".join(["run this, and start the page again:", *lines, shlex.join(command)])


def from_here(path: str | Path) -> str:
    """A path as it is written in this folder: relative where it lies inside."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def serve(args: argparse.Namespace) -> None:
    """Load the model, start the page, and wait until it is ended."""
    from vlmdiag.stethoscope import server
    from vlmdiag.stethoscope.analysis import Model, part_on_cpu
    from vlmdiag.stethoscope.sessions import Sessions, private_folder, sweeping
    from vlmdiag.stethoscope.warning_signals import find_calibration

    where = server.listening(args.host, args.port)
    vlm = load_from_args(args, args.model_name)
    try:
        calibration = find_calibration(args.model_name, args.out_root)
    except UsageError as error:
        print(f"hallucination warning off: {error}")
        calibration = None
    model = Model(vlm, calibration, to_calibrate(args))
    if args.part_on_cpu and not part_on_cpu(vlm):
        print("--part-on-cpu: the whole model is on the CPU already")
    hosts = [args.host, *args.allowed_host]
    if not loopback(args.host):
        hosts += [socket.gethostname(), socket.getfqdn()]
    with private_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")  # read when a page is made
        from vlmdiag.stethoscope.page import Page

        memory = int(args.session_memory * 2**20)
        sessions = Sessions(args.session_minutes, memory, folder)
        sweeping(sessions, min(10, 30 * args.session_minutes))
        app = server.Guard(*Page(model, args, sessions).app(args.auth), hosts, sessions)
        name = f"[{args.host}]" if ":" in args.host else args.host
        print(f"{args.model_name}: open http://{name}:{args.port}/", flush=True)
        server.run(app, where)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    args.auth = password_of(args)
    serve(args)
    return 0


if __name__ == "__main__":
    cli.run(main)
