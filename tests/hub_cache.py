"""The Hub's cache on the disk, as `huggingface_hub` lays it out, for models that were never on the Hub."""

import hashlib
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_hub_cache(folder: Path, repo: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a folder where a download of `repo` would be: files among the blobs, and links to them in a snapshot."""
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
    return root / "snapshots" / COMMIT
