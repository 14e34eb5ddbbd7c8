"""Multi-task heads: shared bottom, MMoE, PLE, single.

Every head maps a state `[N, S]` to one mix `m_k` `[N, D]` for each task k. The state holds the states of
one or several encoders side by side, and what all of them share (the profile) after them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from trainer.option_groups import ModelOptions

SMALL = 0.1
"""Of 0, .01 and .1 none is better on a QB-video twin; 1 is worse."""


@dataclass(frozen=True)
class Layout:
    """What stands where in a state.

    Attributes:
        encoders: width of each encoder's state.
        shared: width of what follows them.
    """

    encoders: tuple[int, ...]
    shared: int = 0

    @property
    def size(self) -> int:
        """Width of the concatenated state."""
        return sum(self.encoders) + self.shared

    def view(self, state_NS: torch.Tensor, encoder: int) -> torch.Tensor:
        """One encoder's state with what all share."""
        if len(self.encoders) == 1:
            return state_NS
        begin = sum(self.encoders[:encoder])
        own = state_NS[:, begin : begin + self.encoders[encoder]]
        return torch.cat([own, state_NS[:, self.size - self.shared :]], dim=1) if self.shared else own


def two_layers(width: int, units: int, dimension: int) -> nn.Sequential:
    """W2 ReLU(W1 x + b1) + b2."""
    return nn.Sequential(nn.Linear(width, units), nn.ReLU(), nn.Linear(units, dimension))


