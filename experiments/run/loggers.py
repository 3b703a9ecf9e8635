"""TensorBoard and Weights & Biases: the numbers of metrics.jsonl, sent there as well if the configuration asks for it.

Both packages are extras. Neither is imported unless its key is set: tensorboard=true, or wandb=PROJECT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any

from experiments.config import RunConfig, to_dict
from experiments.config.strict import ConfigError
from experiments.run.files import writing
from experiments.run.folder import RunFolder

Log = Callable[[int, Mapping[str, Any]], None]  # (iteration, row of metrics.jsonl)
WANDB_ID = "wandb-id.txt"  # in the run's folder: which W&B run a resumed run continues
RESULTS = ("validation_score", "test_score", "manual_validation_score", "manual_test_score")


@contextmanager
def loggers(config: RunConfig, folder: RunFolder, done: int) -> Iterator[Log]:
    """A function that logs a row to every service that the configuration names; they are closed at the end.

    Args:
        config: of the run.
        folder: the run's folder, which exists.
        done: iterations that a resumed run keeps; what was logged after them is replaced.

    Raises:
        ConfigError: Weights & Biases refuses the run, for instance for want of a login.
    """
    with ExitStack() as stack:
        logs: list[Log] = []
        if config.tensorboard and folder.written:
            logs.append(stack.enter_context(_tensorboard(folder, done)))
        if config.wandb is not None and folder.written:
            logs.append(stack.enter_context(_wandb(config, folder, done)))

        def log(iteration: int, row: Mapping[str, Any]) -> None:
            for each in logs:
                each(iteration, numbers(row))

        yield log


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl, by name; a review adds the mean scores of both sides and its outcome."""
    found = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
    found.pop("iteration", None)  # it is the step
    if review := row.get("review"):
        found |= {f"review/{side}_score": fmean(review[f"{side}_scores"]) for side in ("policy", "anchor")}
        found |= {f"review/{name}": float(review["decision"] == name) for name in ("promote", "rollback")}
    return found


def final_scores(result: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a finished run, as a row to log beside its last iteration."""
    return {f"final/{name}": result[name] for name in RESULTS}


@contextmanager
def _tensorboard(folder: RunFolder, done: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    path = folder.path / "tensorboard"
    # From `purge_step` on, TensorBoard forgets what an earlier process logged.
    with writing(path), SummaryWriter(str(path), purge_step=done + 1) as writer:

        def log(iteration: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
            writer.flush()

        yield log


@contextmanager
def _wandb(config: RunConfig, folder: RunFolder, done: int) -> Iterator[Log]:
    import wandb

    known = folder.path / WANDB_ID
    before = known.read_text(encoding="utf-8").strip() if done and known.is_file() else None
    try:
        run = wandb.init(
            project=config.wandb,
            name=folder.path.resolve().name,
            dir=str(folder.path),
            config=to_dict(config),
            id=before,
            resume="allow" if before else None,
            settings=wandb.Settings(console="off"),  # it would take the progress bar apart
        )
    except wandb.errors.Error as error:
        raise ConfigError(f"wandb: {error}") from error
    folder.write_text(WANDB_ID, f"{run.id}\n")
    with run:  # W&B ignores a step that it already has; a resumed run makes it again with the same numbers
        yield lambda iteration, values: run.log(dict(values), step=iteration)
