# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Build a sink yourself
#
# If you understand a circuit you can build it. Here you write the weights of a transformer by hand, one step of the
# circuit after the other, and check after each step what has changed: embedding, recognition, detection,
# amplification, read-out. Nothing is trained. The result is the `wired` model of this package without its decoys. Its
# circuit is known, so the package's methods are tested on it. At the end you remove parts of it, and compare it with
# a trained model.
#
# *About 15 minutes; two exercises. Before: [04](04_patching_the_circuit.ipynb). After: [06](06_emergence.ipynb). The full
# construction, with its numbers derived: [`wired.py`](../p0circuit/models/constructed/weights.py).*

# %% tags=["parameters"]
model = "p0-nano"  # a shipped model, a local Hugging Face directory, or a hub id
samples = 128  # prompts of 64 tokens
seed = 0  # of the prompts
out = None  # a directory for the figures and key figures; None saves nothing

# %%
# Where p0circuit is not installed: use the checkout around this notebook, or say what to do.
import importlib.util
import pathlib
import sys

if importlib.util.find_spec("p0circuit") is None:
    here = pathlib.Path(globals().get("__file__", "notebook")).resolve()
    checkout = [
        folder for folder in here.parents if (folder / "p0circuit/__init__.py").is_file()
    ]
    if not checkout:
        raise ModuleNotFoundError(
            "p0circuit is not installed here, and it is on no package index. Clone its repository "
            "and open this notebook inside the clone; on Colab, clone it and run in a cell: "
            "%pip install ./NAME-OF-THE-CLONE"
        )
    sys.path.insert(0, str(checkout[0]))

# %%
import math

import numpy as np
import pandas as pd
import torch

from p0circuit.course.page import Page, open_model, read_prompts, sink_of
from p0circuit.figures.lines import trajectories
from p0circuit.figures.style import Series
from p0circuit.models.constructed.build import model_from_weights
from p0circuit.models.constructed.truth import wired_truth
from p0circuit.models.constructed.weights import (
    blank_weights,
    purity,
    residual_subspaces,
    set_neuron,
    wired_weights,
)
from p0circuit.prompts import random_tokens

page = Page(out)
trained = open_model(model)  # for the comparison at the end
text = read_prompts(trained, samples, seed)
sink_of(trained, text)
length = 64
prompts = random_tokens(
    64, n=samples, length=length, seed=seed
)  # the model will have a vocabulary of 64 tokens
positions = [str(t) for t in range(length)]

# %% [markdown]
# ## 0. An empty model
#
# Three layers with five heads, `d_model` 160, MLPs with 128 ReLU neurons, and all weights zero except those of the
# norms. These are set to $1/\sqrt{d}$, so that **the output of every norm is a unit vector**: what a block reads are
# cosines.
#
# The residual stream is divided into orthogonal subspaces (in a random basis, so that no coordinate is special):
#
# | subspace | dimensions | content |
# | --- | --- | --- |
# | `token` | 64 | which token this is |
# | `ruler` | 1 | a component of constant length, for comparison |
# | `echo` | 64 | the output of attention |
# | `mark` | 1 | "this position is unmixed" |
# | `p0` | 1 | the P0 direction |
# | (no name) | 29 | empty: 18 are for the decoys that `wired` has in addition, 11 stay unused, among them the all-ones vector (so that the mean that LayerNorm subtracts is 0) |

# %%
weights = blank_weights()
space = residual_subspaces(seed=0)
for name in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"):
    print(f"blocks.0.{name:9} {list(weights[f'blocks.0.{name}'].shape)}")


def build_model(step):
    """The model with the weights written so far."""
    return model_from_weights(weights, step)


def stream(lm, name):
    """The length of an activation's component in each subspace, by position (mean of prompts)."""
    with torch.no_grad():
        _, cache = lm.run_with_cache(prompts.ids, names_filter=name)
    activation = cache[name].double()
    subspaces = {"token": space.token, "echo": space.echo}
    subspaces |= {name: getattr(space, name)[None] for name in ("ruler", "mark", "p0")}
    return {
        subspace: (activation @ basis.T).norm(dim=-1).mean(0)
        for subspace, basis in subspaces.items()
    }


# %% [markdown]
# ## 1. Embedding
#
# Token $w$ becomes $c_w + r$: a code plus the ruler. The 64 codes are the rows of a Hadamard matrix divided by 8:
# orthonormal, with entries $\pm 1/8$. Every embedding has the squared norm $B = 1 + 1 = 2$. There are no position
# embeddings, and no part of the model would read them.

# %%
codes = torch.ones(1, 1, dtype=torch.float64)
while len(codes) < 64:
    codes = torch.cat([torch.cat([codes, codes], 1), torch.cat([codes, -codes], 1)])
codes /= 8

