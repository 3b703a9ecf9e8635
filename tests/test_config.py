"""The configuration: the paper's values by default, strict keys and types, and which source wins."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.config import CONFIG_DIR, ConfigError, RunConfig, build_config, idle_keys, read_config, to_dict
from experiments.config.explained import explained, meanings

ROOT = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))
OTHER = {"agent": "some/model"}  # not the lab's, hence no preset


def value(config: RunConfig, key: str) -> Any:
    """A field by its dotted name."""
    return reduce(getattr, key.split("."), config)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of nested ones."""
    out: dict[str, Any] = {}
    for key, item in tree.items():
        out |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return out


def refusal(*assignments: str, file: str | None = None, options: dict[str, Any] | None = None) -> str:
    """The message about a configuration that is refused."""
    with pytest.raises(ConfigError) as caught:
        build_config(options, file, assignments)
    return str(caught.value)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# -- defaults and presets ----------------------------------------------------------------------------------------

# The paper's Table 6, Table 7, Figure 6, sections 4.1 and A.5; where it is silent, TRL 0.11's defaults, with which
# the published code ran.
PAPER = {
    "prompts": 4,  # K
    "pool": 5,
    "shortlist": 0,
    "epochs": 100,
    "steps": None,
    "examples.shots": 16,
    "examples.pairs": 5,
    "examples.batch_size": 16,  # published code
    "sampling.max_new_tokens": 150,
    "sampling.temperature": 1.0,
    "reward.accuracy_weight": 10.0,
    "reward.margin_weight": 0.1,
    "reward.metric_weight": 1.0,
    "reward.likelihood_weight": 0.0,
    "reward.answer_tokens": 50,
    "appo.learning_rate": 1e-5,
    "appo.value_learning_rate": None,  # the paper has one learning rate
    "appo.clip_range": 0.2,
    "appo.value_clip_range": 0.2,  # TRL
    "appo.value_coef": 0.1,
    "appo.entropy_coef": 0.0,
    "appo.cut_off_penalty": 0.0,
    "appo.gamma": 1.0,
    "appo.lam": 0.95,
    "appo.ppo_epochs": 4,  # TRL
    "appo.max_ratio": 10.0,  # TRL
    "appo.target_kl": None,
    "appo.max_bad_steps": 3,
    "checkpoint_every": 10,
    "appo.whiten_advantages": True,  # TRL
    "appo.leave_one_out": False,
    "sampling.nonempty": False,
    "sampling.one_line": False,
    "sampling.whole_sentences": False,
    "anchor.collapse": False,
    "appo.reference": "anchor",
    "appo.kl_coef": 0.2,  # TRL
    "appo.kl_in_loss": False,
    "appo.kl_target": None,
    "appo.kl_horizon": 10_000,  # TRL
    "anchor.period": 5,
    "anchor.promote_threshold": 0.05,
    "anchor.rollback_threshold": 0.1,
    "anchor.significance": None,
    "anchor.promote": True,
    "anchor.rollback": True,
    "target_chat": False,  # the paper's template is plain text
    "trust_remote_code": False,
    "arm": "appo",
    "show_best": 0,
    "race": False,
    "paper_protocol": True,
    "appo.scale_scores": False,
    "seed": 0,
}


@pytest.mark.parametrize(("key", "expected"), PAPER.items())
def test_the_preset_paper_has_the_papers_values(key: str, expected: Any) -> None:
    assert value(build_config(OTHER, None, ["preset=paper"]), key) == expected


def test_without_an_agent_everything_is_the_labs() -> None:
    config = build_config()
    assert (config.agent, config.target, config.data) == ("lab", "lab", "lab")


@pytest.mark.parametrize("options", [{}, {"agent": "lab"}])
def test_the_labs_agent_takes_the_labs_preset(options: dict[str, str]) -> None:
    expected = flat(yaml.safe_load((CONFIG_DIR / "lab.yaml").read_text(encoding="utf-8")))
    del expected["preset"]  # what it builds on
    config = build_config(options)
    assert {key: value(config, key) for key in expected} == expected


def test_the_labs_preset_differs_from_the_defaults() -> None:
    assert build_config() != RunConfig()


