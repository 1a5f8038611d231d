"""JavaScript packages that an export holds, pinned, and held to the digests that npm gives for them.

They are fetched by npm itself when they are first needed, and kept (in `~/.cache/bksdm`, or where BKSDM_CACHE says).
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.common.runs import cache_folder

_TOP = "package"  # the folder in every package
_MEND = "with a folder in which npm pack was run elsewhere"


@dataclass(frozen=True)
class Package:
    """A package of npm.

    Attributes:
        name: As npm calls it.
        version: The one that is taken.
        integrity: What npm gives for its file: an algorithm, and the digest in base 64.
        files: Those that are taken, below its folder.
    """

    name: str
    version: str
    integrity: str
    files: tuple[str, ...]

    @property
    def archive(self) -> str:
        """The name of its file, as `npm pack` writes it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def take(package: Package, folder: str | None, out: Path) -> None:
    """Copy the files of a package into a folder, which is made.

    Arguments:
        package: The package.
        folder: Where its archive lies; None to have npm fetch it.
        out: The folder.

    Raises:
        InputError: The archive is not there and cannot be fetched, or is not the one that is pinned.
    """
    archive = _fetched(package) if folder is None else Path(folder) / package.archive
    if not archive.is_file():
        raise InputError(f"{archive} is missing; in {folder}, run npm pack {package.name}@{package.version}")
    _check(archive, package)
    out.mkdir(parents=True)
    with tarfile.open(archive) as opened:
        for name in package.files:
            member = opened.extractfile(f"{_TOP}/{name}")
            assert member is not None, f"{package.name} has no {name}"
            (out / Path(name).name).write_bytes(member.read())


def _fetched(package: Package) -> Path:
    """The archive, fetched where it is not kept."""
    kept = cache_folder() / "npm" / package.archive
    if kept.is_file():
        return kept
    if shutil.which("npm") is None:
        raise InputError(f"{package.name} is fetched by npm, which is not here; install it, or give --npm {_MEND}")
    say(f"fetching {package.name} {package.version} by npm, once, into {kept.parent}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    words = [
        "npm",
        "pack",
        f"{package.name}@{package.version}",
        "--ignore-scripts",
        "--pack-destination",
        str(kept.parent),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise InputError(f"npm cannot fetch {package.name}@{package.version} ({last}); give --npm {_MEND}")
    return kept


def _check(archive: Path, package: Package) -> None:
    algorithm, _, wanted = package.integrity.partition("-")
    found = base64.b64encode(hashlib.new(algorithm, archive.read_bytes()).digest()).decode()
    if found != wanted:
        raise InputError(
            f"{archive} is not {package.name} {package.version} by its digest; remove it and fetch it again"
        )
