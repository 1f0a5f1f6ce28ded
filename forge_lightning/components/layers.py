"""Finding layers of a model by name, by depth, or by its structure."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")


def plain_name(name: str) -> str:
    """A parameter's or module's name without what compiling, sharding and checkpointing put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def block_list(model: nn.Module) -> nn.ModuleList | None:
    """The stack of blocks of a transformer: the module list that holds the most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=None)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model from input to output, by name.

    The largest ``nn.ModuleList``; where there is none, the children of the largest ``nn.Sequential``; else the children
    with parameters.
    """
    stack: nn.Module | None = block_list(model)
    if stack is None:
        chains = [m for m in model.modules() if isinstance(m, nn.Sequential) and len(m) > 1]
        stack = max(chains, key=lambda chain: sum(p.numel() for p in chain.parameters()), default=None)
    if stack is None:
        found = {name: m for name, m in model.named_children() if any(True for _ in m.parameters())}
        return {plain_name(name): m for name, m in found.items()}
    prefix = next(name for name, m in model.named_modules() if m is stack)
    return {plain_name(f"{prefix}.{name}" if prefix else name): m for name, m in stack.named_children()}


def select_layers(model: nn.Module, layers: str | Sequence[float | str]) -> dict[str, nn.Module]:
    """Layers by name, by depth, or all.

    Args:
        model: Where to look.
        layers: "all" for every block; else names or patterns of modules, as in ``"model.layers.*"`` (a star stands for
            one part of the name), and fractions of the depth in [0, 1]: 0 the first block, 1 the last.

    Returns:
        ``{name: module}``, from input to output for those that are blocks.

    Raises:
        ValueError: If a name matches nothing (naming close ones), a fraction is out of range, or there are no blocks.
    """
    found = blocks(model)
    if layers == "all" or not isinstance(layers, str):
        by_depth = layers == "all" or any(not isinstance(layer, str) for layer in layers)
        if by_depth and not found:
            raise ValueError(f"{type(model).__name__} has no layers that could be found by depth. Name its modules.")
    if layers == "all":
        return found
    modules = {plain_name(name): m for name, m in model.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for layer in [layers] if isinstance(layers, str) else layers:
        if isinstance(layer, str):
            matched = {name: m for name, m in modules.items() if name == layer or _matches(name, layer)}
            if not matched:
                close = get_close_matches(layer, modules, n=5, cutoff=0.3) or list(found) or list(modules)[:5]
                raise ValueError(f"No layer is called {layer!r}. Close: {close}. Found by depth: {list(found)}.")
            chosen |= matched
        elif 0 <= layer <= 1:
            name = list(found)[round(layer * (len(found) - 1))]
            chosen[name] = found[name]
        else:
            raise ValueError(f"A layer given as fraction of the depth must be in [0, 1], not {layer}.")
    order = {name: position for position, name in enumerate(modules)}
    return dict(sorted(chosen.items(), key=lambda item: order.get(item[0], -1)))


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
