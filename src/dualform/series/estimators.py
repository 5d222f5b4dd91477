"""Classifiers and regressors of sequences with the manners of scikit-learn."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, DualformError

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise DualformError(
        "dualform.series needs scikit-learn, which is not installed", hint='pip install "dualform[series]"'
    ) from error

from dualform.models.config import ModelConfig
from dualform.series.labels import class_names, class_weights, numbered, one_class
from dualform.series.members import Member, Task, loaded, mean_outputs, train_members
from dualform.series.panel import Panel, check_channels, index_names, is_table, panel
from dualform.series.plan import held_out_share, model_config, onward, plan
from dualform.series.portable import Model, build, to_arrays
from dualform.series.progress import progress
from dualform.series.training import Examples, Look, train


class _Deep(BaseEstimator):
    """What both estimators share: data in, models trained, models kept."""

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

    def _panel(self, X: Any, method: str, *, fresh: bool = False) -> Panel:
        """The sequences; what a first call sees, later ones are held against."""
        where = self._where(method)
        if not fresh:
            check_is_fitted(self)
        if table := is_table(X):
            options = {"dtype": np.float64, "ensure_all_finite": False}
            if fresh or self._table:
                array = validate_data(self, X, reset=fresh, **options)
            else:
                array = check_array(X, **options)
            given = panel(where, array, names=index_names(X.index) if hasattr(X, "columns") else None)
        else:
            given = panel(where, X, channels_first=self.channels_first)
        if fresh:
            self._table, self.channels_ = table, given.x.shape[2]
            if not table:
                self.n_features_in_ = self.channels_
        check_channels(where, given, self.channels_)
        return given

    def _answers(self, y: Any, given: Panel, method: str, *, numeric: bool = False) -> np.ndarray:
        """What is to be learned, one for each sequence."""
        if y is None:
            name = type(self).__name__
            raise ArgumentError(f"{name} requires y to be passed, but the target y is None")
        kind: Any = np.float64 if numeric else None
        array = check_array(y, input_name="y", ensure_2d=False, dtype=kind, ensure_min_samples=0)
        if len(array) != len(given.lengths):
            raise ArgumentError(f"{self._where(method)}: X has {len(given.lengths)} sequences, y has {len(array)}")
        return array

    def _task(self, given: Panel, y: Tensor, head: dict[str, Any], weights: Tensor | None) -> Task:
        """What the members learn; it checks the options."""
        where, count = self._where("fit"), len(y)
        if not isinstance(self.members, int | np.integer) or self.members < 1:
            raise ArgumentError(f"{where}: members is {self.members!r}, expected 1 or more")
        for name, value in (("steps", self.steps), ("lr", self.lr)):
            if value is not None and not value > 0:
                raise ArgumentError(f"{where}: {name} is {value!r}, expected a positive number, or None")
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
            learned = task.examples.panel
            self.models_[-1].fit_inputs(learned.filled(), lengths=learned.lengths)

    def _go_on(self, examples: Examples, weights: Tensor | None) -> None:
        """A pass of all members over some examples."""
        chosen = onward(len(examples.y), self.lr)
        for i, model in enumerate(self.models_):
            looks = train(model, examples, chosen, class_weights=weights, seed=self._passes * self.members + i)
            self.history_[i].extend(looks[-1:])
        self._passes += 1


class DeepClassifier(ClassifierMixin, _Deep):
    """Classes of sequences, by state space models that are trained on labelled ones.

    X is an array ``(n, T)`` or ``(n, T, C)``, a list of arrays ``(T,)`` or ``(T, C)`` of any lengths, or a frame of
    pandas: with a row for each sequence, with series as cells, or with an index (sequence, time). NaN is a missing
    value, and at the end of a sequence padding. Channels are scaled, inside the models. Of a table ``(n, T)``, whose
    columns are the same times in every row, later tables must have as many; other sequences may have any length.

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

    Raises:
        ArgumentError: for sequences or labels that cannot be learned; names the row.

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

    def fit(self, X: Any, y: Any) -> "DeepClassifier":
        """Learn sequences with their labels ``(n,)``."""
        task = self._classes_task(X, y, None, "fit")
        self._train(task)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> "DeepClassifier":
        """Learn some more sequences, in one pass of at least ten steps.

        The first call decides the channels, their scales and the classes: ``classes``, or those of its y.

        Raises:
            ArgumentError: for a label that is none of the classes; names the row.
        """
        if not self.__sklearn_is_fitted__():
            self._begin(task := self._classes_task(X, y, classes, "partial_fit"))
            self._go_on(task.examples, task.class_weights)
            return self
        if classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            came = f"classes is {np.unique(classes).tolist()}, the first call had {self.classes_.tolist()}"
            raise ArgumentError(f"{self._where('partial_fit')}: {came}")
        given = self._panel(X, "partial_fit")
        rows = numbered(self._where("partial_fit"), self._labels(y, given, "partial_fit"), self.classes_, given.names)
        self._go_on(Examples(given, rows), class_weights(self.class_weight, self.classes_, rows))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """``(n, K)``, the probabilities of the classes, in the order of ``classes_``."""
        check_is_fitted(self)
        given = self._panel(X, "predict_proba")
        return mean_outputs(self.models_, given, lambda logits: logits.softmax(-1)).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """``(n,)``, the most probable class of each sequence."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def _labels(self, y: Any, given: Panel, method: str) -> np.ndarray:
        labels = column_or_1d(self._answers(y, given, method), warn=True)
        check_classification_targets(labels)
        return labels

    def _classes_task(self, X: Any, y: Any, classes: Any, method: str) -> Task:
        given = self._panel(X, method, fresh=True)
        labels = self._labels(y, given, method)
        self.classes_ = np.unique(labels if classes is None else classes)
        one_class(self._where(method), self.classes_, len(labels))
        rows = numbered(self._where(method), labels, self.classes_, given.names)
        head = {"kind": "SequenceClassifier", "outputs": len(self.classes_), "class_names": class_names(self.classes_)}
        weights = class_weights(self.class_weight, self.classes_, rows)
        return self._task(given, rows, {**head, "pooling": "mean"}, weights)


class DeepRegressor(RegressorMixin, _Deep):
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

    Raises:
        ArgumentError: for sequences or numbers that cannot be learned; names the row.
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

    def fit(self, X: Any, y: Any) -> "DeepRegressor":
        """Learn sequences with their numbers, ``(n,)`` or ``(n, K)``."""
        self._train(self._numbers_task(X, y, "fit"))
        for model in self.models_:
            self._in_units(model)
        return self

    def partial_fit(self, X: Any, y: Any) -> "DeepRegressor":
        """Learn some more sequences, in one pass of at least ten steps.

        The first call decides the channels, the numbers, and the scales of both.
        """
        if not self.__sklearn_is_fitted__():
            task = self._numbers_task(X, y, "partial_fit")
            self._begin(task)
            self._go_on(task.examples, None)
        else:
            given = self._panel(X, "partial_fit")
            numbers = self._numbers(y, given, "partial_fit")
            for model in self.models_:
                self._in_units(model, back=True)
            self._go_on(Examples(given, self._scaled(numbers)), None)
        for model in self.models_:
            self._in_units(model)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """``(n,)`` or ``(n, K)``, as y was in ``fit``."""
        check_is_fitted(self)
        found = mean_outputs(self.models_, self._panel(X, "predict"), lambda y: y).numpy()
        return found[:, 0] if self._flat else found

    def _numbers(self, y: Any, given: Panel, method: str) -> np.ndarray:
        numbers = self._answers(y, given, method, numeric=True)
        if method != "partial_fit" or not self.__sklearn_is_fitted__():
            self._flat = numbers.ndim == 1
        return numbers[:, None] if numbers.ndim == 1 else numbers

    def _numbers_task(self, X: Any, y: Any, method: str) -> Task:
        given = self._panel(X, method, fresh=True)
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
