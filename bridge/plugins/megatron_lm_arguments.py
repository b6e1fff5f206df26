"""Megatron-LM's arguments for MiniMax-M2: what the command line must say of a model, and what is wrong in a run.

    python -m bridge.plugins.megatron_lm_arguments checkpoint/config.json [--model hybrid]

prints the words for pretrain_gpt.py or pretrain_hybrid.py. `SAID` has a row for each of them, `LEFT_OUT` one for each
option that would make another model. What does not depend on the model's size is checked in every run: in the parsed
arguments where a host hands them over, and in the `TransformerConfig` where it hands over no more.

Source: megatron.training.arguments and megatron.training.argument_utils of megatron-core 0.19.
"""

import argparse
from pathlib import Path
from shlex import join
from typing import Any, NamedTuple

from bridge.huggingface.read_json import read_object
from bridge.model.architecture import ALLOWED, SIZES, shown
from bridge.model.config import ARCHITECTURE, gpt_model_arguments
from reference.config import ModelConfig
from reference.model_class import DEFAULT_MODEL, ModelClass
from reference.parallelism import Parallelism, hybrid_layer_pattern


class Said(NamedTuple):
    """An option that the command line must have, and where its value is found.

    Args:
        option: ends with "=" where a value follows; else it stands alone.
        parsed: its name among the parsed arguments; "" where a run may choose another value.
        field: its name in `TransformerConfig`; "" where it is not there, or a run may choose another value.
        value: the value in every MiniMax-M2; None where it depends on the size.
        size: the field of `ModelConfig` that it is then; "" if none is.
    """

    option: str
    parsed: str
    field: str
    value: Any = None
    size: str = ""

    def of(self, config: ModelConfig) -> Any:
        """The value for one model."""
        if self.option == "--rotary-percent=":
            return gpt_model_arguments(config)["rotary_percent"]
        return getattr(config, self.size) if self.size else self.value

    def words(self, value: Any) -> list[str]:
        """How the command line says a value."""
        if not self.option.endswith("="):
            return [self.option]
        whole = isinstance(value, float) and self.option == "--rotary-base="  # megatron-core takes no fraction
        return [self.option[:-1], str(int(value) if whole else value)]


class LeftOut(NamedTuple):
    """An option that would make another model, and what its `TransformerConfig` field and parsed argument are else."""

    option: str
    parsed: str
    field: str
    default: Any


def _same(option: str, parsed: str, field: str = "") -> Said:
    return Said(option, parsed, field or parsed, value=ARCHITECTURE[field or parsed])


def _size(option: str, parsed: str, field: str = "") -> Said:
    return Said(option, parsed, field or parsed, size=SIZES[field or parsed])


def _both(option: str, name: str, default: Any = None) -> LeftOut:
    return LeftOut(option, name, name, ALLOWED[name][0] if name in ALLOWED else default)


# fmt: off
SAID: tuple[Said, ...] = (
    _size("--num-layers=", "num_layers"),
    _size("--hidden-size=", "hidden_size"),
    _size("--ffn-hidden-size=", "ffn_hidden_size"),
    _size("--num-attention-heads=", "num_attention_heads"),
    Said("--group-query-attention", "group_query_attention", "", value=True),
    _size("--num-query-groups=", "num_query_groups"),
    _size("--kv-channels=", "kv_channels"),
    Said("--qk-layernorm", "", "", value=True),  # our attention norms with it and without
    Said("--position-embedding-type=", "position_embedding_type", "", value="rope"),
    Said("--rotary-percent=", "rotary_percent", "", size="rotary_dim"),
    Said("--rotary-base=", "rotary_base", "", size="rope_theta"),
    Said("--max-position-embeddings=", "", "", size="max_position_embeddings"),
    Said("--vocab-size=", "", "", size="vocab_size"),  # a tokenizer may say it instead
    Said("--untie-embeddings-and-output-weights", "untie_embeddings_and_output_weights", "", value=True),
    _same("--normalization=", "normalization"),
    _size("--norm-epsilon=", "layernorm_epsilon"),
    Said("--init-method-std=", "", "", size="initializer_range"),
    _same("--disable-bias-linear", "add_bias_linear"),
    _same("--swiglu", "swiglu", "gated_linear_unit"),
    _same("--hidden-dropout=", "hidden_dropout"),
    _same("--attention-dropout=", "attention_dropout"),
    _same("--attention-softmax-in-fp32", "attention_softmax_in_fp32"),
    _size("--num-experts=", "num_experts", "num_moe_experts"),
    _size("--moe-ffn-hidden-size=", "moe_ffn_hidden_size"),
    _size("--moe-router-topk=", "moe_router_topk"),
    _same("--moe-router-score-function=", "moe_router_score_function"),
    _same("--moe-router-enable-expert-bias", "moe_router_enable_expert_bias"),
    _same("--moe-router-dtype=", "moe_router_dtype"),
    Said("--moe-router-load-balancing-type=", "", "", value=ARCHITECTURE["moe_router_load_balancing_type"]),
    Said("--moe-aux-loss-coeff=", "", "", size="router_aux_loss_coef"),
    Said("--moe-grouped-gemm", "", "", value=True),  # or Transformer Engine's experts have the local spec's names
)
LEFT_OUT: tuple[LeftOut, ...] = (
    _both("--add-qkv-bias", "add_qkv_bias"),
    _both("--rotary-interleaved", "rotary_interleaved", False),
    _both("--no-rope-freq", "no_rope_freq"),
    _both("--apply-layernorm-1p", "layernorm_zero_centered_gamma"),
    _both("--apply-residual-connection-post-layernorm", "apply_residual_connection_post_layernorm"),
    _both("--multi-latent-attention", "multi_latent_attention"),
    _both("--attention-output-gate", "attention_output_gate", False),
    _both("--qk-l2-norm", "qk_l2_norm", False),
    _both("--window-size", "window_size"),
    _both("--softmax-type", "softmax_type"),
    _both("--moe-layer-freq", "moe_layer_freq", 1),
    _both("--moe-router-num-groups", "moe_router_num_groups"),
    _both("--moe-router-group-topk", "moe_router_group_topk"),
    _both("--moe-router-topk-scaling-factor", "moe_router_topk_scaling_factor"),
    _both("--moe-shared-expert-intermediate-size", "moe_shared_expert_intermediate_size"),
    _both("--moe-latent-size", "moe_latent_size"),
    _both("--moe-apply-probs-on-input", "moe_apply_probs_on_input"),
    _both("--mtp-num-layers", "mtp_num_layers"),
    LeftOut("--quick-geglu", "quick_geglu", "activation_func", ARCHITECTURE["activation_func"]),
    LeftOut("--use-rope-scaling", "use_rope_scaling", "", False),
    LeftOut("--rotary-seq-len-interpolation-factor", "rotary_seq_len_interpolation_factor", "", None),
)
# fmt: on

