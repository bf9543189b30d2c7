"""Manifests: what an artifact is, how it came to be, and by which digests it can be known again.

``id`` covers the schema, the kind, the graphs and the files, and nothing that depends on time, place or machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modelops.core.report import Report
from modelops.core.tensors import Signature
from modelops.errors import InputRefused

FAMILY = "modelops.artifact"
VERSION = 1
SCHEMA = f"{FAMILY}/{VERSION}"
FILE_NAME = "manifest.json"
LARGEST_BYTES = 16 << 20

Kind = Literal["model", "evidence"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class File:
    """One file of an artifact; ``path`` is relative, with forward slashes."""

    path: str
    size: int
    sha256: str
    role: str

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "sha256": self.sha256, "role": self.role}


@dataclass(frozen=True)
class Step:
    """One stage in the history: what ran, on what, with every option, and what it reported.

    ``key`` identifies the work (same key, same result); ``inputs`` holds the digest of every file that was read,
    by option; ``source`` is the id of the artifact (or the text of the source) it started from.
    """

    stage: str
    options: Mapping[str, Any]
    key: str
    source: str
    seconds: float
    peak_memory_bytes: int | None
    report: Report
    tools: Mapping[str, str]
    inputs: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "options": dict(self.options),
            "key": self.key,
            "source": self.source,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "report": self.report.to_dict(),
            "tools": dict(self.tools),
            "inputs": dict(self.inputs),
        }

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Step:
        return cls(**{**values, "report": Report.parse(values["report"])})


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. ``graphs`` maps a name ("model") to its file and signature."""

    kind: Kind
    files: tuple[File, ...]
    graphs: Mapping[str, Mapping[str, Any]]
    created: str
    model: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Step, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    code_executed: tuple[Mapping[str, Any], ...] = ()
    parents: tuple[str, ...] = ()
    measured: Mapping[str, str] = field(default_factory=dict)
    schema: str = SCHEMA

    @property
    def id(self) -> str:
        """sha256 over schema, kind, graphs and files (path, size, digest)."""
        files = [[file.path, file.size, file.sha256] for file in sorted(self.files, key=lambda file: file.path)]
        return digest({"schema": self.schema, "kind": self.kind, "graphs": self.graphs, "files": files})

    def signature(self, graph: str = "model") -> Signature:
        return Signature.parse(self.graphs[graph]["signature"])

    def to_json(self) -> str:
        """The text of manifest.json, with the id in it for people and scripts to read."""
        values = {
            "schema": self.schema,
            "id": self.id,
            "kind": self.kind,
            "created": self.created,
            "files": [file.to_dict() for file in self.files],
            "graphs": self.graphs,
            "model": self.model,
            "history": [step.to_dict() for step in self.history],
            "environment": self.environment,
            "code_executed": list(self.code_executed),
            "parents": list(self.parents),
            "measured": dict(self.measured),
        }
        return json.dumps(values, indent=1, sort_keys=False, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """The manifest in this text; InputRefused names ``where`` and the part that is wrong."""
        try:
            values = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise InputRefused(f"{where} is not valid JSON: {error}", hint=_REWRITE) from error
        if not isinstance(values, dict):
            raise InputRefused(f"{where} is not a JSON object", hint=_REWRITE)
        values = _upgraded(values, where)
        try:
            manifest = _parsed(cls, values)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputRefused(
                f"{where} is malformed: {type(error).__name__}: {error}", hint="make the artifact anew from its source"
            ) from error
        if values.get("id") != manifest.id:
            raise InputRefused(f"{where} does not match its own id", hint="it was altered: make the artifact anew")
        return manifest


_REWRITE = "it was truncated or altered: make the artifact anew"


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no blanks)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def unsafe_name(path: str) -> str:
    """Why this relative path must not be in an artifact, or an empty string when it may.

    Names that some systems reserve, or can't hold, are refused so that artifacts travel.
    """
    parts = path.split("/")
    if not path or path.startswith("/") or "\\" in path or any(ord(char) < 32 for char in path):
        return "not a plain relative path"
    if any(part in ("", ".", "..") for part in parts):
        return "it leaves the artifact"
    if any(len(part.encode()) > 255 for part in parts):
        return "a name is longer than 255 bytes"
    if any(_RESERVED.fullmatch(part) or part.endswith((" ", ".")) for part in parts):
        return "a name that some systems reserve"
    return ""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _parsed(cls: type[Manifest], values: Mapping[str, Any]) -> Manifest:
    files = tuple(File(**file) for file in values["files"])
    for file in files:
        if reason := unsafe_name(file.path):
            raise ValueError(f"file {file.path!r}: {reason}")
        if not isinstance(file.size, int) or file.size < 0 or not _SHA256.fullmatch(file.sha256):
            raise ValueError(f"file {file.path!r} has no valid size and sha256")
    if len({file.path.casefold() for file in files}) != len(files):
        raise ValueError("two files have the same name")
    if values["kind"] not in ("model", "evidence"):
        raise ValueError(f"unknown kind {values['kind']!r}")
    if values["kind"] == "model":
        names = {file.path for file in files}
        for name, graph in values["graphs"].items():
            Signature.parse(graph["signature"])
            if graph["file"] not in names:
                raise ValueError(f"graph {name!r} names a file that is not listed: {graph['file']!r}")
    return cls(
        kind=values["kind"],
        files=files,
        graphs=dict(values["graphs"]),
        created=str(values["created"]),
        model=dict(values["model"]),
        history=tuple(Step.parse(step) for step in values["history"]),
        environment=dict(values["environment"]),
        code_executed=tuple(dict(entry) for entry in values["code_executed"]),
        parents=tuple(values["parents"]),
        measured=dict(values["measured"]),
        schema=values["schema"],
    )


# Schema version → the function that turns its values into those of the next version. The first schema needs none.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def _upgraded(values: dict[str, Any], where: str) -> dict[str, Any]:
    schema = values.get("schema")
    family, _, number = schema.partition("/") if isinstance(schema, str) else ("", "", "")
    if family != FAMILY or not (number.isascii() and number.isdecimal() and len(number) < 10):
        shown = repr(schema[:100]) if isinstance(schema, str) else f"({type(schema).__name__})"
        raise InputRefused(f"{where} has the unknown schema {shown}", hint=f"expected {SCHEMA}")
    version = int(number)
    if version > VERSION:
        raise InputRefused(
            f"{where} has schema {values['schema']}, newer than {SCHEMA}", hint="update modelops to read it"
        )
    while version < VERSION:
        if version not in UPGRADES:
            raise InputRefused(f"{where} has the unknown schema {values['schema']!r}", hint=f"expected {SCHEMA}")
        values = UPGRADES[version](values)
        version += 1
    return values
