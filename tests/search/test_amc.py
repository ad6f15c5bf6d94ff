"""AMC: as good as trying everything, states and limits that are those of the group to come, and runs that no interruption changes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.cost.count import count_by_module
from graphprune.errors import ConfigError, FileError, InputError
from graphprune.search.amc import FEATURES, AMCPruner, Course
from graphprune.search.ddpg import DDPG, Agent, Transition
from tests.support.analytic import Analytic, Stopped, network
from tests.support.operators import images
from tests.support.untouched import changes, snapshot

FULL = {"a": 12, "b": 20, "c": 16}
FIRST_HURTS_LEAST = {"a": 0.2, "b": 1.0, "c": 3.0}
FIRST_HURTS_MOST = {"a": 2.0, "b": 0.5, "c": 0.3}
EVERYWHERE = [{"op_types": ["Conv2d"]}]
QUICK = {"hidden": 32, "warm_up": 4}


class Score:
    """Scores a shrunk model by what each layer lost, and dies at one of its calls if it is told to."""

    def __init__(self, damage: dict[str, float] | None = None, stop_at: int | None = None) -> None:
        self.damage, self.stop_at, self.calls = damage or FIRST_HURTS_LEAST, stop_at, 0

    def __call__(self, model: nn.Module) -> float:
        """Returns the score."""
        if self.calls == self.stop_at:
            raise Stopped
        self.calls += 1
        module: Any = model
        return self.of({name: 1.0 - getattr(module, name).out_channels / full for name, full in FULL.items()})

    def of(self, lost: dict[str, float]) -> float:
        """Returns the score of sparsities by groups or layers."""
        return math.exp(-sum(self.damage[name[0]] * value**2 for name, value in lost.items()))


def pruner(episodes: int = 12, config: Any = None, evaluator: Any = None, **options: Any) -> AMCPruner:
    """Returns a pruner of the network, to half of its MACs unless something else is asked for."""
    if config is None:
        options.setdefault("budget", gp.Budget(macs=0.5))
    options.setdefault("ddpg_params", QUICK)
    score = Score() if evaluator is None else evaluator
    return AMCPruner(episodes, network(), config or EVERYWHERE, score, example_inputs=images(1), **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("damage", [FIRST_HURTS_LEAST, FIRST_HURTS_MOST])
def test_best_is_close_to_the_best_of_all_points_and_better_than_uniform(damage: dict[str, float], seed: int) -> None:
    """Of thousands of admissible points the best, to within a hundredth, in a hundred episodes; later ones score better than warm-up."""
    target, score = Analytic(budget=gp.Budget(macs=0.6)), Score(damage)
    admissible = [p for p in target.points() if target.constraints[0].cost(target.counts(p)) <= target.constraints[0].target]
    optimum = max(score.of(p) for p in admissible)
    uniform = score.of(target.project(dict.fromkeys(target.groups, 0.5)))
    found = pruner(100, evaluator=score, budget=target.budget, seed=seed, ddpg_params={"noise_decay": 0.96})
    result = found.search()
    assert optimum - 0.01 <= result.best.score <= optimum + 1e-12
    assert result.best.score > uniform + 0.1
    scores = [t.score for t in result.history]
    assert np.mean(scores[-20:]) > np.mean(scores[:12]) + 0.05
    assert score.calls == len({tuple(t.sparsities.values()) for t in result.history})  # nothing is evaluated twice


@pytest.mark.parametrize("budget", [gp.Budget(macs=0.5), gp.Budget(params=0.8)])
def test_every_episode_ends_on_the_budget(budget: gp.Budget) -> None:
    """Each shrunk model meets it, and giving back one channel to the group that was the last to lose any would not."""
    found = pruner(20, budget=budget)
    target = found.objective.constraints[0]
    for trial in found.search().history:
        counts = found.objective.counts(trial.sparsities)
        assert getattr(gp.count(found.objective.small(trial.sparsities), images(1)), budget.unit) <= target.target
        name = [n for n, s in trial.sparsities.items() if s > 0][-1]
        assert target.cost({**counts, name: counts[name] + 1}) > target.target


def test_limits_are_what_the_budget_still_allows() -> None:
    """Against trying every width: the most with which later groups can meet the budget, the fewest with which they need lose nothing."""
    target = Analytic(max_sparsity=0.8)
    course, draw, limit = Course(target), random.Random(0), target.constraints[0]  # noqa: S311 (widths, not secrets)
    for _ in range(20):
        counts = {n: FULL[n[0]] for n in target.groups}
        for at, name in enumerate(target.groups):
            later = {n: target.fewest(n) for n in target.groups[at + 1 :]}
            widths = range(target.fewest(name), FULL[name[0]] + 1)
            reachable = [k for k in widths if limit.cost({**counts, **later, name: k}) <= limit.target]
            enough = [k for k in widths if limit.cost({**counts, name: k}) <= limit.target]
            least = max(enough, default=target.fewest(name))
            assert course.limits(at, counts) == (least, max(reachable))
            wanted = draw.random()
            counts[name] = course.left(at, wanted, counts)
            assert counts[name] == min(max(math.floor(FULL[name[0]] * (1 - wanted) + 0.5), least), max(reachable))
        assert limit.cost(counts) <= limit.target


def test_states_are_those_of_the_group_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's next state is the next step's state: index, what has gone so far and the action just taken; rewards are scores."""
    seen: list[tuple[list[Transition], float]] = []
    monkeypatch.setattr(Agent, "remember", lambda _, episode, reward: seen.append((episode, reward)))
    found = pruner(4)
    history, groups = found.search().history, found.objective.groups
    dense = gp.count(network(), images(1)).macs
    assert [reward for _, reward in seen] == [t.score for t in history]
    for (steps, _), trial in zip(seen, history, strict=True):
        assert [step.last for step in steps] == [False, False, True]
        assert all(torch.equal(step.following, after.state) for step, after in itertools.pairwise(steps))
        so_far, before = dict.fromkeys(groups, 0.0), 0.0
        for at, (step, name) in enumerate(zip(steps, groups, strict=True)):
            state = dict(zip(FEATURES, step.state.tolist(), strict=True))
            now = found.objective.cost(so_far).macs
            later = {n: 1 - found.objective.fewest(n) / FULL[n[0]] for n in groups[at:]}
            assert state["index"] == pytest.approx(at / 2)
            assert state["channels"] == pytest.approx(FULL[name[0]] / 20)
            assert state["elements"] == pytest.approx({"a": 27, "b": 108, "c": 20}[name[0]] / 108)
            assert state["reduced"] == pytest.approx(min((dense - now) / (dense / 2), 1.0), abs=1e-6)
            assert state["rest"] == pytest.approx(min((now - found.objective.cost({**so_far, **later}).macs) / (dense / 2), 1.0), abs=1e-6)
            assert state["before"] == pytest.approx(before, abs=1e-6)
            by_layer = count_by_module(found.objective.small(so_far), images(1))
            own = {"a": "ab", "b": "bc", "c": ("c", "fc")}[name[0]]
            assert state["macs"] == pytest.approx(sum(by_layer[n].macs for n in own) / dense, abs=1e-6)
            so_far[name] = trial.sparsities[name]
            before = step.action
            assert step.action == pytest.approx(trial.sparsities[name] / found.objective.most[name])


