"""The examples: the one-file APPO makes the same update as appo/, and learns; the notebook runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from appo.config import APPOConfig
from appo.rollout import Query, Rollout, Scored
from appo.update import Updater, advantages
from tests.conftest import byte_tokenizer, llama, plain_sampling, policy_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import minimal_appo as minimal

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIG = minimal.Config(kl_coef=0.1, value_coef=0.1, lam=0.95, ppo_epochs=3)
QUERY = (5, 6, 7, 8)


def ours() -> Updater:
    """Makes the package's trainer, with everything switched off that the example leaves out."""
    policy = policy_of(llama(len(byte_tokenizer())), byte_tokenizer(), plain_sampling(8))
    config = APPOConfig(
        learning_rate=CONFIG.learning_rate,
        warm_up=False,
        value_learning_rate=CONFIG.value_learning_rate,
        value_coef=CONFIG.value_coef,
        entropy_coef=0.0,
        value_clip_range=None,
        lam=CONFIG.lam,
        ppo_epochs=CONFIG.ppo_epochs,
        kl_coef=CONFIG.kl_coef,
    )
    return Updater(policy, config)


def rollout() -> tuple[Scored, minimal.Rollout]:
    """The same made-up responses of different lengths, for both sides."""
    torch.manual_seed(0)
    lengths = torch.tensor([3, 6, 1, 5])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    tokens = torch.randint(3, 200, mask.shape).masked_fill(~mask, 0)
    logprobs, anchor, values = ((torch.randn(mask.shape) - 5).masked_fill(~mask, 0.0) for _ in range(3))
    scores = torch.tensor([1.0, 4.0, 2.0, 7.0])
    owner = torch.zeros(len(tokens), dtype=torch.long)
    package = Rollout((Query(QUERY),), owner, tokens, mask, logprobs, values)
    example = minimal.Rollout(torch.tensor(QUERY), tokens, mask, logprobs, values, anchor, scores)
    return Scored.of(package, scores, anchor), example


def test_first_update_of_the_one_file_appo_is_that_of_the_package() -> None:
    updater, (scored, example) = ours(), rollout()
    agent = minimal.Agent(llama(len(byte_tokenizer())))
    for mine, theirs in zip(
        advantages(scored, updater.config, CONFIG.kl_coef), minimal.advantages(example, CONFIG), strict=True
    ):
        assert_close(mine, theirs, rtol=0, atol=1e-6)
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    updater.update(scored, CONFIG.kl_coef)
    minimal.update(agent, minimal.make_optimizer(agent, CONFIG), example, CONFIG)
    package = dict(updater.policy.named_parameters())
    for name, parameter in agent.named_parameters():
        assert_close(package[name].detach(), parameter.detach(), rtol=0, atol=1e-6)
        assert not torch.equal(parameter, before[name])


def test_one_file_appo_learns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation, test = minimal.read_task()
    monkeypatch.setattr(minimal, "read_task", lambda: (train, validation, test[:8]))
    curve = minimal.main(minimal.Config(iterations=16, learning_rate=8e-4, max_new_tokens=40))
    assert sum(curve[-5:]) / 5 > sum(curve[:3]) / 3 + 0.15
    assert "best prompt on validation" in capsys.readouterr().out


# -- the notebook --------------------------------------------------------------------------------------------------

TOUR: list[dict[str, Any]] = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
TOUR_CODE = ["".join(cell["source"]) for cell in TOUR if cell["cell_type"] == "code"]


def test_the_notebook_is_committed_without_outputs() -> None:
    for cell in TOUR:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From top to bottom, in its own folder, with fewer iterations."""
    monkeypatch.chdir(EXAMPLES)
    first, shortened = re.subn(r"^(STEPS|PERIOD) = \d+", r"\1 = 2", TOUR_CODE[0], flags=re.MULTILINE)
    assert shortened == 2
    names: dict[str, Any] = {}
    for number, code in enumerate([first, *TOUR_CODE[1:]], 1):
        exec(compile(code, f"tour.ipynb, code cell {number}", "exec"), names)
    shown = capsys.readouterr().out
    assert "iteration 2: " in shown  # the anchor's review
    assert "on 600 test rows" in shown
