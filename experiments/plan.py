"""Estimates what a run would take, without loading anything: memory, work, and hours on some GPUs.

    appo plan --task sst2 --agent models/smollm2 --target models/gemma3-270m
    appo plan --agent llama-7b/config.json --target llama-7b/config.json lora.rank=16 prompts=4 examples.batch_size=16

A model is a folder, a hub id or a bare config.json: its passes run on tensors without data, so no weights are needed.
The task's data are not read either, so lengths of texts are guessed and printed; --query and --example set them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from experiments.config import GIVEN, RunConfig, build_config, is_served
from experiments.config.strict import ConfigError
from experiments.terminal.command import Parser, UsageError, in_order
from experiments.terminal.signals import ending_at_once
from experiments.tuning.header import size_of_iteration
from tasks.catalogue import load_spec
from tasks.errors import printable

if TYPE_CHECKING:
    from experiments.planning.estimate import Estimate, Lengths

EXAMPLE = 40  # tokens of an example, unless --example says otherwise
FRAME = 60  # tokens of the meta-prompt around its pairs
RANK = 16  # rank of the adapters to compare with, if the configuration trains all weights


@in_order
def main(argv: Sequence[str]) -> int:
    """Prints the plan; returns the exit code."""
    parser = Parser("appo plan", __doc__)
    parser.add_argument("--agent", help="model that writes the prompts (default: lab)")
    parser.add_argument("--target", help="model that is prompted (default: lab)")
    parser.add_argument("--task", help="a name or the path of a spec (default: mnli)")
    parser.add_argument("--mode", choices=["fixed", "tte"], help="one prompt, or one for each input")
    parser.add_argument("--steps", type=int, help="iterations")
    parser.add_argument("--query", type=int, help="tokens of the meta-prompt (default: guessed)")
    parser.add_argument("--example", type=int, default=EXAMPLE, help=f"tokens of an example (default: {EXAMPLE})")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that share the agent; needs shard=true (default: 1)")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="sets any field of the configuration")
    options = vars(parser.parse_intermixed_args(argv))
    query, example, gpus = (options.pop(name) for name in ("query", "example", "gpus"))
    for name, value in (("--query", query), ("--example", example), ("--gpus", gpus)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1")
    config = build_config(options, assignments=options.pop("assignments"))
    if is_served(config.target):
        raise ConfigError(f"target {config.target!r} is behind a server; name a folder, a hub id or a config.json")
    if config.shard and gpus < 2:
        raise ConfigError("shard is true, which divides the agent among GPUs; say how many with --gpus, 2 or more")
    if gpus > 1 and not config.shard:
        print("note: --gpus does nothing without shard=true", file=sys.stderr)
    lengths = lengths_of(config, query, example)
    with ending_at_once():
        from experiments.planning.estimate import Estimate, choices
        from experiments.run.models import rank_of
    plans = [Estimate(config, lengths, chosen) for chosen in choices(config, rank_of(config) or RANK, gpus)]
    for line in page(config, lengths, plans):
        print(printable(line))
    return 0


def lengths_of(config: RunConfig, query: int | None = None, example: int = EXAMPLE) -> Lengths:
    """Returns the lengths of texts, the number of rows and of iterations; guesses what is not given."""
    from experiments.planning.estimate import Lengths

    spec = load_spec(config.task)
    labels = len(spec.words) or 2  # without labels a split has as many examples as for two: tasks.splits.build_data
    rows = labels * spec.shots(config.examples.shots)
    steps = 0 if config.arm in GIVEN else config.steps or config.epochs * -(-rows // config.examples.batch_size)
    query = query or FRAME + config.examples.pairs * example
    return Lengths(query, config.sampling.max_new_tokens, example, steps, rows)


def page(config: RunConfig, lengths: Lengths, plans: Sequence[Estimate]) -> Iterator[str]:
    """Yields the plan in words: a line per plan, then the details of the first one, that of the configuration."""
    from experiments.planning.estimate import CONTEXT, GIB
    from experiments.planning.machines import BANDWIDTH_SHARE, COMPUTE_SHARE, GPUS

    chosen = plans[0]
    for role, shadow in (("agent", chosen.agent), ("target", chosen.target)):
        yield f"{role:<8}{getattr(config, role)}: {shadow.parameters / 1e9:.3f} G parameters"
    steps = f"{lengths.steps} iterations of {size_of_iteration(chosen.config)}" if lengths.steps else "no iterations"
    yield (
        f"texts   meta-prompt {lengths.query} tokens, prompt at most {lengths.prompt}, example {lengths.example}; "
        f"{steps}"
    )
    yield ""
    yield f"memory in GiB under each option (and {CONTEXT / GIB:.0f} for the driver and fragments)"
    for plan in plans:
        largest = max(plan.transients, key=lambda line: line.value)
        held = sum(line.value for line in plan.memory())
        where = f"held {held / GIB:.2f} + {largest.name} {largest.value / GIB:.2f}"
        fits = [gpu.name for gpu in GPUS if plan.needed() <= gpu.memory]
        yield f"  {plan.total() / GIB:8.2f}  {plan.options}: {where}; fits {', '.join(fits) or 'none'}"
    yield ""
    yield f"arithmetic of: {chosen.options}"
    for line in chosen.memory():
        yield f"  {line.value / GIB:8.3f} GiB  {line.name}: {line.how}"
    if chosen.options.shards > 1:
        yield "  on each GPU; the update below is that of an undivided agent, so it will really take less"
    yield "  on top, in turn:"
    for line in chosen.transients:
        yield f"  {line.value / GIB:8.3f} GiB  {line.name}: {line.how}"
    _, saved, how, _ = chosen.checkpoint()
    if saved:
        kept = "two are kept while a third is written, one when the run is finished"
        yield ""
        yield "on the disk"
        yield f"  {saved / GIB:8.3f} GiB  a checkpoint: {how}; {kept}"
    yield ""
    yield "work of an iteration"
    if not chosen.work():
        yield "  none: one prompt is scored, without iterations"
    for line in chosen.work():
        yield f"  {line.value / 1e12:8.3f} TFLOP  {line.name}: {line.how}"
    yield ""
    yield (
        f"on one GPU, at {COMPUTE_SHARE:.0%} of its bfloat16 rate; sampling reads all weights for each token, at "
        f"{BANDWIDTH_SHARE:.0%} of its bandwidth (both shares are assumed), and no pass is faster than its launches"
    )
    for gpu in GPUS:
        rates = f"{gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s"
        yield f"  {gpu.name:<11} {rates:<24} {chosen.verdict(gpu)}"


if __name__ == "__main__":
    sys.exit(main())
