"""The catalogue of tasks: specs read from YAML and checked against one schema.

A file of `tasks/specs` holds a task or, with `members`, a family: everything outside `members` holds for each
member; {member} stands for the last part of its name and {subject} for the same in words.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tasks.errors import TaskError, shown
from tasks.spec import SPLITS, TaskSpec

SPEC_DIR = Path(__file__).parent / "specs"
METRICS = ("exact_match", "exact_string", "exact_set", "contains", "f1")  # of text
ANSWERS = ("verbalizer", "choices", "answers")


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, but a repeated key is an error: YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # the safe loader has an error for it
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands in line {lines[key]} and again in line {line}", None
                )
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            try:  # JSON, which is YAML as well, writes some characters as two halves
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                problem = "half a character, which is no text"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, holds anything but plain values, repeats a key, or is too large or deep.
    """
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except RecursionError as error:
        raise yaml.YAMLError("values are nested too deeply") from error
    except (ValueError, LookupError, AttributeError, OverflowError) as error:  # a 30th of February, !!bool maybe, ...
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
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


def is_spec_file(name: str) -> bool:
    """Whether a task is named by the path of its spec."""
    return name.lower().endswith((".yaml", ".yml"))


def load_spec(name: str) -> TaskSpec:
    """The spec of a task by name, or from a YAML file of the same form by its path.

    Raises:
        TaskError: no such task (the nearest names are in the message), or a spec that is not well formed.
    """
    if is_spec_file(name):
        path = Path(name)
        data = _read(path)
        if "members" in data:
            raise TaskError(f"{path}: a family of tasks; name one of its members in a file of its own")
        return _check_spec(path, data)
    if name not in _catalogue():
        known = task_names()
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        names = [task for task in known if "/" not in task]  # families' members with a prefix are many
        raise TaskError(f"unknown task {shown(name)}; {hint}tasks are {', '.join(names)} and those of mmlu/")
    path = _catalogue()[name]
    data = _read(path)
    return _check_spec(path, _member(data, name) if "members" in data else data)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TaskError(f"no spec file {str(path.absolute())!r}") from None
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise TaskError(f"{path}: expected a mapping of keys to values, found {type(data).__name__}")
    return data


