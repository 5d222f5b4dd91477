"""The estimators pass the checks of scikit-learn for estimators."""

import warnings

import pytest
from sklearn.utils.estimator_checks import check_classifiers_train, check_estimator, check_regressors_train

import dualform as df
from dualform.layers.s4d import S4DConfig
from dualform.series import DeepClassifier, DeepRegressor

TINY = df.ModelConfig(0, 8, {"S": (S4DConfig(d_state=2, bidirectional=True),)}, "S")
# Tables whose columns are no times: steps of the model as long as they are, and more training.
MORE = df.ModelConfig(0, 32, {"S": (S4DConfig(d_state=4, bidirectional=True, dt_min=0.1, dt_max=1.0),)}, "S")
LEARNS = {"check_classifiers_train": "with more steps, below", "check_regressors_train": "with more steps, below"}


@pytest.mark.parametrize("kind", [DeepClassifier, DeepRegressor])
def test_scikit_learns_checks(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the checks provoke
        found = check_estimator(kind(model=TINY, steps=3, lr=0.05), expected_failed_checks=LEARNS, on_skip=None)
    passed = [check["check_name"] for check in found if check["status"] == "passed"]
    assert len(passed) > 45
    rest = {check["check_name"]: str(check["exception"]) for check in found if check["status"] == "skipped"}
    assert all("SCIPY_ARRAY_API" in why or "array_api" in why or "installed" in why for why in rest.values()), rest


def test_a_classifier_learns_what_the_checks_give_it():
    check_classifiers_train("DeepClassifier", DeepClassifier(model=MORE, steps=60, lr=0.02))


def test_a_regressor_learns_what_the_checks_give_it():
    check_regressors_train("DeepRegressor", DeepRegressor(model=MORE, steps=120, lr=0.03))
