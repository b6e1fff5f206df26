"""Training speed of true-width layers, row by row in turns: fusions, CUDA graphs, FP8, and megatron-bridge's layers.

Four layers of true width, 32 experts on each expert-parallel rank, vocabulary 32768, four microbatches of 4096 tokens a
data-parallel rank, megatron-core's distributed optimizer: `train_visit.py` says what a step is, `train_rows.py` what
the rows are. In each round every row is built anew from the same weights and makes a few steps, rounds in alternating
order, so that no row has the cooler GPU; figures are over all rounds, ratios within a round.

FLOP model: `bridge.training.metrics.flops_per_token` (matrix products and half of the scores, three times; what is
recomputed is not counted). MFU is of the bfloat16 peak, for FP8 too. A first round checks: its losses and gradient
norms are held against those of `defaults`, and of its float32 run, from which `defaults` is off by bfloat16's rounding.

    python tests/benchmarks/bench_train.py OUT.json                          one GPU
    python tests/benchmarks/bench_train.py OUT.json --ranks 2 --ep 2         two, 32 experts on each
    python tests/benchmarks/bench_train.py OUT.json --rows defaults graphs   some rows

It starts its own ranks. A row that fails or hangs ends its ranks, is written as failed, and the others go on. Without a
GPU the same code runs a tiny model by gloo, which says that it works and nothing of speed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bridge.model.layer_spec import default_backend

sys.path.insert(0, str(Path(__file__).parent))
import child
from train_rows import BASE, PEER, ROWS, TINY, TRUE_WIDTH, TRUTH, lacks

SIZES = ("tp", "pp", "ep", "etp", "cp")
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}  # or float32 products are TensorFloat-32 in Transformer Engine
VISIT_SECONDS = 150  # within which the ranks start, or a visit comes to its end
GRACE = 45  # seconds after the last moment at which a visit may begin
Line = dict[str, Any]


def schedule(
    names: Iterable[str], rounds: int, *, checked: bool = True, profiled: bool = False
) -> list[tuple[int, str]]:
    """(round, row): round 0 checks all rows, the others time those that are timed, forth and back in turn.

    Profiles come last of all, in a round of their own: in a process that has made one, every launch takes longer, also
    in the profiles after the first.
    """
    names = list(names)
    timed = [name for name in names if ROWS[name].timed]
    order = [(0, name) for name in names] if checked else []
    for number in range(1, rounds + 1):
        order += [(number, name) for name in (timed if number % 2 else reversed(timed))]
    return order + [(rounds + 1, name) for name in timed if profiled]


def left(visits: Sequence[tuple[int, str]], lines: Sequence[Line]) -> list[tuple[int, str]]:
    """The visits still to be made: not those that were begun, nor any of a row that was refused or failed."""
    begun = {(line["round"], line["row"]) for line in lines if "began" in line}
    over = {line["row"] for line in lines if "refused" in line or "failed" in line}
    return [one for one in visits if one not in begun and one[1] not in over]


def unfinished(lines: Sequence[Line]) -> list[Line]:
    """Visits that were begun, and of which nothing came."""
    ended = {(line["round"], line["row"]) for line in lines if {"ended", "failed"} & line.keys()}
    return [line for line in lines if "began" in line and (line["round"], line["row"]) not in ended]


def run_ranks(plan: dict[str, Any], ranks: int, log: Path, limit: float, **environment: str) -> int | None:
    """The ranks' exit status; None if they were ended, after `limit` seconds or because nothing came of a visit."""
    out, began = Path(plan["out"]), time.time()

    def hangs() -> bool:
        return time.time() - max(began, out.stat().st_mtime if out.exists() else 0) > VISIT_SECONDS

    script = str(Path(__file__).with_name("train_visit.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, script, json.dumps(plan)]
    return child.run(command, log, limit, hangs=hangs, **environment)


def measure(
    visits: list[tuple[int, str]],
    plan: dict[str, Any],
    ranks: int,
    until: float,
    report: Callable[[list[Line]], object] = lambda lines: None,
) -> list[Line]:
    """The lines of all visits that there was time for, through as many processes as it takes.

    `report` is given those that there are after each of the processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "visits.jsonl"), Path(folder, "log")
        lines: list[Line] = []
        while (todo := left(visits, lines)) and time.time() < until:
            checks = todo[0][0] == 0
            told = plan | {"visits": [one for one in todo if (one[0] == 0) == checks], "out": str(out), "until": until}
            environment = EXACT if checks else {}
            try:
                status = run_ranks(told, ranks, log, until + GRACE - time.time(), **environment)
            except SystemExit:  # this process is ended
                report(_read(out))
                raise
            for line in unfinished(_read(out)):
                how = (
                    "ended: the time was over, or nothing came of it"
                    if status is None
                    else f"the ranks ended with status {status}"
                )
                _append(out, {"round": line["round"], "row": line["row"], "failed": how, "where": _said(log)})
            before, lines = len(lines), _read(out)
            if not any("began" in line for line in lines[before:]) and time.time() < until:
                raise RuntimeError("the ranks did not come as far as a row:\n" + "\n".join(_said(log)))
            report(lines)
        return lines


def _said(log: Path) -> list[str]:
    return child.last_words(log, 12)


def _read(path: Path) -> list[Line]:
    """Whole lines: ranks that are ended may leave a part of one."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def _append(path: Path, line: Line) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


# ----------------------------------------------------------------------------------------------------- what it comes to


def summary(names: Iterable[str], lines: Sequence[Line], tokens: int, ranks: int) -> dict[str, dict[str, Any]]:
    """A row's figures from its visits; of `tokens` in a step over all ranks."""
    about = next(line for line in lines if "environment" in line)
    table = {name: _figures([x for x in lines if x.get("row") == name], about, tokens, ranks) for name in names}
    for name, row in table.items():
        for other, word in ((BASE, "x defaults"), (PEER, "x megatron-bridge")):
            ratio = _ratio(lines, name, other)
            if ratio is not None and name != other:
                row[word] = ratio
        row |= _agreement(lines, name)
    return table


def _figures(visits: Sequence[Line], about: Line, tokens: int, ranks: int) -> dict[str, Any]:
    words = ("refused", "failed", "where", "profiled", "before")
    row: dict[str, Any] = {word: line[word] for line in visits for word in words if word in line}
    seconds = [one for line in visits for one in line.get("seconds", ())]
    if seconds:
        median = statistics.median(seconds)
        flops = about["flops a token"] * tokens / median / ranks
        row |= {
            "tokens/s": round(tokens / median, 1),
            "quartiles": [round(tokens / one, 1) for one in statistics.quantiles(seconds)[::-2]],
            "ms": [round(1e3 * one, 2) for one in seconds],
            "TFLOP/s a GPU": round(flops / 1e12, 3),
        }
        for word in ("peak GB", "reserved GB"):
            if found := [line[word] for line in visits if word in line]:
                row[word] = round(max(found), 2)
        if about["peak FLOP/s"]:
            row["MFU"] = round(flops / about["peak FLOP/s"], 4)
    return row


def _ratio(lines: Sequence[Line], name: str, other: str) -> float | None:
    """Speed over another row's: the median over rounds that have both."""

    def medians(row: str) -> dict[int, float]:
        return {x["round"]: statistics.median(x["seconds"]) for x in lines if x.get("row") == row and "seconds" in x}

    mine, theirs = medians(name), medians(other)
    common = mine.keys() & theirs.keys()
    return round(statistics.median(theirs[number] / mine[number] for number in common), 4) if common else None


def _agreement(lines: Sequence[Line], name: str) -> dict[str, Any]:
    """The largest relative distance of a step's loss and gradient norm from `defaults`', and from float32's."""
    checks = {line["row"]: line for line in lines if "losses" in line}
    if name not in checks:
        return {}
    found: dict[str, Any] = {"losses": checks[name]["losses"], "gradient norms": checks[name]["norms"]}
    for other, word in ((BASE, "defaults"), (TRUTH, "float32")):
        if other in checks and other != name:
            for what, key in (("loss", "losses"), ("gradient norm", "norms")):
                pairs = zip(checks[name][key], checks[other][key], strict=True)
                found[f"{what} off {word}"] = max(abs(a - b) / abs(b) for a, b in pairs)
    return found


def show(table: dict[str, dict[str, Any]]) -> None:
    columns = ("tokens/s", "TFLOP/s a GPU", "MFU", "peak GB", "x defaults", "x megatron-bridge", "loss off defaults",
               "gradient norm off defaults")  # fmt: skip
    print(" | ".join(["row", *columns, "idle share"]))
    for name, row in table.items():
        reason = next((f"{word}: {row[word]}" for word in ("lacks", "refused", "failed") if word in row), "")
        cells = [f"{row[word]:.4g}" if word in row else "" for word in columns]
        idle = row.get("profiled", {}).get("idle share")
        print(
            " | ".join([name, *cells, "" if idle is None else f"{idle:.1%}"]) + (f"  {reason[:160]}" if reason else "")
        )


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the result goes (JSON)")
    parser.add_argument("--ranks", type=int, default=1, help="one a GPU; without GPUs by gloo")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=3, help="timed visits of each row")
    parser.add_argument("--unchecked", action="store_true", help="no first round: losses are in another record")
    parser.add_argument("--minutes", type=float, default=8.5, help="no visit begins after so many")
    parser.add_argument("--profile", action="store_true", help="one more step of each row, profiled: the idle share")
    return parser.parse_args(given)


def main(options: argparse.Namespace) -> dict[str, Any]:
    until = time.time() + 60 * options.minutes
    gpus = torch.cuda.device_count()
    if 0 < gpus < options.ranks:
        raise SystemExit(f"--ranks {options.ranks}: found {gpus} GPUs; give as many ranks at most")
    if not gpus:
        print("no NVIDIA GPU here: a tiny model by gloo, whose figures say nothing of a GPU", flush=True)
    shape = TRUE_WIDTH if gpus else TINY
    sizes = {name: getattr(options, name) for name in SIZES}
    missing = {name: lacks(ROWS[name], default_backend(), gpu=gpus > 0) for name in options.rows}
    runnable = [name for name, what in missing.items() if what is None]
    plan = {"shape": shape._asdict(), "sizes": sizes, "purposes": ["check", *["time"] * options.rounds, "profile"]}
    visits = schedule(runnable, options.rounds, checked=not options.unchecked, profiled=options.profile and gpus > 0)

    def report(lines: list[Line]) -> dict[str, Any]:
        about = next((line for line in lines if "environment" in line), None)
        if about is None:
            raise SystemExit("the ranks did not come as far as a row")
        tokens = shape.seq * shape.microbatches * about["dp"]
        rows = summary(runnable, lines, tokens, options.ranks)
        config = {
            **shape._asdict(),
            "experts": shape.experts * sizes["ep"],
            "tokens a step": tokens,
            "dp": about["dp"],
            "ranks": options.ranks,
            **sizes,
            "rounds": options.rounds,
            "visits not made": [list(one) for one in left(visits, lines)],
        }
        table = {name: rows[name] if name in rows else {"lacks": missing[name]} for name in options.rows}
        found = {"what": "training speed", **about["environment"], "config": config, "rows": table}
        options.out.write_text(json.dumps(found, indent=1) + "\n")  # what is ended leaves what it had
        return found

    found = report(measure(visits, plan, options.ranks, until, report))
    show(found["rows"])
    return found


if __name__ == "__main__":
    child.end_all_when_ended()
    main(arguments())
