"""A linear map behind the blocks, and what is learned with it: classes or numbers, of a sequence or of each element."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Real
from torch import Tensor, nn

from dualform.core.allocation import sized
from dualform.core.calls import explained
from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.packing import Borders
from dualform.core.shapes import check_tensors
from dualform.models.backbone import ELSEWHERE, Backbone
from dualform.models.config import ModelConfig
from dualform.models.linear_loss import IGNORED
from dualform.models.padding import lay_out
from dualform.models.targets import class_loss, number_loss, several_loss


@explained(elsewhere=ELSEWHERE)
class Readout(Backbone):
    """A backbone with a linear head; :class:`Classes` and :class:`Numbers` say what it is trained towards.

    Args:
        config: the blocks; ``tie_embeddings`` plays no part, and ``vocab_size`` none where features are read.
        outputs: width of the output.
        inputs: width of the features ``(B, T, inputs)``; None reads tokens ``(B, T)``.
        standardise: whether features are scaled inside the model, see :meth:`fit_inputs`; with ``"differences"`` it
            reads those in time beside them, scaled, too.
        missing: what NaN means in features; see :class:`~dualform.models.entrance.Entrance`.

    Raises:
        ConfigError: for an option that there is not, or a size that is out of range.
    """

    least_outputs: ClassVar[int] = 1
    learned: ClassVar[str] = "targets"
    """What errors call what the outputs are trained towards."""

    def __init__(
        self,
        config: ModelConfig,
        outputs: int,
        *,
        inputs: int | None = None,
        standardise: bool | str = False,
        missing: str = "refused",
    ):
        if outputs < self.least_outputs:
            raise ConfigError(f"{self._name}: {outputs} outputs, expected at least {self.least_outputs}")
        if inputs is None and (standardise or missing != "refused"):
            raise ConfigError(f"{self._name}: standardise and missing are of features, and the model reads tokens")
        super().__init__(config, inputs, {"standardise": standardise, "missing": missing})
        self.outputs = outputs
        with sized(self._name):
            self.head = nn.Linear(config.d_model, self._width)

    @property
    def _width(self) -> int:
        return self.outputs

    def fit_inputs(
        self,
        x: Tensor,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
    ) -> None:
        """Set the mean and the deviation that the inputs are scaled with to those of ``x`` ``(B, T, inputs)``.

        Padding does not count, nor do values that are missing. They are buffers, saved with the model. ``intervals``
        are those that it will be given with them; they count for differences in time.

        Raises:
            ArgumentError: for a model without ``standardise``, and for inputs that its :meth:`forward` would refuse.
        """
        where = f"{self._name}.fit_inputs"
        if self.entrance is None:
            raise ArgumentError(f"{where}: the model reads tokens", hint="build it with inputs=, and standardise=True")
        self._check_inputs(x, "B T")
        line = lay_out(where, x, None, cu_seqlens, attention_mask, intervals, lengths)
        if line.intervals is not None:
            check_tensors(where, x=(line.x, "B T ..."), intervals=(line.intervals, "B T"))
        self.entrance.fit(where, line.x, line.packing, line.intervals)

    def head_options(self) -> dict[str, Any]:
        """What beside the config it takes to build this model again, as JSON values."""
        options = {} if self.entrance is None else self.entrance.options
        return {"kind": self._name, "outputs": self.outputs, "inputs": self.inputs, **options}

    @classmethod
    def from_options(cls, config: ModelConfig, options: dict[str, Any]) -> "Readout":
        """The model that :meth:`head_options` describes, its kind left out."""
        return cls(config, options["outputs"], **{name: value for name, value in options.items() if name != "outputs"})

    @abstractmethod
    def forward_and_losses(
        self,
        x: Tensor,
        state: Any = None,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """What ``forward`` returns, and what parts want added to the loss while the model trains."""

    @abstractmethod
    def _learned(
        self, x: Tensor, targets: Tensor, axes: str, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        """Outputs ``(M, ...)`` and their targets, which of these count, and the losses of parts.

        ``axes`` are those of the targets of one output.
        """

    def _shaped(self, y: Tensor) -> Tensor:
        """The outputs of the head, shaped as they are returned."""
        return y

    def _check_causal(self) -> None:
        if not self.causal:
            raise ArgumentError(
                f"{self._name}: a bidirectional model has no state and no step: it reads whole sequences",
                hint="call forward on whole sequences, without a state",
            )


class Classes(Readout):
    """What models with one output per class share: their names, and the loss."""

    least_outputs: ClassVar[int] = 2
    learned: ClassVar[str] = "labels"
    multi_label: bool
    class_names: tuple[str, ...] | None

    def _set_classes(self, classes: int | Sequence[str], multi_label: bool) -> int:
        """Keep the names, and return the number of classes."""
        names = None if isinstance(classes, int) else tuple(classes)
        if names is not None:
            if isinstance(classes, str) or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"{self._name}: classes is {classes!r}, expected a number, or one name for each")
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ConfigError(f"{self._name}: classes names {twice[0]!r} twice")
        self.multi_label, self.class_names = multi_label, names
        return classes if isinstance(classes, int) else len(classes)

    def head_options(self) -> dict[str, Any]:
        """What beside the config it takes to build this model again, as JSON values."""
        options = super().head_options()
        if self.multi_label:
            options["multi_label"] = True
        return options if self.class_names is None else {**options, "class_names": list(self.class_names)}

    @classmethod
    def from_options(cls, config: ModelConfig, options: dict[str, Any]) -> Readout:
        """The model that :meth:`head_options` describes, its kind left out."""
        names = options.get("class_names")
        if names is not None and len(names) != options["outputs"]:
            raise ConfigError(f"{len(names)} class_names for {options['outputs']} outputs")
        rest = {name: value for name, value in options.items() if name not in ("outputs", "class_names")}
        return cls(config, names or options["outputs"], **rest)

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> Tensor:
        """Mean cross-entropy in nats of ``labels``, 0 to classes - 1.

        Args:
            x: what :meth:`forward` takes.
            labels: int32 or int64, one per row, or per element where the outputs are; -100 does not count, nor does
                padding. The loss is 0 where none counts. With ``multi_label`` bool, or numbers from 0 to 1, one per
                class, each with a cross-entropy of its own.
            class_weights: ``(classes,)``, what a label of each class counts: the mean is weighted by them.
            label_smoothing: the share of each label that goes to all classes alike, below 1.
            options: the keywords of :meth:`forward`.

        Raises:
            ArgumentError: names the argument, what came and what was expected.
        """
        several = self.multi_label
        y, labels, keep, losses = self._learned(x, labels, str(self.outputs) if several else "", options)
        if several:
            loss = several_loss(self._name, y, labels, class_weights, label_smoothing, keep)
        else:
            labels = labels if keep is None else labels.masked_fill(~keep, IGNORED)
            loss = class_loss(self._name, y, labels, class_weights, label_smoothing)
        return sum(losses, loss)


class Numbers(Readout):
    """What models with one output per number share: their quantiles, and the loss."""

    quantiles: tuple[float, ...] | None

    def _set_quantiles(self, quantiles: Sequence[float] | None) -> None:
        self.quantiles = None if quantiles is None else tuple(quantiles)
        if self.quantiles is not None and not (self.quantiles and all(0 < q < 1 for q in self.quantiles)):
            raise ConfigError(f"{self._name}: quantiles is {quantiles!r}, expected numbers between 0 and 1")

    @property
    def _width(self) -> int:
        return self.outputs * (1 if self.quantiles is None else len(self.quantiles))

    def _shaped(self, y: Tensor) -> Tensor:
        return y if self.quantiles is None else y.unflatten(-1, (self.outputs, len(self.quantiles)))

    def head_options(self) -> dict[str, Any]:
        """What beside the config it takes to build this model again, as JSON values."""
        options = super().head_options()
        return options if self.quantiles is None else {**options, "quantiles": list(self.quantiles)}

    def loss(self, x: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """Mean squared error against ``targets``, or with quantiles their mean pinball loss.

        Args:
            x: what :meth:`forward` takes.
            targets: floating, ``(B, targets)``, or ``(B, T, targets)`` where there is an output per element; what
                stands at padding does not count.
            options: the keywords of :meth:`forward`.

        Raises:
            ArgumentError: names the argument, what came and what was expected; also for targets that are not finite.
        """
        y, targets, keep, losses = self._learned(x, targets, str(self.outputs), options)
        return sum(losses, number_loss(self._name, y, targets, self.quantiles, keep))