@pytest.mark.parametrize("way", ["option", "file", "assignment"])
def test_an_agent_of_ones_own_drops_the_labs_preset_however_it_is_named(way: str, tmp_path: Path) -> None:
    ways: dict[str, Any] = {
        "option": lambda: build_config(OTHER),
        "file": lambda: build_config(None, write(tmp_path, "agent: some/model\n")),
        "assignment": lambda: build_config(None, None, ["agent=some/model"]),
    }
    assert ways[way]() == RunConfig(agent="some/model")


def test_the_labs_agent_named_last_brings_the_labs_preset_back(tmp_path: Path) -> None:
    config = build_config({"agent": "lab"}, write(tmp_path, "agent: some/model\n"))
    assert config == build_config()


# Where the published code differs from the paper: paper.md, section 2.
PUBLISHED = {
    "sampling.max_new_tokens": 100,
    "reward.accuracy_weight": 30.0,
    "reward.margin_weight": 0.01,
    "appo.kl_coef": 0.2,
    "appo.kl_target": 6.0,
    "appo.kl_horizon": 10_000,
    "appo.learning_rate": 1e-5,
    "anchor.prompts": 2,
    "anchor.promote_threshold": 0.05,
    "anchor.rollback_threshold": 0.05,
}


@pytest.mark.parametrize(("key", "expected"), PUBLISHED.items())
def test_the_published_preset_has_the_published_codes_values(key: str, expected: float) -> None:
    assert value(build_config(OTHER, None, ["preset=published"]), key) == expected


def test_a_named_preset_replaces_the_labs() -> None:
    published = build_config(OTHER | {"agent": "lab"}, None, ["preset=published"])
    assert to_dict(published) | {"agent": "some/model"} == to_dict(build_config(OTHER, None, ["preset=published"]))


