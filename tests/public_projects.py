"""Public projects that are written for mamba-ssm, not one line changed, on ``dualform.compat``.

    pip install timm torchvision monai transformers dynamic-network-architectures
    python tests/public_projects.py              # all of them
    python tests/public_projects.py MambaVision  # one

Each is cloned into ``build/upstream`` at the commit named below, built in a small size, and run forward and backward:
on our kernels, and on the loops that define our operators, in float32 and in float64. A package that a project
imports, its model does not need and this machine does not have is replaced by a stub; the table lists them.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from upstream_suites import ROOT, clone


class Project(NamedTuple):
    """A repository, what is needed to import it, and a small model of it with its inputs."""

    repository: str
    commit: str
    folders: tuple[str, ...]  # put first on sys.path
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    stubs: tuple[str, ...] = ()
    double: bool = True  # False where the model itself makes float32 of what it is given
    oracle: str = "reference"  # the backend that is compared with; loops over many thousands of steps take minutes


def mamba_vision() -> tuple[nn.Module, tuple[Any, ...]]:
    from mambavision.models.mamba_vision import MambaVision

    model = MambaVision(
        dim=16, in_dim=8, depths=[1, 1, 2, 2], window_size=[8, 8, 4, 2], mlp_ratio=2, num_heads=[2, 2, 4, 8],
        resolution=64, drop_path_rate=0.0, num_classes=5,
    )  # fmt: skip
    return model, (torch.randn(2, 3, 64, 64),)


def u_mamba() -> tuple[nn.Module, tuple[Any, ...]]:
    from nnunetv2.nets.UMambaBot_3d import MambaLayer

    return MambaLayer(16), (torch.randn(2, 16, 4, 6, 5),)


def caduceus() -> tuple[nn.Module, tuple[Any, ...]]:
    from caduceus.configuration_caduceus import CaduceusConfig
    from caduceus.modeling_caduceus import Caduceus  # its masked LM predates transformers 5

    config = CaduceusConfig(
        d_model=32, n_layer=2, vocab_size=12, rcps=True, bidirectional=True, bidirectional_strategy="add",
        rms_norm=True, fused_add_norm=True, residual_in_fp32=False, pad_vocab_size_multiple=4,
        complement_map={i: i ^ 1 for i in range(12)},
    )  # fmt: skip
    return Caduceus(config), (torch.randint(0, 12, (2, 65)),)


def video_mamba() -> tuple[nn.Module, tuple[Any, ...]]:
    from videomamba import VisionMamba

    model = VisionMamba(
        img_size=32, patch_size=8, depth=2, embed_dim=32, num_classes=5, num_frames=4, drop_path_rate=0.0,
        fused_add_norm=True, rms_norm=True, residual_in_fp32=False,
    )  # fmt: skip
    return model, (torch.randn(2, 3, 4, 32, 32),)


def vision_mamba() -> tuple[nn.Module, tuple[Any, ...]]:
    from models_mamba import VisionMamba

    model = VisionMamba(
        img_size=32, patch_size=8, depth=2, embed_dim=32, num_classes=5, drop_path_rate=0.0, drop_rate=0.0,
        rms_norm=True, fused_add_norm=True, residual_in_fp32=False, final_pool_type="mean", if_abs_pos_embed=True,
        if_rope=False, bimamba_type="v2", if_cls_token=True, if_divide_out=True, use_middle_cls_token=True,
    )  # fmt: skip
    return model, (torch.randn(2, 3, 32, 32),)


def seg_mamba() -> tuple[nn.Module, tuple[Any, ...]]:
    from model_segmamba.segmamba import SegMamba

    model = SegMamba(in_chans=2, out_chans=3, depths=[1, 1, 1, 1], feat_size=[48, 48, 48, 48])
    return model, (torch.randn(1, 2, 32, 32, 32),)


def s_d_mamba() -> tuple[nn.Module, tuple[Any, ...]]:
    from model.S_Mamba import Model

    config = SimpleNamespace(
        seq_len=24, pred_len=12, output_attention=False, use_norm=True, d_model=16, d_ff=32, d_state=4, e_layers=2,
        dropout=0.0, activation="gelu", embed="timeF", freq="h", class_strategy="projection",
    )  # fmt: skip
    return Model(config), (torch.randn(2, 24, 7), None, None, None)


def time_machine() -> tuple[nn.Module, tuple[Any, ...]]:
    from models.TimeMachine import Model

    config = SimpleNamespace(
        seq_len=24, pred_len=12, n1=16, n2=8, enc_in=7, revin=1, ch_ind=1, residual=1, dropout=0.0, d_state=8, dconv=2,
        e_fact=1,
    )  # fmt: skip
    return Model(config), (torch.randn(2, 24, 7),)


def vm_unet() -> tuple[nn.Module, tuple[Any, ...]]:
    from models.vmunet.vmamba import VSSM

    model = VSSM(
        in_chans=3, num_classes=2, depths=[1, 1, 1, 1], depths_decoder=[1, 1, 1, 1], dims=[8, 16, 32, 64],
        dims_decoder=[64, 32, 16, 8], drop_path_rate=0.0,
    )  # fmt: skip
    return model, (torch.randn(1, 3, 64, 64),)


PROJECTS = {
    "MambaVision": Project("NVlabs/MambaVision", "7860a50", (".",), mamba_vision, ("torchvision",)),
    "U-Mamba": Project(
        "bowang-lab/U-Mamba",
        "28459e3",
        ("umamba",),
        u_mamba,
        ("batchgenerators", "acvl_utils", "skimage", "tifffile", "nibabel", "SimpleITK"),
    ),
    "caduceus": Project("kuleshov-group/caduceus", "0060a6d", (".",), caduceus),
    "VideoMamba": Project(
        "OpenGVLab/VideoMamba", "f3427e4", ("videomamba/video_sm/models",), video_mamba, ("torchvision",)
    ),
    "Vim": Project("hustvl/Vim", "dd0358a", ("vim",), vision_mamba, ("torchvision",)),
    "SegMamba": Project("ge-xing/SegMamba", "cff3597", (".",), seg_mamba, oracle="torch"),
    "S-D-Mamba": Project("wzhwzhwzh0921/S-D-Mamba", "e7e8bf0", (".",), s_d_mamba, ("reformer_pytorch",)),
    "TimeMachine": Project("Atik-Ahamed/TimeMachine", "5bf17a7", ("TimeMachine_supervised",), time_machine),
    "VM-UNet": Project("JCruan519/VM-UNet", "43c495b", (".",), vm_unet, ("torchvision",), double=False),
}


class _Anything(type):
    """A class that has every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Stub(types.ModuleType):
    """A module that has every name, each a class that nobody calls."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Stubs(MetaPathFinder, Loader):
    """Finds stubs, whole packages of them."""

    def __init__(self, names: list[str]):
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def stubbed(wanted: tuple[str, ...]) -> list[str]:
    """Put stubs in the place of those packages that cannot be imported here."""
    missing = []
    for name in wanted:
        try:
            import_module(name)
        except Exception:  # whatever keeps somebody's package from being imported
            missing.append(name)
            for loaded in [module for module in sys.modules if module.partition(".")[0] == name]:
                del sys.modules[loaded]
    sys.meta_path.insert(0, _Stubs(missing))
    return missing


def outputs(found: Any) -> list[Tensor]:
    """The tensors that a model returns, in whatever form."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    values = found.values() if hasattr(found, "values") else found if isinstance(found, (tuple, list)) else []
    return [x for value in values for x in outputs(value)]