# -- the agent -----------------------------------------------------------------------------------------------------------------------


def filled(how: DDPG, episodes: int = 5) -> Agent:
    """Returns an agent that remembers some episodes of two steps."""
    agent, draw = Agent(3, 2, how, seed=1), torch.Generator().manual_seed(0)
    for _ in range(episodes):
        states = torch.rand(3, 3, generator=draw)
        steps = [Transition(states[n], float(torch.rand((), generator=draw)), states[n + 1], n == 1) for n in range(2)]
        agent.remember(steps, float(torch.rand((), generator=draw)))
    return agent


def actor(weights: dict[str, Tensor], name: str, state: Tensor) -> Tensor:
    """Returns the actions of an actor, layer by layer."""
    for layer in (0, 2):
        state = F.relu(F.linear(state, weights[f"networks/{name}.{layer}.weight"], weights[f"networks/{name}.{layer}.bias"]))
    return torch.sigmoid(F.linear(state, weights[f"networks/{name}.4.weight"], weights[f"networks/{name}.4.bias"]))


def critic(weights: dict[str, Tensor], name: str, state: Tensor, action: Tensor) -> Tensor:
    """Returns the values of a critic, layer by layer."""

    def linear(layer: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"networks/{name}.{layer}.weight"], weights[f"networks/{name}.{layer}.bias"])

    return linear("value", F.relu(linear("middle", F.relu(linear("state", state) + linear("action", action)))))


