"""Reviews look beyond scores: an agent that has collapsed is rolled back, and the review says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from appo.anchor import AnchorDecision, Health, collapse
from appo.config import AnchorConfig, APPOConfig
from appo.policy import Policy
from appo.rollout import Query, Rollout
from appo.trainer import APPOTrainer
from tests.conftest import byte_tokenizer, llama, plain_sampling, policy_of

SOUND = Health(length=30.0, empty_rate=0.0, distinct=1.0, variety=0.9, entropy=2.0)


@pytest.mark.parametrize(
    ("policy", "sign"),
    [
        (SOUND, None),
        (SOUND._replace(length=10.1), None),
        (SOUND._replace(length=9.9), "9.9 tokens long"),
        (SOUND._replace(empty_rate=0.5), None),
        (SOUND._replace(empty_rate=0.75), "75% of its prompts are empty"),
        (SOUND._replace(distinct=0.375), None),
        (SOUND._replace(distinct=0.25), "only 25% of its prompts are distinct"),
        (SOUND._replace(variety=0.31), None),
        (SOUND._replace(variety=0.29), "repeat word pairs"),
        (SOUND._replace(entropy=0.0), None),  # a confident agent has not collapsed
    ],
)
def test_what_counts_as_collapse(policy: Health, sign: str | None) -> None:
    found = collapse(policy, SOUND)
    assert (found is None) == (sign is None) and (sign or "") in (found or "")


@pytest.mark.parametrize(("policy", "anchor", "collapsed"), [(0.2, 0.55, True), (0.4, 1.0, False), (0.125, 0.3, False)])
def test_an_anchor_never_becomes_an_agent_that_writes_the_same_again_and_again(
    policy: float, anchor: float, collapsed: bool
) -> None:
    """Not even in small steps: 1, 0.55, 0.2. If the anchor writes the same as well, there is nothing to go back to."""
    found = collapse(SOUND._replace(distinct=policy), SOUND._replace(distinct=anchor))
    assert (found is not None) == collapsed


def test_an_agent_may_be_as_short_or_repetitive_as_its_anchor() -> None:
    poor = Health(length=1.0, empty_rate=0.9, distinct=0.1, variety=0.1, entropy=1.0)
    assert collapse(poor, poor) is None


def make(anchor: AnchorConfig | None = None, **config: object) -> APPOTrainer:
    tokenizer = byte_tokenizer()
    policy = policy_of(llama(len(tokenizer)), tokenizer, plain_sampling(24))
    settings = APPOConfig(**config)  # type: ignore[arg-type]
    return APPOTrainer(policy, settings, anchor, torch.Generator().manual_seed(0))


QUERIES, COPIES = [Query((5, 6, 7))], 8


def written(policy: Policy, generator: torch.Generator | None) -> Rollout:
    return policy.sample(QUERIES, generator, COPIES)


def weights(trainer: APPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


def silent(trainer: APPOTrainer) -> bool:
    return written(trainer.policy, torch.Generator().manual_seed(0)).mask.sum(1).float().mean() < 3


@pytest.fixture
def collapsed() -> tuple[APPOTrainer, torch.Tensor]:
    trainer = make()
    before = weights(trainer)
    with torch.no_grad():  # normalised states are all ones: the end token gets a logit of 320, all others 0
        trainer.policy.model.model.embed_tokens.weight.fill_(1.0)
        trainer.policy.model.lm_head.weight.zero_()
        trainer.policy.model.lm_head.weight[trainer.policy.lm.tokenizer.eos_token_id] = 10.0
    assert silent(trainer)
    return trainer, before


@pytest.mark.parametrize("lead", [0.0, -0.05])
def test_a_collapsed_agent_is_rolled_back_despite_an_equal_score(
    collapsed: tuple[APPOTrainer, torch.Tensor], lead: float
) -> None:
    trainer, before = collapsed
    scores = iter([[0.5 + lead] * 8, [0.5] * 8])
    review = trainer.review_anchor(QUERIES, lambda prompts: next(scores), COPIES)
    assert review.decision is AnchorDecision.ROLLBACK
    assert "the agent has collapsed" in review.reason
    assert review.policy_health.length < review.anchor_health.length / 3
    assert torch.equal(weights(trainer), before)


def test_short_prompts_that_win_are_no_collapse(collapsed: tuple[APPOTrainer, torch.Tensor]) -> None:
    trainer, _ = collapsed
    scores = iter([[0.9] * 8, [0.5] * 8])
    assert trainer.review_anchor(QUERIES, lambda prompts: next(scores), COPIES).decision is AnchorDecision.PROMOTE


@pytest.mark.parametrize(
    ("significance", "agent", "anchor"),
    [
        (None, [0.93] * 8, 0.9),  # a lead below the threshold
        (0.04, [1.0] * 4 + [0.4] * 4, 0.6),  # a lead that may be luck
    ],
)
def test_an_agent_ahead_of_the_anchors_best_prompt_has_not_collapsed(
    collapsed: tuple[APPOTrainer, torch.Tensor], significance: float | None, agent: list[float], anchor: float
) -> None:
    trainer, before = collapsed
    trainer.anchor_config = replace(trainer.anchor_config, significance=significance)
    scores = iter([agent, [anchor] * 8])
    review = trainer.review_anchor(QUERIES, lambda prompts: next(scores), COPIES)
    assert review.decision is AnchorDecision.KEEP
    assert not torch.equal(weights(trainer), before)


def test_one_prompt_that_leads_the_mean_but_not_the_best_is_a_collapse(
    collapsed: tuple[APPOTrainer, torch.Tensor],
) -> None:
    trainer, before = collapsed
    scores = iter([[0.625] * 8, [0.75, *[0.5] * 7]])  # 0.625 against a mean of 0.531, and a best of 0.75
    review = trainer.review_anchor(QUERIES, lambda prompts: next(scores), COPIES)
    assert review.decision is AnchorDecision.ROLLBACK and "collapsed" in review.reason
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize(("kinds", "decision"), [(10, AnchorDecision.PROMOTE), (2, AnchorDecision.ROLLBACK)])
def test_an_agent_with_ten_prompts_that_lead_has_not_collapsed(
    kinds: int, decision: AnchorDecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten different ones among 32 prompts are few, but among eight most are different: as SmolLM2 wrote on sst2."""
    trainer = make()
    said = iter([[f"prompt {i % kinds}" for i in range(32)], [f"prompt {i}" for i in range(32)]])
    monkeypatch.setattr(trainer.policy, "decode", lambda rollout: next(said))
    scores = iter([[0.8] * 32, [0.6] * 31 + [1.0]])
    assert trainer.review_anchor(QUERIES, lambda prompts: next(scores), 32).decision is decision


