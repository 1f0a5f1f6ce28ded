"""Finding layers of a model by name, by depth, or by its structure."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")


def plain_name(name: str) -> str:
    """A parameter's or module's name without what compiling, sharding and checkpointing put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def network_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` without what callbacks added: modules that say ``is_auxiliary``, and what is inside them."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen or getattr(module, "is_auxiliary", False):
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    return walk(model, prefix)


def block_list(model: nn.Module) -> nn.ModuleList | None:
    """The stack of blocks of a transformer: the module list that holds the most parameters.

    A list without layers, such as one of metrics, does not count.
    """
    lists = [m for _, m in network_modules(model) if isinstance(m, nn.ModuleList) and any(True for _ in m.parameters())]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=None)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model from input to output, by name.

    The largest ``nn.ModuleList``; without one, the children of the largest ``nn.Sequential``; else the children
    with parameters.
    """
    stack: nn.Module | None = block_list(model)
    if stack is None:
        chains = [m for _, m in network_modules(model) if isinstance(m, nn.Sequential) and len(m) > 1]
        stack = max(chains, key=lambda chain: sum(p.numel() for p in chain.parameters()), default=None)
    if stack is None:
        found = {name: m for name, m in network_modules(model) if name and "." not in name}
        return {plain_name(name): m for name, m in found.items() if any(True for _ in m.parameters())}
    prefix = next(name for name, m in network_modules(model) if m is stack)
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
    modules = {plain_name(name): m for name, m in network_modules(model) if name}
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


def output_layer(model: nn.Module, name: str | None = None) -> nn.Module:
    """The module that turns final features into outputs.

    Args:
        model: Where to look.
        name: Its name. Default: the output embedding of a Hugging Face model; else the last ``nn.Linear`` that is not
            inside a block.

    Raises:
        ValueError: If no layer has that name, listing the layers.
    """
    modules: dict[str, nn.Module] = {plain_name(key): m for key, m in network_modules(model) if key}
    if name is not None:
        if name not in modules:
            close = get_close_matches(name, modules, n=5, cutoff=0.3) or list(modules)[:5]
            raise ValueError(f"No module is called {name!r}. Close: {close}.")
        return modules[name]
    for candidate in (model, *modules.values()):
        found: Any = getattr(candidate, "get_output_embeddings", lambda: None)()
        if isinstance(found, nn.Module):
            return found
    stack = block_list(model)
    inside = {id(m) for m in stack.modules()} if stack is not None else set()
    linear = [m for m in modules.values() if isinstance(m, nn.Linear) and id(m) not in inside]
    if not linear:
        raise ValueError(
            f"{type(model).__name__} has no `nn.Linear` outside its blocks that could be its output layer. Name it."
        )
    return linear[-1]


def output_width(model: nn.Module, module: nn.Module) -> int | None:
    """Units of a layer's output, from the last of its parts that has weights; ``None`` if they cannot be inferred.

    A layer without weights, as an activation function, keeps the width of what comes before it in the model.
    """
    width, found = None, None
    inside = {id(part) for part in module.modules()}
    for _, part in network_modules(model):
        own = _own_width(part)
        width = width if own is None else own
        if id(part) in inside:
            found = width
    return found


def _own_width(module: nn.Module) -> int | None:
    for attribute in ("out_features", "embedding_dim", "embed_dim", "nf"):
        value = getattr(module, attribute, None)
        if isinstance(value, int):
            return value
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, nn.Parameter) and weight.ndim == 1 else None  # a norm's scales
