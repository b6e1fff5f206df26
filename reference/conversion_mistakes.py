"""Mistakes that converters of MiniMax-M2 make, one row each: what it is called, which weights it concerns, what becomes
of them, and what a reader is told.

A mistake changes one thing on the way from the original to a tensor that was found: from which weight it is taken
(`Elsewhere`), by which scales it is decoded (`Scales`), its values (`Changed`), or how they are rounded (`Rounded`).
`reference.mistake_chains` makes them one after the other, in that order. A row without a change is seen in the files'
headers: who reads them counts it.

A new mistake is a row of `MISTAKES` and, if there is none that does it, a function of `reference.mistaken_sources` or
`reference.mistaken_values`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from reference import mistaken_sources as sources
from reference import mistaken_values as values
from reference.config import ModelConfig
from reference.mistaken_sources import Place
from reference.weights import Layout, Row, Scope, Storage


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """Taken from one of other places; `many`: too many to read, so that a few values are compared first."""

    places: Callable[[Place, ModelConfig], Iterator[Place]]
    many: bool = False


@dataclass(frozen=True, eq=False)
class Scales:
    """Decoded by other scales: float32, on the weight's grid."""

    scales: Callable[[Tensor], Iterator[Tensor]]


class Reach(IntEnum):
    """On how much a value that is changed depends: lines are columns, or rows where a layout is cut by columns."""

    LINE = 0
    BLOCK = 1  # the lines of one run of blocks
    WHOLE = 2


@dataclass(frozen=True, eq=False)
class Changed:
    """Other values."""

    values: values.Values
    reach: Reach = Reach.LINE


class Rounded(Changed):
    """Other values, because of the last step."""


Change = Elsewhere | Scales | Changed | Rounded
STEPS = (Elsewhere, Scales, Changed, Rounded)


@dataclass(frozen=True, eq=False)
class Mistake:
    """One mistake.

    Args:
        name: a word for programs.
        concerns: the rows of TABLE in which it is looked for.
        change: what it does; None where only headers show it.
        said: what happened, what it leads to, and what to do.
        exact: whether its result is found bit for bit; else to within two units in the last place, for arithmetic whose
            order is not known.
    """

    name: str
    concerns: Callable[[Row], bool]
    change: Change | None
    said: str
    exact: bool = True


# --- Which rows a mistake may concern. ---


def _layouts(*layouts: Layout) -> Callable[[Row], bool]:
    return lambda row: row.layout in layouts


def _in_scope(*scopes: Scope) -> Callable[[Row], bool]:
    return lambda row: row.scope in scopes


def _every(_: Row) -> bool:
    return True


def _quantizable(row: Row) -> bool:
    return row.storage is Storage.QUANTIZABLE


def _norm(row: Row) -> bool:
    return len(row.axes[0]) == 1 and row.trained


def _hidden_norm(row: Row) -> bool:
    return _norm(row) and row.axes == (("hidden",),) and row.scope is not Scope.MODEL


def _router(row: Row) -> bool:
    return row.storage is Storage.FLOAT32 and row.trained


def _bias(row: Row) -> bool:
    return not row.trained


_HEADS = (Layout.QUERY_HEADS, Layout.KEY_HEADS)
_BY_ROWS = (Layout.QKV, Layout.GATE_UP)
BY_COLUMNS = (Layout.COLUMNS, Layout.EXPERT_COLUMNS)


