"""Code written for mamba-ssm and causal-conv1d runs here, unchanged: their names, on dualform's operators.

Two lines make them importable in this process::

    import dualform.compat
    dualform.compat.install()

and ``python -m dualform.compat train.py --its --arguments`` runs a script that way. Importing this package alone
changes nothing and loads no PyTorch.
"""

from dualform.compat.install import Status, install, status, uninstall

__all__ = ["Status", "install", "status", "uninstall"]
