"""Fitting parameters: state, step, optimizers, schedules, loop."""

from jaxlm.train.optimizers import build as build_optimizer
from jaxlm.train.state import TrainState, init_state
from jaxlm.train.step import loss_and_grads, train_step

__all__ = ["TrainState", "build_optimizer", "init_state", "loss_and_grads", "train_step"]
