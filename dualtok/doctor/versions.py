"""Installed packages against those that dualtok needs and those that it was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from dualtok.distributed.deepspeed_config import refuse_wrong_gradients
from dualtok.doctor.result import CheckResult
from dualtok.errors import ConfigError
from dualtok.versions import installed_versions

TESTED = {
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "deepspeed": "0.19.8",
    "numpy": "2.4.6",
    "peft": "0.21.2",
    "pyarrow": "26.0.1",
    "pydantic": "2.14.3",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "transformers": "5.23.0",
}
"""Versions in ``constraints.txt`` of the packages whose inner workings dualtok leans on."""

INSTALL = "pip install --constraint constraints.txt --editable . in a checkout of dualtok"


def check_versions() -> CheckResult:
    """Compare with dualtok's requirements (fail) and with the versions of the tests (warn)."""
    name = "versions"
    outside = []
    try:
        requirements = requires("dualtok") or []
    except PackageNotFoundError:
        return CheckResult(name, "fail", "dualtok runs from a source tree that is not installed", INSTALL)
    for line in requirements:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            outside.append(f"{needed.name} is not installed, dualtok needs {needed.specifier}")
            continue
        if not needed.specifier.contains(found.partition("+")[0], prereleases=True):
            outside.append(f"{needed.name} {found} is installed, dualtok needs {needed.specifier}")
    if outside:
        return CheckResult(name, "fail", "; ".join(outside), INSTALL)
    have = installed_versions(TESTED)
    other = [
        f"{package} {have[package]} (tested: {tested})"
        for package, tested in TESTED.items()
        if package in have and have[package].partition("+")[0] != tested
    ]
    if other:
        return CheckResult(name, "warn", f"never tested with {', '.join(other)}", f"if something fails: {INSTALL}")
    main = ", ".join(f"{package} {have[package]}" for package in ("python", "torch", "deepspeed", "transformers"))
    return CheckResult(name, "ok", f"{main} and {len(TESTED) - 3} more as tested")


def check_deepspeed() -> CheckResult:
    """Look for the DeepSpeed versions whose gradients are wrong under accumulation."""
    name = "deepspeed"
    try:
        found = version("deepspeed")
        refuse_wrong_gradients(found)
    except PackageNotFoundError:
        return CheckResult(name, "fail", "not installed", INSTALL)
    except ConfigError as error:
        return CheckResult(name, "fail", str(error), f"pip install deepspeed=={TESTED['deepspeed']}")
    return CheckResult(name, "ok", f"{found} scales gradients rightly under accumulation, as far as is known")
