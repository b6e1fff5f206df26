"""megatron-core's fused kernels that this model may have: what each is set by, and where it runs.

A model has none of them unless asked for; `minimax-m2 train` takes those that were recorded with its settings, and
`bridge.training.speed_defaults` has a line of gain for each of those. A fusion computes what the separate operations
do, in another order of rounding: losses and gradients agree to rounding, not bit for bit. `record` is the benchmark
that measured it with this model alone.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # megatron-core takes seconds to import, and settings are read without it
    from bridge.model.layer_spec import Backend

FusionName = Literal[
    "none", "router", "permute", "cross_entropy", "cross_entropy_te", "gradient_accumulation", "grouped_gemm"
]


class Fusion(NamedTuple):
    """One row: what it fuses, `TransformerConfig` fields, the backends that have it, and the record of its speed.

    `environment` is what Transformer Engine reads from the process's environment.
    """

    fuses: str
    settings: Mapping[str, Any]
    backends: tuple["Backend", ...] = ("transformer_engine",)
    record: str | None = None
    environment: Mapping[str, str] = {}


RECORD = "train_speed_h200.json"
FUSIONS: dict[str, Fusion] = {
    "router": Fusion("scores, choice and weights of the experts", {"moe_router_fusion": True}, record=RECORD),
    "permute": Fusion("tokens to their experts' order and back", {"moe_permute_fusion": True}, record=RECORD),
    "cross_entropy": Fusion(
        "logits to losses, compiled by torch",
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"},
        ("transformer_engine", "local"),
        RECORD,
    ),
    # megatron-core warns that it has been unstable.
    "cross_entropy_te": Fusion(
        "logits to losses, Transformer Engine's kernel",
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
    ),
    "gradient_accumulation": Fusion(
        "weights' gradients added to their float32 sums by what makes them, those of experts in one kernel",
        {"gradient_accumulation_fusion": True},
        record=RECORD,
    ),
    "grouped_gemm": Fusion(
        "the experts' products in one CUTLASS kernel, but for weights' gradients and FP8",
        {},
        record=RECORD,
        environment={"NVTE_USE_CUTLASS_GROUPED_GEMM": "1"},
    ),
}


def fusion_settings(names: Iterable[str]) -> dict[str, Any]:
    """The `TransformerConfig` fields of some fusions; of "none" there are none.

    Raises:
        ValueError: "none" is not alone, or two fusions want the same field otherwise.
    """
    chosen = [name for name in names if name != "none"]
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


def fusion_environment(names: Iterable[str]) -> dict[str, str]:
    """What some fusions want in `os.environ` for as long as the model is trained."""
    return {key: value for name in names if name != "none" for key, value in FUSIONS[name].environment.items()}


def check_fusions(names: Iterable[str], backend: "Backend") -> None:
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
