"""What a converter got wrong: `minimax-m2 validate CHECKPOINT --source ORIGINAL`.

Every weight is compared with the original's, by bytes where both are stored alike, else by value. Where one differs
the mistake is looked for that gives just these values (`bridge.proof.explain`), so that 47,864 wrong weights are told
in one sentence. Files are read a row of `reference.weights.TABLE` at a time, a vocabulary in pieces.
"""

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bridge.huggingface.checkpoint import same_bits
from bridge.huggingface.safetensors_folder import CONFIG_NAME, SafetensorsFolder
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.workers import run_units
from bridge.proof.checkpoint import open_checkpoint
from bridge.proof.converted_checkpoint import ConvertedHuggingFace, Found, open_converted
from bridge.proof.explain import Explainer, Judged, Original, judged, right_dtypes
from reference.config import ModelConfig, QuantizationConfig
from reference.conversion_mistakes import BY_NAME
from reference.fp8 import FP8
from reference.mistaken_sources import Place, decode
from reference.mistaken_values import Parts
from reference.quantization import is_quantized
from reference.weights import Layout, instances

UNIT = 32  # places that a worker takes at a time
PIECE_BLOCKS = 32  # rows of a vocabulary in a piece, in blocks


class Finding(NamedTuple):
    """One kind of mistake: what a reader is told, how many tensors have it, the worst of them and its error.

    The error is the root mean square of the difference over that of the right values; NaN where there are none.
    """

    name: str
    said: str
    tensors: int
    worst: str
    error: float


class Judgement(NamedTuple):
    """Of `tensors` weights `right` are as they should be; a weight with two mistakes is in two findings.

    `unexplained` are those that differ by no known mistake, None if there are none.
    """

    tensors: int
    right: int
    findings: list[Finding]
    unexplained: Finding | None

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return not self.findings and self.unexplained is None


class _Verdict(NamedTuple):
    """A weight that differs: the mistakes by name, none if it is unexplained, and its error."""

    name: str
    mistakes: tuple[str, ...]
    error: float


class _Case:
    """The two checkpoints, open."""

    def __init__(self, target: Path | str, source: Path | str):
        checkpoint = open_checkpoint(source)
        self.paths = target, source
        self.config = checkpoint.config
        self.original = Original(checkpoint)
        self.target = open_converted(target, self.config, checkpoint.carried_tensors)
        self.explainer = Explainer(self.original)
        self.places = list(_places(self.config))


