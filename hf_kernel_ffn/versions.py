"""The versions of torch and transformers that this package supports, and which are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def unsupported() -> str | None:
    """What is wrong with the installed torch or transformers, in one sentence that names the
    supported range; None if nothing is."""
    try:
        wanted = [Requirement(line) for line in requires("hf-kernel-ffn") or []]
    except PackageNotFoundError:  # run from a folder
        return None
    for requirement in wanted:
        if requirement.name in ("torch", "transformers") and requirement.marker is None:
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                found = "none"
            if found == "none" or not requirement.specifier.contains(found, prereleases=True):
                return (
                    f"found {requirement.name} {found}, expected {requirement.specifier}: "
                    "install a supported version"
                )
    return None
