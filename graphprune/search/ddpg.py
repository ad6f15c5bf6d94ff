"""Deep deterministic policy gradients (Lillicrap et al., arXiv 1509.02971) with one action in [0, 1], as AMC uses them.

The critic learns Q(s, a) = r - b + discount * Q'(s', mu'(s')), b being a moving average of rewards; the actor climbs Q(s, mu(s)). Primes
are target networks, which follow slowly. Rewards are also divided by their spread, so that learning rates fit accuracies and milliseconds
alike. All random numbers come from one generator, so that a seed decides everything.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import ConfigError
from graphprune.trace.threads import forked_generators

_SMALL = 3e-3  # the range of the last layers' first weights, as in the paper
_FRACTIONS = ("tau", "discount", "noise_decay", "moving_average")


@dataclass(frozen=True)
class DDPG:
    """How an agent learns; the defaults are those of AMC (He et al., arXiv 1802.03494, and its published code).

    Attributes:
        hidden: width of the two hidden layers of actor and critic.
        actor_rate: learning rate of the actor (Adam).
        critic_rate: learning rate of the critic.
        batch: transitions per update.
        updates: updates per step of an episode.
        tau: how far target networks follow in one update.
        discount: of the next state's value.
        noise: standard deviation of the first actions after warm-up, truncated to [0, 1].
        noise_decay: what it is multiplied with after every episode.
        moving_average: how far the baseline moves towards the mean reward of a batch.
        replay: how many episodes are remembered.
        warm_up: how many episodes act at random; None for an eighth of all.

    Raises:
        ConfigError: a value is out of its range.
    """

    hidden: int = 300
    actor_rate: float = 1e-4
    critic_rate: float = 1e-3
    batch: int = 64
    updates: int = 1
    tau: float = 0.01
    discount: float = 1.0
    noise: float = 0.5
    noise_decay: float = 0.99
    moving_average: float = 0.5
    replay: int = 100
    warm_up: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "warm_up" and value is None:
                continue
            whole = name in ("hidden", "batch", "updates", "replay", "warm_up")
            usable = type(value) is int if whole else type(value) in (int, float)
            if not usable or not value > 0 or (name in _FRACTIONS and value > 1):
                ranges = "a whole number of at least 1" if whole else "a number in (0, 1]" if name in _FRACTIONS else "a number above 0"
                raise ConfigError(f"the parameter {name!r} of DDPG is {value!r}", f"Give {ranges}")

    @classmethod
    def of(cls, parameters: Mapping[str, Any] | None) -> DDPG:
        """Returns the parameters, with what is missing by default.

        Raises:
            ConfigError: a name is unknown, or a value is out of its range.
        """
        known = cls.__dataclass_fields__
        for name in parameters or {}:
            if name not in known:
                raise ConfigError(f"DDPG has no parameter {name!r}", f"Use {', '.join(known)}")
        return cls(**dict(parameters or {}))


@dataclass(frozen=True, eq=False)
class Transition:
    """One step.

    Attributes:
        state: features of shape (n,).
        action: what was done, in [0, 1].
        following: the features that the next action is decided by; of the last step, any.
        last: whether it was the last step of its episode.
    """

    state: Tensor
    action: float
    following: Tensor
    last: bool


class _Critic(nn.Module):
    """Q(s, a): state and action have a first layer each, whose results are added."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.state, self.action = nn.Linear(features, hidden), nn.Linear(1, hidden)
        self.middle, self.value = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """Returns values of shape (batch, 1)."""
        out: Tensor = self.value(torch.relu(self.middle(torch.relu(self.state(state) + self.action(action)))))
        return out


