"""The target: its class logits against a plain loop without padding and cache, and the tokens of its label words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from appo.lm.attention import Branches
from appo.lm.model import CausalLM, ContextTooLongError
from appo.lm.packed import common_prefix
from rewards.local import LocalTarget, Verbalizer
from rewards.target import Asked, Remembered, grid, pairs
from tests.conftest import SPECIAL, byte_tokenizer, gpt2, llama, logits_of, sharpen, target_of

TEMPLATE = "{prompt} Input : {input} Output :"
WORDS = ("yes", "maybe", "no")
PROMPTS = ("Judge .", "", "Does the second sentence follow from the first one ? Say yes , maybe or no .")  # ragged
INPUTS = ("a b", "premise : it rains\nhypothesis : the street is wet and so am I", "x")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def loglik(model: PreTrainedModel, context: Sequence[int], word: Sequence[int]) -> float:
    """log p(word | context) of one row: no padding, no cache, all logits, the sum over the word's tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *word]]), use_cache=False).logits[0].float()
    logprobs = logits.log_softmax(-1)
    return sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(word))


def loop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    inputs: Sequence[str],
    words: Sequence[str] = WORDS,
) -> Tensor:
    """[K, N, C] under TEMPLATE, one row at a time; for tokenizers that keep ' word' apart from what precedes it."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return torch.tensor(
        [
            [[loglik(model, ids(f"{p} Input : {x} Output :"), ids(f" {word}")) for word in words] for x in inputs]
            for p in prompts
        ]
    )


def bpe_tokenizer(*merged: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which each of the given strings is one token; 'Ġ' stands for a leading space."""
    steps = [(text[:i], text[i]) for text in merged for i in range(1, len(text))]
    merges = list(dict.fromkeys(steps))
    tokens = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def unigram_tokenizer(*whole: str) -> PreTrainedTokenizerFast:
    """SentencePiece-like: '▁' for spaces, one put before the text; whole pieces are likelier than their letters."""
    letters = sorted({letter for piece in whole for letter in piece} | set("▁\n:"))
    scores = {"<unk>": 0.0, **dict.fromkeys(letters, -10.0), **dict.fromkeys(whole, -1.0)}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """One token per word; spaces and newlines only separate."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, now putting <s> before every text, as Llama's and Gemma's do."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def lm_of(tokenizer: PreTrainedTokenizerBase) -> CausalLM:
    """A model with the tokenizer's vocabulary, for tests that need only the tokenizer."""
    return CausalLM(llama(max(10, len(tokenizer))), tokenizer)  # a new model is tried on token ids up to 9


