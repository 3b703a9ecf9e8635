"""The tasks there are: specs read from YAML, checked by one schema.

A file of `tasks/specs` holds a task or, with `members`, a family: everything outside `members` holds for each of
them, {member} standing for the last part of its name and {subject} for the same in words.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tasks.spec import TaskError, TaskSpec

SPEC_DIR = Path(__file__).parent / "specs"
METRICS = ("exact_match", "exact_string", "exact_set", "contains", "f1")  # of text
ANSWERS = ("verbalizer", "choices", "answers")


class _StrictLoader(yaml.SafeLoader):
    """Plain values only, as the safe loader, and no key twice: YAML would let the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # the safe loader has an error for it
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands in line {lines[key]} and again in line {line}", None
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is none, holds anything but plain values, or a key twice.
    """
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def task_names() -> list[str]:
    """All tasks that come with the project, sorted."""
    return sorted(_catalogue())


@cache
def _catalogue() -> dict[str, Path]:
    """Task name -> the file that describes it."""
    found: dict[str, Path] = {}
    for path in sorted(SPEC_DIR.glob("*.yaml")):
        data = _read(path)
        found |= dict.fromkeys(data.get("members", [data.get("name")]), path)
    return found


def load_spec(name: str) -> TaskSpec:
    """The spec of a task by name, or from a YAML file of the same form by its path.

    Raises:
        TaskError: no such task (the nearest names are in the message), or a spec that is not well formed.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _catalogue().get(name)
    if path is None or not path.is_file():
        known = task_names()
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        shown = [task for task in known if "/" not in task]  # families' members with a prefix are many
        raise TaskError(f"unknown task {name!r}; {hint}tasks are {', '.join(shown)} and those of mmlu/")
    data = _read(path)
    if "members" in data:
        data = _member(path, data, name)
    return _check_spec(path, data)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise TaskError(f"{path}: expected a mapping of keys to values, found {type(data).__name__}")
    return data


def _member(path: Path, data: dict[str, Any], name: str) -> dict[str, Any]:
    """The spec of one member of a family: the family's keys, then its own."""
    members = data["members"]
    if name not in members:
        raise TaskError(f"{path}: a family of tasks; name one of its members in a file of its own")
    own = members[name] if isinstance(members, dict) else {}
    member = name.rsplit("/", 1)[-1]
    merged = {key: value for key, value in data.items() if key != "members"} | {"name": name} | (own or {})
    kinds = [key for key in ANSWERS if key in (own or {})]
    if kinds:  # a member of another kind than the family has its own way to answer only
        merged = {key: value for key, value in merged.items() if key not in ANSWERS or key in kinds}
    filled: dict[str, Any] = _substitute(merged, {"{member}": member, "{subject}": member.replace("_", " ")})
    return filled


def _substitute(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return re.sub("|".join(map(re.escape, names)), lambda match: names[match[0]], value)
    if isinstance(value, dict):
        return {key: _substitute(item, names) for key, item in value.items()}
    return [_substitute(item, names) for item in value] if isinstance(value, list) else value


def _check_spec(path: Path, data: dict[str, Any]) -> TaskSpec:
    known = {f.name: f for f in fields(TaskSpec)}
    for key in data:
        if key not in known:
            near = get_close_matches(str(key), list(known), n=1)
            raise TaskError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    missing = [key for key in ("name", "description", "fields", "input", "manual_prompt") if key not in data]
    if missing:
        raise TaskError(f"{path}: missing key {missing[0]!r}")
    _check_types(path, data)
    given = [key for key in ANSWERS if data.get(key)]
    if len(given) != 1:
        raise TaskError(f"{path}: expected exactly one of {', '.join(ANSWERS)}; found {', '.join(given) or 'none'}")
    spec = TaskSpec(**data)
    _check_answers(path, spec)
    used = set(re.findall(r"\{(\w+)\}", spec.input))
    allowed = {*spec.fields, "choices"} if spec.kind == "choices" else set(spec.fields)
    if not used or not used <= allowed:
        raise TaskError(f"{path}: 'input' uses {sorted(used)}; the fields are {sorted(allowed)}")
    if sorted(re.findall(r"\{(\w+)\}", spec.template)) != ["input", "prompt"]:
        raise TaskError(f"{path}: 'template' needs {{prompt}} and {{input}}, once each")
    return spec


def _check_answers(path: Path, spec: TaskSpec) -> None:
    for label, word in spec.verbalizer.items():
        if not isinstance(label, str) or not isinstance(word, str):
            raise TaskError(f"{path}: verbalizer {label!r}: {word!r} is not text; write words such as yes in quotes")
    words = spec.words
    if words and (len(words) < 2 or len(set(words)) < len(words)):
        raise TaskError(f"{path}: the verbalizer needs two or more different words")
    if words and not spec.label:
        raise TaskError(f"{path}: missing key 'label'")
    metrics = METRICS if spec.kind == "text" else ("accuracy",)
    if spec.metric not in metrics:
        raise TaskError(f"{path}: unknown metric {spec.metric!r}; expected {' or '.join(metrics)}")
    if spec.max_shots is not None and spec.max_shots < 1:
        raise TaskError(f"{path}: 'max_shots' is {spec.max_shots}; expected 1 or more")


def _check_types(path: Path, data: dict[str, Any]) -> None:
    known = {f.name: str(f.type) for f in fields(TaskSpec)}
    kinds: dict[str, tuple[type[Any], ...]] = {
        "str": (str,), "dict": (dict,), "list": (list,), "bool": (bool,), "int | None": (int, type(None)),
    }  # fmt: skip
    for key, value in data.items():
        kind = known[key].split("[")[0]
        if not isinstance(value, kinds[kind]):
            raise TaskError(f"{path}: {key!r} is {value!r}; expected a {kind}")
        parts = value.values() if isinstance(value, dict) else [value] if isinstance(value, list) else []
        texts = [[*parts]] if key == "hub" else parts
        if key != "verbalizer" and not all(map(_is_list_of_text, texts)):
            raise TaskError(f"{path}: {key!r} is {value!r}; expected a {known[key]}")


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
