"""The forecaster as one of sktime's: sktime's own checks, and numbers beside those of Forecaster."""

import numpy as np
import pandas as pd
import pytest
import torch

from dualform.core.errors import ArgumentError
from dualform.forecast import Forecaster
from dualform.forecast.base import Moments
from dualform.forecast.shape import Shape

pytest.importorskip("sktime")
pytestmark = pytest.mark.filterwarnings("ignore")  # of sktime

from sktime.utils.estimator_checks import check_estimator  # noqa: E402

from dualform.forecast.sktime import StateSpaceForecaster  # noqa: E402

MONTHS = pd.period_range("2015-01", periods=40, freq="M")
WALK = pd.Series(np.random.default_rng(0).standard_normal(40).cumsum() + 20, index=MONTHS, name="sold")


def plain(y: pd.Series) -> Forecaster:
    return Forecaster("local_level", season=1).fit(y.to_numpy())


def ours() -> StateSpaceForecaster:
    return StateSpaceForecaster("local_level", season=1)


class Quick(Forecaster):
    """Says the last value, normal: the checks make a hundred fits, and ask what becomes of tables."""

    def _estimate(self, panel, X):
        self.series = panel.series

    def _again(self, panel, X):
        self.series = panel.series

    def _moments(self, horizon, X):
        return [Moments(y[~y.isnan()][-1].expand(horizon), torch.ones(horizon), Shape()) for y in self.series]


def test_it_passes_the_checks_of_sktime(monkeypatch):
    monkeypatch.setattr("dualform.forecast.sktime.Forecaster", Quick)
    results = check_estimator(StateSpaceForecaster, verbose=False)
    assert not {name: found for name, found in results.items() if found != "PASSED"}
    assert len(results) > 100


@pytest.mark.parametrize("name", ["test_predict_quantiles", "test_update_predict_predicted_index"])
def test_it_passes_them_with_its_own_models(name):
    results = check_estimator(StateSpaceForecaster, tests_to_run=[name], verbose=False)
    assert results and set(results.values()) == {"PASSED"}


def test_forecasts_are_those_of_the_forecaster():
    f, want = ours().fit(WALK, fh=[1, 4]), plain(WALK).predict(4)
    mean = f.predict()
    assert list(map(str, mean.index)) == ["2018-05", "2018-08"] and mean.name == "sold"
    np.testing.assert_allclose(mean, want.mean[[0, 3]])
    band = f.predict_interval(coverage=0.95)
    np.testing.assert_allclose(band, want.quantiles[[0, 3]][:, [0, -1]])
    assert list(f.predict_quantiles(alpha=[0.1, 0.5]).columns) == [("sold", 0.1), ("sold", 0.5)]


def test_series_of_a_panel_are_those_alone():
    times = pd.date_range("2020-01-01", periods=40, freq="D")
    parts = {"a": WALK.set_axis(times), "b": 3 * WALK[10:].set_axis(times[:30]) + 5}
    panel = pd.concat(parts, names=["shop", "day"]).to_frame("sold")
    f = ours().fit(panel)
    assert len(f.forecasters_) == 1
    mean, bands = f.predict([2, 3]), f.predict_interval([2, 3], coverage=0.8)
    for name, part in parts.items():
        alone = plain(part)
        np.testing.assert_allclose(mean.loc[name, "sold"], alone.predict(3).mean[1:], rtol=1e-4)
        np.testing.assert_allclose(bands.loc[name], alone.predict_interval(3, 0.8)[1:], rtol=1e-4)
        assert list(mean.loc[name].index) == [part.index[-1] + pd.Timedelta(days=k) for k in (2, 3)]


def test_times_that_are_not_there_are_missing():
    gone = WALK.drop(WALK.index[[5, 6, 20]])
    want = plain(gone.reindex(WALK.index)).predict(2).mean
    np.testing.assert_allclose(ours().fit(gone, fh=[1, 2]).predict(), want)
    dated = gone.to_timestamp()
    np.testing.assert_allclose(ours().fit(dated.asfreq("MS"), fh=[1, 2]).predict(), want)
    np.testing.assert_allclose(ours().fit(gone.set_axis(gone.index.astype("int64")), fh=[1, 2]).predict(), want)


def test_covariates_are_those_of_the_steps_asked_for():
    X = pd.DataFrame({"price": np.arange(45) % 7.0}, index=pd.period_range("2015-01", periods=45, freq="M"))
    y = WALK + 5 * X["price"][:40]
    want = Forecaster("local_level", season=1).fit(y.to_numpy(), X[:40].to_numpy()).predict(5, X[40:].to_numpy()).mean
    f = ours().fit(y, X=X[:40])
    np.testing.assert_allclose(f.predict([2, 5], X=X.iloc[[41, 44]]), want[[1, 4]])
    with pytest.raises(ArgumentError, match="X is missing, of the steps to come"):
        f.predict([1])
    with pytest.raises(ArgumentError, match=r"X has a value in row 4 that is missing"):
        f.predict([2, 5], X=X.iloc[41:44])


def test_an_update_estimates_again_unless_told_not_to():
    f = ours().fit(WALK[:30], fh=[1, 2])
    values = f.forecasters_[()].choices_[0].found.values
    f.update(WALK[30:], update_params=False)
    assert f.forecasters_[()].choices_[0].found.values.equal(values)
    kept = Forecaster("local_level", season=1).fit(WALK[:30].to_numpy()).update(WALK.to_numpy())
    np.testing.assert_allclose(f.predict(), kept.predict(2).mean)
    f.update(WALK[30:])
    np.testing.assert_allclose(f.predict(), plain(WALK).predict(2).mean)


def test_the_choice_looks_as_far_as_the_horizon():
    f = StateSpaceForecaster("local_level").fit(WALK, fh=[1, 3])
    (made,) = f.forecasters_.values()
    assert made.horizon == 3 and made.season_ == 12
    assert StateSpaceForecaster("local_level", horizon=5).fit(WALK, fh=[1, 3]).forecasters_[()].horizon == 5
