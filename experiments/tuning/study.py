"""A study is a table of runs that differ in one or two things, described by a file in experiments/studies.

    question: Where does plain PPO break, and does an anchor help there?
    seeds: 0-2
    keys: task=mnli steps=200 prompts=4
    axes:
      learning rate:
        3e-4: appo.learning_rate=3e-4
        1e-3: appo.learning_rate=1e-3
      reference:
        none: arm=none
        anchor: arm=appo
    tables:
      - summary of reference
      - plane of learning rate by reference

`keys` apply to all runs. Each axis lists its settings by name, each with the keys that it sets. There is one run for
each combination of settings and each seed. `tables` says how to show the runs (see `experiments.diagnostics.tables`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from experiments.config import build_config, check_keys
from experiments.config.strict import ConfigError, read_yaml
from experiments.diagnostics.tables import asked
from experiments.tuning.cells import Cell, check_assignments, seeds_of
from tasks.catalogue import load_spec
from tasks.errors import TaskError, shown

STUDIES = Path(__file__).parents[1] / "studies"
FIELDS = ("question", "seeds", "keys", "axes", "tables")


@dataclass(frozen=True)
class Study:
    """A table of runs.

    Attributes:
        file: the file that describes it.
        question: the question that it answers.
        seeds: the seeds of each combination.
        keys: key=value words for all runs.
        axes: axis -> name of a setting -> its key=value words.
        tables: the tables of its runs, in words; see `experiments.diagnostics.tables.view`.
    """

    file: Path
    question: str
    seeds: list[int]
    keys: list[str]
    axes: dict[str, dict[str, list[str]]]
    tables: list[str]

    @classmethod
    def load(cls, name: str) -> Study:
        """Loads the study of that name, or from the file at that path.

        Raises:
            ConfigError: there is no such study, or its file does not have the form shown above.
        """
        path = Path(name) if name.endswith(".yaml") else STUDIES / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
            raise ConfigError(f"no study {name!r}; expected one of {known}, or the path of a .yaml file")
        found = read_yaml(path)
        try:
            return cls._of(path, found)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, path: Path, found: Mapping[str, Any]) -> Study:
        """Builds a study from the keys and values of a file; a ValueError names the key that is wrong."""
        wrong = [f"unknown key {shown(key)}" for key in found if key not in FIELDS]
        wrong += [f"no key {key!r}" for key in FIELDS if key not in found]
        axes, tables, seeds = (found.get(key) for key in ("axes", "tables", "seeds"))
        if wrong or not isinstance(axes, dict) or not isinstance(tables, list):
            told = "".join(f"{problem}; " for problem in wrong)
            raise ValueError(f"{told}expected {', '.join(FIELDS)}; axes map names to settings, tables are a list")
        for axis, settings in axes.items():
            if not isinstance(settings, dict) or not settings:
                raise ValueError(f"axes.{axis}: expected names of settings, each with its key=value")
            for label in (axis, *settings):
                if not isinstance(label, str):
                    raise ValueError(f"axes.{axis}: YAML reads the name {shown(label)} as no text; put it in quotes")
        named = seeds if isinstance(seeds, list) else str(seeds).split()
        for key, some in (("axes", axes), ("seeds", named)):
            if not some:
                raise ValueError(f"{key}: expected at least one")
        study = cls(
            path,
            str(found["question"]),
            seeds_of(map(str, named), "seeds"),
            _words(found["keys"], "keys"),
            {
                axis: {label: _words(text, f"axes.{axis}.{label}") for label, text in settings.items()}
                for axis, settings in axes.items()
            },
            [str(table) for table in tables],
        )
        for table in study.tables:
            try:
                where = asked(table, list(axes)).where
            except ValueError as error:
                raise ValueError(f"tables: {error}") from error
            if where and where[1] not in axes[where[0]]:
                known = ", ".join(axes[where[0]])
                raise ValueError(f"tables: {table!r}: no setting {where[1]!r}; expected one of {known}")
        taken = dict[str, str]()
        for name in map(_name, study.combinations()):
            folder = file_name(name)
            if folder in taken:
                raise ValueError(f"axes: {taken[folder]!r} and {name!r} would share a folder; name one differently")
            taken[folder] = name
        return study

    @property
    def name(self) -> str:
        """The name of its file."""
        return self.file.stem

    def combinations(self) -> Iterator[dict[str, str]]:
        """Yields all combinations of settings, as axis -> name of the setting."""
        for labels in product(*self.axes.values()):
            yield dict(zip(self.axes, labels, strict=True))

    def cells(
        self, folder: Path, seeds: Sequence[int], more: Sequence[str] = ()
    ) -> Iterator[tuple[dict[str, str], Cell]]:
        """Yields the runs with their settings, seed by seed.

        Args:
            folder: the folder of the runs' folders.
            seeds: the seeds of each combination.
            more: key=value words that win over the study's own.

        Raises:
            ConfigError: the configuration of a run is wrong, or its task is unknown.
        """
        tasks = set[str]()  # known ones; a spec takes a while to read
        for seed, labels in product(seeds, self.combinations()):
            set_by_axes = [word for axis, label in labels.items() for word in self.axes[axis][label]]
            assignments = [*self.keys, *set_by_axes, *more]
            name = f"{_name(labels)}, seed {seed}"
            run = str(folder / f"{file_name(_name(labels))}-{seed}")
            try:
                config = build_config({"seed": seed, "run": run}, assignments=assignments)
                if config.task not in tasks:
                    load_spec(config.task)
                    tasks.add(config.task)
            except (ConfigError, TaskError) as error:
                raise ConfigError(f"{self.file}: {name}: {error}") from error
            yield labels, Cell(name, config, ["--seed", str(seed), "--run", run, *assignments])


def _words(text: object, where: str) -> list[str]:
    """Splits a text of a study's file into key=value words; a ValueError begins with `where`, the key of the text."""
    if not isinstance(text, str | None):
        raise ValueError(f"{where}: expected a text of key=value, found {shown(text)}")
    try:
        words = shlex.split(text or "")
        check_keys(words)
        check_assignments(words, ("seed", "run"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return words


def _name(labels: Mapping[str, str]) -> str:
    """Returns the name of a combination of settings."""
    return ", ".join(labels.values())


def file_name(name: str) -> str:
    """Turns a name into one for a file or folder, of letters and digits of any script."""
    return re.sub(r"(?:[^\w.]|_)+", "-", name.lower()).strip("-")