weights["embed.W_E"] = codes @ space.token + space.ruler
weights["unembed.W_U"] = weights["embed.W_E"].T
weights["unembed.b_U"] = torch.zeros(64, dtype=torch.float64)

# %% [markdown]
# ## 2. Recognition: two heads of block 0
#
# Queries and keys stay zero, so attention is uniform: query $t$ gives $1/(t+1)$ to each token it sees. Heads 1 and 3
# each copy one half of the code into `echo`, scaled so that the echo of one token has length 3 (the norm divides by
# $\sqrt{B}$, so the weights multiply by it).
#
# The more orthonormal codes are averaged, the shorter is the average. With $F$ the sum of the squared shares of the
# tokens up to the query,
#
# $$|\mathrm{echo}|^2 = 9 F, \qquad F_t = \sum_w \left(\frac{\#\{i \le t : w_i = w\}}{t+1}\right)^2 .$$
#
# This is the cone model of notebook [02](02_recognition.ipynb) with cosine $a = 0$, as long as all tokens differ; $F$
# counts repeated tokens together. At P0 $F = 1$, exactly.

# %%
ECHO, B = 3.0, 2.0
for head, half in ((1, slice(0, 32)), (3, slice(32, 64))):
    weights["blocks.0.attn.W_V"][head] = space.token[half].T
    weights["blocks.0.attn.W_O"][head] = ECHO * math.sqrt(B) * space.echo[half]

recognition = stream(build_model("recognition"), "blocks.0.hook_resid_mid")
predicted = (9 * purity(prompts.ids)).sqrt().mean(0)
lines = [
    Series("echo, measured", recognition["echo"].tolist()),
    Series("3 √F, predicted", predicted.tolist(), dashed=True),
]
figure = trajectories(
    {"After attention 0": lines}, positions, "Length of the echo", "position", ["length"]
)
figure.set_size_inches(5.6, 3.0)
page.show(figure, "length of the echo by position, measured and predicted")
print(f"largest difference: {float((recognition['echo'] - predicted).abs().max()):.1e}")

# %% [markdown]
# ## 3. Detection: one neuron of MLP 0
#
# The echo is longest at P0. How can a neuron measure a length that the norm before the MLP divides away? With the
# **ruler**. It has length 1 everywhere, so after the norm it is the shorter, the longer the rest of the stream:
#
# $$\cos(\text{ruler}) = r(F) = \frac{1}{\sqrt{B + 9F}} .$$
#
# At P0 the cosine is $r(1) = 0.302$; at a position that has seen two different tokens it is $r(1/2) = 0.392$. The
# threshold is between them: $r(3/4) = 0.338$.
#
# ### Exercise 5.1
#
# The neuron computes $\mathrm{relu}(g \cdot \cos + b)$. Choose gain and bias so that the result is 0 at the threshold
# and for all larger cosines, and 1 at P0. (The function should work for other thresholds, too.)


# %%
from p0circuit.course.checks import check_detector


def my_detector(threshold, at_p0):
    """(gain, bias) of a neuron that is 0 from a threshold on and 1 at P0's cosine."""
    ...


check_detector(my_detector)

# %% [markdown]
# <details>
# <summary>Solution 5.1</summary>
#
# ```python
# def my_detector(threshold, at_p0):
#     gain = -1 / (threshold - at_p0)
#     return gain, -gain * threshold
# ```
#
# The gain is negative: the neuron fires where the cosine of the ruler is *small*.
#
# </details>
#
# Neuron 17 gets these weights and writes 3 times its activation into `mark`. `ramp(off, on)` is the package's answer
# to the exercise.

# %%
from p0circuit.course.checks import ramp

MARK = 3.0


def ruler_cosine(pure):
    return 1 / math.sqrt(B + ECHO**2 * pure)


gain, bias = ramp(off=ruler_cosine(3 / 4), on=ruler_cosine(1))
set_neuron(weights, 0, 17, reads=gain * space.ruler, bias=bias, writes=MARK * space.mark)

detection = stream(build_model("detection"), "blocks.0.hook_resid_post")
print(
    "mark at positions 0, 1, 2 and 63:", np.round(detection["mark"][[0, 1, 2, 63]].numpy(), 3)
)

# %% [markdown]
# (If the first two tokens of a prompt were the same, position 1 would be unmixed and marked as well.)
#
# ## 4. Amplification: one neuron of MLP 1
#
# At P0 the mark has the cosine $3/\sqrt{B + 9 + 9} = 0.67$, elsewhere 0. Neuron 42 fires from 0.3 on and writes 60
# times the P0 direction. The rest of P0's stream is shorter than 5, so from here on its direction is nearly `p0`.