# fmt: off
MISTAKES: tuple[Mistake, ...] = (
    # What headers show.
    Mistake("missing", _every, None,
            "left out: the model cannot be loaded, or runs on random numbers; convert again with all files of the "
            "original"),
    Mistake("extra", _every, None,
            "not a MiniMax-M2's: a loader refuses or ignores them; remove them, or correct the names"),
    Mistake("carried_lost", _every, None,
            "multi-token-prediction layers and the like of the original left out: the model computes the same without "
            "them; carry them over if speculative decoding is wanted"),
    Mistake("scales_left_over", _quantizable, None,
            "block scales beside a weight that is not float8: a loader may scale it again; remove them"),
    Mistake("wrong_grid", _quantizable, None,
            "block scales that do not fit their float8 weight: it has no value; write one scale for each block"),
    Mistake("wrong_dtype", _every, None,
            "stored in a dtype that no loader of the model reads; store bfloat16, or float8_e4m3fn with block scales"),
    Mistake("padding_left_in", _layouts(Layout.VOCABULARY), None,
            "rows that pad the vocabulary left in: token ids exist that mean nothing, and shapes do not fit "
            "config.json; cut the tensor to vocab_size rows"),
    Mistake("config_differs", _every, None,
            "config.json describes another model: it computes something else with the same weights; copy the original's"
            " values"),
    Mistake("storage_misdescribed", _every, None,
            "config.json says otherwise than the files which weights are float8, or by which blocks: a loader looks "
            "for scales that are not there, or leaves those out that are; describe what is stored, or leave "
            "quantization_config out where nothing is float8"),
    Mistake("wrong_shape", _every, None,
            "another shape than the original's, and not its transpose: it cannot be loaded; look at how it was cut and "
            "put together"),
    # Taken from elsewhere.
    Mistake("layers_shifted", lambda row: row.scope is not Scope.MODEL, Elsewhere(sources.next_layers),
            "the next layer's weight, or that of the layer before: every layer computes with another's; count layers "
            "over the whole model, from 0"),
    Mistake("experts_interleaved", _in_scope(Scope.EXPERT), Elsewhere(sources.round_robin),
            "experts dealt to expert-parallel ranks in turn, where each rank has a run of them: the router chooses "
            "others than it means; number them rank x experts per rank + local number"),
    Mistake("norms_swapped", _hidden_norm, Elsewhere(sources.other_row),
            "the layer's other norm: input_layernorm and post_attention_layernorm are swapped, or one was written "
            "twice; attention and experts see wrongly scaled inputs; name each"),
    Mistake("embedding_head", _layouts(Layout.VOCABULARY), Elsewhere(sources.other_row),
            "embedding and output head swapped, or one written for both: this model does not tie them; write "
            "model.embed_tokens and lm_head each from its own"),
    Mistake("experts_permuted", _in_scope(Scope.EXPERT), Elsewhere(sources.all_experts, many=True),
            "another expert of the same layer: the router chooses others than it means, unless its rows moved with "
            "them; keep the original's numbers"),
    Mistake("layers_permuted", lambda row: row.scope is not Scope.MODEL, Elsewhere(sources.all_layers, many=True),
            "another layer's weight: layers are in another order; count them over all pipeline stages, from 0"),
    # Decoded by other scales.
    Mistake("scales_ignored", _quantizable, Scales(sources.no_scales),
            "float8 codes taken for values, without their scales: weights are thousands of times too large; multiply "
            "each block by its weight_scale_inv"),
    Mistake("scales_twice", _quantizable, Scales(sources.squared),
            "block scales applied twice: weights are nearly zero; multiply once", exact=False),
    Mistake("scales_divided", _quantizable, Scales(sources.inverted),
            "divided by weight_scale_inv, which despite its name multiplies: weights are wrong by orders of magnitude; "
            "multiply", exact=False),
    Mistake("scales_narrowed", _quantizable, Scales(sources.narrowed),
            "block scales rounded to bfloat16 or float16 before the product: a relative error of up to 0.4 % in every "
            "block; multiply in float32 and round once"),
    Mistake("scales_power_of_two", _quantizable, Scales(sources.powers_of_two),
            "block scales rounded to powers of two, with the old codes: blocks are up to twice too large or small; keep"
            " float32 scales, or encode anew"),
    Mistake("scales_transposed", _quantizable, Scales(sources.transposed_grid),
            "grid of block scales transposed: blocks have each other's scales; scale [i, j] is for rows from 128 i and "
            "columns from 128 j"),
    Mistake("one_scale", _quantizable, Scales(sources.one_scale),
            "one scale for the whole tensor, where each block has its own: most blocks are wrongly scaled; read the "
            "grid"),
    # Other values.
    Mistake("qkv_concatenated", _layouts(Layout.QKV), Changed(values.concatenated_qkv),
            "q, k and v fused one below the other, or taken apart that way, not group by group: heads attend with each "
            "other's rows; for each key/value head: its query heads, its key, its value"),
    Mistake("kv_swapped", _layouts(Layout.QKV), Changed(values.swapped_kv),
            "key and value swapped: attention compares values and returns keys; the order in a group is queries, key, "
            "value"),
    Mistake("query_heads_reordered", _layouts(Layout.QKV, Layout.QUERY_HEADS, Layout.COLUMNS),
            Changed(values.reordered_query_heads),
            "query heads in another order over the groups: they attend to other heads' keys; head h belongs to group h "
            "// heads per group"),
    Mistake("rotation_interleaved", _layouts(Layout.QKV, *_HEADS), Changed(values.interleaved_rotation),
            "channels of heads reordered for a rotation of neighbouring pairs: positions are rotated wrongly here, "
            "where channel i goes with i + rotary_dim / 2; leave them as they are"),
    Mistake("gate_up_swapped", _layouts(Layout.GATE_UP), Changed(values.swapped_gate_up),
            "gate and up projection (w1, w3) swapped: the wrong one goes through SiLU; fused they are [w1; w3]"),
    Mistake("gate_up_interleaved", _layouts(Layout.GATE_UP), Changed(values.interleaved_gate_up),
            "gate and up projection interleaved row by row, or taken apart that way: fused they are [w1; w3], all rows "
            "of w1 first"),
    Mistake("gate_up_of_ranks", _layouts(Layout.GATE_UP), Changed(values.gate_up_of_ranks),
            "tensor-parallel shards [w1; w3] put one below the other, or cut that way: half of the gate is up "
            "projection; take w1 and w3 apart on each rank first"),
    Mistake("shards_swapped", _layouts(*_BY_ROWS, *BY_COLUMNS), Changed(values.reversed_shards),
            "tensor-parallel shards in the wrong order (of two: halves swapped): rows or columns do not meet their "
            "partners; put them together by rank"),
    Mistake("transposed", _layouts(*_BY_ROWS, *BY_COLUMNS), Changed(values.transposed, Reach.WHOLE),
            "transposed: rows are outputs and columns inputs, on disk as in megatron-core; transpose back"),
    Mistake("shard_repeated", _layouts(*_HEADS), Changed(values.repeated_shard),
            "one rank's shard of the query or key norm repeated over all ranks: the other heads have its weights; "
            "gather the norms of all tensor-parallel ranks"),
    Mistake("norm_truncated", _layouts(*_HEADS), Changed(values.truncated_norm),
            "query or key norm cut down to one head or one rank's heads: MiniMax-M2 norms over all heads at once; "
            "gather all of it"),
    Mistake("norm_averaged", _layouts(*_HEADS), Changed(values.averaged_norm),
            "query or key norm averaged over heads or ranks: every head has weights of its own; gather, do not average",
            exact=False),
    Mistake("norm_shifted", _norm, Changed(values.shifted_norm),
            "norm weight shifted by one, as for norms that multiply by 1 + weight: activations shrink to almost nothing"
            " or double; this model multiplies by the weight itself (no layernorm_zero_centered_gamma)"),
    Mistake("norm_lost", _norm, Changed(values.ones),
            "norm weight of ones: it was never loaded; give it the original's values"),
    Mistake("bias_lost", _bias, Changed(values.zeros),
            "e_score_correction_bias is zero: other experts are chosen; carry it over as float32 (expert_bias in "
            "megatron-core)"),
    Mistake("bias_shifted", _bias, Changed(values.shifted_bias),
            "e_score_correction_bias with a constant added to every entry: the same experts are chosen, but its values "
            "drift from the original's; keep them as they are", exact=False),
    Mistake("router_permuted", lambda row: row.storage is Storage.FLOAT32,
            Changed(values.permuted_rows, Reach.WHOLE),
            "router's entries in another order of experts: others are chosen than it means, unless the experts moved "
            "with them; keep the original's order"),
    # Rounded wrongly.
    Mistake("requantised", _quantizable, Rounded(values.requantised, Reach.BLOCK),
            "encoded as float8 on fresh scales: another rounding of up to 6 % of a value; keep the original's scales "
            "(`export --source`)"),
    Mistake("router_narrowed", _router, Rounded(values.cast_to_bfloat16),
            "router weight rounded to bfloat16: close scores change places, and other experts are chosen; keep float32,"
            " also in the model (moe_router_dtype)"),
    Mistake("bias_narrowed", _bias, Rounded(values.cast_to_bfloat16),
            "e_score_correction_bias rounded to bfloat16: close scores change places, and other experts are chosen; "
            "keep float32"),
    Mistake("truncated", _every, Rounded(values.cut_to_bfloat16),
            "cut to bfloat16 without rounding to nearest: all values are too small, by up to 0.8 %; round"),
    Mistake("float16", _every, Rounded(values.cast_to_float16),
            "rounded to float16: small weights lose digits or vanish, and large ones overflow; store bfloat16"),
)
# fmt: on
BY_NAME: dict[str, Mistake] = {mistake.name: mistake for mistake in MISTAKES}
assert len(BY_NAME) == len(MISTAKES)
