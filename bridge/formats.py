"""What people have in place of a checkpoint that is read here: how each is recognised, what it is, and what to do.

Tables by where it shows: in a file's first bytes, in what a folder holds, in config.json, in a distributed checkpoint's
metadata. Each `check_*` raises the sentence of the first row that fits, and says nothing otherwise: whether a
checkpoint is whole is judged by who reads it.
"""

import json
import re
from collections.abc import Callable, Iterable
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

MODEL_TYPE = "minimax_m2"
FORMAT_NAME = "metadata.json"  # of megatron-core: beside .metadata, names the format
BACKEND = "torch_dist"
HEAD_BYTES = 512


class Format(NamedTuple):
    """One that is not read here: `is_it` is asked of a file's first bytes, a folder, a config or keys."""

    is_it: Callable[[Any], bool]
    what: str
    remedy: str

    def refuse(self, where: object) -> ValueError:
        """The error to raise."""
        return ValueError(f"{where}: {self.what}; {self.remedy}")


def _refuse_first(formats: Iterable[Format], asked: Any, where: object) -> None:
    for one in formats:
        if one.is_it(asked):
            raise one.refuse(where)


# -------------------------------------------------------------------------------------------------------------- a file


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.lstrip().lower().startswith(starts)


_AGAIN = "download it again"
_PAGE_SUFFIXES = (".html", ".htm", ".md")  # may begin like a web page
FILES: tuple[Format, ...] = (
    Format(lambda head: not head, "is empty", _AGAIN),
    Format(_begins(b"version https://git-lfs", b"# xet version"), "is a git-lfs pointer and not the file that it "
           "stands for", "run `git lfs pull` in the folder, or download it from the hub"),
    Format(_begins(b"<!doctype", b"<html", b"<head", b"<?xml"), "is a web page saved under this name, as an error or a "
           "login page is", "download it again, with a token if the repository asks for one"),
    Format(_begins(b"entry not found", b"repository not found", b"invalid username or password", b"access to model"),
           "is the hub's error message saved under this name", "download it again, with a token if the repository asks "
           "for one"),
    Format(lambda head: not head.strip(b"\0"), "begins with zeros: a download that made room for the file and did not "
           "fill it", _AGAIN),
    Format(_begins(b"gguf"), "is llama.cpp's GGUF", "give the safetensors checkpoint that it was made from"),
    Format(_begins(b"pk\x03\x04", b"\x80\x02"), "is a file of torch.save under another name",
           "load it with transformers and save it with save_pretrained"),
)  # fmt: skip


def check_is_itself(path: Path) -> None:
    """A file is not something that stands in its place.

    Raises:
        ValueError: it is a pointer, a web page, an error message, empty; names the file and says what to do.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not (_begins(b"<")(head) and path.suffix.lower() in _PAGE_SUFFIXES):
        _refuse_first(FILES, head, path)


# What download programs lay beside a file, or under its name and more, until it is whole.
_PARTIAL = ("{}.incomplete", "{}.*.incomplete", "{}.part", "{}.crdownload", "{}.download", "{}.aria2", "{}.lock",
            ".cache/huggingface/download/{}.*.incomplete", ".cache/huggingface/download/{}.lock")  # fmt: skip


def unfinished_download(path: Path) -> Path | None:
    """What a download program has left of a file that is not there or, with aria2's record, not whole."""
    if path.exists():
        record = path.with_name(f"{path.name}.aria2")
        return record if record.is_file() else None
    return next((found for form in _PARTIAL for found in path.parent.glob(form.format(escape(path.name)))), None)


# ------------------------------------------------------------------------------------------------------------ a folder


