"""Check that an installation replaced no package of the image and suits its Transformer Engine.

    python3 docker/verify.py PRESENT

PRESENT is the output of `pip list --format=freeze` before the installation.
"""

from __future__ import annotations

import importlib.metadata as metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement


def problems(present: list[str]) -> list[str]:
    """Messages that say what is wrong; `present` holds lines ``name==version``."""
    found = []
    for line in present:
        name, _, before = line.partition("==")
        if (now := _version(name)) != before:
            found.append(
                f"{name} was {before} and is {now}; install what needs another version into an image of its "
                "own"
            )
    engine = _version("transformer-engine") or _version("transformer_engine")
    for wanted in metadata.requires("megatron-core") or []:
        requirement = Requirement(wanted)
        if (
            requirement.name == "transformer-engine"
            and engine
            and not requirement.specifier.contains(engine, prereleases=True)
        ):
            found.append(
                f"megatron-core {_version('megatron-core')} takes transformer-engine "
                f"{requirement.specifier}, the image "
                f"has {engine}; build with another BASE or MEGATRON_CORE"
            )
    print(
        f"transformer-engine {engine or 'missing'}, megatron-core {_version('megatron-core')}, torch "
        f"{_version('torch')}"
    )
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]).read_text().split())
    sys.exit("\n".join(wrong) or 0)
