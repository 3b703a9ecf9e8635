"""How commands end: with one line and an exit code for errors that users can cause, with a traceback for a bug."""

from __future__ import annotations

import argparse
import configparser
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch

import appo as library
from appo.lm.model import ContextTooLongError
from appo.selfcheck import SelfCheckError
from appo.trainer import DivergedError, Iteration
from experiments import cli, train
from experiments.cli import COMMANDS
from experiments.config.strict import ConfigError
from experiments.terminal import command
from experiments.terminal.command import FAULT, UsageError, in_order, new_file
from experiments.terminal.signals import StoppedError

ROOT = Path(__file__).parent.parent


def ending(error: BaseException | None) -> int:
    """Returns the exit code of a command that raises this error."""

    @in_order
    def main(argv: Sequence[str]) -> int:
        if error:
            raise error
        return 0

    return main([])


UNUSED = cast(Iteration, None)  # how a command ends does not depend on it
ENDS = [  # what is raised, the exit code, what is said
    (None, 0, ""),
    (UsageError("no such thing"), 2, "error: no such thing\n"),
    (ConfigError("a.csv:3: no label"), 2, "error: a.csv:3: no label\n"),
    (ContextTooLongError("too long"), 2, "error: too long\n"),
    (ConfigError("two\nlines \x1b[2J \u202e"), 2, "error: two lines \\x1b[2J \\u202e\n"),
    (SelfCheckError("wrong temperature"), 3, "error: wrong temperature\n"),
    (DivergedError("no sound step", UNUSED), 3, "error: no sound step\n"),
    (FloatingPointError("no numbers"), 3, "error: no numbers\n"),
    (OSError(28, "No space left on device", "run/a"), 74, "error: run/a: No space left on device\n"),
    (StoppedError(signal.SIGTERM), 143, "stopped\n"),
    (KeyboardInterrupt(), 130, "stopped\n"),
    (BrokenPipeError(32, "Broken pipe"), 141, ""),
    (MemoryError(), 1, f"error: out of memory; {command.LESS_MEMORY}\n"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, f"error: out of memory; {command.LESS_MEMORY}\n"),
]


@pytest.mark.parametrize(("error", "code", "said"), ENDS, ids=[type(row[0]).__name__ for row in ENDS])
def test_errors_that_users_can_cause_are_one_line(
    error: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (ending(error), capsys.readouterr().err) == (code, said)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RuntimeError("x"), ZeroDivisionError("x")])
