"""LoRA and its kin on a Hugging Face model, by the library `peft`."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from forge_lightning.core.extras import require_extra

_SAMPLED = 64
"""Numbers of each frozen weight that tell two models apart."""


def adapter_config(settings: Mapping[str, Any]) -> Any:
    """A config of `peft`, of a mapping with ``peft_type`` and what that type knows.

    Raises:
        MisconfigurationException: If the type or a setting is unknown, or a value is refused.
        MissingExtraError: If `peft` is not installed.
    """
    peft = require_extra("peft", "peft", "`ForgeModule(peft=...)`")
    kind = str(settings.get("peft_type", "LORA")).upper()
    try:
        made = peft.get_peft_config({"task_type": "CAUSAL_LM", **settings, "peft_type": kind})
    except KeyError:
        known = sorted(str(name.value) for name in peft.PeftType)
        raise MisconfigurationException(f"`ForgeModule(peft=...)`: peft has no type {kind!r}, but {known}.") from None
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"`ForgeModule(peft={dict(settings)!r})`: {error}") from None
    if made.is_prompt_learning:
        raise MisconfigurationException(
            f"`ForgeModule(peft=...)`: {kind} puts tokens in front of every text, which shifts the places of labels and"
            " activations. Use an adapter of weights, as LORA."
        )
    return made


def add_adapters(model: Any, settings: Mapping[str, Any]) -> Any:
    """The model with adapters, which alone are trained.

    Raises:
        MisconfigurationException: If the model has no layer that is meant.
    """
    peft = require_extra("peft", "peft", "`ForgeModule(peft=...)`")
    try:
        with warnings.catch_warnings():
            # peft 0.18 on transformers 5.23: nothing a user could act on
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            return peft.get_peft_model(model, adapter_config(settings))
    except ValueError as error:
        linear = sorted({name.split(".")[-1] for name, part in model.named_modules() if _is_linear(part)})
        raise MisconfigurationException(
            f"`ForgeModule(peft={dict(settings)!r})`: {error} Its linear layers are called {linear}."
        ) from None


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def merged(model: Any) -> Any:
    """A copy of a model with its adapters added into the weights."""
    return copy.deepcopy(model).merge_and_unload()


def frozen_names(module: nn.Module, prefix: str) -> set[str]:
    """Weights of the network below ``prefix`` that are not trained."""
    return {name for name, param in module.named_parameters() if name.startswith(prefix) and not param.requires_grad}


def weights_digest(module: nn.Module, names: set[str]) -> float:
    """A number that differs between other weights, from the first numbers of each."""
    params = dict(module.named_parameters())
    sums = [params[name].detach().flatten()[:_SAMPLED].double().sum() for name in sorted(names)]
    return float((torch.stack(sums).cpu() * torch.arange(1, len(sums) + 1)).sum()) if sums else 0.0


def without_frozen(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """A state without these weights."""
    return {name: value for name, value in state.items() if name not in names}


def with_frozen(module: nn.Module, state: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """A state completed by the module's own frozen weights."""
    own = dict(module.named_parameters())
    return {**{name: own[name].detach() for name in names if name not in state}, **state}
