"""Vector autoregressions and dynamic factors against statsmodels."""

import warnings

import numpy as np
import pytest
import torch

from dualform.core.errors import ArgumentError
from dualform.gaussian import Belief, dynamic_factor, var
from vectors import close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sm = pytest.importorskip("statsmodels.api")

pytestmark = pytest.mark.filterwarnings("ignore")  # of statsmodels


def growth(missing=False):
    """Quarterly changes of the logarithms of output, consumption and investment, in per cent."""
    table = sm.datasets.macrodata.load_pandas().data[["realgdp", "realcons", "realinv"]]
    y = 100 * np.log(table).diff().to_numpy()[1:81]
    if missing:
        y[5, 0] = y[10, 1:] = y[20:23] = np.nan
    return y


COEFFICIENTS = np.array(
    [
        [[0.2, 0.1, 0.02], [0.1, 0.3, 0.0], [0.5, 0.2, -0.1]],
        [[0.1, 0.0, 0.01], [0.0, 0.1, 0.02], [0.3, -0.2, 0.1]],
    ]
)
FACTOR = np.array([[0.9, 0, 0], [0.4, 0.6, 0], [2.0, 1.0, 3.0]])


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("trend", ["c", "n"])
def test_the_likelihood_of_a_vector_autoregression_equals_statsmodels(trend, missing):
    y = growth(missing)
    theirs = sm.tsa.VARMAX(y, order=(2, 0), trend=trend)
    lower = FACTOR[np.tril_indices(3)]
    intercept = [0.5, 0.4, 0.7] if trend == "c" else []
    params = np.concatenate([intercept, COEFFICIENTS.transpose(1, 0, 2).ravel(), lower])
    model = var(2, 3, intercept=trend == "c").set(coefficients=COEFFICIENTS, cholesky=lower)
    if trend == "c":
        model.set(intercept=intercept)
    assert abs(model.log_likelihood(y).item() - theirs.loglike(params)) < 1e-6
    ahead, want = model.forecast(y, 4), theirs.smooth(params).get_forecast(4)
    close(torch.as_tensor(ahead.mean), torch.as_tensor(want.predicted_mean), 1e-8)
    close(
        torch.as_tensor(ahead.cov),
        torch.as_tensor(want.prediction_results.forecasts_error_cov.transpose(2, 0, 1)),
        1e-8,
    )


def test_given_its_first_steps_it_is_least_squares():
    """statsmodels' VAR, whose likelihood is conditional on the first p observations."""
    y = growth()
    theirs = sm.tsa.VAR(y).fit(2, trend="c")
    cov = np.asarray(theirs.sigma_u_mle)
    model = var(2, 3).set(intercept=theirs.intercept, coefficients=theirs.coefs, covariance=cov)
    close(model.covariance, torch.as_tensor(cov), 1e-12)
    y = torch.as_tensor(y)
    known = Belief(
        torch.cat([y[1], y[0]])[None], y.new_zeros(1, 6, 6), torch.ones(1, dtype=torch.int64), y.new_zeros(1, 6, 0)
    )
    conditional = model.build().log_likelihood(y[2:], known)
    assert abs(conditional.item() - theirs.llf) < 1e-6


def test_a_vector_autoregression_is_fitted_where_values_are_missing():
    y = growth(missing=True)[:, :2]
    found = var(1, 2).fit(y)
    assert found.converged, found.message
    theirs = sm.tsa.VARMAX(y, order=(1, 0), trend="c")
    assert found.log_likelihood > theirs.fit(disp=False, maxiter=100).llf - 1e-6
    assert len(found.names) == 2 + 4 + 3 and found.names[2] == "coefficients[1, 1, 1]"
    assert found.forecast(3).interval(0.8)[0].shape == (3, 2)


def test_estimates_are_stationary_where_the_series_is_not():
    walk = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    model = var(1, 2)
    model.fit(walk, max_iter=15)
    assert torch.linalg.eigvals(model.coefficients.detach()[0]).abs().max() < 1


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(("factors", "order"), [(1, 2), (2, 1)])
def test_the_likelihood_of_dynamic_factors_equals_statsmodels(factors, order, missing):
    y = growth(missing) - np.nanmean(growth(missing), 0)
    theirs = sm.tsa.DynamicFactor(y, k_factors=factors, factor_order=order)
    loadings = np.array([[0.7, 0.1], [0.5, -0.3], [2.5, 0.8]])[:, :factors]
    variances = [0.3, 0.2, 5.0]
    transition = np.array([[[0.5]], [[0.2]]]) if factors == 1 else np.array([[[0.5, 0.1], [-0.2, 0.3]]])
    params = np.concatenate([loadings.ravel(), variances, transition.transpose(1, 0, 2).ravel()])
    model = dynamic_factor(factors, order, 3).set(loadings=loadings, variances=variances, transition=transition)
    assert abs(model.log_likelihood(y).item() - theirs.loglike(params)) < 1e-6
    close(torch.as_tensor(model.forecast(y, 4).mean), torch.as_tensor(theirs.smooth(params).forecast(4)), 1e-8)


def test_a_dynamic_factor_is_fitted():
    y = growth(missing=True)
    found = dynamic_factor(1, 1, 3, intercept=True).fit(y)
    assert found.converged, found.message
    theirs = sm.tsa.DynamicFactor(y - np.nanmean(y, 0), k_factors=1, factor_order=1)
    assert found.log_likelihood > theirs.fit(disp=False, maxiter=100).llf - 1e-6


def test_several_panels_at_once():
    y = torch.as_tensor(growth(missing=True))
    panels = torch.stack([y[:50], y[30:]])[..., :2]
    for model in (var(1, 2), dynamic_factor(1, 1, 2)):
        models = model.expand(2)
        models.begin(panels)
        for row in range(2):
            close(
                models.row(row).log_likelihood(panels[row])[None], models.log_likelihood(panels)[row : row + 1], 1e-10
            )


def test_errors():
    for message, call in {
        "order is 0": lambda: var(0, 2),
        "series is 1.5": lambda: var(1, 1.5),
        "2 factors of 2 series": lambda: dynamic_factor(2, 1, 2),
        "not positive definite": lambda: var(1, 2).set(covariance=[[1.0, 2.0], [2.0, 1.0]]),
        "not stationary": lambda: var(1, 1).set(coefficients=[[[1.1]]]).log_likelihood(torch.ones(5, 1)),
        r"expected \(B, T, 2\) or \(T, 2\)": lambda: var(1, 2).fit(torch.ones(9, 3)),
    }.items():
        with pytest.raises(ArgumentError, match=message):
            call()