def test_a_preset_may_be_named_in_a_file(tmp_path: Path) -> None:
    config = build_config(OTHER, write(tmp_path, "preset: published\n"))
    assert config == build_config(OTHER, None, ["preset=published"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_file_in_configs_loads_as_a_preset(name: str) -> None:
    tree = flat(yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8")))
    tree.pop("preset", None)  # what it builds on
    config = build_config(OTHER, None, [f"preset={name}"])
    assert {key: value(config, key) for key in tree} == tree


@pytest.mark.parametrize("name", PRESETS)
def test_every_file_in_configs_loads_as_a_file(name: str) -> None:
    path = str(CONFIG_DIR / f"{name}.yaml")
    assert build_config(OTHER, path) == build_config(OTHER, None, [f"preset={name}"])


def test_a_preset_may_build_on_another() -> None:
    paper, published = (build_config(OTHER, None, [f"preset={name}"]) for name in ("paper", "published"))
    assert published.appo.ppo_epochs == paper.appo.ppo_epochs != build_config(OTHER).appo.ppo_epochs


def test_an_unknown_preset_names_the_nearest_and_all() -> None:
    expected = f"unknown preset 'publshed'; did you mean 'published'? presets are {', '.join(PRESETS)}"
    assert refusal("preset=publshed") == expected


# -- which source wins -------------------------------------------------------------------------------------------

# Sources from weakest to strongest, each with its own seed; `steps: 100` and the like are the preset's own.
SOURCES = ["default", "preset", "file", "option", "assignment"]


@pytest.mark.parametrize("strongest", SOURCES)
def test_a_stronger_source_overrides_all_weaker_ones(
    strongest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SOURCES[: SOURCES.index(strongest) + 1]
    (tmp_path / "mine.yaml").write_text("seed: 1\n", encoding="utf-8")
    monkeypatch.setattr("experiments.config.CONFIG_DIR", tmp_path)
    (tmp_path / "file.yaml").write_text("seed: 2\n", encoding="utf-8")
    config = build_config(
        OTHER | ({"seed": 3} if "option" in given else {}),
        str(tmp_path / "file.yaml") if "file" in given else None,
        [*(["preset=mine"] if "preset" in given else []), *(["seed=4"] if "assignment" in given else [])],
    )
    assert config.seed == SOURCES.index(strongest)  # the default is 0


def test_sources_are_merged_key_by_key(tmp_path: Path) -> None:
    file = write(tmp_path, "appo: {gamma: 0.5, lam: 0.5}\n")
    appo = build_config(OTHER, file, ["appo.lam=0.25", "appo.kl_coef=0"]).appo
    assert (appo.gamma, appo.lam, appo.kl_coef, appo.clip_range) == (0.5, 0.25, 0.0, 0.2)


def test_the_last_of_two_assignments_counts() -> None:
    assert build_config(OTHER, None, ["seed=1", "seed=2"]).seed == 2


def test_options_that_are_none_are_not_given(tmp_path: Path) -> None:
    assert build_config(OTHER | {"seed": None}, write(tmp_path, "seed: 7\n")).seed == 7


# -- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("sead", "seed"),
        ("appo.kl_coeff", "appo.kl_coef"),
        ("appo.learnin_rate", "appo.learning_rate"),
        ("kl_coef", "appo.kl_coef"),  # in no section
        ("shots", "examples.shots"),
        ("sampling.kl_coef", "appo.kl_coef"),  # in the wrong section
        ("appo.rollback_threshold", "anchor.rollback_threshold"),
        ("anchor.shots", "examples.shots"),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(wrong: str, near: str) -> None:
    assert refusal(f"{wrong}=1") == f"unknown key {wrong!r}; did you mean {near!r}?"


def test_an_unknown_key_like_no_other_gets_the_list() -> None:
    assert refusal("zzzzzzzz=1").startswith("unknown key 'zzzzzzzz'; keys are task, agent, target, data, ")


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "appo: {gama: 1}\n")
    assert refusal(file=path) == f"{path}: unknown key 'appo.gama'; did you mean 'appo.gamma'?"


def test_an_unknown_key_in_a_preset_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.config.CONFIG_DIR", tmp_path)
    path = write(tmp_path, "sead: 1\n")
    assert refusal("preset=mine").startswith(f"{path}: unknown key 'sead'")


def test_a_key_in_a_file_may_be_dotted_and_the_later_form_counts(tmp_path: Path) -> None:
    file = write(tmp_path, "appo.lam: 0.5\nappo: {lam: 0.75, gamma: 0.5}\nappo.gamma: 0.25\n")
    appo = build_config(OTHER, file, ["appo.kl_coef=0"]).appo
    assert (appo.lam, appo.gamma, appo.kl_coef) == (0.75, 0.25, 0.0)
    path = write(tmp_path, "appo.gama: 1\n")
    assert refusal(file=path) == f"{path}: unknown key 'appo.gama'; did you mean 'appo.gamma'?"


@pytest.mark.parametrize("key", [1, True, None, 0.5])
def test_a_key_that_is_no_text_is_refused(key: Any, tmp_path: Path) -> None:
    assert f"unknown key '{key}'" in refusal(file=write(tmp_path, yaml.safe_dump({key: 1})))


@pytest.mark.parametrize("assignment", ["seed", "seed=", "=3", "=", ""])
def test_an_assignment_needs_key_and_value(assignment: str) -> None:
    assert refusal(assignment) == f"{assignment!r}: expected key=value"


def test_a_value_may_hold_an_equals_sign() -> None:
    assert build_config(OTHER, None, ["run=runs/a=b"]).run == "runs/a=b"


def test_a_value_that_yaml_cannot_read_is_named() -> None:
    assert refusal("seed=[1") == "seed: cannot read the value '[1'"


def test_a_value_in_place_of_a_section_names_one_of_its_keys() -> None:
    assert refusal("appo=3") == "appo is 3; expected keys such as appo.learning_rate"


@pytest.mark.parametrize("words", [["appo.lam=0.25", "appo={gamma: 0.5}"], ["appo={gamma: 0.5}", "appo.lam=0.25"]])
def test_a_section_and_a_key_of_it_add_up_in_any_order(words: list[str]) -> None:
    config = build_config(OTHER, None, words)
    assert (config.appo.lam, config.appo.gamma) == (0.25, 0.5)


def test_a_key_below_a_value_is_refused() -> None:
    assert refusal("seed=3", "seed.low=4") == "seed.low: 'seed' already has a value"


# -- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "'1e-5'"])
def test_floats_may_be_written_in_forms_that_yaml_does_not_read(text: str) -> None:
    # YAML 1.1 reads 1e-5 as text: a float needs a point there.
    assert build_config(OTHER, None, [f"appo.learning_rate={text}"]).appo.learning_rate == 0.00001


def test_floats_in_a_file_may_be_written_in_forms_that_yaml_does_not_read(tmp_path: Path) -> None:
    config = build_config(OTHER, write(tmp_path, "appo: {learning_rate: 1e-5}\n"))
    assert config.appo.learning_rate == 0.00001


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    kl_coef = build_config(OTHER, None, ["appo.kl_coef=1"]).appo.kl_coef
    assert (kl_coef, type(kl_coef)) == (1.0, float)


@pytest.mark.parametrize("text", ["nan", ".nan", "inf", ".inf", "-.inf", "-inf", "NaN", "1" + "0" * 400])
@pytest.mark.parametrize("key", ["appo.kl_coef", "appo.max_grad_norm", "reward.accuracy_weight"])
def test_numbers_are_finite(key: str, text: str) -> None:
    # Ten to the power of 400 is beyond what a float holds.
    assert refusal(f"{key}={text}").startswith(f"{key} is ")


# (key, value, what it should be)
WRONG_TYPES = [
    ("appo.learning_rate", "fast", "a number or null"),
    ("appo.learning_rate", "true", "a number or null"),
    ("appo.clip_range", "null", "a number"),
    ("appo.learning_rate", "[1]", "a number or null"),
    ("appo.value_clip_range", "high", "a number or null"),
    ("prompts", "4.0", "a whole number"),
    ("prompts", "four", "a whole number"),
    ("prompts", "true", "a whole number"),
    ("steps", "1.5", "a whole number or null"),
    ("edit_manual", "1", "true or false"),
    ("edit_manual", "maybe", "true or false"),
    ("agent_chat", "maybe", "true or false or null"),
    ("task", "[mnli]", "text"),
    ("task", "null", "text"),
    ("run", "{a: b}", "text or null"),
    ("appo.reference", "anchors", "one of anchor, initial, previous, none"),
    ("dtype", "float16", "one of auto, float32, bfloat16"),
]


@pytest.mark.parametrize(("key", "text", "expected"), WRONG_TYPES)
def test_a_value_of_the_wrong_type_names_key_value_and_what_is_expected(key: str, text: str, expected: str) -> None:
    assert refusal(f"{key}={text}") == f"{key} is {yaml.safe_load(text)!r}; expected {expected}"


def test_a_word_that_yaml_takes_for_a_truth_value_is_no_text() -> None:
    with pytest.raises(ConfigError, match=r"^wandb is False; expected text or null$"):
        build_config(assignments=["wandb=off"])
    assert build_config(assignments=["wandb='off'"]).wandb == "off"


@pytest.mark.parametrize(
    "name", ["007", "1.10", "1:30", "0x1F", "1_000", "2026-01-02 10:00", "2026-01-02", "12", "1e3"]
)
def test_a_name_on_the_command_line_that_yaml_takes_for_a_number_stays_as_it_is(name: str) -> None:
    assert build_config(assignments=[f"wandb={name}"]).wandb == name


def test_a_number_is_read_however_it_is_written_unless_yaml_would_take_it_for_another() -> None:
    config = build_config(assignments=["appo.learning_rate=1.0e-5", "appo.gamma=.50", "seed= 12"])
    assert (config.appo.learning_rate, config.appo.gamma, config.seed) == (1e-5, 0.5, 12)
    with pytest.raises(ConfigError, match=r"^seed is '010'; expected a whole number$"):  # 8 to YAML
        build_config(assignments=["seed=010"])


def test_a_value_of_the_wrong_type_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "appo: {gamma: much}\n")
    assert refusal(file=path) == f"{path}: appo.gamma is 'much'; expected a number"


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("steps", "null", None),
        ("appo.kl_target", "null", None),
        ("appo.kl_target", "6", 6.0),
        ("appo.reference", "none", "none"),
        ("edit_manual", "yes", True),  # YAML's spelling of it
        ("agent_chat", "false", False),
        ("run", "7", "7"),
        ("device", "cuda:1", "cuda:1"),
    ],
)
def test_a_value_of_the_right_type_arrives(key: str, text: str, expected: Any) -> None:
    assert value(build_config(OTHER, None, [f"{key}={text}"]), key) == expected


