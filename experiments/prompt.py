"""Prints a finished run's instruction for an input, and with --answer also the target's answer.

    appo prompt --run runs/mixed-... --input "premise : ... focus : place" --answer
    appo prompt --run runs/mixed-... --file inputs.txt --answer > answers.jsonl

A run in mode fixed has one instruction for all inputs; a run in mode tte writes one for each input. Inputs are texts in
the form that the target reads; `\\n` stands for a line break. A plain file has one input per line. A .jsonl or .csv
file, and the like, has one input per row, in a column "input".
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.run.fingerprint import changed_since
from experiments.run.folder import read_result
from experiments.terminal.command import Parser, in_order, is_utf8
from experiments.terminal.signals import ending_at_once
from tasks.cells import Row, column, lettered, text_of
from tasks.errors import TaskError, printable, shown
from tasks.rows import SUFFIXES, read_rows, read_text

if TYPE_CHECKING:
    from experiments.run.run import Run


def instructions(run: Run, inputs: Sequence[str]) -> list[str]:
    """Returns the run's instruction for each input."""
    from experiments.arms.editor import editor_of

    prompt = read_result(run.folder.path)["prompt"]
    return editor_of(run).write(inputs) if prompt is None else [prompt] * len(inputs)


def answers(run: Run, prompts: Sequence[str], inputs: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the target's answer to each input under its prompt, with probabilities of label words or letters."""
    from rewards.target import NO_NUMBERS

    choices = [len(offered_words(run, text)) or None for text in inputs]
    replies = run.reward.reply(prompts, inputs, choices)
    if not all(reply.sound for reply in replies):
        raise FloatingPointError(NO_NUMBERS)
    return [{name: value for name, value in reply._asdict().items() if value or name == "answer"} for reply in replies]


def offered_words(run: Run, text: str) -> tuple[str, ...]:
    """Returns the possible answers to an input: label words, or the letters of its choices; nothing if it is text.

    Raises:
        TaskError: the input offers no choices, or more than any input of the run's data.
    """
    words = run.data.words
    if run.data.spec.kind != "choices":
        return words
    count = lettered(text)
    if not 0 < count <= len(words):
        raise TaskError(
            f"the input {shown(text)} offers {count} choices, in lines (A), (B), ...; expected 2 to {len(words)}"
        )
    return words[:count]


def check_answerable(run: Run, inputs: Sequence[str]) -> None:
    """Refuses, before any work, inputs that the target cannot answer.

    Raises:
        ContextTooLongError: an input leaves the target no room for an instruction.
        TaskError: an input has no choices, or too many.
    """
    room = run.config.sampling.max_new_tokens + (0 if run.data.words else run.config.reward.answer_tokens)
    for text in inputs:
        offered_words(run, text)
        if run.config.mode == "tte":  # in mode fixed the length of the instruction is known, and checked when it runs
            run.target.check_fits(room, text)


def read_inputs(path: Path) -> list[str]:
    """Reads the inputs in a file: one per row, from the column "input", or one per line of a plain text file.

    Raises:
        TaskError: there is no such file, it has no inputs, or a row has none.
    """
    if not path.is_file():
        raise TaskError(f"no file {str(path)!r}")
    if path.suffix.lower() in SUFFIXES:
        return [_input(row, where) for where, row in read_rows(path)]
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise TaskError(f"{path}: the file has no inputs")
    return [_input({"input": line.replace("\\n", "\n")}, f"{path}:{number}") for number, line in lines]


def _input(row: Row, where: str) -> str:
    try:
        value = column(row, ["input"])
        text = text_of(value, "input")
    except TaskError as error:
        raise TaskError(f"{where}: {error}") from None
    return value if isinstance(value, str) else text


@in_order
def main(argv: Sequence[str]) -> int:
    """Prints the instruction for one input, or a JSON line for each input of a file; returns the exit code."""
    parser = Parser("appo prompt", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--input", help="one input")
    group.add_argument("--file", type=Path, help="one input per line, or rows with a column 'input': .jsonl, .csv, ...")
    parser.add_argument("--answer", action="store_true", help="print the target's answer as well")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    options = parser.parse_args(argv)
    inputs = [options.input.replace("\\n", "\n")] if options.input is not None else read_inputs(options.file)
    with ending_at_once():
        from experiments.run.run import open_run  # takes seconds to load
    run = open_run(options.run, options.trust_remote_code)
    if parts := changed_since(options.run, run.fingerprint):
        print(f"note: the task has changed since the run: {parts}", file=sys.stderr)
    if options.answer:
        check_answerable(run, inputs)
    started = time.perf_counter()
    prompts = instructions(run, inputs)
    replies = answers(run, prompts, inputs) if options.answer else [{} for _ in inputs]
    seconds = time.perf_counter() - started
    print(f"{1000 * seconds / len(inputs):.1f} ms per input, {len(inputs)} in all, after loading", file=sys.stderr)
    if options.input is None:
        for text, prompt, reply in zip(inputs, prompts, replies, strict=True):
            row = {"input": text, "prompt": prompt, **reply}
            line = json.dumps(row, ensure_ascii=False)
            plain = line.isprintable() and is_utf8(sys.stdout)
            print(line if plain else json.dumps(row))  # escapes an input's control characters
        return 0
    print(printable(prompts[0]))
    if options.answer:
        each = ", ".join(f"{word} {p:.3f}" for word, p in replies[0].get("probabilities", {}).items())
        print(printable(f"answer: {replies[0]['answer']}" + (f"  ({each})" if each else "")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
