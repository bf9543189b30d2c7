"""Work: a stage bound to what it reads, known by a key; and why one result is not another's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modelops
from modelops.core import cache, machine
from modelops.core.artifact import Artifact
from modelops.core.component import options_of
from modelops.core.manifest import FILE_NAME, Step, digest
from modelops.core.registry import require
from modelops.errors import from_os_error, missing_path
from modelops.stages import Stage
from modelops.stages._workbench import open_dataset


@dataclass(frozen=True)
class Work:
    """A stage bound to what it reads, with the key that identifies the work."""

    stage: Stage
    source: Artifact | str
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def source_id(self) -> str:
        """The artifact's id, or the last part of a source's text: a source is known by the files it consists of."""
        return self.source.id if isinstance(self.source, Artifact) else os.path.basename(self.source.rstrip("/"))

    @property
    def tools(self) -> dict[str, str]:
        names = {name for component in self.stage.components() for name in component.tools}
        return {"modelops": modelops.__version__, **machine.versions(names)}

    @property
    def paths(self) -> set[str]:
        """The options for which the digests of what they name stand."""
        read = {name.partition("[")[0] for name in self.inputs}
        return {item.name for item in options_of(type(self.stage)) if item.type is Path and item.name in read}

    @property
    def key(self) -> str:
        """sha256 over source, options, digests of all files read, and tool versions; paths do not enter."""
        options = {name: value for name, value in self.stage.to_dict().items() if name not in self.paths}
        return digest(
            {
                "stage": self.stage.name,
                "source": self.source_id,
                "options": options,
                "inputs": dict(self.inputs),
                "tools": self.tools,
                "cpu": list(machine.cpu_features()) if self.stage.machine_dependent else [],
            }
        )


def bind(stage: Stage, source: Artifact | str) -> Work:
    """The work of a stage on a source: digests every file that it says it reads."""
    for component in stage.components():
        require(type(component))
    _refuse_what_no_dataset_reads(stage)
    text = str(source.path) if isinstance(source, Artifact) else source
    inputs = {}
    for name, path in stage.inputs(text).items():
        try:
            inputs[name] = input_digest(name, path)
        except OSError as error:
            raise from_os_error(error, f"can't read {path}") from error
    return Work(stage, source, inputs)


def _refuse_what_no_dataset_reads(stage: Stage) -> None:
    """Say so before a folder is digested that may be anything; for stages that read datasets."""
    names = {item.name for item in options_of(type(stage)) if item.type is Path and not item.many}
    for name in names & {"data", "eval"} if hasattr(stage, "dataset") else ():
        if (path := getattr(stage, name)) is not None:
            open_dataset(path, getattr(stage, "dataset", None))


def input_digest(name: str, path: Path) -> str:
    """What identifies an input: an artifact's id, which no time stamp enters, or the bytes of files."""
    if (path / FILE_NAME).is_file():
        return Artifact.open(path).id
    return cache.digest_of(path) if path.exists() else _text_digest(name, path)


def _text_digest(name: str, path: Path) -> str:
    """The digest of an option that names no file as it stands: ``file.py:function``, or a generator such as random."""
    head, colon, function = str(path).rpartition(":")
    if colon and Path(head).is_file():
        return digest({"file": cache.digest_of(Path(head)), "function": function})
    if str(path).partition(":")[0] == "random" or (colon and head.replace(".", "").isidentifier()):
        return digest({"text": str(path)})
    raise missing_path(name.replace("_", " "), path)


def difference(work: Work, artifact: Artifact) -> str:
    """Why this artifact is not the result of this work, in words; an empty string when it is."""
    if not artifact.manifest.history:
        return "it has no history"
    step = artifact.manifest.history[-1]
    if step.stage != work.stage.name:
        return f"it was made by {step.stage}"
    if step.key != work.key:
        return _what_changed(work, step)
    if readers := step.report.details.get("unseen_readers"):
        return f"what {', '.join(readers)} read for the user's code can't be known"
    for name, known in step.report.details.get("files_read", {}).items():
        path = Path(name)
        if not path.is_file() or cache.digest_of(path) != known:
            return f"file changed: {name}"
    for entry in artifact.manifest.code_executed:
        path = Path(entry["path"])
        if not path.is_file() or cache.digest_of(path) != entry["sha256"]:
            return f"code changed: {entry['path']}"
    return ""


def _what_changed(work: Work, step: Step) -> str:
    if step.source != work.source_id:
        return "its source changed"
    for name, found in work.inputs.items():
        if step.inputs.get(name) != found:
            return f"{name} changed"
    before, now = _flat(step.options), _flat(work.stage.to_dict())
    changes = [
        f"{name} {before.get(name)} → {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in work.paths
    ]
    if changes:
        return "options changed: " + ", ".join(changes)
    tools = [
        f"{name} {step.tools.get(name)} → {work.tools.get(name)}"
        for name in sorted(step.tools.keys() | work.tools.keys())
        if step.tools.get(name) != work.tools.get(name)
    ]
    return "tools changed: " + ", ".join(tools) if tools else "the CPU's features changed"


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
