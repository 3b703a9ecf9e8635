"""The commands that a person runs; the only layer that wires the others together."""

import sys

from experiments.terminal.signals import end_at_once

if sys.argv[:1] == ["-m"]:  # `python -m experiments.X` is being loaded, which takes seconds; see command.in_order
    end_at_once()
