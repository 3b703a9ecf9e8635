"""Estimates what a run takes: memory, floating-point operations and hours, each with its arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import torch

from appo.anchor import Reference
from appo.lm.decoding.cache import RoomyLayer, new_cache
from appo.lm.decoding.recorded import KEPT, LEAST_TOKENS, MOST_ROWS, room_for
from appo.policy import MOST_AT_ONCE
from experiments.config import GIVEN, TRAINED, RunConfig
from experiments.planning.machines import BANDWIDTH_SHARE, Machine
from experiments.planning.shadow import Shadow
from experiments.run.models import base_of, rank_of, same_source, shares_base, source_of, targets_of
from experiments.run.resume import bytes_saved

GIB = 2**30
AT_ONCE = 32_768  # tokens in a pass of the target on a GPU: rewards/local.py
REVIEW_QUERIES = 8  # meta-prompts in a review: experiments/arms/fixed.py
ADAM, COPY = 8, 4  # bytes per trained number: its two float32 moments; a float32 copy
SCALE = 64  # this many weights of a quantised layer share a scale of two bytes
CONTEXT = 1.0 * GIB  # memory of the driver, its libraries and fragments
QUANTISED = {"int8": 8, "int4": 4}  # bits per weight


class Line(NamedTuple):
    """One line of a plan.

    Attributes:
        name: what the number is.
        value: bytes of memory, or FLOPs of work.
        how: how the number was computed.
        passes: for work, how many times it runs through all layers.
    """

    name: str
    value: float
    how: str
    passes: float = 0


@dataclass(frozen=True)
class Lengths:
    """How long texts and data are.

    Attributes:
        query: tokens of the meta-prompt.
        prompt: tokens of a prompt, at most.
        example: tokens of an example as the target reads it.
        steps: iterations of the run.
        rows: training examples; the validation split has as many.
    """

    query: int
    prompt: int
    example: int
    steps: int
    rows: int


@dataclass(frozen=True)
class Options:
    """How the models are held in memory.

    Attributes:
        rank: rank of the LoRA adapter; None: all weights are trained.
        shared: whether agent and target share one base; needs a rank.
        checkpointing: whether gradient checkpointing is on.
        bfloat16: whether the agent computes in bfloat16; the target always does.
        quantised: format of the target's linear layers, "int8" or "int4"; None: not quantised.
        trained: whether the arm trains the agent.
        recorded: whether decoding steps are recorded, as on a GPU.
        shards: number of GPUs that divide the agent (`shard=true`); 1: each GPU holds all of it.
    """

    rank: int | None = None
    shared: bool = False
    checkpointing: bool = False
    bfloat16: bool = True
    quantised: str | None = None
    trained: bool = True
    recorded: bool = True
    shards: int = 1

    @classmethod
    def of(cls, config: RunConfig, bfloat16: bool = True, recorded: bool = True, gpus: int = 1) -> Options:
        """Returns the options that a configuration asks for.

        Args:
            config: the run's configuration.
            bfloat16: whether the agent computes in bfloat16, as on a GPU.
            recorded: whether its decoding steps are recorded, as on a GPU.
            gpus: number of GPUs of the run; they divide the agent if `shard` is true.
        """
        shared = shares_base(config, torch.bfloat16 if bfloat16 else torch.float32)
        checkpointing, quantised = config.gradient_checkpointing, config.target_quantization
        shards = gpus if config.shard else 1
        return cls(rank_of(config), shared, checkpointing, bfloat16, quantised, config.arm in TRAINED, recorded, shards)

    def __str__(self) -> str:
        parts = [f"LoRA rank {self.rank}" if self.rank else "all weights trained" if self.trained else "no adapter"]
        parts += [] if self.trained else ["agent not trained"]
        parts += ["one base for both"] if self.shared else []
        parts += ["gradient checkpointing"] if self.checkpointing else []
        parts += [] if self.bfloat16 else ["agent in float32"]
        parts += [f"target in {self.quantised}"] if self.quantised else []
        parts += [f"agent divided among {self.shards} GPUs"] if self.shards > 1 else []
        return ", ".join(parts)


class Estimate:
    """The plan of a run under some options.

    Args:
        config: the run's configuration.
        lengths: lengths of its texts and data.
        options: how the models are held in memory.

    Raises:
        ModelError: a model's configuration cannot be read or planned.
    """

    def __init__(self, config: RunConfig, lengths: Lengths, options: Options) -> None:
        size = min(config.examples.batch_size, lengths.rows)  # no batch is larger than the data
        config = replace(config, examples=replace(config.examples, batch_size=size))
        self.config, self.lengths, self.options = config, lengths, options
        low = torch.bfloat16 if options.bfloat16 else torch.float32
        stored = low if options.rank else torch.float32
        trust = config.trust_remote_code
        targets = targets_of(config)
        self.agent = _agent(base_of(config), stored, low, options.rank, options.checkpointing, trust, targets)
        self.target = _target(source_of(config, "target"), trust)
        several = config.mode == "tte"  # a query for each input, and each prompt answers one
        self.queries = config.examples.batch_size if several else 1
        self.responses = config.prompts * self.queries
        self.examples = 1 if several else config.examples.batch_size
        self.reference = Reference.of(config.appo.reference, config.appo.kl_in_loss)

    def memory(self) -> list[Line]:
        """Returns the memory that is held all the time, in bytes per GPU."""
        agent, target, options = self.agent, self.target, self.options
        each = "bfloat16, frozen" if options.rank and options.bfloat16 else "float32"
        part = f" / {options.shards}" if options.shards > 1 else ""
        numbers = f"{agent.parameters / 1e9:.3f} G numbers in {each}{part}"
        lines = [Line("agent's weights", agent.bytes / options.shards, numbers)]
        if options.rank:
            how = f"{agent.trained / 1e6:.2f} M numbers x 4, of rank {options.rank} on {len(agent.adapted)} layers"
            lines.append(Line("adapter", agent.trained * COPY, how))
        if options.shared:
            lines.append(Line("target's weights", 0, "those of the agent's base"))
        else:
            held, how = _held(target, options.quantised)
            lines.append(Line("target's weights", held, how))
        if options.trained:
            mine = agent.trained / options.shards
            trained = f"{agent.trained / 1e6:,.2f} M trained numbers{part}"
            lines.append(Line("optimizer", mine * ADAM, f"{trained} x two float32 moments"))
            if self.reference.reviewed and self.config.anchor.promote:
                how = f"{trained} x 4, and from a promotion on its own two moments for a rollback"
                lines.append(Line("anchor", mine * (COPY + ADAM), how))
            else:
                lines.append(Line("anchor", mine * COPY, f"{trained} x 4"))
        return [*lines, *self._recordings()]

    def _recordings(self) -> list[Line]:
        """Returns the memory of recorded decoding steps, which stay on a GPU with a cache for each batch size."""
        tokens = self.lengths.query + self.lengths.prompt
        made = [("agent", self.responses)]
        if self.config.headroom:
            made.append(("agent", self.config.headroom))
        if self.options.trained and self.reference.reviewed:
            reviewed, _ = self._reviewed()
            made += [("agent", reviewed), ("anchor", reviewed)]  # one each: their weights have different addresses
        distinct = {(who, *room_for(count, tokens)) for who, count in made if count <= MOST_ROWS}
        rows = sorted((count for _, count, _ in distinct), reverse=True)[:KEPT]
        possible = self.options.recorded and self.options.shards == 1 and self.lengths.prompt >= LEAST_TOKENS
        if not (possible and rows and self.config.arm not in GIVEN) or any(new_cache(self.agent.model).is_sliding):
            return []
        sizes, (_, length) = sorted(set(rows), reverse=True), room_for(1, tokens)
        held = sum(sizes) * self._per_token() * length + sum(rows) * 4 * self.agent.vocabulary
        how = f"keys and values of {' + '.join(map(str, sizes))} rows x {length} tokens, logits of {sum(rows)} rows"
        return [Line("recorded steps", held, how)]

    @cached_property
    def transients(self) -> list[Line]:
        """The memory that each phase of an iteration needs on top, in bytes. Phases take turns: the largest counts."""
        return [*(self._training() if self.options.trained else []), *self._answering()]

    def _training(self) -> list[Line]:
        size, t = self.config.appo, self.lengths
        micro = min(size.micro_batch_size or self.responses, size.minibatch_size or self.responses, self.responses)
        per_query = min(micro, self.config.prompts)
        queries = max(1, micro // self.config.prompts)
        owner = [row // per_query for row in range(micro)]
        scaled = self.config.sampling.temperature != 1
        shape = f"{micro} responses of {t.prompt} tokens to {queries} queries of {t.query}, packed"
        owners = tuple(min(o, queries - 1) for o in owner)
        update = _update(self.agent, (t.query,) * queries, (t.prompt,) * micro, owners, scaled)
        rows = [q for q in range(self.queries) for _ in range(self.config.prompts)]
        anchor = self.agent.forward([t.query] * self.queries, [t.prompt] * len(rows), rows, t.prompt)
        logits = f"logits {micro * t.prompt} x {self.agent.vocabulary}"
        return [
            Line("update", update, f"activations, {logits}, gradients; {shape}; counted on meta tensors"),
            Line("anchor's pass", anchor, f"without gradients, logits of {len(rows) * t.prompt} tokens; counted"),
        ]

    def _answering(self) -> list[Line]:
        t = self.lengths
        branches = self.responses * self.examples
        fit = max(1, min(branches, AT_ONCE // (t.example + t.prompt // self.examples)))
        scoring = _scoring(self.target, t, max(1, fit // self.examples), fit, self.examples)
        sampling = self.cache() + 5 * 4 * self._written() * self.agent.vocabulary
        cached = f"{self._written()} rows x {t.query + t.prompt + 128} tokens"
        scored = Line("scoring", scoring, f"{fit} examples of {t.example} tokens a pass, label rows only; counted")
        if self.config.arm in GIVEN:
            return [scored]
        how = f"keys and values of {cached}, and 5 numbers a row and word of the vocabulary"
        if self.options.shards > 1:
            agent = self.agent
            sampling += agent.in_layers * (2 if self.options.bfloat16 else 4) + (agent.bytes - agent.in_layers * 4)
            how += ", and the whole agent, gathered"
        return [scored, Line("sampling", sampling, how)]

    def cache(self) -> int:
        """Returns the bytes of keys and values during sampling."""
        tokens = self.lengths.query + self.lengths.prompt + RoomyLayer.ROOM
        return self._per_token() * tokens * self._written()

    def _written(self) -> int:
        """Returns how many responses are written at a time, at most; recorded steps have their own memory."""
        most = self.responses
        if self.options.trained and self.reference.reviewed and not self._recordings():
            most = max(most, self._reviewed()[0])
        return min(most, MOST_AT_ONCE)

    def _per_token(self) -> int:
        """Returns the bytes of keys and values per token; they are float32 under autocast."""
        config = self.agent.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = 2 if self.options.rank and self.options.bfloat16 else 4
        return int(2 * config.num_hidden_layers * heads * width * size)

    def checkpoint(self) -> Line:
        """Returns the bytes of a checkpoint on the disk."""
        each, trained = bytes_saved(self.config), self.agent.trained
        return Line("checkpoint", trained * each, f"{trained / 1e6:,.2f} M trained numbers x {each} bytes")

    def total(self) -> float:
        """Returns the bytes at the peak, without the memory of the driver."""
        return sum(line.value for line in self.memory()) + max(line.value for line in self.transients)

    def work(self) -> list[Line]:
        """Returns the FLOPs of an iteration by phase; nothing for an arm without iterations."""
        t, agent, target, config = self.lengths, self.agent, self.target, self.config
        if config.arm in GIVEN:
            return []
        made, read = self.responses * t.prompt, self.queries * t.query
        forward = 2.0 * agent.in_layers * (made + read) + 2.0 * agent.head * made
        told = made + self.responses * self.examples * t.example
        scored = 2.0 * target.in_layers * told
        per_step = f"{agent.in_layers / 1e9:.3f} G weights in layers"
        lines = [
            Line("sampling", forward, f"2 x {per_step} x {made + read:,} tokens, head for {made:,}", t.prompt),
            Line("scoring", scored, f"2 x {target.in_layers / 1e9:.3f} G x {told:,} tokens", -(-told // AT_ONCE)),
        ]
        if not self.options.trained:
            return lines
        epochs = config.appo.ppo_epochs
        factor = (2 if self.options.rank else 3) + (1 if self.options.checkpointing else 0)
        passes = 2 if self.options.bfloat16 else 1  # in float32 sampling gives the agent's own: APPOTrainer.collect
        which = "old and anchor's" if passes == 2 else "anchor's"
        lines += [
            Line(f"{which} log-probabilities", passes * forward, f"{passes} x a pass as in sampling", passes),
            Line("updates", epochs * factor * forward, f"{epochs} epochs x {factor} passes", 3 * epochs),
        ]
        return [*lines, *([self._reviews()] if self.reference.reviewed else [])]

    def _reviewed(self) -> tuple[int, int]:
        """Returns how many prompts each side writes in a review, and on how many rows each prompt is scored."""
        rows = self.lengths.rows
        if self.config.mode == "tte":  # a prompt for each validation input
            return rows, 1
        return self.config.anchor.prompts, min(self.config.examples.review_rows or rows, rows)

    def _reviews(self) -> Line:
        """Returns the work of reviews per iteration; in a review, agent and anchor both write prompts."""
        t, config = self.lengths, self.config
        each, rows = self._reviewed()
        prompts, queries = 2 * each, 2 * (each if config.mode == "tte" else min(each, REVIEW_QUERIES))
        period = config.anchor.period * -(-t.rows // config.examples.batch_size)
        read = 2.0 * self.agent.in_layers * (queries * t.query + prompts * t.prompt)
        scored = 2.0 * self.target.in_layers * prompts * (t.prompt + rows * t.example)
        how = f"{prompts} prompts on {rows} rows, once in {period} iterations"
        return Line("reviews", (read + scored) / period, how, 2 * (t.prompt + 1) / period)

    def seconds(self, machine: Machine) -> float:
        """Returns the seconds of an iteration.

        A phase takes the time of its products at a share of the peak rate, or the time to launch its layers, whichever
        is longer. Sampling also takes at least the time to read all weights and the cache once per token.
        """
        layers, target_flops = self.agent.layers, machine.target_flops or machine.flops
        flops = {"scoring": target_flops, "reviews": target_flops}  # most of a review is scoring
        launch, step = (least * (2 if self.options.rank else 1) for least in (machine.launch, machine.step))
        width = 2 if self.options.rank and self.options.bfloat16 else 4
        read = self.agent.parameters * width + self.cache()
        sampling = self.lengths.prompt * read / (BANDWIDTH_SHARE * machine.bandwidth)
        least = {"sampling": step, "reviews": step}
        phases = [
            max(
                line.value / (machine.share * flops.get(line.name, machine.flops)),
                line.passes * layers * least.get(line.name, launch),
            )
            for line in self.work()
        ]
        return max(phases[0], sampling) + sum(phases[1:]) if phases else 0.0

    def needed(self) -> float:
        """Returns the GiB at the peak, with the memory of the driver."""
        return (self.total() + CONTEXT) / GIB

    def verdict(self, machine: Machine) -> str:
        """Says whether the run fits on a machine, and how long it takes there."""
        needed = self.needed()
        if needed > machine.memory:
            return f"does not fit: {needed:.1f} of {machine.memory:.1f} GiB"
        seconds = self.seconds(machine)
        time = f", {seconds:.2g} s an iteration, {seconds * self.lengths.steps / 3600:.2g} h in all" if seconds else ""
        return f"fits: {needed:.1f} of {machine.memory:.1f} GiB{time}"


@cache
def _agent(
    name: str,
    stored: torch.dtype,
    computes: torch.dtype,
    rank: int | None,
    checkpointing: bool,
    trust: bool,
    targets: str | tuple[str, ...],
) -> Shadow:
    return Shadow(name, stored, computes, True, rank, checkpointing, trust, targets)


@cache
def _update(
    agent: Shadow, prefixes: tuple[int, ...], branches: tuple[int, ...], owner: tuple[int, ...], scaled: bool
) -> int:
    return agent.update(prefixes, branches, owner, scaled)


@cache
def _target(name: str, trust_remote_code: bool) -> Shadow:
    return Shadow(name, torch.bfloat16, torch.bfloat16, trust_remote_code=trust_remote_code)


@cache
def _scoring(target: Shadow, lengths: Lengths, prompts: int, rows: int, examples: int) -> int:
    """Returns the peak bytes of a pass over `rows` examples, `examples` of them under each prompt."""
    owner = [min(row // examples, prompts - 1) for row in range(rows)]
    return target.forward([lengths.prompt] * prompts, [lengths.example] * rows, owner, 0)


def _held(target: Shadow, quantised: str | None) -> tuple[float, str]:
    if quantised is None:
        return target.bytes, f"{target.parameters / 1e9:.3f} G numbers in bfloat16, frozen"
    bits, linear = QUANTISED[quantised], sum(layer.weight.numel() for layer in target.linear)
    held = target.bytes - 2 * linear + linear * bits / 8 + 2 * linear / SCALE
    return held, f"{linear / 1e9:.3f} G numbers of {bits} bits and a scale for each {SCALE}, the rest in bfloat16"


def choices(config: RunConfig, rank: int = 16, gpus: int = 1) -> list[Options]:
    """Returns the options that a plan compares: first those of the configuration, then others."""
    asked = Options.of(config, config.dtype != "float32", gpus=gpus)
    same = same_source(base_of(config), source_of(config, "target"))
    others: Iterable[Options] = [
        option if option.rank else replace(option, shards=asked.shards) for option in _others(same, rank)
    ]
    if not asked.trained:
        others = (replace(asked, quantised=bits, shared=False) for bits in QUANTISED)
    return list(dict.fromkeys([asked, *others]))


def _others(same: bool, rank: int) -> Iterator[Options]:
    yield Options()
    yield Options(checkpointing=True)
    yield Options(rank=rank)
    yield Options(rank=rank, quantised="int8")
    yield Options(rank=rank, quantised="int4")
    if same:
        yield Options(rank=rank, shared=True)
        yield Options(rank=rank, shared=True, checkpointing=True)
