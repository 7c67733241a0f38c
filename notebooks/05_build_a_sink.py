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
# circuit after the other, and look after each step at what has changed: embedding, recognition, detection, amplification,
# read-out. No training. The result is the `wired` model of this package without its decoys; because its circuit is known,
# the package's methods are tested on it. At the end you break it, and compare it with a model that was trained.
#
# *About 15 minutes; two exercises. Before: [04](04_patching_the_circuit.ipynb). After: [06](06_emergence.ipynb). The full
# construction, with its numbers derived: [`wired.py`](../p0circuit/models/constructed/weights.py).*

# %% tags=["parameters"]
model = "p0-nano"  # a shipped model, a local Hugging Face directory, or a hub id
samples = 128  # prompts of 64 tokens
seed = 0  # of the prompts
out = None  # a directory for the figures and key figures; None leaves nothing

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
)  # our vocabulary will have 64 tokens
places = [str(t) for t in range(length)]

# %% [markdown]
# ## 0. Empty rooms
#
# Three layers of five heads, `d_model` 160, MLPs of 128 ReLU neurons, and all weights zero but those of the norms. They
# are set to $1/\sqrt{d}$, so that **every norm hands on a unit vector**: what a block reads are cosines.
#
# The residual stream is divided into named rooms, orthogonal to each other (and turned at random, so that no coordinate
# is special):
#
# | room | dimensions | what will be in it |
# | --- | --- | --- |
# | `token` | 64 | which token this is |
# | `ruler` | 1 | always the same length: something to measure with |
# | `echo` | 64 | what attention brings |
# | `mark` | 1 | "this one is unmixed" |
# | `p0` | 1 | the P0 direction |
# | (no name) | 29 | nothing: 18 are for the decoys that `wired` has beyond our model, 11 for nobody, the all-ones vector among them (so that the mean which LayerNorm subtracts is 0) |

# %%
weights = blank_weights()
space = residual_subspaces(seed=0)
for name in ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"):
    print(f"blocks.0.{name:9} {list(weights[f'blocks.0.{name}'].shape)}")


def built(step):
    """The model with the weights written so far."""
    return model_from_weights(weights, step)


def stream(lm, name):
    """The mean over prompts of an activation's component in each room: lengths by position."""
    with torch.no_grad():
        _, cache = lm.run_with_cache(prompts.ids, names_filter=name)
    here = cache[name].double()
    rooms = {"token": space.token, "echo": space.echo}
    rooms |= {name: getattr(space, name)[None] for name in ("ruler", "mark", "p0")}
    return {room: (here @ basis.T).norm(dim=-1).mean(0) for room, basis in rooms.items()}


# %% [markdown]
# ## 1. Embedding
#
# Token $w$ becomes $c_w + r$: a code, and the ruler. The 64 codes are the rows of a Hadamard matrix over 8: orthonormal,
# entries $\pm 1/8$. Every embedding has the squared norm $B = 1 + 1 = 2$. There are no position embeddings, and nothing in
# them would be read.

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
# Queries and keys stay zero, so attention is uniform: query $t$ gives $1/(t+1)$ to each token it sees. Heads 1 and 3 copy
# one half of the code each into `echo`, scaled so that an echo of one token has length 3 (the norm has divided by
# $\sqrt{B}$, and we multiply that back in).
#
# An average of orthonormal codes is shorter the more of them there are: with $F$ the sum of the squared shares of the
# tokens seen so far,
#
# $$|\mathrm{echo}|^2 = 9 F, \qquad F_t = \sum_w \left(\frac{\#\{i \le t : w_i = w\}}{t+1}\right)^2 .$$
#
# That is the cone model of notebook [02](02_recognition.ipynb) with cosine $a = 0$, as long as all tokens differ; $F$ counts
# repeats together. P0 has $F = 1$, exactly.

# %%
ECHO, B = 3.0, 2.0
for head, half in ((1, slice(0, 32)), (3, slice(32, 64))):
    weights["blocks.0.attn.W_V"][head] = space.token[half].T
    weights["blocks.0.attn.W_O"][head] = ECHO * math.sqrt(B) * space.echo[half]