# %%
P0_NORM, FROM = 60.0, 0.3
gain, bias = ramp(off=FROM, on=MARK / math.sqrt(B + ECHO**2 + MARK**2))
set_neuron(weights, 1, 42, reads=gain * space.mark, bias=bias, writes=P0_NORM * space.p0)

lm = build_model("amplification")
hooks = [f"blocks.{layer}.hook_resid_{where}" for layer in (0, 1) for where in ("mid", "post")]
with torch.no_grad():
    _, cache = lm.run_with_cache(prompts.ids, names_filter=["blocks.0.hook_resid_pre", *hooks])
stages = ["embedding", "attention 0", "MLP 0", "attention 1", "MLP 1"]
norms = torch.stack(
    [cache[name].norm(dim=-1).mean(0) for name in ["blocks.0.hook_resid_pre", *hooks]]
)
lines = [
    Series("position zero", norms[:, 0].tolist()),
    Series("position 8", norms[:, 8].tolist()),
]
figure = trajectories(
    {"Norm of the stream": lines},
    stages,
    "Norm of the stream in the model built by hand",
    "after",
    ["norm"],
    log=True,
)
figure.set_size_inches(5.6, 3.2)
page.show(figure, "norm of the stream at position zero and position 8, step by step")

# %% [markdown]
# ## 5. Read-out: the sink heads
#
# In block 2, heads 0, 2 and 3 get a constant query (a bias; `W_Q` stays zero) and a key that reads `p0`. Their score
# is *strength × cosine to `p0`*: 9, 8 and 7 at P0, and 0 everywhere else. A query that sees $t$ other keys then gives
# P0 the attention
#
# $$A_{t,0} = \frac{e^s}{e^s + t} .$$
#
# ### Exercise 5.2
#
# What is the sink score of such a head? Write a function of strength and length.


# %%
from p0circuit.course.checks import check_strength


def my_score(strength, length):
    """The sink score of a head that scores P0 with `strength` and everything else with 0."""
    ...


check_strength(my_score)

# %% [markdown]
# <details>
# <summary>Solution 5.2</summary>
#
# ```python
# def my_score(strength, length):
#     return sum(math.exp(strength) / (math.exp(strength) + t) for t in range(length)) / length
# ```
#
# </details>
#
# `wired_truth` holds the known properties of the `wired` model, including the scores of these three heads.

# %%
strengths = {0: 9.0, 2: 8.0, 3: 7.0}
for head, strength in strengths.items():
    weights["blocks.2.attn.b_Q"][head, -1] = 1.0
    weights["blocks.2.attn.W_K"][head, :, -1] = strength * math.sqrt(32) * space.p0

lm = build_model("my sink")
pattern = "blocks.2.attn.hook_pattern"
with torch.no_grad():
    _, cache = lm.run_with_cache(prompts.ids, names_filter=pattern)
scores = cache[pattern][..., 0].mean(-1)  # [prompt, head]
rows = [
    (f"2.{head}", strength, expected, float(scores[:, head].median()))
    for (head, strength), expected in zip(
        strengths.items(), wired_truth().sink_scores(length), strict=True
    )
]
page.show(pd.DataFrame(rows, columns=["head", "strength", "predicted", "measured (median)"]))

# %% [markdown]
# The sink is there. (The median is used because in a prompt that happens to begin with the same token twice, two
# positions share the sink.) Look at it; heads 2.1 and 2.4 have no weights and attend uniformly.

# %%
from p0circuit.experiments.paper.c01_sink_map import view_heads

last = [(2, head) for head in range(5)]
page.show(view_heads(lm, prompts.subset([0]), last, "A sink, built by hand"))

# %% [markdown]
# Is it the package's `wired` model? All weights that we have written are in it, to the last digit. In addition it has
# *decoys*: heads and neurons that do something else, so that the tests can detect a method that finds the wrong
# components.

# %%
wired = wired_weights(seed=0)
parts = {
    "embedding": ("embed.W_E", slice(None)),
    "recognition": ("blocks.0.attn.W_O", [1, 3]),
    "detector": ("blocks.0.mlp.b_in", 17),
    "sink neuron": ("blocks.1.mlp.W_out", 42),
    "sink heads": ("blocks.2.attn.W_K", [0, 2, 3]),
}
for part, (name, where) in parts.items():
    difference = (wired[name][where] - weights[name][where]).abs().max()
    print(f"{part}: largest difference {float(difference):.0e}")

# %% [markdown]
# ## 6. Remove parts of it
#
# Every part is necessary, and by construction we know what is left without it: uniform attention, a score of 0.074.
# Each line sets components to zero at P0.

# %% tags=["cover"]
from p0circuit.experiments.sink_under_study import sink_scores
from p0circuit.figures.intervals import intervals
from p0circuit.interventions.ablation import ablate
from p0circuit.stats import bootstrap

