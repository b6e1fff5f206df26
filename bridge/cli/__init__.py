"""The `minimax-m2` command.

Exit status: 0 when everything holds, 1 when something differs or a checkpoint is not as it should be, 2 when the
command could not do its work (bad input, output folder in use, disk full, a bug of ours).

Progress is drawn on a terminal only; --json prints one JSON object instead of a table. Under torchrun the long verbs
share their work among all ranks, and rank 0 speaks.
"""

import typer

from bridge.cli.check import inspect, plan, verify
from bridge.cli.common import guarded
from bridge.cli.convert import export_, import_
from bridge.cli.prove import bench, demo, roundtrip
from bridge.cli.train import plot, train
from bridge.cli.validate import validate

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for verb in (demo, inspect, plan, import_, export_, verify, validate, roundtrip, bench, train, plot):
    app.command(verb.__name__.removesuffix("_"))(guarded(verb))
