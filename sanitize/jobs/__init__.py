"""Jobs: the order in which stages are called. Each has one config and one function, in a file of its name.

    from sanitize import jobs

    run = jobs.clean("data/train-*.tar", out="runs/first")

`sanitize.jobs.NAME` is the job as a function. Its file is imported by its full name: `from sanitize.jobs.clean import
CleanConfig`.
"""

# The functions have the names of their files. A name stays bound to the function because all files are imported here:
# Python binds a file to its name in the package once, when the file is first imported.
from sanitize.jobs.certify import CertifyRun, CertifyRunConfig, certify
from sanitize.jobs.clean import CleanConfig, CleanRun, clean
from sanitize.jobs.condense import CondenseRun, CondenseRunConfig, condense
from sanitize.jobs.demo import DemoConfig, DemoRun, demo
from sanitize.jobs.denoise import DenoiseRun, DenoiseRunConfig, denoise
from sanitize.jobs.ingest import IngestConfig, ingest
from sanitize.jobs.job import JOBS, Job, JobConfig, run_job
from sanitize.jobs.package import PackageRun, PackageRunConfig, package
from sanitize.jobs.plan import PlanConfig, Planned, plan
from sanitize.jobs.redteam import RedTeamConfig, RedTeamRun, redteam
from sanitize.jobs.reference import ReferenceRunConfig, reference
from sanitize.jobs.refit import RefitConfig, refit
from sanitize.jobs.repair import RepairRun, RepairRunConfig, repair
from sanitize.jobs.restore import Restored, RestoreRunConfig, restore
from sanitize.jobs.robustness import RobustnessRun, RobustnessRunConfig, robustness
from sanitize.jobs.store import IngestStore
from sanitize.jobs.train import TrainRun, TrainRunConfig, train
from sanitize.jobs.verify_store import verify_path as verify

__all__ = [
    "JOBS",
    "CertifyRun",
    "CertifyRunConfig",
    "CleanConfig",
    "CleanRun",
    "CondenseRun",
    "CondenseRunConfig",
    "DemoConfig",
    "DemoRun",
    "DenoiseRun",
    "DenoiseRunConfig",
    "IngestConfig",
    "IngestStore",
    "Job",
    "JobConfig",
    "PackageRun",
    "PackageRunConfig",
    "PlanConfig",
    "Planned",
    "RedTeamConfig",
    "RedTeamRun",
    "ReferenceRunConfig",
    "RefitConfig",
    "RepairRun",
    "RepairRunConfig",
    "RestoreRunConfig",
    "Restored",
    "RobustnessRun",
    "RobustnessRunConfig",
    "TrainRun",
    "TrainRunConfig",
    "certify",
    "clean",
    "condense",
    "demo",
    "denoise",
    "ingest",
    "package",
    "plan",
    "redteam",
    "reference",
    "refit",
    "repair",
    "restore",
    "robustness",
    "run_job",
    "train",
    "verify",
]
