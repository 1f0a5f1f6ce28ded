"""LoRA and its kin on a Hugging Face model, by the library `peft`."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from forge_lightning.core.extras import require_extra

_SAMPLED = 256
"""Numbers of each frozen weight that differ between two models."""


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
    if kind == "ADALORA":
        raise MisconfigurationException(
            "`ForgeModule(peft=...)`: ADALORA wants a call after each step that this module does not make, and would"
            " keep all of its ranks. Use LORA."
        )
    if made.inference_mode or str(getattr(made.task_type, "value", made.task_type)) != "CAUSAL_LM":
        raise MisconfigurationException(
            f"`ForgeModule(peft={dict(settings)!r})`: `inference_mode` and a `task_type` other than CAUSAL_LM are not"
            " for training a language model. Leave them out."
        )
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
            made = peft.get_peft_model(model, adapter_config(settings))
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # of peft, for settings that do not fit
        linear = sorted({name.split(".")[-1] for name, part in model.named_modules() if _is_linear(part)})
        raise MisconfigurationException(
            f"`ForgeModule(peft={dict(settings)!r})`: {error} The model's linear layers are called {linear}."
        ) from None
    if not any(param.requires_grad for param in made.parameters()):
        raise MisconfigurationException(f"`ForgeModule(peft={dict(settings)!r})` leaves nothing to train.")
    return made


def changes_base(settings: Mapping[str, Any]) -> bool:
    """Whether the adapters' initial values are taken out of the base weights, which then are others."""
    return settings.get("init_lora_weights") not in (None, True, False, "gaussian")


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def merged(model: Any) -> Any:
    """A copy of a model with its adapters added into the weights."""
    return copy.deepcopy(model).merge_and_unload()


def frozen_names(module: nn.Module, prefix: str) -> set[str]:
    """Weights of the network below ``prefix`` that are not trained."""
    return {
        name
        for name, param in module.named_parameters(remove_duplicate=False)
        if name.startswith(prefix) and not param.requires_grad
    }


def weights_sample(module: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Numbers from all over each weight, that differ between two models: ``(n,)``, of the weight's own type."""
    params = dict(module.named_parameters(remove_duplicate=False))
    found = {}
    for name in sorted(names):
        flat = params[name].detach().flatten()
        found[name] = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].cpu().clone()
    return found


def are_the_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two samples are of the same weights; of another precision, as far as that tells."""
    if one.keys() != other.keys():
        return False
    for name, value in one.items():
        known = other[name]
        if value.shape != known.shape:
            return False
        if value.dtype == known.dtype:
            if not torch.equal(value, known):
                return False
        elif not torch.allclose(value.float(), known.float(), rtol=2**-7, atol=1e-6):
            return False
    return True


def without_frozen(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """A state without these weights."""
    return {name: value for name, value in state.items() if name not in names}


def with_frozen(module: nn.Module, state: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """A state completed by the module's own frozen weights."""
    own = dict(module.named_parameters(remove_duplicate=False))
    return {**{name: own[name].detach() for name in names if name not in state}, **state}
