"""The `sanitize` command: one file a subcommand, with its options and a function that shows the result.

Exit codes: 0 done, 1 the run failed, 2 bad usage or configuration, 3 a batch of `ingest` is held for a person, or a
requirement of `redteam` was missed; 130, 143, 129 it was interrupted by SIGINT, SIGTERM, SIGHUP. Samples in quarantine
are a result, not a failure.
"""

from flows.cli.app import app
from flows.cli.certify import certify
from flows.cli.clean import clean
from flows.cli.condense import condense
from flows.cli.demo import demo
from flows.cli.denoise import denoise
from flows.cli.importing import import_
from flows.cli.ingest import approve, batches, ingest, reference, refit, reject, retry
from flows.cli.inspect import inspect
from flows.cli.methods import EPILOGS
from flows.cli.packaging import package
from flows.cli.plan import plan
from flows.cli.poison import poison
from flows.cli.redteam import redteam
from flows.cli.repair import repair
from flows.cli.report import report
from flows.cli.restore import restore
from flows.cli.robustness import robustness
from flows.cli.train import train
from flows.cli.verify import verify

# In the order of `sanitize --help`: the main road first.
_TRAINING = (train, package, certify, repair, condense, denoise, robustness)
_INGEST = (reference, ingest, batches, approve, reject, retry, refit)
_AROUND = (import_, inspect, plan, poison, redteam, restore, verify, report, demo)
for _command in (clean, *_INGEST, *_TRAINING, *_AROUND):
    _name = _command.__name__.rstrip("_")  # `import` cannot name a function
    app.command(_name, epilog=EPILOGS.get(_name))(_command)

__all__ = ["app"]
