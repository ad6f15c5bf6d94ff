"""Schedules: how sparse at which step, the pruners that follow one, and what carries training over a physical removal."""

from graphprune.schedules.functions import AGP, Constant, Exponential, Joined, Linear, Schedule, agp
from graphprune.schedules.gradual import AGPPruner
from graphprune.schedules.history import History, Movement, Movements, Round
from graphprune.schedules.lottery import LotteryTicketPruner
from graphprune.schedules.movement import MovementPruner
from graphprune.schedules.rounds import LinearPruner, RoundsPruner
from graphprune.schedules.state import Outcome
from graphprune.training.optimizers import slice_average, slice_optimizer

__all__ = [
    "AGP",
    "AGPPruner",
    "Constant",
    "Exponential",
    "History",
    "Joined",
    "Linear",
    "LinearPruner",
    "LotteryTicketPruner",
    "Movement",
    "MovementPruner",
    "Movements",
    "Outcome",
    "Round",
    "RoundsPruner",
    "Schedule",
    "agp",
    "slice_average",
    "slice_optimizer",
]
