"""A double of an accelerator on the CPU: it knows which tensors would lie there, and notes what would wait for it."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from forge_lightning.core.device import HostCopy

ROOT = Path(__file__).parents[2]
WAITS = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.__array__, Tensor.__iter__, Tensor.__contains__, Tensor.__format__, Tensor.__repr__,
    Tensor.nonzero, torch.nonzero, Tensor.argwhere, torch.argwhere, Tensor.masked_select, torch.masked_select,
    Tensor.unique, torch.unique, Tensor.unique_consecutive, torch.unique_consecutive, Tensor.equal, torch.equal,
    Tensor.allclose, torch.allclose, Tensor.bincount, torch.bincount, Tensor.quantile, torch.quantile,
    torch.nn.utils.clip_grads_with_norm_, Tensor.is_nonzero, torch.is_nonzero,
}  # fmt: skip
"""What reads numbers, or makes a tensor whose size depends on them."""
FACTORIES = {torch.tensor, torch.as_tensor, torch.from_numpy}
MAKERS = FACTORIES | {
    torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.linspace, torch.eye, torch.rand, torch.randn,
    torch.randint, torch.randperm, torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like,
}  # fmt: skip
MOVES = {Tensor.to, Tensor.copy_, Tensor.cpu, Tensor.__getitem__, Tensor.__setitem__, Tensor.type_as, Tensor.numpy}
"""What may take tensors of two devices."""
READS = "reads_are_free"


class Device(TorchFunctionMode):
    """Tensors on the device are those that `place` has seen, and what is computed with them.

    While `listening`, `waits` counts calls from this repository that would wait for the device, by place and function.
    A `HostCopy` that is read before `next_step` waits too. `mixes` counts, all the time, calls that would fail, with
    tensors of the device and of the host.
    """

    def __init__(self):
        super().__init__()
        self.listening = False
        self.waits = Counter()
        self.mixes = Counter()
        self.steps = 0
        self._made = WeakKeyDictionary()  # the step in which each copy was

    def __enter__(self):
        self._before = HostCopy.__init__, HostCopy.read
        make, read = self._before

        def noted(copy, tensors):
            make(copy, tensors)
            self._made[copy] = self.steps

        def read_noted(copy):
            if self._made[copy] == self.steps and copy._copies:
                self.note(HostCopy.read)
            return read(copy)

        HostCopy.__init__, HostCopy.read = noted, read_noted
        return super().__enter__()

    def __exit__(self, *args):
        HostCopy.__init__, HostCopy.read = self._before
        return super().__exit__(*args)

    def next_step(self):
        """What was copied before this is there."""
        self.steps += 1

    def place(self, tree):
        """Take the tensors as lying on the device."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                leaf._on_device = True
        return tree

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.__setattr__, Tensor.__delattr__) or getattr(func, "__name__", "") == "__set__":
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(lies_there(t) for t in tensors)
        if on_device and func not in MOVES and any(t.ndim and not lies_there(t) for t in tensors):
            self.note(func, self.mixes)
        if on_device:
            home = to_host(func, args, kwargs)
            if func in WAITS or (home and not kwargs.get("non_blocking")) or takes_a_number(func, args, kwargs):
                self.note(func)
            if home:
                result = func(*args, **kwargs)
                return result.view_as(result) if result is args[0] and func is not Tensor.copy_ else result
        elif func in MAKERS and isinstance(kwargs.get("device"), torch.device):
            if func in FACTORIES:
                self.note(func)
            on_device = True
        elif func is Tensor.to and any(isinstance(a, torch.device) for a in (*args[1:], kwargs.get("device"))):
            result = func(*args, **kwargs)
            return self.place(result.view_as(result) if result is args[0] else result)
        result = func(*args, **kwargs)
        return self.place(result) if on_device else result

    def note(self, func, counter=None):
        """Count a call by the line of this repository that made it."""
        counter = self.waits if counter is None else counter
        if not self.listening and counter is self.waits:
            return
        frame = sys._getframe(1)
        while frame is not None and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
            frame = frame.f_back
        path = Path("" if frame is None else frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:  # Lightning's own are not ours to mend
            counter[f"{path.relative_to(ROOT)}:{frame.f_lineno}: {resolve_name(func) or func}"] += 1


@contextmanager
def no_free_reads():
    """Meanwhile the CPU is taken for a device where reads wait."""
    modules = [m for name, m in sys.modules.items() if name.startswith("forge_lightning.") and hasattr(m, READS)]
    before = [getattr(module, READS) for module in modules]
    for module in modules:
        setattr(module, READS, lambda device: False)
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            setattr(module, READS, function)


def lies_there(tensor):
    return getattr(tensor, "_on_device", False)


def to_host(func, args, kwargs):
    """Whether it copies a tensor of the device to the host."""
    if func is Tensor.cpu:
        return True
    if func is Tensor.copy_:
        return lies_there(args[1]) and not lies_there(args[0])
    if func is Tensor.to:
        return any(isinstance(a, str) and a == "cpu" for a in (*args[1:], kwargs.get("device")))
    return False


def takes_a_number(func, args, kwargs):
    """Whether it needs a number of the device on the host, or numbers of the host on the device.

    Not seen is a copy to a `torch.device`, as that of the double is the CPU's own.
    """
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        chooses = func is Tensor.__getitem__ or (isinstance(args[2], Tensor) and args[2].numel() > 1)
        masks = chooses and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index)
        ends = [end for i in index if isinstance(i, slice) for end in (i.start, i.stop, i.step)]
        return masks or any(isinstance(i, list) for i in index) or any(isinstance(end, Tensor) for end in ends)
    if func in (torch.arange, torch.full, torch.linspace, torch.zeros, torch.ones, torch.empty):
        return True  # with a tensor of the device among its arguments
    if func in (Tensor.new_tensor, torch.nn.functional.one_hot, Tensor.index_put_, torch.index_put_):
        return func is not torch.nn.functional.one_hot or (len(args) < 2 and "num_classes" not in kwargs)
    if any(isinstance(kwargs.get(name), Tensor) for name in ("alpha", "beta")):
        return True
    if func in (torch.repeat_interleave, Tensor.repeat_interleave):
        return len(args) > 1 and isinstance(args[1], Tensor)
    return func in (torch.where,) and len(args) == 1
