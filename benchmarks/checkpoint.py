"""Time and memory of saving and loading, compared with torch.save and torch.load of the same tensors.

    python benchmarks/checkpoint.py [--hidden 1024] [--layers 6] [--rounds 3] [--folder DIR] [--output FILE]

One rank saves and loads the stage `warmup` with Adam's moments. Every round runs all four actions once; the
medians and their ratios are printed as Markdown. Peak memory is the largest proportional set size of the
process and its children (megatron-core forks writers) above the value at the start of the action.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).parent.parent))

import measure as shared  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from megatron_evomoe.parallel import backend  # noqa: E402


def build(args: argparse.Namespace) -> Any:
    """The stage `warmup` after one optimizer step, which allocates the optimizer's state."""
    from megatron_evomoe.config import from_mapping
    from megatron_evomoe.parallel import topology
    from megatron_evomoe.train.built import build_stage

    config = from_mapping(
        {
            "language": {
                "num_layers": args.layers,
                "hidden_size": args.hidden,
                "ffn_hidden_size": 4 * args.hidden,
                "num_attention_heads": args.hidden // 64,
                "vocab_size": 32000,
            },
            "train": {"train_iters": 10},
            "stages": [{"name": "warmup"}],
        }
    )
    topology.initialize(config)
    topology.seed_everything(1)
    built = build_stage(config, config.stages[0])
    built.optimizer.step()
    built.scheduler.step(increment=1)
    return built


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """Tensors that a checkpoint of `tree` holds."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_of(value)
    elif torch.is_tensor(getattr(tree, "data", None)) and hasattr(tree, "replica_id"):
        yield tree.data.detach()


def measure(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of `action`, and its peak memory above the start in bytes, children included."""
    gc.collect()
    me = psutil.Process()

    def used() -> int:
        total = 0
        for process in [me, *me.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total

    before, peak, done = used(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], used())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    action()
    os.sync()  # so that both formats are timed until the data is on the disk
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return seconds, max(0, peak[0] - before)


def markdown(report: dict[str, Any]) -> str:
    """Markdown table of a report."""
    seconds, size = report["seconds"], report["bytes"]
    rows = [
        [name, f"{s:.2f}", f"{size / 1e9 / s:.2f}", f"{report['peak_bytes'][name] / size:.2f}"]
        for name, s in seconds.items()
    ]
    c = report["circumstances"]
    return "\n".join(
        [
            f"{report['tensors']} tensors, {size / 1e9:.2f} GB; torch {c['versions']['torch']}; "
            f"medians of {c['rounds']} rounds after one",
            "",
            shared.table(["", "seconds", "GB/s", "peak memory / bytes written"], rows),
            f"\nsave / torch.save: {seconds['save'] / seconds['torch.save']:.2f}; load / torch.load: "
            f"{seconds['load, checksums verified'] / seconds['torch.load']:.2f}",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder by default)")
    parser.add_argument("--output", type=Path, help="write figures and circumstances as JSON")
    args = parser.parse_args()
    backend.prepare()
    backend.init_process_group(timeout_minutes=5)
    from megatron_evomoe.checkpoint import find, store
    from megatron_evomoe.checkpoint.record import Record
    from megatron_evomoe.config import CheckpointConfig
    from megatron_evomoe.parallel import rng

    built = build(args)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    record = Record(
        stage="warmup",
        kind="warmup",
        step=1,
        position=1,
        finished=False,
        layout=rng.layout(),
        vocab_size=32000,
        tokenizer_fingerprint="",
    )
    parts = {"modules": built.modules, "optimizer": built.optimizer, "scheduler": built.scheduler}
    plain = list(tensors_of(store._state(**parts, is_loading=False)))
    size = sum(t.numel() * t.element_size() for t in plain)

    def load() -> None:
        store.load_training_state(find.resolve(folder / "ours"), **parts, record=record)

    # Written to a new name and renamed, as a save must be that may be interrupted.
    def plain_save() -> None:
        torch.save(plain, folder / "plain.new")
        (folder / "plain.new").replace(folder / "plain.pt")

    actions: dict[str, Callable[[], Any]] = {
        "save": lambda: store.Saver(CheckpointConfig(keep=1)).save(
            folder / "ours", **parts, record=record, config_yaml=""
        ),
        "torch.save": plain_save,
        "load, checksums verified": load,
        "torch.load": lambda: [
            a.copy_(b) for a, b in zip(plain, torch.load(folder / "plain.pt"), strict=True)
        ],
    }
    with torch.no_grad():
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
        for _ in range(args.rounds + 1):
            for name, action in actions.items():
                found[name].append(measure(action))
    shutil.rmtree(folder)
    median = {
        name: [statistics.median(column) for column in zip(*values[1:], strict=True)]
        for name, values in found.items()
    }
    report = {
        "circumstances": shared.circumstances(rounds=args.rounds),
        "tensors": len(plain),
        "bytes": size,
        "seconds": {name: seconds for name, (seconds, _) in median.items()},
        "peak_bytes": {name: memory for name, (_, memory) in median.items()},
    }
    print(markdown(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
