"""What the estimators of sequences share: data in, models trained, models kept."""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.options import brief
from dualform.models.config import ModelConfig
from dualform.series.labels import check_answers
from dualform.series.members import Member, Task, loaded, mean_outputs, scale, train_members
from dualform.series.panel import Panel, check_channels, check_words, index_names, is_table, panel
from dualform.series.plan import held_out_share, model_config, onward, plan
from dualform.series.portable import Model, build, to_arrays
from dualform.series.progress import progress
from dualform.series.times import in_steps, usual_step
from dualform.series.training import Examples, Look, train


class Deep(BaseEstimator):
    """The base of :class:`~dualform.series.DeepClassifier` and :class:`~dualform.series.DeepRegressor`."""

    model: ModelConfig | None
    members: int
    causal: bool
    steps: int | None
    lr: float | None
    validation: float | str | None
    channels_first: bool
    n_jobs: int | None
    random_state: Any
    verbose: bool
    n_features_in_: int
    step_: float
    models_: list[Model]
    history_: list[list[Look]]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.three_d_array = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "models_")

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {**super().__getstate__()}  # pyright: ignore[reportGeneralTypeIssues]
        if "models_" in state:
            state["models_"] = [to_arrays(model) for model in state["models_"]]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "models_" in state:
            self.models_ = loaded(state["models_"])

    def _where(self, method: str) -> str:
        return f"{type(self).__name__}.{method}"

    def _panel(
        self, X: Any, method: str, *, fresh: bool = False, times: Any = None, rate: float | None = None
    ) -> Panel:
        """The sequences; what a first call sees, later ones are held against."""
        where = self._where(method)
        if not fresh:
            check_is_fitted(self)
            self._check_timing(where, times, rate)
        if table := is_table(X):
            check_words(where, X)
            options = {"dtype": np.float64, "ensure_all_finite": False}
            if fresh or (self._table and times is None and rate is None):
                array = validate_data(self, X, reset=fresh, **options)
            else:
                array = check_array(X, **options)
            names = index_names(X.index) if hasattr(X, "columns") else None
            given = panel(where, array, names=names, times=times)
        else:
            given = panel(where, X, channels_first=self.channels_first, times=times)
        if fresh:
            self._table, self.channels_ = table, given.x.shape[2]
            self.step_ = 1.0 if given.intervals is None else usual_step(given.intervals)
            self._timed = given.intervals is not None
            if not table:
                self.n_features_in_ = self.channels_
        check_channels(where, given, self.channels_)
        return given if given.intervals is None else given._replace(intervals=in_steps(given.intervals, self.step_))

    def _check_timing(self, where: str, times: Any, rate: float | None) -> None:
        """That it is known how far apart the samples are."""
        if rate is not None and not (isinstance(rate, Real) and 0 < float(rate) < np.inf):
            raise ArgumentError(f"{where}: rate is {rate!r}, expected a positive number, or None")
        if times is not None and rate is not None:
            raise ArgumentError(f"{where}: give times or rate, not both", hint="times say how far apart samples are")
        if self._timed and times is None and rate is None:
            raise ArgumentError(
                f"{where}: fit was given times, expected those of these sequences, too",
                hint="times=, or rate=1 for samples that come once in a step of training",
            )

    def _said(self, X: Any, method: str, times: Any, rate: float | None, of: Callable[[Tensor], Tensor]) -> np.ndarray:
        """The mean over members of a function of what they say."""
        check_is_fitted(self)
        given = self._panel(X, method, times=times, rate=rate)
        model = self.models_[0]
        if not model.causal and model.entrance is not None and model.entrance.missing != "marked" and given.holes:
            given = given.bridged()  # they have learned no missing values, and whatever they read is there already
        return mean_outputs(self.models_, given, 1.0 if rate is None else float(rate), of).numpy()

    def _answers(self, y: Any, given: Panel, method: str, *, numeric: bool = False) -> np.ndarray:
        """What is to be learned, one for each sequence."""
        if y is None:
            name = type(self).__name__
            raise ArgumentError(f"{name} requires y to be passed, but the target y is None")
        kind: Any = np.float64 if numeric else None
        check_answers(self._where(method), y, given.names, numeric=numeric)
        array = check_array(y, input_name="y", ensure_2d=False, dtype=kind, ensure_min_samples=0)
        if len(array) != len(given.lengths):
            raise ArgumentError(f"{self._where(method)}: X has {len(given.lengths)} sequences, y has {len(array)}")
        return array

    def _task(self, given: Panel, y: Tensor, head: dict[str, Any], weights: Tensor | None) -> Task:
        """What the members learn; it checks the options."""
        where, count = self._where("fit"), len(y)
        if not isinstance(self.members, int | np.integer) or self.members < 1:
            raise ArgumentError(f"{where}: members is {self.members!r}, expected 1 or more")
        if self.model is not None and not isinstance(self.model, ModelConfig):
            raise ArgumentError(f"{where}: model is {brief(self.model)}, expected a ModelConfig, or None")
        for name, value, kind, words in (
            ("steps", self.steps, Integral, "whole number"),
            ("lr", self.lr, Real, "number"),
        ):
            if value is not None and not (isinstance(value, kind) and value > 0):
                raise ArgumentError(f"{where}: {name} is {value!r}, expected a positive {words}, or None")
        share = held_out_share(where, self.validation, count)
        learned = count - round(share * count)
        config = model_config(causal=self.causal) if self.model is None else self.model
        missing = "marked" if given.holes else "carried"
        options = {"inputs": self.channels_, "standardise": "differences", "missing": missing, **head}
        chosen = plan(learned, steps=self.steps, lr=self.lr)
        return Task(config.to_dict(), options, Examples(given, y), share, chosen, weights)

    def _train(self, task: Task) -> None:
        """Fill ``models_``, in place of those that were there."""
        source = check_random_state(self.random_state)
        seeds = [int(seed) for seed in source.randint(2**31 - 1, size=self.members)]
        with progress(self._where("fit"), self.verbose) as tell:
            members: list[Member] = train_members(task, seeds, self.n_jobs, tell)
        self.models_ = loaded([member.model for member in members])
        self.history_, self._passes = [member.looks for member in members], 0

    def _begin(self, task: Task) -> None:
        """Models that have learned nothing yet, for ``partial_fit``."""
        source = check_random_state(self.random_state)
        self.models_, self.history_, self._passes = [], [[] for _ in range(self.members)], 0
        for seed in source.randint(2**31 - 1, size=self.members):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(seed))
                self.models_.append(build(task.config, task.head))
            scale(self.models_[-1], task.examples.panel)

    def _go_on(self, examples: Examples, weights: Tensor | None) -> None:
        """A pass of all members over some examples."""
        chosen = onward(len(examples.y), self.lr)
        for i, model in enumerate(self.models_):
            looks = train(model, examples, chosen, class_weights=weights, seed=self._passes * self.members + i)
            self.history_[i].extend(looks[-1:])
        self._passes += 1
