"""Artifacts: directories of model files that are complete or absent, never half written.

A draft is written beside its target under a hidden name, synced to disk, given its manifest last, and moved into
place in one step that never replaces anything. Whatever fails before that step leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modelops.core import cache
from modelops.core.manifest import FAMILY, FILE_NAME, LARGEST_BYTES, File, Manifest, unsafe_name
from modelops.core.renames import exchange, rename_new
from modelops.core.tensors import Signature
from modelops.errors import InputRefused, ModelOpsError, StageFailed, UsageError, from_os_error, missing_path

log = logging.getLogger(__name__)

# The process that writes it, by the namespace in which its number counts: a container's is another's.
_DRAFT = re.compile(r"\.(?P<name>.+)\.tmp-(?P<space>\d+)-(?P<pid>\d+)-[0-9a-f]{8}")
_ROLES = {
    "model.onnx": "model",
    "model.onnx.data": "external-data",
    "reference.npz": "reference",
    "preprocessor_config.json": "preprocessor",
    "config.json": "config",
}
_TOKENIZER = re.compile(r"(tokenizer.*|vocab\..*|merges\.txt|special_tokens_map\.json|.*\.(model|spm))")


def role_of(name: str) -> str:
    """What a file is to an artifact, told from its name."""
    if name in _ROLES:
        return _ROLES[name]
    return "tokenizer" if _TOKENIZER.fullmatch(name) else "evidence"


@dataclass(frozen=True)
class Artifact:
    """A finished directory with a manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> Artifact:
        """The artifact there, its files checked against the manifest.

        Names and sizes are always checked, digests unless ``verify`` is False. InputRefused names the file that is
        missing, extra, altered or not a regular file; UsageError says that nothing is there.
        """
        path = Path(path)
        try:
            if not path.exists():
                raise missing_path("artifact", path)
            if not path.is_dir():
                raise InputRefused(f"{path} is not an artifact directory", hint="give a directory that modelops wrote")
            if _DRAFT.fullmatch(path.name):
                raise InputRefused(f"{path} is a draft that was never finished", hint="run what made it again")
            artifact = cls(path, _read_manifest(path))
            artifact.check_files()
            if verify:
                artifact.verify()
        except OSError as error:
            raise from_os_error(error, f"reading {path}") from error
        return artifact

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def model(self) -> Path:
        """The path of the model's graph; InputRefused when this artifact is evidence and holds none."""
        if "model" not in self.manifest.graphs:
            raise InputRefused(f"{self.path} is {self.manifest.kind}: it holds no model", hint="give a model artifact")
        return self.path / str(self.manifest.graphs["model"]["file"])

    @property
    def signature(self) -> Signature:
        return self.manifest.signature()

    @property
    def size(self) -> int:
        """Bytes of the graph and its external data."""
        return sum(file.size for file in self.manifest.files if file.role in ("model", "external-data"))

    def has(self, name: str) -> bool:
        return any(file.path == name for file in self.manifest.files)

    def file(self, name: str) -> Path:
        """The path of a file of the artifact; KeyError when the manifest does not list it."""
        if not self.has(name):
            raise KeyError(name)
        return self.path / name

    def check_files(self) -> None:
        """Refuse missing, extra, linked or resized files; reads no content."""
        listed = {file.path: file for file in self.manifest.files}
        for name, info in _walk(self.path):
            if name == FILE_NAME:
                continue
            if name not in listed:
                raise InputRefused(f"{self.path}: {name} is not in the manifest", hint="remove it, or make it anew")
            size = listed.pop(name).size
            if info.st_size != size:
                raise InputRefused(
                    f"{self.path}: {name} has {info.st_size} bytes, the manifest says {size}", hint=_ANEW
                )
        for name in listed:
            raise InputRefused(f"{self.path}: {name} is missing", hint=_ANEW)

    def verify(self, *, remembered: bool = True) -> None:
        """Refuse a file whose digest differs; with ``remembered`` False every byte is read again."""
        for file in self.manifest.files:
            place = self.path / file.path
            found = cache.verified_sha256(place) if remembered else cache.sha256_of(place)
            if found != file.sha256:
                raise InputRefused(f"{self.path}: {file.path} was altered (its sha256 differs)", hint=_ANEW)


_ANEW = "the artifact was damaged or altered: make it anew from its source"


def _read_manifest(path: Path) -> Manifest:
    place = path / FILE_NAME
    try:
        info = place.lstat()
    except FileNotFoundError as error:
        raise InputRefused(
            f"{path} has no {FILE_NAME}: it is not an artifact", hint="give a directory that modelops wrote"
        ) from error
    if not stat.S_ISREG(info.st_mode):
        raise InputRefused(f"{place} is not a regular file", hint=_ANEW)
    if info.st_size > LARGEST_BYTES:
        raise InputRefused(f"{place} has {info.st_size} bytes, more than any manifest", hint=_ANEW)
    return Manifest.from_json(place.read_bytes(), str(place))


