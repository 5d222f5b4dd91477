"""The options of sampling, and their defaults; the command line reads them without loading PyTorch."""

from math import isfinite

from dualform.core.errors import ArgumentError
from dualform.core.options import options


@options(error=ArgumentError)
class Sampling:
    """How a token is drawn from the logits; the defaults sample the model's own distribution.

    Args:
        temperature: divides the logits; 0 takes the most likely token (greedy; the truncations do not matter then).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least top_p.
        min_p: keep tokens at least min_p times as likely as the most likely one.
        repetition_penalty: logits of recent tokens are divided by it where positive, multiplied where negative; 1 is
            off. "Recent" are the last ``dualform.generation.session.WINDOW`` tokens, prompt included.
        presence_penalty: is subtracted from the logits of recent tokens, after that; 0 is off, and less than 0 makes
            them more likely.

    Raises:
        ArgumentError: for an unknown keyword, or a value outside its range.

    References:
        top-k: Fan et al. (2018), arXiv:1805.04833. top-p: Holtzman et al. (2020), arXiv:1904.09751.
        min-p: Nguyen et al. (2025), arXiv:2407.01082. Penalty: Keskar et al. (2019), arXiv:1909.05858, section 4.1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (self.temperature >= 0 and isfinite(self.temperature), "a finite number of at least 0"),
            "top_k": (self.top_k >= 0, "a whole number of at least 0 (0 keeps all)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1] (1 keeps all)"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1] (0 keeps all)"),
            "repetition_penalty": (
                self.repetition_penalty > 0 and isfinite(self.repetition_penalty),
                "a finite number above 0 (1 is off)",
            ),
            "presence_penalty": (isfinite(self.presence_penalty), "a finite number (0 is off)"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise ArgumentError(f"Sampling: {name} is {getattr(self, name)}, expected {expected}")
