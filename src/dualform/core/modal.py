"""Modes of an impulse response: a long convolution filter as a short sum of damped oscillations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import orbit
from dualform.core.shapes import check_tensors

_OVERSAMPLING = 10  # random directions of the range finder beyond the rank that is wanted
_POWERS = 3  # power iterations of the range finder, two products each
_ELEMENTS = 2**24  # greatest number of elements held at once, for a group of filters
_CUTOFF = 1e-6  # relative size below which singular values of the least squares problem count as zero
_BEYOND = 1e-2  # weight, in that problem, of the zeros that follow the filter
_LEAST = 1e-2  # least modulus of a pole: with a smaller one, a mode would last only one sample


def fit_modes(kernel: Tensor, modes: int) -> tuple[Tensor, Tensor]:
    """Stable poles a and residues r of ``k_l ~ 2 Re sum_n r_n a_n^l``, for each filter by itself.

    The dominant left singular vectors U of a Hankel matrix ``H_ij = k_{i+j}`` span what can be observed of the
    filter's state, and a shift by one row is the state matrix, whose eigenvalues are the poles. There are two such
    matrices, and the better result is kept:

    - that of the given taps alone (Kung), exact for a filter that is a sum of so many modes, but the poles of another
      may grow;
    - that of the filter, followed by a reflection of its end that fades out over half its length, and then zeros:
      ``U^T shift(U)`` is then the balanced truncation of a finite response, whose poles are always stable. Without the
      reflection the response would jump to zero at the end of the filter, and the fit would be much worse.

    The modulus of a pole is at most ``exp(-1 / K)``, a time constant of the filter's length. Residues follow by least
    squares over all taps and, with a hundredth of their weight, as many zeros after them. Where real poles make more
    modes than asked for, the smallest modes are left out. Singular vectors come from a randomised range finder that
    multiplies with H by FFT, so that no K by K matrix is ever stored.

    Args:
        kernel: ``(D, K)``, the filters; K at least 3.
        modes: N, each a pair of conjugate poles or one real pole.

    Returns:
        poles and residues, ``(D, N)``, complex128, on the CPU; residues are zero where fewer modes suffice.

    Raises:
        ArgumentError: for a filter that is too short, or fewer than one mode.

    References:
        Kung (1978), "A new identification and model reduction algorithm via singular value decomposition"; Antoulas
        (2005), "Approximation of large-scale dynamical systems", section 7.1 (stability of balanced truncation);
        Halko, Martinsson and Tropp (2011), "Finding structure with randomness", arXiv:0909.4061, algorithm 4.4; for
        filters of Hyena, Massaroli et al. (2023), "Laughing Hyena Distillery", arXiv:2310.18780.
    """
    taps = check_tensors("fit_modes", kernel=(kernel, "D K"))["K"]
    if modes < 1 or taps < 3:
        raise ArgumentError(f"fit_modes: {modes} modes for {taps} taps, expected at least 1 and 3")
    kernel = kernel.detach().to("cpu", torch.float64)
    size = kernel.abs().amax(1, keepdim=True).clamp_min(1e-300)
    block = max(1, _ELEMENTS // (taps * 8 * (modes + _OVERSAMPLING)))
    found = [_fit(part, modes) for part in (kernel / size).split(block)]
    return torch.cat([poles for poles, _ in found]), torch.cat([r for _, r in found]) * size


def _fit(kernel: Tensor, modes: int) -> tuple[Tensor, Tensor]:
    taps, end = kernel.shape[1], kernel.flip(1)[:, : (kernel.shape[1] + 1) // 2]
    seen = _observability(kernel, (taps + 1) // 2, 2 * modes)
    poles, residues, error = _solve(kernel, torch.linalg.lstsq(seen[:, :-1], seen[:, 1:]).solution, modes)
    fade = torch.linspace(0, math.pi, end.shape[1] + 2, dtype=kernel.dtype)[1:-1].cos() / 2 + 0.5
    smooth = torch.cat([kernel, fade * end], 1)
    seen = _observability(F.pad(smooth, (0, smooth.shape[1] - 1)), smooth.shape[1], 2 * modes)
    stable = _solve(kernel, seen.mT @ F.pad(seen[:, 1:], (0, 0, 0, 1)), modes)
    better = (stable[2] < error)[:, None]
    return torch.where(better, stable[0], poles), torch.where(better, stable[1], residues)


def _observability(kernel: Tensor, rows: int, order: int) -> Tensor:
    """Dominant left singular vectors ``(D, rows, order)`` of the Hankel matrices, fewer where they are small."""
    taps = kernel.shape[1]
    columns = taps + 1 - rows
    order = min(order, rows - 1, columns)
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(1, columns, min(order + _OVERSAMPLING, columns), generator=draw, dtype=kernel.dtype)
    length = 1 << (taps - 1).bit_length()
    spectrum = torch.fft.rfft(kernel, length)[..., None]

    def hankel(x: Tensor) -> Tensor:
        """``H x`` of ``(., columns, .)`` or ``H^T x`` of ``(., rows, .)``: both are correlations."""
        out = torch.fft.irfft(spectrum * torch.fft.rfft(x.flip(1), length, 1), length, 1)
        return out[:, x.shape[1] - 1 : taps]

    for _ in range(_POWERS):
        basis = torch.linalg.qr(hankel(torch.linalg.qr(hankel(basis))[0]))[0]
    basis = torch.linalg.qr(hankel(basis))[0]
    left = torch.linalg.svd(hankel(basis).mT, full_matrices=False)[0]
    return (basis @ left)[..., :order]


def _solve(kernel: Tensor, A: Tensor, modes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Poles and residues ``(D, modes)`` for state matrices A, and the errors ``(D,)``."""
    poles = torch.linalg.eigvals(A)
    poles = torch.polar(poles.abs().clamp(_LEAST, math.exp(-1 / kernel.shape[1])), poles.angle())
    # One pole of each pair, moved to the front of its row. A row with fewer poles is filled with copies of its first
    # pole; the copies share its residue.
    upper = poles.imag >= 0
    poles = poles.gather(1, (~upper).to(torch.int8).argsort(dim=1, stable=True))[:, : int(upper.sum(1).max())]
    poles = torch.where(torch.arange(poles.shape[1]) < upper.sum(1, keepdim=True), poles, poles[:, :1])
    residues, size, error = _residues(kernel, poles)
    if poles.shape[1] > modes:
        residues, _, error = _residues(kernel, poles := poles.gather(1, size.topk(modes, 1).indices))
    missing = (0, modes - poles.shape[1])
    return F.pad(poles, missing, value=_LEAST), F.pad(residues, missing), error


def _residues(kernel: Tensor, poles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares for the residues, the size of every mode, each ``(D, modes)``, and the errors ``(D,)``."""
    taps = kernel.shape[1]
    powers = orbit(torch.diag_embed(poles), torch.ones_like(poles)[..., None], 2 * taps)[..., 0]
    norms = powers.abs().square().sum(0).sqrt()
    scale = 2 * torch.cat([norms, norms], -1)
    columns = 2 * torch.cat([powers.real, -powers.imag], -1).transpose(0, 1) / scale[:, None]
    columns[:, taps:] *= _BEYOND
    # The cutoff keeps residues of poles that all but coincide from growing without bound and cancelling.
    found = torch.linalg.lstsq(columns, F.pad(kernel, (0, taps))[..., None], rcond=_CUTOFF, driver="gelsd").solution
    residues = torch.complex(*(found[..., 0] / scale).chunk(2, -1))
    return residues, residues.abs() * norms, (columns[:, :taps] @ found - kernel[..., None]).norm(dim=(1, 2))
