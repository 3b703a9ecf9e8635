"""Lists, shows and checks the tasks.

    appo tasks                              list the tasks
    appo tasks --all                        the same, with the subjects of mmlu/ one by one
    appo tasks --show mnli                  show one task: its fields, template, prompts, and an example
    appo tasks --show mnli --shots 8        the same, with 8 rows for each label instead of 16
    appo tasks --check --data DIR           load every task whose files are in DIR, and print sizes

Data come from the lab unless --data names another source.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from experiments.config import LAB_DIR, data_source
from experiments.terminal.command import Parser, UsageError, in_order
from experiments.terminal.console import clip
from tasks.catalogue import family_of, load_spec, task_names
from tasks.errors import MissingFilesError, TaskError, TooFewRowsError, printable
from tasks.meta_prompt import meta_prompt
from tasks.sources import load_task
from tasks.spec import TaskSpec, fill
from tasks.splits import TaskData

ANSWERS_SHOWN = 6
WIDTH = 100  # columns of the list
LONG = ("mmlu",)  # families that the list shows as one line


def overview(every: bool = False) -> Iterator[str]:
    """Yields the tasks in groups, a line per task: kind of answer, metric, sources of data, and what it is about.

    Args:
        every: whether to list the members of mmlu/ one by one; otherwise they share a line.
    """
    yield from _table("tasks with a spec of their own", [name for name in task_names() if not family_of(name)], True)
    for family in dict.fromkeys(filter(None, map(family_of, task_names()))):
        members = [name for name in task_names() if family_of(name) == family]
        title = load_spec(members[0]).description.rpartition("(")[2].removesuffix(")")
        if family in LONG and not every:
            yield f"\n{title}\n  {family}/<subject>: {len(members)} tasks, see appo tasks --all"
        else:
            yield from _table(title, members)
    yield "\n`appo tasks --show TASK` shows one task."


def _table(title: str, names: Sequence[str], about: bool = False) -> Iterator[str]:
    """Yields the lines of a group of tasks, at most WIDTH columns each."""
    wide = max(map(len, names)) + 2
    yield f"\n{title}\n  {'task':<{wide}}{'answer':<9}{'metric':<14}{'data':<9}{'about' if about else ''}".rstrip()
    for name in names:
        spec = load_spec(name)
        places = {"lab": (LAB_DIR / "data" / name).is_dir(), "hub": bool(spec.hub)}
        data = " ".join(place for place in places if places[place]) or "files"
        asked = spec.description.partition(" (")[0] if about else ""
        yield clip(f"  {name:<{wide}}{spec.kind:<9}{spec.metric:<14}{data:<9}{asked}".rstrip(), WIDTH)


def _loaded(name: str, source: str, shots: int) -> TaskData:
    """Loads a task; an error about too few rows names the option that asks for fewer."""
    try:
        return load_task(name, data_source(name, source), shots)
    except TooFewRowsError as error:
        raise TooFewRowsError(f"{error}; ask for fewer with --shots") from error


def show(name: str, source: str, shots: int = 16) -> Iterator[str]:
    """Yields the lines about one task: what its spec says and, if its data are there, sizes and a filled example.

    Control characters in the data are escaped, so that they do not control the terminal.
    """
    for part in _described(name, source, shots):
        yield "\n".join(map(printable, part.split("\n")))


def _described(name: str, source: str, shots: int) -> Iterator[str]:
    spec = load_spec(name)
    data: TaskData | str
    try:
        data = _loaded(name, source, shots)
    except MissingFilesError as error:
        data = str(error)
    else:
        spec = data.spec
    yield f"{spec.name}: {spec.description}"
    yield f"fields    {', '.join(' / '.join([field, *others]) for field, others in spec.fields.items())}"
    yield f"answer    {_answers(spec)}"
    yield f"metric    {spec.metric}"
    yield f"template  {spec.template}"
    yield f"manual    {spec.manual_prompt}"
    yield f"hub       {' '.join(f'{key}={value}' for key, value in spec.hub.items()) or 'none: local files only'}"
    if isinstance(data, str):
        yield f"no data here: {data}"
        return
    yield f"sizes     {len(data.train)} train, {len(data.validation)} validation, {len(data.test)} test"
    example = data.train[0]
    shown = " | ".join(example.answers[:ANSWERS_SHOWN]) or example.answer
    filled = fill(spec.template, {"prompt": spec.manual_prompt, "input": example.input})
    yield f"\nWhat the target reads under the manual prompt, and the right answer:\n\n{filled} [{shown}]"
    yield f"\nWhat the agent reads:\n\n{' '.join(meta_prompt(data.train[:2]))}"


def _answers(spec: TaskSpec) -> str:
    if spec.kind == "labels":
        return ", ".join(f"{word} ({label})" for label, word in spec.verbalizer.items())
    return "the letter of a choice" if spec.kind == "choices" else f"text (columns {', '.join(spec.answers)})"


def check(source: str, shots: int) -> Iterator[str]:
    """Loads every task whose files are there; yields a line per task with the sizes of its splits.

    Raises:
        TaskError: something is wrong with a task's files; the message begins with the task.
    """
    yield f"{'task':<45}{'answer':<9}{'train':>7}{'validation':>12}{'test':>7}  classes"
    absent = []
    for name in task_names():
        try:
            data = _loaded(name, source, shots)
        except MissingFilesError:
            absent.append(name)
            continue
        except TaskError as error:  # which task was tried cannot be told from a file that lies in the folder itself
            raise TaskError(f"{name}: {error}") from error
        sizes = f"{len(data.train):>7}{len(data.validation):>12}{len(data.test):>7}"
        yield f"{name:<45}{data.spec.kind:<9}{sizes}  {' '.join(data.words)}"
    yield f"{len(task_names()) - len(absent)} tasks load without error; no files here for {len(absent)} others"


@in_order
def main(argv: Sequence[str]) -> int:
    """Prints what was asked for; returns the exit code."""
    parser = Parser("appo tasks", __doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--list", action="store_true", help="list the tasks in groups (the default)")
    group.add_argument("--all", action="store_true", help="the same, with the subjects of mmlu/ one by one")
    group.add_argument("--show", metavar="TASK", help="show a task, by its name or the path of its spec")
    group.add_argument("--check", action="store_true", help="load every task whose files are there")
    parser.add_argument("--data", default="lab", help="lab, hub, or a folder of files (default: lab)")
    parser.add_argument("--shots", type=int, default=16, metavar="N", help="rows drawn for each label (default: 16)")
    options = parser.parse_args(argv)
    if options.shots < 1:
        raise UsageError(f"--shots is {options.shots}; expected at least 1")
    if options.show:
        print(*show(options.show, options.data, options.shots), sep="\n")
        return 0
    for line in check(options.data, options.shots) if options.check else overview(options.all):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