# (key, a value just outside its range, one just inside)
BOUNDS = [
    ("seed", -1, 0),
    ("epochs", 0, 1),
    ("steps", 0, 1),
    ("prompts", 0, 1),
    ("pool", 0, 1),
    ("shortlist", -1, 0),
    ("threads", 0, 1),
    ("few_shot", -1, 0),
    ("headroom", -1, 0),
    ("show_best", -1, 0),
    ("checkpoint_every", 0, 1),
    ("appo.max_ratio", 1.0, 1.000001),
    ("appo.target_kl", 0, 1e-9),
    ("appo.max_bad_steps", 0, 1),
    ("examples.shots", 0, 1),
    ("examples.pairs", 0, 1),
    ("examples.batch_size", 0, 1),
    ("examples.review_rows", 0, 1),
    ("examples.test_limit", 0, 1),
    ("reward.accuracy_weight", -1e-9, 0.0),
    ("reward.margin_weight", -1e-9, 0.0),
    ("reward.metric_weight", -1e-9, 0.0),
    ("reward.likelihood_weight", -1e-9, 0.0),
    ("reward.answer_tokens", 0, 1),
    ("sampling.max_new_tokens", 0, 1),
    ("sampling.temperature", 0, 1e-9),
    ("appo.learning_rate", 0, 1e-9),
    ("appo.value_learning_rate", 0, 1e-9),
    ("appo.clip_range", 0, 1e-9),
    ("appo.value_clip_range", 0, 1e-9),
    ("appo.value_coef", -1e-9, 0.0),
    ("appo.entropy_coef", -1e-9, 0.0),
    ("lora.rank", 0, 1),
    ("lora.alpha", 0, 1e-9),
    ("lora.dropout", 1e-9, 0.0),
    ("appo.cut_off_penalty", -1e-9, 0.0),
    ("appo.gamma", -1e-9, 0.0),
    ("appo.gamma", 1.000001, 1.0),
    ("appo.lam", -1e-9, 0.0),
    ("appo.lam", 1.000001, 1.0),
    ("appo.ppo_epochs", 0, 1),
    ("appo.minibatch_size", -1, 0),
    ("appo.micro_batch_size", -1, 0),
    ("appo.max_grad_norm", 0, 1e-9),
    ("appo.kl_coef", -1e-9, 0.0),
    ("appo.kl_target", 0, 1e-9),
    ("appo.kl_horizon", 0, 1),
    ("anchor.period", 0, 1),
    ("anchor.prompts", 0, 1),
    ("anchor.max_kl", 0.0, 1e-9),
    ("anchor.promote_threshold", -1e-9, 0.0),
    ("anchor.rollback_threshold", -1e-9, 0.0),
    ("anchor.significance", 0.0039, 0.004),  # eight prompts: 1 / 256
    ("anchor.significance", 1, 0.999),
]