def known(agent: Agent) -> dict[str, Tensor]:
    """Returns the tensors that an agent keeps, by name."""
    state = agent.state()
    replay = {f"replay/{name}": tensor for name, tensor in state["replay"].items()}
    return (
        {f"networks/{name}": tensor for name, tensor in state["networks"].state_dict().items()} | replay | {"generator": state["generator"]}
    )


def test_updates_are_those_of_the_paper() -> None:
    """The critic's loss is that of Bellman's equation with baseline, and target networks follow by tau."""
    how = DDPG(hidden=8, batch=6, tau=0.25, discount=0.5, moving_average=0.5, critic_rate=0.1)
    agent = filled(how)
    baseline: float | None = None
    for _ in range(4):
        weights = {name: tensor.clone() for name, tensor in known(agent).items()}
        generator = torch.Generator()
        generator.set_state(weights["generator"])
        rows = torch.randint(10, (6,), generator=generator)
        state, action, reward, following, last = (weights[f"replay/{n}"][rows] for n in ("state", "action", "reward", "following", "last"))
        baseline = float(reward.mean()) if baseline is None else 0.5 * baseline + 0.5 * float(reward.mean())
        spread = weights["replay/reward"][:10].numpy().std()
        later = critic(weights, "slow_critic", following, actor(weights, "slow_actor", following))
        value = (reward - baseline) / spread + torch.where(last == 1, torch.zeros(()), 0.5 * later)
        expected = (critic(weights, "critic", state, action) - value).square().mean()
        assert agent.learn() == pytest.approx(float(expected), rel=1e-5)
        after = known(agent)
        for name in ("actor.2.weight", "critic.state.weight"):
            old, fast = weights[f"networks/slow_{name}"], after[f"networks/{name}"]
            assert not torch.equal(fast, weights[f"networks/{name}"])
            assert torch.allclose(after[f"networks/slow_{name}"], 0.75 * old + 0.25 * fast, atol=1e-7)


def test_agent_finds_the_best_action() -> None:
    """Of a bandit whose reward is highest at 0.7."""
    agent = Agent(1, 1, DDPG(hidden=64, critic_rate=3e-3), seed=0)
    state = torch.ones(1)
    for _ in range(60):
        action = agent.random()
        agent.remember([Transition(state, action, state, last=True)], -((action - 0.7) ** 2))
    for _ in range(1000):
        agent.learn()
    assert agent.act(state, 0.0) == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize("noise", [0.05, 0.5, 3.0])
def test_noise_is_a_truncated_normal_distribution(noise: float) -> None:
    """The same distribution as drawing from a normal one until the action is in [0, 1]."""
    agent, state = Agent(2, 1, DDPG(hidden=8), seed=0), torch.ones(2)
    mean = agent.act(state, 0.0)
    drawn = np.sort([agent.act(state, noise) for _ in range(3000)])
    many = np.random.default_rng(0).normal(mean, noise, 200000)
    expected = np.sort(many[(many >= 0) & (many <= 1)])
    assert 0.0 <= drawn[0] <= drawn[-1] <= 1.0
    distance = np.abs(np.searchsorted(expected, drawn) / expected.size - np.arange(drawn.size) / drawn.size).max()
    assert distance < 0.04


def test_replay_forgets_the_oldest_episodes() -> None:
    """A hundred episodes are remembered, not a hundred steps; here three of them."""
    agent = filled(DDPG(hidden=8, replay=3), episodes=5)
    rewards = known(filled(DDPG(hidden=8), episodes=5))["replay/reward"][:10, 0]
    kept = known(agent)["replay/reward"][:, 0]
    assert sorted(kept.tolist()) == sorted(rewards[4:].tolist())
    assert known(filled(DDPG(hidden=8)))["replay/reward"].shape == (200, 1)


