"""Tunes a prompt for a task with APPO.

    appo train --task mnli
    appo train --task sst2 --agent google/gemma-1.1-2b-it --target google/gemma-1.1-2b-it --data hub
    appo train --task rte --seed 1 preset=paper appo.kl_coef=0.1 prompts=8 --show-config
    appo train --task my/reviews.yaml --agent models/smollm2 --target models/gemma3-270m --dry-run
    appo train --run runs/mnli-20260101-120000-0 --resume

Any key of the configuration is set by its dotted name; preset=NAME sets many. --show-config lists all keys.

Writes a folder: config.yaml, metrics.jsonl (a row per iteration), prompts.jsonl (a row per scored prompt),
best_prompt.json and report.html. The test split is read once, at the end. A stopped run leaves best_so_far.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.config import (
    COMMAND_LINE,
    GIVEN,
    RunConfig,
    flat,
    idle_keys,
    merged_config,
    on_toys,
    origins,
    resumed_config,
    sources,
    to_dict,
)
from experiments.config.explained import explained
from experiments.run.folder import CONFIG, SO_FAR, RunFolder, new_folder, stored_config
from experiments.terminal import job
from experiments.terminal.command import Parser, UsageError, in_order
from experiments.terminal.console import requests, stopped, summary
from experiments.terminal.signals import ending_at_once
from experiments.tuning import header

if TYPE_CHECKING:
    from experiments.run.run import Run


def train(run: Run, quiet: bool = False, resume: bool = False) -> dict[str, Any]:
    """Runs all iterations and the final evaluation, as `experiments.tuning.loop.train`, which takes long to load."""
    from experiments.tuning import loop

    return loop.train(run, quiet, resume)


# -- command line ------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What the command line asks for.

    Attributes:
        config: the run's configuration.
        origins: dotted key -> where its value comes from; keys that have their default are left out.
        preset: the preset in force, in words.
        only: "show_config" or "dry_run", if that is all that is wanted; else "".
        resume: resume an interrupted run.
    """

    config: RunConfig
    origins: dict[str, str]
    preset: str
    only: str
    resume: bool


def parse_args(argv: Sequence[str] | None = None) -> tuple[RunConfig, bool]:
    """The configuration that the command line asks for, and whether to resume an interrupted run."""
    asked = read_args(argv)
    return asked.config, asked.resume


def read_args(argv: Sequence[str] | None = None) -> Asked:
    """All that the command line asks for.

    Raises:
        UsageError, ConfigError: it cannot be read, or asks for what cannot be.
    """
    options = vars(_parser().parse_intermixed_args(argv))  # key=value anywhere among the options
    assignments, resume, only = (options.pop(name) for name in ("assignments", "resume", "only"))
    for name, value in options.items():
        if value == "":
            raise UsageError(f"--{name} is empty; give it a value, or leave it out")
    file = options.pop("config")
    if not resume:
        found = sources(options, file, assignments)
        presets = [name.removeprefix("preset ") for name, *_ in reversed(found) if name.startswith("preset ")]
        preset = ", which builds on ".join(presets) or "none: the defaults"
        return Asked(merged_config(found), origins(found), preset, only, resume)
    if not options["run"]:
        raise UsageError("--resume needs --run, the folder of the run to resume")
    before = stored_config(Path(options["run"]))
    config = resumed_config(before, options, file, assignments)
    stored, kept = flat(to_dict(before)), str(Path(options["run"], CONFIG))
    where = {key: kept if value == stored[key] else COMMAND_LINE for key, value in flat(to_dict(config)).items()}
    return Asked(config, where, f"as {kept} says", only, resume)


def _parser() -> Parser:
    parser = Parser("appo train", __doc__)
    parser.add_argument("--task", help="a name, see `appo tasks`, or the path of a spec (default: mnli)")
    parser.add_argument("--mode", choices=["fixed", "tte"], help="one prompt, or one for each input (default: fixed)")
    parser.add_argument("--agent", help="model that writes the prompts: folder or hub id of a causal LM (default: lab)")
    parser.add_argument("--target", help="model that is prompted: likewise, or http://host:port#model (default: lab)")
    parser.add_argument("--data", help="lab, hub, or a folder of files (default: lab)")
    parser.add_argument("--steps", type=int, help="iterations (default: lab 100, or 200 in mode tte; else 100 epochs)")
    parser.add_argument("--seed", type=int, help="seed of everything random (default: 0)")
    parser.add_argument("--run", help="the run's folder, which must not exist yet (default: runs/TASK-DATE-TIME)")
    parser.add_argument("--resume", action="store_true", help="resume the run in --run from its last checkpoint")
    parser.add_argument("--config", help="a YAML file of configuration keys")
    group = parser.add_mutually_exclusive_group()
    for flag, what in (
        ("--show-config", "print every key with its value, where that comes from and what it means; run nothing"),
        ("--dry-run", "load everything, measure what there is to gain, time and memory; write nothing"),
    ):
        name = flag.removeprefix("--").replace("-", "_")
        group.add_argument(flag, dest="only", action="store_const", const=name, default="", help=what)
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="sets any field of the configuration")
    return parser


@in_order
def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0; 1: out of memory; 2: a mistake in what was asked for; 3: the first rollout is unsound,
    training diverged or the target's server was lost; 70: a bug in the program; 74: a file cannot be read or written;
    130 and 143: stopped by Ctrl-C or SIGTERM.
    """
    job.be_silent()
    asked = read_args(argv)
    if asked.only == "show_config":
        print(*explained(asked.config, asked.origins), sep="\n")
        return 0
    path = new_folder(asked.config)
    config = replace(asked.config, run=str(path))
    if job.rank() == 0:
        wanted = RunFolder(path, new=not asked.resume)  # refused here, before anything slow
        if not asked.only:
            wanted.check_writable()
    print(*header.asked(config, asked.preset, None if asked.only else path), sep="\n", flush=True)
    with ending_at_once():
        from appo.lm.parallel.ranks import RanksError
        from experiments.planning.spent import spent
        from experiments.run.run import prepare
        from experiments.tuning import loop, trial
        from rewards.connection import AnswerError

        ranks = job.join(config.device)
    config = replace(config, run=ranks.gather([config.run])[0])  # a name made of the time differs
    run = prepare(config, asked.resume, ranks)
    print(*header.loaded(run), sep="\n", flush=True)
    for warning in (on_toys(config.task, config.data, config.agent, config.target), idle_keys(config)):
        if warning:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    if asked.only == "dry_run":
        print(*trial.trial(run), sep="\n")
        job.leave()
        return 0
    folder = run.folder
    with folder.lock():
        try:
            result = loop.train(run, resume=asked.resume)
        except (KeyboardInterrupt, RanksError):
            if (folder.path / CONFIG).is_file():
                print(stopped(folder.path, folder.path / SO_FAR, folder.read_json(SO_FAR)), file=sys.stderr)
            raise
        except AnswerError:  # what the server did answer is kept
            print(stopped(folder.path, folder.path / SO_FAR, None), file=sys.stderr)
            raise
    print("", *spent(run), sep="\n")
    print(f"\n{summary(result, folder.path, config.arm in GIVEN)}")
    if run.served:
        print(f"\n{requests(run.served.cost(), asked.resume)}")
    job.leave()
    return 0


if __name__ == "__main__":
    job.end(main())
