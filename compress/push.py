"""Upload of an artifact to the Hugging Face hub: verified first, private by default, nothing but its own files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from compress.core.errors import ArtifactError, EnvironmentRefused, InputError, UsageError
from compress.core.manifest import MANIFEST_NAME

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class PushPlan:
    """What would be uploaded: the files that the manifest names, and the manifest. Nothing else in the folder goes."""

    folder: Path
    repository: str
    files: dict[str, int]
    base_model: str | None
    licence: str | None

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def plan_push(folder: Path, repository: str) -> PushPlan:
    """Verify the artifact and list its files. ArtifactError if it does not verify, UsageError for a bad repository."""
    from compress.core.artifact import open_artifact
    from compress.core.verify import verify

    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"{repository!r} is no repository", hint="a repository is written owner/name")
    artifact = open_artifact(folder)
    failed = [check for check in verify(folder, library=True).checks if not check.ok]
    if failed:
        raise ArtifactError(
            f"the artifact does not verify and is not uploaded: {failed[0].name}: {failed[0].detail}", where=str(folder)
        )
    sizes = {record.path: record.size for record in artifact.manifest.files}
    sizes[MANIFEST_NAME] = (Path(folder) / MANIFEST_NAME).stat().st_size
    lineage = artifact.manifest.lineage
    return PushPlan(
        Path(folder), repository, dict(sorted(sizes.items())), lineage.get("source"), lineage.get("licence")
    )


def push_artifact(plan: PushPlan, *, private: bool = True, message: str = "Upload compressed model") -> str:
    """Create the repository if it is missing, upload the plan's files in one commit, and give its address.

    InputError if the hub refuses, EnvironmentRefused if it cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    api = HfApi()
    try:
        url = api.create_repo(plan.repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=plan.repository,
            folder_path=plan.folder,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in plan.files],
            commit_message=message,
        )
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())
        hint = "log in with `hf auth login`, and check that you may write there"
        raise InputError(f"the hub refuses the upload: {reason}", where=plan.repository, hint=hint) from error
    except (HTTPError, OSError) as error:
        raise EnvironmentRefused(f"the hub cannot be reached: {error}", where=plan.repository) from error
    return str(url)
