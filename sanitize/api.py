"""Everything that `import sanitize` offers; `sanitize/__init__.py` imports this module when a name is first used.

Stages and jobs are written out, although registries hold them: type checkers know only the names that imports and
`__all__` spell out; names taken from a registry would have the type Any. `tests/test_api.py` compares the two.
"""

from sanitize.arrays import PoisonFound, find_poison
from sanitize.attack import poison_shards
from sanitize.certification import certify_partitions, certify_smoothing, train_partitions
from sanitize.compute import Compute
from sanitize.condensation import condense_dataset, load_condensed
from sanitize.data.digits import write_digits
from sanitize.data.index import index_shards
from sanitize.denoising import denoise_shards, fit_pca
from sanitize.drift import check_drift, fit_projection, merge_statistics, summarise_shards
from sanitize.embed import embed_canaries, embed_shards, import_table, plant_canaries, pretrain_simclr, train_embedder
from sanitize.hygiene import check_hygiene
from sanitize.importing import import_data
from sanitize.jobs import (
    certify,
    clean,
    condense,
    demo,
    denoise,
    ingest,
    package,
    plan,
    redteam,
    reference,
    refit,
    repair,
    restore,
    robustness,
    train,
    verify,
)
from sanitize.measure import measure_robustness
from sanitize.models.given import import_model
from sanitize.packaging import load_model, package_model
from sanitize.redteaming import measure_case, sample_shards, sum_up
from sanitize.repairs import repair_model
from sanitize.report import (
    write_certificate_report,
    write_condensation_report,
    write_denoising_report,
    write_drift_report,
    write_leak_report,
    write_redteam_report,
    write_report,
    write_robustness_report,
    write_training_report,
)
from sanitize.score import fit_scorer, score_shards
from sanitize.select import judge_shards, restore_samples, select_samples, write_selected
from sanitize.training import drop_scores, train_robust

__all__ = [
    "Compute",
    "PoisonFound",
    "certify",
    "certify_partitions",
    "certify_smoothing",
    "check_drift",
    "check_hygiene",
    "clean",
    "condense",
    "condense_dataset",
    "demo",
    "denoise",
    "denoise_shards",
    "drop_scores",
    "embed_canaries",
    "embed_shards",
    "find_poison",
    "fit_pca",
    "fit_projection",
    "fit_scorer",
    "import_data",
    "import_model",
    "import_table",
    "index_shards",
    "ingest",
    "judge_shards",
    "load_condensed",
    "load_model",
    "measure_case",
    "measure_robustness",
    "merge_statistics",
    "package",
    "package_model",
    "plan",
    "plant_canaries",
    "poison_shards",
    "pretrain_simclr",
    "redteam",
    "reference",
    "refit",
    "repair",
    "repair_model",
    "restore",
    "restore_samples",
    "robustness",
    "sample_shards",
    "score_shards",
    "select_samples",
    "sum_up",
    "summarise_shards",
    "train",
    "train_embedder",
    "train_partitions",
    "train_robust",
    "verify",
    "write_certificate_report",
    "write_condensation_report",
    "write_denoising_report",
    "write_digits",
    "write_drift_report",
    "write_leak_report",
    "write_redteam_report",
    "write_report",
    "write_robustness_report",
    "write_selected",
    "write_training_report",
]