# What the hosts take where the option is missing, and no released model has: by the parsed argument's name.
MISSING: dict[str, Any] = {"rotary_percent": 1.0, "rotary_base": 10000}
RELEASED = ModelConfig(rotary_dim=64)


def megatron_lm_arguments(config: ModelConfig, *, model: ModelClass | str = DEFAULT_MODEL) -> list[str]:
    """The words of the command line that describe the model; layout, batches, data and precision are the run's.

    Raises:
        ValueError: `model` is no class, or `rope_theta` is not a whole number, as Megatron-LM takes it.
    """
    if config.rope_theta != int(config.rope_theta):
        raise ValueError(f"rope_theta is {config.rope_theta}, but Megatron-LM's --rotary-base takes whole numbers only")
    words = {said.option: said.words(said.of(config)) for said in SAID}
    if ModelClass(model) is ModelClass.HYBRID:
        words["--num-layers="] = ["--hybrid-layer-pattern", hybrid_layer_pattern(config, Parallelism())]
    return [word for said in words.values() for word in said]


def check_arguments(arguments: argparse.Namespace, config: ModelConfig | None = None) -> None:
    """Check parsed arguments, as far as MiniMax-M2 says what they are; with a config also the model's sizes.

    Raises:
        ValueError: one is another; names the option, the value found, and what to pass.
    """
    for said in SAID:
        if not said.parsed:
            continue
        found = getattr(arguments, said.parsed, None)
        if not said.size:
            _check_said(said, found, said.value)
        elif config is not None:
            twice = said.option == "--num-layers=" and getattr(arguments, "hybrid_layer_pattern", None) is not None
            _check_said(said, found, said.of(config) * (2 if twice else 1))
        elif said.parsed in MISSING and found == MISSING[said.parsed]:
            _check_said(said, found, said.of(RELEASED))
    for left_out in LEFT_OUT:
        expected = False if left_out.parsed == "quick_geglu" else left_out.default
        _check_left_out(left_out, getattr(arguments, left_out.parsed, expected), expected)
    _check_saving(arguments)


def check_config(config: Any) -> None:
    """Check a `TransformerConfig` that a host made of its arguments, as far as MiniMax-M2 says what it is.

    Raises:
        ValueError: a field is another; names Megatron-LM's option, the value found, and what to pass.
    """
    for said in SAID:
        if said.field and not said.size:
            _check_said(said, getattr(config, said.field), said.value)
    for left_out in LEFT_OUT:
        if left_out.field:
            _check_left_out(left_out, getattr(config, left_out.field), left_out.default)


def _check_saving(arguments: argparse.Namespace) -> None:
    """Without the distributed optimizer megatron-core 0.19 takes the weights of a bfloat16 model for all there are.

    It then looks for the router's, which are float32, under another weight's number, and ends at the first save.
    """
    given = vars(arguments)
    saves = given.get("save") and not given.get("no_save_optim")
    if saves and (given.get("bf16") or given.get("fp16")) and not given.get("use_distributed_optimizer"):
        raise ValueError(
            "--use-distributed-optimizer: found False, expected True where the optimizer of MiniMax-M2, whose routers "
            "are float32, is saved in half precision; pass --use-distributed-optimizer, or --no-save-optim"
        )


def _check_said(said: Said, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(
            f"{said.option.rstrip('=')}: found {shown(found)}, expected {shown(expected)} for MiniMax-M2; pass "
            f"{join(said.words(expected))}"
        )


def _check_left_out(left_out: LeftOut, found: Any, expected: Any) -> None:
    ones = left_out.option == "--moe-layer-freq" and isinstance(found, list) and set(found) == {1}  # 1 for each layer
    if found != expected and not ones:
        raise ValueError(
            f"{left_out.option}: found {shown(found)}, expected {shown(expected)} for MiniMax-M2; leave it out"
        )


def main() -> None:
    """Print the words for the config.json that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bridge.plugins.megatron_lm_arguments")
    parser.add_argument("config", type=Path, help="a config.json of MiniMax-M2")
    parser.add_argument("--model", choices=[str(kind) for kind in ModelClass], default=str(DEFAULT_MODEL))
    asked = parser.parse_args()
    print(join(megatron_lm_arguments(ModelConfig.from_hf(read_object(asked.config)), model=asked.model)))


if __name__ == "__main__":
    main()
