# pyright: reportMissingImports=false
"""MiniMax-M2 in mcore-bridge, the models and weights of ms-swift's Megatron trainer: importing this registers it.

    import bridge.plugins.mcore_bridge

From then on mcore-bridge builds models of type `minimax_m2` with the layers of `bridge.model`: queries and keys normed
over all heads without gathering activations, a float32 router, and the rotation that config.json states. It reads and
writes their weights with `bridge.weights`: stored as in the source, untouched ones byte for byte, MTP layers and the
files beside the weights carried along. Adapters (LoRA) go by mcore-bridge's own loop, which knows Transformer Engine's
modules by the names that they have here too.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from bridge.jobs.ranks import raise_on_all_ranks
from bridge.minimax_m2_bridge import MiniMaxM2Bridge
from bridge.model.architecture import SIZES
from bridge.model.attention import MiniMaxM2SelfAttention
from bridge.model.build import with_frequencies_of_transformers
from bridge.model.config import ARCHITECTURE
from bridge.model.layer_spec import minimax_m2_block_spec
from bridge.plugins.host import require_host
from bridge.plugins.save_beside import save_beside
from reference.config import ModelConfig

require_host("mcore-bridge>=1.6.5,<1.7")

from mcore_bridge.model.gpts.minimax_m2 import MinimaxM2Bridge as HostBridge  # noqa: E402
from mcore_bridge.model.register import ModelLoader, ModelMeta, register_model  # noqa: E402
from peft import PeftModel  # noqa: E402

from bridge.plugins.adapters import check_merged, without_adapters  # noqa: E402

MODEL_TYPE = "minimax_m2"

# Fields of the host's config that make another model if they differ from what config.json and the architecture say.
# The rest (dropout, the load-balancing loss, initialisation) is the trainer's business.
CHECKED_SIZES = tuple(
    field for field in SIZES if field not in ("ffn_hidden_size", "moe_aux_loss_coeff", "init_method_std")
)
CHECKED_ARCHITECTURE = (
    "normalization", "qk_layernorm", "add_bias_linear", "add_qkv_bias", "gated_linear_unit", "activation_func",
    "moe_layer_freq", "moe_router_score_function", "moe_router_enable_expert_bias", "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size",
)  # fmt: skip
# What this plug-in does not do: field of the host's config, the values under which it is not asked for, and why.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "task_type": (("causal_lm",), "only the language model's own head has a place in the checkpoint"),
    "mtp_num_layers": ((None, 0), "MTP layers are not trained, but carried from the source into what is saved"),
    "fp8_param": ((False, None), "weights are loaded into bfloat16 parameters; FP8 computation does not need it"),
}


class TokenAnglesAttention(MiniMaxM2SelfAttention):
    """The attention in mcore-bridge's model, which looks up each packed token's angle itself.

    Its `GPTModel.forward` indexes the table by `position_ids` wherever `apply_rope_fusion` is off; megatron-core's
    leaves that to the attention.
    """

    def get_query_key_value_tensors(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As `MiniMaxM2SelfAttention`'s."""
        if not self.config.apply_rope_fusion:
            self._packed = None
        return super().get_query_key_value_tensors(*arguments, **options)


