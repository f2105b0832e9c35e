"""Models from the Hugging Face hub: pinned to a commit, safetensors only, no code."""

from __future__ import annotations

from pathlib import Path

from compress.core.errors import InputError

WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
UNWANTED = ("*/*",)  # other formats of the same weights


def snapshot(model: str, *, revision: str | None = None, offline: bool = False) -> tuple[Path, str]:
    """The folder of `model` in the hub's cache, and its commit. Downloads what is missing, unless `offline`.

    `revision` is a branch, tag or commit; the commit that it names now is what the run records.
    """
    _require_hub_id(model)
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        found = snapshot_download(
            model,
            revision=revision,
            local_files_only=offline,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
        )
    except errors.GatedRepoError as error:
        raise InputError(
            "the hub gives this model only to people who accepted its terms",
            where=model,
            hint=f"accept them at https://huggingface.co/{model} and log in with: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            "neither a folder here nor a model of the hub", where=model, hint="a private one needs: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"the hub has no revision {revision!r} of this model", where=model) from error
    except errors.LocalEntryNotFoundError as error:
        hint = "once downloaded, a model is used from the cache"
        raise InputError(_absent(offline), where=model, hint=hint) from error
    except errors.HfHubHTTPError as error:
        raise InputError(f"the hub answered with status {error.response.status_code}", where=model) from error
    except (HTTPError, OSError) as error:
        raise InputError(f"the download failed: {_first_line(error)}", where=model) from error
    folder = Path(found)
    if not any(folder.glob("*.safetensors")):
        raise InputError("the repository holds no safetensors weights; pickle files are never loaded", where=model)
    return folder, folder.name


def _require_hub_id(model: str) -> None:
    """Refuse what can only be meant as a path, before the network is asked."""
    path = Path(model)
    if path.exists():
        raise InputError("not a model folder: it is a file", where=model)
    if model.startswith((".", "/", "~")) or len(path.parts) > 2 or not model.strip():
        raise InputError("there is no such folder", where=model)
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise InputError("neither a folder here nor a possible id of a hub model (owner/name)", where=model) from error


def _absent(offline: bool) -> str:
    if offline:
        return "neither a folder here nor in the hub's cache, and the run is offline"
    return "neither a folder here nor in the hub's cache, and the hub cannot be reached"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
