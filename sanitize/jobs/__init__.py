"""Jobs: the order in which stages are called. Each has one config and one function, in a file of its name.

from sanitize.jobs import CleanConfig, run_job

run_job(CleanConfig(shards=("data/train-*.tar",)), "runs/first")
"""

from sanitize.jobs.certify import CertifyRunConfig
from sanitize.jobs.clean import CleanConfig
from sanitize.jobs.condense import CondenseRunConfig
from sanitize.jobs.denoise import DenoiseRunConfig
from sanitize.jobs.ingest import IngestConfig
from sanitize.jobs.job import JOBS, Job, JobConfig, run_job
from sanitize.jobs.redteam import RedTeamConfig
from sanitize.jobs.repair import RepairRunConfig
from sanitize.jobs.robustness import RobustnessRunConfig
from sanitize.jobs.train import TrainRunConfig

__all__ = [
    "JOBS",
    "CertifyRunConfig",
    "CleanConfig",
    "CondenseRunConfig",
    "DenoiseRunConfig",
    "IngestConfig",
    "Job",
    "JobConfig",
    "RedTeamConfig",
    "RepairRunConfig",
    "RobustnessRunConfig",
    "TrainRunConfig",
    "run_job",
]
