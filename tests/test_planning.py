"""A plan's memory agrees with the same step on real tensors, whose bytes are counted; its work with real runs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from appo.anchor import Anchor
from appo.config import APPOConfig
from appo.lm import adapter
from appo.lm.model import CausalLM
from appo.policy import Policy
from appo.rollout import Batch, Query, Rollout, Scored
from appo.trainer import APPOTrainer
from appo.update import Updater, advantages
from experiments import plan
from experiments.config import TRAINED, build_config
from experiments.planning.estimate import Estimate, Lengths, Options
from experiments.planning.machines import Machine
from experiments.planning.outlook import lengths_of, outlook
from experiments.planning.shadow import LiveBytes, Shadow
from experiments.planning.spent import spent
from experiments.run.models import ModelError
from experiments.run.run import prepare
from experiments.tuning.loop import arm_of
from tasks.meta_prompt import meta_prompt
from tests.conftest import SPECIAL_IDS, byte_tokenizer, plain_sampling

QUERY, RESPONSES, LENGTH = 48, 4, 24
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 2000, "n_embd": 192, "n_layer": 3, "n_head": 6, "n_positions": 512},
    "large vocabulary": {
        "model_type": "qwen2", "vocab_size": 40_000, "hidden_size": 128, "intermediate_size": 320,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
}  # fmt: skip


def folder_of(name: str, tmp_path: Path) -> str:
    options = {key: value for key, value in SHAPES[name].items() if key != "model_type"}
    AutoConfig.for_model(SHAPES[name]["model_type"], **options, **SPECIAL_IDS).save_pretrained(tmp_path)
    return str(tmp_path)


def model_of(folder: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def scored() -> Scored:
    torch.manual_seed(0)
    shape = (RESPONSES, LENGTH)
    tokens, mask = torch.randint(3, 200, shape), torch.ones(shape, dtype=torch.bool)
    numbers = (torch.randn(shape) for _ in range(3))
    rollout = Rollout(
        (Query(tuple(range(3, 3 + QUERY))),), torch.zeros(RESPONSES, dtype=torch.long), tokens, mask, next(numbers),
        next(numbers),
    )  # fmt: skip
    return Scored.of(rollout, torch.arange(float(RESPONSES)), next(numbers))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", adapter.ALL_LINEAR),
        ("llama", ("q_proj", "v_proj")),
        ("gpt2", adapter.ALL_LINEAR),
        ("large vocabulary", adapter.ALL_LINEAR),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_an_adapters_update_is_within_15_percent_of_the_plan(
    name: str, targets: str | tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    folder = folder_of(name, tmp_path)
    model = model_of(folder).to(dtype)
    adapter.add(model, 8, targets=targets)
    lm = CausalLM(model, byte_tokenizer(), None, dtype, onednn=False)
    updater = Updater(Policy(lm, plain_sampling(LENGTH)), APPOConfig(max_ratio=None))
    shadow = Shadow(folder, dtype, dtype, trained=True, rank=8, targets=targets)
    measured = measured_update(updater)
    planned = shadow.update([QUERY - 1], [LENGTH] * RESPONSES, [0] * RESPONSES, scaled=False)
    assert planned == pytest.approx(measured, rel=0.15)
    assert shadow.trained == sum(weight.numel() for weight in updater.policy.trained().values())
    frozen = {id(p): p.nbytes for p in model.parameters() if not p.requires_grad}
    assert shadow.bytes == sum(frozen.values())


def measured_update(updater: Updater) -> int:
    """Peak bytes of an update, without weights and the optimizer's moments."""
    rows = scored()
    batch = Batch(*vars(rows).values(), *advantages(rows, updater.config, 0.1))
    updater.optimizer_step(batch)  # makes the optimizer's moments
    updater.optimizer.zero_grad()
    measured = LiveBytes()
    measured.ignore(updater.policy.parameters())
    with measured:
        updater.optimizer_step(batch)
    return measured.peak


