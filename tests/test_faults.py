"""Bad input through the real command line: one clear line, exit code 2, and nothing half-written.

Each row begins with the number of its kind of fault, in a list of 64 made before the program was written: 1-17
configuration and command line, 18-32 data, 33-43 models, 44-55 training, 56-62 interruptions and disk, 63-64 output.
Faults that are tested where they belong are in `ELSEWHERE`, those that cannot come up in `OUT_OF_REACH`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.config import LAB_DIR
from experiments.train import main
from tests.test_sources import sst2_folder, write

SPEC = """name: mood
description: Is it happy?
fields: {text: []}
label: [label]
verbalizer: {"0": "no", "1": "yes"}
input: "{text}"
manual_prompt: Is it?
files: {train: [rows.jsonl]}
"""


def config(text: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["--config", str(write(folder / "conf.yaml", text))]


def spec(text: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["--task", str(write(folder / "mood.yaml", text))]


def options(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda folder: [*arguments]


def data(name: str, content: str | bytes) -> Callable[[Path], list[str]]:
    """A sound folder for sst2 in which one file is replaced."""

    def build(folder: Path) -> list[str]:
        sst2_folder(folder / "data", train=40)
        (folder / "data" / name).with_suffix(".tsv").unlink(missing_ok=True)
        write(folder / "data" / name, content)
        return ["--task", "sst2", "--data", str(folder / "data")]

    return build


def model(damage: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """The lab's target, damaged."""

    def build(folder: Path) -> list[str]:
        shutil.copytree(LAB_DIR / "target", folder / "model")
        damage(folder / "model")
        return ["--target", str(folder / "model")]

    return build


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def own(row: str, **keys: str) -> Callable[[Path], list[str]]:
    """A user's own task: `SPEC` with lines replaced or added, and one row."""

    def build(folder: Path) -> list[str]:
        write(folder / "rows.jsonl", row)
        lines = {line.split(":")[0]: line for line in SPEC.splitlines()} | {k: f"{k}: {v}" for k, v in keys.items()}
        return ["--task", str(write(folder / "mood.yaml", "\n".join(lines.values())))]

    return build


QUIZ = {"verbalizer": "{}", "choices": "[opts]", "input": '"{text}{choices}"'}
OPEN = {"verbalizer": "{}", "answers": "[label]", "metric": "f1"}


def changed(**values: object) -> Callable[[Path], object]:
    """config.json with other values."""
    return lambda folder: write(
        folder / "config.json", json.dumps(json.loads((folder / "config.json").read_text(encoding="utf-8")) | values)
    )


def spoiled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}, folder / "model.safetensors"
    )