recognised = stream(built("recognition"), "blocks.0.hook_resid_mid")
predicted = (9 * purity(prompts.ids)).sqrt().mean(0)
lines = [
    Series("echo, measured", recognised["echo"].tolist()),
    Series("3 √F, predicted", predicted.tolist(), dashed=True),
]
figure = trajectories(
    {"After attention 0": lines}, places, "Length of the echo", "position", ["length"]
)
figure.set_size_inches(5.6, 3.0)
page.show(figure, "length of the echo by position, measured and predicted")
print(f"largest difference: {float((recognised['echo'] - predicted).abs().max()):.1e}")

# %% [markdown]
# ## 3. Detection: one neuron of MLP 0
#
# The echo at P0 is longer than anywhere else. How can a neuron see a length, when the norm before the MLP divides it away?
# With the **ruler**. It has length 1 everywhere, so after the norm it looks the shorter, the longer the rest is:
#
# $$\cos(\text{ruler}) = r(F) = \frac{1}{\sqrt{B + 9F}} .$$
#
# At P0 it is $r(1) = 0.302$; at a position that has seen two different tokens $r(1/2) = 0.392$. Between them we set the
# threshold: $r(3/4) = 0.338$.
#
# ### Exercise 5.1
#
# The neuron computes $\mathrm{relu}(g \cdot \cos + b)$. Choose gain and bias so that it is 0 at the threshold and for all
# larger cosines, and 1 at P0. (It should work for other thresholds, too.)


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
# The gain is negative: the neuron fires where the ruler looks *short*.
#
# </details>
#
# We give it to neuron 17, which writes 3 times what it fires with into `mark`. `ramp(off, on)` is the package's answer to
# the exercise.

# %%
from p0circuit.course.checks import ramp

MARK = 3.0


def ruler_cosine(pure):
    return 1 / math.sqrt(B + ECHO**2 * pure)


gain, bias = ramp(off=ruler_cosine(3 / 4), on=ruler_cosine(1))
set_neuron(weights, 0, 17, reads=gain * space.ruler, bias=bias, writes=MARK * space.mark)

detected = stream(built("detection"), "blocks.0.hook_resid_post")
print("mark at positions 0, 1, 2 and 63:", np.round(detected["mark"][[0, 1, 2, 63]].numpy(), 3))

# %% [markdown]
# (Were the first two tokens of a prompt the same, position 1 would be unmixed as well, and marked.)
#
# ## 4. Amplification: one neuron of MLP 1
#
# At P0 the mark has the cosine $3/\sqrt{B + 9 + 9} = 0.67$, elsewhere 0. Neuron 42 fires from 0.3 on and writes 60 times
# the P0 direction. The rest of P0's stream is shorter than 5: from here on it *points* to `p0`.

# %%
P0_NORM, FROM = 60.0, 0.3
gain, bias = ramp(off=FROM, on=MARK / math.sqrt(B + ECHO**2 + MARK**2))
set_neuron(weights, 1, 42, reads=gain * space.mark, bias=bias, writes=P0_NORM * space.p0)

lm = built("amplification")
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
    {"Norm of the stream": lines}, stages, "A norm made by hand", "after", ["norm"], log=True
)
figure.set_size_inches(5.6, 3.2)
page.show(figure, "norm of the stream at position zero and position 8, step by step")

# %% [markdown]
# ## 5. Read-out: the sink heads
#
# In block 2 heads 0, 2 and 3 get a constant query (a bias; `W_Q` stays zero) and a key that reads `p0`. Their score is
# *strength × cosine to `p0`*: 9, 8 and 7 at P0, and 0 everywhere else. Then a query with $t$ other keys in view gives P0
#
# $$A_{t,0} = \frac{e^s}{e^s + t} .$$
#
# ### Exercise 5.2
#
# What is the sink score of such a head, for a given strength and length? Write a function of both.


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
# `wired_truth` states what is true of the `wired` model, the scores of these three heads among it.

# %%
strengths = {0: 9.0, 2: 8.0, 3: 7.0}
for head, strength in strengths.items():
    weights["blocks.2.attn.b_Q"][head, -1] = 1.0
    weights["blocks.2.attn.W_K"][head, :, -1] = strength * math.sqrt(32) * space.p0