# -- the pruner ----------------------------------------------------------------------------------------------------------------------


def killed(after: int) -> Callable[[Agent, list[Transition], float], None]:
    """Returns what stands for `Agent.remember`: it dies after so many episodes."""
    left, remember = [after], Agent.remember

    def remembers(agent: Agent, episode: list[Transition], reward: float) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        remember(agent, episode, reward)

    return remembers


def test_interrupted_at_any_episode_ends_as_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in episode after episode, in warm-up and later, the run ends with the same trials and episodes."""
    options: dict[str, Any] = {"seed": 2, "ddpg_params": {**QUICK, "noise": 3.0}}
    whole = pruner(24, **options)
    whole.search()
    for stop in (0, 1, 2, 3, 8, 1, 0):
        with monkeypatch.context() as patch:
            patch.setattr(Agent, "remember", killed(stop))
            with pytest.raises(Stopped):
                pruner(24, folder=tmp_path, **options).search()
    found = pruner(24, folder=tmp_path, **options)
    assert found.search() == whole.search()
    assert found.episodes == whole.episodes
    assert any(e.loss > 0 for e in found.episodes)
    assert len((tmp_path / "amc.csv").read_text().splitlines()) == 25
    assert pruner(24, evaluator=Score(stop_at=0), folder=tmp_path, **options).search() == whole.search()  # nothing is evaluated again
    assert pruner(24, **{**options, "seed": 1}).search() != whole.search()
    with pytest.raises(FileError, match="seed"):
        pruner(24, folder=tmp_path, **{**options, "seed": 1}).search()


def test_result_is_what_speedup_takes() -> None:
    """Masks make the model of the best trial; number, score and config list are its own; the given model is untouched."""
    given = network()
    before = snapshot(given)
    found = AMCPruner(12, given, EVERYWHERE, Score(), example_inputs=images(1), budget=gp.Budget(macs=0.5), ddpg_params=QUICK)
    number, masked, masks, score, entries = found.get_best_result()
    assert not changes(before, snapshot(found.model))
    small, _ = gp.speedup(found.model, masks)
    assert Score()(small) == pytest.approx(score)
    assert (number, score) == (found.best.number, max(t.score for t in found.history))
    assert gp.count(small, images(1)) == found.best.cost
    assert torch.allclose(small.eval()(images(1)), masked.eval()(images(1)), atol=1e-5)
    _, other = gp.L1NormPruner(network(), entries, example_inputs=images(1)).compress()
    assert all(np.array_equal(masks[n], np.asarray(other[n])) for n in masks)
    assert found.last == found.history[-1]


def test_config_list_says_how_much_goes_where_there_is_no_budget() -> None:
    """A sparsity is that of all channels of its entry together; every entry counts."""
    found = pruner(12, [{"op_names": ["a", "b"], "sparsity": 0.5}, {"op_names": ["c"], "sparsity": 0.25}])
    for trial in found.search().history:
        gone = {n[0]: round(s * FULL[n[0]]) for n, s in trial.sparsities.items()}
        assert gone["a"] + gone["b"] == 16
        assert gone["c"] == 4


def test_minimising_is_maximising_the_negated_score() -> None:
    """The evaluator's sign and the mode cancel."""
    score = Score()
    assert pruner().search() == pruner(evaluator=lambda model: -score(model), optimize_mode="minimize").search()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "total_episode"),
        ({"optimize_mode": "max"}, "optimize_mode"),
        ({"target": "flops"}, "budget="),
        ({"ddpg_params": {"lr_a": 1e-4}}, "lr_a"),
        ({"ddpg_params": {"tau": 1.5}}, "tau"),
        ({"ddpg_params": {"batch": 0.5}}, "batch"),
        ({"budget": None}, "neither a budget"),
    ],
)
def test_unusable_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    """Before anything is evaluated, with what to write instead."""
    with pytest.raises(ConfigError, match=message):
        pruner(**options)


def test_example_inputs_are_asked_for() -> None:
    """Groups cannot be found without."""
    with pytest.raises(InputError, match="example_inputs"):
        AMCPruner(4, network(), [{"op_types": ["Conv2d"], "sparsity": 0.5}], Score())
