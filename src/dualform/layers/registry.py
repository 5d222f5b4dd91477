"""The names that configs use for layers. A new layer is one line here, or an entry point of another package."""

import warnings
from collections.abc import Iterator, MutableMapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dualform.core.errors import ConfigError
from dualform.layers.attention import AttentionConfig
from dualform.layers.bidirectional import BidirectionalConfig
from dualform.layers.block import ChainConfig, ParallelConfig, SublayerConfig
from dualform.layers.delta_net import DeltaNetConfig
from dualform.layers.dss import DSSConfig
from dualform.layers.gated_delta_net import GatedDeltaNetConfig
from dualform.layers.gated_delta_product import GatedDeltaProductConfig
from dualform.layers.gla import GLAConfig
from dualform.layers.h3 import H3Config
from dualform.layers.hgrn import HGRN2Config, HGRNConfig
from dualform.layers.hyena import HyenaConfig
from dualform.layers.hyena_modal import HyenaModalConfig
from dualform.layers.kda import KDAConfig
from dualform.layers.lightning_attention import LightningAttentionConfig
from dualform.layers.lru import LRUConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mla import MLAConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.mlstm import MLSTMConfig
from dualform.layers.moe import MoEConfig
from dualform.layers.recall import RecallConfig
from dualform.layers.retnet import RetNetConfig
from dualform.layers.rglru import RGLRUConfig
from dualform.layers.rotary import RotaryConfig
from dualform.layers.rwkv4 import RWKV4Config, RWKVChannelConfig
from dualform.layers.rwkv6 import RWKV6Config
from dualform.layers.rwkv7 import RWKV7Config
from dualform.layers.s4 import S4Config
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config
from dualform.layers.short_conv import GatedShortConvConfig
from dualform.layers.slstm import SLSTMConfig


class Registry(MutableMapping[str, type[Any]]):
    """Configs by the names that files use: those given, and those that installed packages name in an entry point group.

    A package is imported when one of its names is looked up, not before.

    Args:
        group: of entry points, each ``name = "module:Config"``.
        known: configs that need no entry point.

    Raises:
        ConfigError: by a lookup, for an entry point that cannot be imported or is no config with ``build(d_model)``.
    """

    def __init__(self, group: str, known: dict[str, type[Any]]):
        self.group, self._known = group, known

    def __getitem__(self, name: str) -> type[Any]:
        if name not in self._known:
            self._known[name] = self._load(self._installed[name])
        return self._known[name]

    def __setitem__(self, name: str, config: type[Any]) -> None:
        self._known[name] = config

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __repr__(self) -> str:
        return f"Registry({self.group!r}: {', '.join(self)})"

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._installed

    def __iter__(self) -> Iterator[str]:
        return iter({**self._known, **self._installed})

    def __len__(self) -> int:
        return len({**self._known, **self._installed})

    def name_of(self, config: type[Any]) -> str | None:
        """The name of a config's class; None where it has none.

        A package that cannot be imported does not stand in the way of other names.
        """
        for name in self:
            try:
                if self[name] is config:
                    return name
            except ConfigError:
                continue
        return None

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self.group):
            if entry.name in found or entry.name in self._known:
                warnings.warn(f"{_package(entry)}: {self.group} has {entry.name!r} already; not used", stacklevel=2)
            else:
                found[entry.name] = entry
        return found

    def _load(self, entry: EntryPoint) -> type[Any]:
        where = f"{_package(entry)}: {self.group} {entry.name!r} is {entry.value}"
        try:
            config = entry.load()
        except Exception as error:
            raise ConfigError(f"{where}, which cannot be imported: {error}", hint="update or remove it") from error
        if not (isinstance(config, type) and callable(getattr(config, "build", None))):
            raise ConfigError(f"{where}, expected a config class with build(d_model)")
        return config


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an installed package"


MIXERS = Registry(
    "dualform.mixers",
    {
        "attention": AttentionConfig,
        "dss": DSSConfig,
        "delta_net": DeltaNetConfig,
        "gated_delta_net": GatedDeltaNetConfig,
        "gated_delta_product": GatedDeltaProductConfig,
        "gla": GLAConfig,
        "h3": H3Config,
        "hgrn": HGRNConfig,
        "hgrn2": HGRN2Config,
        "hyena": HyenaConfig,
        "hyena_modal": HyenaModalConfig,
        "lightning_attention": LightningAttentionConfig,
        "kda": KDAConfig,
        "lru": LRUConfig,
        "lstm": LSTMConfig,
        "mamba": MambaConfig,
        "mamba2": Mamba2Config,
        "mla": MLAConfig,
        "mlstm": MLSTMConfig,
        "retnet": RetNetConfig,
        "rglru": RGLRUConfig,
        "rwkv4": RWKV4Config,
        "rwkv6": RWKV6Config,
        "rwkv7": RWKV7Config,
        "rwkv_channel": RWKVChannelConfig,
        "s4": S4Config,
        "s4d": S4DConfig,
        "s5": S5Config,
        "short_conv": GatedShortConvConfig,
        "slstm": SLSTMConfig,
    },
)
FEEDFORWARDS = Registry("dualform.feedforwards", {"mlp": MLPConfig, "moe": MoEConfig})
COMPOSITES: dict[str, type[Any]] = {
    "bidirectional": BidirectionalConfig,
    "sublayer": SublayerConfig,
    "chain": ChainConfig,
    "parallel": ParallelConfig,
    "recall": RecallConfig,
    "rotary": RotaryConfig,
}
"""What blocks are put together with, and options of parts that have options."""


def kinds() -> list[str]:
    """The names of all sub-layers."""
    return [*MIXERS, *FEEDFORWARDS, *COMPOSITES]


def config_of(kind: str) -> type[Any]:
    """The config of one of :func:`kinds`."""
    return MIXERS[kind] if kind in MIXERS else COMPOSITES[kind] if kind in COMPOSITES else FEEDFORWARDS[kind]


def kind_of(config: type[Any]) -> str | None:
    """The name of a config's class; None where it has none."""
    composite = next((name for name, known in COMPOSITES.items() if known is config), None)
    return composite or MIXERS.name_of(config) or FEEDFORWARDS.name_of(config)
