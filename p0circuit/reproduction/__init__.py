"""Reproduction: every experiment on one model, its controls, and the verdict on every claim.

`reproduce` takes the name of a model and does everything; `reproduce_model` takes a model, prompts and experiments.
`reproduce_training` tests the claims about training on the traces of training runs.

    <out>/<model>/<experiment>.json, tables/, figures/      <out>/<model>/claims.json, report.html, report.md
    <out>/<model>/controls/<control>/<experiment>.json      <out>/<model>/manifest.json (last: the run is complete)
"""

from p0circuit.reproduction.controls import initial_checkpoint_of as initial_checkpoint_of
from p0circuit.reproduction.cost import (
    FORWARD_PASSES as FORWARD_PASSES,
    SAMPLES as SAMPLES,
    parameter_count as parameter_count,
    quick_samples as quick_samples,
)
from p0circuit.reproduction.entries import failed_claims as failed_claims
from p0circuit.reproduction.front import reproduce as reproduce
from p0circuit.reproduction.model import reproduce_model as reproduce_model
from p0circuit.reproduction.stored import result_key as result_key, run_or_read as run_or_read
from p0circuit.reproduction.training import TRAINING as TRAINING, reproduce_training as reproduce_training
