"""The model's sizes and constants, read from a Hugging Face `config.json`.

Dialects of that file exist: the released one (`rotary_dim` and `rope_theta` at top level), the one that transformers 5
writes (`rope_parameters`), and that of older tools (`rope_scaling` of type "default"). All give the same `ModelConfig`.
A file that contradicts itself, or asks for something that MiniMax-M2 does not have, is an error: reading on would give
a different model without a warning. Field names are Hugging Face's. Keys that change neither the computation nor what
the files may hold are not kept here (those of training: dropout, the router's jitter); the bridge copies the file.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal

FP8_BLOCK = 128
ScaleFormat = Literal["float", "ue8m0"]  # of block scales: any float32, or powers of two

# Keys that some config.json files carry, with the only values under which the formulas of this package hold.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("minimax_m2",),
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "use_qk_norm": (True,),
    "qk_norm_type": ("per_layer",),
    "use_routing_bias": (True,),
    "shared_intermediate_size": (0, None),
    "sliding_window": (None,),
    "tie_word_embeddings": (False,),
    "attention_bias": (False, None),
}

_QUANTIZATION_FIXED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("float8_e4m3fn", "e4m3", None),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": ("float", "ue8m0", None),
}


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """FP8 storage: one float32 `scale_inv` for each `block_size` x `block_size` block of a quantised matrix.

    With `scale_fmt` "ue8m0" every scale is a power of two, and whoever loads the checkpoint counts on it.
    """

    block_size: int = FP8_BLOCK
    scale_fmt: ScaleFormat = "float"
    modules_to_not_convert: tuple[str, ...] = ("gate", "e_score_correction_bias", "lm_head")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one MiniMax-M2 model; the defaults are `transformers`' `MiniMaxM2Config`, which are M2's.

    Raises:
        ValueError: a size is not a positive integer, heads do not divide into groups, `rotary_dim` is odd or larger
            than `head_dim`, or more experts are chosen than there are.
    """

    num_hidden_layers: int = 62
    hidden_size: int = 3072
    vocab_size: int = 200064
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    head_dim: int = 128
    rotary_dim: int  # no default: transformers 5.0 to 5.17 rotated every channel where it was missing, silently wrong
    rope_theta: float = 5_000_000.0
    intermediate_size: int = 1536
    num_local_experts: int = 256
    num_experts_per_tok: int = 8
    rms_norm_eps: float = 1e-6
    router_aux_loss_coef: float = 0.001
    max_position_embeddings: int = 196608
    initializer_range: float = 0.02
    quantization: QuantizationConfig | None = None
    num_mtp_modules: int | None = None  # layers past the last that a checkpoint may hold; None: any number

    @property
    def block_size(self) -> int:
        """Rows and columns of an FP8 block; the released models' where this one is not quantised."""
        return (self.quantization or QuantizationConfig()).block_size

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type is int:
                _require_positive_int(field.name, getattr(self, field.name))
        mtp = self.num_mtp_modules
        if mtp is not None and (isinstance(mtp, bool) or not isinstance(mtp, int) or mtp < 0):
            raise ValueError(f"num_mtp_modules must be an integer, 0 or more, found {mtp!r}")
        for name in ("rope_theta", "rms_norm_eps"):
            _require_positive_number(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by num_key_value_heads "
                f"({self.num_key_value_heads}): each key/value head serves the same number of query heads"
            )
        if self.rotary_dim > self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_dim must be even and at most head_dim ({self.head_dim}), found {self.rotary_dim}: "
                "half-split rotation pairs channel i with channel i + rotary_dim/2"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most num_local_experts "
                f"({self.num_local_experts})"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed config.json, in either dialect.

        Missing keys take `transformers`' defaults, except the rotary width, which must be stated.
        Source: `transformers` minimax_m2: MiniMaxM2Config; the released models' config.json.

        Raises:
            ValueError: a key contradicts another or asks for something MiniMax-M2 does not have; names the key, what
                was found and what is supported.
        """
        _require_fixed(config, _FIXED, "config.json")
        if "model_type" not in config:
            raise ValueError("config.json has no model_type; expected 'minimax_m2'")
        head_dim = cls.head_dim if config.get("head_dim") is None else config["head_dim"]
        _require_positive_int("head_dim", head_dim)
        same_name = {field.name for field in fields(cls)} - {"head_dim", "rotary_dim", "rope_theta", "quantization"}
        given = {name: config[name] for name in same_name if config.get(name) is not None}
        _check_attention_kinds(config.get("attn_type_list"), given.get("num_hidden_layers", cls.num_hidden_layers))
        return cls(
            **given,
            head_dim=head_dim,
            quantization=_read_quantization(config.get("quantization_config")),
            **_read_rope(config, head_dim, default_theta=cls.rope_theta),
        )


def _check_attention_kinds(kinds: Any, num_hidden_layers: Any) -> None:
    """`attn_type_list` has an entry for each layer, and all of them are softmax attention."""
    if kinds is None or kinds == []:
        return
    if not isinstance(kinds, list) or any(kind != 1 for kind in kinds):
        found = f"[{', '.join(sorted(set(map(repr, kinds))))}]" if isinstance(kinds, list) else repr(kinds)
        raise ValueError(f"attn_type_list must hold only 1 (softmax attention), found {found}")
    if len(kinds) != num_hidden_layers:
        raise ValueError(
            f"attn_type_list has {len(kinds)} entries and num_hidden_layers is {num_hidden_layers!r}; one of them is "
            "wrong: a layer has one entry"
        )


def _require_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63:
        raise ValueError(f"{name} must be a positive integer, found {value!r}")


def _require_positive_number(name: str, value: Any) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    # numbers.Real does not declare that an int can be compared with it
    if not is_number or not 0 < value <= sys.float_info.max:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name} must be a positive number, found {value!r}")


def _require_fixed(mapping: Mapping[str, Any], supported: dict[str, tuple[Any, ...]], where: str) -> None:
    for key, values in supported.items():
        if key in mapping and mapping[key] not in values:
            raise ValueError(
                f"{where}: {key} is {mapping[key]!r}, but only {' or '.join(map(repr, values))} is supported: "
                "this is not a MiniMax-M2 computation"
            )


def _read_rope(config: Mapping[str, Any], head_dim: int, default_theta: float) -> dict[str, Any]:
    """`rotary_dim` and `rope_theta`, from every key in which a dialect has them; all that are there must agree."""
    places: dict[str, Mapping[str, Any]] = {"": config}
    for where in ("rope_parameters", "rope_scaling"):
        section = config.get(where) or {}
        if not isinstance(section, Mapping):
            raise ValueError(f"{where} must be an object, found {section!r}")
        for key in ("rope_type", "type"):
            if section.get(key) not in (None, "default"):
                raise ValueError(
                    f"{where}: rope_type is {section[key]!r}, but MiniMax-M2 uses 'default' (no RoPE scaling)"
                )
        places[f"{where}."] = section

    widths: dict[str, float] = {}
    thetas: dict[str, float] = {}
    for where, section in places.items():
        width, factor, theta = (section.get(key) for key in ("rotary_dim", "partial_rotary_factor", "rope_theta"))
        if width is not None:
            _require_positive_int(f"{where}rotary_dim", width)
            widths[f"{where}rotary_dim"] = width
        if factor is not None:
            _require_positive_number(f"{where}partial_rotary_factor", factor)
            widths[f"{where}partial_rotary_factor x head_dim"] = round(factor * head_dim, 6)  # 58/112 * 112 < 58
        if theta is not None:
            _require_positive_number(f"{where}rope_theta", theta)
            thetas[f"{where}rope_theta"] = theta
    if not widths:
        raise ValueError(
            "config.json gives neither rotary_dim nor rope_parameters.partial_rotary_factor; add rotary_dim "
            f"(released models: 64; all channels: {head_dim}). Assuming full rotary here would be silently wrong"
        )
    width = _agreed(widths)
    if width != int(width):
        raise ValueError(f"the rotary width must be a whole number of channels, found {widths}")
    return {"rotary_dim": int(width), "rope_theta": float(_agreed(thetas) if thetas else default_theta)}


def _agreed(candidates: dict[str, float]) -> float:
    if len(set(candidates.values())) > 1:
        raise ValueError(f"config.json contradicts itself: {candidates}; make them equal or keep one")
    return next(iter(candidates.values()))


def _read_quantization(section: Mapping[str, Any] | None) -> QuantizationConfig | None:
    if section is None or section == {}:
        return None
    if not isinstance(section, Mapping):
        raise ValueError(f"quantization_config must be an object, found {section!r}")
    if "quant_method" not in section:
        raise ValueError("quantization_config has no quant_method; expected 'fp8'")
    _require_fixed(section, _QUANTIZATION_FIXED, "quantization_config")
    block = section.get("weight_block_size") or [FP8_BLOCK, FP8_BLOCK]
    if not isinstance(block, list) or len(block) != 2 or block[0] != block[1]:
        raise ValueError(f"weight_block_size must be two equal sizes such as [128, 128], found {block!r}")
    _require_positive_int("weight_block_size", block[0])
    scale_fmt, excluded = section.get("scale_fmt") or "float", _read_excluded(section)
    excludes = {} if excluded is None else {"modules_to_not_convert": excluded}
    return QuantizationConfig(block_size=block[0], scale_fmt=scale_fmt, **excludes)


def _read_excluded(section: Mapping[str, Any]) -> tuple[str, ...] | None:
    """`modules_to_not_convert` or, under another name, `ignored_layers`; None if neither is given."""
    given = {key: section[key] for key in ("modules_to_not_convert", "ignored_layers") if section.get(key) is not None}
    for key, modules in given.items():
        if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
            raise ValueError(f"{key} must be a list of names, found {modules!r}")
    if len({frozenset(modules) for modules in given.values()}) > 1:
        raise ValueError(f"quantization_config contradicts itself: {given}; make them equal or keep one")
    return next((tuple(modules) for modules in given.values()), None)
