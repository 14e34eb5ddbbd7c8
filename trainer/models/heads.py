"""Multi-task heads: shared bottom, MMoE, PLE, single.

Every head maps a state `[N, S]` to one representation `m_k` `[N, D]` per task k. The state concatenates the
states of one or several encoders, followed by what they share (the profile).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from trainer.option_groups import ModelOptions

RESIDUAL_INIT_SCALE = 0.1
"""Initial scale of residual branches: 0, .01 and .1 are equally good on a QB-video twin; 1 is worse."""


@dataclass(frozen=True)
class Layout:
    """Layout of a concatenated state.

    Attributes:
        encoders: width of each encoder's state.
        shared: width of the shared part after them.
    """

    encoders: tuple[int, ...]
    shared: int = 0

    @property
    def size(self) -> int:
        """Width of the concatenated state."""
        return sum(self.encoders) + self.shared

    def view(self, state_NS: torch.Tensor, encoder: int) -> torch.Tensor:
        """One encoder's state with the shared part."""
        if len(self.encoders) == 1:
            return state_NS
        begin = sum(self.encoders[:encoder])
        own = state_NS[:, begin : begin + self.encoders[encoder]]
        return torch.cat([own, state_NS[:, self.size - self.shared :]], dim=1) if self.shared else own


def two_layers(width: int, units: int, dimension: int) -> nn.Sequential:
    """W2 ReLU(W1 x + b1) + b2."""
    return nn.Sequential(nn.Linear(width, units), nn.ReLU(), nn.Linear(units, dimension))


class Residual(nn.Module):
    """Residual block x + f(x), f(x) = W2 ReLU(W1 x + b1) + b2.

    The last layer's initialisation is scaled by `RESIDUAL_INIT_SCALE`, so that a hybrid starts close to its encoder:
    random branches would disturb the fast-learning item vectors. At 0 (Goyal et al. 2017) all experts would start
    equal, and a gate's first gradient would be rounding error. With `norm`, f ends with swish of its layer norm. If the
    widths of input and output differ, the input is projected.
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
                parameter.mul_(RESIDUAL_INIT_SCALE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, width]` → `[N, dimension]`."""
        return self.straight(x) + self.network(x)


def expert(state_size: int, options: ModelOptions) -> nn.Module:
    """One expert: a residual block, or a linear layer and ReLU as in the MMoE paper's synthetic experiments.

    With `expert_norm` it ends with swish of its layer norm, as in HoME (Wang et al. 2024): experts have similar scales,
    so that gate weights are comparable.
    """
    size = options.embedding_dim
    if options.residual:
        return Residual(state_size, size, size, norm=options.expert_norm)
    network = nn.Sequential(nn.Linear(state_size, size), nn.ReLU())
    return nn.Sequential(network, nn.LayerNorm(size), nn.SiLU()) if options.expert_norm else network


def gate(state_size: int, own_E: list[bool], preference: float) -> nn.Linear:
    """The gate of a task over E experts; `preference` is the initial bias of the task's own experts, in logits.

    Gates that start equal stay similar, and experts that all tasks weigh alike learn the same. If each task starts with
    its own experts, every expert is used, and sharing is learned from there.
    """
    made = nn.Linear(state_size, len(own_E), bias=preference > 0)
    if preference:
        with torch.no_grad():
            made.bias.copy_(preference * torch.tensor(own_E, dtype=torch.float32))
    return made