def trained(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Tensor], float]:
    """Outputs and the gradients of all parameters, and the seconds that both took."""
    model.zero_grad()
    start = time.perf_counter()
    found = outputs(model(*inputs))
    sum(y.square().mean() for y in found).backward()  # pyright: ignore[reportAttributeAccessIssue]
    seconds = time.perf_counter() - start
    return [*(y.detach() for y in found), *(p.grad for p in model.parameters() if p.grad is not None)], seconds


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """The greatest relative difference over all tensors, each measured by its norm; NaN counts as infinite."""
    if [x.shape for x in got] != [x.shape for x in want]:
        return float("inf")
    size = max(float(b.double().norm()) for b in want)
    found = [
        float((a.double() - b.double()).norm() / max(float(b.double().norm()), 1e-4 * size))
        for a, b in zip(got, want, strict=True)
    ]
    return max(x if x == x else float("inf") for x in found)


def one(name: str, folder: Path) -> dict[str, Any]:
    """Run a project in this process."""
    import dualform
    import dualform.compat

    project = PROJECTS[name]
    where = folder / project.repository.replace("/", "-")
    sys.path[:0] = [str(where / each) for each in project.folders]
    stubs = stubbed(project.stubs)
    dualform.compat.install(force=True)
    torch.manual_seed(0)
    model, inputs = project.build()
    model.train()
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    state = torch.get_rng_state()
    trained(model, inputs)
    torch.set_rng_state(state)
    ours, seconds = trained(model, inputs)
    with dualform.backend(project.oracle):
        torch.set_rng_state(state)
        loops, slow = trained(model, inputs)
        torch.set_rng_state(state)
        want = trained(model.double(), tuple(exact))[0] if project.double else loops
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "kernels": distance(ours, want),
        "loops": distance(loops, want),
        "seconds": seconds,
        "seconds of the loops": slow,
        "stubs": stubs,
    }


def main() -> int:
    """Run what was asked for, each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description="Public projects for mamba-ssm on dualform.compat.")
    parser.add_argument("projects", nargs="*", metavar="PROJECT", help=f"of {', '.join(PROJECTS)}; all by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "upstream", help="where sources are cloned to")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.projects) - set(PROJECTS):
        parser.error(f"no project {', '.join(sorted(unknown))}; there are {', '.join(PROJECTS)}")
    if options.inside:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            result = one(options.projects[0], options.folder)
        print(json.dumps(result))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    print(f"{'':12} parameters  error: kernels    loops   seconds: kernels  loops  stubs")
    for name in options.projects or PROJECTS:
        project = PROJECTS[name]
        clone(project.repository, project.commit, options.folder)
        command = [sys.executable, __file__, "--inside", "--folder", str(options.folder), name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed += 1
            print(f"{name:12} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        r = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:12} {r['parameters']:10} {r['kernels']:15.1e} {r['loops']:8.1e} {r['seconds']:16.3f} "
            f"{r['seconds of the loops']:6.3f}  {', '.join(r['stubs']) or 'none'}",
            flush=True,
        )
    return min(1, failed)


if __name__ == "__main__":
    sys.exit(main())
