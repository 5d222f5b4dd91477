"""The estimators pass the checks of aeon, where it is installed."""

import warnings

import numpy as np
import pytest

pytest.importorskip("aeon", reason='aeon is not installed: pip install "dualform[aeon]"')

from aeon.testing.estimator_checking import check_estimator

from dualform.series import DeepClassifier
from dualform.series.aeon import DualformClassifier, DualformRegressor


@pytest.mark.parametrize("kind", [DualformClassifier, DualformRegressor])
def test_aeons_checks(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the checks provoke
        found = check_estimator(kind, raise_exceptions=True)
    assert len(found) > 20 and set(found.values()) <= {"PASSED"} | {why for why in found.values() if "SKIPPED" in why}


def test_it_says_what_the_estimator_says():
    X, y = np.random.default_rng(0).normal(size=(8, 2, 12)), np.array(["a", "b"] * 4)
    options = {**DualformClassifier._get_test_params(), "random_state": 0}
    model = DualformClassifier(**options).fit(X, y)
    plain = DeepClassifier(**options, channels_first=True).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), plain.predict_proba(X))
    assert model.classes_.tolist() == ["a", "b"] and model.estimator_.channels_ == 2
