"""``doctor``: list what this machine offers, and what is missing with its remedy."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import shutil
from pathlib import Path

REQUIRED = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "sentencepiece": "sentencepiece",
    "tokenizers": "tokenizers",
    "webdataset": "webdataset",
    "simplejpeg": "simplejpeg",
    "pillow": "PIL",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
SUPPORTED_CORE = ((0, 16, 1), (0, 20))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no flags."""


def run(args: argparse.Namespace) -> int:
    """Print the report; returns 1 if something required is missing or broken, for use as a health check."""
    problems: list[str] = []
    rows = [("Python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]
    for package, module in REQUIRED.items():
        rows.append((package, _version(package, module, problems)))
    rows += _devices(problems)
    rows.append(("free disk here", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    for problem in problems:
        print(f"problem: {problem}")
    print("ready" if not problems else f"{len(problems)} problem(s)")
    return int(bool(problems))


def _version(package: str, module: str, problems: list[str]) -> str:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        problems.append(f"{package} is not installed; remedy: pip install {package}")
        return "missing"
    if package == "megatron-core":
        parts = tuple(int(p) for p in version.split(".")[:3] if p.isdigit())
        if not SUPPORTED_CORE[0] <= parts < SUPPORTED_CORE[1]:
            problems.append(
                f"megatron-core {version} is not supported; remedy: pip install 'megatron-core>=0.16.1,<0.20'"
            )
        return version  # not imported, because that needs the adaptations of `parallel.cpu` first
    try:
        importlib.import_module(module)
    except Exception as error:
        problems.append(
            f"{package} {version} does not import ({error}); remedy: pip install --force-reinstall {package}"
        )
    return version


def _devices(problems: list[str]) -> list[tuple[str, str]]:
    try:
        import torch
    except Exception:
        return []
    if not torch.cuda.is_available():
        built = "a CPU build of torch" if torch.version.cuda is None else "no usable GPU or driver"
        return [("backend", f"gloo on CPU ({built})"), ("Transformer Engine", "not used without a GPU")]
    rows = [("backend", f"nccl, CUDA {torch.version.cuda}")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append((f"GPU {i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"))
    te = _optional("transformer_engine", "pip install 'megatron_evomoe[gpu]'; local layers run until then")
    apex = _optional(
        "apex",
        "build NVIDIA's apex from source (PyPI's apex is another package); weight gradients are not fused "
        "until then",
    )
    return [*rows, ("Transformer Engine", te), ("apex", apex)]


def _optional(module: str, remedy: str) -> str:
    try:
        found = importlib.import_module(module)
    except ImportError:
        return f"missing; {remedy}"
    except Exception as error:
        return f"does not import ({error}); {remedy}"
    return str(getattr(found, "__version__", "present"))
