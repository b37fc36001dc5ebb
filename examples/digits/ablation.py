"""Compare sources of experts and routers at the same training budget, over several seeds, in one table.

    python examples/digits/ablation.py --data DIR --tower DIR --output DIR --seeds 1 2 3 [--jobs 2]
    python examples/digits/ablation.py --output DIR --report       the table again, from what is on disk

Every seed trains `align` and `warmup` once; each row then continues from there for 2 x STEPS optimizer steps:

    dense                 2 x STEPS steps of the dense model
    replicate + ROUTER    2 x STEPS steps of router and experts (MoE-LLaVA's setting)
    RULE + ROUTER         STEPS steps of `evolve` under RULE, then STEPS steps of the router alone

Each seed is one process with one thread; `--jobs` of them run at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).resolve().parent
RULES = ("delta", "ema", "printed")
ROUTERS = ("linear", "dtr")


def stages(steps: int, warmup: int) -> list[dict[str, Any]]:
    """Tree of stages: warmup, its continuations, and the routed stages that follow each rule."""
    tuned = {"kind": "route", "load": "warmup", "trainable": ["router", "experts"], "train_iters": 2 * steps}
    out: list[dict[str, Any]] = [
        {"name": "align", "train_iters": 60, "conversation_template": "plain"},
        {"name": "warmup", "train_iters": warmup, "lr": 1.5e-3},
        {"name": "dense", "load": "warmup", "train_iters": 2 * steps},
    ]
    out += [
        {"name": f"replicate + {router}", "router": router, "expert_init": "replicate", **tuned}
        for router in ROUTERS
    ]
    for rule in RULES:
        out.append(
            {
                "name": f"evolve {rule}",
                "kind": "evolve",
                "load": "warmup",
                "evolution_rule": rule,
                "train_iters": steps,
            }
        )
        out += [
            {
                "name": f"{rule} + {router}",
                "kind": "route",
                "load": f"evolve {rule}",
                "router": router,
                "train_iters": steps,
            }
            for router in ROUTERS
        ]
    return out


def configuration(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Configuration of one seed's run."""
    run = yaml.safe_load((HERE / "quickstart.yaml").read_text())
    run["data"] |= {
        "tokenizer": str(args.data / "tokenizer.model"),
        "train_data": [str(args.data / "instruct")],
        "eval_data": [str(args.data / "heldout")],
    }
    run["parallel"] = {"use_distributed_optimizer": False}
    run["train"] |= {
        "seed": seed,
        "micro_batch_size": args.batch,
        "global_batch_size": args.batch,
        "eval_shuffles": 4,
    }
    run["checkpoint"] = {"save": str(args.output / f"seed{seed}"), "pretrained_checkpoint": str(args.tower)}
    run["log"] = {"log_interval": 100}
    run["stages"] = stages(args.steps, args.warmup)
    run["stages"][0]["train_data"] = [str(args.data / "captions")]
    return run


def train(args: argparse.Namespace) -> None:
    """Train all seeds, `--jobs` at a time. A seed that was interrupted resumes."""
    waiting, running = list(args.seeds), []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            seed = waiting.pop(0)
            folder = args.output / f"seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "ablation.yaml").write_text(yaml.safe_dump(configuration(args, seed), sort_keys=False))
            command = [
                sys.executable,
                "-m",
                "megatron_evomoe",
                "train",
                "--config",
                str(folder / "ablation.yaml"),
            ]
            with open(folder / "log.txt", "a") as log:
                job = subprocess.Popen(
                    command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
                running.append((seed, job))
        seed, job = running.pop(0)
        if job.wait():
            raise SystemExit(f"seed {seed} failed; see {args.output / f'seed{seed}' / 'log.txt'}")


def read_seed(folder: Path) -> dict[str, dict[str, float]]:
    """Measures of each stage by name, in per cent and as cosines."""
    rows = {row["stage"]: row for row in json.loads((folder / "summary.json").read_text())}
    found: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        kinds = row["accuracy"]
        measures = {"accuracy": 100 * kinds["overall"]}
        for group in ("single", "grid", "text"):
            measures[group] = 100 * float(np.mean([v for k, v in kinds.items() if k.startswith(group)]))
        shuffled = [v["overall"] for k, v in row.items() if k.startswith("shuffled")]
        if shuffled:
            measures["shuffle drop"] = measures["accuracy"] - 100 * float(np.mean(shuffled))
        found[name] = measures
    for line in (folder / "diagnostics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "similarity":
            cosines = np.array(record["of"]["weights"])
            pairs = ~np.eye(cosines.shape[-1], dtype=bool)
            found[record["stage"]]["similarity"] = float(cosines[:, pairs].mean())
        elif record["kind"] == "shares":
            found[record["stage"]]["divergence"] = float(np.mean(record["divergence"]))
    return found


def report(args: argparse.Namespace) -> str:
    """Markdown table with mean ± standard deviation over the seeds on disk."""
    seeds = [read_seed(p) for p in sorted(args.output.glob("seed*")) if (p / "diagnostics.jsonl").exists()]
    names = [
        s["name"] for s in stages(1, 1) if s["name"] != "align" and all(s["name"] in seed for seed in seeds)
    ]
    columns = {
        "accuracy": 1,
        "single": 1,
        "grid": 1,
        "text": 1,
        "shuffle drop": 2,
        "similarity": 4,
        "divergence": 4,
    }
    lines = ["| experts and router | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = []
        for column, digits in columns.items():
            values = [seed[name][column] for seed in seeds if column in seed[name]]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.{digits}f} ± {spread:.{digits}f}" if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return f"{len(seeds)} seeds\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="what build_data.py wrote")
    parser.add_argument("--tower", type=Path, help="what pretrain_tower.py wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warmup", type=int, default=1100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.report:
        if args.data is None or args.tower is None:
            parser.error("--data and --tower are needed to train")
        train(args)
    print(report(args))


if __name__ == "__main__":
    main()