class Head(nn.Module):
    """Base class of the heads."""

    def __init__(self, layout: Layout, options: ModelOptions, tasks: list[str]) -> None:
        super().__init__()
        self.layout, self.tasks, self.size = layout, tasks, options.embedding_dim

    def gate_weights(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weight of each expert by task, `[N, E]`, rows sum to 1; empty without gates."""
        del state_NS
        return {}

    def flops(self) -> int:
        """FLOPs (multiply-adds × 2) of one state's forward pass: each weight is used once."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() == 2)


class MMoE(Head):
    """Multi-gate mixture of experts (Ma et al. 2018): m_k = Σ_e g_ke f_e(h), g_k = softmax(W_k h).

    With several encoders, each gets an equal share of the experts; every gate reads all states. With a gate
    preference, every K-th expert is a task's own.
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
        """Weight of each expert by task, `[N, E]`, rows sum to 1."""
        return {task: torch.softmax(made(state_NS), dim=-1) for task, made in self.gates.items()}

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Representations by task, `[N, D]` each."""
        views = [self.layout.view(state_NS, i) for i in range(len(self.layout.encoders))]
        outputs = [network(views[i]) for network, i in zip(self.experts, self.encoder_of, strict=True)]
        return _weighted_sums(self.gate_weights(state_NS), outputs)


def _weighted_sums(weights: dict[str, torch.Tensor], outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weighted sums `[N, D]` of expert outputs `[N, D]` by weights `[N, E]`, reading the outputs once for all tasks."""
    sum_NKD = torch.bmm(torch.stack(list(weights.values()), dim=1), torch.stack(outputs, dim=1))
    return dict(zip(weights, sum_NKD.unbind(1), strict=True))


class SharedBottom(Head):
    """One network that all tasks share (Caruana 1997)."""

    def __init__(self, layout: Layout, options: ModelOptions, tasks: list[str]) -> None:
        super().__init__(layout, options, tasks)
        self.bottom = expert(layout.size, options)

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same representation for every task."""
        return dict.fromkeys(self.tasks, self.bottom(state_NS))


class Single(Head):
    """One expert per task: only the layers below are shared."""

    def __init__(self, layout: Layout, options: ModelOptions, tasks: list[str]) -> None:
        super().__init__(layout, options, tasks)
        self.own = nn.ModuleDict({task: expert(layout.size, options) for task in tasks})

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each task's representation."""
        return {task: network(state_NS) for task, network in self.own.items()}


class Extraction(nn.Module):
    """One level of PLE: task-specific and shared experts, a gate per task and a shared gate.

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
        """Weights of a group's experts: the task's own, then the shared ones; all experts for `shared`."""
        return {g: torch.softmax(made(input_by_group[g]), dim=-1) for g, made in self.gates.items()}

    def forward(self, input_by_group: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Output of each group `[N, D]` from its input `[N, S]`."""
        output: dict[str, list[torch.Tensor]] = {group: [] for group in self.experts}
        for group, experts in self.experts.items():
            assert isinstance(experts, nn.ModuleList)
            output[group] += [network(input_by_group[group]) for network in experts]
        candidates = {task: output[task] + output["shared"] for task in self.tasks}
        candidates["shared"] = [each for group in output.values() for each in group]
        weights = self.gate_weights(input_by_group)
        return {group: _weighted_sums({group: weight}, candidates[group])[group] for group, weight in weights.items()}


class PLE(Head):
    """Progressive layered extraction (Tang et al. 2020): levels of shared and task-specific experts."""

    def __init__(self, layout: Layout, options: ModelOptions, tasks: list[str]) -> None:
        super().__init__(layout, options, tasks)
        sizes = [layout.size] + [options.embedding_dim] * (options.levels - 1)
        self.levels = nn.ModuleList(
            Extraction(size, options, tasks, last=number == options.levels) for number, size in enumerate(sizes, 1)
        )

    def _below(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs of the last extraction level."""
        inputs = dict.fromkeys([*self.tasks, "shared"], state_NS)
        for level in self.levels[:-1]:
            inputs = level(inputs)
        return inputs

    def gate_weights(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The last level's gate weights `[N, E]`: the task's own experts, then the shared ones."""
        last = self.levels[-1]
        assert isinstance(last, Extraction)
        weights = last.gate_weights(self._below(state_NS))
        return {task: weights[task] for task in self.tasks}

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Representations by task, `[N, D]` each."""
        task_representations: dict[str, torch.Tensor] = self.levels[-1](self._below(state_NS))
        return task_representations


HEAD_CLASSES: dict[str, type[Head]] = {"mmoe": MMoE, "shared_bottom": SharedBottom, "ple": PLE, "single": Single}
