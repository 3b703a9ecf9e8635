"""Trained weights are float32 and move, whatever dtype the model computes in."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from appo.config import APPOConfig, SamplingConfig
from appo.lm.attention import Branches
from appo.rollout import Scored
from appo.selfcheck import SelfCheckError, self_check
from appo.trainer import APPOTrainer
from tests.conftest import byte_tokenizer, llama, plain_sampling, policy_of, sharpen, target_of
from tests.test_trainer import queries, step


def make(dtype: torch.dtype = torch.bfloat16, **config: object) -> APPOTrainer:
    tokenizer = byte_tokenizer()
    policy = policy_of(llama(len(tokenizer)), tokenizer, plain_sampling(8), compute_dtype=dtype)
    settings = APPOConfig(**{"learning_rate": 3e-3, **config})  # type: ignore[arg-type]
    return APPOTrainer(policy, settings, generator=torch.Generator().manual_seed(0))


def test_200_small_steps_move_nearly_all_weights() -> None:
    trainer = make(learning_rate=1e-5)
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    gradients = [torch.full_like(p, 0.01) for p in trainer.policy.parameters()]
    for _ in range(200):
        for parameter, gradient in zip(trainer.policy.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        trainer.updater.optimizer.step()
    pairs = list(zip(trainer.policy.parameters(), before, strict=True))
    moved = sum(int((p != q).sum()) for p, q in pairs) / sum(p.numel() for p, _ in pairs)
    assert moved >= 0.99
    for p, q in pairs:  # a constant gradient moves AdamW by the learning rate a step: 200 * 1e-5
        assert_close(p.detach(), q - 2e-3, rtol=0, atol=2e-5)


def test_the_default_learning_rate_is_a_share_of_the_size_of_the_weights() -> None:
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer))
    for parameter in model.parameters():
        signs = parameter.detach().sign_()
        signs.mul_(0.2 if parameter.dim() > 1 else 100.0)  # the weights of norms do not count
    model.lm_head.weight.detach().mul_(25)  # nor do a large matrix and a small one
    model.get_input_embeddings().weight.detach().mul_(0.01)
    policy = policy_of(model, tokenizer, plain_sampling(8))
    assert policy.lm.default_learning_rate == 6.3e-5  # 3.15e-4 * 0.2
    rates = [
        [group["lr"] for group in APPOTrainer(policy, APPOConfig(**given)).updater.optimizer.param_groups]  # type: ignore[arg-type]
        for given in ({}, {"value_learning_rate": 0.5}, {"learning_rate": 1e-3})
    ]
    assert rates == [[6.3e-5, 6.3e-5], [6.3e-5, 0.5], [1e-3, 1e-3]]
    model.bfloat16()  # a frozen base, whose adapter is trained
    assert policy.lm.default_learning_rate == 6.3e-5


def moved_by_an_update(share: float, learning_rate: float | None) -> float:
    """How far an update moves the log-probabilities of what was sampled, for one policy written down in several ways.

    The weights of its matrices are multiplied by `share`, and those of its norms divided by it, as between SmolLM2 and
    Gemma. That changes nothing in what the model computes, since each matrix stands behind a norm or is undone by one.
    """
    tokenizer = byte_tokenizer()
    model = sharpen(llama(len(tokenizer)))
    for parameter in model.parameters():
        parameter.detach().mul_(share if parameter.dim() > 1 else 1 / share)
        parameter.requires_grad = parameter.dim() > 1
    for norm in (module for module in model.modules() if hasattr(module, "variance_epsilon")):
        norm.variance_epsilon = 1e-12  # small beside the states of either
    policy = policy_of(model, tokenizer, plain_sampling(8))
    trainer = APPOTrainer(policy, APPOConfig(learning_rate=learning_rate, kl_coef=0.0, value_coef=0.0, ppo_epochs=1))
    rollout = policy.sample([policy.query("Write.", "")], torch.Generator().manual_seed(0), 16)
    trainer.updater.update(Scored.of(rollout, torch.arange(16.0), rollout.logprobs), 0.0)
    with torch.no_grad():
        return (policy.evaluate(rollout).logprobs - rollout.logprobs).abs().mean().item()


def test_by_default_updates_go_as_far_whatever_the_size_of_the_weights() -> None:
    far = moved_by_an_update(1.0, None)
    assert far > 1e-5
    assert moved_by_an_update(0.2, None) == pytest.approx(far, rel=0.05)
    assert moved_by_an_update(0.2, 3e-5) > 4 * moved_by_an_update(1.0, 3e-5)  # with one learning rate for both


def test_weights_kept_in_bfloat16_would_not_move() -> None:
    weights = torch.nn.Parameter(torch.full((1000,), 0.02, dtype=torch.bfloat16))  # half the spacing is 6e-5
    optimizer = torch.optim.AdamW([weights], lr=1e-5, weight_decay=0.0)
    for _ in range(200):
        weights.grad = torch.full_like(weights, 0.01)
        optimizer.step()
    assert (weights == 0.02).all() or (weights == torch.tensor(0.02).bfloat16()).all()


def test_trainable_weights_below_float32_are_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="load the model in float32"):
        policy_of(llama(len(tokenizer)).bfloat16(), tokenizer)


def test_frozen_weights_may_be_bfloat16() -> None:
    tokenizer = byte_tokenizer()
    policy = policy_of(llama(len(tokenizer)).bfloat16().requires_grad_(False), tokenizer)
    assert policy.value_head.weight.dtype == torch.float32


def test_an_agent_with_nothing_to_train_is_refused() -> None:
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer))
    policy = policy_of(model, tokenizer)
    target_of(model, tokenizer, "{prompt} {input}", ())  # freezes the weights of the same object
    with pytest.raises(ValueError, match=r"no parameter to train.*model object"):
        APPOTrainer(policy)


def test_all_but_the_layers_is_float32() -> None:
    trainer = make()
    step(trainer)
    rollout = trainer.policy.sample(queries(trainer), torch.Generator().manual_seed(0), copies=4)
    now = trainer.policy.evaluate(rollout)
    columns = [rollout.logprobs, rollout.values, *now]
    state = [s for entry in trainer.updater.optimizer.state.values() for s in entry.values()]
    found = {t.dtype for t in [*columns, *trainer.policy.parameters(), *state]}
    assert found == {torch.float32}


def test_the_layers_do_compute_in_bfloat16() -> None:
    trainer, seen = make(), set()
    layer = trainer.policy.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    trainer.policy.sample(queries(trainer), torch.Generator().manual_seed(0), copies=4)
    assert seen == {torch.bfloat16}


def test_log_probabilities_are_those_of_float32_but_for_rounding() -> None:
    tokenizer = byte_tokenizer()
    model = sharpen(llama(len(tokenizer)))
    full, half = (
        policy_of(model, tokenizer, plain_sampling(8), compute_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    rollout = full.sample([full.query("", "one")], torch.Generator().manual_seed(0), copies=4)
    with torch.no_grad():
        assert_close(half.evaluate(rollout).logprobs, full.evaluate(rollout).logprobs, rtol=0, atol=0.1)


def test_the_head_does_not_round_to_bfloat16() -> None:
    tokenizer = byte_tokenizer()
    model = sharpen(llama(len(tokenizer)))  # logits of a size that real models have
    lm = policy_of(model, tokenizer, plain_sampling(8), compute_dtype=torch.bfloat16).lm
    logits = lm.run(Branches([[1, 2]], [[3, 4]], [0])).logits
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    logits.sum().backward()
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32


def test_a_copy_of_a_policy_computes_with_the_head_that_was_copied() -> None:
    trainer = make()
    rollout = trainer.policy.sample(queries(trainer), torch.Generator().manual_seed(0), copies=2)
    copied = copy.deepcopy(trainer.policy)
    with torch.no_grad():
        trainer.policy.model.get_output_embeddings().weight.normal_()
    assert_close(copied.measure(rollout).logprobs, rollout.logprobs, rtol=0, atol=0.1)


@pytest.mark.parametrize("nonempty", [True, False])
def test_a_float64_agent_has_float32_log_probabilities_at_temperature_1(nonempty: bool) -> None:
    tokenizer = byte_tokenizer()
    policy = policy_of(llama(len(tokenizer)).double(), tokenizer, SamplingConfig(4, 1.0, nonempty))
    rollout = policy.sample([policy.query("", "one")], torch.Generator().manual_seed(0), copies=4)
    now = policy.evaluate(rollout)
    assert {column.dtype for column in now} == {torch.float32}
    assert_close(now.logprobs, rollout.logprobs, rtol=0, atol=1e-5)


def test_ratios_start_at_1_and_the_kl_at_0_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether decoding token by token rounds otherwise than one forward pass hangs on the CPU: here it always does."""
    tokenizer = byte_tokenizer()
    policy = policy_of(sharpen(llama(len(tokenizer))), tokenizer, plain_sampling(8), compute_dtype=torch.bfloat16)
    trainer = APPOTrainer(policy, APPOConfig(), generator=torch.Generator().manual_seed(0))
    sampled = policy.sample(queries(trainer), torch.Generator().manual_seed(0), copies=8)
    decoded = replace(sampled, logprobs=sampled.logprobs + 0.01, values=sampled.values - 0.01)
    monkeypatch.setattr(policy, "sample", lambda *_arguments, **_named: decoded)
    collected = trainer.collect(queries(trainer), lambda prompts: [0.0] * len(prompts), copies=8)
    with torch.no_grad():
        now = policy.evaluate(sampled)
    assert_close(collected.rollout.tokens, sampled.tokens)
    assert not torch.equal(now.logprobs, decoded.logprobs)
    assert torch.equal(now.logprobs, collected.rollout.logprobs)
    assert torch.equal(now.values, collected.rollout.values)
    assert collected.kl == 0.0


