"""Everything that `import sanitize` offers; `sanitize/__init__.py` imports this module when a name is first used.

The jobs that share their name with a subpackage (certify, condense, denoise, redteam, repair, train) are in
`sanitize.jobs` alone.
"""

from sanitize.arrays import PoisonFound, find_poison
from sanitize.attack import poison_shards
from sanitize.certify import certify_partitions, certify_smoothing, train_partitions
from sanitize.compute import Compute
from sanitize.condense import condense_dataset, load_condensed
from sanitize.data.digits import write_digits
from sanitize.data.index import index_shards
from sanitize.denoise import denoise_shards, fit_pca
from sanitize.drift import check_drift, fit_projection, merge_statistics, summarise_shards
from sanitize.embed import embed_shards, import_table, pretrain_simclr, train_embedder
from sanitize.jobs import clean, demo, ingest, make_reference, plan, refit, restore, robustness, verify
from sanitize.measure import measure_robustness
from sanitize.package import load_model, package_model
from sanitize.redteam import measure_case, sample_shards, sum_up
from sanitize.repair import repair_model
from sanitize.report import (
    write_certificate_report,
    write_condensation_report,
    write_denoising_report,
    write_drift_report,
    write_redteam_report,
    write_report,
    write_robustness_report,
    write_training_report,
)
from sanitize.score import fit_scorer, score_shards
from sanitize.select import judge_shards, restore_samples, select_samples, write_selected
from sanitize.train import drop_scores, train_robust

__all__ = [
    "Compute",
    "PoisonFound",
    "certify_partitions",
    "certify_smoothing",
    "check_drift",
    "clean",
    "condense_dataset",
    "demo",
    "denoise_shards",
    "drop_scores",
    "embed_shards",
    "find_poison",
    "fit_pca",
    "fit_projection",
    "fit_scorer",
    "import_table",
    "index_shards",
    "ingest",
    "judge_shards",
    "load_condensed",
    "load_model",
    "make_reference",
    "measure_case",
    "measure_robustness",
    "merge_statistics",
    "package_model",
    "plan",
    "poison_shards",
    "pretrain_simclr",
    "refit",
    "repair_model",
    "restore",
    "restore_samples",
    "robustness",
    "sample_shards",
    "score_shards",
    "select_samples",
    "sum_up",
    "summarise_shards",
    "train_embedder",
    "train_partitions",
    "train_robust",
    "verify",
    "write_certificate_report",
    "write_condensation_report",
    "write_denoising_report",
    "write_digits",
    "write_drift_report",
    "write_redteam_report",
    "write_report",
    "write_robustness_report",
    "write_selected",
    "write_training_report",
]
