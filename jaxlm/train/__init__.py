"""Fitting parameters: state, step, optimizers, schedules, loop."""

from jaxlm.train.loop import Fitted, Hooks, fit
from jaxlm.train.optimizers import build as build_optimizer
from jaxlm.train.state import TrainState, init_state
from jaxlm.train.step import loss_and_grads, train_step

__all__ = ["Fitted", "Hooks", "TrainState", "build_optimizer", "fit", "init_state", "loss_and_grads", "train_step"]
