"""The update of each parameter within the backward pass, so that one gradient exists at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch


class FusedBackward(torch.optim.Optimizer):
    """One inner optimizer for each parameter, which steps as soon as the parameter's gradient is complete.

    Every `param_groups` entry is that of an inner optimizer, so a learning-rate schedule reaches all of them. A
    parameter that is used several times has one hook: autograd sums its gradients before it calls it.
    """

    def __init__(self, inner: list[torch.optim.Optimizer]) -> None:
        """inner: optimizers of one parameter each."""
        self.inner = inner
        self._norms: dict[int, torch.Tensor] = {}  # place of the parameter -> norm of its gradient, on the device
        self._is_step_over = False
        parameters = [optimizer.param_groups[0]["params"][0] for optimizer in inner]
        super().__init__([{"params": [parameter]} for parameter in parameters], dict(inner[0].defaults))
        self._share_groups()
        for place, parameter in enumerate(parameters):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._make_hook(place))

    def _share_groups(self) -> None:
        self.param_groups = [optimizer.param_groups[0] for optimizer in self.inner]

    def _make_hook(self, place: int) -> Callable[[torch.Tensor], None]:
        def update(parameter: torch.Tensor) -> None:
            if self._is_step_over:
                self._norms, self._is_step_over = {}, False
            # Before the step: some optimizers use the gradient as their working memory.
            self._norms[place] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            self.inner[place].step()
            parameter.grad = None

        return update

    def grad_norm(self) -> torch.Tensor:
        """The norm of all gradients of the last backward pass: a float32 scalar on the device. No host sync."""
        return torch.linalg.vector_norm(torch.stack([norm for _, norm in sorted(self._norms.items())]))

    def step(self, closure: None = None) -> None:
        """The weights have been updated already. The next backward pass begins a new sum of gradients."""
        self._is_step_over = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: each gradient is gone as soon as it was used."""

    def train(self) -> None:
        """For optimizers that average the weights: to those that training works on."""
        for optimizer in self.inner:
            optimizer.train()

    def eval(self) -> None:
        """For optimizers that average the weights: to the averaged ones."""
        for optimizer in self.inner:
            optimizer.eval()

    def state_dict(self) -> dict:
        """As of an optimizer with one group for each parameter."""
        content = {"state": {}, "param_groups": []}
        for place, optimizer in enumerate(self.inner):
            inner = optimizer.state_dict()
            content["param_groups"].append(inner["param_groups"][0] | {"params": [place]})
            if 0 in inner["state"]:
                content["state"][place] = inner["state"][0]
        return content

    def load_state_dict(self, state_dict: dict) -> None:
        """Raises `ValueError` when the state is not of as many parameters."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        if len(groups) != len(self.inner):
            raise ValueError(f"the state is of {len(groups)} parameters, the optimizer has {len(self.inner)}")
        for place, (optimizer, group) in enumerate(zip(self.inner, groups, strict=True)):
            inner_state = {0: state[place]} if place in state else {}
            optimizer.load_state_dict({"state": inner_state, "param_groups": [group | {"params": [0]}]})
        self._share_groups()


def make_fused(
    parameters: list[torch.nn.Parameter], make_one: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
) -> FusedBackward:
    """An optimizer that works within `backward()`. make_one: the ordinary optimizer of a list of parameters."""
    return FusedBackward([make_one([parameter]) for parameter in parameters])
