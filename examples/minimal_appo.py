"""APPO in one file: the algorithm of StablePrompt (arXiv 2410.07652), on the lab's models, with torch and transformers.

    python examples/minimal_appo.py          about a minute on a laptop; prints the learning curve

An agent M_a reads some input-output pairs (the state s) and writes K prompts z. A frozen target M_T answers labelled
examples under each prompt, and the quality of its answers is the reward. PPO trains the agent, with a penalty on its
distance from an *anchor*, an earlier copy of the agent. When the agent has become clearly better than the anchor, it
becomes the anchor; when it has become clearly worse, it goes back to the anchor. The paper's equations, in the order of
the code below:

    (13)  R = c_a * accuracy + c_s * margin         mean over a batch of examples           reward
    (14)  margin = p(y) - max_{i != y} p(i)         p: softmax over the label words         reward
    (10)  P = KL(theta_t(z|s) || theta_anchor(z|s))                                         penalised
    (4)   A = GAE(V, R)                                                                     advantages
    (5)   ratio = theta_t(z|s) / theta_{t-1}(z|s)                                           loss
    (6)   A_clipped = clip(ratio, 1 - eps, 1 + eps) * A                                     loss
    (3)   L_v = (V - R)^2                                                                   loss
    (11)  L_agent = A_clipped + P                                                           loss
    (12)  L = L_v + L_agent                                                                 loss
    3.2   the rule of the anchor                                                            review

    (7) to (9) are the same with theta_{t-1} in place of the anchor: plain PPO, with which the paper compares APPO.

Where this file departs from the printed paper, and why:

    - The penalty has a coefficient, which the paper does not print. It is part of each token's reward (Ziegler et al.
      2019), not a term of the loss, so that GAE carries it back to the tokens that caused it.
    - The surrogate is min(unclipped, clipped) (Schulman et al. 2017). The clipped term alone, as printed, cannot pull
      back a ratio that has left the range in the wrong direction.
    - Signs: A is maximised, L_v and P are minimised; the paper adds all three.
    - The mean reward of the other prompts is subtracted from each reward. Otherwise, with a critic that starts at 0,
      equal positive rewards would make every end token more likely: real agents then write less and less, and finally
      nothing.
    - Performance, which the paper does not define, is the mean validation accuracy of eight sampled prompts.

This file leaves out what the package has: several queries in an iteration, minibatches, value clipping, an entropy
bonus and guards against unsound steps (appo/update.py); speed and chat templates (appo/lm/); test-time editing and a
fair final choice with intervals (experiments/arms/); checkpoints (experiments/run/).
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

LAB = Path(__file__).parents[1] / "experiments" / "lab"
TEMPLATE = "{prompt} Input : {input} Output :"
WORDS = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}  # the verbalizer: label -> answer


@dataclass(frozen=True)
class Config:
    """Values for the lab's tiny agent; comments give the paper's value if it differs."""

    iterations: int = 40
    prompts: int = 16  # K, prompts sampled in each iteration, at least two; paper: 4
    examples: int = 16  # examples on which each prompt is scored
    max_new_tokens: int = 64  # most tokens of a prompt; paper: 150
    accuracy_weight: float = 10.0  # c_a of Eq. 13
    margin_weight: float = 0.1  # c_s of Eq. 13
    learning_rate: float = 4e-4  # paper: 1e-5, for an adapter of a large agent
    value_learning_rate: float = 2e-3  # learning rate of the value head; paper: one for all
    value_coef: float = 0.1  # coefficient of L_v in Eq. 12
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2  # eps of Eq. 6
    kl_coef: float = 0.1  # coefficient of P
    ppo_epochs: int = 4
    max_grad_norm: float = 1.0
    period: int = 5  # iterations between two reviews of the anchor
    promote_threshold: float = 0.05  # the agent becomes the anchor if it leads by more than this in accuracy
    rollback_threshold: float = 0.1  # the agent goes back to the anchor if it trails by more than this
    seed: int = 0


# -- the agent ---------------------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """A causal LM with a value head that starts at 0."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval()  # dropout would make ratios differ from 1 before anything was learnt
        self.value_head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, query: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities of the tokens, and values of the states before them; both [K, T], 0 on padding.

        Args:
            query: [Q] token ids of the meta-prompt.
            tokens: [K, T] responses to it, right-padded; causal attention hides the padding from all real tokens.
            mask: [K, T], True on real tokens.
        """
        ids = torch.cat([query.expand(len(tokens), -1), tokens], dim=1)
        output = self.model(ids, output_hidden_states=True)
        before = slice(len(query) - 1, -1)  # token t is predicted at token t - 1
        logprobs = output.logits[:, before].log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        values = self.value_head(output.hidden_states[-1][:, before]).squeeze(-1)
        return logprobs.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)

    @torch.no_grad()
    def sample(self, query: Tensor, count: int, length: int, end: int) -> tuple[Tensor, Tensor]:
        """Samples responses from the plain softmax; returns their tokens and mask, [K, T] each.

        There is no top-k and no top-p, because the loss needs the probabilities of the distribution that was sampled
        from. The end token is part of a response, and is trained like any other token.
        """
        ids, cache, alive = query.expand(count, -1), None, torch.ones(count, dtype=torch.bool)
        tokens, mask = [], []
        while alive.any() and len(tokens) < length:
            output = self.model(ids, past_key_values=cache, use_cache=True)
            ids, cache = torch.multinomial(output.logits[:, -1].softmax(-1), 1), output.past_key_values
            tokens.append(ids[:, 0].masked_fill(~alive, end))
            mask.append(alive)
            alive = alive & (ids[:, 0] != end)
        return torch.stack(tokens, dim=1), torch.stack(mask, dim=1)


# -- the reward: Eqs. 13 and 14 ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """An input for the target, and the class of the right answer."""

    input: str
    label: int


class Target:
    """A frozen causal LM that answers with one of the label words."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        # The token of a label word depends on the text before it: here the template and a space.
        self.words = [tokenizer(f"{TEMPLATE} {word}")["input_ids"][-1] for word in WORDS.values()]

    @torch.no_grad()
    def logits(self, prompt: str, examples: list[Example]) -> Tensor:
        """Returns the logits [N, C] of the label words after each filled template."""
        texts = [TEMPLATE.replace("{input}", example.input).replace("{prompt}", prompt) for example in examples]
        # Padded on the left, so that all texts end in the last column.
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = self.model(batch["input_ids"], attention_mask=mask, position_ids=positions, logits_to_keep=1)
        return output.logits[:, -1, self.words]


