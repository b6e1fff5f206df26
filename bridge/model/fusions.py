"""megatron-core's fused kernels that this model may have: what each is set by, where it runs, and what it gains.

In bfloat16 with Transformer Engine a model has those of `MODEL_DEFAULTS`, unless told otherwise; `minimax-m2 train` has
all that gain something where that is recorded (`bridge.training.speed_defaults`). A fusion computes what the separate
operations do, in another order of rounding: losses and gradients agree to rounding, not bit for bit.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from packaging.version import Version

if TYPE_CHECKING:  # megatron-core takes seconds to import, and settings are read without it
    from bridge.model.layer_spec import Backend

FusionName = Literal[
    "none", "router", "permute", "cross_entropy", "cross_entropy_te", "gradient_accumulation", "grouped_gemm"
]


class Fusion(NamedTuple):
    """One row: what it fuses, `TransformerConfig` fields, its measured gain, and the backends that have it.

    `gain` is of the record `RECORD`: what it saves of the 250 ms in which the GPU is busy in a step with CUDA graphs
    and no fusion. `environment` is what Transformer Engine reads from the process's environment.
    """

    fuses: str
    settings: Mapping[str, Any]
    gain: str
    backends: tuple["Backend", ...] = ("transformer_engine",)
    environment: Mapping[str, str] = {}


# One H200, four layers of true width. All that gain: 204 ms, and 1.35 times the speed of eager steps without any.
RECORD = "train_speed_h200_fusions.json"
FUSIONS: dict[FusionName, Fusion] = {
    "router": Fusion("scores, choice and weights of the experts", {"moe_router_fusion": True}, gain="3 ms"),
    "permute": Fusion("tokens to their experts' order and back", {"moe_permute_fusion": True}, gain="20 ms"),
    "cross_entropy": Fusion(
        "logits to losses, compiled by torch",
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"},
        gain="6 ms",
        backends=("transformer_engine", "local"),
    ),
    "cross_entropy_te": Fusion(
        "logits to losses, Transformer Engine's kernels; two numbers a token are kept, and the logits in bfloat16",
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
        gain="10 ms",
    ),
    "gradient_accumulation": Fusion(
        "weights' gradients added to their float32 sums by what makes them: those of experts in one kernel, an "
        "embedding's to the rows that were looked up; experts that do so have SwiGLU of `compiled.experts` too",
        {"gradient_accumulation_fusion": True},
        gain="20 ms, and more of the processor's time",
    ),
    "grouped_gemm": Fusion(
        "the experts' products in one CUTLASS kernel, but for weights' gradients and FP8, where Transformer Engine "
        "makes them: not in layers of `bridge.model.expert_products`",
        {},
        gain="none of the GPU's time; 64 launches in place of 2048, which are the processor's",
        environment={"NVTE_USE_CUTLASS_GROUPED_GEMM": "1"},
    ),
}


def default_cross_entropy() -> FusionName:
    """The one of the two that a model has by default here.

    Transformer Engine before 2.18 rounded gradients of logits to bfloat16 before it multiplied them, for which
    megatron-core 0.19 warns of its kernels, and before 2.20 kept them in float32. The default is what was measured.
    """
    try:
        new = Version(version("transformer-engine")) >= Version("2.20")
    except PackageNotFoundError:
        new = False
    return "cross_entropy_te" if new else "cross_entropy"


CROSS_ENTROPY = default_cross_entropy()
# Those that need nothing around the model, and with those that need `main_grad` or an environment all.
MODEL_DEFAULTS: tuple[FusionName, ...] = ("router", "permute", CROSS_ENTROPY)
FASTEST: tuple[FusionName, ...] = (*MODEL_DEFAULTS, "gradient_accumulation", "grouped_gemm")


def chosen_settings(names: Iterable[FusionName]) -> dict[str, Any]:
    """The `TransformerConfig` fields that some fusions set; of "none" there are none.

    Raises:
        ValueError: "none" is not alone, or two fusions want the same field otherwise.
    """
    names = tuple(names)
    chosen: list[FusionName] = [name for name in names if name != "none"]
    if chosen and "none" in names:
        raise ValueError(f"fusions: found none beside {', '.join(chosen)}; leave none out, or the others")
    settings: dict[str, Any] = {}
    for name in chosen:
        for field, value in FUSIONS[name].settings.items():
            if settings.setdefault(field, value) != value:
                raise ValueError(
                    f"fusions: {', '.join(chosen)} want {field} to be {settings[field]!r} and {value!r}; choose one"
                )
    return settings


def fusion_settings(names: Iterable[FusionName]) -> dict[str, Any]:
    """The fields of a model that has some fusions and no others: as `chosen_settings`, the others off."""
    switches = {field for fusion in FUSIONS.values() for field, value in fusion.settings.items() if value is True}
    return dict.fromkeys(sorted(switches), False) | chosen_settings(names)


def fusion_environment(names: Iterable[FusionName]) -> dict[str, str]:
    """What some fusions want in `os.environ` for as long as the model is trained."""
    return {key: value for name in names if name != "none" for key, value in FUSIONS[name].environment.items()}


def check_fusions(names: Iterable[FusionName], backend: "Backend") -> None:
    """Refuse fusions that a backend has no kernels for.

    Raises:
        ValueError: names them, and says what they need.
    """
    lacking = [name for name in names if name != "none" and backend not in FUSIONS[name].backends]
    if lacking:
        raise ValueError(
            f"fusions: {', '.join(lacking)} need Transformer Engine and a GPU, and the layers here are of the backend "
            f"{backend!r}; leave them out, or run where both are"
        )
