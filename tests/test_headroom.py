"""The headroom check before training, on the lab and with a target that ignores the prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.config import build_config
from experiments.diagnostics.headroom import TOO_FEW, look
from experiments.run.run import Run, prepare
from experiments.run.statistics import NO_VERDICT
from experiments.train import train
from rewards.local import LocalTarget
from rewards.reward import ClassificationReward
from rewards.target import Remembered
from tasks.spec import Example

SMALL = ["threads=1", "sampling.max_new_tokens=24", "examples.test_limit=30", "prompts=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = {"task": "sst2", "run": str(tmp_path_factory.mktemp("runs") / "run")}
    return prepare(build_config(options, assignments=SMALL))


def deaf(run: Run) -> Run:
    """The same run with a target that ignores prompts: it always reads the same one."""
    heard = run.target.target
    assert isinstance(heard, LocalTarget)
    target = LocalTarget(heard.lm, heard.template, heard.words)
    context = target.context
    target.context = lambda prompt, text: context("Do the task.", text)  # type: ignore[method-assign]
    return replace(run, target=Remembered(target), reward=ClassificationReward(target))


def test_on_the_lab_prompts_matter(run: Run) -> None:
    seen = look(run, 16)
    assert seen.p is not None and seen.p < 0.05 and seen.verdict.startswith("prompts matter")
    assert (seen.rows, seen.chance, seen.metric) == (32, 0.5, "accuracy")
    assert 2 <= len(seen.sampled) <= 16


def test_scores_are_those_of_the_reward(run: Run) -> None:
    seen = look(run, 4)
    expected = run.reward([run.data.spec.manual_prompt, ""], run.data.validation).metrics["accuracy"]
    assert [seen.manual, seen.empty] == pytest.approx(expected.tolist())


def test_a_target_that_does_not_listen_is_called_out(run: Run) -> None:
    seen = look(deaf(run), 8)
    assert (seen.spread, seen.p) == (0.0, 1.0)
    assert seen.verdict.startswith("prompts hardly matter to this target: all within noise")
    seen = look(replace(deaf(run), config=replace(run.config, mode="tte")), 8)
    assert seen.verdict.endswith("all within noise (p = 1); a prompt for each input may")


def test_an_agent_that_writes_one_prompt_only_is_called_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.policy, "decode", lambda rollout: ["Sing."] * len(rollout))
    seen = look(run, 3)
    assert seen.p is None and "has nothing to explore" in seen.verdict


def test_an_agent_that_was_asked_for_one_prompt_is_not_blamed_for_it(run: Run) -> None:
    assert look(run, 1).verdict == TOO_FEW


def test_scores_that_are_not_numbers_give_no_verdict(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsound(prompts: list[str], rows: list[Example]) -> torch.Tensor:
        return torch.full((len(prompts), len(rows)), torch.nan)

    monkeypatch.setattr(run.reward, "by_example", unsound)
    assert look(run, 4).verdict == NO_VERDICT


def test_the_look_changes_nothing(run: Run) -> None:
    before = [p.clone() for p in run.policy.parameters()]
    look(run, 4)
    assert all(torch.equal(p, q) for p, q in zip(run.policy.parameters(), before, strict=True))


def test_a_run_keeps_it_and_says_it_in_four_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"task": "sst2", "steps": 1, "run": str(tmp_path / "run")}
    train(prepare(build_config(options, assignments=[*SMALL, "headroom=3"])))
    said = capsys.readouterr().err.splitlines()[:4]
    assert said[0].startswith("headroom: accuracy on 32 validation rows")
    kept = json.loads((tmp_path / "run/headroom.json").read_text())
    assert kept["verdict"] == said[3].strip()


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    options = {"task": "sst2", "steps": 1, "run": str(tmp_path / "run")}
    train(prepare(build_config(options, assignments=[*SMALL, "headroom=0"])), quiet=True)
    assert not (tmp_path / "run/headroom.json").exists()