HEADER = "sentence\tlabel\n"
FAULTS: list[tuple[str, Callable[[Path], list[str]], list[str]]] = [
    ("1 unknown key", config("appo: {learnin_rate: 1e-5}"), ["conf.yaml", "learnin_rate", "learning_rate"]),
    ("2 key in the wrong section", config("appo: {shots: 4}"), ["conf.yaml", "shots"]),
    ("3 not a number", options("appo.learning_rate=fast"), ["appo.learning_rate", "'fast'"]),
    ("4 label words that YAML takes for booleans", spec(SPEC.replace('"no"', "no")), ["verbalizer", "in quotes"]),
    (
        "4 labels that YAML takes for numbers",
        spec(SPEC.replace('"0"', "0")),
        ["verbalizer 0: 'no': the label", "in quotes"],
    ),
    ("5 duplicate key", config("seed: 1\nprompts: 3\nseed: 2"), ["'seed'", "line 1", "line 3"]),
    ("6 bad indent", config("appo:\n\tlam: 1"), ["conf.yaml", "line 2"]),
    ("6 not a mapping", config("- 1"), ["conf.yaml", "list"]),
    ("6 empty file", config(""), ["conf.yaml"]),
    ("7 python object", config("seed: !!python/object/apply:os.getpid []"), ["conf.yaml", "constructor"]),
    ("8 clip_range of 0", options("appo.clip_range=0"), ["clip_range", "above 0"]),
    ("8 lam above 1", options("appo.lam=1.5"), ["lam", "between 0 and 1"]),
    ("8 no epochs", options("appo.ppo_epochs=0"), ["ppo_epochs", "at least 1"]),
    ("9 nan", options("appo.learning_rate=.nan"), ["learning_rate", "nan"]),
    ("6 nested too deeply", spec("a: " + "[" * 5000), ["mood.yaml", "nested too deeply"]),
    ("6 no such date", spec("name: 2001-02-30"), ["mood.yaml", "not readable as YAML"]),
    ("6 a number of thousands of digits", spec("max_shots: " + "9" * 5000), ["mood.yaml", "not readable as YAML"]),
    ("6 half a character", spec('name: "\\ud800"'), ["mood.yaml", "half a character"]),
    ("1 a split of another name", own("{}", files="{val: [a.csv]}"), ["mood.yaml", "'val'", "validation"]),
    ("1 a family for a task", own("{}", members="5"), ["mood.yaml", "a family of tasks"]),
    ("1 text without a metric", own("{}", verbalizer="{}", answers="[a]"), ["mood.yaml", "missing key 'metric'"]),
    ("12 empty value", options("appo.lam="), ["appo.lam=", "key=value"]),
    ("12 no equals sign", options("appo.lam"), ["appo.lam", "key=value"]),
    ("12 unknown path", options("appa.lam=1"), ["appa", "appo"]),
    ("13 unknown task", options("--task", "mnIi"), ["mnIi", "did you mean 'mnli'?"]),
    ("13 no spec file", options("--task", "no/such/mood.yaml"), ["no spec file", "no/such/mood.yaml"]),
    ("14 resume of nothing", options("--resume"), ["--resume needs --run"]),
    ("18 no data folder", options("--data", "nowhere/at/all"), ["nowhere/at/all"]),
    ("18 no file", lambda folder: ["--task", "sst2", "--data", str(folder)], ["no train file", "train.jsonl"]),
    (
        "18 another kind of file",
        own("{}", files="{train: [rows.txt, mood.yaml]}"),
        ["mood.yaml", "unknown kind of file"],
    ),
    (
        "18 a foreign file further down",
        lambda folder: ["--task", "sst2", "--data", str(sst2_folder(folder / "data" / "sub").parent)],
        ["no train file", "further down", "'sst2'"],
    ),
    ("19 nested too deeply", data("test.jsonl", "[" * 100_000), ["test.jsonl:1", "nested too deeply"]),
    ("19 too many digits", data("test.jsonl", '{"label": ' + "9" * 5000 + "}"), ["test.jsonl:1", "too many digits"]),
    (
        "19 broken JSON line",
        data("test.jsonl", '{"sentence": "a", "label": 0}\n{"a": \n'),
        ["test.jsonl:2", "not JSON"],
    ),
    ("19 array for an object", data("test.jsonl", "[1]\n"), ["test.jsonl:1", "expected an object"]),
    ("20 missing field", data("test.jsonl", '{"sentence": "a"}\n'), ["test.jsonl:1", "'label'"]),
    ("20 null", data("test.jsonl", '{"sentence": null, "label": 0}\n'), ["test.jsonl:1", "'sentence'", "null"]),
    (
        "21 unknown label",
        data("test.jsonl", '{"sentence": "a", "label": 7}\n'),
        ["test.jsonl:1", "label 7", "negative"],
    ),
    ("21 no scores", own('{"text": "a", "label": {}}'), ["rows.jsonl:1", "a number for each name"]),
    ("21 null scores", own('{"text": "a", "label": {"0": null}}'), ["rows.jsonl:1", "a number for each name"]),
    ("21 equal scores", own('{"text": "a", "label": {"0": 1, "1": 1}}'), ["rows.jsonl:1", "expected a highest one"]),
    ("21 no answer", own('{"text": "a", "label": [null]}', **OPEN), ["rows.jsonl:1", "no answer in column 'label'"]),
    ("21 one choice", own('{"text": "a", "opts": ["b"], "label": 0}', **QUIZ), ["rows.jsonl:1", "choices is 1"]),
    (
        "21 too many choices",
        own(json.dumps({"text": "a", "opts": [f"{i}" for i in range(27)], "label": 0}), **QUIZ),
        ["rows.jsonl:1", "choices is 27", "2 to 26"],
    ),
    (
        "21 scores of other choices",
        own('{"text": "a", "opts": ["b", "c"], "label": {"b": 1}}', **QUIZ),
        ["rows.jsonl:1", "one for each of b, c"],
    ),
    (
        "22 a text that no context holds",
        own(json.dumps({"text": "a" * 10**7})),
        ["rows.jsonl:1", "10000000 characters"],
    ),
    ("22 white space for text", data("test.tsv", HEADER + "  \t0\n"), ["test.tsv:2", "expected some text"]),
    ("23 not UTF-8", data("test.tsv", HEADER.encode() + b"a\xff\t0\n"), ["test.tsv", "not UTF-8 at byte 16"]),
    ("24 too few columns", data("test.tsv", HEADER + "a\n"), ["test.tsv:2", "1 fields", "2 columns"]),
    ("24 unbalanced quote", data("test.csv", 'sentence,label\n"a,0\n'), ["test.csv", "not CSV"]),
    ("25 no rows", data("test.tsv", HEADER), ["test.tsv", "no rows"]),
    ("24 two columns of one name", data("test.tsv", "sentence\tlabel\tlabel\n"), ["test.tsv:1", "two columns"]),
    ("25 too few rows", data("train.tsv", HEADER + "a\t0\nb\t1\n"), ["sst2: 1 different examples", "examples.shots"]),
    (
        "25 a class is missing",
        data("train.tsv", HEADER + "a\t0\nb\t0\n"),
        ["sst2: no row of train has the label 'positive'"],
    ),
    ("33 no such model", options("--target", "./no/such/model"), ["target", "no/such/model"]),
    ("33 a folder without weights", model(lambda f: (f / "model.safetensors").unlink()), ["target", "no weights"]),
    ("33 a folder without config", model(lambda f: (f / "config.json").unlink()), ["target", "config.json"]),
    ("39 weights cut short", model(cut_weights), ["target", "cannot load"]),
    ("17 no such device", options("device=cuda:7"), ["device 'cuda:7' cannot be used"]),
    ("28 prompts too long for the agent", options("sampling.max_new_tokens=5000"), ["the context holds 1024"]),
    ("3 more digits than Python reads", options(f"steps={'9' * 5_000}"), ["steps", "cannot read the value"]),
    ("3 more digits than it writes", config(f"steps: 0x{'f' * 9_000}"), ["steps", "thousands of digits"]),
    ("3 a date that is none", options("task=2001-99-99"), ["task", "cannot read the value"]),
    ("3 half a character", options('task="\\ud800"'), ["task", "\\ud800"]),
    ("7 a tag that is none", options("seed=!!timestamp x"), ["seed", "cannot read the value"]),
    ("8 more than 64 bits of seed", options("--seed", str(2**64)), ["seed", "at most"]),
    ("8 more threads than there can be", options("threads=100000"), ["threads is 100000", "at most 1024"]),
    (
        "9 more than float32 holds",
        options("reward.accuracy_weight=1e308"),
        ["reward.accuracy_weight", "at most 3.4e+38"],
    ),
    ("12 nested without end", options("key=" + "[" * 9_000), ["key", "cannot read the value"]),
    ("12 nested without end in a file", config("key: " + "[" * 9_000), ["conf.yaml", "not YAML"]),
    ("12 an option that is no number", options("--steps", "many"), ["--steps", "'many'", "appo train --help"]),
    ("12 an unknown option", options("--stepz", "3"), ["--stepz", "appo train --help"]),
    ("13 a preset from elsewhere", options("preset=../configs/lab"), ["unknown preset", "presets are lab"]),
    ("13 a preset that is a list", options("preset=[lab]"), ["unknown preset", "presets are lab"]),
    ("17 a device without numbers", options("device=meta"), ["device 'meta' cannot be used"]),
    ("33 a model that is a file", options("--target", "setup.cfg"), ["target", "'setup.cfg' is a file"]),
    (
        "34 code, asked for in a file",
        config("trust_remote_code: true"),
        ["conf.yaml", "may only be set on the command line"],
    ),
    ("36 a chat without a template", options("target_chat=true"), ["target_chat is true", "no chat template"]),
    ("39 a config that is a list", model(lambda f: write(f / "config.json", "[]")), ["target", "cannot load"]),
    ("39 no attention heads", model(changed(num_attention_heads=0)), ["target", "cannot load", "ZeroDivisionError"]),
    ("39 heads that cannot be shared", model(changed(num_key_value_heads=3)), ["target"]),
    ("39 weights that are no numbers", model(spoiled), ["target", "does not run", "not numbers"]),
]


