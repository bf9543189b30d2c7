"""The cache: small JSON facts that can be found again at a cost, under $MODELOPS_CACHE; deletable at any time.

Nothing in it is needed for a right answer. A value that can't be read is a value that is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
# A file changed in the same clock tick as it was hashed could keep its time stamps: such digests are not remembered.
_SETTLED_NS = 50_000_000


def root() -> Path:
    """The cache directory: $MODELOPS_CACHE, else the XDG cache; it may not exist."""
    if found := os.environ.get("MODELOPS_CACHE"):
        return Path(found)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "modelops"


def _place(kind: str, key: str) -> Path:
    name = hashlib.sha256(key.encode()).hexdigest()
    return root() / kind / name[:2] / f"{name}.json"


def get(kind: str, key: str) -> Any:
    """The remembered value, or None."""
    try:
        entry = json.loads(_place(kind, key).read_bytes())
    except (OSError, ValueError):
        return None
    return entry.get("value") if isinstance(entry, dict) and entry.get("key") == key else None


def put(kind: str, key: str, value: Any) -> None:
    """Remember a JSON value; a cache that can't be written is only logged."""
    place = _place(kind, key)
    fresh = place.with_name(f".{place.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps({"key": key, "value": value}))
        os.replace(fresh, place)
    except OSError as error:
        log.debug("cache not written: %s", error)
        with contextlib.suppress(OSError):
            fresh.unlink()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, read now."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verified_sha256(path: Path) -> str:
    """The SHA-256 of a file, remembered by device, inode, size and both time stamps, so that it is read once."""
    before = path.stat()
    key = f"{before.st_dev}:{before.st_ino}:{before.st_size}:{before.st_mtime_ns}:{before.st_ctime_ns}"
    remembered = get("digests", key)
    if isinstance(remembered, str):
        return remembered
    digest = sha256_of(path)
    after = path.stat()
    unchanged = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == key_times(before)
    if unchanged and time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _SETTLED_NS:
        put("digests", key, digest)
    return digest


def key_times(stat: os.stat_result) -> tuple[int, int, int]:
    """What changes about a file when its bytes change."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def digest_of(path: Path) -> str:
    """The digest of a file, or of a folder: the names and digests of all files in it, in order.

    Hidden files and ``__pycache__`` are left out, since tools write them beside the data.
    """
    if path.is_file():
        return verified_sha256(path)
    lines = [
        f"{file.relative_to(path).as_posix()}\0{verified_sha256(file)}\n"
        for file in sorted(path.rglob("*"))
        if file.is_file() and not _passed_over(file.relative_to(path))
    ]
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def _passed_over(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
