"""The trainer: its first step, its references, its reviews, and that it learns what it is paid for."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch.testing import assert_close

from appo.anchor import AnchorDecision
from appo.config import AnchorConfig, APPOConfig
from appo.policy import Policy
from appo.rollout import Batch, Query
from appo.trainer import APPOTrainer, advantages
from tests.conftest import byte_tokenizer, llama, plain_sampling


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
    policy = Policy(llama(len(tokenizer)), tokenizer, plain_sampling(length))
    settings = {"learning_rate": 3e-3, **config}
    return APPOTrainer(policy, APPOConfig(**settings), anchor, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def queries(trainer: APPOTrainer, count: int = 8) -> list[Query]:
    return [trainer.policy.query("", text) for text in ("one", "another") for _ in range(count // 2)]


def finished(trainer: APPOTrainer) -> Batch:
    scored = trainer.buffer.stacked()
    return Batch.of(scored, *advantages(scored, trainer.config, kl_coef=0.1))


def flat(trainer: APPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


def test_ratio_is_one_at_the_first_optimizer_step() -> None:
    trainer = make(ppo_epochs=1)
    stats = trainer.step(queries(trainer), share_of_a)
    assert stats["clip_fraction"] == 0
    assert stats["approx_kl"] < 1e-10


def test_two_seeded_runs_are_equal_to_the_last_bit() -> None:
    one, two = make(), make()
    for _ in range(3):
        assert one.step(queries(one), share_of_a) == two.step(queries(two), share_of_a)
    assert torch.equal(flat(one), flat(two))


def test_another_seed_gives_another_run() -> None:
    one, two = make(), make(seed=1)
    assert one.step(queries(one), share_of_a) != two.step(queries(two), share_of_a)


def learn(sign: float = 1.0, steps: int = 60, **config: object) -> list[float]:
    trainer = make(length=6, kl_coef=config.pop("kl_coef", 0.0), **config)

    def reward(prompts: list[str]) -> Rewarded:
        return Rewarded(sign * share_of_a(prompts).scores, share_of_a(prompts).metrics)

    return [trainer.step(queries(trainer, 32), reward)["accuracy_mean"] for _ in range(steps)]


def test_agent_learns_a_toy_reward() -> None:
    shares = learn()
    assert shares[0] < 0.1
    assert sum(shares[-3:]) / 3 > 0.8


def test_agent_with_the_wrong_sign_does_not_learn_it() -> None:
    assert max(learn(sign=-1.0)) < 0.1


def test_heavy_penalty_against_the_initial_agent_pins_it() -> None:
    assert max(learn(kl_coef=5.0, reference="initial")) < 0.3


def moved(steps: int = 2, **config: object) -> torch.Tensor:
    trainer = make(**config)
    for _ in range(steps):
        trainer.step(queries(trainer), share_of_a)
    return flat(trainer)


def test_without_reference_the_coefficient_means_nothing() -> None:
    assert torch.equal(moved(reference="none", kl_coef=0.0), moved(reference="none", kl_coef=3.0))


@pytest.mark.parametrize("reference", ["anchor", "initial", "previous"])
def test_with_a_reference_the_coefficient_matters(reference: str) -> None:
    assert not torch.equal(moved(reference=reference, kl_coef=0.0), moved(reference=reference, kl_coef=3.0))


def test_penalty_of_plain_ppo_is_in_the_loss_only() -> None:
    trainer = make(reference="previous", kl_coef=3.0)
    trainer.collect(queries(trainer), share_of_a)
    scored = trainer.buffer.stacked()
    assert_close(scored.ref_logprobs, scored.logprobs, rtol=0, atol=0)
    assert trainer.kl_in_loss


def test_kl_in_the_loss_adds_the_k3_estimate() -> None:
    trainer = make(kl_in_loss=True, kl_coef=0.5)
    trainer.step(queries(trainer), share_of_a)  # away from the anchor
    trainer.collect(queries(trainer), share_of_a)
    batch = finished(trainer)
    with_kl, _ = trainer.loss(batch)
    trainer.kl_controller.coef = 0.0
    without, _ = trainer.loss(batch)
    d = trainer.policy.evaluate(batch).logprobs - batch.ref_logprobs
    k3 = (torch.exp(-d) - 1 + d)[batch.mask].mean()
    assert_close(with_kl - without, 0.5 * k3, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_add_up_to_the_step_of_the_minibatch(micro: int) -> None:
    whole, parts = make(), make(micro_batch_size=micro)
    for trainer in (whole, parts):
        trainer.collect(queries(trainer), share_of_a)
    results = [trainer.optimizer_step(finished(trainer)) for trainer in (whole, parts)]
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    for one, other in zip(whole.policy.parameters(), parts.policy.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_gradient_is_clipped_to_its_limit() -> None:
    trainer = make(max_grad_norm=1e-5)
    trainer.collect(queries(trainer), share_of_a)
    assert trainer.optimizer_step(finished(trainer))["grad_norm"] > 1e-5
    norm = torch.stack([p.grad.norm() for p in trainer.policy.parameters()]).norm()
    assert_close(norm.item(), 1e-5, rtol=2e-2, atol=0)  # torch divides by norm + 1e-6


def test_value_head_may_have_a_learning_rate_of_its_own() -> None:
    trainer = make(value_learning_rate=0.5)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [3e-3, 0.5]


def test_an_update_takes_in_all_collects_and_empties_the_buffer() -> None:
    trainer = make()
    trainer.collect(queries(trainer), share_of_a)
    trainer.collect(queries(trainer, 4), share_of_a)
    assert len(trainer.buffer) == 12
    trainer.update()
    assert len(trainer.buffer) == 0


def test_adaptive_coefficient_follows_the_kl() -> None:
    trainer = make(kl_coef=0.2, kl_target=6.0, kl_horizon=100)
    trainer.step(queries(trainer), share_of_a)  # KL 0 at first: error -.2, 8 responses, factor 1 - .2 * 8 / 100
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
    trainer.step(queries(trainer), share_of_a)
    before, given = flat(trainer), iter([[first] * 8, [second] * 8])
    review = trainer.review_anchor(queries(trainer), lambda prompts: next(given))
    assert review.decision is decision
    assert (review.policy_scores, review.anchor_scores) == ([first] * 8, [second] * 8)
    assert (review.promote_threshold, review.rollback_threshold) == (0.05, 0.1)
    assert torch.equal(flat(trainer), before) == (decision is not AnchorDecision.ROLLBACK)


@pytest.mark.parametrize("scores", [(1.0, 0.0), (0.0, 1.0)])
def test_promotion_and_rollback_can_be_switched_off(scores: tuple[float, float]) -> None:
    trainer = make(anchor=AnchorConfig(promote=False, rollback=False))
    trainer.step(queries(trainer), share_of_a)
    before, given = flat(trainer), iter([[score] * 8 for score in scores])
    review = trainer.review_anchor(queries(trainer), lambda prompts: next(given))
    assert review.decision is AnchorDecision.KEEP
    assert torch.equal(flat(trainer), before)


def test_stats_are_flat_numbers() -> None:
    trainer = make()
    stats = trainer.step(queries(trainer), share_of_a)
    assert {"reward_mean", "reward_max", "accuracy_mean", "kl", "policy_loss", "value_loss", "entropy"} <= set(stats)
    assert all(isinstance(value, float) for value in stats.values())
