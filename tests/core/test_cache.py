"""The cache remembers digests of files that have not changed, and is never needed for a right answer."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from modelops.core import cache


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "cache"))


def test_a_digest_is_computed_once_for_an_unchanged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"content")
    time.sleep(0.08)
    first = cache.verified_sha256(file)
    assert first == hashlib.sha256(b"content").hexdigest()
    monkeypatch.setattr(cache, "sha256_of", lambda path: pytest.fail(f"read {path} again"))
    assert cache.verified_sha256(file) == first


def test_a_changed_file_is_read_again_even_with_its_old_time_stamp(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"content")
    time.sleep(0.08)
    cache.verified_sha256(file)
    stamps = file.stat()
    file.write_bytes(b"Content")
    os.utime(file, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    assert cache.verified_sha256(file) == hashlib.sha256(b"Content").hexdigest()


def test_a_file_just_written_is_not_trusted_by_its_time_stamp(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"a")
    cache.verified_sha256(file)
    assert not list((tmp_path / "cache").rglob("*.json"))


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"key": "other", "value": 1}'])
def test_a_damaged_entry_is_no_entry(tmp_path: Path, damage: bytes) -> None:
    cache.put("kind", "key", {"a": 1})
    assert cache.get("kind", "key") == {"a": 1}
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_bytes(damage)
    assert cache.get("kind", "key") is None


def test_a_cache_that_can_not_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MODELOPS_CACHE", str(tmp_path / "file" / "below"))
    cache.put("kind", "key", 1)
    assert cache.get("kind", "key") is None


def test_a_folders_digest_tells_names_and_content_but_not_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x").write_bytes(b"1")
    assert cache.digest_of(tmp_path / "a") == cache.digest_of(tmp_path / "b")
    (tmp_path / "b" / ".hidden").write_bytes(b"2")
    assert cache.digest_of(tmp_path / "a") == cache.digest_of(tmp_path / "b")
    (tmp_path / "b" / "sub" / "x").rename(tmp_path / "b" / "sub" / "y")
    assert cache.digest_of(tmp_path / "a") != cache.digest_of(tmp_path / "b")
