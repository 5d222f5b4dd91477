"""The parameters of a linear-Gaussian model: which there are, what shapes they have, and what is refused."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite, symmetric_part
from dualform.core.options import brief, suggestion
from dualform.core.shapes import broadcast
from dualform.ops.device import usable_device

CORES = {
    "A": "N N", "C": "M N", "Q": "K K", "R": "M M", "c": "N", "d": "M", "B": "N U", "D": "M U", "S": "N K",
    "m0": "N", "P0": "N N",
}  # fmt: skip
"""The axes of each parameter, after those of a batch and that of time."""

_STARTS = ("stationary", "diffuse")
_CONVENTIONS = ("statsmodels", "kfas")


class Terms(TypedDict, total=False):
    """The parameters of :class:`~dualform.gaussian.model.LinearGaussian` that most models do without."""

    c: Any
    d: Any
    B: Any
    D: Any
    S: Any
    time_varying: Sequence[str]
    diffuse: Any
    convention: Literal["statsmodels", "kfas"]


P = TypeVar("P", bound="Parameters")


class System(nn.Module):
    """What every state space model with normal noise has, linear or not: its noise, its start, and its sizes."""

    Q: Tensor
    R: Tensor
    m0: Tensor
    P0: Tensor | None
    diffuse: Tensor | None  # (N, K)
    prior: str
    convention: str
    driven: tuple[str, str] = ("B or D", "no B and no D")  # what takes inputs, and that nothing does, for errors

    @property
    def batch(self) -> torch.Size:
        """The axes of a batch that the parameters have together; none for one model."""
        return torch.Size()

    @property
    def d_state(self) -> int:
        """N."""
        return self.m0.shape[-1]

    @property
    def d_obs(self) -> int:
        """M."""
        return self.R.shape[-1]

    @property
    def d_input(self) -> int | str | None:
        """U, or "*" for any; None for a model without inputs."""
        return None

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast every tensor in place, with the arguments of ``torch.nn.Module.to``; returns the model.

        Raises:
            ArgumentError: for a device that is not there.
        """
        name = type(self).__name__
        for device in (value for value in (*args, *kwargs.values()) if isinstance(value, str | torch.device)):
            usable_device(device, f"{name}.to: device {str(device)!r}", numbers=False)
        return super().to(*args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, dtype and device."""
        batch = f"batch={tuple(self.batch)}, " if self.batch else ""
        dtype = str(self.Q.dtype).removeprefix("torch.")
        return f"{batch}N={self.d_state}, M={self.d_obs}, {dtype}, {self.Q.device}"

    def _keep(self, where: str, name: str, value: Any, tensor: Tensor | None) -> None:
        if isinstance(value, nn.Parameter) and tensor is not value:
            dtype = None if tensor is None else tensor.dtype
            raise ArgumentError(f"{where}: the parameter {name} is {value.dtype}, but others are {dtype}")
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor)


class Parameters(System):
    """Tensors of a model by their letters: ``nn.Parameter`` stay parameters, all others are buffers.

    Values are checked once, here. What is assigned later, or made by ``torch.nn.utils.parametrize``, is not.
    """

    A: Tensor
    C: Tensor
    c: Tensor | None
    d: Tensor | None
    B: Tensor | None
    D: Tensor | None
    S: Tensor | None

    def __init__(self, matrices: Mapping[str, Any], prior: str, terms: Terms):
        super().__init__()
        where, names = type(self).__name__, [*Terms.__annotations__]
        if unknown := [name for name in terms if name not in names]:
            known = [*matrices, "prior", *names]
            raise ArgumentError(f"{where}: unknown keyword {brief(unknown[0])}", hint=suggestion(unknown[0], known))
        self.prior = one_of(where, "prior", prior, ("before", "first"))
        self.convention = one_of(where, "convention", terms.get("convention", "statsmodels"), _CONVENTIONS)
        self.time_varying = _names(where, terms.get("time_varying", ()))
        values = {**matrices, **{name: terms.get(name) for name in "cdBDS"}}
        start = values["P0"] if isinstance(values["P0"], str) else None
        if start is not None:
            values["P0"] = None if one_of(where, "P0", start, _STARTS) == "stationary" else 0.0
        elif values["P0"] is None:
            raise ArgumentError(f"{where}: P0 is None, expected a covariance, a number, 'stationary' or 'diffuse'")
        self.stationary = start == "stationary"
        required = [name for name in ("A", "C", "Q", "R") if values[name] is None]
        if required:
            raise ArgumentError(f"{where}: {required[0]} is None, expected numbers")
        given = as_tensors(where, **{name: value for name, value in values.items() if value is not None})
        if any(value.is_complex() for value in given.values()):
            raise ArgumentError(f"{where}: complex values, expected real ones")
        A = given["A"]
        eye = torch.eye(A.shape[-1] if A.dim() else 0, dtype=A.dtype, device=A.device)
        if "P0" in given and given["P0"].dim() == 0:
            given["P0"] = given["P0"] * eye
        given.setdefault("m0", A.new_zeros(len(eye)))
        self._check(where, given)
        for name in CORES:
            self._keep(where, name, values.get(name), given.get(name))
        mask = True if start == "diffuse" else terms.get("diffuse")
        self.register_buffer("diffuse", None if mask is None else _directions(where, mask, eye))
        if self.stationary and set("AQSc") & set(self.time_varying):
            raise ArgumentError(f"{where}: P0='stationary' with A, Q, S or c that vary in time, expected constant ones")

    @classmethod
    def like(cls: type[P], other: "Parameters", time_varying: Sequence[str], **tensors: Tensor | None) -> P:
        """A model with the parameters of another but for some, which are taken as they are, unchecked."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.prior, made.convention, made.stationary = other.prior, other.convention, other.stationary
        made.time_varying = tuple(time_varying)
        for name in (*CORES, "diffuse"):
            made.register_buffer(name, tensors.get(name) if name in tensors else getattr(other, name))
        return made

    def _check(self, where: str, given: Mapping[str, Tensor]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for name, value in given.items():
            core = CORES[name].split()
            if name == "Q" and "S" not in given:
                core = ["N", "N"]
            self._check_shape(where, name, value, core, sizes)
        check_finite(where, given)
        try:
            broadcast(*(self._batch_of(name, value) for name, value in given.items()))
        except RuntimeError:
            shapes = ", ".join(f"{n} {tuple(v.shape)}" for n, v in given.items() if self._batch_of(n, v))
            raise ArgumentError(
                f"{where}: batch axes that do not fit together: {shapes}",
                hint="an axis of time is named, time_varying=('A',), and stands after those of a batch",
            ) from None
        for name in ("Q", "R", "P0"):
            value = given.get(name)
            if value is not None and value.device.type != "meta" and not torch.compiler.is_compiling():
                check_covariance(where, name, value.detach())

    def _check_shape(
        self, where: str, name: str, value: Tensor, core: list[str], sizes: dict[str, tuple[int, str]]
    ) -> None:
        varies = name in self.time_varying
        shown = f"({', '.join([*(['T'] if varies else []), *core])}{',' * (len(core) + varies == 1)})"
        if value.dim() < len(core) + varies:
            raise ArgumentError(f"{where}: {name} has shape {tuple(value.shape)}, expected {shown}")
        for letter, size in zip(core, value.shape[value.dim() - len(core) :], strict=True):
            want, source = sizes.setdefault(letter, (size, name))
            if size != want:
                raise ArgumentError(
                    f"{where}: {name} has shape {tuple(value.shape)}, expected {shown}, with any axes of a batch "
                    f"before: {letter} is {size}, not {want} as in {source}"
                )

    def _batch_of(self, name: str, value: Tensor) -> torch.Size:
        """The axes of a batch that a parameter has."""
        return value.shape[: value.dim() - len(CORES[name].split()) - (name in self.time_varying)]

    @property
    def batch(self) -> torch.Size:
        """The axes of a batch that the parameters have together; none for one model."""
        named = ((name, getattr(self, name)) for name in CORES)
        shapes = {self._batch_of(name, value) for name, value in named if value is not None} - {torch.Size()}
        return broadcast(*shapes) if shapes else torch.Size()

    @property
    def d_state(self) -> int:
        """N."""
        return self.A.shape[-1]

    @property
    def d_obs(self) -> int:
        """M."""
        return self.C.shape[-2]

    @property
    def d_input(self) -> int | None:
        """U; None for a model without B and D."""
        return next((matrix.shape[-1] for matrix in (self.B, self.D) if matrix is not None), None)


def one_of(where: str, name: str, value: Any, known: Sequence[str]) -> str:
    """A word, if it is among those that are known.

    Raises:
        ArgumentError: for another one, with the nearest.
    """
    if value not in known:
        raise ArgumentError(f"{where}: {name} is {brief(value)}", hint=suggestion(str(value), known))
    return value


def _names(where: str, given: Any) -> tuple[str, ...]:
    names = tuple(given)
    known = [name for name in CORES if name not in ("m0", "P0")]
    for name in names:
        if name not in known:
            raise ArgumentError(f"{where}: time_varying names {brief(name)}", hint=suggestion(str(name), known))
    return names


def _directions(where: str, mask: Any, eye: Tensor) -> Tensor:
    """The diffuse directions ``(N, K)``: columns of the identity where the mask is true, or a matrix as it is."""
    n = len(eye)
    if mask is True:
        return eye
    made = as_tensors(where, diffuse=mask)["diffuse"].to(eye)
    boolean = mask.dtype == torch.bool if isinstance(mask, Tensor) else made.dim() == 1
    if made.shape == (n,) and boolean and ((made == 0) | (made == 1)).all():
        return eye[:, made != 0]
    if made.dim() != 2 or made.shape[0] != n:
        raise ArgumentError(
            f"{where}: diffuse has shape {tuple(made.shape)}, expected True or False for each of {n} states, or a "
            f"matrix ({n}, K) of directions"
        )
    check_finite(where, {"diffuse": made})
    return made


def check_covariance(where: str, name: str, value: Tensor) -> None:
    """Matrices ``(..., N, N)`` must be symmetric and positive semi-definite, but for rounding.

    Raises:
        ArgumentError: names the argument, and by how much it is not.
    """
    if not value.numel():
        return
    size = value.abs().amax((-2, -1))
    tolerance = torch.finfo(value.dtype).eps ** 0.5 * size
    skew = (value - value.mT).abs().amax((-2, -1))
    if (skew > tolerance).any():
        raise ArgumentError(
            f"{where}: {name} is not symmetric: it differs from its transpose by {skew.max().item():.3g}",
            hint=f"a covariance is expected; ({name} + {name}.mT) / 2 is its symmetric part",
        )
    raised = torch.diag_embed((tolerance + (size == 0))[..., None].expand(value.shape[:-1]))
    if not torch.linalg.cholesky_ex(symmetric_part(value) + raised).info.any():
        return
    smallest = torch.linalg.eigvalsh(symmetric_part(value))[..., 0]
    if (smallest < -tolerance).any():
        raise ArgumentError(
            f"{where}: {name} is not a covariance: it has the negative eigenvalue {smallest.min().item():.3g}",
            hint="parametrise it as L @ L.mT to stay positive semi-definite",
        )