class Residual(nn.Module):
    """x + f(x), f(x) = W2 ReLU(W1 x + b1) + b2: what is learned is added to the input instead of replacing it.

    f begins small, `SMALL` × the usual last layer, so that a hybrid begins nearly as its encoder: random branches would
    disturb the vectors that are learned fastest. At 0 (Goyal et al. 2017) all experts would begin alike, and a gate's
    first gradient would be rounding. With `norm` f is swish of the layer norm of that. Where input and output differ in
    width, the input goes through a matrix of its own.
    """

    def __init__(self, width: int, units: int, dimension: int, *, norm: bool = False) -> None:
        super().__init__()
        self.straight = nn.Linear(width, dimension, bias=False) if width != dimension else nn.Identity()
        self.network = two_layers(width, units, dimension)
        last: nn.Module = self.network[2]
        if norm:
            last = nn.LayerNorm(dimension)
            self.network.extend([last, nn.SiLU()])
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(SMALL)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, dimension]` of `[N, width]`."""
        return self.straight(x) + self.network(x)


def expert(state_size: int, options: ModelOptions) -> nn.Module:
    """One expert: residual, or a linear layer and ReLU as in the MMoE paper's synthetic experiments.

    With `expert_norm` what it learns ends with swish of its layer norm, as in HoME (Wang et al. 2024): experts of alike
    scale, so that a gate weighs what they say and not how loud.
    """
    size = options.embedding_dim
    if options.residual:
        return Residual(state_size, size, size, norm=options.expert_norm)
    network = nn.Sequential(nn.Linear(state_size, size), nn.ReLU())
    return nn.Sequential(network, nn.LayerNorm(size), nn.SiLU()) if options.expert_norm else network


def gate(state_size: int, own_E: list[bool], preference: float) -> nn.Linear:
    """The gate of a task over E experts; with a preference its own ones lead by so many logits in the beginning.

    Gates that begin alike stay alike, and experts that all tasks read alike learn the same. Where each task begins with
    experts of its own, no expert is without a task; what is shared is learned from there.
    """
    made = nn.Linear(state_size, len(own_E), bias=preference > 0)
    if preference:
        with torch.no_grad():
            made.bias.copy_(preference * torch.tensor(own_E, dtype=torch.float32))
    return made


class Head(nn.Module):
    """What all heads have."""

    def __init__(self, layout: Layout, options: ModelOptions, tasks: list[str]) -> None:
        super().__init__()
        self.layout, self.tasks, self.size = layout, tasks, options.embedding_dim

    def gate_weights(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The share of each expert in each task's mix, `[N, E]`, rows summing to 1; empty without gates."""
        del state_NS
        return {}

    def flops(self) -> int:
        """Multiply-adds × 2 of one state's forward pass: each weight is met once."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() == 2)


class MMoE(Head):
    """Multi-gate mixture of experts (Ma et al. 2018): m_k = Σ_e g_ke f_e(h), g_k = softmax(W_k h).

    Of several encoders each has experts of its own, an equal part of all; every gate sees all states. Where gates
    begin with a preference, every K-th expert is a task's own.
    """

    def __init__(self, layout: Layout, options: ModelOptions, tasks: list[str]) -> None:
        super().__init__(layout, options, tasks)
        n = len(layout.encoders)
        self.encoder_of = sorted(i % n for i in range(max(options.experts, n)))
        widths = [layout.encoders[i] + layout.shared for i in self.encoder_of]
        self.experts = nn.ModuleList(expert(width, options) for width in widths)
        own = {task: [e % len(tasks) == k for e in range(len(widths))] for k, task in enumerate(tasks)}
        self.gates = nn.ModuleDict({t: gate(layout.size, own[t], options.gate_preference) for t in tasks})

    def gate_weights(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The share of each expert in each task's mix, `[N, E]`, rows summing to 1."""
        return {task: torch.softmax(made(state_NS), dim=-1) for task, made in self.gates.items()}

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mixes of all tasks, `[N, D]` each."""
        views = [self.layout.view(state_NS, i) for i in range(len(self.layout.encoders))]
        outputs = [network(views[i]) for network, i in zip(self.experts, self.encoder_of, strict=True)]
        return _mixes(self.gate_weights(state_NS), outputs)


def _mixes(weights: dict[str, torch.Tensor], outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mixes `[N, D]` of the same outputs `[N, D]` by weights `[N, E]`, the outputs being read once for all tasks."""
    mix_NKD = torch.bmm(torch.stack(list(weights.values()), dim=1), torch.stack(outputs, dim=1))
    return dict(zip(weights, mix_NKD.unbind(1), strict=True))


class SharedBottom(Head):
    """One network that all tasks share (Caruana 1997)."""

    def __init__(self, layout: Layout, options: ModelOptions, tasks: list[str]) -> None:
        super().__init__(layout, options, tasks)
        self.bottom = expert(layout.size, options)

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same mix for every task."""
        return dict.fromkeys(self.tasks, self.bottom(state_NS))


class Single(Head):
    """An expert for each task: only what lies below is shared."""

    def __init__(self, layout: Layout, options: ModelOptions, tasks: list[str]) -> None:
        super().__init__(layout, options, tasks)
        self.own = nn.ModuleDict({task: expert(layout.size, options) for task in tasks})

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each task's own mix."""
        return {task: network(state_NS) for task, network in self.own.items()}


class Extraction(nn.Module):
    """One level of PLE: experts of each task and shared ones, a gate for each task and one for the shared.

    The gate of a task weighs its own experts and the shared ones; the shared gate weighs all experts.
    On the last level there is no shared gate.
    """

    def __init__(self, size: int, options: ModelOptions, tasks: list[str], *, last: bool) -> None:
        super().__init__()
        groups, own, shared = [*tasks, "shared"], options.task_experts, options.shared_experts
        self.tasks = tasks
        self.experts = nn.ModuleDict(
            {g: nn.ModuleList(expert(size, options) for _ in range(shared if g == "shared" else own)) for g in groups}
        )
        total = own * len(tasks) + shared
        first = [True] * own + [False] * shared
        gates = {task: gate(size, first, options.gate_preference) for task in tasks}
        if not last:
            gates["shared"] = nn.Linear(size, total, bias=False)
        self.gates = nn.ModuleDict(gates)

    def gate_weights(self, input_by_group: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Shares of a group's candidates: a task's own experts, then the shared ones; all for `shared`."""
        return {g: torch.softmax(made(input_by_group[g]), dim=-1) for g, made in self.gates.items()}

    def forward(self, input_by_group: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The group's task_representations `[N, D]` from the group's inputs `[N, S]`."""
        output: dict[str, list[torch.Tensor]] = {group: [] for group in self.experts}
        for group, experts in self.experts.items():
            assert isinstance(experts, nn.ModuleList)
            output[group] += [network(input_by_group[group]) for network in experts]
        candidates = {task: output[task] + output["shared"] for task in self.tasks}
        candidates["shared"] = [each for group in output.values() for each in group]
        weights = self.gate_weights(input_by_group)
        return {group: _mixes({group: weight}, candidates[group])[group] for group, weight in weights.items()}


class PLE(Head):
    """Progressive layered extraction (Tang et al. 2020): levels of shared and task-specific experts."""

    def __init__(self, layout: Layout, options: ModelOptions, tasks: list[str]) -> None:
        super().__init__(layout, options, tasks)
        sizes = [layout.size] + [options.embedding_dim] * (options.levels - 1)
        self.levels = nn.ModuleList(
            Extraction(size, options, tasks, last=number == options.levels) for number, size in enumerate(sizes, 1)
        )

    def _below(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs of the last level."""
        inputs = dict.fromkeys([*self.tasks, "shared"], state_NS)
        for level in self.levels[:-1]:
            inputs = level(inputs)
        return inputs

    def gate_weights(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The last level's shares `[N, E]`: a task's own experts first, then the shared ones."""
        last = self.levels[-1]
        assert isinstance(last, Extraction)
        weights = last.gate_weights(self._below(state_NS))
        return {task: weights[task] for task in self.tasks}

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mixes of all tasks, `[N, D]` each."""
        task_representations: dict[str, torch.Tensor] = self.levels[-1](self._below(state_NS))
        return task_representations


HEADS: dict[str, type[Head]] = {"mmoe": MMoE, "shared_bottom": SharedBottom, "ple": PLE, "single": Single}
