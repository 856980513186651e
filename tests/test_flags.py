"""Every command's flags: numbers that make no sense are refused with the flag's name, every flag
has words of its own, and one thing has one flag."""

import argparse
import contextlib
import io
import math

import pytest

from tests.conftest import ROOT, command_module
from vlmdiag import cli
from vlmdiag.swap import saved

pytestmark = pytest.mark.fast

FOLDERS = "diagnostic_tools swap_analysis visualize scripts data checkpoints benchmarks".split()
ODD = ("nan", "inf", "-inf", "-1", "0", "1e30", "1" + "0" * 30, "x", "")
# flags that an odd number is a value of: 0 is a start, a share, "none" or "all" for many
INFINITE = {"stop_after"}
WORDS = {"device", "device_map", "pairs", "shard"}
# positions may be shifted either way, or not at all; nats may be below 0
SIGNED = {"delta_steps", "dependence"}


class Declared(Exception):
    """A parser that is complete."""


def commands():
    """Paths of all commands."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    texts = {file: file.read_text() for file in files}
    own = [file for file in files if "cli.run(main)" in texts[file]]
    return [str(file.relative_to(ROOT)) for file in own if "cli.call(" not in texts[file]]


@pytest.fixture
def parser_of(monkeypatch):
    """parser_of(command) -> its parser, as it is when arguments are parsed."""

    def get(path):
        def stop(parser, *_, **__):
            raise Declared(parser)

        with monkeypatch.context() as patch:
            patch.setattr(cli._Parser, "parse_known_args", stop)
            module = command_module(ROOT / path)
            parse = getattr(module, "parse_args", None) or module.main
            with pytest.raises(Declared) as caught:
                parse([])
        return caught.value.args[0]

    return get


def refusal(action, parser, text):
    """The line by which a parser refuses a flag's value, None where it takes it."""
    alone = type(parser)(prog="command")
    alone._add_action(action)
    action.required = False
    out = io.StringIO()
    with contextlib.redirect_stderr(out), pytest.raises(SystemExit) as end:
        alone.parse_args([f"{action.option_strings[0]}={text}"])
        return None
    assert end.value.code == 2
    return out.getvalue()


def takes(action, text):
    """Whether a value is one that the flag's type says it takes."""
    try:
        value = action.type(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return action.choices is None or value in action.choices


def test_there_are_commands():
    assert len(commands()) >= 45


@pytest.mark.parametrize("path", commands())
def test_numbers_that_make_no_sense_are_refused_with_the_flags_name(path, parser_of):
    parser = parser_of(path)
    for action in parser._actions:
        if action.type is None or not action.option_strings or action.dest in WORDS:
            continue
        assert action.type not in (int, float) or action.choices, (path, action.dest)
        name = action.option_strings[0]
        for text in ODD:
            if takes(action, text):
                value = action.type(text)
                assert not math.isnan(value), (path, name)
                assert math.isfinite(value) or action.dest in INFINITE, (path, name)
                assert value >= 0 or action.dest in SIGNED, (path, name, text)
                assert value < 1e13 or action.dest in INFINITE, (path, name)
                continue
            line = refusal(action, parser, text)
            assert line is not None and name in line and line.count("\n") == 1, (path, name, text)


@pytest.mark.parametrize("path", commands())
def test_every_flag_has_words_of_its_own(path, parser_of):
    for action in parser_of(path)._actions:
        said = (action.help or "").lower()
        assert said and said != action.dest.replace("_", " "), (path, action.dest)


# another spelling of a flag -> the flag that every command has for it
SPELLINGS = {
    "--image_folder": "--image_dir",
    "--num_images": "--max_images",
    "--max_questions": "--max_images",
    "--run_dirs": "--run_dir",
    "--output_dir": "--out_dir",
    "--save_folder": "--out_dir",
    "--save_path": "--out_dir",
    "--questions": "--question_file",
    "--clean_questions_file": "--question_file",
    "--model_name": "--model_path",
    "--max_length": "--max_new_tokens",
}


@pytest.mark.parametrize("path", commands())
def test_the_same_thing_has_the_same_flag(path, parser_of):
    for action in parser_of(path)._actions:
        for spelling, flag in SPELLINGS.items():
            if spelling in action.option_strings and path != "data/make_shapes.py":
                assert flag in action.option_strings, (path, spelling)


def test_flags_that_measure_need_no_number_beyond_their_bounds():
    assert cli.positive("1") == 1
    assert cli.share("0.5") == 0.5
    assert cli.whole(0)("0") == 0
    for kind, texts in ((cli.share, ("1.01", "-0.01")), (cli.positive, ("0", "1.5", "1e3"))):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError):
                kind(text)


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:x", "gpu", ""])
def test_an_unknown_device_is_refused_with_the_flags_name(name, capsys):
    parser = cli.parser(None)
    parser.add_argument("--device", type=cli.device, help="where")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--device", name])
    assert end.value.code == 2 and "--device" in capsys.readouterr().err


def test_a_default_that_says_nothing_is_not_shown():
    parser = cli.parser(None)
    parser.add_argument("--needed", required=True, help="first")
    parser.add_argument("--open", help="second")
    parser.add_argument("--number", default=3, help="third")
    text = parser.format_help()
    assert "None" not in text and "(default: 3)" in text


def test_the_plotting_scripts_of_saved_results_share_their_flags():
    with pytest.raises(SystemExit):
        saved.parse_args("doc", ["--help"])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--run_dirs", "a"], "--run_dirs; did you mean --run_dir?"),
        (["--run_dri=a", "--max_images", "3"], "--run_dri; did you mean --run_dir?"),
        (["--max_image", "3"], "--max_image; did you mean --max_images?"),
        (["--nothing_like_it", "3"], "--nothing_like_it; the following"),
    ],
)
def test_a_mistyped_flag_is_named_while_another_is_missing(capsys, given, named):
    parser = cli.parser(None)
    parser.add_argument("--run_dir", required=True, help="first")
    parser.add_argument("--max_images", type=cli.positive, help="second")
    for arguments in (given, ["--max_images", "2"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1
        assert "the following arguments are required: --run_dir" in line
        assert (f"unrecognized arguments: {named}" in line) is (arguments is given)
        assert ("unrecognized" in line) is (arguments is given)