def _walk(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below, as (relative name, stat); links, devices and unsafe names are refused."""
    pending = [path]
    while pending:
        folder = pending.pop()
        for entry in os.scandir(folder):
            name = Path(entry.path).relative_to(path).as_posix()
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                pending.append(Path(entry.path))
                continue
            if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
                raise InputRefused(f"{path}: {name} is a link or not a regular file", hint="put a real copy there")
            if reason := unsafe_name(name):
                raise InputRefused(f"{path}: file name {name!r}: {reason}", hint="rename it and make the artifact anew")
            yield name, info


@dataclass(frozen=True)
class Draft:
    """A directory that is being written, and that becomes an artifact whole or disappears."""

    path: Path

    def file(self, name: str) -> Path:
        """Where to write a new file of that name; ValueError for a name that must not be in an artifact."""
        if reason := unsafe_name(name):
            raise ValueError(f"{name!r}: {reason}")
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def copy(self, source: Path, name: str) -> Path:
        """A real copy of a file, with no links, under that name."""
        place = self.file(name)
        with open(source, "rb") as reader, open(place, "xb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
        return place

    def carry(self, source: Artifact) -> None:
        """Copy what goes with a model from stage to stage: reference, tokenizer, preprocessor and config files."""
        for file in source.manifest.files:
            if file.role not in ("model", "external-data", "evidence") and not (self.path / file.path).exists():
                self.copy(source.path / file.path, file.path)


class Publication:
    """A draft on its way to a target; see ``drafting``."""

    def __init__(self, draft: Draft, target: Path, *, force: bool) -> None:
        self.draft = draft
        self.target = target
        self.force = force
        self.done = False

    def files(self) -> tuple[File, ...]:
        """The draft's files with size and digest, read back from what was written, and synced to disk."""
        found = []
        for name, _ in _walk(self.draft.path):
            place = self.draft.path / name
            descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
                size = os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
            found.append(File(name, size, cache.sha256_of(place), role_of(name)))
        return tuple(sorted(found, key=lambda file: file.path))

    def publish(self, manifest: Manifest) -> Artifact:
        """Write the manifest, sync, and move the draft into place; the target is then whole, or untouched.

        A target that already holds an equal artifact (same id) counts as published by whoever was faster.
        """
        text = manifest.to_json().encode()
        if len(text) > LARGEST_BYTES:
            raise StageFailed(
                f"the manifest of {self.target} would have {len(text):,} bytes: {LARGEST_BYTES:,} at most"
            )
        _write_new(self.draft.path / FILE_NAME, text)
        for folder in _folders_bottom_up(self.draft.path):
            _sync_folder(folder)
        if self.force and self.target.exists():
            self._replace()
        else:
            try:
                rename_new(self.draft.path, self.target)
            except FileExistsError as error:
                return self._lost_race(manifest, error)
            self._sync_parent(undo=lambda: rename_new(self.target, self.draft.path))
        self.done = True
        return Artifact(self.target, manifest)

    def _replace(self) -> None:
        refuse_foreign(self.target)
        exchange(self.draft.path, self.target)
        self._sync_parent(undo=lambda: exchange(self.draft.path, self.target))
        # The draft's name now holds what was replaced.
        _remove(self.draft.path)

    def _sync_parent(self, undo: Callable[[], None]) -> None:
        try:
            _sync_folder(self.target.parent)
        except OSError:
            undo()
            raise

    def _lost_race(self, manifest: Manifest, error: OSError) -> Artifact:
        try:
            existing = Artifact.open(self.target)
        except ModelOpsError:
            existing = None
        if existing is not None and existing.id == manifest.id:
            return existing
        raise target_exists(self.target) from error


@contextlib.contextmanager
def drafting(target: Path | str, *, force: bool = False) -> Iterator[Publication]:
    """A draft beside the target, removed on the way out unless it was published.

    UsageError when the target exists and ``force`` is False; ResourceExhausted when the disk is full.
    """
    target = Path(os.path.abspath(target))
    if _DRAFT.fullmatch(target.name):
        raise UsageError(f"{target.name} is a name for drafts", hint="choose another name")
    if os.path.lexists(target):
        if not force:
            raise target_exists(target)
        refuse_foreign(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        path = target.parent / f".{target.name}.tmp-{_space()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        path.mkdir(mode=0o755)
    except OSError as error:
        raise from_os_error(error, f"can't write {target}") from error
    publication = Publication(Draft(path), target, force=force)
    try:
        yield publication
    except OSError as error:
        raise from_os_error(error, f"writing {target}") from error
    finally:
        if not publication.done:
            _remove(path)


def target_exists(target: Path) -> UsageError:
    if not _is_replaceable(target):
        hint = "choose another name; --force won't replace what is not an artifact"
        return UsageError(f"{target} exists already, and is not an artifact", hint=hint)
    return UsageError(f"{target} exists already", hint="choose another name, or replace it with --force")


def _is_replaceable(target: Path) -> bool:
    """Whether it is an artifact, be it a damaged one; web applications have a manifest.json too."""
    if target.is_symlink() or not (target / FILE_NAME).is_file():
        return False
    with open(target / FILE_NAME, "rb") as file:
        start = file.read(4096)
    return not start or FAMILY.encode() in start


def refuse_foreign(target: Path) -> None:
    """UsageError unless the path is an artifact directory, so that --force never removes anything else."""
    if not _is_replaceable(target):
        raise UsageError(
            f"{target} is not an artifact: it won't be replaced", hint="move it away, or choose another name"
        )


def sweep(target: Path) -> None:
    """Remove the drafts that killed processes left beside this target."""
    for entry in target.parent.glob(f".{_escaped(target.name)}.tmp-*"):
        match = _DRAFT.fullmatch(entry.name)
        if match and match["name"] == target.name and int(match["space"]) == _space() and _dead(match["pid"]):
            _remove(entry)


def _space() -> int:
    """The namespace of process numbers, on Linux."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _dead(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _write_new(place: Path, content: bytes) -> None:
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folders_bottom_up(path: Path) -> list[Path]:
    return [Path(folder) for folder, _, _ in os.walk(path, topdown=False)]


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    for _ in range(2):  # a disk that fails once may not fail twice
        shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        log.warning("could not remove %s", path)
