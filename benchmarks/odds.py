"""The ODDS tables of the anomaly benchmarks, from `../shared/data/odds`, and what the papers report on them."""

from typing import NamedTuple

import numpy as np

from benchmarks.data import SHARED

# file, and the AUC of RCA and of RobustRealNVP in B. Liu (2022), Tables 2.1 and 3.1. Their "sensor" is not public.
TABLES: dict[str, tuple[str, float, float | None]] = {
    "vowels": ("40_vowels", 0.917, 0.959),
    "pima": ("29_Pima", 0.711, 0.678),
    "optdigits": ("26_optdigits", 0.890, None),
    "letter": ("20_letter", 0.802, 0.930),
    "cardio": ("6_cardio", 0.905, 0.737),
    "arrhythmia": ("odds_arrhythmia", 0.806, 0.786),
    "breastw": ("4_breastw", 0.978, None),
    "musk": ("25_musk", 1.000, 0.991),
    "mnist": ("24_mnist", 0.858, 0.818),
    "satimage-2": ("31_satimage-2", 0.977, 0.943),
    "satellite": ("30_satellite", 0.712, 0.709),
    "mammography": ("23_mammography", 0.844, 0.841),
    "thyroid": ("38_thyroid", 0.956, 0.961),
    "annthyroid": ("2_annthyroid", 0.688, 0.880),
    "ionosphere": ("odds_ionosphere", 0.846, 0.900),
    "pendigits": ("28_pendigits", 0.856, 0.748),
    "shuttle": ("32_shuttle", 0.935, 0.995),
    "glass": ("odds_glass", 0.998, 0.786),
}
CHAPTERS = {  # the tables each method's mean is over
    # Without glass: nine anomalies, four of them in a test set; the paper's .998 cannot be repeated.
    "RCA": tuple(name for name in TABLES if name != "glass"),
    "RobustRealNVP": tuple(name for name, (_, _, auc) in TABLES.items() if auc is not None),
}
PAPER = {
    "RCA, paper": {name: auc for name, (_, auc, _) in TABLES.items()},
    "RobustRealNVP, paper": {name: auc for name, (_, _, auc) in TABLES.items() if auc is not None},
}


class Split(NamedTuple):
    """60 % of a table to train on, without labels, and the rest to test on.

    Attributes:
        train_ND, test_ND: float64.
        anomalous_N: bool, of the test rows.
        anomaly_ratio: of the whole table.
    """

    train_ND: np.ndarray
    test_ND: np.ndarray
    anomalous_N: np.ndarray
    anomaly_ratio: float


def split(name: str, seed: int) -> Split:
    """The split of one seed; shuffled, because in several tables the row order gives the labels away."""
    path = SHARED / "odds" / f"{TABLES[name][0]}.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing: this benchmark needs the shared data folder beside the checkout")
    with np.load(path) as table:
        x_ND, anomalous_N = table["X"].astype(np.float64), table["y"].astype(bool)
    order = np.random.default_rng(seed).permutation(len(x_ND))
    train, test = np.split(order, [round(0.6 * len(order))])
    return Split(x_ND[train], x_ND[test], anomalous_N[test], float(anomalous_N.mean()))
