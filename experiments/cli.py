"""The command `appo`. Its subcommands come from the installed package, never from the current folder.

    appo train --task mnli
    appo report runs/mnli-...

Only the given subcommand is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version

from experiments.terminal.command import Program, UsageError, in_order
from experiments.terminal.signals import end_at_once

GROUPS = {  # the modules of this package with a `main`, and what they do
    "tune": {
        "train": "tune a prompt for a task",
        "compare": "compare ways to tune a prompt, over seeds",
        "study": "run or plan a table of runs: ablations, grids, the paper's tables",
    },
    "use a finished run": {
        "prompt": "print a run's instruction for an input, and the target's answer under it",
        "evaluate": "score a finished run on its test split",
        "report": "rebuild the report of a run",
        "push": "upload the agent of a run to the Hugging Face hub",
    },
    "before the first run": {
        "tasks": "list the tasks, show one, or check those in a folder",
        "plan": "estimate what a run would take: memory, work, hours on some GPUs",
        "weights": "write a real language model into a folder",
        "completion": "print a script that completes commands in bash or zsh",
    },
}
COMMANDS = {name: what for group in GROUPS.values() for name, what in group.items()}
EXAMPLES = """examples:
  appo train --task mnli                              with the lab's tiny models, in a few minutes
  appo train --task mnli --show-config                every key, its value and what it means
  appo train --task my/reviews.yaml --agent models/smollm2 --target models/gemma3-270m --dry-run
  appo prompt --run runs/mnli-20260101-120000-0 --input "premise : ..." --answer
"""


def main() -> int:
    """Runs the subcommand that the command line names; returns the exit code."""
    end_at_once()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        command: Program = importlib.import_module(f"experiments.{name}").main
        return command(rest)
    return _say([name])


@in_order
def _say(argv: Sequence[str]) -> int:
    """Prints the help or the version; raises UsageError for an unknown command."""
    if argv[0] in ("-h", "--help"):
        print("usage: appo COMMAND ...\n")
        for title, group in GROUPS.items():
            print(f"{title}:", *(f"  {name:<12}{what}" for name, what in group.items()), "", sep="\n")
        print(EXAMPLES, "`appo COMMAND --help` lists the options of a command.", sep="\n")
        return 0
    if argv[0] == "--version":
        try:
            print(version("stableprompt-appo"))
        except PackageNotFoundError as error:
            raise UsageError("this copy is not installed, so it has no version") from error
        return 0
    near = get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown command {argv[0]!r}; {hint}commands are {', '.join(COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main())