def judge_checkpoint(
    target: Path | str, source: Path | str, *, workers: int = 1, progress: Progress = no_progress
) -> Judgement:
    """Judge a converted checkpoint by the original that it was made from; either may be of either format.

    Raises:
        ValueError: one of them cannot be read as a checkpoint, or the original is not whole.
    """
    case = _Case(target, source)
    seen = [*_config_verdicts(case), *_header_verdicts(case)]
    units = range(-(-len(case.places) // UNIT))
    judged_units = run_units(
        _judge_unit, case, units, reopen=partial(_Case, target, source), workers=workers, what="judge",
        progress=progress,
    )  # fmt: skip
    verdicts = [verdict for unit in judged_units for verdict in unit] + seen
    names = {name for place in case.places for name in place.names}
    return _judgement(names, verdicts)


def _places(config: ModelConfig) -> Iterator[Place]:
    """Every place of a model, vocabularies in pieces of whole blocks."""
    for row, layer, expert in instances(config):
        place = Place(row, layer, expert)
        if row.layout is not Layout.VOCABULARY:
            yield place
            continue
        size = PIECE_BLOCKS * config.block_size
        for start in range(0, config.vocab_size, size):
            yield place._replace(rows=(start, min(start + size, config.vocab_size)))


def _judge_unit(case: _Case, unit: int) -> list[_Verdict]:
    places = case.places[unit * UNIT : (unit + 1) * UNIT]
    return [verdict for place in places for verdict in _judge(case, place)]


def _judge(case: _Case, place: Place) -> list[_Verdict]:
    found = case.target.read(place)
    present = [(part, one) for part, one in enumerate(found) if one is not None]
    if all(not one.mistakes and _same(case, place, part, one) for part, one in present):
        return []
    stored = case.original.stored(place)
    right: Parts = tuple(decode(one, case.config) for one in stored)
    all_judged = [judged(part, one.stored, stored[part], place.row, case.config) for part, one in present]
    differing = [one for one in all_judged if not one.is_made_by(right[one.part], None)]
    explained = case.explainer.explain(place, differing, right) if differing else {}
    wrong = {one.part for one in differing}
    verdicts = []
    for (part, one), value in zip(present, all_judged, strict=True):
        if part in wrong and part not in explained:
            verdicts.append(_Verdict(place.names[part], (), _error(value, right)))
        elif part in wrong or one.mistakes:
            chain = tuple(mistake.name for mistake in explained.get(part, ()))
            verdicts.append(_Verdict(place.names[part], (*one.mistakes, *chain), _error(value, right)))
    return verdicts


def _same(case: _Case, place: Place, part: int, found: Found) -> bool:
    """Whether a tensor is right, as far as its bytes show; where it is stored otherwise its value may still be."""
    values, scales = found.stored
    name, source = place.names[part], case.original.checkpoint
    dtype = source.dtype(name)
    if values.dtype == FP8:
        original = case.original.stored(place)[part] if dtype == FP8 else None
        if original is None or original.scales is None or scales is None:
            return False
        return same_bits(values, original.values) and same_bits(scales, original.scales)
    if values.dtype not in right_dtypes(values.dtype, dtype, place.row):
        return False
    return same_bits(values, case.original.read(name, place.rows, values.dtype))


def _error(found: Judged, right: Parts) -> float:
    expected = right[found.part].double()
    if expected.shape != found.value.shape:
        return float("nan")
    size, error = expected.square().mean().sqrt().item(), (found.value - expected).square().mean().sqrt().item()
    return error / size if size else float("inf")


def _header_verdicts(case: _Case) -> list[_Verdict]:
    found = case.target.header_findings()
    return [_Verdict(name, (mistake,), float("nan")) for mistake, names in found.items() for name in names]


def _config_verdicts(case: _Case) -> list[_Verdict]:
    """What in config.json makes it another model, or says otherwise than the files how weights are stored."""
    if not isinstance(case.target, ConvertedHuggingFace):
        return []
    files, found = case.target.files, []
    try:
        config = ModelConfig.from_hf(files.config_json)
        names = [field.name for field in fields(ModelConfig) if field.name != "quantization"]
        found += [("config_differs", name) for name in names if getattr(config, name) != getattr(case.config, name)]
        found += [("storage_misdescribed", key) for key in _storage_differences(case, files, config)]
    except ValueError as error:
        found.append(("config_differs", str(error)))
    return [_Verdict(f"{CONFIG_NAME}: {said}", (mistake,), float("nan")) for mistake, said in found]


def _storage_differences(case: _Case, files: SafetensorsFolder, config: ModelConfig) -> list[str]:
    """Keys of quantization_config."""
    weights = {name for place in case.places for name in place.names if name in files.tensors}
    in_fp8 = {name for name in weights if files.tensors[name].dtype == FP8}
    found = ["quantization_config"] if in_fp8 != {name for name in weights if is_quantized(name, config)} else []
    described = config.quantization
    if in_fp8 and described is not None:
        original = case.config.quantization or QuantizationConfig()
        if described.block_size != original.block_size:
            found.append("quantization_config.weight_block_size")
        if described.scale_fmt == "ue8m0" != original.scale_fmt:
            found.append("quantization_config.scale_fmt")
    return found


def _judgement(names: set[str], verdicts: list[_Verdict]) -> Judgement:
    """One verdict a tensor: of a vocabulary that was judged in pieces, the worst error and all mistakes."""
    merged: dict[str, _Verdict] = {}
    for verdict in verdicts:
        before = merged.get(verdict.name)
        if before is None:
            merged[verdict.name] = verdict
            continue
        known = bool(before.mistakes and verdict.mistakes)
        mistakes = tuple(dict.fromkeys((*before.mistakes, *verdict.mistakes))) if known else ()
        merged[verdict.name] = _Verdict(verdict.name, mistakes, _worse(before.error, verdict.error))
    findings = []
    for mistake in BY_NAME.values():
        of_kind = [verdict for verdict in merged.values() if mistake.name in verdict.mistakes]
        if of_kind:
            findings.append(_finding(mistake.name, mistake.said, of_kind))
    unexplained = [verdict for verdict in merged.values() if not verdict.mistakes]
    said = "differ, by no mistake that is known here; look at the worst one's values"
    return Judgement(
        tensors=len(names),
        right=len(names - merged.keys()),
        findings=sorted(findings, key=lambda one: -one.tensors),
        unexplained=_finding("unexplained", said, unexplained) if unexplained else None,
    )


def _finding(name: str, said: str, verdicts: list[_Verdict]) -> Finding:
    worst = max(verdicts, key=lambda one: -1.0 if one.error != one.error else one.error)
    return Finding(name, said, len(verdicts), worst.name, worst.error)


def _worse(a: float, b: float) -> float:
    return max((one for one in (a, b) if one == one), default=float("nan"))
