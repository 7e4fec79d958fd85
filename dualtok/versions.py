"""Which versions of Python, dualtok and other packages are at work."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
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
