"""Which versions of Python, dualtok and other packages are at work."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import dualtok

if TYPE_CHECKING:
    from collections.abc import Iterable


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python, of dualtok and of those packages that are installed.

    dualtok's own is that of the code that runs, which may be a source tree that was never installed. torch's says which
    CUDA it was built for.
    """
    found = {"python": platform.python_version(), "dualtok": dualtok.__version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """Return the SHA-256 over the Python files of the dualtok that runs, in the order of their names within it."""
    root = Path(dualtok.__file__).parent
    whole = hashlib.sha256()
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        name = file.relative_to(root).as_posix()
        whole.update(name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()
