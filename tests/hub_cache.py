"""The Hub's cache on the disk, as `huggingface_hub` lays it out, for models that were never on the Hub."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_hub_cache(folder: Path, repo: str, cache: Path, monkeypatch: pytest.MonkeyPatch, *, listed: bool = True) -> Path:
    """Put a folder where a download of `repo` would be: files among the blobs, and links to them in a snapshot.

    Arguments:
        folder: What is on the Hub.
        repo: Its id.
        cache: Where the cache is to be.
        monkeypatch: Makes it the cache.
        listed: Whether a listing of the files lies there too, as it does since huggingface_hub 2.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "blobs").mkdir()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            link = root / "snapshots" / COMMIT / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    if listed:
        files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
        entries = {name: {"size": file.stat().st_size, "blob_id": COMMIT} for name, file in files.items()}
        (root / "trees").mkdir()
        (root / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": entries}))
    return root / "snapshots" / COMMIT