def passes(model: PreTrainedModel) -> list[int]:
    """A list that fills up with the tokens of each forward pass of the model."""
    seen: list[int] = []

    def note(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        seen.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def among_classes(logits: Tensor) -> Tensor:
    """Log-probabilities among the classes, which do not change if a constant is added to all logits."""
    return logits.log_softmax(-1)


# -- against the plain loop --------------------------------------------------------------------------------------


def test_class_logits_equal_the_plain_loop(tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    target = target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, WORDS)  # in bytes every word is several tokens
    expected = loop(tiny_lm, tokenizer, PROMPTS, INPUTS)
    assert_close(logits_of(target, PROMPTS, INPUTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_class_logits_of_one_token_words_equal_the_plain_loop(build: type) -> None:
    tokenizer = bpe_tokenizer("Ġyes", "Ġmaybe", "Ġno")
    model = sharpen(build(len(tokenizer)))
    target = target_of(model, tokenizer, TEMPLATE, WORDS)
    expected = among_classes(loop(model, tokenizer, PROMPTS, INPUTS))
    assert_close(among_classes(logits_of(target, PROMPTS, INPUTS)), expected, rtol=0, atol=1e-5)


def gemma2(vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    # The caps are low enough to bend the logits of sharpened weights.
    config = Gemma2Config(
        vocab_size=vocabulary,
        **SMALL,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=5.0,
        sliding_window=256,
        max_position_embeddings=512,
    )
    return Gemma2ForCausalLM(config)


def qwen2(vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, **SMALL, num_key_value_heads=2, max_position_embeddings=512)
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("build", [gemma2, qwen2])
def test_class_logits_equal_the_plain_loop_for_other_architectures(
    build: type, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = sharpen(build(len(tokenizer)))
    target = target_of(model, tokenizer, TEMPLATE, WORDS)
    assert_close(logits_of(target, PROMPTS, INPUTS), loop(model, tokenizer, PROMPTS, INPUTS), rtol=0, atol=1e-5)


def test_class_logits_are_float32_by_prompt_input_and_class(tiny_llama: PreTrainedModel) -> None:
    logits = logits_of(target_of(tiny_llama, byte_tokenizer(), TEMPLATE, WORDS), PROMPTS, INPUTS[:2])
    assert (logits.shape, logits.dtype) == ((3, 2, 3), torch.float32)


def test_class_logits_depend_on_prompt_and_input(tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    # Otherwise the comparisons above could hold for a model that ignores its context.
    logits = logits_of(target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, WORDS), PROMPTS, INPUTS)
    between = [(logits[:, i] - logits[:, j]).abs().max() for i, j in ((0, 1), (1, 2))]
    between += [(logits[i] - logits[j]).abs().max() for i, j in ((0, 1), (1, 2))]
    assert min(between) > 0.01


# -- padding and batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_mates_do_not_change_a_logit(
    side: str, tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.padding_side = side
    target = target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, WORDS)
    together = logits_of(target, PROMPTS, INPUTS)
    alone = torch.stack([torch.cat([logits_of(target, [p], [x])[0] for x in INPUTS]) for p in PROMPTS])
    assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_batch_tokens", [1, 300, 700, 1500, 4000])
def test_a_small_batch_gives_the_same_logits(
    max_batch_tokens: int, tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    sharpen(tiny_lm)
    whole = logits_of(target_of(tiny_lm, tokenizer, TEMPLATE, WORDS), PROMPTS, INPUTS)
    cut = target_of(tiny_lm, tokenizer, TEMPLATE, WORDS, max_batch_tokens=max_batch_tokens)
    assert_close(logits_of(cut, PROMPTS, INPUTS), whole, rtol=0, atol=1e-5)


def test_no_pass_is_larger_than_max_batch_tokens(tiny_llama: PreTrainedModel) -> None:
    # The longest row has 76 + 8 + 63 + 9 = 156 bytes; word stems have 3, 5 and 2: alone it is at most 3 * 161 tokens.
    target = target_of(tiny_llama, byte_tokenizer(), TEMPLATE, WORDS, max_batch_tokens=483)
    seen = passes(tiny_llama)
    logits_of(target, PROMPTS, INPUTS)
    assert len(seen) > 1 and max(seen) <= 483


def test_a_prompt_is_run_once_for_all_its_inputs_and_no_padding_at_all() -> None:
    tokenizer = bpe_tokenizer("Ġyes", "Ġno")
    target = target_of(llama(len(tokenizer)), tokenizer, TEMPLATE, ("yes", "no"))
    seen = passes(target.lm.model)
    logits_of(target, ["p" * 100], ["a", "bcd"])
    # Shared: 100 bytes of prompt and the 9 of ' Input : '. Per input: its own 1 or 3 bytes and the 9 of ' Output :'.
    assert seen == [109 + 1 + 3 + 2 * 9]


def test_out_of_memory_halves_the_passes(
    tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = logits_of(target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, WORDS), PROMPTS, INPUTS)
    target = target_of(tiny_lm, tokenizer, TEMPLATE, WORDS)
    forward = target.lm.model.forward

    def small(**kwargs: Tensor) -> object:
        if kwargs["input_ids"].numel() > 600:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(**kwargs)

    monkeypatch.setattr(target.lm.model, "forward", small)
    assert_close(logits_of(target, PROMPTS, INPUTS), whole, rtol=0, atol=1e-5)
    assert 300 <= target.max_batch_tokens <= 1200


def test_memory_that_does_not_suffice_for_one_pair_is_an_error(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(tiny_llama, byte_tokenizer(), TEMPLATE, WORDS)

    def full(**_kwargs: Tensor) -> object:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(target.lm.model, "forward", full)
    with pytest.raises(RuntimeError, match="can't allocate"):
        logits_of(target, PROMPTS, INPUTS)


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(tiny_llama, byte_tokenizer(), TEMPLATE, WORDS)
    calls: list[int] = []

    def broken(**_kwargs: Tensor) -> object:
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(target.lm.model, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        logits_of(target, PROMPTS, INPUTS)
    assert len(calls) == 1


def test_prompts_that_share_nothing_with_their_inputs_go_with_those_that_do(
    tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    # Under '{prompt}{input} ...' the contexts of the empty prompt differ from the first token on, those of the other
    # prompt from the third: an empty shared prefix runs beside one of two tokens.
    target = target_of(sharpen(tiny_lm), tokenizer, "{prompt}{input} Output :", WORDS)
    apart = torch.cat([logits_of(target, [prompt], ["xa", "yb"]) for prompt in ("", "pq")])
    assert_close(logits_of(target, ["", "pq"], ["xa", "yb"]), apart, rtol=0, atol=1e-5)


# -- label words of several tokens -------------------------------------------------------------------------------


def test_words_of_several_tokens_are_scored_as_wholes(tiny_lm: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer()
    target = target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, ("good", "bad"))
    context = tokenizer("p Input : x Output :")["input_ids"]
    words = [tokenizer(" good")["input_ids"], tokenizer(" bad")["input_ids"]]
    expected = torch.tensor([[[loglik(tiny_lm, context, word) for word in words]]])
    assert_close(logits_of(target, ["p"], ["x"]), expected, rtol=0, atol=1e-5)


# One token against several; a shared first token; shared bytes; all at once. Tokens: ' n', ' no', bytes.
@pytest.mark.parametrize(
    "words", [("no", "yes"), ("not", "nor"), ("yes", "yet"), ("none", "nobody", "yes", "yonder", "you")]
)
def test_words_that_share_tokens_are_told_apart(words: tuple[str, ...]) -> None:
    tokenizer = bpe_tokenizer("Ġno")
    model = sharpen(llama(len(tokenizer)))
    target = target_of(model, tokenizer, TEMPLATE, words)
    assert_close(logits_of(target, PROMPTS, INPUTS), loop(model, tokenizer, PROMPTS, INPUTS, words), rtol=0, atol=1e-5)


# -- label words in place ----------------------------------------------------------------------------------------

BPE = bpe_tokenizer("Ġyes", "Ġno", "yes", "no")
UNIGRAM = unigram_tokenizer("▁Output", "▁:", "▁yes", "▁no", "yes", "no")
WORD_LEVEL = word_tokenizer("Output", ":", "yes", "no")

# (tokenizer, end of the filled template, tokens of 'yes' and 'no', how many of the template's tokens they replace)
PLACES = [
    (BPE, "Output :", ["Ġyes", "Ġno"], 0),
    (BPE, "Output : ", ["Ġyes", "Ġno"], 1),  # 'Ġ' alone at the end, but 'Ġyes' where a word follows
    (BPE, "Output :\n", ["yes", "no"], 0),
    (UNIGRAM, "Output :", ["▁yes", "▁no"], 0),
    (UNIGRAM, "Output : ", ["▁yes", "▁no"], 1),  # likewise
    (UNIGRAM, "Output :\n", ["yes", "no"], 0),
    (WORD_LEVEL, "Output :", ["yes", "no"], 0),
    (WORD_LEVEL, "Output : ", ["yes", "no"], 0),
    (WORD_LEVEL, "Output :\n", ["yes", "no"], 0),
]


@pytest.mark.parametrize(("tokenizer", "context", "tokens", "overlap"), PLACES)
def test_label_words_are_the_tokens_that_follow_the_template(
    tokenizer: PreTrainedTokenizerBase, context: str, tokens: list[str], overlap: int
) -> None:
    verbalizer = Verbalizer.build(lm_of(tokenizer), context, ["yes", "no"])
    expected = tuple((tokenizer.convert_tokens_to_ids(token),) for token in tokens)
    assert verbalizer == Verbalizer(("yes", "no"), expected, overlap)


def test_a_template_that_ends_in_a_space_scores_the_text_as_it_reads() -> None:
    # 'Output : ' and 'yes' together end in the tokens ':' and 'Ġyes': the last 'Ġ' of the template must be replaced.
    tokenizer = bpe_tokenizer("Ġyes", "Ġno", "yes", "no")
    model = sharpen(llama(len(tokenizer)))
    target = target_of(model, tokenizer, TEMPLATE + " ", ("yes", "no"))
    expected = among_classes(loop(model, tokenizer, PROMPTS, INPUTS, ("yes", "no")))
    assert_close(among_classes(logits_of(target, PROMPTS, INPUTS)), expected, rtol=0, atol=1e-5)


def test_words_of_several_pieces_keep_all_of_them() -> None:
    # There is no piece 'maybe', so its tokens are '▁' and its letters; '▁yes' is one piece.
    tokenizer = unigram_tokenizer("▁Output", "▁:", "▁yes", *"maybe")
    tokens = Verbalizer.build(lm_of(tokenizer), "Output :", ["yes", "maybe"]).tokens
    expected = (("▁yes",), ("▁", "m", "a", "y", "b", "e"))
    assert tokens == tuple(tuple(tokenizer.convert_tokens_to_ids(list(pieces))) for pieces in expected)


# A template may end in the input: the label word then follows the input's last character.
@pytest.mark.parametrize(("inputs", "token"), [(["a film", "b."], "Ġyes"), (["a film\n"], "yes")])
def test_label_words_follow_a_filled_template(inputs: list[str], token: str) -> None:
    target = target_of(llama(len(BPE)), BPE, "{prompt}\n{input}", ("yes", "no"), inputs=inputs)
    assert target.verbalizer.tokens[0] == (BPE.convert_tokens_to_ids(token),)
    assert target.verbalizer.overlap == 0


def test_a_template_that_ends_in_the_input_scores_the_text_as_it_reads() -> None:
    model = sharpen(llama(len(BPE)))
    target = target_of(model, BPE, "{prompt}\n{input}", ("yes", "no"))
    context, words = BPE("p\nx")["input_ids"], [BPE(" yes")["input_ids"], BPE(" no")["input_ids"]]
    expected = torch.tensor([[[loglik(model, context, word) for word in words]]])
    assert_close(among_classes(logits_of(target, ["p"], ["x"])), among_classes(expected), rtol=0, atol=1e-5)


def test_label_words_that_change_with_the_input_are_refused() -> None:
    with pytest.raises(ValueError, match="let the template end in fixed text"):
        target_of(llama(len(BPE)), BPE, "{prompt}\n{input}", ("yes", "no"), inputs=["a", "b\n"])


@pytest.mark.parametrize("tokenizer", [WORD_LEVEL, UNIGRAM])
def test_a_word_unknown_to_the_tokenizer_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="no token for the label word 'Ω'"):
        Verbalizer.build(lm_of(tokenizer), "Output :", ["yes", "Ω"])


def test_an_empty_word_is_refused() -> None:
    with pytest.raises(ValueError, match="no token for the label word ''"):
        Verbalizer.build(lm_of(WORD_LEVEL), "Output :", ["yes", ""])


def test_two_words_of_the_same_tokens_are_refused() -> None:
    tokenizer = word_tokenizer("output", ":", "yes", "no")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"\['Yes', 'yes'\] are the same tokens"):
        Verbalizer.build(lm_of(tokenizer), "Output :", ["Yes", "yes", "no"])


def test_a_word_that_begins_another_is_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="the label word '1' begins '10', which the target could never choose"):
        Verbalizer.build(lm_of(tokenizer), "Output :", ["10", "2", "1"])


def test_words_of_several_tokens_are_compared_in_float32_under_a_bfloat16_model() -> None:
    tokenizer = byte_tokenizer()
    for words, wanted in ((("ay", "ob"), torch.float32), (("a", "b"), torch.bfloat16)):
        target = target_of(sharpen(llama(len(tokenizer))).bfloat16(), tokenizer, "{prompt} {input} : ", words)
        assert target.lm.run(Branches([[]], [[1, 2, 3]], [0])).logits.dtype is wanted
        assert target.lm.model.get_input_embeddings().weight.dtype is torch.bfloat16
        assert target.class_logits(grid(PROMPTS, INPUTS)).isfinite().all()


# -- the text ----------------------------------------------------------------------------------------------------


def test_the_template_is_filled_with_prompt_and_input(tiny_llama: PreTrainedModel) -> None:
    target = target_of(tiny_llama, byte_tokenizer(), TEMPLATE, WORDS)
    assert target.context("Judge .", "a b") == "Judge . Input : a b Output :"


def test_a_template_may_name_the_input_first(tiny_llama: PreTrainedModel) -> None:
    target = target_of(tiny_llama, byte_tokenizer(), "Text : {input}\n{prompt}\nAnswer :", WORDS)
    assert target.context("Judge .", "a b") == "Text : a b\nJudge .\nAnswer :"


def test_braces_in_prompts_and_inputs_are_just_braces(tiny_llama: PreTrainedModel) -> None:
    target = target_of(tiny_llama, byte_tokenizer(), TEMPLATE, WORDS)
    filled = target.context("{input} {0} {prompt}", r"{prompt} \1 {{")
    assert filled == r"{input} {0} {prompt} Input : {prompt} \1 {{ Output :"


def test_an_empty_prompt_is_a_prompt(tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    target = target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, WORDS)
    assert_close(logits_of(target, [""], INPUTS), loop(tiny_lm, tokenizer, [""], INPUTS), rtol=0, atol=1e-5)


def test_a_bos_of_the_tokenizer_is_kept_exactly_once(tiny_llama: PreTrainedModel) -> None:
    tokenizer = with_bos(byte_tokenizer())
    target = target_of(sharpen(tiny_llama), tokenizer, TEMPLATE, WORDS)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    context = [tokenizer.bos_token_id, *ids("p Input : x Output :")]
    expected = torch.tensor([[[loglik(tiny_llama, context, ids(f" {word}")) for word in WORDS]]])
    assert_close(logits_of(target, ["p"], ["x"]), expected, rtol=0, atol=1e-5)


def test_a_bos_is_no_part_of_the_label_words() -> None:
    tokenizer = with_bos(bpe_tokenizer("Ġyes", "Ġno"))
    expected = tuple((tokenizer.convert_tokens_to_ids(token),) for token in ("Ġyes", "Ġno"))
    assert Verbalizer.build(lm_of(tokenizer), "Output :", ["yes", "no"]).tokens == expected


def test_an_end_token_behind_every_text_is_no_part_of_the_label_words() -> None:
    tokenizer = bpe_tokenizer("Ġyes", "Ġno")
    plain = Verbalizer.build(lm_of(tokenizer), "Output :", ["yes", "no"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert Verbalizer.build(lm_of(tokenizer), "Output :", ["yes", "no"]) == plain


# -- chat --------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = with_bos(byte_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_a_chat_target_answers_in_an_open_assistant_turn(tiny_llama: PreTrainedModel) -> None:
    target = target_of(tiny_llama, chat_tokenizer(), TEMPLATE, WORDS, chat=True)
    assert target.context("p", "x") == "<s><|user|>\np Input : x Output :<|end|>\n<|assistant|>\n"


def test_a_chat_target_reads_the_template_as_it_stands(tiny_lm: PreTrainedModel) -> None:
    # The only <s> is the template's: the tokenizer adds none. The words follow the newline without a space.
    tokenizer = chat_tokenizer()
    target = target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, WORDS, chat=True)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    context = [tokenizer.bos_token_id, *ids("<|user|>\np Input : x Output :<|end|>\n<|assistant|>\n")]
    expected = torch.tensor([[[loglik(tiny_lm, context, ids(word)) for word in WORDS]]])
    assert_close(logits_of(target, ["p"], ["x"]), expected, rtol=0, atol=1e-5)


def test_words_follow_a_chat_turn_without_a_space_even_where_it_ends_in_none() -> None:
    tokenizer = bpe_tokenizer("Ġyes", "Ġno", "yes", "no")
    tokenizer.chat_template = "[INST] {{ messages[0]['content'] }} [/INST]"
    target = target_of(llama(len(tokenizer)), tokenizer, TEMPLATE, ("yes", "no"), chat=True)
    assert target.verbalizer.tokens == tuple((tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no"))


def test_a_target_with_a_chat_template_gets_plain_text_unless_asked(tiny_llama: PreTrainedModel) -> None:
    assert target_of(tiny_llama, chat_tokenizer(), TEMPLATE, WORDS).context("p", "x") == "p Input : x Output :"


# -- what is remembered ------------------------------------------------------------------------------------------


class Counting:
    """A target that records what it is asked."""

    def __init__(self, target: LocalTarget) -> None:
        self.target, self.words, self.asked = target, target.words, list[list[Asked]]()
        self.check_fits, self.described = target.check_fits, target.described

    def generate(self, asked: Sequence[Asked], budget: int, stop: Sequence[str]) -> list[str]:
        self.asked.append(list(asked))
        return self.target.generate(asked, budget, stop)

    def answer_logprobs(self, asked: Sequence[Asked], answers: Sequence[str]) -> Tensor:
        self.asked.append(list(asked))
        return self.target.answer_logprobs(asked, answers)

    def class_logits(self, asked: Sequence[Asked]) -> Tensor:
        self.asked.append(list(asked))
        return self.target.class_logits(asked)


@pytest.fixture
def counting(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Counting:
    return Counting(target_of(tiny_llama, tokenizer, TEMPLATE, WORDS))


def test_no_pair_is_scored_twice(counting: Counting) -> None:
    target = Remembered(counting)
    first = logits_of(target, PROMPTS[:2], INPUTS[:2])
    seen = passes(counting.target.lm.model)
    assert torch.equal(logits_of(target, PROMPTS[1::-1], INPUTS[:2]), first.flip(0))
    assert torch.equal(target.class_logits(pairs(PROMPTS[:2], INPUTS[:2])), first.diagonal().T)
    assert not seen
    grown = logits_of(target, PROMPTS, INPUTS[:2])  # only the third prompt is new
    assert torch.equal(grown[:2], first)
    counted = list(seen)
    logits_of(counting, PROMPTS[2:], INPUTS[:2])
    assert seen == counted * 2


def test_only_what_is_not_known_is_asked(counting: Counting) -> None:
    target = Remembered(counting)
    known = target.class_logits([Asked("q", ("a", "b"))])
    # Unknown pairs are asked for once each, those of a prompt together, in whatever order they come.
    wanted = [Asked("q", ("c", "a")), *pairs(["p", "q", "p"], ["a", "b", "a"])]
    found = target.class_logits(wanted)
    assert counting.asked[1:] == [[Asked("p", ("a",)), Asked("q", ("c",))]]
    assert torch.equal(found[[1, 3]], known) and torch.equal(found[2], found[4])
    assert_close(found, counting.target.class_logits(wanted), rtol=0, atol=1e-5)
    assert torch.equal(target.class_logits(wanted), found) and len(counting.asked) == 2


def test_remembered_answers_are_kept(counting: Counting) -> None:
    target, again = Remembered(counting), Remembered(counting)
    again.load_state_dict(target.state_dict())  # nothing is known yet
    found = target.class_logits(grid(PROMPTS, INPUTS))
    again.load_state_dict(target.state_dict())
    assert torch.equal(again.class_logits(grid(PROMPTS, INPUTS)), found)
    assert len(counting.asked) == 1


def test_only_so_many_pairs_are_remembered(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.target.REMEMBERED", 2)
    target = Remembered(counting)
    whole = target.class_logits([Asked("p", ("a", "b", "c"))])
    assert target.state_dict()["pairs"] == [("p", "b"), ("p", "c")]
    assert_close(target.class_logits([Asked("p", ("a", "b", "c"))]), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [5, 6, 9, 10, 11])
def test_nothing_is_forgotten_before_there_are_too_many(
    count: int, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewards.target.REMEMBERED", 10)
    target = Remembered(counting)
    target.class_logits([Asked("p", tuple(map(str, range(count))))])
    assert target.state_dict()["pairs"] == [("p", str(i)) for i in range(max(0, count - 10), count)]


def test_texts_and_log_probabilities_of_answers_are_remembered_too(counting: Counting) -> None:
    target, again, local = Remembered(counting), Remembered(counting), counting.target
    asked, said = [Asked("q", ("a", "b")), Asked("p", ("a",))], ["x", "y", "z"]
    texts, chances = target.generate(asked, 3, ("e",)), target.answer_logprobs(asked, said)
    assert texts == local.generate(asked, 3, ("e",))
    assert_close(chances, local.answer_logprobs(asked, said), rtol=0, atol=1e-5)
    again.load_state_dict(target.state_dict())
    for known in (target, again):
        assert known.generate(asked[::-1], 3, ("e",)) == [texts[2], *texts[:2]]
        assert torch.equal(known.answer_logprobs(asked[1:], said[2:]), chances[2:])
    assert len(counting.asked) == 2
    # Another budget, other stop strings or another answer are other questions, each for the pairs that lack it.
    assert target.generate(asked, 2, ("e",)) == local.generate(asked, 2, ("e",))
    assert target.generate(asked[1:], 3, ()) == local.generate(asked[1:], 3, ())
    target.answer_logprobs(asked, ["x", "y", "other"])
    assert counting.asked[2:] == [asked[::-1], asked[1:], asked[1:]]


def test_what_a_server_answered_is_learnt(counting: Counting) -> None:
    target = Remembered(counting)
    pair = {"prompt": "p", "input": "x"}
    told = [{"logits": [None, 1.5]}, {"text": "so", "budget": 3, "stop": ["e"]}, {"answer": "so", "logprob": -0.25}]
    target.learn(pair | row for row in told)
    assert target.class_logits(pairs(["p"], ["x"])).tolist() == [[-torch.inf, 1.5]]
    assert target.generate(pairs(["p"], ["x"]), 3, ("e",)) == ["so"]
    assert target.answer_logprobs(pairs(["p"], ["x"]), ["so"]).tolist() == [-0.25]
    assert not counting.asked


def test_what_it_does_not_remember_it_passes_on(counting: Counting) -> None:
    target = Remembered(counting)
    assert target.words == WORDS and target.described() == {
        "computes_in": "float32",
        "chat": False,
        "packed": True,
        "shared": False,
    }
    with pytest.raises(ContextTooLongError):
        target.check_fits(512, "x")


# -- limits and state --------------------------------------------------------------------------------------------

# ' Input : x Output :' has 19 bytes; ' yes' and ' no' are one token each here, so a prompt has 512 - 19 = 493 left.
FIXED, CONTEXT = 19, 512


@pytest.fixture
def snug() -> LocalTarget:
    tokenizer = bpe_tokenizer("Ġyes", "Ġno")
    return target_of(llama(len(tokenizer)), tokenizer, TEMPLATE, ("yes", "no"))


def test_a_filled_template_may_fill_the_context_to_the_last_token(snug: LocalTarget) -> None:
    assert logits_of(snug, ["p" * (CONTEXT - FIXED)], ["x"]).isfinite().all()


def test_a_filled_template_longer_than_the_context_is_refused(snug: LocalTarget) -> None:
    with pytest.raises(ContextTooLongError, match="the target's context: up to 513 tokens, but the context holds 512"):
        logits_of(snug, ["p" * (CONTEXT - FIXED + 1)], ["x"])


def test_a_learned_position_table_is_never_overrun(tokenizer: PreTrainedTokenizerBase) -> None:
    # GPT-2 names its limit n_positions; beyond it the embedding would fail with an index error.
    with pytest.raises(ContextTooLongError, match="the context holds 512"):
        logits_of(target_of(gpt2(len(tokenizer)), tokenizer, TEMPLATE, WORDS), ["p" * 600], ["x"])


def test_a_prompt_may_be_longer_than_a_sliding_window(tokenizer: PreTrainedTokenizerBase) -> None:
    config = MistralConfig(
        vocab_size=len(tokenizer), **SMALL, num_key_value_heads=2, sliding_window=16, max_position_embeddings=512
    )
    model = sharpen(MistralForCausalLM(config).eval())
    expected = loop(model, tokenizer, PROMPTS, INPUTS)
    assert_close(logits_of(target_of(model, tokenizer, TEMPLATE, WORDS), PROMPTS, INPUTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", [CONTEXT - FIXED, "p" * (CONTEXT - FIXED)])
def test_check_fits_lets_a_full_context_pass(prompt: int | str, snug: LocalTarget) -> None:
    snug.check_fits(prompt, "x")


@pytest.mark.parametrize("prompt", [CONTEXT - FIXED + 1, "p" * (CONTEXT - FIXED + 1)])
def test_check_fits_refuses_one_token_more(prompt: int | str, snug: LocalTarget) -> None:
    with pytest.raises(ContextTooLongError, match="513"):
        snug.check_fits(prompt, "x")


def test_what_check_fits_lets_pass_can_be_scored(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    # ' maybe' has 6 tokens of one byte; the first 5 take room behind the template.
    target = target_of(tiny_llama, tokenizer, TEMPLATE, WORDS)
    prompts = ["p" * n for n in range(CONTEXT - FIXED - 8, CONTEXT - FIXED + 1)]

    def passes_check(prompt: str) -> bool:
        try:
            target.check_fits(prompt, "x")
        except ContextTooLongError:
            return False
        return True

    longest = max(filter(passes_check, prompts), key=len)
    assert logits_of(target, [longest], ["x"]).isfinite().all()


def test_a_target_with_trainable_weights_is_refused(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny_llama.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="the target has trainable weights; freeze it, and give the agent"):
        LocalTarget(CausalLM(tiny_llama, tokenizer), TEMPLATE, WORDS)


def test_the_target_is_in_eval_mode(tiny_gpt2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    target = target_of(tiny_gpt2.train(), tokenizer, TEMPLATE, WORDS)  # GPT-2 has dropout of 0.1 by default
    assert torch.equal(logits_of(target, PROMPTS, INPUTS), logits_of(target, PROMPTS, INPUTS))


def test_class_logits_carry_no_gradient(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert not logits_of(target_of(tiny_llama, tokenizer, TEMPLATE, WORDS), ["p"], ["x"]).requires_grad


@pytest.mark.parametrize(
    ("sequences", "expected"), [(["abc", "abd"], 2), (["ab", "abc"], 2), (["", "a"], 0), (["x", "y"], 0), (["ab"], 2)]
)
def test_common_prefix_ends_where_any_sequence_differs_or_ends(sequences: list[str], expected: int) -> None:
    assert common_prefix([list(map(ord, sequence)) for sequence in sequences]) == expected


SPECIALS = ("</s>", "<s>", "a </s> b <pad>")


@pytest.mark.parametrize("text", SPECIALS)
@pytest.mark.parametrize("place", ["prompt", "input"])
def test_a_special_token_written_as_text_is_read_as_text(
    place: str, text: str, tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    target = target_of(tiny_llama, tokenizer, TEMPLATE, WORDS)
    (ids,) = target.lm.tokens([target.context(*((text, "x") if place == "prompt" else ("p", text)))])
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert text in tokenizer.decode(ids)


@pytest.mark.parametrize("text", SPECIALS)
def test_in_a_chat_only_the_templates_own_special_tokens_count(
    text: str, tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s>"
    target = target_of(tiny_llama, tokenizer, TEMPLATE, WORDS, chat=True)
    counts = []
    for prompt in ("plain", text):
        (ids,) = target.lm.tokens([target.context(prompt, "x")])
        counts.append(sum(token in tokenizer.all_special_ids for token in ids))
    assert counts == [3, 3]
