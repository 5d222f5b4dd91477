"""How features are shared out over heads."""

from dualform.core.errors import ConfigError
from dualform.layers.mamba import check_sizes


def head_width(
    kind: str, width: int, heads: int, d_head: int | None = None, *, name: str = "d_model", of: str = "d_head"
) -> int:
    """The width of a head: ``d_head``, or ``width / heads`` where it is None.

    Args:
        kind: of the layer, first word of every error.
        width: features to be shared out.
        heads: how many heads there are.
        d_head: their width, where the config says it.
        name: of ``width``, in the config.
        of: the name of ``d_head`` there.

    Raises:
        ConfigError: for a size below 1, or heads that do not divide ``width``.
    """
    check_sizes(kind, heads=heads, **{name: width}, **({} if d_head is None else {of: d_head}))
    if d_head is not None:
        return d_head
    if width % heads:
        raise ConfigError(
            f"{kind}: {name} {width} is not a multiple of heads {heads}",
            hint=f"set heads to a divisor of {width}",
        )
    return width // heads