def _holds(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _is_zarr(folder: Path) -> bool:
    found = [folder, *folder.glob("iter_*"), *folder.glob("release")]
    return any(backend(one) == "zarr" or next(one.glob("*/.zarray"), None) is not None for one in found)


_SAVE_PRETRAINED = "load it with transformers and save it with save_pretrained(safe_serialization=True)"
_ORIGINAL = "give the safetensors checkpoint that it was made from"
_LOAD_AND_SAVE = "load it with the Megatron-LM that wrote it and save it with --ckpt-format torch_dist"
A_DISTRIBUTED_FOLDER = Format(
    _holds(".metadata", "iter_*/.metadata", "release/.metadata"),
    "is a distributed checkpoint, expected a Hugging Face one",
    "`export` makes a Hugging Face checkpoint of it, and `verify` compares it",
)  # fmt: skip
A_HUGGING_FACE_FOLDER = Format(
    _holds("config.json"), "is a Hugging Face checkpoint, expected a distributed one (torch_dist)",
    "`import` makes a torch_dist checkpoint of it",
)  # fmt: skip
FOLDERS: tuple[Format, ...] = (
    Format(_is_zarr, "is a zarr checkpoint of megatron-core, which newer versions do not read either", _LOAD_AND_SAVE),
    Format(_holds("mp_rank_*/model*_rng.pt", "*/mp_rank_*/model*_rng.pt", "mp_rank_*/model_states.pt"),
           "is a legacy torch checkpoint of Megatron-LM (mp_rank_00/model_optim_rng.pt)", _LOAD_AND_SAVE),
    Format(_holds("adapter_config.json", "adapter_model.*"), "is a PEFT adapter, not a model",
           "load the base model with it, merge_and_unload, and save_pretrained"),
    Format(_holds("global_step*/", "zero_to_fp32.py", "*zero_pp_rank_*"), "is DeepSpeed's checkpoint",
           "run its zero_to_fp32.py with --safe_serialization, and lay config.json and the tokenizer beside"),
    Format(_holds("pytorch_model_fsdp*"), "is accelerate's sharded FSDP checkpoint",
           "run `accelerate merge-weights`, and lay config.json and the tokenizer beside"),
    Format(_holds("*.gguf", "*/*.gguf"), "holds llama.cpp's GGUF", _ORIGINAL),
    Format(_holds("pytorch_model*.bin", "pytorch_model.bin.index.json"), "holds pytorch_model*.bin, which is unpickled "
           "to be read", _SAVE_PRETRAINED),
    Format(_holds("consolidated*.pth", "*.pth", "*.pt", "*.ckpt"), "holds files of torch.save", _SAVE_PRETRAINED),
    Format(_holds("weights*.npz"), "is MLX's", _ORIGINAL),
    Format(_holds("tf_model*.h5", "*.h5"), "holds TensorFlow's weights", _SAVE_PRETRAINED),
    Format(_holds("flax_model*.msgpack", "*.msgpack"), "holds Flax's weights", _SAVE_PRETRAINED),
    Format(_holds("*.onnx"), "holds ONNX", _ORIGINAL),
    Format(_holds("*/config.json"), "holds folders with a config.json", "give one of these"),
)  # fmt: skip


def check_folder(folder: Path, also: Format) -> None:
    """A folder in which no checkpoint was found holds none of another format, nor `also`.

    Raises:
        ValueError: it does; names the format and says what to do.
    """
    if folder.is_dir():
        _refuse_first((also, *FOLDERS), folder, folder)


# --------------------------------------------------------------------------------------------------------- config.json

OTHER_MODELS = {
    "minimax_m3_vl": "MiniMax-M3",
    "minimax_m3": "MiniMax-M3",
    "minimax": "MiniMax-Text-01 or MiniMax-M1",
    "minimax_text_01": "MiniMax-Text-01",
    "minimax_m1": "MiniMax-M1",
    "minimax_vl_01": "MiniMax-VL-01",
}


def check_model(config: dict[str, Any], where: object) -> None:
    """A config.json that names its model names MiniMax-M2.

    Raises:
        ValueError: it names another.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind != MODEL_TYPE:
        known = OTHER_MODELS.get(kind.lower())
        raise ValueError(
            f"{where}: model_type is {kind!r}, {f'{known}, ' if known else ''}another architecture than {MODEL_TYPE!r} "
            "(MiniMax-M2, M2.1, M2.5, M2.7), which alone is known here; give one of those"
        )


def _section(config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("quantization_config") or config.get("compression_config") or {}
    return found if isinstance(found, dict) else {}


def _method(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda config: str(_section(config).get("quant_method", "")).lower().startswith(names)


def _is_mlx(config: dict[str, Any]) -> bool:
    own = config.get("quantization")
    either = own if isinstance(own, dict) else _section(config)
    return "quant_method" not in either and {"bits", "group_size"} <= either.keys()


def _is_modelopt(config: dict[str, Any]) -> bool:
    section = _section(config)
    return _method("modelopt", "nvfp4")(config) or "quant_algo" in section or "modelopt" in str(section.get("producer"))


def _is_bitsandbytes(config: dict[str, Any]) -> bool:
    section = _section(config)
    return _method("bitsandbytes")(config) or bool(section.get("load_in_4bit") or section.get("load_in_8bit"))


_RELEASED = (
    "give the released FP8 checkpoint (fp8) or one in bfloat16 (if these weights are bfloat16 already, remove the "
    "quantisation from config.json); `plan` works with this one, since it needs the sizes alone"
)
QUANTISATIONS: tuple[Format, ...] = (
    Format(_method("awq"), "is quantised by AWQ (4-bit integers)", _RELEASED),
    Format(_method("gptq"), "is quantised by GPTQ (packed integers)", _RELEASED),
    Format(_method("auto-round", "auto_round", "intel/auto-round"), "is quantised by AutoRound", _RELEASED),
    Format(_is_modelopt, "is quantised by NVIDIA's ModelOpt (NVFP4, FP8 with one scale a tensor, ...)", _RELEASED),
    Format(_method("compressed-tensors", "compressed_tensors"), "is in the compressed-tensors format (llm-compressor)",
           _RELEASED),
    Format(_is_bitsandbytes, "is quantised by bitsandbytes", _RELEASED),
    Format(_is_mlx, "is quantised by MLX", _RELEASED),
    Format(_method("gguf"), "is GGUF", _RELEASED),
    Format(_method("mxfp", "nvfp"), "is quantised to a microscaling format", _RELEASED),
)  # fmt: skip


def check_quantisation(config: dict[str, Any], where: object) -> None:
    """A config.json says of no other quantisation than float8 in blocks (`quant_method: fp8`).

    Raises:
        ValueError: it does; names the method and says what to do.
    """
    method = _section(config).get("quant_method")
    said = where if method is None else f"{where}: quant_method is {method!r}"
    _refuse_first(QUANTISATIONS, config, said)
    if isinstance(method, str) and method != "fp8":
        raise ValueError(f"{said}, which is not read here; {_RELEASED}")


# -------------------------------------------------------------------------------------------- a distributed checkpoint


_HALF_OF_AN_EXPERT = re.compile(r"linear_fc1\.weight\d*_[wv]$")


class Distributed(NamedTuple):
    """What metadata.json calls a checkpoint (None: the file is not there), and the keys of its tensors."""

    backend: str | None
    keys: Iterable[str]

    def has_split_experts(self) -> bool:
        """Whether gate and up are under keys of their own."""
        return any(map(_HALF_OF_AN_EXPERT.search, self.keys))


DISTRIBUTED: tuple[Format, ...] = (
    Format(lambda found: found.backend == "fsdp_dtensor" or (found.backend is None and found.has_split_experts()),
           "is a checkpoint of Megatron-FSDP (fsdp_dtensor)", _LOAD_AND_SAVE),
    Format(lambda found: found.backend is None, f"has no {FORMAT_NAME}: it is torch's own distributed checkpoint "
           "(torch_dcp, fsdp_dtensor), or the save was not finished", _LOAD_AND_SAVE),
    Format(lambda found: found.backend == BACKEND and found.has_split_experts(), "was saved with "
           "singleton_local_shards, which gives gate and up of an expert keys of their own (linear_fc1.weight_w)",
           "save it again without (the default of megatron-core)"),
)  # fmt: skip


def backend(folder: Path) -> str | None:
    """The format that a distributed checkpoint's metadata.json names; None without one that can be read."""
    path = folder / FORMAT_NAME
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        return None
    return str(found.get("sharded_backend")) if isinstance(found, dict) else None


def check_distributed(folder: Path, keys: Iterable[str]) -> None:
    """A distributed checkpoint is megatron-core's `torch_dist`, with the keys that it has by default.

    Raises:
        ValueError: it is another format, named if it is known.
    """
    found = Distributed(backend(folder), keys)
    _refuse_first(DISTRIBUTED, found, folder)
    if found.backend != BACKEND:
        raise ValueError(
            f"{folder}: {FORMAT_NAME} names the format {found.backend!r}, expected {BACKEND!r}; {_LOAD_AND_SAVE}"
        )
