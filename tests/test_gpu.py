"""Whole runs on a GPU: `make test-gpu`. Skipped without a GPU; the other tests cover the same code on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from appo.lm.decoding import recorded
from appo.policy import Policy
from appo.trainer import APPOTrainer
from experiments import evaluate, prompt
from experiments.config import LAB_DIR, build_config
from experiments.run.folder import read_jsonl
from experiments.run.run import prepare
from experiments.train import main, train

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine (torch.cuda.is_available())"),
]
SMALL = [f"device={DEVICE}", "threads=1", "examples.test_limit=60", "headroom=4"]


def run(folder: Path, *assignments: str, task: str = "sst2", steps: int = 4, mode: str = "fixed") -> dict:
    options = {"task": task, "steps": steps, "mode": mode, "run": str(folder)}
    return train(prepare(build_config(options, assignments=[*SMALL, *assignments])), quiet=True)


def accuracies(folder: Path) -> list[float]:
    return [row["accuracy_mean"] for row in read_jsonl(folder / "metrics.jsonl")]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_everything_of_a_run_is_on_the_gpu(tmp_path: Path) -> None:
    made = prepare(build_config({"task": "sst2", "run": str(tmp_path / "run")}, assignments=SMALL))
    trainer = APPOTrainer(made.policy, generator=torch.Generator(DEVICE).manual_seed(0))
    rollout = made.policy.sample([made.policy.query("a", "b")], trainer.generator, copies=4)
    tensors = [
        rollout.owner,
        rollout.tokens,
        rollout.logprobs,
        rollout.values,
        *made.policy.parameters(),
        *made.policy.buffers(),
    ]
    assert {tensor.device.type for tensor in tensors} == {DEVICE}
    assert made.target.target.lm.device.type == DEVICE
    assert trainer.review_generator is not None and trainer.review_generator.device.type == DEVICE
    assert trainer.updater.generator is not None and trainer.updater.generator.device.type == "cpu"


@pytest.mark.parametrize("task", ["sst2", "mnli", "movie_recommendation", "antonyms", "sum"])
def test_a_lab_run_comes_to_its_end(task: str, tmp_path: Path) -> None:
    result = run(tmp_path / "run", "appo.minibatch_size=8", "reward.likelihood_weight=0.1", task=task, steps=12)
    assert 0 <= result["test_score"] <= 1
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns(dtype: str, tmp_path: Path) -> None:
    run(tmp_path / "run", f"dtype={dtype}", f"target_dtype={dtype}", steps=25)
    scores = accuracies(tmp_path / "run")
    assert mean(scores[-5:]) > mean(scores[:5]) + 0.1


def test_bfloat16_learns_as_float32_does(tmp_path: Path) -> None:
    ends = {}
    for dtype in ("float32", "bfloat16"):
        run(tmp_path / dtype, f"dtype={dtype}", f"target_dtype={dtype}", task="mnli", steps=100)
        ends[dtype] = mean(accuracies(tmp_path / dtype)[-20:])
    assert ends["bfloat16"] == pytest.approx(ends["float32"], abs=0.05)


def test_test_time_editing_runs_and_its_agent_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", task="mixed", mode="tte")
    assert evaluate.main(["--run", str(tmp_path / "run"), "--votes", "3"]) == 0
    capsys.readouterr()
    assert prompt.main(["--run", str(tmp_path / "run"), "--input", "premise : a", "--answer"]) == 0
    assert "answer: " in capsys.readouterr().out


def test_a_finished_run_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run")
    assert evaluate.main(["--run", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["test_score"] == pytest.approx(
        json.loads((tmp_path / "run/best_prompt.json").read_text())["test_score"]
    )
    assert prompt.main(["--run", str(tmp_path / "run"), "--input", "a film", "--answer"]) == 0


def test_resuming_gives_the_same_rows_bit_for_bit(tmp_path: Path) -> None:
    given = ["--task", "sst2", *SMALL, "checkpoint_every=2"]
    assert main([*given, "--steps", "6", "--run", str(tmp_path / "whole")]) == 0
    assert main([*given, "--steps", "3", "--run", str(tmp_path / "parts")]) == 0
    assert main(["--run", str(tmp_path / "parts"), "--resume", "--steps", "6"]) == 0
    whole, parts = (tmp_path / name / "prompts.jsonl" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_what_is_sampled_is_what_is_evaluated(tmp_path: Path) -> None:
    made = prepare(build_config({"task": "sst2", "run": str(tmp_path / "run")}, assignments=SMALL))
    policy: Policy = made.policy
    rollout = policy.sample([policy.query("a", "b")], torch.Generator(DEVICE).manual_seed(0), copies=8)
    with torch.no_grad():
        difference = (policy.evaluate(rollout).logprobs - rollout.logprobs).abs().max().item()
    assert difference < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recorded_step_samples_what_a_launched_one_does(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*SMALL, f"dtype={dtype}"]
    made = prepare(build_config({"task": "sst2", "run": str(tmp_path / "run")}, assignments=settings))
    policy: Policy = made.policy
    trainer = APPOTrainer(policy, generator=torch.Generator(DEVICE).manual_seed(0))
    queries = [policy.query("a", "b"), policy.query("a longer question", "b")]

    def sampled() -> list[torch.Tensor]:
        found = [policy.sample(queries, torch.Generator(DEVICE).manual_seed(0), copies=4) for _ in range(2)]
        with trainer.anchor.in_place():
            found.append(policy.sample(queries, torch.Generator(DEVICE).manual_seed(0), copies=4))
        return [rollout.logprobs for rollout in found]

    with torch.no_grad():  # the agent is no longer its anchor, and its weights change between two recordings
        policy.model.get_input_embeddings().weight.mul_(1.5)
    replayed = sampled()
    assert len(policy.lm._recordings._made) == 2
    monkeypatch.setattr(recorded, "_launches_take_longest", lambda begun, budget: False)
    launched = sampled()
    assert not torch.equal(launched[0], launched[2])
    tolerance = 1e-4 if dtype == "float32" else 0.3
    for ours, theirs in zip(replayed, launched, strict=True):
        assert (ours[:, 0] - theirs[:, 0]).abs().max() < tolerance  # later tokens may differ where rounding decides
    assert torch.equal(replayed[0], replayed[1])


def test_an_adapter_on_shared_weights_learns_in_bfloat16(tmp_path: Path) -> None:
    agent = str(LAB_DIR / "agent")
    options = {"task": "sst2", "agent": agent, "target": agent, "data": "lab", "run": str(tmp_path / "run"), "steps": 4}
    made = prepare(build_config(options, assignments=[*SMALL, "preset=lora", "lora.rank=4"]))
    assert made.target.described()["shared"]
    assert {weight.dtype for weight in made.policy.trained().values()} == {torch.float32}
    assert made.policy.model.dtype == torch.bfloat16
    before = {name: weight.detach().clone() for name, weight in made.policy.trained().items()}
    train(made, quiet=True)
    assert sum(not torch.equal(weight, before[name]) for name, weight in made.policy.trained().items()) > 10
    assert main(["--run", str(tmp_path / "run"), "--resume", "--steps", "6"]) == 0