def test_layers_that_are_not_there_are_refused_in_a_plan(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    config = build_config({"agent": folder, "target": folder}, assignments=["lora.rank=8", "lora.targets=q_proj,wrong"])
    with pytest.raises(ModelError, match=r"agent: no adapter fits .*: no layer is named wrong"):
        Estimate(config, Lengths(8, 8, 8, 1, 8), Options.of(config))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_an_update_is_within_15_percent_of_the_plan(
    name: str, dtype: torch.dtype, checkpointing: bool, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path)
    lm = CausalLM(model_of(folder), byte_tokenizer(), None, dtype, checkpointing, onednn=False)
    updater = Updater(Policy(lm, plain_sampling(LENGTH)), APPOConfig(max_ratio=None))
    measured = measured_update(updater)
    shadow = Shadow(folder, computes_in=dtype, trained=True, checkpointing=checkpointing)
    planned = shadow.update([QUERY - 1], [LENGTH] * RESPONSES, [0] * RESPONSES, scaled=False)
    assert planned == pytest.approx(measured, rel=0.15)
    anchor = Anchor(updater.policy, updater.optimizer)
    held = [*updater.policy.parameters(), *anchor.state_dict()["parameters"].values()]
    held += [s for state in updater.optimizer.state.values() for name, s in state.items() if name != "step"]
    assert shadow.trained * 4 * 4 == sum(tensor.numel() * tensor.element_size() for tensor in held)


# -- in the header of a run, and as a command --------------------------------------------------------------------


def test_a_run_begins_with_its_memory_work_and_time(tmp_path: Path) -> None:
    run = prepare(build_config({"task": "sst2", "run": str(tmp_path / "run")}, assignments=["threads=1"]))
    said = dict(outlook(run))
    assert list(said) == ["memory", "work", "expected"]
    agent = sum(weight.nbytes for weight in run.policy.model.parameters()) / 2**30
    assert f"agent's weights {agent:.2g}" in said["memory"]
    assert lengths_of(run).query == len(run.policy.query(*meta_prompt(run.data.train[:5])).tokens)
    assert "s an iteration" in said["expected"] or "min an iteration" in said["expected"]


def test_batches_are_planned_no_larger_than_the_data(tmp_path: Path) -> None:
    words = ["threads=1", "examples.shots=2"]  # 4 training rows

    def work(size: int) -> str:
        given = {"task": "sst2", "run": str(tmp_path / "run")}
        config = build_config(given, assignments=[*words, f"examples.batch_size={size}", "arm=frozen"])
        return dict(outlook(prepare(config)))["work"]

    assert work(4) == work(1000)


def test_the_command_plans_batches_no_larger_than_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for size in (32, 1000):
        assert plan.main(["--task", "sst2", f"examples.batch_size={size}", "steps=60"]) == 0
        pages.append(capsys.readouterr().out)
    assert pages[0] == pages[1] and "x 32 examples" in pages[0]


@pytest.mark.parametrize("task", ["mnli", "openbookqa", "sum"])  # three labels, choices, text
def test_a_plan_without_data_knows_how_many_rows_and_iterations_there_will_be(task: str, tmp_path: Path) -> None:
    words = ["threads=1", "steps=null", "epochs=3", "examples.shots=6", "examples.batch_size=5"]
    config = build_config({"task": task, "run": str(tmp_path / "run")}, assignments=words)
    run, lengths = prepare(config), plan.lengths_of(config)
    assert (lengths.rows, lengths.steps) == (len(run.data.train), run.steps)
    assert lengths_of(run).rows == len(run.data.validation)


@pytest.mark.parametrize("mode", ["fixed", "tte"])
def test_a_planned_review_has_the_prompts_and_rows_of_a_real_one(mode: str, tmp_path: Path) -> None:
    words = ["threads=1", f"mode={mode}", "examples.shots=5", "anchor.prompts=3"]
    run = prepare(build_config({"task": "sst2", "run": str(tmp_path / "run")}, assignments=words))
    question = arm_of(run).ask_for_review(random.Random(0))
    written = 2 * question.copies * len(question.queries)  # by the agent and by the anchor
    (review,) = [
        line for line in Estimate(run.config, lengths_of(run), Options(rank=4)).work() if line.name == "reviews"
    ]
    assert review.how.startswith(f"{written} prompts on {question.rows} rows, ")


def test_the_work_that_a_run_has_spent_counts_batches_no_larger_than_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine("fixed rates", 1.0, 1e12, 1e12)
    monkeypatch.setattr("experiments.planning.spent.measured", lambda *_: machine)

    def told(size: int) -> list[str]:
        words = ["threads=1", "examples.shots=2", f"examples.batch_size={size}"]  # 4 training rows
        run = prepare(build_config({"task": "sst2", "run": str(tmp_path / str(size))}, assignments=words))
        seconds = {"seconds": 3.0, "sampling_seconds": 1.0, "scoring_seconds": 1e-3, "update_seconds": 1.0}
        run.folder.append("metrics.jsonl", [{"iteration": 1, "tokens": 320, **seconds}])
        return list(spent(run))

    assert told(1000) == told(4)


def test_a_review_in_mode_tte_is_planned_as_a_prompt_for_each_input(tmp_path: Path) -> None:
    given = {"task": "mixed", "mode": "tte", "run": str(tmp_path / "run")}
    run = prepare(build_config(given, assignments=["threads=1", "examples.shots=8"]))
    lengths = lengths_of(run)
    plan = Estimate(run.config, lengths, Options.of(run.config, bfloat16=False))
    question = arm_of(run).ask_for_review(random.Random(0))
    prompts = 2 * len(question.queries) * question.copies  # the agent's and the anchor's, and an answer under each
    assert prompts == 2 * len(run.data.validation)
    ends = 2 * plan.agent.in_layers * (lengths.query + lengths.prompt)
    ends += 2 * plan.target.in_layers * (lengths.prompt + lengths.example)
    (planned,) = (line.value for line in plan.work() if line.name == "reviews")
    assert planned == pytest.approx(prompts * ends / (run.config.anchor.period * run.steps_per_epoch))
    longest = max(len(query.tokens) for query in question.queries)
    assert abs(lengths.query - longest) <= 0.2 * longest  # a meta-prompt of this mode, with an input of its own


@pytest.mark.parametrize("arm", ["appo", "ppo", "frozen", "edits", "manual"])
def test_an_arm_holds_and_does_what_its_plan_says(arm: str, tmp_path: Path) -> None:
    run = prepare(build_config({"task": "sst2", "run": str(tmp_path / "run")}, assignments=["threads=1", f"arm={arm}"]))
    plan = Estimate(run.config, lengths_of(run), Options.of(run.config, bfloat16=False))
    lines = {line.name: line.value for line in plan.memory()}
    way = arm_of(run)
    if arm != "manual":
        way.step(1)
    if arm == "appo":
        way.trainer.anchor.promote()
    # A checkpoint holds what is trained, its moments and the anchor; besides, some numbers of a run's own.
    tensors = [t for t in tree_leaves(way.state_dict()["trainer"]) if isinstance(t, torch.Tensor) and t.dim() > 0]
    held = sum(t.nbytes for t in tensors if t.is_floating_point())
    trained = plan.agent.trained * 4 if arm in TRAINED else 0
    assert held == trained + lines.get("optimizer", 0) + lines.get("anchor", 0)
    assert held == plan.checkpoint().value
    assert hasattr(way, "trainer") == (arm in TRAINED)
    work = [line.name for line in plan.work()]
    assert work == {
        "appo": ["sampling", "scoring", "anchor's log-probabilities", "updates", "reviews"],
        "ppo": ["sampling", "scoring", "anchor's log-probabilities", "updates"],
        "manual": [],
    }.get(arm, ["sampling", "scoring"])
    assert [line.name for line in plan.transients][-2:] == (["scoring"] if arm == "manual" else ["scoring", "sampling"])
    assert list(dict(outlook(run))) == (["memory"] if arm == "manual" else ["memory", "work", "expected"])


def test_recorded_steps_hold_what_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches of recordings, made here as on a GPU but for the graph: of iterations and reviews."""
    monkeypatch.setattr("appo.lm.decoding.recorded._launches_take_longest", lambda begun, budget: True)
    monkeypatch.setattr("appo.lm.decoding.recorded.looks_familiar", lambda begun: False)
    given = ["threads=1", "headroom=0", "prompts=4", "anchor.prompts=10", "sampling.max_new_tokens=8"]
    run = prepare(build_config({"task": "sst2", "run": str(tmp_path / "run")}, assignments=given))
    trainer = APPOTrainer(run.policy)
    query = run.policy.query(*meta_prompt(run.data.train[:5]))
    for count in (run.config.prompts, run.config.anchor.prompts):
        run.policy.sample([query], copies=count)
    with trainer.anchor.in_place():
        run.policy.sample([query], copies=run.config.anchor.prompts)
    made = run.policy.lm._recordings._made.values()
    assert [len(recorded.ids) for recorded in made] == [4, 12, 12]  # iterations, and two sides of a review
    estimate = Estimate(run.config, lengths_of(run), Options(bfloat16=False))
    (line,) = (line for line in estimate.memory() if line.name == "recorded steps")
    layers = [layer for recorded in made for layer in recorded.cache.layers]
    held = {t.data_ptr(): t.nbytes for layer in layers for t in (layer.keys, layer.values)}  # two share theirs
    caches = sum(held.values())
    logits = sum(recorded.output.logits.nbytes for recorded in made)
    assert line.value == caches + logits


def test_a_divided_agent_is_planned_by_its_part(capsys: pytest.CaptureFixture[str]) -> None:
    config = build_config({}, assignments=["shard=true"])
    whole, part = (Estimate(config, Lengths(100, 50, 40, 10, 32), Options.of(config, gpus=gpus)) for gpus in (1, 4))
    names = ("agent's weights", "optimizer", "anchor")
    sizes = [{line.name: line.value for line in estimate.memory()} for estimate in (whole, part)]
    assert [sizes[1][name] for name in names] == [sizes[0][name] / 4 for name in names]
    assert sizes[1]["target's weights"] == sizes[0]["target's weights"]
    gathered = part.transients[-1].value - whole.transients[-1].value
    agent = part.agent
    assert gathered == agent.in_layers * 2 + (agent.parameters - agent.in_layers) * 4
    assert plan.main(["shard=true", "--gpus", "4"]) == 0
    assert "agent divided among 4 GPUs" in capsys.readouterr().out
    assert plan.main(["shard=true"]) == 2
    assert "say how many with --gpus" in capsys.readouterr().err


def test_the_command_plans_an_arm_without_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["arm=frozen"]) == 0
    said = capsys.readouterr().out
    assert "arithmetic of: no adapter, agent not trained" in said
    assert not [word for word in ("optimizer", "anchor", "reviews", "LoRA", "checkpoint") if word in said]
    assert plan.main(["arm=empty"]) == 0
    assert "none: one prompt is scored, without iterations" in capsys.readouterr().out


def test_the_command_plans_what_the_configuration_asks_for_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of("llama", tmp_path)
    model = str(tmp_path / "config.json")
    given = ["--agent", model, "--target", model, "lora.rank=4", "gradient_checkpointing=true", "prompts=2"]
    assert plan.main([*given, "examples.batch_size=4", "sampling.max_new_tokens=8"]) == 0
    said = capsys.readouterr().out
    assert "arithmetic of: LoRA rank 4, one base for both, gradient checkpointing" in said
    assert said.count("fits") > 4
    assert " GiB  a checkpoint: 0.0" in said
    assert plan.main(["--agent", str(tmp_path / "nothing.json")]) == 2
    capsys.readouterr()
    assert plan.main(["--target", "models/no-such-model"]) == 2
    assert capsys.readouterr().err.startswith("error: no folder 'models/no-such-model'; ")


@pytest.mark.parametrize("option", ["--query", "--example", "--gpus"])
@pytest.mark.parametrize("number", ["0", "-5"])
def test_numbers_below_1_are_refused(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([option, number]) == 2
    assert capsys.readouterr().err == f"error: {option} is {number}; expected at least 1\n"


def test_gpus_without_shard_are_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plan, "page", lambda *_: ())
    assert plan.main(["arm=frozen", "--gpus", "4"]) == 0
    assert capsys.readouterr().err == "note: --gpus does nothing without shard=true\n"


def test_scoring_runs_at_the_rate_of_the_targets_dtype() -> None:
    estimate = Estimate(build_config({}), Lengths(query=100, prompt=100, example=40, steps=10, rows=32), Options())
    one = Machine("of one rate", 80.0, 1e9, 1e18, launch=0.0, step=0.0)
    work = {line.name: line.value for line in estimate.work()}
    faster = (work["scoring"] + work["reviews"]) * (1 - 1 / 4) / (one.share * 1e9)
    assert faster > 0
    two = one._replace(target_flops=4e9)
    assert estimate.seconds(one) - estimate.seconds(two) == pytest.approx(faster)


def test_a_pass_takes_at_least_its_launches() -> None:
    lengths = Lengths(query=100, prompt=100, example=40, steps=10, rows=32)
    estimate = Estimate(build_config({}), lengths, Options(rank=4))
    slow = Machine("slow to start", 80.0, 1e18, 1e18, launch=1e-3, step=1e-4)
    layers = estimate.agent.layers
    steps = sum(line.passes for line in estimate.work() if line.name in ("sampling", "reviews"))
    others = sum(line.passes for line in estimate.work()) - steps
    assert steps > 100 > others > 0
    assert estimate.seconds(slow) == pytest.approx((others * 1e-3 + steps * 1e-4) * 2 * layers, rel=1e-3)


def test_a_target_behind_a_server_is_no_model_to_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--target", "http://localhost:8000#m"]) == 2
    assert "http://localhost:8000#m' is behind a server" in capsys.readouterr().err
