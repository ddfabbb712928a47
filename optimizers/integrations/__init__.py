"""Glue for trainers that call ``loss.backward()`` themselves; none of them is imported until it is used."""

from optimizers.integrations.accelerate import AccelerateHook
from optimizers.integrations.lightning import SecondOrderModule
from optimizers.integrations.transformers import TrainerHook

__all__ = ["AccelerateHook", "SecondOrderModule", "TrainerHook"]