sink_heads = [(2, 0), (2, 2), (2, 3)]
parts = {
    "nothing": [],
    "recognition head 0.1": ["attn.0.1"],
    "recognition head 0.3": ["attn.0.3"],
    "detector (neuron 17 of MLP 0)": ["neuron.0.17"],
    "sink neuron (42 of MLP 1)": ["neuron.1.42"],
    "MLP 2, which comes after": ["mlp.2"],
}
scores_without = {}
for part, nodes in parts.items():
    without = [ablate(lm, prompts, nodes)] if nodes else []
    scores_without[part] = bootstrap(sink_scores(lm, prompts, sink_heads, 0, without))
title = "Sink score of the heads we built, without parts of the circuit"
figure = intervals(
    {"Set to zero at P0": scores_without},
    title,
    ["sink score"],
    reference=wired_truth().uniform_score(length),
)
page.show(figure, "sink score with parts of the circuit set to zero at position zero")

# %% [markdown]
# ## 7. Where it fails
#
# The circuit measures purity, not position. Any position that is as pure as P0 is mistaken for it: if the first token
# is repeated $n$ times at the beginning, all $n$ copies are recognised and share the sink, with at least $1/n$ each.
# The real circuit has the same weakness (claim C11; Yona et al. found it in Llama-2, [arXiv
# 2503.08908](https://arxiv.org/abs/2503.08908)).

# %%
repeats = [1, 2, 3, 4, 6, 8, length]
scores_of_p0 = []
for n in repeats:
    ids = prompts.ids.clone()
    ids[:, :n] = ids[:, :1]
    with torch.no_grad():
        _, cache = lm.run_with_cache(ids, names_filter=pattern)
    scores_of_p0.append(float(cache[pattern][:, 0, :, 0].mean()))
lines = [
    Series("head 2.0", scores_of_p0),
    Series("1 / n of it", [scores_of_p0[0] / n for n in repeats], dashed=True),
]
figure = trajectories(
    {"The first token n times": lines},
    [str(n) for n in repeats],
    "Copies of the first token share the sink",
    "n",
    ["sink score of P0"],
)
figure.set_size_inches(5.6, 3.2)
page.show(figure, "sink score of position zero when the first token is repeated")
for n, one in zip(repeats, scores_of_p0, strict=True):
    print(f"n = {n:2}: {one:.3f}; 1/n of the full score is {scores_of_p0[0] / n:.3f}")

# %% [markdown]
# (The score is above $1/n$, and more so for a longer prefix, because queries inside the prefix see only some of the
# copies. At the end all tokens are the same, and attention is uniform.)
#
# ## 8. What is different in a model that was trained?
#
# Run the same two experiments on our model and on a trained one.
# [`DirectionOrNorm`](../p0circuit/experiments/paper/c08_direction_or_norm.py) tests which property later blocks read.
# [`Structure`](../p0circuit/experiments/paper/c05_structure.py) tests whether position 16 becomes a sink if it
# attends to itself alone, or if its attention output only gets the *norm* of P0's.

# %%
from p0circuit.experiments import DirectionOrNorm, Structure, StructureConfig

pairs = {"built": (lm, prompts), model: (trained, text)}
config = StructureConfig(positions=(16,), samples_beside=32, scan_blocks=1)
compared = {}
for label, (one, its_prompts) in pairs.items():
    direction_or_norm = DirectionOrNorm().run(one, its_prompts)
    structure = Structure(config).run(one, its_prompts)
    compared[label] = (
        direction_or_norm.metrics["left_with_norm_cut"].value,
        direction_or_norm.metrics["left_with_direction_replaced"].value,
        structure.metrics["t_over_p0_when_alone"].value,
        structure.metrics["t_over_p0_with_norm_of_p0"].value,
    )
table = pd.DataFrame(
    compared,
    index=["left: norm cut", "left: direction replaced", "16 alone", "16 with P0's norm"],
)
page.show(table.reset_index(names="sink of P0 left, or ratio of 16 to P0"))

# %% [markdown]
# Three lines agree: in both models later blocks read only the direction, and attending to itself alone makes a sink.
# The last line differs. Our model is built to read the norm, as the paper describes, so the right norm is enough to
# make a sink. In `p0-nano` it is not: that model reads more about "unmixed" than the norm. Building a circuit shows
# what would be sufficient; only interventions show what a trained model does.
#
# Next: [06](06_emergence.ipynb), on how such a circuit emerges in training.

# %%
page.key_figures(
    score_of_strength_9=float(scores[:, 0].median()),
    score_without_the_detector=scores_without["detector (neuron 17 of MLP 0)"].value,
    built_left_with_norm_cut=compared["built"][0],
    built_16_with_norm_of_p0=compared["built"][3],
    trained_left_with_direction_replaced=compared[model][1],
    trained_16_alone=compared[model][2],
)
