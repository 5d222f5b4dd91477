"""``dualform forecast``: tables that are read, tables that are refused, and the folder that comes of one."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dualform.cli import main as cli
from dualform.core.errors import DataError
from dualform.forecast.forecaster import Forecaster
from dualform.forecast.frames import season_of, season_of_index
from dualform.forecast.report import Job, write
from dualform.forecast.table import DEMO, columns_of, read_table

MONTHS = pd.date_range("2020-01-01", periods=30, freq="MS")


def table(tmp_path: Path, frame: pd.DataFrame, name: str = "data.csv") -> Path:
    path = tmp_path / name
    frame.to_csv(path, index=False) if name.endswith(".csv") else frame.to_parquet(path)
    return path


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return 10 + np.random.default_rng(seed).normal(size=count).cumsum()


@pytest.mark.parametrize(
    "frequency, season",
    {
        "MS": 12,
        "ME": 12,
        "QS-OCT": 4,
        "QE": 4,
        "YS": 1,
        "W-SUN": 52,
        "D": 7,
        "B": 5,
        "h": 24,
        "2h": 12,
        "30min": 48,
        "7min": 1,
        "5h": 1,
        "2MS": 6,
        "s": 1,
    }.items(),
)
def test_a_frequency_has_a_season(frequency, season):
    assert season_of(frequency) == season


@pytest.mark.parametrize("frequency", ["MS", "ME", "W-WED", "D", "B", "h", "15min", "QS-JAN", "YE-DEC"])
def test_frequencies_are_found_in_spite_of_gaps(frequency, tmp_path):
    times = pd.date_range("2021-03-01", periods=60, freq=frequency)
    keep = np.setdiff1d(np.arange(60), [7, 8, 21, 40])
    path = table(tmp_path, pd.DataFrame({"t": times, "y": numbers(60)}).iloc[keep])
    found = read_table(path, "t", ["y"])
    series = found.series["y"]
    assert list(series.index) == list(times)
    assert found.gaps == {"y": 4} and list(np.flatnonzero(series.isna())) == [7, 8, 21, 40]


def test_whole_numbers_are_times_at_their_smallest_distance(tmp_path):
    path = table(tmp_path, pd.DataFrame({"t": [1950, 1960, 1970, 1990, 2000, 2010], "y": numbers(6)}))
    assert list(read_table(path, "t", ["y"]).series["y"].index) == list(range(1950, 2011, 10))


@pytest.mark.parametrize("form, frequency", [("%Y%m%d", "D"), ("%Y%m", "MS")])
def test_dates_are_recognised_without_their_hyphens(form, frequency, tmp_path):
    times = pd.date_range("2019-11-01", periods=30, freq=frequency)
    path = table(tmp_path, pd.DataFrame({"t": times.strftime(form).astype(int), "y": numbers(30)}))
    assert list(read_table(path, "t", ["y"]).series["y"].index) == list(times)


def test_series_are_told_apart_by_an_id_and_by_columns(tmp_path):
    months = [*MONTHS, *MONTHS[5:25]]
    frame = pd.DataFrame({"t": months, "shop": ["x"] * 30 + [7] * 20, "a": numbers(50), "b": numbers(50, 1)})
    path = table(tmp_path, frame)
    found = read_table(path, "t", ["a", "b"], id="shop")
    assert {name: len(series) for name, series in found.series.items()} == {"x a": 30, "x b": 30, "7 a": 20, "7 b": 20}
    assert found.keys["7 b"] == ("7", "b") and season_of_index(found.series["7 b"].index) == 12
    assert found.series["7 a"].iloc[0] == pytest.approx(frame["a"].iloc[30])
    assert list(read_table(path, "t", ["a"], id="shop").series) == ["x", "7"]


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="Parquet is read by pyarrow")
def test_parquet_is_read_as_csv_is(tmp_path):
    frame = pd.DataFrame({"t": MONTHS, "y": numbers(30)})
    one = read_table(table(tmp_path, frame, "data.parquet"), "t", ["y"]).series["y"]
    pd.testing.assert_series_equal(one, read_table(table(tmp_path, frame), "t", ["y"]).series["y"])


def test_quarters_are_times(tmp_path):
    words = [f"{1970 + k // 4} Q{k % 4 + 1}" for k in range(20)]
    one = read_table(table(tmp_path, pd.DataFrame({"t": words, "y": numbers(20)})), "t", ["y"])
    assert season_of_index(one.series["y"].index) == 4
    assert list(one.series["y"].index) == list(pd.date_range("1970-01-01", periods=20, freq="QS"))


def test_spreadsheets_write_semicolons_and_decimal_commas(tmp_path):
    frame = pd.DataFrame({"t": MONTHS, "y": numbers(30)})
    want = read_table(table(tmp_path, frame), "t", ["y"]).series["y"]
    for options in ({"sep": ";"}, {"sep": ";", "decimal": ","}, {"sep": "\t"}):
        frame.to_csv(tmp_path / "other.csv", index=False, **options)
        pd.testing.assert_series_equal(read_table(tmp_path / "other.csv", "t", ["y"]).series["y"], want)


def changed(column: str, row: int, value: object) -> pd.DataFrame:
    frame = pd.DataFrame({"month": MONTHS.astype(str).to_numpy(), "sold": numbers(30)}).astype(object)
    frame.loc[row, column] = value
    return frame


PLAIN = changed("sold", 0, 1.5)
BAD = [
    (PLAIN.rename(columns={"sold": "solde"}), r"no column 'sold'\n.*did you mean 'solde'"),
    (PLAIN.rename(columns={"month": "moth"}), r"no column 'month'\n.*did you mean 'moth'"),
    (PLAIN.iloc[:0], "no rows below the header"),
    (changed("month", 4, "2020-04-01"), r"'month': row 5 has the time 2020-04-01 00:00:00 again, which row 4 has"),
    (PLAIN.iloc[[0, 1, 3, 2, 4]], r"'month': row 4 \(2020-03-01.*earlier than row 3"),
    (changed("month", 4, "2020-05-17"), r"no frequency fits its times: 31 days .* is the most common step"),
    (changed("month", 4, "soon"), r"'month', row 5: 'soon' is no time"),
    (changed("month", 4, None), r"'month', row 5: the time is missing"),
    (changed("sold", 9, "many"), r"'sold', row 10: 'many' is no number"),
    (changed("sold", 9, "3,5"), r"'sold', row 10: '3,5' is no number"),
    (changed("sold", 9, np.inf), r"'sold', row 10: an infinite value"),
    (PLAIN.assign(sold=np.nan), r"'sold': all of its 30 values are missing"),
    (PLAIN.assign(sold=4.0), r"'sold': all of its 30 values are 4: nothing can be estimated of a constant"),
    (PLAIN.iloc[:4], r"'sold': 4 values, expected 5 or more"),
    (
        changed("month", 0, "2020-01-01T00:00+01:00").assign(
            month=lambda f: [f.month[0], *["2020-07-01T00:00+02:00"] * 29]
        ),
        r"'month': times with the offsets \+01:00, \+02:00, expected one",
    ),
    (PLAIN.assign(month=np.arange(30) + 0.5), r"'month', row 1: 0.5 is no time"),
    (PLAIN.assign(month=[*range(29), 10**7]), r"30 times are spread over 10,000,001 places"),
]


@pytest.mark.parametrize("frame, message", BAD, ids=range(len(BAD)))
def test_a_table_that_does_not_fit_is_refused_in_a_sentence(frame, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        read_table(table(tmp_path, frame), "month", ["sold"])
    assert "data.csv" in str(error.value)


def test_files_and_frequencies_that_are_none_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.csv", "t", ["y"])
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path, "t", ["y"])
    (tmp_path / "noise.csv").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=r"noise.csv: cannot be read as a table"):
        read_table(tmp_path / "noise.csv", "t", ["y"])
    path = table(tmp_path, PLAIN)
    with pytest.raises(DataError, match="frequency 'monthly' is not known"):
        read_table(path, "month", ["sold"], frequency="monthly")
    with pytest.raises(DataError, match=r"the time 2020-02-01 00:00:00 is not on the frequency 'QS'"):
        read_table(path, "month", ["sold"], frequency="QS")
    with pytest.raises(DataError, match=r"column 'month' is named 2 times, expected one each for time, value and id"):
        read_table(path, "month", ["sold"], id="month")
    with pytest.raises(DataError, match="each once"):
        columns_of("a,b,a")


# The command.


def run(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dualform", "forecast", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_the_demonstration_forecasts_the_nile(tmp_path, monkeypatch, capsys):
    out = tmp_path / "nile"
    code, said, _ = run(monkeypatch, capsys, "--demo", "--model", "local_level", "--out", out)
    assert code == 0 and said.startswith("volume: local level, MASE 0.7")
    names = {"forecast.csv", "components.csv", "forecast.png", "components.png", "report.md", "manifest.json"}
    assert {path.name for path in out.iterdir()} == names
    future = pd.read_csv(out / "forecast.csv")
    assert list(future["year"]) == list(range(1971, 1981)) and (future["mean"].round(1) == 798.4).all()
    columns = ["lower_95", "lower_80", "lower_50", "median", "upper_50", "upper_80", "upper_95"]
    assert (np.diff(future[columns].to_numpy()) > 0).all()
    parts = pd.read_csv(out / "components.csv").pivot(index="year", columns="component", values="mean")
    given = pd.read_csv(DEMO, index_col="year")["volume"]
    assert np.allclose(parts.loc[:1970].sum(axis=1), given) and len(parts) == 110
    report = (out / "report.md").read_text()
    for words in (
        "| level.variance | 1469.17 |",
        "The optimiser converged",
        "seasonal naive",
        "![forecast](forecast.png)",
    ):
        assert words in report


def test_an_optimiser_that_did_not_converge_is_told(tmp_path):
    table = read_table(DEMO, "year", ["volume"])
    forecaster = Forecaster("local_level").fit(table.series)
    (choice,) = forecaster.choices_
    stopped = replace(choice.found, converged=False, message="a Newton step would gain 3 nats")
    forecaster.choices_ = [choice._replace(found=stopped)]
    write(tmp_path, Job("nile.csv", "year", None, 2, "local_level"), table, forecaster, "it was not tried")
    report = (tmp_path / "report.md").read_text()
    assert "**The optimiser did not converge** for volume" in report and "would gain 3 nats" in report
    assert "How good the forecasts are is not known: it was not tried." in report


def test_several_series_make_one_folder(tmp_path, monkeypatch, capsys):
    frame = pd.concat(pd.DataFrame({"t": MONTHS, "shop": name, "y": numbers(30, k)}) for k, name in enumerate("ab"))
    path, out = table(tmp_path, frame.rename(columns={"t": "mean"})), tmp_path / "out"
    words = [path, "--time", "mean", "--value", "y", "--id", "shop", "--horizon", 2, "--model", "local_level"]
    code, said, _ = run(monkeypatch, capsys, *words, "--season", 1, "--out", out)
    assert code == 0 and said.count("local level") == 2
    future = pd.read_csv(out / "forecast.csv")
    assert list(future.columns[:3]) == ["shop", "mean (given)", "mean"] and list(future["shop"]) == ["a", "a", "b", "b"]
    assert list(future["mean (given)"]) == ["2022-07-01", "2022-08-01"] * 2
    assert (out / "forecast-2-b.png").exists() and "| mean of 2 | this |" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["data.csv"], "missing --time, --value, --horizon"),
        ([], "missing DATA, --time, --value, --horizon"),
        (["data.csv", "--demo"], "--demo has its own data"),
        (["data.csv", "--time", "t", "--value", "y", "--horizon", 0], "horizon is 0, expected 1 or more"),
        (["data.csv", "--time", "t", "--value", "y", "--horizon", 10**9], "horizon is 1,000,000,000, expected at most"),
        (["data.csv", "--time", "t", "--value", "y", "--horizon", 2], "data.csv: no such file"),
        (["--demo", "--model", "local"], "did you mean 'local_level'"),
        (["--demo", "--season", 100], "no more than a season of 100"),
    ],
)
def test_the_command_says_what_it_cannot_do_and_writes_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, said = run(monkeypatch, capsys, *words)
    assert code == 2 and message in said and not list(tmp_path.iterdir())