def reward(target: Target, prompts: list[str], examples: list[Example], config: Config) -> tuple[Tensor, Tensor]:
    """Returns the rewards [K] of prompts (Eq. 13), and their accuracies [K]."""
    labels = torch.tensor([example.label for example in examples])
    chances = torch.stack([target.logits(prompt, examples).softmax(-1) for prompt in prompts])  # [K, N, C]
    accuracies = (chances.argmax(-1) == labels).float().mean(1)
    index = labels.expand(len(prompts), -1).unsqueeze(-1)
    best_wrong = chances.scatter(-1, index, -torch.inf).amax(-1)
    margins = (chances.gather(-1, index).squeeze(-1) - best_wrong).mean(1)  # Eq. 14
    return config.accuracy_weight * accuracies + config.margin_weight * margins, accuracies


# -- from rewards to advantages: Eqs. 10 and 4 -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """K sampled responses to one query; tensors are [K, T], except `query` [Q] and `scores` [K]."""

    query: Tensor
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor  # under the agent that sampled them, theta_{t-1} of Eq. 5
    values: Tensor
    anchor_logprobs: Tensor
    scores: Tensor


def penalised(rollout: Rollout, kl_coef: float) -> Tensor:
    """Returns the reward of each token, [K, T]: minus the penalty at every token, plus the score at the last.

    log p - log p_anchor of a token that the agent sampled is an unbiased estimate of KL(agent || anchor), Eq. 10.
    """
    mask = rollout.mask
    scores = rollout.scores
    scores = (scores * len(scores) - scores.sum()) / (len(scores) - 1)  # minus the mean of the others
    ends = mask & ~nn.functional.pad(mask[:, 1:], (0, 1))
    penalty = kl_coef * (rollout.logprobs - rollout.anchor_logprobs)
    return torch.where(ends, scores.unsqueeze(1), 0.0) - penalty.masked_fill(~mask, 0.0)


