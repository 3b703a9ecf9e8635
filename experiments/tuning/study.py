"""Studies: tables of runs that differ in one or two things, each described by a file in experiments/studies.

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

`keys` hold for all runs; each axis names its settings and says what they set. There is a run for each combination and
seed. `tables` says how the runs are shown (see `experiments.diagnostics.tables`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from experiments.config import build_config
from experiments.config.strict import ConfigError, read_yaml
from experiments.tuning.cells import Cell, seeds_of

STUDIES = Path(__file__).parents[1] / "studies"
FIELDS = ("question", "seeds", "keys", "axes", "tables")


@dataclass(frozen=True)
class Study:
    """A table of runs.

    Attributes:
        name: of the file.
        question: what the study is to answer.
        seeds: of each combination.
        keys: key=value of all runs.
        axes: for each axis its settings, by name, each with its key=value.
        tables: how its runs are shown; see `experiments.diagnostics.tables.view`.
    """

    name: str
    question: str
    seeds: list[int]
    keys: list[str]
    axes: dict[str, dict[str, list[str]]]
    tables: list[str]

    @classmethod
    def load(cls, name: str) -> Study:
        """The study of that name, or in the file of that path.

        Raises:
            ConfigError: there is none, or its file is not like the one above.
        """
        path = Path(name) if name.endswith(".yaml") else STUDIES / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
            raise ConfigError(f"no study {name!r}; expected one of {known}, or the path of a .yaml file")
        found = read_yaml(path)
        if set(found) != set(FIELDS) or not isinstance(found["axes"], dict) or not isinstance(found["tables"], list):
            raise ConfigError(f"{path}: expected {', '.join(FIELDS)}; axes map names to settings, tables are a list")
        axes = {}
        for axis, settings in found["axes"].items():
            if not isinstance(settings, dict) or not settings:
                raise ConfigError(f"{path}: axes.{axis}: expected names of settings, each with its key=value")
            axes[str(axis)] = {str(label): shlex.split(str(keys or "")) for label, keys in settings.items()}
        seeds = seeds_of(str(found["seeds"]).split())
        keys, tables = shlex.split(str(found["keys"] or "")), [str(table) for table in found["tables"]]
        return cls(path.stem, str(found["question"]), seeds, keys, axes, tables)

    def combinations(self) -> Iterator[dict[str, str]]:
        """The settings of each row of runs: axis -> name."""
        for labels in product(*self.axes.values()):
            yield dict(zip(self.axes, labels, strict=True))

    def cells(
        self, folder: Path, seeds: Sequence[int], more: Sequence[str] = ()
    ) -> Iterator[tuple[dict[str, str], Cell]]:
        """The runs with their settings, those of one seed after those of another.

        Args:
            folder: where the runs' folders lie.
            seeds: of each combination.
            more: key=value that win over the study's own.

        Raises:
            ConfigError: a setting is none.
        """
        for seed, labels in product(seeds, self.combinations()):
            set_by_axes = [word for axis, label in labels.items() for word in self.axes[axis][label]]
            assignments = [*self.keys, *set_by_axes, *more]
            name = ", ".join(labels.values())
            run = folder / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}-{seed}"
            config = build_config({"seed": seed, "run": str(run)}, assignments=assignments)
            words = ["--seed", str(seed), "--run", str(run), *assignments]
            yield labels, Cell(f"{name}, seed {seed}", config, words)
