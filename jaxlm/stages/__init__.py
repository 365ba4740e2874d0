"""Stages: identities, the store, the chain, and one module per stage, each a process of its own."""
