"""A running mean of a network's weights, and what the network would say with them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from forge_lightning.core.distributed import local_part
from forge_lightning.core.layers import plain_name


class EMATeacher:
    """The exponential moving average of a network's trainable weights, used in place of them for single calls.

    No second network: its weights are exchanged for the time of a call, without a gradient and in evaluation mode, in
    which dropout draws no random number. Sharded weights (FSDP2) have a sharded mean. Buffers, as those of batch
    normalisation, are the network's own. Costs one fp32 copy of the trainable weights.

    Args:
        network: The network whose weights are averaged.
        decay: Decay of the average, in [0, 1). Over the first updates it is at most ``(1 + n) / (10 + n)``.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = network
        self.decay = decay
        self.updates = 0
        self._means: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] = {}
        self._sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        self._reshard()  # a module that was run without a backward pass still has its gathered weights
        for name, param in self.network.named_parameters():
            name = plain_name(name)
            if (param.requires_grad or name in self._means) and param.is_floating_point():
                yield name, param

    @torch.no_grad()
    def begin(self) -> None:
        """Start the average of weights that have none yet: first all, later those that were frozen.

        Raises:
            ValueError: If the network has no trainable weights, or restored ones do not fit.
        """
        for name, param in self._weights():
            if name not in self._means:
                local = _local(param)
                dtype = torch.promote_types(local.dtype, torch.float32)
                saved = self._restored.pop(name, None)
                if saved is not None:
                    if saved.shape != param.shape:
                        raise ValueError(
                            f"The checkpoint's teacher has {name!r} of shape {tuple(saved.shape)}, the network"
                            f" {tuple(param.shape)}: the model changed. Resume the weights alone."
                        )
                    local = _sharded_like(saved, param)
                self._means[name] = local.to(device=_local(param).device, dtype=dtype, copy=True)
        if not self._means:
            raise ValueError(f"{type(self.network).__name__} has no weights that are trained.")

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights as they are: once per optimizer step."""
        self.begin()
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        known = [(self._means[name], _local(param)) for name, param in self._weights()]
        means = [mean for mean, _ in known]
        torch._foreach_lerp_(means, [weight.to(mean.dtype) for mean, weight in known], 1 - decay)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with the mean weights."""
        self.begin()
        modes = [(module, module.training) for module in self.network.modules()]
        torch.clear_autocast_cache()  # casts of the other weights
        try:
            with self._exchanged():
                for module, _ in modes:
                    module.training = False
                return self.network(*args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training
            torch.clear_autocast_cache()

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        weights = dict(self._weights())
        plain = {name: param for name, param in weights.items() if not isinstance(param, DTensor)}
        sharded = {name: _local(param) for name, param in weights.items() if isinstance(param, DTensor)}
        own = {name: param.data for name, param in plain.items()}
        backup = {name: shard.clone() for name, shard in sharded.items()}
        try:
            # A new storage: what is saved for the backward pass of the other call keeps the old one.
            for name, param in plain.items():
                param.data = self._means[name].to(param.dtype)
            for name, shard in sharded.items():
                shard.copy_(self._means[name])  # FSDP2 gathers from this memory
            yield
        finally:
            for name, param in plain.items():
                param.data = own[name]
            self._reshard()  # what was gathered is the mean
            for name, shard in sharded.items():
                shard.copy_(backup[name])

    def _reshard(self) -> None:
        """Drop gathered weights, so that they are gathered anew."""
        for module in self._sharded:
            module.reshard()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, on the CPU. Collective where weights are sharded: call it on every process."""
        weights = dict(self._weights())
        means = {}
        for name, mean in self._means.items():
            param: Any = weights.get(name)
            if isinstance(param, DTensor):
                layout: dict[str, Any] = {"shape": param.shape, "stride": param.stride()}
                mean = DTensor.from_local(mean, param.device_mesh, param.placements, **layout).full_tensor()
            means[name] = mean.detach().cpu().clone()
        return {"updates": self.updates, "means": means | self._restored}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; tensors move to their device when they are used."""
        self.updates = state_dict["updates"]
        self._means, self._restored = {}, dict(state_dict["means"])


def _local(tensor: Tensor) -> Tensor:
    return local_part(tensor).detach()


def _sharded_like(full: Tensor, param: Any) -> Tensor:
    if not isinstance(param, DTensor):
        return full
    full = full.to(param.device_mesh.device_type)
    # Every process has the whole tensor: no broadcast.
    return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None).to_local()