class MiniMaxM2Loader(ModelLoader):
    """Builds the model that mcore-bridge's config describes.

    Raises:
        ValueError: the config has no `hf_config`, is not of the model in it, or asks for something that is not done
            (`UNSUPPORTED`); names the field, what was found and what was expected.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.minimax_m2 = checked_config(config)

    def get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        """The layers of this pipeline stage and the final norm."""
        block: Any = minimax_m2_block_spec(self.config, vp_stage=vp_stage)
        for layer in block.layer_specs:
            layer.submodules.self_attention.module = TokenAnglesAttention
        return block

    def build_model(self, *arguments: Any, **options: Any) -> nn.Module:
        """One chunk; its frequencies are those of the stated rotary width, which the host may have read as another."""
        return with_frequencies_of_transformers(super().build_model(*arguments, **options), self.minimax_m2)


def checked_config(config: Any) -> ModelConfig:
    """The MiniMax-M2 that a config of mcore-bridge is of.

    Raises:
        ValueError: as `MiniMaxM2Loader`.
    """
    if config.hf_config is None:
        raise ValueError(
            "hf_config is None, expected the model's transformers config, which says how it rotates: make the config "
            "with mcore_bridge.hf_to_mcore_config"
        )
    minimax_m2 = ModelConfig.from_hf(config.hf_config.to_dict())
    expected = {field: getattr(minimax_m2, SIZES[field]) for field in CHECKED_SIZES}
    expected |= {field: ARCHITECTURE[field] for field in CHECKED_ARCHITECTURE}
    for field, value in expected.items():
        found = getattr(config, field)
        if found != value:
            raise ValueError(
                f"{field} is {found!r} in mcore-bridge's config, but this MiniMax-M2 has {value!r}: pass "
                f"{field}={value!r}, or state it in config.json"
            )
    for field, (allowed, reason) in UNSUPPORTED.items():
        found = getattr(config, field)
        if found not in allowed:
            raise ValueError(f"{field} is {found!r}, expected {allowed[0]!r}: {reason}")
    return minimax_m2


class MiniMaxM2GPTBridge(HostBridge):
    """mcore-bridge's weight interface (`config.bridge`) over `MiniMaxM2Bridge`; all ranks make the same calls.

    The source checkpoint is the one that was loaded last, else the one that `save_missing_weights` names, else the
    folder that `hf_config` was read from. What is exported and saved is stored as there, FP8 or bfloat16.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self._source: MiniMaxM2Bridge | None = None

    def load_weights(
        self,
        mg_models: list[nn.Module],
        hf_model_dir: str,
        peft_format: bool = False,
        adapter_name: str = "default",
        converter: Callable | None = None,
    ) -> None:
        """Fill a rank's chunks from a checkpoint, or with `peft_format` their adapters.

        Raises:
            ValueError: the model is not the checkpoint's, or a weight is damaged; there is a `converter`, which would
                have to rename tensors before they are read.
        """
        if peft_format:
            super().load_weights(mg_models, hf_model_dir, True, adapter_name, converter)
            return
        _refuse_converter(converter)
        chunks = _chunks(mg_models)
        source = self._open(hf_model_dir)
        with without_adapters(chunks, adapter_name):
            source.load_hf_weights(chunks)

    def export_weights(
        self,
        mg_models: list[nn.Module],
        target_device: str | torch.device | None = None,
        only_master_rank: bool = False,
        peft_format: bool = False,
        adapter_name: str = "default",
        converter: Callable | None = None,
        tqdm_desc: str = "Exporting: ",
        disable_tqdm: bool = True,
        _is_saving: bool = False,
        skip_unsupported_export: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its on-disk name, float8 ones followed by their scales; with `peft_format` the adapters.

        Base layers come without what adapters add, unless those are merged. With `only_master_rank` the other ranks
        get nothing. `converter` may rename a tensor, change it or leave it out, as in mcore-bridge.

        Raises:
            ValueError: the model is not the source checkpoint's; a value is not finite where float8 is wanted.
        """
        if peft_format:
            shown = {"tqdm_desc": tqdm_desc, "disable_tqdm": disable_tqdm, "_is_saving": _is_saving}
            yield from super().export_weights(
                mg_models, target_device, only_master_rank, True, adapter_name, converter, **shown
            )
            return
        chunks = _chunks(mg_models)
        with without_adapters(chunks, adapter_name):
            exported = self._opened().export_hf_weights(
                chunks, "source", to=0 if only_master_rank else "all", device=target_device
            )
        for name, weight in exported:
            converted = converter(name, weight) if converter else (name, weight)
            if converted is not None:
                yield converted

    def save_weights(
        self,
        mg_models: list[nn.Module],
        output_dir: str,
        peft_format: bool = False,
        *,
        adapter_name: str = "default",
        converter: Callable | None = None,
        max_shard_size: str = "5GB",
        save_missing_weights: bool | str = False,
        **of_the_trainer: Any,
    ) -> None:
        """A whole checkpoint in `output_dir`, beside what else is there; with `peft_format` the adapters.

        config.json, tokenizer and MTP layers are the source's, whatever `save_missing_weights` says; the trainer's
        arguments (ms-swift: `args`, `processor`) matter to adapters only.

        Raises:
            ValueError: the model is not the source checkpoint's, an adapter is not merged, a weight is not finite, or
                there is a `converter`: the saved names are Hugging Face's.
        """
        if peft_format:
            given = {"adapter_name": (adapter_name, "default"), "converter": (converter, None)}
            unknown_to_ms_swift = {name: value for name, (value, default) in given.items() if value != default}
            options = {"max_shard_size": max_shard_size, **unknown_to_ms_swift, **of_the_trainer}
            super().save_weights(mg_models, output_dir, True, **options)
            return
        _refuse_converter(converter)
        chunks = _chunks(mg_models)
        with raise_on_all_ranks():
            check_merged(chunks)
        source = self._opened(save_missing_weights if isinstance(save_missing_weights, str) else None)
        quantization = "fp8" if source.checkpoint.quantized else None
        with without_adapters(chunks, adapter_name):
            save_beside(
                source, chunks, Path(output_dir), quantization=quantization, max_shard_bytes=_nbytes(max_shard_size)
            )

    def _set_qk_layernorm(self, *_: Any, **__: Any) -> None:
        """No adapter has a part of the norms, and everything else about them is not the host's loop's."""

    def _opened(self, otherwise: str | None = None) -> MiniMaxM2Bridge:
        if self._source is not None:
            return self._source
        folder = otherwise or getattr(self.config.hf_config, "name_or_path", "")
        if not folder:
            raise ValueError(
                "no source checkpoint is known, whose dtypes and scales are kept: call load_weights first, or read "
                "hf_config from the checkpoint's folder"
            )
        return self._open(folder)

    def _open(self, folder: str) -> MiniMaxM2Bridge:
        """The checkpoint in that folder, kept open: weight sync asks for it at each step."""
        with raise_on_all_ranks():
            opened = MiniMaxM2Bridge.from_hf_pretrained(folder)
        if self._source is not None:
            self._source.close()
        self._source = opened
        return opened


def _chunks(mg_models: list[nn.Module]) -> list[nn.Module]:
    """megatron-core's models, without DDP and peft around them."""
    chunks = unwrap_model(list(mg_models))
    return [chunk.base_model.model if isinstance(chunk, PeftModel) else chunk for chunk in chunks]


def _refuse_converter(converter: Callable | None) -> None:
    if converter is not None:
        raise ValueError(
            "converter is given, but checkpoints of MiniMax-M2 are read and saved under Hugging Face's names: leave it "
            "out, or rename what export_weights gives"
        )


def _nbytes(size: str) -> int:
    """Of "5GB", as mcore-bridge writes sizes."""
    number, unit = size[:-2], size[-2:]
    if unit != "GB" or not number.isdecimal() or int(number) == 0:
        raise ValueError(f"max_shard_size must be a whole number of GB such as '5GB', found {size!r}")
    return int(number) * 10**9


register_model(
    ModelMeta(MODEL_TYPE, [MODEL_TYPE], bridge_cls=MiniMaxM2GPTBridge, loader=MiniMaxM2Loader), exist_ok=True
)