@pytest.mark.parametrize(("key", "outside", "_inside"), BOUNDS)
def test_a_value_out_of_range_names_key_and_range(key: str, outside: float, _inside: float) -> None:
    assert re.match(rf"{re.escape(key)} is .*; expected (at least|above|between|0:) ", refusal(f"{key}={outside}"))


@pytest.mark.parametrize(("key", "_outside", "inside"), BOUNDS)
def test_a_value_at_the_edge_of_its_range_is_taken(key: str, _outside: float, inside: float) -> None:
    assert value(build_config(OTHER, None, [f"{key}={inside}"]), key) == inside


def numeric_fields(section: type, prefix: str = "") -> set[str]:
    """The dotted names of all fields that take an int or a float."""
    found: set[str] = set()
    for name, kind in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(kind):
            found |= numeric_fields(typing.cast(type, kind), f"{prefix}{name}.")
        elif {int, float} & {kind, *typing.get_args(kind)}:
            found.add(prefix + name)
    return found


@pytest.mark.parametrize("text", ["prompts: 0", "appo: {gamma: 2}", "appo.gamma: 2", "preset: nix"])
def test_a_wrong_value_names_the_file_that_it_came_from(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert refusal(file=path).startswith(f"{path}: ")


def test_a_wrong_value_that_wins_over_a_file_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    assert refusal("prompts=-1", file=write(tmp_path, "prompts: 0")) == "prompts is -1; expected at least 1"


def test_every_numeric_field_has_a_bound_in_the_table() -> None:
    assert numeric_fields(RunConfig) - {key for key, *_ in BOUNDS} == set()


# -- files -------------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named_in_full(tmp_path: Path) -> None:
    path = str(tmp_path / "none.yaml")
    assert refusal(file=path).startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize(("text", "kind"), [("- seed\n", "list"), ("seed\n", "str"), ("", "NoneType")])
def test_a_file_that_is_no_mapping_is_refused(text: str, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert refusal(file=path) == f"{path}: expected keys and values, found {kind}"


BROKEN = ["seed: [1\n", "appo:\n\tgamma: 1\n", "seed: !!python/object/apply:os.abort []\n"]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_yaml_is_one_line_that_says_where(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    # One line: `.` matches no line break, and re.fullmatch takes all of the text.
    assert re.fullmatch(rf"{re.escape(path)}: not YAML: .*line \d, column \d+.*", refusal(file=path))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"run: caf\xe9\n")
    assert refusal(file=str(path)).startswith(f"{path}: cannot be read: ")


# -- round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assignments", [[], ["preset=published"], ["steps=3", "agent_chat=true", "run=ä b"]])
def test_a_configuration_survives_being_written_and_read(assignments: list[str], tmp_path: Path) -> None:
    config = build_config(None, None, assignments)
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    assert build_config(None, write(tmp_path, text)) == config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        RunConfig().seed = 1  # type: ignore[misc]


def test_keys_that_messages_advise_exist() -> None:
    sections = {key.split(".")[0] for key in flat(to_dict(RunConfig())) if "." in key} | {"data"}
    pattern = re.compile(rf"\b({'|'.join(sections)})\.[a-z_]+\b(?!\.)")
    texts = [
        node.value
        for package in ("appo", "rewards", "tasks", "experiments")
        for path in (ROOT / package).rglob("*.py")
        for raised in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(raised, ast.Raise)
        for node in ast.walk(raised)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    advised = {match[0] for text in texts for match in pattern.finditer(text)}
    assert advised and advised <= set(flat(to_dict(RunConfig())))


# -- for a person to read ----------------------------------------------------------------------------------------


def test_every_key_has_a_meaning_of_one_line() -> None:
    meaning = meanings(RunConfig)
    assert list(meaning) == list(flat(to_dict(RunConfig())))
    assert all(text and "\n" not in text for text in meaning.values())
    assert meaning["appo.clip_range"] == "of the probability ratio [P]"


def test_values_are_shown_as_the_command_line_takes_them() -> None:
    config = build_config(OTHER, None, ["appo.max_ratio=null", "arm=frozen", "run=runs/a b"])
    shown = [line.partition("  # ")[0].rstrip() for line in explained(config, {}) if "  # " in line]
    assert build_config(None, None, [*shown, "agent=some/model"]) == config


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], None),
        (["few_shot=2", "race=true", "mode=fixed"], None),
        (["few_shot=2", "race=true", "mode=tte"], "few_shot, race: no effect in mode tte"),
        (["edit_manual=true"], "edit_manual: no effect in mode fixed"),
        (["epochs=5"], "epochs has no effect, since steps is 100; steps=null counts by epochs"),
        (["epochs=5", "steps=null"], None),
        (["epochs=5", "arm=manual"], None),
        (["edit_manual=true", "mode=tte"], None),
    ],
)
def test_keys_that_do_nothing_are_warned_of(words: list[str], told: str | None) -> None:
    assert idle_keys(build_config(assignments=words)) == told


@pytest.mark.parametrize("said", [None, True])
def test_a_run_that_began_before_there_were_these_keys_goes_on_without_them(tmp_path: Path, said: bool | None) -> None:
    tree = to_dict(build_config(OTHER))
    if said is None:
        del tree["appo"]["warm_up"], tree["shortlist"], tree["examples"]["review_rows"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert read_config(path).appo.warm_up == bool(said)
    assert (read_config(path).shortlist == 0) == (read_config(path).examples.review_rows is None) == (said is None)
