"""Prefect flows over the stages. They start processes and pass paths; they never import jax."""

from flows import environment as environment  # first of all: it has to come before Prefect reads its settings
