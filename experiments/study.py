"""Runs a study, a table of runs described by a file, and shows what came out.

    appo study                                   list the studies
    appo study ablate --jobs 2                   one by one or side by side; stopped, it goes on where it was
    appo study paper-few-shot --dry              the runs, with the memory and hours that they would take
    appo study stability --record docs/results/stability.jsonl

Runs of the same --folder that are finished are taken as they are; --show makes no others. --record writes what came out
as data, a line for each run; the tables of the documentation are made of such files. A table `test of AXIS by AXIS` is
drawn as well, as a heat map in the study's folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.config import RunConfig
from experiments.diagnostics.records import record_of
from experiments.diagnostics.tables import markdown, markdown_row, view
from experiments.page.heat_map import drawn
from experiments.run.files import write_whole
from experiments.run.folder import jsonl_of
from experiments.terminal.command import Parser, UsageError, in_order, new_file
from experiments.tuning.cells import Cell, check_assignments, make, seeds_of
from experiments.tuning.study import STUDIES, Study, file_name

SHAPES = STUDIES / "shapes"  # configurations of models of the paper, for plans without a hub


@in_order
def main(argv: Sequence[str]) -> int:
    """Lists the studies, or runs or plans one; returns the exit code."""
    parser = Parser("appo study", __doc__)
    parser.add_argument("study", nargs="?", help="its name, or the path of its .yaml file")
    parser.add_argument("--folder", type=Path, help="folder of the runs (default: runs/STUDY)")
    parser.add_argument("--seeds", nargs="+", action="append", metavar="N", help="such as 0 5-9 (default: the study's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each (default: 1)")
    parser.add_argument("--dry", action="store_true", help="only say what the runs would take")
    parser.add_argument("--show", action="store_true", help="make no run: only show those that are finished")
    parser.add_argument("--record", type=new_file, metavar="FILE", help="write the results as data, in JSON lines")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="sets a configuration field of every run")
    options = parser.parse_mixed(argv, "seeds")
    first = options.study or next(iter(options.assignments), "")
    if "=" in first:
        raise UsageError(f"{first!r} is no study; expected its name before any key=value")
    if not options.study:
        for name in sorted(path.stem for path in STUDIES.glob("*.yaml")):
            print(f"{name:<16} {Study.load(name).question}")
        return 0
    if options.jobs < 1:
        raise UsageError(f"--jobs is {options.jobs}; expected at least 1")
    if options.dry and (options.show or options.record):
        raise UsageError("--dry makes and shows no run; it goes without --show and --record")
    check_assignments(options.assignments, ("seed", "run"))
    study = Study.load(options.study)
    seeds = seeds_of(options.seeds) or study.seeds
    alone = ["threads=1"] if options.jobs > 1 else []
    folder = options.folder or Path("runs") / study.name
    cells = list(study.cells(folder, seeds, [*alone, *options.assignments]))
    print(f"{study.question}\n", flush=True)
    if options.dry:
        for line in planned(cells):
            print(line, flush=True)
        return 0
    codes = {} if options.show else made([cell for _, cell in cells], options.jobs)
    finished = [(labels, cell) for labels, cell in cells if cell.begun and cell.finished]
    show(study, finished, folder, options.record)
    if failed := [name for name, code in codes.items() if code]:
        print(f"failed, and in no table: {'; '.join(failed)}")
    elif not finished and (options.show or options.record):
        unwritten = f"; {str(options.record)!r} is not written" if options.record else ""
        raise UsageError(f"no run in {str(folder)!r} is finished{unwritten}")
    return max(codes.values(), default=0)


def made(cells: Sequence[Cell], jobs: int) -> dict[str, int]:
    """Makes the runs that are not finished, a line for each when it is done; returns their exit codes."""
    codes = dict[str, int]()
    for cell, code, error in make(cells, jobs):
        codes[cell.name] = code
        told = error if code else "done"
        print(f"{len(codes)}/{len(cells)}  {cell.name}: {told}", file=sys.stderr, flush=True)
    return codes


def show(study: Study, finished: Sequence[tuple[Mapping[str, str], Cell]], folder: Path, record: Path | None) -> None:
    """Prints the tables of finished runs, and writes these as data if `record` names a file.

    Tables of test scores are drawn too: heat maps in the study's folder, named after their table.
    """
    records = [record_of(cell.folder, study.name, labels) for labels, cell in finished]
    for words in study.tables if records else []:
        table = view(records, words)
        shown = markdown(table) if table[1:] else "none of its runs is finished\n"
        print(f"{words}\n\n{shown}", flush=True)
        if picture := drawn(records, words):
            path = folder / f"{file_name(words)}.svg"
            write_whole(path, picture)
            print(f"as a picture: {path}\n", flush=True)
    if record and records:
        write_whole(record, jsonl_of(records))


def planned(cells: Sequence[tuple[Mapping[str, str], Cell]]) -> Iterator[str]:
    """A line for each combination of settings: models, memory, work, and hours on the GPUs that the plan knows."""
    from experiments.plan import lengths_of
    from experiments.planning.estimate import GIB, Estimate, Options
    from experiments.planning.machines import GPUS
    from experiments.run.models import ModelError

    seeds = len({cell.config.seed for _, cell in cells})
    names = [gpu.name for gpu in GPUS]
    yield markdown_row(["runs", "agent", "target", "seeds", "GiB", "PFLOP a run", *names])
    yield "|---" * (6 + len(GPUS)) + "|"
    total, plans = dict.fromkeys(names, 0.0), dict[str, Estimate]()
    for labels, cell in cells:
        if cell.config.seed != cells[0][1].config.seed:
            continue
        models = [Path(getattr(cell.config, role)).name for role in ("agent", "target")]
        begun = [", ".join(labels.values()), *models, str(seeds)]
        config = _with_shapes(cell.config)
        lengths = lengths_of(config)
        alike = repr((replace(config, task="", run=None), lengths))  # a plan takes seconds; of a task it knows lengths
        try:
            if alike not in plans:
                plans[alike] = Estimate(config, lengths, Options.of(config, config.dtype != "float32"))
            plan = plans[alike]
        except ModelError as error:
            yield markdown_row([*begun, f"no plan: {error}"])
            continue
        steps = plan.lengths.steps
        work = sum(line.value for line in plan.work()) * steps / 1e15
        hours = {gpu.name: plan.seconds(gpu) * steps / 3600 for gpu in GPUS}
        total = {name: total[name] + seeds * spent for name, spent in hours.items()}
        taken = [f"{spent:.2g} h" for spent in hours.values()]
        yield markdown_row([*begun, f"{plan.total() / GIB:.1f}", f"{work:.3g}", *taken])
    yield f"\n{len(cells)} runs, in all: " + ", ".join(f"{spent:.2g} h on {name}" for name, spent in total.items())


def _with_shapes(config: RunConfig) -> RunConfig:
    """The configuration with the shipped sizes of models in place of names that only a hub knows."""
    agent, target = (SHAPES / f"{Path(name).name}.json" for name in (config.agent, config.target))
    config = replace(config, agent=str(agent)) if agent.is_file() else config
    return replace(config, target=str(target)) if target.is_file() else config


if __name__ == "__main__":
    sys.exit(main())
