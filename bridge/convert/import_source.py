"""What an import reads: a Hugging Face checkpoint, or a `torch_dist` one of either class of model."""

from pathlib import Path
from typing import Any

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.safetensors_folder import CONFIG_NAME
from bridge.torch_dist.checkpoint import MegatronCheckpoint, beside, read_config
from bridge.torch_dist.reader import is_torch_dist

Source = HuggingFaceCheckpoint | MegatronCheckpoint


def open_source(path: Path, hugging_face: Path | None) -> tuple[Source, Path]:
    """The source, whichever format it has, and the folder with its config.json.

    That of a `torch_dist` source is `hugging_face`, or else beside it.

    Raises:
        ValueError: it is not a whole MiniMax-M2, its config is not to be found, or `hugging_face` is not needed.
    """
    if (path / CONFIG_NAME).is_file() or not is_torch_dist(path):
        if hugging_face is not None:
            raise ValueError(f"{path}: is no torch_dist checkpoint and has a config.json; leave out hugging_face")
        source = HuggingFaceCheckpoint(path)
        return source, source.files.folder
    source = MegatronCheckpoint(path, None if hugging_face is None else read_config(hugging_face / CONFIG_NAME))
    return source, hugging_face or beside(source.files)


def counts(source: Source) -> dict[str, Any]:
    """What is in it, by the fields of `ImportSummary`."""
    if isinstance(source, MegatronCheckpoint):
        return {
            "tensors": len(source.files.shapes),
            "mtp_tensors": len(source.trained_mtp),
            "unneeded_tensors": 0,
            "other_tensors": source.other_tensors,
            "bytes_read": source.nbytes,
            "notes": tuple(source.notes),
        }
    return {
        "tensors": len(source.files.tensors),
        "mtp_tensors": len(source.mtp_tensors),
        "unneeded_tensors": len(source.unneeded_tensors),
        "other_tensors": 0,
        "bytes_read": source.files.nbytes,
        "notes": tuple(source.files.notes),
    }
