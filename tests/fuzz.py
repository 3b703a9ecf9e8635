"""Searches for input that is neither accepted nor refused in one line: repeats the fuzz tests on new examples.

    python -m tests.fuzz 60        for an hour; every round takes a few minutes

CI runs the same tests on the same examples every time. An example that fails here is printed, and the next search
tries it first. Write it into a test to keep it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TESTS = ("tests/test_fuzz.py", "tests/test_fuzz_runs.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Searches until the time is over or something is found; returns 1 if something was."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("minutes", nargs="?", type=float, default=5.0, help="how long (default: 5); one round at least")
    end = time.monotonic() + 60 * parser.parse_args(argv).minutes
    command = [sys.executable, "-m", "pytest", "--hypothesis-profile=search", *TESTS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    rounds = 0
    while rounds == 0 or time.monotonic() < end:
        if subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, check=False).returncode:
            return 1
        rounds += 1
    print(f"nothing found in {rounds} round{'s' * (rounds > 1)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
