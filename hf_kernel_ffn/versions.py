"""The versions of torch and transformers that this package supports, and which are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def describe_unsupported_version() -> str | None:
    """Say in one sentence what is wrong with the installed torch or transformers.

    The sentence names the supported range. None if nothing is wrong.
    """
    try:
        requirements = [Requirement(line) for line in requires("hf-kernel-ffn") or []]
    except PackageNotFoundError:  # run from a folder
        return None
    for requirement in requirements:
        if requirement.name not in ("torch", "transformers") or requirement.marker is not None:
            continue
        installed = _find_version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            return (
                f"found {requirement.name} {installed or 'none'}, expected "
                f"{requirement.specifier}: install a supported version"
            )
    return None


def _find_version(package: str) -> str | None:
    """The version of an installed ``package``; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
