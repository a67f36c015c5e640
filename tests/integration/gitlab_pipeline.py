"""What a `.gitlab-ci.yml` says, as GitLab reads it: as much of its language as ours uses. Pure.

`extends` merges mappings and replaces lists; `default` fills in what a job leaves out; rules are looked at in order,
the first that holds decides; variables see those that are set before them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

NOT_JOBS = {"default", "image", "include", "pages", "stages", "variables", "workflow"}
_TERM = re.compile(r'\$(?P<name>\w+)(?:\s*(?P<op>==|!=)\s*(?:"(?P<text>[^"]*)"|\$(?P<other>\w+)))?\Z')
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


class NotUnderstood(Exception):
    """The file uses something that this reader does not know; the message says what."""


@dataclass(frozen=True)
class Job:
    """One job, with everything merged in. ``needs`` are the jobs that must have ended well before it."""

    name: str
    stage: str
    before_script: tuple[str, ...]
    script: tuple[str, ...]
    needs: tuple[str, ...]
    variables: Mapping[str, str]
    rules: tuple[Mapping[str, Any], ...]
    artifacts: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)

    def when(self, variables: Mapping[str, str]) -> str:
        """on_success, manual, always or never, by the first rule that holds."""
        if not self.rules:
            return "on_success"
        for rule in self.rules:
            if "if" not in rule or holds(str(rule["if"]), variables):
                return str(rule.get("when", "on_success"))
        return "never"


@dataclass(frozen=True)
class Pipeline:
    """All jobs in an order in which they can run."""

    variables: Mapping[str, str]
    jobs: tuple[Job, ...]


def read(text: str) -> Pipeline:
    """Raises NotUnderstood, and yaml.YAMLError."""
    document = yaml.safe_load(text)
    stages, default = list(document["stages"]), document.get("default", {})
    jobs = {}
    for name, body in document.items():
        if name in NOT_JOBS or name.startswith("."):
            continue
        merged = {**default, **_extended(document, body)}
        if merged.get("stage") not in stages:
            raise NotUnderstood(f"{name}: stage {merged.get('stage')!r} is not in stages")
        jobs[name] = _job(name, merged)
    variables = {name: str(value) for name, value in document.get("variables", {}).items()}
    return Pipeline(variables, tuple(_ordered(jobs, stages)))


def holds(condition: str, variables: Mapping[str, str]) -> bool:
    """An `if` of terms joined by `&&`: `$A`, `$A == "b"`, `$A != $B`. An empty variable is as good as none."""
    for term in condition.split("&&"):
        match = _TERM.match(term.strip())
        if match is None:
            raise NotUnderstood(f"condition {condition!r}")
        value = variables.get(match["name"], "")
        if match["op"] is None:
            if not value:
                return False
            continue
        other = match["text"] if match["text"] is not None else variables.get(match["other"], "")
        if (value == other) != (match["op"] == "=="):
            return False
    return True


def expanded(variables: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """``known``, and ``variables`` with what they refer to put in."""
    found = dict(known)
    for name, value in variables.items():
        found[name] = _VARIABLE.sub(lambda match: found.get(match[1] or match[2], ""), value)
    return found


# -- inside -----------------------------------------------------------------------------------------


def _extended(document: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    parents = body.get("extends", [])
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        if parent not in document:
            raise NotUnderstood(f"extends {parent!r}, which does not exist")
        merged = _merged(merged, _extended(document, document[parent]))
    return _merged(merged, {name: value for name, value in body.items() if name != "extends"})


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(under)
    for name, value in over.items():
        below = found.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        found[name] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return found


def _job(name: str, merged: Mapping[str, Any]) -> Job:
    artifacts = merged.get("artifacts", {})
    reports = [path for paths in artifacts.get("reports", {}).values() for path in _lines(paths)]
    variables = {key: str(value) for key, value in merged.get("variables", {}).items()}
    rules = tuple(merged.get("rules", []))
    needs = tuple(merged.get("needs", []))
    before, script = tuple(_lines(merged.get("before_script", []))), tuple(_lines(merged["script"]))
    paths = tuple(artifacts.get("paths", []))
    return Job(name, merged["stage"], before, script, needs, variables, rules, paths, tuple(reports), merged)


def _lines(script: str | list[str]) -> list[str]:
    return [script] if isinstance(script, str) else list(script)


def _ordered(jobs: dict[str, Job], stages: list[str]) -> list[Job]:
    found: list[Job] = []
    waiting = sorted(jobs.values(), key=lambda job: stages.index(job.stage))
    while waiting:
        done = {job.name for job in found}
        ready = [job for job in waiting if done.issuperset(job.needs)]
        if not ready:
            stuck = {job.name: sorted(set(job.needs) - done) for job in waiting}
            raise NotUnderstood(f"these wait for jobs that do not exist, or for each other: {stuck}")
        found.append(ready[0])
        waiting.remove(ready[0])
    return found
