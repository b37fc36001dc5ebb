"""Uploads an exported directory to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from megatron_evomoe.config import ConfigError


def push(directory: Path, repository: str, *, private: bool = False) -> str:
    """Upload `directory` to a repository, which is created if it does not exist, and return its address.

    Raises:
        ConfigError: huggingface_hub is not installed, there is no login, or the hub cannot be reached or
            refuses. The directory remains.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ConfigError("--push-to-hub needs huggingface_hub: pip install huggingface_hub") from None
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(directory), commit_message="EvoMoE export")
    except Exception as error:  # no token, no network, no access: a dozen types of two HTTP libraries
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{directory} is written, but could not be uploaded to {repository}: {type(error).__name__}: "
            f"{reason[:300]}. Log in with `hf auth login` (or set HF_TOKEN), check the network, and upload "
            f"it with `hf upload {repository} {directory}`"
        ) from None
    return f"https://huggingface.co/{repository}"
