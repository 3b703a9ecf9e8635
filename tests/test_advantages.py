"""From scores to advantages: the whole chain equals a slow twin, and equal rewards move nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from appo.config import APPOConfig
from appo.rollout import Query, Response, Scored
from appo.trainer import APPOTrainer
from appo.update import advantages
from tests.conftest import byte_tokenizer, llama, plain_sampling, policy_of, sharpen, stack

OLD_WAY = {"leave_one_out": False, "lam": 0.95, "value_coef": 0.1, "ppo_epochs": 4}  # as published code has it
REWARD_ALONE = {"kl_coef": 0.0, "entropy_coef": 0.0, "cut_off_penalty": 0.0}  # nothing else moves the policy


def scored(
    lengths: list[int], scores: list[float], queries: list[int], seed: int = 0, zero_critic: bool = True
) -> Scored:
    """Random responses; the reference is the policy itself, so that the KL is 0."""
    generator = torch.Generator().manual_seed(seed)
    responses = [
        Response(
            torch.randint(3, 9, (n,), generator=generator),
            -torch.rand(n, generator=generator),
            torch.zeros(n) if zero_critic else torch.randn(n, generator=generator),
        )
        for n in lengths
    ]
    rollout = stack([Query((1, number)) for number in range(max(queries) + 1)], queries, responses)
    return Scored.of(rollout, torch.tensor(scores), rollout.logprobs)


def test_the_chain_equals_a_slow_twin() -> None:
    lengths, scores, gamma, lam, kl_coef = [3, 1], [2.0, -1.0], 0.9, 0.8, 0.2
    given = scored(lengths, scores, [0, 0], zero_critic=False)
    given.ref_logprobs[given.mask] -= 0.5  # so that the KL is .5 on every token, the penalty .1
    config = APPOConfig(gamma=gamma, lam=lam, leave_one_out=True)
    centred = [2.0 - -1.0, -1.0 - 2.0]
    slow: list[float] = []
    for values, length, score in zip(given.values.tolist(), lengths, centred, strict=True):
        v = [*values[:length], 0.0]
        rewards = [-0.1] * length
        rewards[-1] += score
        running, row = 0.0, []
        for t in reversed(range(length)):
            running = rewards[t] + gamma * v[t + 1] - v[t] + gamma * lam * running
            row.insert(0, running)
        slow += row
    plain, returns = advantages(given, replace(config, whiten_advantages=False), kl_coef)
    assert_close(plain[given.mask], torch.tensor(slow), rtol=1e-5, atol=1e-5)
    assert_close(returns, plain + given.values)
    mean = sum(slow) / 4
    deviation = math.sqrt(sum((a - mean) ** 2 for a in slow) / 3 + 1e-8)
    whitened, _ = advantages(given, config, kl_coef)
    assert_close(whitened[given.mask], torch.tensor([(a - mean) / deviation for a in slow]), rtol=1e-5, atol=1e-5)


rollouts = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=6)


@settings(deadline=None)
@given(rollouts, st.floats(-10, 10, width=32), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_equal_scores_give_no_advantage_to_any_token(
    rows: list[tuple[int, int]], score: float, gamma: float, lam: float, whiten: bool
) -> None:
    lengths, queries = [n for n, _ in rows], [q for _, q in rows]
    given = scored(lengths, [score] * len(rows), queries)
    config = APPOConfig(gamma=gamma, lam=lam, whiten_advantages=whiten)
    # A response alone in its group is compared with the mean of earlier scores, which were the same.
    found, returns = advantages(given, config, kl_coef=0.1, mean_score=float(torch.tensor(score)))
    assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-6)
    assert_close(returns, torch.zeros_like(returns), rtol=0, atol=1e-6)


def test_equal_scores_do_not_blow_up_the_errors_of_the_critic() -> None:
    given = scored([3, 5, 2], [7.0] * 3, [0] * 3, zero_critic=False)
    found, _ = advantages(replace(given, values=1e-4 * given.values), APPOConfig(), kl_coef=0.1)
    assert_close(found, -1e-4 * given.values, rtol=1e-4, atol=0)


def test_a_lone_response_keeps_its_score() -> None:
    given = scored([5], [9.0], [0])
    found, _ = advantages(given, APPOConfig(), kl_coef=0.0, mean_score=6.0)
    assert found.tolist() == [[3.0] * 5]


def test_without_the_baseline_equal_scores_push_ends_up_and_long_beginnings_down() -> None:
    # The table of the design: score 6, lam .95, lengths 40, 30, 20, 10.
    given = scored([40, 30, 20, 10], [6.0] * 4, [0] * 4)
    found, _ = advantages(given, APPOConfig(**OLD_WAY), kl_coef=0.0)
    last = [found[i, n - 1].item() for i, n in enumerate((40, 30, 20, 10))]
    assert last == pytest.approx([1.83] * 4, abs=0.01)
    assert found[:, 0].tolist() == pytest.approx([-1.61, -1.25, -0.65, 0.36], abs=0.01)


def drift(steps: int = 20, **config: object) -> tuple[list[float], list[float]]:
    """Mean length, and log-probability of the end as first token, under a reward of 7 for everything."""
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer))
    with torch.no_grad():  # ends are likely enough for lengths to vary
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 4
    policy = policy_of(model, tokenizer, plain_sampling(24))
    settings = APPOConfig(learning_rate=1e-3, **REWARD_ALONE, **config)  # type: ignore[arg-type]
    trainer = APPOTrainer(policy, settings, generator=torch.Generator().manual_seed(0))
    query, lengths, ends = policy.query("", "one"), [], []
    for _ in range(steps):
        iteration = trainer.step([query], lambda prompts: [7.0] * len(prompts), copies=16)
        lengths.append(iteration.stats["length_mean"])
        logits = model(torch.tensor([query.tokens])).logits[0, -1]
        ends.append(logits.log_softmax(-1)[tokenizer.eos_token_id].item())
    return lengths, ends


def test_a_constant_reward_moves_neither_length_nor_the_end_token() -> None:
    lengths, ends = drift()
    assert ends == pytest.approx([ends[0]] * len(ends), abs=1e-6)
    noise = 3 * torch.tensor(lengths).std().item() / math.sqrt(5)
    assert abs(sum(lengths[-5:]) - sum(lengths[:5])) / 5 < noise


def test_a_constant_reward_moves_no_weight_with_one_response_per_query() -> None:
    tokenizer = byte_tokenizer()
    policy = policy_of(llama(len(tokenizer)), tokenizer, plain_sampling(6))
    trainer = APPOTrainer(policy, APPOConfig(**REWARD_ALONE), generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in policy.parameters()]
    for _ in range(3):
        trainer.step([policy.query("", text) for text in "abcdefg"], lambda prompts: [0.1] * len(prompts))
    assert all(map(torch.equal, policy.parameters(), before))


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_a_constant_reward_moves_no_weight_while_the_anchor_is_the_agent(kl_coef: float) -> None:
    """The KL is then only rounding error, which whitening would turn into full steps."""
    tokenizer = byte_tokenizer()
    policy = policy_of(sharpen(llama(len(tokenizer))), tokenizer, plain_sampling(12))
    config = APPOConfig(**REWARD_ALONE | {"kl_coef": kl_coef})
    trainer = APPOTrainer(policy, config, generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in policy.parameters()]
    for _ in range(3):
        trainer.step([policy.query("", "some words before")], lambda prompts: [1.0] * len(prompts), copies=8)
    assert all(map(torch.equal, policy.parameters(), before))


def test_the_old_way_shortens_responses_under_a_constant_reward() -> None:
    lengths, ends = drift(**OLD_WAY)
    assert ends[-1] > ends[0] + 1
    assert sum(lengths[-5:]) < 0.5 * sum(lengths[:5])
