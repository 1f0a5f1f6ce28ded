"""What a device asks of the code that drives it."""

import torch


def reads_are_free(device: torch.device) -> bool:
    """Whether a number of this device can be read at any time.

    On an accelerator a read waits until all work that was given to it is done, and leaves it idle until more comes. A
    step that does not log reads nothing there.
    """
    return device.type == "cpu"