def advantages(rollout: Rollout, config: Config) -> tuple[Tensor, Tensor]:
    """Returns advantages, whitened over all tokens, and returns; both [K, T] (Eq. 4, Schulman et al. 2016)."""
    rewards, values, mask = penalised(rollout, config.kl_coef), rollout.values, rollout.mask
    following = nn.functional.pad(values[:, 1:], (0, 1))  # values are 0 on padding: an episode ends where its text does
    errors = rewards + config.gamma * following - values
    estimated, running = torch.zeros_like(errors), torch.zeros(len(errors))
    for t in reversed(range(errors.shape[1])):
        running = errors[:, t] + config.gamma * config.lam * running
        estimated[:, t] = running
    returns = estimated + values
    white = (estimated - estimated[mask].mean()) / (estimated[mask].var() + 1e-8).sqrt()
    return white.masked_fill(~mask, 0.0), returns


# -- the update: Eqs. 3, 5, 6, 11 and 12 -------------------------------------------------------------------------------


def make_optimizer(agent: Agent, config: Config) -> torch.optim.Optimizer:
    """Makes Adam for the agent; the value head gets its own learning rate."""
    head = {"params": list(agent.value_head.parameters()), "lr": config.value_learning_rate}
    return torch.optim.AdamW([{"params": list(agent.model.parameters())}, head], config.learning_rate, weight_decay=0.0)


def loss(agent: Agent, rollout: Rollout, estimated: Tensor, returns: Tensor, config: Config) -> Tensor:
    """Returns L of Eq. 12, which is minimised; the penalty is already part of the advantages."""
    mask = rollout.mask
    logprobs, values = agent(rollout.query, rollout.tokens, mask)
    ratio = (logprobs - rollout.logprobs).exp()  # Eq. 5; 1 in the first epoch
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    surrogate = torch.minimum(ratio * estimated, clipped * estimated)  # Eq. 6, with the min of PPO
    value_error = 0.5 * (values - returns) ** 2  # Eq. 3
    return -surrogate[mask].mean() + config.value_coef * value_error[mask].mean()


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, config: Config) -> None:
    """Makes some epochs of PPO on one rollout."""
    estimated, returns = advantages(rollout, config)
    for _ in range(config.ppo_epochs):
        optimizer.zero_grad()
        loss(agent, rollout, estimated, returns, config).backward()
        nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
        optimizer.step()


# -- the anchor: section 3.2 -------------------------------------------------------------------------------------------


class Anchor:
    """A copy of the agent and of its optimizer's state; it shares no tensor with them."""

    def __init__(self, agent: Agent, optimizer: torch.optim.Optimizer) -> None:
        self.agent = copy.deepcopy(agent).requires_grad_(False)
        self.optimizer_state = copy.deepcopy(optimizer.state_dict())

    def promote(self, agent: Agent, optimizer: torch.optim.Optimizer) -> None:
        """Copies the agent into the anchor."""
        self.agent.load_state_dict(agent.state_dict())
        self.optimizer_state = copy.deepcopy(optimizer.state_dict())

    def rollback(self, agent: Agent, optimizer: torch.optim.Optimizer) -> None:
        """Copies the anchor into the agent, with the optimizer's moments, which would otherwise repeat the damage."""
        agent.load_state_dict(self.agent.state_dict())
        optimizer.load_state_dict(copy.deepcopy(self.optimizer_state))

    def review(self, agent: Agent, optimizer: torch.optim.Optimizer, lead: float, config: Config) -> str:
        """Promotes, rolls back or keeps, by the agent's lead in mean validation accuracy; returns which."""
        if lead > config.promote_threshold:
            self.promote(agent, optimizer)
            return "promote"
        if lead < -config.rollback_threshold:
            self.rollback(agent, optimizer)
            return "rollback"
        return "keep"