@pytest.mark.parametrize(("build", "fragments"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_fault_is_one_clear_line_and_leaves_nothing(
    build: Callable[[Path], list[str]], fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = build(tmp_path)
    run = [] if arguments == ["--resume"] else ["--run", str(tmp_path / "run")]
    assert main([*arguments, *run]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert all(fragment in captured.err for fragment in fragments), captured.err
    assert captured.out == "" or captured.out.startswith("task ")  # nothing, or the header of the run
    assert not (tmp_path / "run").exists()


ELSEWHERE = {
    10: "test_trainer.py::test_micro_batches_add_up_to_the_step_of_the_minibatch",  # which need not divide the batch
    11: "test_functional_masks.py::test_a_single_value_whitens_to_zero",
    15: "test_train.py::test_a_second_run_over_the_first_is_refused",
    16: "test_resume.py::test_a_folder_in_use_is_refused",
    26: "test_splits.py::test_rows_that_differ_in_case_and_spaces_only_count_once",
    27: "test_splits.py::test_a_text_with_two_labels_is_drawn_at_most_once",
    29: "test_target.py::test_a_special_token_written_as_text_is_read_as_text",
    30: "test_hub.py::test_a_hub_that_fails_is_one_clear_line",
    32: "test_own_task.py::test_resuming_an_edited_task_is_refused_by_what_changed",
    34: "test_models.py::test_a_models_own_code_runs_only_if_trusted",
    35: "test_policy.py::test_a_pad_token_that_is_the_end_of_sequence_token_changes_nothing",
    36: "test_policy.py::test_plain_query_is_request_newline_opening",
    37: "test_target.py::test_words_that_share_tokens_are_told_apart",
    38: "test_models.py::test_each_role_has_its_own_model",
    41: "test_policy.py::test_generation_config_does_not_leak_in",
    42: "test_policy.py::test_policy_stays_in_eval_mode",
    43: "test_models.py::test_a_target_is_frozen_and_an_agent_is_not",
    44: "test_guards.py::test_degenerate_rollouts_are_counted_and_training_goes_on",
    45: "test_guards.py::test_degenerate_rollouts_are_counted_and_training_goes_on",
    46: "test_guards.py::test_a_reward_that_is_not_finite_changes_nothing_and_is_counted",
    48: "test_guards.py::test_bad_iterations_in_a_row_lead_back_to_the_anchor_and_then_to_the_end",
    49: "test_guards.py::test_an_exploded_ratio_changes_nothing",
    50: "test_anchor.py::test_kl_coefficient_adapts",
    51: "test_functional_kl.py::test_kl_estimates_by_hand",
    52: "test_guards.py::test_equal_rewards_give_finite_numbers_and_hardly_move_the_policy",
    53: "test_guards.py::test_degenerate_rollouts_are_counted_and_training_goes_on",
    54: "test_target.py::test_out_of_memory_halves_the_passes",
    55: "test_anchor.py::test_rollback_restores_weights_and_optimizer_exactly",
    56: "test_resume.py::test_a_second_signal_stops_at_once",
    57: "test_resume.py::test_a_signal_ends_the_iteration_and_resuming_gives_the_same_run",
    58: "test_resume.py::test_a_killed_run_goes_on_bit_for_bit",
    59: "test_checkpoint.py::test_a_full_disk_leaves_the_checkpoint_before_as_it_was",
    60: "test_folder.py::test_a_full_disk_leaves_no_half_line",
    61: "test_checkpoint.py::test_a_damaged_checkpoint_is_passed_over_for_the_one_before",
    62: "test_checkpoint.py::test_a_state_with_code_in_it_is_not_run",
    63: "test_fuzz.py::test_prompts_of_any_characters_are_one_line_that_no_terminal_obeys",
    64: "test_report.py::test_a_models_words_are_escaped_wherever_they_stand",
}
OUT_OF_REACH = {
    31: "datasets runs no code of data sets any more since its version 4",
    40: "agents are saved and loaded whole; there are no adapters",
    47: "rewards come from the target model; there are no scorers of the user's own",
}


def test_every_fault_is_tested_or_cannot_come_up() -> None:
    here = {int(name.split()[0]) for name, *_ in FAULTS}
    assert here | set(ELSEWHERE) | set(OUT_OF_REACH) == set(range(1, 65))
    assert not (here | set(ELSEWHERE)) & set(OUT_OF_REACH)


@pytest.mark.parametrize("place", sorted(set(ELSEWHERE.values())))
def test_tests_that_are_named_as_elsewhere_exist(place: str) -> None:
    file, name = place.split("::")
    assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")
