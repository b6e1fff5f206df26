"""Where a checkpoint's files are: a local folder, or a repository of the Hugging Face hub."""

from pathlib import Path


def checkpoint_folder(path_or_hub_id: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of that name if there is one (no network is touched), else the hub's repository, downloaded.

    Raises:
        ValueError: neither exists, or the hub cannot be reached.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or len(folder.parts) != 2:
        what = "is no folder" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {what}; give the folder of a checkpoint, or a hub id such as owner/name")
    from huggingface_hub import snapshot_download  # 0.15 s, which a local folder need not wait for
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_hub_id), revision=revision))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{path_or_hub_id}: no such local folder, and the hub did not deliver a repository of that name "
            f"({error}); give an existing folder, or check the id and the network"
        ) from error
