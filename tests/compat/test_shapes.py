"""One record says how a former pruner is called: names, order and defaults come out of it, and arguments go where it says."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

import graphprune as gp
from graphprune import compat
from graphprune.compat import table
from graphprune.compat.former import Former
from graphprune.compat.shapes import CallShape, Refused
from tests.support.handmade import residual

CONVS = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
ROWS = [kind for kind in vars(table).values() if isinstance(kind, type) and issubclass(kind, Former) and kind is not Former]
TRAINING = "model, config_list, optimizer=None, trainer=None, criterion=None"
ANNEALING = "start_temperature=100, stop_temperature=20, cool_down_rate=0.9, perturbation_magnitude=0.35"
BATCHES = "sparsifying_training_batches=1, dependency_aware=None, dummy_input=None"
ADMM = "admm_num_iterations=30, admm_epochs_per_iteration=5, row=0.0001"
ROUNDS = "criterion=None, num_iterations=3, optimize_mode='maximize', base_algo='l1'"
SIGNATURES = {
    "FPGMPruner": "model, config_list, dependency_aware=None, dummy_input=None",
    "ActivationMeanRankFilterPruner": f"{TRAINING}, activation='relu', {BATCHES}, *, statistics_batch_num=None",
    "AGPPruner": f"{TRAINING}, num_iterations=10, epochs_per_iteration=1, pruning_algorithm='level', *, dummy_input=None",
    "AutoCompressPruner": f"model, config_list, trainer, evaluator, dummy_input, {ROUNDS}, {ANNEALING}, {ADMM}, experiment_data_dir=None",
}
CALLED = CallShape(
    "model, epochs_per_iteration=5, row=0.1, scale=None, debug=False, *others, dummy_input=None",
    today={"row": "how.rho", "debug": None, "lr": "how.rate"},
    value={"row": lambda row: 2 * row},
    constants={"mode": "global", "how.kind": "sgd"},
    refused={"debug": Refused(bool, "{who} is given debug={value!r}", "Leave it out")},
)
"""A call shape that has everything."""


def called(*arguments: Any, **options: Any) -> dict[str, Any]:
    """Returns what a call is today."""
    return CALLED.translated("Pruner", arguments, options)


# -- classes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_that_time(name: str) -> None:
    """Order and defaults are the documented ones of the first version, behind which come options of today."""
    found = inspect.signature(getattr(compat, name))
    plain = found.replace(parameters=[one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()])
    assert str(plain.replace(return_annotation=inspect.Signature.empty)) == f"({SIGNATURES[name]}, **options)"


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
def test_classes_are_whole(kind: type[Former]) -> None:
    """A class has its own name, can be pickled, and its docstring describes every parameter; annotations are those of today."""
    assert pickle.loads(pickle.dumps(kind)) is kind  # noqa: S301 (made on this line)
    signature, text = inspect.signature(kind), inspect.getdoc(kind)
    assert text is not None
    assert text.count("Args:") == 1
    described = text.partition("Args:\n")[2].partition("\n\nRaises:")[0].splitlines()
    assert [line.strip().partition(":")[0] for line in described] == list(signature.parameters)
    today = inspect.signature(kind.__bases__[1]).parameters
    assert signature.parameters["model"].annotation == today["model"].annotation
    assert kind.__name__ in compat.__all__


def test_docstrings_say_what_an_argument_is_today() -> None:
    """Renamed, kept, refused and idle parameters each have their words."""
    text = inspect.getdoc(compat.SlimPruner) or ""
    assert "    sparsifying_training_epochs: `training_epochs` of `graphprune.SlimPruner`.\n" in text
    assert "    scale: as of `graphprune.SlimPruner`.\n" in text
    assert "    dependency_aware: has no meaning any more.\n" in text
    assert "    activation: 'relu' and nothing else.\n" in (inspect.getdoc(compat.ActivationAPoZRankFilterPruner) or "")


def test_classes_of_the_user_keep_their_own_signature() -> None:
    """A class that is made from a former pruner is named in errors, and has its own signature if it has its own arguments."""

    class Mine(compat.L1FilterPruner):
        def __init__(self, model: Any, sparsity: float) -> None:
            super().__init__(model, [{"sparsity": sparsity, "op_types": ["Conv2d"]}], True)

    class Theirs(compat.L1FilterPruner):
        pass

    assert list(inspect.signature(Mine).parameters) == ["model", "sparsity"]
    assert inspect.signature(Theirs) == inspect.signature(compat.L1FilterPruner)
    with pytest.raises(gp.ConfigError, match="Mine is given dependency_aware=True and no dummy_input"):
        Mine(residual()[0], 0.5)


# -- calls ---------------------------------------------------------------------------------------------------------------------------


def test_arguments_go_where_the_record_says() -> None:
    """Names, values, constants and dicts; defaults of then hold where nothing is given, and None is nothing."""
    assert called(1) == {"model": 1, "training_epochs": 5, "mode": "global", "how": {"kind": "sgd", "rho": 0.2}}
    found = called(1, None, 0.5, 3, False, 7, 8, dummy_input=2, lr=0.1)
    assert found == {
        "model": 1, "training_epochs": 5, "mode": "global", "scale": 3, "others": (7, 8), "example_inputs": 2,
        "how": {"kind": "sgd", "rho": 1.0, "rate": 0.1},
    }  # fmt: skip


def test_names_of_today_go_before_defaults_of_then() -> None:
    """An option by its name of today, None included, takes the place of a default or a constant, also within a dict."""
    found = called(1, training_epochs=7, mode=None, how={"rho": 3.0})
    assert found == {"model": 1, "training_epochs": 7, "mode": None, "how": {"kind": "sgd", "rho": 3.0}}


def test_one_thing_under_two_names_is_refused() -> None:
    """Which of the two would hold is not for the reader to guess."""
    with pytest.raises(gp.ConfigError, match=r"Pruner is given epochs_per_iteration and training_epochs, which are the same.*Drop one"):
        called(1, 5, training_epochs=5)
    model, x = residual()
    with pytest.raises(gp.ConfigError, match="dummy_input and example_inputs, which are the same"):
        compat.L1FilterPruner(model, CONVS, dummy_input=x, example_inputs=x)


def test_what_does_not_fit_is_refused() -> None:
    """Refused values name the advice; too few arguments name the pruner."""
    with pytest.raises(gp.ConfigError, match=r"Pruner is given debug=True\. Leave it out"):
        called(1, debug=True)
    with pytest.raises(TypeError, match="Pruner: missing a required argument: 'model'"):
        called()


def test_inputs_may_have_their_name_of_today() -> None:
    """`example_inputs` finds the groups as `dummy_input` does; None of it is as good as none, and AMC then has its loader's first batch."""
    model, x = residual()
    masks = compat.L1FilterPruner(model, CONVS, True, example_inputs=x).compress()[1]
    expected = compat.L1FilterPruner(model, CONVS, True, x).compress()[1]
    assert masks.keys() == expected.keys()
    assert all((masks[name] == expected[name]).all() for name in masks)
    places, batches = [{"op_types": ["Conv2d"]}], [(x, None)]
    options: dict[str, Any] = {"channel_round": 1, "train_episode": 2, "example_inputs": None}
    amc = compat.AMCPruner(model, places, lambda loader, _: float(len(loader)), batches, **options)
    assert len(amc.objective.groups) == 2