lm = built("my sink")
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
# There it is. (The median, because a prompt that happens to begin with the same token twice would share its sink between
# two positions.) Look at it; heads 2.1 and 2.4 have had no weights and attend to all alike.

# %%
from p0circuit.experiments.paper.c01_sink_map import view_heads

last = [(2, head) for head in range(5)]
page.show(view_heads(lm, prompts.subset([0]), last, "A sink, built by hand"))

# %% [markdown]
# Is it the package's `wired` model? All that we have written is in its weights, to the last digit; what it has beyond that
# are *decoys*: heads and neurons that do something else, so that a method has something to be wrong about.

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
# ## 6. Take it apart
#
# Every part is necessary, and by construction we know what is left without it: attention that is uniform, a score of 0.074.
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
lost = {}
for part, nodes in parts.items():
    without = [ablate(lm, prompts, nodes)] if nodes else []
    lost[part] = bootstrap(sink_scores(lm, prompts, sink_heads, 0, without))
title = "Sink score of the heads we built, with parts taken out"
figure = intervals(
    {"Set to zero at P0": lost},
    title,
    ["sink score"],
    reference=wired_truth().uniform_score(length),
)
page.show(figure, "sink score with parts of the circuit set to zero at position zero")

# %% [markdown]
# ## 7. Break it
#
# The circuit measures purity, not place. So whoever is as pure as P0 is taken for it: if the first token stands $n$ times
# in a row, all $n$ copies are recognised and share the sink, $1/n$ each or more. That is the weak spot of the real circuit,
# too (claim C11; Yona et al. found it in Llama-2, [arXiv 2503.08908](https://arxiv.org/abs/2503.08908)).

# %%
repeats = [1, 2, 3, 4, 6, 8, length]
shared = []
for n in repeats:
    ids = prompts.ids.clone()
    ids[:, :n] = ids[:, :1]
    with torch.no_grad():
        _, cache = lm.run_with_cache(ids, names_filter=pattern)
    shared.append(float(cache[pattern][:, 0, :, 0].mean()))
lines = [
    Series("head 2.0", shared),
    Series("1 / n of it", [shared[0] / n for n in repeats], dashed=True),
]
figure = trajectories(
    {"The first token n times": lines},
    [str(n) for n in repeats],
    "Imitators share the sink",
    "n",
    ["sink score of P0"],
)
figure.set_size_inches(5.6, 3.2)
page.show(figure, "sink score of position zero when the first token is repeated")
for n, one in zip(repeats, shared, strict=True):
    print(f"n = {n:2}: {one:.3f}, and 1/n of the whole {shared[0] / n:.3f}")

# %% [markdown]
# (Above $1/n$, and more so the longer the prefix: queries within it share with fewer. At the end all tokens are the same, and
# what is left is uniform attention.)
#
# ## 8. What is different in a model that was trained?
#
# Run the same two experiments on our model and on a trained one:
# [`DirectionOrNorm`](../p0circuit/experiments/paper/c08_direction_or_norm.py) asks what later blocks see;
# [`Structure`](../p0circuit/experiments/paper/c05_structure.py) asks whether position 16 becomes a sink if it attends to itself
# alone, or if its attention output is merely given the *norm* of P0's.

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
page.show(table.reset_index(names="sink of P0, or of 16 over P0's"))

# %% [markdown]
# Three lines agree: in both models only the direction counts for the later blocks, and being alone makes a sink. The
# last one differs. Ours is built to read the norm, as the paper describes it, and a norm is all it takes to deceive it.
# `p0-nano` has found something that the norm alone does not trigger: it reads more of "unmixed" than its length. Building
# a thing shows what would be enough; it takes interventions to learn what is there.
#
# Next: [06](06_emergence.ipynb), on how such a circuit comes about in training.

# %%
page.key_figures(
    score_of_strength_9=float(scores[:, 0].median()),
    score_without_the_detector=lost["detector (neuron 17 of MLP 0)"].value,
    built_left_with_norm_cut=compared["built"][0],
    built_16_with_norm_of_p0=compared["built"][3],
    trained_left_with_direction_replaced=compared[model][1],
    trained_16_alone=compared[model][2],
)
