"""The trainer: its first step, its references, its reviews, and that it learns from its reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from appo.anchor import AnchorDecision
from appo.config import AnchorConfig, APPOConfig
from appo.rollout import Batch, Query
from appo.trainer import APPOTrainer, RewardFn
from appo.update import MIN_ENTROPY, advantages
from tests.conftest import byte_tokenizer, llama, plain_sampling, policy_of


@dataclass(frozen=True)
class Rewarded:
    scores: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def share_of_a(prompts: list[str]) -> Rewarded:
    """The toy reward: the share of the letter a in a prompt."""
    shares = torch.tensor([prompt.count("a") / max(len(prompt), 1) for prompt in prompts])
    return Rewarded(shares, {"accuracy": shares})


def make(length: int = 8, anchor: AnchorConfig | None = None, seed: int = 0, **config: object) -> APPOTrainer:
    tokenizer = byte_tokenizer()
    policy = policy_of(llama(len(tokenizer)), tokenizer, plain_sampling(length))
    settings = {"learning_rate": 3e-3, **config}
    return APPOTrainer(policy, APPOConfig(**settings), anchor, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def queries(trainer: APPOTrainer) -> list[Query]:
    return [trainer.policy.query("", text) for text in ("one", "another")]


def collect(trainer: APPOTrainer, count: int = 8) -> None:
    trainer.collect(queries(trainer), share_of_a, count // 2)


def step(trainer: APPOTrainer, reward_fn: RewardFn = share_of_a, count: int = 8) -> dict[str, float]:
    return trainer.step(queries(trainer), reward_fn, count // 2).stats


def finished(trainer: APPOTrainer) -> Batch:
    scored = trainer.buffer.stacked()
    return Batch(*vars(scored).values(), *advantages(scored, trainer.config, kl_coef=0.1))


def flat(trainer: APPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


def test_ratio_is_one_at_the_first_optimizer_step() -> None:
    trainer = make(ppo_epochs=1)
    stats = step(trainer)
    assert stats["clip_fraction"] == 0
    assert stats["approx_kl"] < 1e-10


@pytest.mark.parametrize("event", ["nothing yet", "promotion", "rollback", "resume"])
def test_the_anchor_makes_no_pass_of_its_own_while_it_is_the_policy(
    event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, asked = make(), []
    if event != "nothing yet":
        step(trainer)
        assert step(trainer)["kl"] != 0  # no longer the policy's weights
        trainer.anchor.promote() if event == "promotion" else trainer.anchor.rollback()
    if event == "resume":
        saved, trainer = trainer.state_dict(), make(seed=1)
        trainer.load_state_dict(saved)
    monkeypatch.setattr(trainer.anchor, "logprobs", asked.append)
    collect(trainer)
    (scored,) = trainer.buffer._parts
    assert asked == [] and torch.equal(scored.ref_logprobs, scored.logprobs)
    monkeypatch.undo()
    assert_close(trainer.anchor.logprobs(scored), scored.ref_logprobs, rtol=0, atol=1e-5)  # what a pass would give


def test_two_seeded_runs_are_equal_to_the_last_bit() -> None:
    one, two = make(), make()
    for _ in range(3):
        assert step(one) == step(two)
    assert torch.equal(flat(one), flat(two))


def test_another_seed_gives_another_run() -> None:
    one, two = make(), make(seed=1)
    assert step(one) != step(two)


def learn(sign: float = 1.0, steps: int = 60, **config: object) -> list[float]:
    trainer = make(length=6, kl_coef=config.pop("kl_coef", 0.0), **config)

    def reward(prompts: list[str]) -> Rewarded:
        return Rewarded(sign * share_of_a(prompts).scores, share_of_a(prompts).metrics)

    return [step(trainer, reward, 32)["accuracy_mean"] for _ in range(steps)]


def test_agent_learns_a_toy_reward() -> None:
    shares = learn()
    assert shares[0] < 0.1
    assert sum(shares[-3:]) / 3 > 0.8


def test_agent_with_the_wrong_sign_does_not_learn_it() -> None:
    assert max(learn(sign=-1.0)) < 0.1


def test_heavy_penalty_against_the_initial_agent_pins_it() -> None:
    assert max(learn(kl_coef=5.0, reference="initial")) < 0.3


def plain_share_of_a(prompts: list[str]) -> list[float]:
    return [prompt.count("a") / max(len(prompt), 1) for prompt in prompts]


def test_fit_learns_from_plain_numbers_and_reviews_every_period() -> None:
    trainer = make(length=6, anchor=AnchorConfig(period=4, prompts=8), kl_coef=0.0)
    iterations = list(trainer.fit(queries(trainer), plain_share_of_a, 60, 32, plain_share_of_a))
    reviews = {number: found.review for number, found in enumerate(iterations, 1) if found.review is not None}
    assert list(reviews) == list(range(4, 61, 4))
    assert {len(review.policy_scores) for review in reviews.values()} == {8}
    assert AnchorDecision.PROMOTE in [review.decision for review in reviews.values()]
    shares = [found.stats["reward_mean"] for found in iterations]
    assert shares[0] < 0.1
    assert sum(shares[-3:]) / 3 > 0.8


@pytest.mark.parametrize("reference", ["initial", "previous", "none"])
def test_fit_does_not_review_an_anchor_that_never_moves(reference: str) -> None:
    trainer = make(anchor=AnchorConfig(period=1), reference=reference)
    found = list(trainer.fit(queries(trainer), plain_share_of_a, 2, 4, plain_share_of_a))
    assert [iteration.review for iteration in found] == [None, None]


def test_fit_without_scores_does_not_review_and_may_ask_anew_every_time() -> None:
    trainer, numbers = make(anchor=AnchorConfig(period=1)), []

    def ask(number: int) -> list[Query]:
        numbers.append(number)
        return queries(trainer)[:number]

    found = list(trainer.fit(ask, plain_share_of_a, 2, 4))
    assert numbers == [1, 2]
    assert [len(iteration.collected.prompts) for iteration in found] == [4, 8]
    assert [iteration.review for iteration in found] == [None, None]


def test_plain_numbers_teach_what_scores_teach() -> None:
    one, two = make(), make()
    stats = [step(one), step(two, plain_share_of_a)]
    assert stats[0] == stats[1] | {"accuracy_mean": stats[0]["accuracy_mean"]}
    assert torch.equal(flat(one), flat(two))


@pytest.mark.parametrize("given", [[], [0.5] * 7, torch.zeros(9), torch.zeros(8, 1), Rewarded(torch.zeros(2))])
def test_another_number_of_rewards_than_prompts_is_refused(given: list[float] | torch.Tensor | Rewarded) -> None:
    trainer = make()
    before = flat(trainer)
    with pytest.raises(ValueError, match=r"the reward function gave rewards of shape .*, not \[8\]"):
        step(trainer, lambda prompts: given)
    assert torch.equal(flat(trainer), before) and len(trainer.buffer) == 0


@pytest.mark.parametrize("given", [None, "0.5", ["a"] * 8, [None] * 8, {"a": 1.0}, iter([0.5] * 8), [[0.5], [1, 2]]])
def test_rewards_that_are_no_numbers_are_refused(given: Any) -> None:
    trainer = make()
    before = flat(trainer)
    with pytest.raises(TypeError, match=r"the reward function gave .*, not a number for each of 8 prompts"):
        next(trainer.fit(queries(trainer), lambda prompts: given, 1, 4))
    assert torch.equal(flat(trainer), before) and len(trainer.buffer) == 0


def given_numbers() -> list[Any]:
    """The same eight rewards in every form that is accepted."""
    values = [i / 8 for i in range(8)]
    forms = [values, tuple(values), torch.tensor(values), torch.tensor(values).numpy(), torch.tensor(values).double()]
    return [*forms, [torch.tensor(value) for value in values], SimpleNamespace(scores=values)]


@pytest.mark.parametrize("given", given_numbers(), ids=lambda given: type(given).__name__)
def test_rewards_may_come_in_any_form_that_torch_reads(given: Any) -> None:
    found = make()
    assert step(found, lambda prompts: given)["reward_max"] == 7 / 8


def moved(steps: int = 2, **config: object) -> torch.Tensor:
    trainer = make(**config)
    for _ in range(steps):
        step(trainer)
    return flat(trainer)


def test_without_reference_the_coefficient_means_nothing() -> None:
    assert torch.equal(moved(reference="none", kl_coef=0.0), moved(reference="none", kl_coef=3.0))


@pytest.mark.parametrize("reference", ["anchor", "initial", "previous"])
def test_with_a_reference_the_coefficient_matters(reference: str) -> None:
    assert not torch.equal(moved(reference=reference, kl_coef=0.0), moved(reference=reference, kl_coef=3.0))


def test_penalty_of_plain_ppo_is_in_the_loss_only() -> None:
    trainer = make(reference="previous", kl_coef=3.0)
    collect(trainer)
    scored = trainer.buffer.stacked()
    assert_close(scored.ref_logprobs, scored.logprobs, rtol=0, atol=0)
    assert trainer.updater.reference.in_loss


def test_kl_in_the_loss_adds_the_k3_estimate() -> None:
    trainer = make(kl_in_loss=True, kl_coef=0.5)
    step(trainer)  # so that the agent differs from its anchor
    collect(trainer)
    batch = finished(trainer)
    with_kl, _ = trainer.updater.loss(batch, 0.5)
    without, _ = trainer.updater.loss(batch, 0.0)
    d = trainer.policy.evaluate(batch).logprobs - batch.ref_logprobs
    k3 = (torch.exp(-d) - 1 + d)[batch.mask].mean()
    assert_close(with_kl - without, 0.5 * k3, rtol=1e-4, atol=1e-6)


def test_an_entropy_bonus_lowers_the_loss_by_the_mean_entropy_and_moves_a_policy_that_learns_nothing() -> None:
    nothing_else = {"ppo_epochs": 1, "kl_coef": 0.0, "value_coef": 0.0, "cut_off_penalty": 0.0}
    trainer = make(entropy_coef=0.5, **nothing_else)
    collect(trainer)
    batch = finished(trainer)
    loss, stats = trainer.updater.loss(batch, entropy_coef=0.5)
    assert_close(loss.detach(), stats["policy_loss"] - 0.5 * stats["entropy"])
    entropies = [step(trainer, lambda prompts: [1.0] * len(prompts))["entropy"] for _ in range(3)]
    still = make(entropy_coef=0.0, **nothing_else)
    before = flat(still)
    step(still, lambda prompts: [1.0] * len(prompts))
    assert torch.equal(flat(still), before)
    assert entropies[-1] > entropies[0]


@pytest.mark.parametrize("sharper", [1.0, 40.0, 4000.0])
def test_the_entropy_bonus_is_one_on_log_entropy_and_stops_growing_where_nothing_is_left(
    sharper: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(entropy_coef=0.5, ppo_epochs=1)
    with torch.no_grad():
        trainer.policy.model.lm_head.weight.mul_(sharper)
    seen: list[float] = []
    step_of = trainer.updater.optimizer_step

    def spy(minibatch: Batch, kl_coef: float = 0.0, entropy_coef: float = 0.0) -> dict[str, float]:
        seen.append(entropy_coef)
        return step_of(minibatch, kl_coef, entropy_coef)

    monkeypatch.setattr(trainer.updater, "optimizer_step", spy)
    rollout = trainer.collect(queries(trainer), lambda prompts: [1.0] * len(prompts), 16).rollout
    trainer.update()
    entropy = -rollout.logprobs[rollout.mask].mean().item()
    assert seen == [pytest.approx(0.5 / max(entropy, MIN_ENTROPY))]
    assert (entropy < MIN_ENTROPY) == (sharper == 4000.0)


def test_a_response_that_is_cut_off_is_worth_less_to_the_update_but_not_in_the_record() -> None:
    trainer = make(cut_off_penalty=2.0, length=40)
    with torch.no_grad():  # all 259 tokens equally likely: about one response in seven ends in time
        trainer.policy.model.lm_head.weight.zero_()
    collected = trainer.collect(queries(trainer), lambda prompts: [5.0] * len(prompts), 16)
    ended = trainer.policy.ended(collected.rollout)
    assert set(ended.tolist()) == {True, False}
    assert trainer.buffer.stacked().scores.tolist() == [5.0 if end else 3.0 for end in ended.tolist()]
    assert collected.rewarded.scores.tolist() == [5.0] * len(ended)


def test_kl_in_the_loss_is_not_in_the_rewards_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, given = make(kl_in_loss=True, kl_coef=3.0, ppo_epochs=1), []
    step(trainer)  # so that the agent differs from its anchor
    collect(trainer)
    scored = trainer.buffer.stacked()
    monkeypatch.setattr(
        trainer.updater, "optimizer_step", lambda part, coef, _entropy: given.append((part, coef)) or {}
    )
    trainer.update()
    [(part, coef)] = given
    found, plain, penalised = (
        values[mask].sort().values  # minibatches are shuffled
        for values, mask in (
            (part.advantages, part.mask),
            *((advantages(scored, trainer.config, kl_coef)[0], scored.mask) for kl_coef in (0.0, 3.0)),
        )
    )
    assert coef == 3.0
    assert_close(found, plain)
    assert (found - penalised).abs().max() > 0.1


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_add_up_to_the_step_of_the_minibatch(micro: int) -> None:
    whole, parts = make(), make(micro_batch_size=micro)
    for trainer in (whole, parts):
        collect(trainer)
    results = [trainer.updater.optimizer_step(finished(trainer)) for trainer in (whole, parts)]
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    for one, other in zip(whole.policy.parameters(), parts.policy.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_gradient_is_clipped_to_its_limit() -> None:
    trainer = make(max_grad_norm=1e-5)
    collect(trainer)
    assert trainer.updater.optimizer_step(finished(trainer))["grad_norm"] > 1e-5
    norm = torch.stack([p.grad.norm() for p in trainer.policy.parameters()]).norm()
    assert_close(norm.item(), 1e-5, rtol=2e-2, atol=0)  # torch divides by norm + 1e-6


def test_a_state_saved_on_another_kind_of_device_keeps_the_new_streams() -> None:
    trainer, other = make(), make(seed=1)
    state = trainer.state_dict()
    state["generators"] = [saved if saved is None else saved[:16] for saved in state["generators"]]  # a GPU's have 16
    before = [stream and stream.get_state() for stream in other._streams()]
    other.load_state_dict(state)
    assert torch.equal(flat(other), flat(trainer))
    for stream, saved in zip(other._streams(), before, strict=True):
        assert stream is None or torch.equal(stream.get_state(), saved)


def test_value_head_may_have_a_learning_rate_of_its_own() -> None:
    trainer = make(value_learning_rate=0.5, ppo_epochs=1, warm_up=False)
    step(trainer)
    assert [group["lr"] for group in trainer.updater.optimizer.param_groups] == [3e-3, 0.5]


def test_learning_rates_warm_up_with_the_optimizers_steps_and_again_after_a_rollback_to_the_initial_agent() -> None:
    trainer = make(value_learning_rate=0.5, ppo_epochs=2)

    def rates() -> list[float]:
        step(trainer)
        return [group["lr"] for group in trainer.updater.optimizer.param_groups]

    shares = [1 - 0.9**2, 1 - 0.9**4, 1 - 0.9**6]
    for share in shares:
        assert rates() == pytest.approx([3e-3 * share, 0.5 * share], rel=1e-12)
    trainer.anchor.rollback()
    assert rates() == pytest.approx([3e-3 * shares[0], 0.5 * shares[0]], rel=1e-12)


def test_a_warm_up_is_adam_without_the_correction_of_its_first_moment() -> None:
    plain, warm = make(ppo_epochs=1, warm_up=False), make(ppo_epochs=1, warm_up=True)
    begun = flat(plain)
    assert torch.equal(flat(warm), begun)
    for trainer in (plain, warm):
        step(trainer)
    assert_close(flat(warm) - begun, 0.1 * (flat(plain) - begun), rtol=0, atol=1e-7)  # 1 - beta of the first moment


def test_an_update_takes_in_all_collects_and_empties_the_buffer() -> None:
    trainer = make()
    collect(trainer)
    collect(trainer, 4)
    assert len(trainer.buffer) == 12
    trainer.update()
    assert len(trainer.buffer) == 0


def test_adaptive_coefficient_follows_the_kl() -> None:
    trainer = make(kl_coef=0.2, kl_target=6.0, kl_horizon=100)
    step(trainer)  # KL 0 at first: error -.2, 8 responses, factor 1 - .2 * 8 / 100
    assert trainer.kl_controller.coef == pytest.approx(0.2 * (1 - 0.016), rel=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "decision"),
    [
        (1.0, 0.5, AnchorDecision.PROMOTE),
        (0.5, 1.0, AnchorDecision.ROLLBACK),
        (0.5, 0.5, AnchorDecision.KEEP),
    ],
)
def test_review_compares_agent_and_anchor(first: float, second: float, decision: AnchorDecision) -> None:
    trainer = make()
    step(trainer)
    before, given = flat(trainer), iter([[first] * 8, [second] * 8])
    review = trainer.review_anchor(queries(trainer), lambda prompts: next(given), 4)
    assert review.decision is decision
    assert (review.policy_scores, review.anchor_scores) == ([first] * 8, [second] * 8)
    assert (review.promote_threshold, review.rollback_threshold) == (0.05, 0.1)
    assert torch.equal(flat(trainer), before) == (decision is not AnchorDecision.ROLLBACK)


def test_scores_of_a_review_may_come_in_any_form_that_rewards_may() -> None:
    trainer = make()
    review = trainer.review_anchor(queries(trainer), lambda prompts: torch.full([len(prompts)], 0.5), 4)
    assert review.policy_scores == review.anchor_scores == [0.5] * 8
    assert {type(score) for score in review.policy_scores} == {float}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([0.5], ValueError),
        ([0.5] * 9, ValueError),
        (None, TypeError),
        ([50.0] * 8, ValueError),  # per cent, of which any lead above a twentieth of a point would promote
        ([-0.1] * 8, ValueError),
    ],
)
def test_scores_that_are_no_accuracies_of_the_prompts_are_refused(given: Any, error: type[Exception]) -> None:
    trainer = make()
    step(trainer)
    before = flat(trainer)
    with pytest.raises(error, match="the score function gave "):
        trainer.review_anchor(queries(trainer), lambda prompts: given, 4)
    assert torch.equal(flat(trainer), before)


@pytest.mark.parametrize(
    ("lead", "max_kl", "decision"),
    [
        (0.01, None, AnchorDecision.KEEP),
        (0.01, 1e9, AnchorDecision.KEEP),
        (0.01, 1e-9, AnchorDecision.PROMOTE),
        (-0.01, 1e9, AnchorDecision.KEEP),
        (-0.01, 1e-9, AnchorDecision.ROLLBACK),
    ],
)
def test_far_from_the_anchor_a_review_must_decide(lead: float, max_kl: float | None, decision: AnchorDecision) -> None:
    trainer = make(anchor=AnchorConfig(max_kl=max_kl, significance=0.04), warm_up=False)
    for _ in range(3):  # the first rollout is the anchor's own: its KL is 0
        last = step(trainer, count=64)
    assert last["kl"] > 1e-9
    given = iter([[0.5 + lead] * 8, [0.5] * 8])
    assert trainer.review_anchor(queries(trainer), lambda prompts: next(given), 4).decision is decision


@pytest.mark.parametrize("max_kl", [None, 1e-9])
def test_an_agent_far_from_its_anchor_is_reviewed_at_once(max_kl: float | None) -> None:
    trainer = make(anchor=AnchorConfig(period=100, max_kl=max_kl))
    done = list(trainer.fit(queries(trainer), plain_share_of_a, 3, score_fn=lambda prompts: [0.5] * len(prompts)))
    far = [iteration.stats["kl"] > 1e-9 for iteration in done]
    assert [iteration.review is not None for iteration in done] == (far if max_kl else [False] * 3)
    assert any(far)


@pytest.mark.parametrize("scores", [(1.0, 0.0), (0.0, 1.0)])
def test_promotion_and_rollback_can_be_switched_off(scores: tuple[float, float]) -> None:
    trainer = make(anchor=AnchorConfig(promote=False, rollback=False))
    step(trainer)
    before, given = flat(trainer), iter([[score] * 8 for score in scores])
    review = trainer.review_anchor(queries(trainer), lambda prompts: next(given), 4)
    assert review.decision is AnchorDecision.KEEP
    assert torch.equal(flat(trainer), before)


def test_stats_are_flat_numbers() -> None:
    trainer = make()
    stats = step(trainer)
    assert {"reward_mean", "reward_max", "accuracy_mean", "kl", "policy_loss", "value_loss", "entropy"} <= set(stats)
    assert all(isinstance(value, float) for value in stats.values())
