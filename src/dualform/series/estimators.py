"""Classifiers and regressors of sequences with the manners of scikit-learn."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, DualformError

try:
    from sklearn.base import ClassifierMixin, RegressorMixin
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import column_or_1d
except ImportError as error:
    raise DualformError(
        "dualform.series needs scikit-learn, which is not installed", hint='pip install "dualform[series]"'
    ) from error

from dualform.models.config import ModelConfig
from dualform.series.deep import Deep
from dualform.series.labels import class_names, class_weights, numbered, one_class
from dualform.series.members import Task
from dualform.series.panel import Panel
from dualform.series.portable import Model
from dualform.series.training import Examples


class DeepClassifier(ClassifierMixin, Deep):
    """Classes of sequences, by state space models that are trained on labelled ones.

    X is an array ``(n, T)`` or ``(n, T, C)``, a list of arrays ``(T,)`` or ``(T, C)`` of any lengths, or a frame of
    pandas: with a row for each sequence, with series as cells, or with an index (sequence, time). NaN is a missing
    value, and at the end of a sequence padding. Channels are scaled, inside the models. Of a table ``(n, T)``, whose
    columns are the same times in every row, later tables must have as many; other sequences may have any length.

    Samples are taken to come evenly, unless ``times`` are given: an array ``(T,)``, the same for all sequences, or
    ``(n, T)``, or a list of arrays ``(T,)``, numbers or dates; of a frame with an index (sequence, time) those of the
    index are ``times="index"``. The blocks then read the interval before each sample, in units of ``step_``; they must
    be layers in continuous time, as S4D, S5 and Mamba are. What was learned of even samples can be asked about uneven
    ones, whose times then count in samples, and about another ``rate``.

    Args:
        model: the blocks; None for three of bidirectional S4D, width 64, with dropout.
        members: models that differ in their seed and in what they hold out, whose probabilities are averaged.
        causal: whether the blocks read the past alone, as a stream wants it; not with ``model``.
        steps: of training; None chooses from the number of sequences, see :func:`dualform.series.plan.plan`.
        lr: the peak learning rate; None for 4e-3.
        validation: the share of the sequences that each member holds out, in every class: training stops when the loss
            on them has stopped falling, and keeps the weights where it was lowest; the probabilities are calibrated
            with them. None for none; ``"auto"`` for 0.15 from 400 sequences on: below, they are worth more as examples.
        channels_first: whether X is ``(n, C, T)``, and its lists hold ``(C, T)``.
        class_weight: what a class counts in the loss: a number for each, ``"balanced"`` for all classes alike, or None.
        n_jobs: members that are trained at once, each in a process.
        random_state: of all that is random.
        verbose: whether a bar shows how far training is.

    Attributes:
        classes_: ``(K,)``, the labels, sorted.
        models_: a :class:`~dualform.SequenceClassifier` for each member, for :func:`dualform.save` and for streams.
        history_: the losses of each member while it was trained, a list of :class:`dualform.series.training.Look`.
        channels_: C.
        step_: the median time between two samples, in the unit of ``times``, for dates in seconds; 1 without times.

    Raises:
        ArgumentError: for sequences, times or labels that cannot be learned; names the row.

    Example:
        >>> import numpy as np
        >>> from dualform.series import DeepClassifier
        >>> times = np.linspace(0, 6, 50)
        >>> X = np.stack([np.sin((1 + i % 2) * times + i) for i in range(20)])
        >>> model = DeepClassifier(steps=50, random_state=0).fit(X, ["slow", "fast"] * 10)
    """

    classes_: np.ndarray

    def __init__(
        self,
        *,
        model: ModelConfig | None = None,
        members: int = 1,
        causal: bool = False,
        steps: int | None = None,
        lr: float | None = None,
        validation: float | str | None = "auto",
        channels_first: bool = False,
        class_weight: Any = None,
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.model, self.members, self.causal = model, members, causal
        self.steps, self.lr, self.validation = steps, lr, validation
        self.channels_first, self.class_weight = channels_first, class_weight
        self.n_jobs, self.random_state, self.verbose = n_jobs, random_state, verbose

    def fit(self, X: Any, y: Any, *, times: Any = None) -> "DeepClassifier":
        """Learn sequences with their labels ``(n,)``.

        Args:
            X: sequences.
            y: labels.
            times: when the samples were taken; None where they are even.
        """
        task = self._classes_task(X, y, None, "fit", times)
        self._train(task)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None, *, times: Any = None) -> "DeepClassifier":
        """Learn some more sequences, in one pass of at least ten steps.

        The first call decides the channels, their scales, the step, and the classes: ``classes``, or those of its y.

        Raises:
            ArgumentError: for a label that is none of the classes; names the row.
        """
        if not self.__sklearn_is_fitted__():
            self._begin(task := self._classes_task(X, y, classes, "partial_fit", times))
            self._go_on(task.examples, task.class_weights)
            return self
        if classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            came = f"classes is {np.unique(classes).tolist()}, the first call had {self.classes_.tolist()}"
            raise ArgumentError(f"{self._where('partial_fit')}: {came}")
        given = self._panel(X, "partial_fit", times=times)
        rows = numbered(self._where("partial_fit"), self._labels(y, given, "partial_fit"), self.classes_, given.names)
        self._go_on(Examples(given, rows), class_weights(self.class_weight, self.classes_, rows))
        return self

    def predict_proba(self, X: Any, *, times: Any = None, rate: float | None = None) -> np.ndarray:
        """``(n, K)``, the probabilities of the classes, in the order of ``classes_``.

        Args:
            X: sequences.
            times: when their samples were taken.
            rate: where these come evenly: how many steps of training lie between two of them.
        """
        return self._probabilities(X, "predict_proba", times, rate)

    def predict(self, X: Any, *, times: Any = None, rate: float | None = None) -> np.ndarray:
        """``(n,)``, the most probable class of each sequence; times and rate as in :meth:`predict_proba`."""
        best = self._probabilities(X, "predict", times, rate).argmax(1)
        return self.classes_[best]

    def score(
        self, X: Any, y: Any, sample_weight: Any = None, *, times: Any = None, rate: float | None = None
    ) -> float:
        """The share of the sequences whose class is right, times and rate as in :meth:`predict_proba`."""
        return float(accuracy_score(y, self.predict(X, times=times, rate=rate), sample_weight=sample_weight))

    def _probabilities(self, X: Any, method: str, times: Any, rate: float | None) -> np.ndarray:
        return self._said(X, method, times, rate, lambda logits: logits.softmax(-1))

    def _labels(self, y: Any, given: Panel, method: str) -> np.ndarray:
        labels = column_or_1d(self._answers(y, given, method), warn=True)
        check_classification_targets(labels)
        return labels

    def _classes_task(self, X: Any, y: Any, classes: Any, method: str, times: Any) -> Task:
        given = self._panel(X, method, fresh=True, times=times)
        labels = self._labels(y, given, method)
        self.classes_ = np.unique(labels if classes is None else classes)
        one_class(self._where(method), self.classes_, len(labels))
        rows = numbered(self._where(method), labels, self.classes_, given.names)
        head = {"kind": "SequenceClassifier", "outputs": len(self.classes_), "class_names": class_names(self.classes_)}
        weights = class_weights(self.class_weight, self.classes_, rows)
        return self._task(given, rows, {**head, "pooling": "mean"}, weights)


class DeepRegressor(RegressorMixin, Deep):
    """Numbers of sequences, by state space models that are trained on sequences with known ones.

    What X may be, and everything that is not said here, is as with :class:`DeepClassifier`.

    Args:
        model: the blocks; None for three of bidirectional S4D, width 64, with dropout.
        members: models that differ in their seed and in what they hold out, whose outputs are averaged.
        causal: whether the blocks read the past alone, as a stream wants it; not with ``model``.
        steps: of training; None chooses from the number of sequences.
        lr: the peak learning rate; None for 4e-3.
        validation: the share of the sequences that each member holds out; see :class:`DeepClassifier`.
        channels_first: whether X is ``(n, C, T)``, and its lists hold ``(C, T)``.
        n_jobs: members that are trained at once, each in a process.
        random_state: of all that is random.
        verbose: whether a bar shows how far training is.

    Attributes:
        models_: a :class:`~dualform.SequenceRegressor` for each member, whose outputs are in the units of y.
        history_: the losses of each member while it was trained, in units of the variance of y.
        channels_: C.
        step_: the median time between two samples; see :class:`DeepClassifier`.

    Raises:
        ArgumentError: for sequences, times or numbers that cannot be learned; names the row.
    """

    def __init__(
        self,
        *,
        model: ModelConfig | None = None,
        members: int = 1,
        causal: bool = False,
        steps: int | None = None,
        lr: float | None = None,
        validation: float | str | None = "auto",
        channels_first: bool = False,
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.model, self.members, self.causal = model, members, causal
        self.steps, self.lr, self.validation = steps, lr, validation
        self.channels_first = channels_first
        self.n_jobs, self.random_state, self.verbose = n_jobs, random_state, verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, *, times: Any = None) -> "DeepRegressor":
        """Learn sequences with their numbers, ``(n,)`` or ``(n, K)``; times as with :class:`DeepClassifier`."""
        self._train(self._numbers_task(X, y, "fit", times))
        for model in self.models_:
            self._in_units(model)
        return self

    def partial_fit(self, X: Any, y: Any, *, times: Any = None) -> "DeepRegressor":
        """Learn some more sequences, in one pass of at least ten steps.

        The first call decides the channels, the numbers, the scales of both, and the step.
        """
        if not self.__sklearn_is_fitted__():
            task = self._numbers_task(X, y, "partial_fit", times)
            self._begin(task)
            self._go_on(task.examples, None)
        else:
            given = self._panel(X, "partial_fit", times=times)
            numbers = self._numbers(y, given, "partial_fit")
            for model in self.models_:
                self._in_units(model, back=True)
            self._go_on(Examples(given, self._scaled(numbers)), None)
        for model in self.models_:
            self._in_units(model)
        return self

    def predict(self, X: Any, *, times: Any = None, rate: float | None = None) -> np.ndarray:
        """``(n,)`` or ``(n, K)``, as y was in ``fit``; times and rate as in :meth:`DeepClassifier.predict_proba`."""
        found = self._said(X, "predict", times, rate, lambda y: y)
        return found[:, 0] if self._flat else found

    def score(
        self, X: Any, y: Any, sample_weight: Any = None, *, times: Any = None, rate: float | None = None
    ) -> float:
        """R squared, the share of the variance of y that is explained; times and rate as in :meth:`predict`."""
        return float(r2_score(y, self.predict(X, times=times, rate=rate), sample_weight=sample_weight))

    def _numbers(self, y: Any, given: Panel, method: str) -> np.ndarray:
        numbers = self._answers(y, given, method, numeric=True)
        if method != "partial_fit" or not self.__sklearn_is_fitted__():
            self._flat = numbers.ndim == 1
        return numbers[:, None] if numbers.ndim == 1 else numbers

    def _numbers_task(self, X: Any, y: Any, method: str, times: Any) -> Task:
        given = self._panel(X, method, fresh=True, times=times)
        numbers = self._numbers(y, given, method)
        deviation = numbers.std(0)
        self._mean, self._deviation = numbers.mean(0), np.where(deviation > 0, deviation, 1.0)
        head = {"kind": "SequenceRegressor", "outputs": numbers.shape[1], "pooling": "mean"}
        return self._task(given, self._scaled(numbers), head, None)

    def _scaled(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy((numbers - self._mean) / self._deviation).float()

    def _in_units(self, model: Model, *, back: bool = False) -> None:
        """Let the head say numbers in the units of y; or, ``back``, in those that are trained."""
        mean, deviation = torch.from_numpy(self._mean), torch.from_numpy(self._deviation)
        with torch.no_grad():
            weight, bias = model.head.weight.double(), model.head.bias.double()
            if back:
                weight, bias = weight / deviation[:, None], (bias - mean) / deviation
            else:
                weight, bias = weight * deviation[:, None], bias * deviation + mean
            model.head.weight.copy_(weight)
            model.head.bias.copy_(bias)
