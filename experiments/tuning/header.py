"""The header of a run says what the run is about to do. This module loads quickly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.config import GIVEN, LAB, TRAINED, RunConfig
from tasks.catalogue import is_spec_file, load_spec
from tasks.errors import printable

if TYPE_CHECKING:
    from experiments.run.run import Run
    from rewards.served import ServedTarget


def asked(config: RunConfig, preset: str, folder: Path | None) -> Iterator[str]:
    """Yields the lines that can be said before data and models are loaded.

    Args:
        config: the run's configuration.
        preset: the preset, in words.
        folder: where the run writes; None: nowhere.

    Raises:
        TaskError: no such task, or its spec is malformed.
    """
    spec = load_spec(config.task)
    source = config.task if config.data == LAB and is_spec_file(config.task) else config.data
    yield _line("task", f"{spec.name}, judged by {spec.metric}, data from {source}: {spec.description}")
    yield _line("models", f"agent {config.agent}, target {config.target}, on {config.device}")
    yield _line("preset", preset)
    yield _line("arm", config.arm + ("" if config.arm in TRAINED else ": the agent is never updated"))
    if config.arm in GIVEN:
        yield _line("length", "no iterations: one prompt is scored")
    else:
        yield _line("iteration", size_of_iteration(config))
        yield _line("length", f"{config.steps} iterations" if config.steps else f"{config.epochs} epochs")
    yield _line("writes to", str(folder) if folder else "nothing: a dry run")


def size_of_iteration(config: RunConfig) -> str:
    """Says how many prompts an iteration scores, and on how many examples."""
    size = config.examples.batch_size
    each = f"x {size} examples" if config.mode == "fixed" else f"for each of {size} inputs"
    return f"{config.prompts} prompts {each}"


def loaded(run: Run) -> Iterator[str]:
    """Yields the lines that need loaded data and models."""
    environment = run.environment()
    sizes = ", ".join(
        f"{role} {count / 1e6:,.1f} M parameters in {environment[f'{role}_computes_in']}"
        for role, count in run.sizes.items()
    )
    threads = f", threads {environment['threads']}" if run.policy.device.type == "cpu" else ""
    processes = f", in each of {run.policy.ranks.size} processes" if run.policy.ranks.size > 1 else ""
    yield _line("loaded", f"{sizes}, on {environment['device']}{threads}{processes}")
    from experiments.run.models import rank_of  # slow to load; a loaded run has imported it already

    if rank_of(run.config) is not None and run.config.arm in TRAINED:
        trained = sum(weight.numel() for weight in run.policy.trained().values())
        shared = "; agent and target share the rest" if environment.get("target_shared") else ""
        yield _line("", f"trains an adapter of {trained / 1e6:,.2f} M parameters{shared}")
    if run.config.arm in TRAINED and run.config.appo.learning_rate is None:
        yield _line("", f"learning rate {run.policy.lm.default_learning_rate:g}, by the size of the agent's weights")
    if run.served:
        yield _line("", f"target {run.served.server.model!r} on {run.served.server.name}{_context(run.served)}")
    rows = f"{len(run.data.train)} train, {len(run.data.validation)} validation and {len(run.data.test)} test rows"
    yield _line("", f"{rows}, {run.steps} iterations")
    from experiments.planning.outlook import outlook

    yield from (_line(name, text) for name, text in outlook(run))


def _context(served: ServedTarget) -> str:
    return f", context {served.server.context}" if served.server.context else ""


def _line(name: str, text: str) -> str:
    return f"{name:<11}{printable(text)}"