# -- all of it ---------------------------------------------------------------------------------------------------------


def read_task(name: str = "mnli", per_label: int = 16) -> tuple[list[Example], list[Example], list[Example]]:
    """Reads a lab task: `per_label` examples of each label to train, as many to validate, and the whole test file."""

    def read(file: str) -> list[Example]:
        lines = (LAB / "data" / name / file).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        text = "premise : {premise}\nhypothesis : {hypothesis}"
        return [Example(text.format(**row), list(WORDS).index(row["label"])) for row in rows]

    rows = read("train.jsonl")
    of_label = [[row for row in rows if row.label == label] for label in range(len(WORDS))]
    parts = [[row for group in of_label for row in group[i * per_label : (i + 1) * per_label]] for i in (0, 1)]
    return parts[0], parts[1], read("test.jsonl")


def ask(tokenizer: PreTrainedTokenizerBase, examples: list[Example], rng: random.Random) -> Tensor:
    """Returns the meta-prompt (paper, Figure 6) with five pairs, as token ids [Q]."""
    words = list(WORDS.values())
    pairs = "\n".join(f"Input : {e.input} Output : {words[e.label]}" for e in rng.sample(examples, 5))
    text = (
        "I gave a friend an instruction and five inputs.\n"
        "The friend read the instruction and wrote an output for every one of the inputs.\n"
        f"Here are the input-output pairs:\n{pairs}\nThe instruction was :"
    )
    return torch.tensor(tokenizer(text)["input_ids"])


def main(config: Config | None = None) -> list[float]:
    """Tunes a prompt for the lab's mnli; returns the mean accuracies of the prompts of each iteration."""
    config = config or Config()
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(LAB / "agent")
    agent = Agent(AutoModelForCausalLM.from_pretrained(LAB / "agent"))
    target_model = AutoModelForCausalLM.from_pretrained(LAB / "target")
    target = Target(target_model, AutoTokenizer.from_pretrained(LAB / "target"))
    train, validation, test = read_task()
    optimizer = make_optimizer(agent, config)
    anchor = Anchor(agent, optimizer)

    def write(writer: Agent, query: Tensor, count: int) -> tuple[Tensor, Tensor, list[str]]:
        tokens, mask = writer.sample(query, count, config.max_new_tokens, tokenizer.eos_token_id)
        return tokens, mask, [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    curve, found = [], {}
    for iteration in range(1, config.iterations + 1):
        # Collect: K prompts, their rewards, and their log-probabilities under agent and anchor.
        query = ask(tokenizer, train, rng)
        tokens, mask, prompts = write(agent, query, config.prompts)
        scores, accuracies = reward(target, prompts, rng.sample(train, config.examples), config)
        with torch.no_grad():
            logprobs, values = agent(query, tokens, mask)
            anchor_logprobs, _ = anchor.agent(query, tokens, mask)
        # Update: PPO on Eq. 12.
        update(agent, optimizer, Rollout(query, tokens, mask, logprobs, values, anchor_logprobs, scores), config)
        found |= dict(zip(prompts, scores.tolist(), strict=True))
        # Review: promote the agent to anchor, go back to the anchor, or keep both.
        decision = ""
        if iteration % config.period == 0:
            sides = [reward(target, write(one, query, 8)[2], validation, config)[1] for one in (agent, anchor.agent)]
            decision = anchor.review(agent, optimizer, (sides[0].mean() - sides[1].mean()).item(), config)
        curve.append(accuracies.mean().item())
        kl = (logprobs - anchor_logprobs).sum(1).mean().item()
        print(f"{iteration:3d}  accuracy {curve[-1]:.2f} {'#' * round(40 * curve[-1]):40s}  kl {kl:5.2f}  {decision}")

    shortlist = sorted(found, key=lambda prompt: -found[prompt])[:20]
    best = shortlist[int(reward(target, shortlist, validation, config)[1].argmax())]
    final = reward(target, [best], test, config)[1].item()
    print(f"\nbest prompt on validation: {best}\naccuracy on {len(test)} test rows: {final:.3f}")
    return curve


if __name__ == "__main__":
    main()