class Agent:
    """Learns which action is best in which state.

    Args:
        features: how many numbers a state has.
        steps: how many steps an episode has.
        how: the parameters.
        seed: of first weights, noise and replay.
    """

    def __init__(self, features: int, steps: int, how: DDPG, seed: int) -> None:
        self.how = how
        self._generator = torch.Generator().manual_seed(seed)
        with forked_generators():  # PyTorch's own first weights, which are replaced, come from the global generator
            layers = (nn.Linear(features, how.hidden), nn.ReLU(), nn.Linear(how.hidden, how.hidden), nn.ReLU(), nn.Linear(how.hidden, 1))
            actor, critic = nn.Sequential(*layers, nn.Sigmoid()), _Critic(features, how.hidden)
        for network, last in ((actor, layers[-1]), (critic, critic.value)):
            self._initialise(network, last)
        self._networks = nn.ModuleDict(
            {"actor": actor, "critic": critic, "slow_actor": copy.deepcopy(actor), "slow_critic": copy.deepcopy(critic)}
        )
        self._optimizers = {
            "actor": torch.optim.Adam(actor.parameters(), lr=how.actor_rate),
            "critic": torch.optim.Adam(critic.parameters(), lr=how.critic_rate),
        }
        capacity = how.replay * steps
        self._replay = {"state": torch.zeros(capacity, features), "following": torch.zeros(capacity, features)}
        self._replay |= {name: torch.zeros(capacity, 1) for name in ("action", "reward", "last")}
        self._seen = 0
        self._baseline: float | None = None

    def _initialise(self, network: nn.Module, last: nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, nn.Linear):
                reach = _SMALL if module is last else module.in_features**-0.5
                for parameter in module.parameters():
                    parameter.data.uniform_(-reach, reach, generator=self._generator)

    # -- acting ------------------------------------------------------------------------------------------------------------------

    def random(self) -> float:
        """Returns an action that any other is as likely as."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def act(self, state: Tensor, noise: float) -> float:
        """Returns the actor's action, drawn from a normal distribution around it that is truncated to [0, 1].

        Args:
            state: features of shape (n,).
            noise: the standard deviation; without any, the action itself is returned.
        """
        with torch.no_grad():
            mean = self._networks["actor"](state[None]).double().squeeze()
        if noise <= 0.0:
            return float(mean)
        low, high = torch.special.ndtr((0.0 - mean) / noise), torch.special.ndtr((1.0 - mean) / noise)
        drawn = low + (high - low) * self.random()
        return float((mean + noise * torch.special.ndtri(drawn)).clamp(0.0, 1.0))

    # -- learning ----------------------------------------------------------------------------------------------------------------

    def remember(self, episode: list[Transition], reward: float) -> None:
        """Puts an episode into the replay memory, each step with the reward of all; the oldest steps are forgotten."""
        for step in episode:
            place = self._seen % len(self._replay["reward"])
            row = {"state": step.state, "following": step.following, "action": step.action, "reward": reward, "last": float(step.last)}
            for name, value in row.items():
                self._replay[name][place] = torch.as_tensor(value)
            self._seen += 1

    def learn(self) -> float:
        """Makes one update of both networks and their slow copies; returns the critic's loss before it."""
        filled = min(self._seen, len(self._replay["reward"]))
        chosen = torch.randint(filled, (min(self.how.batch, filled),), generator=self._generator)
        state, action, reward, following, last = (self._replay[n][chosen] for n in ("state", "action", "reward", "following", "last"))
        mean, spread = float(reward.mean()), float(self._replay["reward"][:filled].std(correction=0))
        self._baseline = mean if self._baseline is None else self._baseline + self.how.moving_average * (mean - self._baseline)
        with torch.no_grad():
            later = self._networks["slow_critic"](following, self._networks["slow_actor"](following))
            value = (reward - self._baseline) / max(spread, 1e-12) + self.how.discount * (1.0 - last) * later
        loss = nn.functional.mse_loss(self._networks["critic"](state, action), value)
        self._step("critic", loss)
        self._step("actor", -self._networks["critic"](state, self._networks["actor"](state)).mean())
        with torch.no_grad():
            for name in ("actor", "critic"):
                for slow, fast in zip(self._networks[f"slow_{name}"].parameters(), self._networks[name].parameters(), strict=True):
                    slow.lerp_(fast, self.how.tau)
        return float(loss.detach())

    def _step(self, name: str, loss: Tensor) -> None:
        parameters = list(self._networks[name].parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self._optimizers[name].step()

    # -- saving ------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Returns all that the agent knows, see `graphprune.training.packing`."""
        plain = {"seen": self._seen, "baseline": self._baseline, "generator": self._generator.get_state()}
        return {"networks": self._networks, "optimizers": self._optimizers, "replay": self._replay, **plain}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts an agent of the same parameters where it was when a run kept its state."""
        self._seen, self._baseline, self._replay = state["seen"], state["baseline"], state["replay"]
        state["networks"].fill(self._networks)
        for name, optimizer in self._optimizers.items():
            state["optimizers"][name].fill(optimizer)
        self._generator.set_state(state["generator"])
