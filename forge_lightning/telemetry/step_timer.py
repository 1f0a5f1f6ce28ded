"""Time of the parts of a training step."""

import time

CATEGORIES = ("data", "forward_backward", "optimizer", "callbacks", "other")


def category_of(action: str) -> str:
    """The category of one of Lightning's profiled actions, by its name."""
    if action.startswith("[Callback]"):
        return "callbacks"
    name = action.rsplit(".", 1)[-1]
    if name in ("training_step", "backward"):
        return "forward_backward"
    if name in ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "clip_gradients"):
        return "optimizer"
    if name.endswith(("_next", "batch_to_device", "batch_transfer")):
        return "data"
    return "other"


class StepTimer:
    """Exclusive time of nested actions, by category: time in an inner action does not count for the outer one."""

    def __init__(self) -> None:
        self._categories: dict[str, str] = {}
        self._stack = ["other"]
        self._since = time.perf_counter()
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)
        self.paused = False

    def start(self, action: str) -> None:
        """An action begins."""
        self._account()
        category = self._categories.get(action)
        if category is None:
            category = self._categories[action] = category_of(action)
        # what a hook of a callback calls is still the callback's, and so are the optimizer's own parts
        self._stack.append(self._stack[-1] if category == "other" else category)

    def stop(self) -> None:
        """The innermost action ends."""
        self._account()
        if len(self._stack) > 1:
            self._stack.pop()

    def take(self) -> dict[str, float]:
        """Seconds by category since the last call."""
        self._account()
        taken, self.seconds = self.seconds, dict.fromkeys(CATEGORIES, 0.0)
        return taken

    def pause(self, paused: bool) -> None:
        """Validation is not part of a step."""
        self._account()
        self.paused = paused

    def _account(self) -> None:
        now = time.perf_counter()
        if not self.paused:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now
