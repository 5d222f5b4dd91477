"""What is minimised."""

from torch import Tensor, nn

from dualform.models.lm import LanguageModel
from dualform.train.chat import read_and_targets


class Objective(nn.Module):
    """Mean cross-entropy of the next token, in nats: what data parallelism wraps.

    Args:
        model: a language model.
        chat: whether packed sequences are conversations, in which a token that is only read stands as ``~token``.
    """

    def __init__(self, model: LanguageModel, chat: bool = False):
        super().__init__()
        self.model, self.chat = model, chat

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Of windows ``(B, length + 1)``, or of packed sequences ``(1, T)``."""
        if cu_seqlens is None:
            return self.model.loss(tokens[:, :-1], tokens[:, 1:])
        read, targets = read_and_targets(tokens) if self.chat else (tokens, None)
        return self.model.loss(read, targets, cu_seqlens=cu_seqlens)
