"""Breaks the maths on purpose, one fault at a time, and checks that the tests notice.

    make mutate

Each mutant is one replaced piece of source in a copy of the tree; the tests named beside it are run there. A mutant
that survives is a hole in the tests: exit code 1.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
COPIED = ("appo", "rewards", "tasks", "experiments", "tests", "setup.cfg")


class Mutant(NamedTuple):
    """A fault to insert, its place, and the tests that should notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MASKS, GAE, LOSS, KL = (f"test_functional_{name}.py" for name in ("masks", "gae", "losses", "kl"))
F, A, R = "appo/functional.py", "appo/anchor.py", "appo/rollout.py"
TR, U, E = "appo/trainer.py", "appo/update.py", "appo/lm/ends.py"
PO = "appo/policy.py"
ADVANTAGES = "test_advantages.py"
P, T, L, LOGITS, LM = (f"appo/lm/{name}.py" for name in ("packed", "attention", "linear", "logits", "model"))
C, D, G = (f"appo/lm/decoding/{name}.py" for name in ("cache", "recorded", "growing"))
MUTANTS = (
    Mutant("mean: mask dropped", F, "return x.masked_fill(~mask, 0.0).sum(dim)", "return x.sum(dim)", MASKS),
    Mutant("mean: divided by all", F, ".sum(dim) / mask.sum(dim).clamp(min=1)", ".sum(dim) / mask.numel()", MASKS),
    Mutant("variance: always biased", F, "(count - int(unbiased))", "count", MASKS),
    Mutant("variance: mask dropped", F, "squares.masked_fill(~mask, 0.0).sum()", "squares.sum()", MASKS),
    Mutant("whiten: not centred", F, "whitened if shift_mean", "whitened if not shift_mean", MASKS),
    Mutant("whiten: padding not zero", F, "else whitened + mean).masked_fill(~mask, 0.0)", "else whitened + mean)", MASKS),
    Mutant("logprobs: not normalised", F, "at_least_float32(logits).log_softmax(-1).gather", "at_least_float32(logits).gather", KL),
    Mutant("logprobs: rows not normalised", LOGITS, "logprobs = at_least_float32(rows).log_softmax(-1)\n            chosen", "logprobs = at_least_float32(rows)\n            chosen", KL),
    Mutant("logprobs: gradient sign", LOGITS, ".mul_(-g)", ".mul_(g)", KL),
    Mutant("logprobs: gradient without the token", LOGITS, ".scatter_add_(-1, token, g)", "", KL),
    Mutant("entropy: gradient sign", LOGITS, "part -= h", "part += h", KL),
    Mutant("entropy: gradient where one token is certain", LOGITS, "logprobs.clamp(min=least)", "logprobs", KL),
    Mutant("k1: sign", F, "difference = logprobs - ref_logprobs", "difference = ref_logprobs - logprobs", KL),
    Mutant("k3: sign", F, "torch.expm1(-difference) + difference", "torch.expm1(difference) - difference", KL),
    Mutant("rewards: penalty is a bonus", F, "penalty = -kl_coef", "penalty = kl_coef", KL),
    Mutant("rewards: score on the first token", F, "is_last = mask & ~F.pad(mask[:, 1:], (0, 1))", "is_last = mask & ~F.pad(mask[:, :-1], (1, 0))", KL),
    Mutant("rewards: KL mask dropped", F, "kl.masked_fill(~mask, 0.0)", "kl", KL),
    Mutant("gae: sign of the value", F, "gamma * next_values - values", "gamma * next_values + values", GAE),
    Mutant("gae: values aligned one late", F, "F.pad(values[:, 1:], (0, 1))", "values", GAE),
    Mutant("gae: lambda forgotten", F, "gamma * lam * running", "gamma * running", GAE),
    Mutant("gae: gamma forgotten", F, "gamma * lam * running", "lam * running", GAE),
    Mutant("gae: forwards in time", F, "for t in reversed(range(deltas.shape[1])):", "for t in range(deltas.shape[1]):", GAE),
    Mutant("gae: mask dropped", F, "values.masked_fill(~mask, 0.0)\n    next", "values\n    next", GAE),
    Mutant("gae: returns without values", F, "advantages, advantages + values", "advantages, advantages", GAE),
    Mutant("policy loss: sign", F, "unclipped = -advantages * ratio", "unclipped = advantages * ratio", LOSS),
    Mutant("policy loss: min for max", F, "torch.maximum(unclipped, clipped), mask), clip_fraction, a", "torch.minimum(unclipped, clipped), mask), clip_fraction, a", LOSS),
    Mutant("policy loss: no clipping", F, "ratio.clamp(1.0 - clip_range, 1.0 + clip_range)", "ratio", LOSS),
    Mutant("policy loss: ratio inverted", F, "(logprobs - old_logprobs).masked_fill", "(old_logprobs - logprobs).masked_fill", LOSS),
    Mutant("policy loss: mask dropped", F, "(logprobs - old_logprobs).masked_fill(~mask, 0.0)", "(logprobs - old_logprobs)", LOSS),
    Mutant("policy loss: advantages differentiated", F, "old_logprobs, advantages = old_logprobs.detach(), advantages.detach()", "pass", LOSS),
    Mutant("value loss: min for max", F, "torch.maximum(unclipped, clipped), mask), clip_fraction)", "torch.minimum(unclipped, clipped), mask), clip_fraction)", LOSS),
    Mutant("value loss: clipped around the return", F, "values.clamp(old_values - clip_range, old_values + clip_range)", "values.clamp(returns - clip_range, returns + clip_range)", LOSS),
    Mutant("value loss: half forgotten", F, "ValueLoss(0.5 * masked_mean(torch.max", "ValueLoss(masked_mean(torch.max", LOSS),
    Mutant("anchor: alias of the policy", A, "{name: p.detach().clone() for", "{name: p.detach() for", "test_anchor.py"),
    Mutant("anchor: promotion by reference", A, "self._parameters[name].copy_(parameter)", "self._parameters[name] = parameter.data", "test_anchor.py"),
    Mutant("anchor: rollback forgets the optimizer", A, "        self._optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))\n", "", "test_anchor.py"),
    Mutant("anchor: rollback consumes its state", A, "self._optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))", "self._optimizer.load_state_dict(self._optimizer_state)", "test_anchor.py"),
    Mutant("anchor: rollback does nothing", A, "parameter.copy_(self._parameters[name])", "pass", "test_anchor.py"),
    Mutant("anchor: never put in place", A, "self._parameters[name] = self._policy.ranks.swap(parameter, self._parameters[name])", "pass", "test_anchor.py"),
    Mutant("anchor: not taken out again", A, "        finally:\n            self._exchange()", "        finally:\n            pass", "test_anchor.py"),
    Mutant("collapse: any shorter prompt", A, "policy.length < anchor.length / 3", "policy.length < anchor.length", "test_review.py"),
    Mutant("collapse: empty prompts pass", A, "policy.empty_rate > 0.5 >= anchor.empty_rate", "False", "test_review.py"),
    Mutant("collapse: the same prompt again and again passes", A, "policy.distinct < 1 / 3 <= anchor.distinct", "False", "test_review.py"),
    Mutant("collapse: repetition passes", A, "policy.variety < anchor.variety / 3", "False", "test_review.py"),
    Mutant("review: collapse is not looked for", TR, "if config.collapse and not wins and", "if False and not wins and", "test_review.py"),
    Mutant("review: any lead excuses a collapse", TR, "policy_mean > max(anchor_scores)", "True", "test_review.py"),
    Mutant("review: no lead excuses a collapse", TR, "if config.collapse and not wins and", "if config.collapse and", "test_review.py"),
    Mutant("review: different prompts counted among all", TR, "distinct_share(prompts)", "len(set(prompts)) / len(prompts)", "test_review.py"),
    Mutant("choice: the luck of batches stands", "experiments/arms/fixed.py", "not config.shortlist or", "True or", "test_choice.py"),
    Mutant("batches: one row left over", "experiments/arms/batches.py", "size = -(-len(self.order) // left)", "size = self.size", "test_batches.py"),
    Mutant("checkpointing: a layer's own dropout is on", LM, "before, layer.training = layer.training, False", "before = layer.training", "test_packed.py"),
    Mutant("passes: dropout where a caller trains", LM, "        self.model.eval()  # a caller", "        # a caller", "test_policy.py"),
    Mutant("review: scores in per cent", TR, "(scores > 1)", "(scores > 100)", "test_trainer.py"),
    Mutant("splits: half of its own validation rows", "tasks/splits.py", "(not test and not last)", "(not test)", "test_splits.py"),
    Mutant("review: far away as near by", TR, "(0.0, 0.0) if self.far else", "(0.0, 0.0) if False else", "test_trainer.py"),
    Mutant("review: never early", TR, "due = self.far or number", "due = number", "test_trainer.py"),
    Mutant("review: near by as far away", TR, "self.far = kl > (", "self.far = kl < (", "test_trainer.py"),
    Mutant("penalty: rounding counts", U, "kl.masked_fill(kl.abs() < ROUNDING, 0.0)", "kl", ADVANTAGES),
    Mutant("penalty: coefficient may change its sign", A, "min(n / self.horizon, 1.0)", "n / self.horizon", "test_anchor.py"),
    Mutant("review: all rows for each of many prompts", "experiments/arms/fixed.py", "config.examples.review_rows or len(rows)", "len(rows)", "test_arms.py"),
    Mutant("review: one query too many", "experiments/arms/fixed.py", "count // asked, lambda prompts: reward.apart", "count, lambda prompts: reward.apart", "test_arms.py"),
    Mutant("reward: own examples of another prompt", "rewards/reward.py", "zip(prompts, examples, strict=True)]\n        found", "zip(prompts[::-1], examples, strict=True)]\n        found", "test_editing.py"),
    Mutant("target: words of several tokens in bfloat16", "rewards/local.py", "weight.dtype.itemsize < 4", "weight.dtype.itemsize < 0", "test_target.py"),
    Mutant("target: forgets before it is full", "rewards/target.py", "[: max(0, len(self._known) - REMEMBERED)]", "[: len(self._known) - REMEMBERED]", "test_target.py"),
    Mutant("decoding: a key of the last call is seen", D, "self.mask.zero_()\n", "", "test_decoding.py"),
    Mutant("decoding: other weights, the same recording", D, "tuple(weight.data_ptr() for weight in begun.model.parameters())", "()", "test_decoding.py"),
    Mutant("decoding: positions stand still", D, "self.positions.add_(1)", "self.positions.add_(0)", "test_decoding.py"),
    Mutant("review: the initial agent is promoted", TR, "config.promote and self.updater.reference.moves", "config.promote", "test_review.py"),
    Mutant("review: draws from the rollouts' stream", TR, "self.policy.sample(queries, self.review_generator, copies)", "self.policy.sample(queries, self.generator, copies)", "test_review.py"),
    Mutant("ends: allowed though nothing is written", E, "masked_fill(~written.unsqueeze(1), -torch.inf)", "masked_fill(~written.unsqueeze(1), -1.0)", "test_ends.py"),
    Mutant("ends: forbidden for ever", E, "~written.unsqueeze(1)", "torch.ones_like(written).unsqueeze(1)", "test_ends.py"),
    Mutant("ends: loss not renormalised", E, "if not self.nonempty:\n            return logprobs, entropy", "if True:\n            return logprobs, entropy", "test_ends.py"),
    Mutant("ends: white space counts as written", E, "bool(clean(text)) and token", "bool(text) and token", "test_ends.py"),
    Mutant("ends: a line break before anything", E, "written & self._breaks[tokens]", "self._breaks[tokens]", "test_ends.py"),
    Mutant("decide: promotes at the threshold", A, "policy_score - anchor_score > promote", "policy_score - anchor_score >= promote", "test_anchor.py"),
    Mutant("decide: rolls back at the threshold", A, "anchor_score - policy_score > rollback", "anchor_score - policy_score >= rollback", "test_anchor.py"),
    Mutant("decide: thresholds exchanged", A, "anchor_score - policy_score > rollback_threshold", "anchor_score - policy_score > promote_threshold", "test_anchor.py"),
    Mutant("KL coefficient: wrong direction", A, "kl / self.target - 1.0, -0.2", "1.0 - kl / self.target, -0.2", "test_anchor.py"),
    Mutant("KL coefficient: error not clipped", A, "min(max(kl / self.target - 1.0, -0.2), 0.2)", "kl / self.target - 1.0", "test_anchor.py"),
    Mutant("buffer: scores by reference", R, "scores.detach().clone().float()", "scores", "test_rollout.py"),
    Mutant("advantages: penalty sign", U, "kl_estimate(scored.logprobs, scored.ref_logprobs)", "kl_estimate(scored.ref_logprobs, scored.logprobs)", ADVANTAGES),
    Mutant("advantages: gamma and lambda exchanged", U, "config.gamma, config.lam)", "config.lam, config.gamma)", ADVANTAGES),
    Mutant("advantages: whitening without mask", U, "masked_whiten(estimated, scored.mask)", "masked_whiten(estimated, torch.ones_like(scored.mask))", ADVANTAGES),
    Mutant("advantages: a lone response whitened", U, "len(scored) == 1 or (config", "(config", ADVANTAGES),
    Mutant("advantages: the critic's errors whitened", U, "config.leave_one_out and not scores.any()", "False", ADVANTAGES),
    Mutant("update: a skipped step counts as one that has not moved", U, "for step in epoch if \"approx_kl\" in step]", "for step in epoch]", "test_guards.py"),
    Mutant("review: a lead that does not promote is none", TR, "wins = policy_mean", "wins = decision is AnchorDecision.PROMOTE and policy_mean", "test_review.py"),
    Mutant("encoding: an end token behind every text", LM, "ids[:-1] if len(ids) > 1 and ids[-1] == end else ids", "ids", "test_policy.py"),
    Mutant("statistics: what is no number decides", "experiments/run/statistics.py", "    if math.isnan(p):\n        return NO_VERDICT\n", "", "test_statistics.py"),
    Mutant("advantages: scores not centred", U, "    if config.leave_one_out:\n", "    if False:\n", ADVANTAGES),
    Mutant("advantages: a lone score has no baseline", U, "otherwise=mean_score", "otherwise=0.0", ADVANTAGES),
    Mutant("advantages: scaled by the whole rollout", F, "same = (groups[:, None] == groups).to(centred.dtype)", "same = (groups[:, None] == groups[:, None]).to(centred.dtype)", "test_arms.py"),
    Mutant("review: a lucky lead counts", A, "found.sum().abs() - 1e-9", "found.sum().abs() + 1e9", "test_anchor_rule.py"),
    Mutant("update: mean of scores off by rounding", U, "scores[0] + (scores - scores[0]).mean()", "scores.mean() + 1e-6", "test_advantages.py"),
    Mutant("minibatches: a row lost", R, "torch.randperm(len(batch), generator", "torch.randperm(len(batch) - 1, generator", "test_rollout.py"),
    Mutant("leave one out: the response among the others", F, "others.sum(1)", "others.sum(1) + 1", "test_functional_kl.py"),
    Mutant("leave one out: all groups as one", F, "(groups[:, None] == groups).fill", "(groups[:, None] >= -1).fill", "test_functional_kl.py"),
    Mutant("groups: collects take each other's queries", R, "part.owner + start for", "part.owner for", "test_rollout.py"),
    Mutant("groups: a selection keeps the old numbers", R, "owner=owner, **cut)", "owner=self.owner[rows], **cut)", "test_rollout.py"),
    Mutant("linear: gradient of the bias", L, "gradient.sum(0)", "gradient[0]", "test_linear.py"),
    Mutant("linear: replaces layers that do more than a product", L, "if type(module) is nn.Linear:", "if isinstance(module, nn.Linear):", "test_linear.py"),
    Mutant("packed: later tokens are visible", T, "masked_fill(age < 0, -torch.inf)", "masked_fill(age < -1, -torch.inf)", "test_packed.py"),
    Mutant("packed: positions begin anew", P, "torch.arange(o, o + len(row), device=CPU)", "torch.arange(len(row))", "test_packed.py"),
    Mutant("packed: the prefix of another row", T, "starts[max(parent[r], 0)] for r in rows", "starts[0] for r in rows", "test_packed.py"),
    Mutant("packed: window one too wide", T, "block.age >= sliding_window", "block.age > sliding_window", "test_packed.py"),
    Mutant("packed: not capped", T, "scores = softcap * torch.tanh(scores / softcap)", "pass", "test_packed.py"),
    Mutant("packed: the last layer queries other tokens", T, "queries = first + asked", "queries = first + steps", "test_packed.py"),
    Mutant("packed: order of blocks", T, "_take(torch.cat(parts), layout.restore)", "torch.cat(parts)", "test_packed.py"),
    Mutant("packed: MLP of other tokens", P, "index_select(1, wanted)", "index_select(1, wanted - 1)", "test_packed.py"),
    Mutant("packed: cache keeps rows that left", C, "            self.room = []  # of the rows before reordering\n", "", "test_packed.py"),
    Mutant("packed: rows of the cache not moved", C, "room[moved, :, :held] = room[beam_idx[moved], :, :held]", "pass", "test_packed.py"),
    Mutant("packed: no causal mask where none is given", T, ".tril(lengths[1] - lengths[0])", "", "test_packed.py"),
    Mutant("sampling: the token before", LOGITS, "below, level, right=True", "below - logprobs.exp(), level, right=True", "test_policy.py"),
    Mutant("sampling: all responses draw alike", PO, "chances[alive, length[alive]]", "chances[0 * alive, length[alive]]", "test_policy.py"),
    Mutant("minibatches: not shuffled", R, "torch.randperm(len(batch), generator=generator, device=\"cpu\")", "torch.arange(len(batch))", "test_rollout.py"),
    Mutant("sampling: copies not side by side", PO, ".repeat_interleave(copies)", ".repeat(copies)", "test_policy.py"),
    Mutant("sampling: what other rows have written", PO, "written[alive]).log_softmax", "written[: len(alive)]).log_softmax", "test_ends.py"),
    Mutant("lm: oneDNN though switched off", LM, "        if onednn:\n", "        if True:\n", "test_linear.py"),
    Mutant("lm: copies of the first context", G, "self.owner = torch.tensor(owner, device=model.device)", "self.owner = torch.zeros(len(owner), dtype=torch.long)", "test_policy.py"),
    Mutant("lm: special tokens in a text are parsed", LM, "split_special_tokens=not self.chat", "split_special_tokens=False", "test_policy.py"),
    Mutant("reference: the initial agent moves", A, "name != \"initial\", name ==", "True, name ==", "test_trainer.py"),
    Mutant("collect: the anchor is taken for the policy", TR, "if self.anchor.is_policy() else", "if True else", "test_trainer.py"),
    Mutant("collect: the anchor always makes a pass", TR, "if self.anchor.is_policy() else", "if False else", "test_trainer.py"),
    Mutant("reference: plain PPO against the anchor", TR, "anchor_logprobs if self.updater.reference.fixed else rollout.logprobs", "anchor_logprobs", "test_trainer.py"),
    Mutant("update: no warm-up", U, "if self.config.warm_up:", "if False:", "test_trainer.py"),
    Mutant("update: the warm-up lags a step", U, "(done + 1))", "done)", "test_trainer.py"),
    Mutant("update: the penalty counts twice", U, "0.0 if self.reference.in_loss else kl_coef", "kl_coef", "test_trainer.py"),
    Mutant("update: the coefficient is not passed on", U, "self.optimizer_step(part, kl_coef, entropy_coef)", "self.optimizer_step(part)", "test_trainer.py"),
    Mutant("collect: cut-off responses are rewarded", TR, "- self.config.cut_off_penalty", "+ self.config.cut_off_penalty", "test_trainer.py"),
    Mutant("update: entropy is penalised", U, "loss - entropy_coef", "loss + entropy_coef", "test_trainer.py"),
    Mutant("update: the entropy bonus does not grow", U, "config.entropy_coef / max(", "config.entropy_coef * max(", "test_trainer.py"),
    Mutant("update: one learning rate for weights of any size", LM, "RELATIVE_RATE * median(sizes)", "6e-5", "test_precision.py"),
    Mutant("update: a matrix is as large as its sum of squares", LM, " / m.numel() ** 0.5", "", "test_precision.py"),
    Mutant("update: the given learning rate is ignored", U, "config.learning_rate or policy.lm.default_learning_rate", "policy.lm.default_learning_rate", "test_precision.py"),
    Mutant("fit: never reviews", TR, "number % self.anchor_config.period == 0", "False", "test_trainer.py"),
    Mutant("fit: reviews at once", TR, "number % self.anchor_config.period == 0", "number % self.anchor_config.period == 1", "test_trainer.py"),
    Mutant("checkpoints: no room for the one being written", "experiments/run/checkpoint.py", "KEPT + 1) - found", "KEPT) - found", "test_checkpoint.py"),
    Mutant("batches: labels not spread", "experiments/arms/batches.py", "sorted(shuffled, key=lambda i: place[i])", "shuffled", "test_batches.py"),
    Mutant("target: text after a stop string is kept", "rewards/target.py", "(text[: min(places)], True)", "(text, True)", "test_generation.py"),
    Mutant("target: a word's tokens scored at one position", "rewards/local.py", "logprobs[:, first + i, token]", "logprobs[:, first, token]", "test_target.py"),
    Mutant("reward: the worst of several right labels", "rewards/reward.py", "logits.clamp(min=lowest), -torch.inf)", "-logits, -torch.inf)", "test_generation.py"),
    Mutant("rewards: any number is accepted", TR, "if scores.shape != (count,):", "if False:", "test_trainer.py"),
    Mutant("packed: the head reads a slice", P, "states[0].contiguous()", "states[0]", "test_packed.py"),
    Mutant("lm: reading a context makes all logits", "appo/lm/decoding/flight.py", "with only_rows(self.model, [0]):  # nobody", "if True:  # nobody", "test_packed.py"),
    Mutant("flight: a response is taken for another", "appo/lm/decoding/flight.py", "new.alive += self.boarded", "new.alive += 0", "test_flight.py"),
    Mutant("flight: the budget counts steps, not tokens", "appo/lm/decoding/flight.py", "self.written[alive] += 1", "self.written += 1", "test_flight.py"),
    Mutant("flight: one more than fits", "appo/lm/decoding/flight.py", "(going + count + 1) * width > self.room", "(going + count) * width > self.room", "test_flight.py"),
    Mutant("flight: caches are joined that cannot be", "appo/lm/decoding/flight.py", "self.waiting.joining and can_join(self.begun.cache)", "True", "test_flight.py"),
    Mutant("cache: padded behind the tokens", C, "(0, 0, width - x.shape[2], 0)", "(0, 0, 0, width - x.shape[2])", "test_flight.py"),
    Mutant("cache: a joined window forgets its length", C, "max(layer.cumulative_length, new.cumulative_length)", "new.cumulative_length", "test_flight.py"),
    Mutant("cache: a trimmed window keeps its length", C, "layer.cumulative_length = left", "pass", "test_flight.py"),
    Mutant("growing: padding of a join is seen", G, "(columns - mask.shape[1], 0))", "(columns - mask.shape[1], 0), value=True)", "test_flight.py"),
    Mutant("fixed: rows are mistaken for responses", D, "self.output.logits[self.rows]", "self.output.logits[self.alive]", "test_flight.py"),
    Mutant("linear: a stale layout stays", "appo/lm/linear.py", "vars(layer).pop(\"laid_out\", None)", "pass", "test_linear.py"),
    Mutant("trial: any distance is sound", "appo/lm/trial.py", "APART = 0.2", "APART = 20.0", "test_packed.py"),
    Mutant("attention: of another kind runs ours", T, "if unknown := [name for name in UNKNOWN", "if unknown := [name for name in ()", "test_packed.py"),
    Mutant("packed: a trial that fails is not caught", P, "    except Exception:", "    except KeyError:", "test_packed.py"),
    Mutant("ends: a negative token", LM, "if 0 <= token < vocabulary", "if token < vocabulary", "test_ends.py"),
    Mutant("adapter: any rank", "appo/lm/adapter.py", "if rank > full:", "if rank > full + 1:", "test_adapter.py"),
    Mutant("trial: no padding in the rows", "appo/lm/trial.py", "TEXTS = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]", "TEXTS = [[1, 2, 3], [7, 8, 9]]", "test_packed.py"),
    Mutant("direct: tried at the beginning only", "appo/lm/decoding/recorded.py", "clamp(min=context - 4)", "clamp(min=0)", "test_direct.py"),
    Mutant("cells: as many different names are enough", "tasks/cells.py", "len(own) == len(set(own)) == count", "len(set(own)) == count", "test_formats.py"),
    Mutant("lm: the head rounds to bfloat16", LM, "if compute_dtype != torch.float32:\n            self.use", "if False:\n            self.use", "test_precision.py"),
    Mutant("collect: bfloat16 ratios do not start at 1", TR, "self.policy.lm.compute_dtype.itemsize < 4", "False", "test_precision.py"),
    Mutant("self-check: no tolerance in bfloat16", "appo/selfcheck.py", "ROUNDING if exact else 0.1", "1e-4 if exact else 100.0", "test_precision.py"),
    Mutant("statistics: a bootstrap of unpaired rows", "experiments/run/statistics.py", "_bootstrap(np.asarray(one) - np.asarray(other))", "_bootstrap(np.abs(np.asarray(one) - np.asarray(other)))", "test_statistics.py"),
    Mutant("report: mended and broken swapped", "experiments/page/answers.py", "else after - before", "else before - after", "test_report.py"),
    Mutant("report: matrix of the other prompt", "experiments/page/answers.py", "answers = [row[side][\"answer\"] for row in rows]", "answers = [row[\"manual\"][\"answer\"] for row in rows]", "test_report.py"),
    Mutant("charts: promoted looks like rolled back", "experiments/page/charts.py", "up = mark.kind == \"promote\"", "up = True", "test_report.py"),
)  # fmt: skip


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass on a copy of the tree with the mutant in it."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in COPIED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__", "lab"))
            else:
                shutil.copy(source, copy / part)
        path = copy / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(
                f"{mutant.name}: the replaced text occurs {text.count(mutant.old)} times in {mutant.file}, not once"
            )
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{mutant.tests}"]
        return subprocess.run(command, cwd=copy, capture_output=True, timeout=300, check=False).returncode == 0


def main() -> int:
    """Prints a line for each mutant; returns 1 if one survives."""
    survivors = []
    for mutant in MUTANTS:
        alive = survives(mutant)
        survivors += [mutant.name] * alive
        print(f"{'SURVIVED' if alive else 'caught':10}{mutant.file:20}{mutant.name}", flush=True)
    print(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
