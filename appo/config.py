"""Settings of the algorithm: frozen dataclasses, checked when made; comments say where each default comes from.

[P] is the paper (StablePrompt, arXiv 2410.07652: Table 6 and section 3). [TRL] is TRL 0.11, whose defaults the
published code took where the paper is silent. All other defaults are ours, and most comments name the value that they
replace; agents of 135 M parameters learn with them (docs/real-models.md). experiments/configs/paper.yaml has the
paper's values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ReferenceName = Literal["anchor", "initial", "previous", "none"]


@dataclass(frozen=True)
class SamplingConfig:
    """How the agent writes. No top-k and no top-p: the loss uses the distribution that was sampled from."""

    max_new_tokens: int = 32  # longest prompt, in agent tokens; [P]: 150, which small agents fill with rambling
    temperature: float = 0.85  # divides the logits, in sampling and in the loss alike; published code: 1
    nonempty: bool = True  # a prompt cannot end before it has visible text; ours
    one_line: bool = True  # a line break ends a prompt, once something is written; ours
    whole_sentences: bool = True  # a prompt that is cut off drops its unfinished last sentence; ours

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(self.temperature > 0, "temperature", self.temperature, "above 0")


@dataclass(frozen=True)
class AnchorConfig:
    """When the anchor follows the agent, and when the agent goes back to the anchor."""

    period: int = 5  # epochs (in `fit`: iterations) between two reviews; [P]: u_t, in the published code's unit
    prompts: int = 32  # at least so many from each side at a review; ours; the published code's 2 are mostly noise
    promote_threshold: float = 0.05  # lead in mean validation accuracy, as a fraction, above which to promote [P]
    rollback_threshold: float = 0.1  # deficit above which to roll back [P]
    max_kl: float | None = 8.0  # nats of KL above which a review comes at once, any lead deciding; ours; null: off [P]
    significance: float | None = None  # highest p of a paired test at which a review acts, ours; null: no test [P]
    promote: bool = True  # False: the anchor is never promoted
    rollback: bool = True  # False: the agent is never rolled back
    collapse: bool = True  # roll back an agent whose prompts are empty, very short or all the same; ours

    def __post_init__(self) -> None:
        for name, least in (("period", 1), ("prompts", 1), ("promote_threshold", 0), ("rollback_threshold", 0)):
            _require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        p, kl = self.significance, self.max_kl
        lowest = 0.5**self.prompts  # the p of a review in which every prompt leads
        _require(p is None or lowest < p < 1, "significance", p, f"above 0.5^prompts ({lowest:.2g}), below 1, or null")
        _require(kl is None or kl > 0, "max_kl", kl, "above 0, or null")


@dataclass(frozen=True)
class APPOConfig:
    """PPO, and the reference of its KL penalty."""

    learning_rate: float | None = None  # of AdamW; null: by the size of the agent's weights; [P]: 1e-5, for adapters
    warm_up: bool = True  # learning rates times 1 - 0.9^t at the optimizer's step t; ours, see docs; false: [P]
    value_learning_rate: float | None = None  # of the value head alone; null: learning_rate [P]
    clip_range: float = 0.2  # of the probability ratio [P]
    value_clip_range: float | None = 0.2  # of the value head around its old values; null: off [TRL]
    value_coef: float = 0.01  # weight of the value loss; [P]: 0.1, where its gradient outweighs the policy's
    entropy_coef: float = 0.03  # bonus for the log of the entropy per token, in the loss; ours, see docs; 0: off [P]
    cut_off_penalty: float = 1.0  # taken off the score of a response cut off at the token limit; ours; 0: none [P]
    gamma: float = 1.0  # discount [P]
    lam: float = 1.0  # lambda of generalised advantage estimation; [P]: 0.95, which needs an accurate critic
    ppo_epochs: int = 2  # passes over each rollout; [TRL]: 4
    minibatch_size: int = 0  # responses per optimizer step; 0: the whole rollout, ours: K = 16 is small enough
    micro_batch_size: int = 0  # responses per backward pass (gradient accumulation); 0: the whole minibatch
    max_grad_norm: float | None = 10.0  # gradient clipping, null: off; ours: only outliers, usual norms are 3 to 8
    max_ratio: float | None = 10.0  # mean probability ratio above which a step is skipped; null: off [TRL]
    target_kl: float | None = None  # stop after an epoch whose mean approx_kl (nats per token) exceeds this; ours
    max_bad_steps: int = 3  # iterations in a row without a sound step: roll back; twice as many: end training; ours
    whiten_advantages: bool = True  # over all tokens of a rollout of two or more responses [TRL]
    leave_one_out: bool = True  # subtract the mean score of the query's other responses; ours, see update.advantages
    scale_scores: bool = False  # divide centred scores by their root mean square for the query, as GRPO does
    reference: ReferenceName = "anchor"  # KL against: anchor (APPO), initial (RLHF), previous (plain PPO), none
    kl_coef: float = 0.05  # the paper prints no coefficient; [TRL]: 0.2
    kl_in_loss: bool = False  # True: add the k3 estimate to the loss instead of penalising each token's reward
    kl_target: float | None = None  # nats per response that the coefficient adapts towards; [TRL]: 6; null: constant
    kl_horizon: int = 10_000  # responses over which it adapts [TRL]

    def __post_init__(self) -> None:
        _require(self.clip_range > 0, "clip_range", self.clip_range, "above 0")
        names = ("learning_rate", "value_learning_rate", "value_clip_range", "max_grad_norm", "target_kl", "kl_target")
        for name in names:
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0, or null")
        for name in ("value_coef", "entropy_coef", "cut_off_penalty", "minibatch_size", "micro_batch_size", "kl_coef"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("ppo_epochs", "max_bad_steps", "kl_horizon"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("gamma", "lam"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        _require(self.max_ratio is None or self.max_ratio > 1, "max_ratio", self.max_ratio, "above 1, or null")
        references = ("anchor", "initial", "previous", "none")
        _require(self.reference in references, "reference", self.reference, f"one of {', '.join(references)}")
        expected = f"null with reference {self.reference}, whose KL is always 0 at sampling time"
        _require(self.kl_target is None or self.reference in references[:2], "kl_target", self.kl_target, expected)


def _require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:  # NaN fails every comparison, so it is refused too
        raise ValueError(f"{field} is {value!r}; expected {expected}")
