"""Make mamba-ssm and causal-conv1d importable in this process: modules, specs, versions and metadata."""

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from dualform.compat.names import MODULES, PACKAGES, Package, remedy
from dualform.core.errors import DualformError


class CompatError(DualformError, ImportError):
    """A module or name of mamba-ssm or causal-conv1d that cannot be had here."""


class MissingError(CompatError, ModuleNotFoundError):
    """A module or name that there is not; what guards its imports takes its other way."""


class Status(NamedTuple):
    """What became of one imitated distribution."""

    distribution: str
    active: bool  # whether its names are dualform's in this process
    version: str  # that of the real one where it is installed and not replaced, else the imitated one
    real: bool  # whether the real one is installed


def install(*, force: bool = False) -> tuple[Status, ...]:
    """Make ``mamba_ssm`` and ``causal_conv1d`` importable in this process, on dualform's operators.

    Nothing is written to disk, and other processes see nothing. A distribution that is really installed is left as it
    is, with a warning, unless ``force`` is true. A second call changes nothing.

    Args:
        force: whether to stand in front of the real distributions.

    Returns:
        What became of each distribution.

    Raises:
        CompatError: where ``force`` is asked for after the real modules were imported.
    """
    finder = _current() or _Finder()
    aside: list[str] = []
    chosen: list[Package] = []
    for package in PACKAGES:
        if package in finder.packages:
            continue
        found = _real_version(package)
        loaded = [m for m in package.modules if m in sys.modules and not _is_ours(sys.modules[m])]
        if force and loaded:
            raise CompatError(
                f"dualform.compat: {loaded[0]} was imported before, from {_origin(sys.modules[loaded[0]])}",
                hint="call dualform.compat.install(force=True) before the first import of it",
            )
        if not force and (found or loaded):
            aside.append(f"{package.distribution} {found or '(version unknown)'}")
        else:
            chosen.append(package)
    finder.packages += chosen
    if finder.packages and finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)
    if aside:
        warnings.warn(
            f"dualform.compat: {' and '.join(aside)} is installed and stays in use; "
            "install(force=True) puts dualform's in its place",
            UserWarning,
            stacklevel=2,
        )
    return status()


def uninstall() -> None:
    """Take the names away again; what was imported from them keeps working."""
    finder = _current()
    if finder is not None:
        sys.meta_path.remove(finder)
    for name in [name for name, module in sys.modules.items() if _is_ours(module)]:
        del sys.modules[name]


def status() -> tuple[Status, ...]:
    """What there is of each distribution in this process."""
    finder = _current()
    found = []
    for package in PACKAGES:
        active, real = finder is not None and package in finder.packages, _real_version(package)
        shown = package.shown_version if active or not real else real
        found.append(Status(package.distribution, active, shown, bool(real)))
    return tuple(found)


class _Finder(MetaPathFinder):
    """Answers for the imitated modules and their metadata."""

    def __init__(self) -> None:
        self.packages: list[Package] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an imitated module; None for all others.

        Raises:
            MissingError: for a module or a name of one that we do not have, with the way out.
        """
        package = self._package(fullname)
        if package is None:
            return None
        if fullname not in MODULES:
            raise MissingError(f"dualform.compat has no {fullname}", hint=remedy(fullname))
        # Packages, all of them: then ``from module import name`` asks here for a name that the module does not have.
        return spec_from_loader(fullname, _Loader(package), origin="dualform.compat", is_package=True)

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        """The metadata of the imitated distributions, as ``importlib.metadata`` asks for them."""
        wanted = getattr(context, "name", None)
        for package in self.packages:
            if wanted is None or _normal(wanted) == package.distribution:
                yield _Metadata(package)

    def _package(self, fullname: str) -> Package | None:
        top = fullname.partition(".")[0]
        return next((package for package in self.packages if top in package.modules), None)


class _Loader(Loader):
    """Fills an imitated module: its names are looked up when they are first used."""

    def __init__(self, package: Package):
        self.package = package

    def exec_module(self, module: ModuleType) -> None:
        """Names, submodules, and errors for those that there are not."""
        name, home = module.__name__, MODULES[module.__name__]
        module.__doc__ = f"{name} of {self.package.distribution} {self.package.version}, on dualform's operators."
        module.__file__ = str(Path(__file__))
        inner = {m.removeprefix(f"{name}.") for m in MODULES if m.startswith(f"{name}.")}
        inner = {m for m in inner if "." not in m}
        known: dict[str, Any] = {"__version__": self.package.shown_version} if "." not in name else {}
        vars(module).update(known, __all__=sorted(home))

        def getattribute(key: str) -> Any:
            if key in home:
                value = getattr(import_module(f"dualform.compat.{home[key]}"), key)
            elif key in inner:
                value = import_module(f"{name}.{key}")
            else:
                raise AttributeError(f"module {name!r} has no attribute {key!r}; {remedy(f'{name}.{key}')}")
            setattr(module, key, value)
            return value

        module.__getattr__ = getattribute  # pyright: ignore[reportAttributeAccessIssue]
        module.__dir__ = lambda: sorted({*vars(module), *home, *inner})


class _Metadata(Distribution):
    """The metadata of an imitated distribution."""

    def __init__(self, package: Package):
        self.package = package

    def read_text(self, filename: str) -> str | None:
        """The files of a ``dist-info`` that somebody asks for."""
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {self.package.distribution}\n"
            f"Version: {self.package.shown_version}\nSummary: provided by dualform.compat in this process\n",
            "top_level.txt": "\n".join(self.package.modules),
            "INSTALLER": "dualform.compat\n",
        }
        return files.get(filename)

    def locate_file(self, path: Any) -> Path:
        """Nothing is on disk; the folder of this package stands for all of it."""
        return Path(__file__).parent / path


def _current() -> _Finder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)


def _is_ours(module: Any) -> bool:
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _Loader)


def _origin(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "an unknown place"


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _real_version(package: Package) -> str:
    """The version of the real distribution; empty where it is not installed."""
    for finder in [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]:
        find: Any = getattr(finder, "find_distributions", None)
        distributions: Iterable[Distribution] = find(_context(package)) if find else ()
        for distribution in distributions:
            return distribution.version
    return ""


def _context(package: Package) -> DistributionFinder.Context:
    return DistributionFinder.Context(name=package.distribution)
