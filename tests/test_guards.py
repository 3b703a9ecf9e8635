"""Numerical faults: an unsound step never changes the weights and is counted; too many of them end the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from appo.config import APPOConfig
from appo.lm.ends import distinct_ngrams, distinct_share
from appo.rollout import Batch, Query
from appo.trainer import APPOTrainer, DivergedError
from appo.update import FAULTS, advantages
from tests.conftest import byte_tokenizer, llama, plain_sampling, policy_of

QUERIES, COPIES = [Query((5, 6, 7))], 4


def trainer(**changes: object) -> APPOTrainer:
    tokenizer = byte_tokenizer()
    policy = policy_of(llama(len(tokenizer)), tokenizer, plain_sampling(6))
    config = APPOConfig(**{"learning_rate": 1e-3, "ppo_epochs": 4, **changes})  # type: ignore[arg-type]
    return APPOTrainer(policy, config, generator=torch.Generator().manual_seed(0))


def rewards(*values: float) -> Callable[[list[str]], SimpleNamespace]:
    return lambda prompts: SimpleNamespace(scores=torch.tensor(values), metrics={})


def step(appo: APPOTrainer, reward_fn: Callable[[list[str]], SimpleNamespace]) -> dict[str, float]:
    return appo.step(QUERIES, reward_fn, COPIES).stats


def parameters(appo: APPOTrainer) -> list[Tensor]:
    return [p.detach().clone() for p in appo.policy.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_changes_nothing_and_is_counted(bad: float) -> None:
    appo = trainer()
    before = parameters(appo)
    stats = step(appo, rewards(1.0, bad, 0.0, 2.0))
    assert (stats["nonfinite_reward"], stats["skipped_steps"], appo.bad_steps) == (1.0, 1.0, 1)
    assert same(parameters(appo), before)


def test_sound_rewards_change_the_weights_and_count_no_fault() -> None:
    appo = trainer()
    before = parameters(appo)
    stats = step(appo, rewards(1.0, 5.0, 0.0, 2.0))
    assert not same(parameters(appo), before)
    assert stats["skipped_steps"] == 0.0 and not any(stats[fault] for fault in FAULTS)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    appo = trainer()
    before = parameters(appo)
    appo.policy.value_head.weight.register_hook(lambda gradient: gradient * math.nan)
    stats = step(appo, rewards(1.0, 5.0, 0.0, 2.0))
    assert (stats["nonfinite_gradient"], stats["skipped_steps"]) == (4.0, 1.0)  # four epochs of one minibatch
    assert same(parameters(appo), before)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    appo = trainer()
    appo.collect(QUERIES, rewards(1.0, 5.0, 0.0, 2.0), COPIES)
    appo.policy.value_head.bias.data.fill_(math.nan)
    before = [p.detach().clone() for p in appo.policy.model.parameters()]
    assert appo.update()["nonfinite_loss"] == 4.0
    assert same([p.detach() for p in appo.policy.model.parameters()], before)


def test_an_exploded_ratio_changes_nothing() -> None:
    appo = trainer(max_ratio=10.0)
    appo.collect(QUERIES, rewards(1.0, 5.0, 0.0, 2.0), COPIES)
    scored = appo.buffer.stacked()
    batch = Batch(*vars(scored).values(), *advantages(scored, appo.config, kl_coef=0.0))
    before = parameters(appo)
    assert appo.updater.optimizer_step(replace(batch, logprobs=batch.logprobs - 3)) == {
        "skipped_steps": 1.0,
        "exploded_ratio": 1.0,
    }
    assert same(parameters(appo), before)
    stats = appo.updater.optimizer_step(replace(batch, logprobs=batch.logprobs - 2))  # e^2 < 10 < e^3
    assert stats["skipped_steps"] == 0.0


def test_no_further_epoch_once_the_policy_has_moved_far() -> None:
    counts = []
    for target_kl in (None, 1e-9):
        appo = trainer(target_kl=target_kl, ppo_epochs=5)
        steps = []
        make = appo.updater.optimizer_step
        appo.updater.optimizer_step = lambda *given, make=make, steps=steps: steps.append(1) or make(*given)  # type: ignore
        step(appo, rewards(1.0, 5.0, 0.0, 2.0))
        counts.append(len(steps))
    assert counts[0] == 5 and counts[1] < 5


def test_a_skipped_step_does_not_count_as_one_that_has_not_moved() -> None:
    appo, steps = trainer(target_kl=0.4, ppo_epochs=2, minibatch_size=1), []
    found = iter([{"approx_kl": 0.5}, *[{"skipped_steps": 1.0}] * 3])  # mean over the sound steps 0.5, over all 0.125
    appo.updater.optimizer_step = lambda *given: steps.append(1) or {"skipped_steps": 0.0, **next(found)}  # type: ignore
    step(appo, rewards(1.0, 5.0, 0.0, 2.0))
    assert len(steps) == 4


def test_bad_iterations_in_a_row_lead_back_to_the_anchor_and_then_to_the_end() -> None:
    appo = trainer(max_bad_steps=2)
    anchor = parameters(appo)
    step(appo, rewards(1.0, 5.0, 0.0, 2.0))
    bad = rewards(math.nan, 0.0, 0.0, 0.0)
    step(appo, bad)
    assert not same(parameters(appo), anchor)
    assert step(appo, bad)["guard_rollback"] == 1.0
    assert same(parameters(appo), anchor)
    step(appo, bad)
    with pytest.raises(DivergedError, match=r"4 iterations in a row without a sound step.*nonfinite_reward") as found:
        step(appo, bad)
    assert found.value.iteration.stats["nonfinite_reward"] == 1.0  # the run records these when it ends


def test_logits_that_are_no_numbers_are_named_before_anything_is_sampled() -> None:
    appo = trainer()
    with torch.no_grad():
        appo.policy.model.get_output_embeddings().weight[7] = math.nan
    with pytest.raises(FloatingPointError, match="the agent's logits are not numbers"):
        appo.policy.sample(QUERIES)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [(["a b c", "a b d"], 3 / 4), (["a b", "a b"], 1 / 2), (["", "one"], 0.0), (["a a a a"], 1 / 3)],
)
def test_distinct_pairs_of_words(prompts: list[str], expected: float) -> None:
    assert distinct_ngrams(prompts, 2) == pytest.approx(expected)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9), st.integers(1, 10))
def test_the_share_of_different_texts_is_that_of_all_subsets(texts: list[str], among: int) -> None:
    size = min(among, len(texts))
    shares = [len(set(drawn)) / size for drawn in combinations(texts, size)]
    assert distinct_share(texts, among) == pytest.approx(fmean(shares))


def test_the_share_of_different_texts_does_not_depend_on_how_many_there_are() -> None:
    assert distinct_share(["no"] * 32) == distinct_share(["no"] * 8) == 1 / 8
    assert distinct_share([str(i) for i in range(32)]) == 1
    ten = [str(i % 10) for i in range(40)]
    in_the_limit = 10 * (1 - 0.9**8) / 8
    assert distinct_share(ten * 40) == pytest.approx(in_the_limit, abs=0.002)
    assert distinct_share(ten) == pytest.approx(in_the_limit, abs=0.05)  # the plain share is 0.25 here


def all_end_at_once(appo: APPOTrainer) -> None:
    eos = appo.policy.lm.tokenizer.eos_token_id
    appo.policy.model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, logits: logits + 40 * torch.eye(logits.shape[-1])[eos]
    )


def none_ends(appo: APPOTrainer) -> None:
    eos = appo.policy.lm.tokenizer.eos_token_id
    appo.policy.model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor([eos]), -torch.inf)
    )


def all_the_same(appo: APPOTrainer) -> None:
    appo.policy.model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, logits: logits + 40 * torch.eye(logits.shape[-1])[9]
    )


DEGENERATE = {  # what the statistics must show
    "all empty, of one token": (all_end_at_once, {"empty_rate": 1.0, "length_mean": 1.0}),
    "none ends": (none_ends, {"truncated_rate": 1.0, "length_mean": 6.0}),
    "all the same": (all_the_same, {"duplicate_rate": 0.75}),
}


@pytest.mark.parametrize("score", [(1.0, 5.0, 0.0, 2.0), (3.0, 3.0, 3.0, 3.0)])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_rollouts_are_counted_and_training_goes_on(kind: str, score: tuple[float, ...]) -> None:
    appo = trainer()
    degrade, expected = DEGENERATE[kind]
    degrade(appo)
    for _ in range(3):
        stats = step(appo, rewards(*score))
        assert {name: stats[name] for name in expected} == expected
        assert all(map(math.isfinite, stats.values())) and stats["skipped_steps"] == 0
    assert all(p.isfinite().all() for p in appo.policy.parameters())


def test_a_sound_iteration_in_between_starts_the_count_anew() -> None:
    appo = trainer(max_bad_steps=2)
    for _ in range(4):
        step(appo, rewards(math.nan, 0.0, 0.0, 0.0))
        step(appo, rewards(1.0, 5.0, 0.0, 2.0))
    assert appo.bad_steps == 0


@pytest.mark.parametrize("score", [0.0, 3.0, -7.5])
def test_equal_rewards_give_finite_numbers_and_hardly_move_the_policy(score: float) -> None:
    stats = step(trainer(kl_coef=0.0), rewards(*[score] * 4))
    assert all(math.isfinite(value) for value in stats.values())


def test_a_trainers_state_goes_on_bit_for_bit() -> None:
    one, other = trainer(), trainer()
    for _ in range(2):
        step(one, rewards(1.0, 5.0, 0.0, 2.0))
    one.anchor.promote()
    step(one, rewards(1.0, 5.0, 0.0, 2.0))
    other.load_state_dict(one.state_dict())
    assert step(one, rewards(2.0, 0.0, 1.0, 4.0)) == step(other, rewards(2.0, 0.0, 1.0, 4.0))
    assert same(parameters(one), parameters(other))
    for appo in (one, other):
        appo.anchor.rollback()
    assert same(parameters(one), parameters(other))


def test_a_loaded_state_shares_nothing_with_the_one_it_came_from() -> None:
    one, other = trainer(), trainer()
    state = one.state_dict()
    other.load_state_dict(state)
    step(other, rewards(1.0, 5.0, 0.0, 2.0))
    assert same(parameters(one), parameters(trainer()))
    assert not same(parameters(one), parameters(other))
