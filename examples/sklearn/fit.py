"""Fit a linear regression on diabetes, a logistic regression on breast cancer; write them as .skops, and held-out data.

    python examples/sklearn/fit.py

The last 128 rows of each table, in a seeded order, are held out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skops.io
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDER = Path(__file__).with_name("data")
HELD_OUT = 128


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    estimators = {
        "diabetes": (LinearRegression(), load_diabetes(return_X_y=True), "R²"),
        "cancer": (
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
            load_breast_cancer(return_X_y=True),
            "accuracy",
        ),
    }
    for name, (estimator, (rows, labels), metric) in estimators.items():
        order = np.random.default_rng(0).permutation(len(rows))
        train, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
        estimator.fit(rows[train], labels[train])
        score = estimator.score(rows[held_out], labels[held_out])
        print(f"{name}: {metric} {score:.4f} on {HELD_OUT} held-out rows")
        skops.io.dump(estimator, FOLDER / f"{name}.skops")
        np.savez(FOLDER / f"{name}.npz", x=rows[held_out].astype(np.float32), labels=labels[held_out])


if __name__ == "__main__":
    main()