def test_the_first_rollout_adds_up_in_bfloat16() -> None:
    trainer = make()
    self_check(trainer.policy, trainer.anchor, trainer.policy.sample(queries(trainer), trainer.generator, 4))


def test_a_wrong_temperature_is_seen_in_bfloat16_too() -> None:
    tokenizer = byte_tokenizer()
    policy = policy_of(sharpen(llama(len(tokenizer))), tokenizer, plain_sampling(8), compute_dtype=torch.bfloat16)
    trainer = APPOTrainer(policy, generator=torch.Generator().manual_seed(0))
    rollout = trainer.policy.sample(queries(trainer), trainer.generator, 4)
    self_check(trainer.policy, trainer.anchor, rollout)
    policy.sampling = replace(policy.sampling, temperature=0.85)
    with pytest.raises(SelfCheckError, match="temperature"):
        self_check(policy, trainer.anchor, rollout)


def share_of_ascii(prompts: list[str]) -> list[float]:
    """Nearly half of all bytes, so that little training is enough: bfloat16 is slow where a CPU has to emulate it."""
    return [sum(map(str.isascii, prompt)) / max(len(prompt), 1) for prompt in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_in_bfloat16_as_in_float32(dtype: torch.dtype) -> None:
    trainer = make(dtype, kl_coef=0.0, learning_rate=0.02, warm_up=False)
    means = [step(trainer, share_of_ascii, count=32)["reward_mean"] for _ in range(18)]
    # A mean of 3 * 32 prompts of 8 bytes has a standard error of 0.02 around 0.45 as long as nothing is learnt.
    assert sum(means[:3]) / 3 < 0.6
    assert sum(means[-3:]) / 3 > 0.65
