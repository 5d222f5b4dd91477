"""A device that is asked for by name, and whether tensors can be computed there."""

import torch

from dualform.core.errors import ArgumentError


def usable_device(device: str | torch.device, where: str) -> torch.device:
    """The device, on which a tensor has been made and read.

    Args:
        device: such as ``cpu`` or ``cuda:1``.
        where: begins the message of an error.

    Raises:
        ArgumentError: for a name that is no device, one that is not there, or one without numbers, such as ``meta``.
    """
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except Exception as error:  # every kind of device has exceptions of its own for not being there
        reason = str(error).partition("\n")[0].partition(". ")[0][:300] or type(error).__name__
        hint = "dualform doctor lists the devices; cpu is always there"
        raise ArgumentError(f"{where} cannot be used: {reason}", hint=hint) from None
    return torch.device("cpu") if found.type == "cpu" else found
