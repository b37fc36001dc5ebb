"""Makes the files in this folder for a version, from a checkout of that version; README.md has the command.

The version's own code trains and reads its configurations and checkpoints; this script imports no other
version.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXAMPLES = {"DATA": "/data", "TOKENIZER": "/data/tokenizer.model"}
"""The variables that the examples' configurations use."""

DATA = """
import sys
from pathlib import Path
sys.path.insert(0, "examples/digits")
import build_data
counts = {"instruct_samples": 16, "caption_samples": 8, "heldout_samples": 1, "tower_pictures": 1}
build_data.build(Path(sys.argv[1]), 0, **counts)
"""

CONFIGURATIONS = """
import json, sys
from megatron_evomoe.config import load_config
from megatron_evomoe.config.run import FLAT
found = {path: load_config(path).to_dict() for path in sys.argv[1:]}
print("FOUND" + json.dumps({"flags": sorted(FLAT), "configurations": found}))
"""

TENSORS = """
import hashlib, json, sys, torch
from megatron_evomoe.parallel import backend
backend.prepare()
from megatron_evomoe.checkpoint.stream import CheckpointReader
found = {}
for folder in sys.argv[1:]:
    reader = CheckpointReader(folder)
    found[folder] = {}
    for key in sorted(reader.shapes):
        if not key.startswith("rng."):
            content = reader.read(key).contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[folder][key] = hashlib.sha256(content).hexdigest()
print("FOUND" + json.dumps(found))
"""


def python(checkout: Path, folder: Path, *arguments: str | Path) -> Any:
    """Run the version's code; returns what it printed as JSON after FOUND, or None."""
    env = {
        **os.environ,
        **EXAMPLES,
        "GOLDEN": str(folder),
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=checkout,
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    return json.loads(lines[0].removeprefix("FOUND")) if lines else None


def main(checkout: Path, version: str) -> None:
    """Write `version`.tar.xz and `version`.json to this folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python(checkout, folder, "-c", DATA, folder / "data")
        for path in (folder / "data" / "heldout", folder / "data" / "tower.npz"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        config = HERE / f"{version}.yaml"
        python(checkout, folder, "-m", "megatron_evomoe", "train", "--config", config)
        examples = [checkout / "examples" / path for path in ("evomoe_llava.yaml", "digits/quickstart.yaml")]
        found = python(checkout, folder, "-c", CONFIGURATIONS, config, *examples)
        checkpoints = [folder / "run" / "warmup" / "iter_0000002", folder / "run" / "evolve" / "iter_0000002"]
        found["tensors"] = python(checkout, folder, "-c", TENSORS, *checkpoints)
        found["losses"] = [
            [line["stage"], line["step"], line["lm loss"], line["grad-norm"]]
            for line in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        ]
        text = json.dumps(found, indent=1, sort_keys=True)
        for old, new in ((str(folder), "${GOLDEN}"), (str(HERE), "tests/golden"), (str(checkout) + "/", "")):
            text = text.replace(old, new)
        (HERE / f"{version}.json").write_text(text + "\n")
        for path in checkpoints:
            (path.parent / "latest_checkpointed_iteration.txt").write_text("2")
        with tarfile.open(HERE / f"{version}.tar.xz", "w:xz") as archive:
            archive.add(folder / "data", "data")
            for path in checkpoints:
                for file in (path, path.with_name("latest_checkpointed_iteration.txt")):
                    archive.add(file, file.relative_to(folder))
            for path in examples:
                archive.add(path, path.relative_to(checkout))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