def test_a_bug_shows_a_traceback_and_asks_to_be_reported(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(error) == 70
    said = capsys.readouterr().err
    assert said.startswith("Traceback ") and "raise error" in said and said.endswith(f"{FAULT}\n")


def test_a_long_error_is_cut() -> None:
    assert len(command.one_line(UsageError("x" * 10_000))) == command.LONGEST + 3


def test_arguments_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_order(lambda argv: 0)(["--task", os.fsdecode(b"caf\xe9")]) == 2
    assert capsys.readouterr().err == "error: the argument 'caf\\udce9' is not UTF-8\n"
    assert in_order(lambda argv: 0)(["--config", "\0"]) == 2
    assert capsys.readouterr().err == "error: the argument '\\x00' holds a null character\n"


def test_a_file_to_write_is_a_file_or_can_become_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    links = {"file": "real", "void": "no/file", "folder": ".", "tube": "pipe", "loop": "loop"}
    for name, place in links.items():
        (tmp_path / name).symlink_to(place)
    assert new_file(str(tmp_path / "file")) == tmp_path / "file"
    refused = {"void": "no folder", "folder": "is a folder", "tube": "a pipe", "pipe": "a pipe", "loop": "the like"}
    for name, why in refused.items():
        with pytest.raises(argparse.ArgumentTypeError, match=why):
            new_file(str(tmp_path / name))
    with pytest.raises(argparse.ArgumentTypeError, match="is a device"):
        new_file(os.devnull)


@pytest.mark.parametrize("name", ["task", "agent", "target", "data", "run", "config"])
def test_an_option_that_is_empty_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([f"--{name}", "", "--show-config"]) == 2
    assert capsys.readouterr().err == f"error: --{name} is empty; give it a value, or leave it out\n"


# -- processes ---------------------------------------------------------------------------------------------------


def started(arguments: Sequence[str], **options: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([sys.executable, *arguments], **pipes | options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_torch_is_being_loaded_ends_without_a_traceback(number: int, code: int, tmp_path: Path) -> None:
    process = started(["-m", "experiments.train", "--run", str(tmp_path / "run")])
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text(encoding="utf-8"):
        time.sleep(0.001)
    process.send_signal(number)
    shown, said = process.communicate()
    assert (process.returncode, said) == (code, "stopped\n")
    assert shown.startswith("task       mnli")  # the header comes before anything that takes long


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_after_the_command_has_returned_ends_without_a_traceback(number: int, code: int) -> None:
    program = (
        "import atexit, os, sys; from experiments.terminal import command, signals; signals.end_at_once();"
        f"atexit.register(os.kill, os.getpid(), {number}); sys.exit(command.in_order(lambda argv: 0)([]))"
    )
    process = started(["-c", program])
    _, said = process.communicate()
    assert (process.returncode, said) == (code, "stopped\n")


def test_a_closed_pipe_ends_a_command_silently() -> None:
    process = started(["-m", "experiments.tasks"])
    assert process.stdout and process.stderr and process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
    process.stderr.close()


def test_an_unwritable_output_is_reported_in_one_line() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        process = started(["-m", "experiments.tasks"], stdout=full)
        _, said = process.communicate()
    assert (process.returncode, said) == (74, "error: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_command_without_stdout_or_stderr_ends_with_its_own_code(closed: str) -> None:
    for words, code in (("tasks --list", 0), ("tasks --show nix", 2)):
        line = f"exec {sys.executable} -m experiments.cli {words} {closed}"
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, "bug in the program" in done.stderr) == (code, False)
        assert "error" not in done.stdout


def test_text_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    spec = "name: t\ndescription: Rückmeldung — gut?\nfields: {text: [text]}\nlabel: [label]\ninput: '{text}'\n"
    (tmp_path / "t.yaml").write_text(f"{spec}verbalizer: {{a: ja, b: nein}}\nmanual_prompt: m\n", encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    out, said = started(["-m", "experiments.tasks", "--show", str(tmp_path / "t.yaml")], env=environment).communicate()
    assert (out.splitlines()[0], said) == ("t: R\\xfcckmeldung \\u2014 gut?", "")


# -- appo --------------------------------------------------------------------------------------------------------


@pytest.fixture
def appo(tmp_path: Path) -> Path:
    """The script that pip makes for the entry point, beside foreign packages with the names of ours."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, place = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = place.partition(":")
    for folder in ("appo", "experiments", "rewards", "tasks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise SystemExit('the wrong folder')\n", encoding="utf-8")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / name
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n", encoding="utf-8")
    return script


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = started([str(script), *arguments], cwd=script.parents[1], env=os.environ | {"PYTHONPATH": str(ROOT)})
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_appo_works_in_a_folder_with_modules_of_the_same_names(appo: Path) -> None:
    small = ("prompts=2", "threads=1", "headroom=0", "pool=2", "examples.test_limit=10", "sampling.max_new_tokens=8")
    done = run(appo, "train", "--task", "sst2", "--steps", "1", *small, "--run", "r")
    assert (done.returncode, (appo.parents[1] / "r" / "best_prompt.json").is_file()) == (0, True), done.stderr
    assert run(appo, "report", "r").stdout == "r/report.html\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_lists_its_options(name: str, appo: Path) -> None:
    done = run(appo, name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: appo {name} ")


def test_every_program_ends_in_order_and_every_subcommand_is_one() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "experiments").rglob("*.py")}
    programs = {path.stem for path, text in sources.items() if '__name__ == "__main__"' in text} - {"cli"}
    assert programs == {path.stem for path, text in sources.items() if "@in_order\ndef main(argv" in text}
    assert set(COMMANDS) <= programs


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_loads_no_torch_and_ends_with_examples(name: str) -> None:
    code = f"import sys; from experiments.{name} import main; sys.argv = ['appo', '--help']\n"
    code += "try: main()\nfinally: print(*sys.modules)"
    out, _ = started(["-c", code]).communicate()
    assert not {"torch", "transformers", "datasets"} & set(out.splitlines()[-1].split())
    assert name == "report" or re.search(rf"examples:\n  .*appo {name} ", out)


def test_show_config_and_the_list_of_tasks_load_no_torch() -> None:
    for name, arguments in (("train", ["--show-config"]), ("tasks", [])):
        code = f"import sys; from experiments.{name} import main; main({arguments}); print(*sys.modules)"
        out, _ = started(["-c", code]).communicate()
        assert not {"torch", "transformers"} & set(out.splitlines()[-1].split())


def test_the_public_names_of_appo_are_there_though_loaded_late() -> None:
    assert all(hasattr(library, name) for name in library.__all__)
    assert not hasattr(library, "no_such_name")


def test_completion_offers_the_commands_in_bash() -> None:
    ask = "COMP_WORDS=(appo tr) COMP_CWORD=1; _appo; echo ${COMPREPLY[@]}"
    code = f'eval "$({sys.executable} -m experiments.cli completion bash)"; {ask}'
    done = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("train\n", "")


def test_help_loads_no_slow_module() -> None:
    code = "import sys; from experiments.cli import main; sys.argv = ['appo', '--help']; main(); print(*sys.modules)"
    out, _ = started(["-c", code]).communicate()
    assert all(name in out for name in COMMANDS)
    assert not {"torch", "transformers", "numpy", "yaml", "datasets"} & set(out.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        ([], 0, "usage: appo COMMAND"),
        (["--version"], 0, "."),
        (["trian"], 2, "unknown command 'trian'; did you mean 'train'? commands are train, "),
        (["--task", "mnli"], 2, "unknown command '--task'"),
    ],
)
def test_appo_alone(
    arguments: list[str],
    code: int,
    fragment: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("sys.argv", ["appo", *arguments])
    try:
        assert cli.main() == code
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    captured = capsys.readouterr()
    assert fragment in captured.out + captured.err