@pytest.mark.parametrize("switch", ["collapse", "rollback"])
def test_going_back_can_be_switched_off(collapsed: tuple[APPOTrainer, torch.Tensor], switch: str) -> None:
    trainer, before = collapsed
    trainer.anchor_config = replace(trainer.anchor_config, **{switch: False})
    review = trainer.review_anchor(QUERIES, lambda prompts: [0.5] * len(prompts), COPIES)
    assert review.decision is AnchorDecision.KEEP
    assert not torch.equal(weights(trainer), before)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("leads", "acts"), [([0.9] + [0.0] * 7, False), ([0.2] * 8, True), ([0.2] * 6 + [-0.01] * 2, True)]
)
def test_a_paired_test_keeps_what_one_lucky_prompt_would_move(leads: list[float], acts: bool, sign: int) -> None:
    for significance in (None, 0.04):
        trainer = make(AnchorConfig(significance=significance, collapse=False))
        scores = iter([[0.5 + sign * lead / 2 for lead in leads], [0.5 - sign * lead / 2 for lead in leads]])
        review = trainer.review_anchor(QUERIES, lambda prompts, scores=scores: next(scores), COPIES)
        wanted = AnchorDecision.PROMOTE if sign > 0 else AnchorDecision.ROLLBACK
        held = significance is not None and not acts
        assert review.decision is (AnchorDecision.KEEP if held else wanted)
        assert ("may be luck (p = " in review.reason) == held


def test_the_reference_initial_is_never_promoted() -> None:
    trainer = make(reference="initial")
    with torch.no_grad():
        trainer.policy.value_head.bias.add_(1.0)
    scores = iter([[1.0] * 8, [0.0] * 8])
    review = trainer.review_anchor(QUERIES, lambda prompts: next(scores), COPIES)
    assert review.decision is AnchorDecision.KEEP and "switched off" in review.reason
    assert trainer.anchor._parameters["value_head.bias"].item() == 0.0


def test_reviews_leave_the_stream_of_rollouts_alone() -> None:
    reviewed, other = make(), make()
    reviewed.review_anchor(QUERIES, lambda prompts: [0.5] * len(prompts), COPIES)
    rollouts = [written(trainer.policy, trainer.generator) for trainer in (reviewed, other)]
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)


def test_sampling_reviews_and_minibatch_order_never_share_a_generator() -> None:
    trainer = make()
    streams = [trainer.generator, trainer.review_generator, trainer.updater.generator]
    assert len({id(stream) for stream in streams}) == 3
    assert len({stream.initial_seed() for stream in streams if stream is not None}) == 3
    assert trainer.updater.generator is not None and trainer.updater.generator.device.type == "cpu"
