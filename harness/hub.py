"""The hub's copy of a registered model: from its cache, else downloaded, else one line that says what to do."""

from __future__ import annotations

from pathlib import Path

from pruneval.harness.errors import UserError
from pruneval.harness.model_files import FILES, check
from pruneval.harness.models import ModelEntry, families


def fetch(row: ModelEntry) -> Path:
    """The folder of a registered hub model. Raises: UserError when it is neither here nor within reach."""
    from huggingface_hub import constants, get_session, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(
            snapshot_download(
                row.hub_id, revision=row.revision or None, allow_patterns=list(FILES), local_files_only=True
            )
        )
        if _complete(folder):
            return folder
    except (OSError, ValueError):
        pass
    if constants.HF_HUB_OFFLINE:
        raise UserError(_advice(row, "HF_HUB_OFFLINE is set"))
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # whatever its library raises; a download would first retry for half a minute
        raise UserError(_advice(row, f"the hub could not be reached ({type(error).__name__})")) from error
    try:
        return Path(snapshot_download(row.hub_id, revision=row.revision or None, allow_patterns=list(FILES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(_advice(row, f"the hub could not be reached ({type(error).__name__})")) from error


def _complete(folder: Path) -> bool:
    try:
        check(folder, families())
    except UserError:
        return False
    return True


def _advice(row: ModelEntry, why: str) -> str:
    pinned = f" --revision {row.revision}" if row.revision else ""
    return (
        f"model {row.name!r} is not on this machine and {why}; where there is a network run "
        f"`hf download {row.hub_id}{pinned}`, or point at a copy with --model /path/to/folder or "
        f"PRUNEVAL_MODELS=/folder/that/holds/{row.name}"
    )