def _member(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The spec of one member of a family: the family's keys, then its own."""
    members = data["members"]
    own = members[name] if isinstance(members, dict) else {}
    member = name.rsplit("/", 1)[-1]
    merged = {key: value for key, value in data.items() if key != "members"} | {"name": name} | (own or {})
    kinds = [key for key in ANSWERS if key in (own or {})]
    if kinds:  # a member of another kind drops the family's way to answer
        merged = {key: value for key, value in merged.items() if key not in ANSWERS or key in kinds}
    filled: dict[str, Any] = _substitute(merged, {"{member}": member, "{subject}": member.replace("_", " ")})
    return filled


def _substitute(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return re.sub("|".join(map(re.escape, names)), lambda match: names[match[0]], value)
    if isinstance(value, dict):
        return {key: _substitute(item, names) for key, item in value.items()}
    return [_substitute(item, names) for item in value] if isinstance(value, list) else value


# -- what a spec must be -----------------------------------------------------------------------------------------

KINDS = {  # type of a key of TaskSpec -> what its value is called
    "str": "text",
    "bool": "true or false",
    "int | None": "a whole number",
    "list[str]": "a list of texts",
    "dict[str, str]": "names with a text each",
    "dict[str, list[str]]": "names with a list of texts each",
}
REQUIRED = ("name", "description", "fields", "input", "manual_prompt")
INNER_KEYS = {"files": (*SPLITS, "manual"), "hub": ("path", "name", "revision", *SPLITS)}


def _check_spec(path: Path, data: dict[str, Any]) -> TaskSpec:
    try:
        _check_keys(data)
        spec = TaskSpec(**data)
        _check_name(spec.name)
        _check_answers(spec, data)
        _check_templates(spec)
    except TaskError as error:
        raise TaskError(f"{path}: {error}") from None
    return spec


def _check_keys(data: dict[Any, Any]) -> None:
    known = {f.name: str(f.type) for f in fields(TaskSpec)}
    for key in data:
        _check_known(key, known, "key")
    missing = [key for key in REQUIRED if key not in data]
    if missing:
        raise TaskError(f"missing key {missing[0]!r}")
    _check_verbalizer(data.get("verbalizer", {}))
    for key, value in data.items():
        if not _is_a(known[key], value):
            raise TaskError(f"{key!r} is {shown(value)}; expected {KINDS[known[key]]}")
    for key, allowed in INNER_KEYS.items():
        for inner in data.get(key, {}):
            _check_known(inner, allowed, f"key of {key!r}:")


def _check_known(key: str, known: Collection[str], what: str) -> None:
    if key not in known:
        near = get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        raise TaskError(f"unknown {what} {shown(key)}; {hint}")


def _check_verbalizer(verbalizer: object) -> None:
    """A hint that quotes are missing: YAML reads a bare no as false, and 0 as a number."""
    for label, word in verbalizer.items() if isinstance(verbalizer, dict) else ():
        for role, value in (("label", label), ("word", word)):
            if not isinstance(value, str):
                entry = f"{shown(label)}: {shown(word)}"
                raise TaskError(f"verbalizer {entry}: the {role} is not text; write the {role} in quotes")
        if not word or word != word.strip():
            raise TaskError(f"verbalizer {label!r}: {word!r}: expected a word without white space around it")


def _is_a(kind: str, value: object) -> bool:
    """Whether a value is of the type that a key of TaskSpec is declared with."""
    if kind.startswith("dict"):
        inner = kind.removeprefix("dict[str, ").removesuffix("]")
        return isinstance(value, dict) and all(isinstance(k, str) and _is_a(inner, v) for k, v in value.items())
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "int | None":
        return value is None or type(value) is int
    return isinstance(value, bool if kind == "bool" else str)


def _check_name(name: str) -> None:
    parts = name.split("/")  # the name is that of the task's folder too
    if not name.isprintable() or any(part.strip(". ") == "" for part in parts):
        raise TaskError(f"the name {name!r} cannot be that of a folder")


def _check_answers(spec: TaskSpec, data: Mapping[str, Any]) -> None:
    given = [key for key in ANSWERS if data.get(key)]
    if len(given) != 1:
        raise TaskError(f"expected exactly one of {', '.join(ANSWERS)}; found {', '.join(given) or 'none'}")
    words = spec.words
    if words and (len(words) < 2 or len(set(words)) < len(words)):
        raise TaskError("the verbalizer needs two or more different words")
    if words and not spec.label:
        raise TaskError("missing key 'label'")
    if spec.kind == "text" and "metric" not in data:
        raise TaskError(f"missing key 'metric'; expected {' or '.join(METRICS)}")
    metrics = METRICS if spec.kind == "text" else ("accuracy",)
    if spec.metric not in metrics:
        raise TaskError(f"unknown metric {spec.metric!r}; expected {' or '.join(metrics)}")
    if spec.max_shots is not None and spec.max_shots < 1:
        raise TaskError(f"'max_shots' is {spec.max_shots}; expected 1 or more")


def _check_templates(spec: TaskSpec) -> None:
    if spec.kind == "choices" and "choices" in spec.fields:
        raise TaskError("a field is called 'choices', which stands for the lettered choices; give it another name")
    used = set(re.findall(r"\{(\w+)\}", spec.input))
    allowed = {*spec.fields, "choices"} if spec.kind == "choices" else set(spec.fields)
    if not used or not used <= allowed:
        raise TaskError(f"'input' uses {sorted(used)}; the fields are {sorted(allowed)}")
    if sorted(re.findall(r"\{(\w+)\}", spec.template)) != ["input", "prompt"]:
        raise TaskError("'template' needs {prompt} and {input}, once each")
