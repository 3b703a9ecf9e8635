"""Prints a shell script that completes the commands of `appo`, and file names after them.

    eval "$(appo completion bash)"        in ~/.bashrc
    eval "$(appo completion zsh)"         in ~/.zshrc, after compinit

The script is static: completing a command does not start Python.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.cli import COMMANDS
from experiments.terminal.command import Parser, in_order

SCRIPTS = {
    "bash": """_appo() {
  if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W "COMMANDS" -- "${COMP_WORDS[1]}")); fi
}
complete -o default -F _appo appo""",
    "zsh": """_appo() {
  if (( CURRENT == 2 )); then compadd -- COMMANDS; else _files; fi
}
compdef _appo appo""",
}


@in_order
def main(argv: Sequence[str]) -> int:
    """Prints the script; returns the exit code."""
    parser = Parser("appo completion", __doc__)
    parser.add_argument("shell", choices=SCRIPTS)
    print(SCRIPTS[parser.parse_args(argv).shell].replace("COMMANDS", " ".join(COMMANDS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
