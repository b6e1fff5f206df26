"""What `bench train` compares: a row is a set of overrides of one training step, and says what it needs.

`PEER_FLAGS` are what the provider of megatron-bridge 0.6.2 for this model sets otherwise than `bridge.model.config`
without fusions, on a GPU with Transformer Engine (`tests/bridge/plugins/test_megatron_bridge_flags.py` holds them to
it), but for `ACCUMULATED`: it asks for that where Transformer Engine is installed, and its model cannot be built then
without an extension of APEX. `bridge.build_model` builds it, so that there is a row with it too. A row that
`bridge.model.safe_settings` refuses is written as what it says; one that `lifts` a refusal is tried all the same, last,
and what happens is written down.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge.model.fusions import FASTEST, FUSIONS, FusionName
from bridge.model.layer_spec import Backend, minimax_m2_block_spec
from reference.config import ModelConfig

PEER_FLAGS: dict[str, Any] = {
    "masked_softmax_fusion": True,
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": "native",
    "moe_permute_fusion": True,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "attention_softmax_in_fp32": False,
    "deallocate_pipeline_outputs": True,
    "moe_router_dtype": None,
}
ACCUMULATED: dict[str, Any] = {"gradient_accumulation_fusion": True}
FP8: dict[str, Any] = {"fp8": "e4m3", "fp8_recipe": "blockwise"}
PADDED_BY_ROUTER: dict[str, Any] = FP8 | {"moe_router_padding_for_quantization": True}
GATHERING = "CUDA graphs, gathering parameters"  # the row of `REFUSALS`


class Row(NamedTuple):
    """One row of the table."""

    settings: Mapping[str, Any] = {}
    """`TransformerConfig` fields."""
    fusions: tuple[FusionName, ...] = ("none",)
    graphs: bool = False
    layers: str = "ours"
    """A key of `LAYERS`."""
    model: Literal["gpt", "hybrid"] = "gpt"
    dtype: str = "bf16"
    recompute: str = "none"
    their_experts: bool = False
    """Experts' layers are Transformer Engine's alone, also where `bridge.model.expert_products` could."""
    their_optimizer: bool = False
    """megatron-core's step is its own, also where it could be one kernel (`bridge.model.fused_optimizer`)."""
    lifts: tuple[str, ...] = ()
    """Rows of `bridge.model.safe_settings.REFUSALS` that do not count here."""
    timed: bool = True


BASE, PEER = "defaults", "megatron-bridge"
TRUTH = "defaults, float32"
FP8_EXPERTS, PEER_NORMS = "FP8, padded by the experts", "megatron-bridge's norms"
ROWS: dict[str, Row] = {
    BASE: Row(),
    TRUTH: Row(dtype="fp32", recompute="full", timed=False),
    "graphs": Row(graphs=True),
    **{f"graphs, {name}": Row(fusions=(name,), graphs=True) for name in FUSIONS},
    "fusions": Row(fusions=FASTEST),
    "fusions and graphs": Row(fusions=FASTEST, graphs=True),
    "fusions and graphs, Transformer Engine's experts": Row(fusions=FASTEST, graphs=True, their_experts=True),
    "fusions and graphs, megatron-core's step": Row(fusions=FASTEST, graphs=True, their_optimizer=True),
    "HybridModel": Row(model="hybrid"),
    "HybridModel, fusions and graphs": Row(fusions=FASTEST, graphs=True, model="hybrid"),
    PEER: Row(PEER_FLAGS, layers=PEER, their_optimizer=True),
    f"{PEER}, fusions and graphs": Row(
        fusions=FASTEST, graphs=True, layers=PEER, their_experts=True, their_optimizer=True
    ),
    f"{PEER}, gradient accumulation": Row(
        PEER_FLAGS | ACCUMULATED, layers=PEER, their_experts=True, their_optimizer=True
    ),
    PEER_NORMS: Row(PEER_FLAGS, layers=PEER_NORMS),
    "ours, megatron-bridge's flags": Row(PEER_FLAGS),
    f"{PEER_NORMS}, fusions and graphs": Row(fusions=FASTEST, graphs=True, layers=PEER_NORMS),
    "FP8": Row(PADDED_BY_ROUTER, FASTEST),
    "FP8 and graphs": Row(PADDED_BY_ROUTER, FASTEST, graphs=True),
    FP8_EXPERTS: Row(FP8, FASTEST),
    f"{FP8_EXPERTS}, and graphs": Row(FP8, FASTEST, graphs=True),
    "fusions and graphs, gathering overlapped": Row(fusions=FASTEST, graphs=True, lifts=(GATHERING,)),
}


def _with_peer_norms(config: TransformerConfig, vp_stage: int | None) -> Any:
    """Our layers but for the attention: megatron-core's, with megatron-bridge's norms in its slots."""
    from megatron.bridge.models.minimax_m2 import minimax_m2_provider as peer

    block = minimax_m2_block_spec(config, vp_stage=vp_stage)
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        attention.module = SelfAttention
        attention.submodules.q_layernorm, attention.submodules.k_layernorm = peer.FullDimQNorm, peer.FullDimKNorm
    return block


def _of_the_peer(config: TransformerConfig, vp_stage: int | None) -> Any:
    """megatron-bridge's own layers."""
    from megatron.bridge.models.minimax_m2 import minimax_m2_provider as peer

    return peer.minimax_m2_layer_spec(config)


# What makes the layers; None is `bridge.build_model`'s own choice.
LAYERS: dict[str, Callable[[TransformerConfig, int | None], Any] | None] = {
    "ours": None,
    PEER_NORMS: _with_peer_norms,
    PEER: _of_the_peer,
}


def lacks(row: Row, backend: Backend, *, gpu: bool) -> str | None:
    """What a row needs that is not here, in words; None if it can be tried."""
    if row.layers != "ours" and not (gpu and _installed("megatron.bridge")):
        return "megatron-bridge and a GPU"
    if not gpu and (row.graphs or row.settings):
        return "a GPU"
    short = [name for name in row.fusions if name != "none" and backend not in FUSIONS[name].backends]
    return f"Transformer Engine, for {', '.join(short)}" if short else None


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # nor is the package that it is in
        return False


class Shape(NamedTuple):
    """The model's sizes and a step's: sequences of `seq` tokens, so many one after another on each rank."""

    hidden: int
    width: int
    heads: int
    groups: int
    head_dim: int
    rotary: int
    experts: int
    """On each expert-parallel rank."""
    top_k: int
    vocab: int
    layers: int
    seq: int
    microbatches: int
    warm_up: int
    """Steps before the measured ones."""
    timed: int
    """Measured steps of a visit."""
    checked: int
    """Steps whose losses are compared."""

    def config(self, ep: int) -> ModelConfig:
        return ModelConfig(
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.head_dim,
            rotary_dim=self.rotary,
            num_local_experts=self.experts * ep,
            num_experts_per_tok=self.top_k,
            vocab_size=self.vocab,
            num_hidden_layers=self.layers,
        )


TRUE_WIDTH = Shape(3072, 1536, 48, 8, 128, 64, 32, 8, 32768, 4, 4096, 4, warm_up=5, timed=6, checked=6)
TINY = Shape(64, 48, 8, 2, 16, 8, 4, 2, 256, 2, 32, 2, warm_up=1, timed=2, checked=2)
