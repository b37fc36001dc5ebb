"""Time and peak memory of conversions, compared with a plain copy of the same bytes.

    python benchmarks/convert.py [--gigabytes 4] [--rounds 3] [--folder DIR]

A synthetic LLaVA in bfloat16 is imported and exported again. Each conversion is followed by a copy of its
output; the medians are printed as Markdown. Peak memory is VmHWM of the converting process and includes the
interpreter and libraries. The time excludes their import. The disk needs three times the size of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megatron_evomoe.config import from_mapping  # noqa: E402
from megatron_evomoe.data.tokenizer import train_sentencepiece  # noqa: E402
from megatron_evomoe.hf.from_hf.config_sections import llava_sections  # noqa: E402
from megatron_evomoe.hf.tensor_map import NameMap  # noqa: E402
from megatron_evomoe.hf.to_hf.safetensors_writer import ShardedWriter  # noqa: E402

_WRAPPER = """
import json, runpy, sys, time
import megatron_evomoe.commands.convert_from_hf, megatron_evomoe.commands.convert_to_hf
start = time.perf_counter()
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"seconds": time.perf_counter() - start, "peak": int(status["VmHWM"].split()[0]) * 1024}))
"""
_CONFIG = {
    "model_type": "llava",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 64000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
    },
}


@dataclass
class Measured:
    """Measurements of one direction, import or export."""

    seconds: list[float] = field(default_factory=list)
    copying: list[float] = field(default_factory=list)
    """Seconds of copying the same bytes with shutil.copyfile, after each conversion."""
    peak: int = 0
    bytes: int = 0

    @property
    def speed(self) -> float:
        """Speed of the conversion as a share of the copy's speed, by medians."""
        return statistics.median(self.copying) / statistics.median(self.seconds)


def synthetic(folder: Path, gigabytes: float) -> int:
    """Write a LLaVA of at least that size and return the bytes of its largest tensor."""
    per_layer = 2 * (4 * 2048**2 + 3 * 2048 * 8192)
    layers = max(1, -int(-(gigabytes * 1e9 - 4 * 64000 * 2048) // per_layer))
    config = {**_CONFIG, "text_config": {**_CONFIG["text_config"], "num_hidden_layers": layers}}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    language, vision = llava_sections(config)
    run = from_mapping({"language": language, "vision": {**vision, "feature_layer": -1}})
    shapes = NameMap(run, "pretrained").hf_shapes()
    writer = ShardedWriter(folder, shapes, torch.bfloat16, 2 * 10**9)
    block = torch.randn(1 << 24).bfloat16()
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        writer.put(name, block.repeat(-(-count // len(block)))[:count].reshape(shape))
    writer.finish()
    return max(2 * torch.Size(shape).numel() for shape in shapes.values())


def convert(tool: str, *arguments: str) -> dict[str, float]:
    """Run a tool in its own process and return its time and peak memory.

    The time excludes the import of libraries.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _WRAPPER, str(ROOT / "tools" / tool), *arguments],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def copy(source: Path, target: Path) -> tuple[float, int]:
    """Copy every file of a directory and return the seconds and bytes."""
    files = [p for p in source.rglob("*") if p.is_file()]
    target.mkdir()
    start = time.perf_counter()
    for i, file in enumerate(files):
        shutil.copyfile(file, target / str(i))
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds, sum(p.stat().st_size for p in files)


def measure(run: Callable[[Path], dict[str, float]], output: Path, rounds: int) -> Measured:
    """Convert to `output` and copy the result, `rounds` times. The last output stays."""
    measured = Measured()
    for _ in range(rounds):
        shutil.rmtree(output, ignore_errors=True)
        result = run(output)
        seconds, measured.bytes = copy(output, output.with_name("copy"))
        measured.seconds.append(result["seconds"])
        measured.copying.append(seconds)
        measured.peak = max(measured.peak, int(result["peak"]))
    return measured


def benchmark(folder: Path, gigabytes: float, rounds: int) -> tuple[dict[str, Measured], int]:
    """Measurements of both directions, and the bytes of the largest tensor."""
    largest = synthetic(folder / "hf", gigabytes)
    tokenizer = train_sentencepiece(
        ["USER: <image>\nWhich? ASSISTANT: This."] * 20, folder / "tokenizer.model", 300
    )
    found = {
        "import": measure(
            lambda out: convert("convert_from_hf.py", str(folder / "hf"), "--output", str(out)),
            folder / "imported",
            rounds,
        )
    }
    shutil.rmtree(folder / "hf")
    found["export"] = measure(
        lambda out: convert(
            "convert_to_hf.py",
            str(folder / "imported"),
            "--output",
            str(out),
            "--tokenizer",
            str(tokenizer),
            "--dtype",
            "bfloat16",
        ),
        folder / "exported",
        rounds,
    )
    return found, largest


def main() -> None:
    """Print the table of both directions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to work (a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found, largest = benchmark(Path(folder), args.gigabytes, args.rounds)
    print(
        "| direction | size | seconds | copying | speed | peak memory | allowed "
        "|\n|---|---|---|---|---|---|---|"
    )
    for name, m in found.items():
        print(
            f"| {name} | {m.bytes / 1e9:.2f} GB | {statistics.median(m.seconds):.1f} | "
            f"{statistics.median(m.copying):.1f} "
            f"| {m.speed:.2f}x | {m.peak / 1e6:.0f} MB | {(3 * largest + 500e6) / 1e6:.0f} MB |"
        )


if __name__ == "__main__":
    main()
