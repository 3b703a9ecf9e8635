"""The catalogue of tasks: specs read from YAML and checked against one schema.

A file of `tasks/specs` describes a task or, with `members`, a family, whose other keys apply to every member;
{member} stands for the last part of the member's name, {subject} for that part with spaces for underscores.
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
METRICS = ("exact_match", "exact_string", "exact_set", "contains", "f1")  # for answers that are text
ANSWERS = ("verbalizer", "choices", "answers")


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, but a repeated key is an error: YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<`: the keys of another mapping, which those here override
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # the safe loader raises an error for it
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given in line {lines[key]} and again in line {line}", None
                )
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            try:  # JSON, which is valid YAML, writes some characters as surrogate pairs
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                problem = "half a character, which is not text"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: the text is not YAML, holds anything but plain values, repeats a key, or is too large or deep.
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
def _catalogue() -> dict[str, tuple[Path, bool]]:
    """Task name -> the file that describes it, and whether that file describes a family."""
    found: dict[str, tuple[Path, bool]] = {}
    for path in sorted(SPEC_DIR.glob("*.yaml")):
        data = _read(path)
        found |= dict.fromkeys(data.get("members", [data.get("name")]), (path, "members" in data))
    return found


def family_of(name: str) -> str:
    """The name of the family that a task of the catalogue belongs to; "" if it has a spec of its own."""
    path, member = _catalogue()[name]
    return path.stem if member else ""


def is_spec_file(name: str) -> bool:
    """Whether the name of a task is the path of a spec file."""
    return name.lower().endswith((".yaml", ".yml"))


def load_spec(name: str) -> TaskSpec:
    """The spec of a task of the catalogue by its name, or of a user's own YAML file by its path.

    Raises:
        TaskError: there is no such task (the message suggests the nearest name), or the spec is malformed.
    """
    if is_spec_file(name):
        path = Path(name)
        data = _read(path)
        if "members" in data:
            raise TaskError(f"{path}: a family of tasks; expected the spec of a single task")
        return _check_spec(path, data)
    if name not in _catalogue():
        known = task_names()
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        names = [task for task in known if "/" not in task]  # the members of mmlu/ are too many to list
        raise TaskError(f"unknown task {shown(name)}; {hint}tasks are {', '.join(names)} and those of mmlu/")
    path, _ = _catalogue()[name]
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
    """The spec of one member of a family: the family's keys, overridden by the member's own."""
    members = data["members"]
    own = members[name] if isinstance(members, dict) else {}
    member = name.rsplit("/", 1)[-1]
    merged = {key: value for key, value in data.items() if key != "members"} | {"name": name} | (own or {})
    kinds = [key for key in ANSWERS if key in (own or {})]
    if kinds:  # a member's own kind of answer replaces the family's
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

KINDS = {  # declared type of a key of TaskSpec -> what messages call its value
    "str": "text",
    "bool": "true or false",
    "int | None": "a whole number",
    "list[str]": "a list of texts",
    "dict[str, str]": "a mapping of names to texts",
    "dict[str, list[str]]": "a mapping of names to lists of texts",
}
REQUIRED = ("name", "description", "fields", "input", "manual_prompt")
INNER_KEYS = {"files": (*SPLITS, "manual"), "hub": ("path", "name", "revision", *SPLITS)}


def _check_spec(path: Path, data: dict[str, Any]) -> TaskSpec:
    try:
        _check_keys(data)
        spec = TaskSpec(**data | {"manual_prompt": data["manual_prompt"].strip()})  # a block of YAML ends in a newline
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
    """Tells the user where quotes are missing: YAML reads a bare no as false, and 0 as a number."""
    for label, word in verbalizer.items() if isinstance(verbalizer, dict) else ():
        for role, value in (("label", label), ("word", word)):
            if not isinstance(value, str):
                entry = f"{shown(label)}: {shown(word)}"
                raise TaskError(f"verbalizer {entry}: the {role} is not text; write the {role} in quotes")
        if not word or word != word.strip():
            raise TaskError(f"verbalizer {label!r}: {word!r}: expected a word without white space around it")


def _is_a(kind: str, value: object) -> bool:
    """Whether a value has the type `kind`, as a key of TaskSpec declares it."""
    if kind.startswith("dict"):
        inner = kind.removeprefix("dict[str, ").removesuffix("]")
        return isinstance(value, dict) and all(isinstance(k, str) and _is_a(inner, v) for k, v in value.items())
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "int | None":
        return value is None or type(value) is int
    return isinstance(value, bool if kind == "bool" else str)


def _check_name(name: str) -> None:
    parts = name.split("/")  # the task's data folder has the same name
    if not name.isprintable() or any(part.strip(". ") == "" for part in parts):
        raise TaskError(f"the name {name!r} cannot be the name of a folder")


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
