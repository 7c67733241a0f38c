"""The number of CPU threads that a model is run on."""

from __future__ import annotations

import os

import torch

from p0circuit.hooked_model import HookedModel

SMALL_MODEL = 5_000_000
"""Number of parameters up to which one thread is faster than several."""


def one_thread_if_small(model: HookedModel) -> None:
    """Run a small model on one thread, unless the environment variable OMP_NUM_THREADS is set.

    The matrices of a small model are multiplied before a second thread has started: one thread is twice as fast as two.

    Args:
        model: whose parameters are counted; torch's number of threads is set for the whole process.
    """
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
