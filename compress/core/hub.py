"""Models from the Hugging Face hub: pinned to a commit, safetensors only, no code."""

from __future__ import annotations

from pathlib import Path

from compress.core.errors import InputError

PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")


def snapshot(model: str, *, revision: str | None = None, offline: bool = False) -> tuple[Path, str]:
    """Download `model` to the hub's cache (offline: take it from there); return its folder and commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(model, revision=revision, local_files_only=offline, allow_patterns=list(PATTERNS))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(f"neither a folder nor a model of the hub: {error}", where=model) from error
    return folder, folder.name
