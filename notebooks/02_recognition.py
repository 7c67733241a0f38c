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
# # Recognition: how a model knows which position is first
#
# Nothing in a Llama says "this is position zero": rotary positions encode distances between tokens, not absolute
# positions. Yet the sink is at P0, whatever the token. The paper explains this by a side effect of the **causal
# mask**: P0 is the only position that can attend to nothing but itself, so its attention output is the only one that
# is never *mixed*. Here you derive what mixing does to a vector (the **cone model**), compare the result with the
# model, and then edit the mask itself.
#
# *About 15 minutes; two exercises. Before: [01](01_meet_the_sink.ipynb). After: [03](03_amplification.ipynb).*

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
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from p0circuit.course.page import Page, open_model, print_verdict, read_prompts, sink_of
from p0circuit.figures.lines import trajectories
from p0circuit.figures.style import Series

page = Page(out)
lm = open_model(model)
prompts = read_prompts(lm, samples, seed)
# One half of the prompts selects the sink heads (above block 1); everything is measured on the
# other half.
sink = sink_of(lm, prompts)
half = sink.prompts
length, n_heads = half.length, lm.cfg.n_heads

# %% [markdown]
# ## 1. What the mask does
#
# In layer 0 of `p0-nano` queries distribute their attention freely, but the first query can attend only to itself:
#
# $$A_{0,0} = \frac{e^{s_{0,0}}}{e^{s_{0,0}}} = 1 \quad \text{exactly, in every head, for every token.}$$
#
# How mixed is what a query reads? A good measure is the sum of its squared attention weights, $\sum_i p_i^2$: it is 1
# if all attention is on one token, and $1/n$ if it is spread evenly over $n$ tokens.

# %%
hook_names = [
    f"blocks.{block}.{name}"
    for block in (0, 1)
    for name in ("attn.hook_v", "attn.hook_pattern", "attn.hook_z", "hook_attn_out")
]
with torch.no_grad():
    _, cache = lm.run_with_cache(half.ids, names_filter=hook_names)

purity = [
    cache[f"blocks.{block}.attn.hook_pattern"].square().sum(-1).mean((0, 1)) for block in (0, 1)
]
to_itself = cache["blocks.0.attn.hook_pattern"][:, :, 0, 0]
print("attention of the first query to itself:", to_itself.unique().tolist())
lines = [Series(f"block {block}", one.tolist()) for block, one in enumerate(purity)]
uniform = [1 / (t + 1) for t in range(length)]
lines.append(Series("uniform attention: 1 / (t + 1)", uniform, dashed=True))
positions = [str(t) for t in range(length)]
panel = {"Purity of what a position reads": lines}
figure = trajectories(
    panel, positions, "Mean over heads", "position", ["sum of squared weights"]
)
figure.set_size_inches(6.0, 3.3)
page.show(figure, "sum of squared attention weights by position")

# %% [markdown]
# P0 is at 1, far above the rest. In block 0 the curve falls nearly as fast as for uniform attention; the heads of
# block 1 are more selective, and their curve falls to a half. This *purity* is a signal. But it is a property of the
# *weights*, and the MLP after the attention sees only the *output*. How does mixing change a vector?
#
# ## 2. The cone model
#
# Suppose that the value vectors $v_i$ of a head all have norm 1, have the cosine $a$ to a common direction $u$, and
# are random otherwise. They form a cone around $u$:
#
# $$v_i = a\,u + \sqrt{1 - a^2}\;w_i, \qquad w_i \perp u, \quad \left|w_i\right| = 1, \quad \mathbb{E}[w_i \cdot w_j] = 0 \;\; (i \ne j).$$
#
# The output of a head is $z = \sum_i p_i v_i$ with $\sum_i p_i = 1$. What is its expected norm? At P0, which is not
# mixed, it is 1. Elsewhere it depends only on $a$ and on how the weights are spread, not on the token or the
# position.
#
# ### Exercise 2.1
#
# Derive the expected squared norm $\mathbb{E}\left|z\right|^2$, and write it as a function of a cosine $a$ and
# attention weights of shape `[query, key]` that returns one number per query. (What happens to $a\,u$ when vectors
# are mixed, and what to the $w_i$?)


# %%
from p0circuit.course.checks import check_cone


def my_cone(cosine, weights):
    """The predicted squared norms [query] of mixes of unit values by weights [query, key]."""
    ...


check_cone(my_cone)

# %% [markdown]
# <details>
# <summary>Solution 2.1</summary>
#
# ```python
# def my_cone(cosine, weights):
#     return cosine**2 + (1 - cosine**2) * weights.square().sum(-1)
# ```
#
# Mixing leaves the shared part unchanged: $\sum_i p_i\, a u = a u$. The rest is averaged out: of all products of two
# $w$, only those of each with itself have a nonzero expectation:
#
# $$\mathbb{E}\left|z\right|^2 = a^2 + (1 - a^2) \sum_{i,j} p_i p_j\, \mathbb{E}[w_i \cdot w_j] = a^2 + (1 - a^2) \sum_i p_i^2 .$$
#
# So the norm shows how mixed the output is: it is 1 at P0, and falls towards $a$ as more tokens contribute.
#
# </details>
#
# ## 3. Does it hold?
#
# Nothing is fitted. For each head of a block, take the mean squared norm and the cosine of its values (the squared
# length of the mean unit vector is $a^2$), and the mean of $\sum_i p_i^2$ at each position from its pattern. Predict
# the mean squared norm of the head's output (`cone` is the package's answer to the exercise, for many heads), and
# compare it with the measured one (`hook_z`). The quality of the prediction is the share of the variance over
# positions that it explains:
#
# $$R^2 = 1 - \frac{\sum_t (z_t - \hat z_t)^2}{\sum_t (z_t - \bar z)^2}$$

# %% tags=["cover"]
from p0circuit.experiments.paper.c04_recognition import cone, variance_explained

panels, explained, of_p0 = {}, {}, {}
for block in (0, 1):
    values = cache[f"blocks.{block}.attn.hook_v"]
    # With grouped-query attention several heads share one value head; each gets a copy.
    values = values.repeat_interleave(n_heads // values.shape[2], dim=2)
    pattern = cache[f"blocks.{block}.attn.hook_pattern"]
    output = cache[f"blocks.{block}.attn.hook_z"]

    size = values.norm(dim=-1).square().mean((0, 1))  # [head]
    cosine_squared = normalize(values, dim=-1).mean((0, 1)).square().sum(-1)  # [head]
    squared_weights = pattern.square().sum(-1).mean(0).T  # [query, head]
    mixed = cone(cosine_squared.numpy(), squared_weights.numpy())
    predicted = (size.numpy() * mixed).sum(1)  # heads add up
    measured = output.norm(dim=-1).square().mean(0).sum(1).numpy()

    explained[block] = variance_explained(measured, predicted)
    total = float(size.sum())
    panels[f"Block {block}: R² = {explained[block]:.2f}"] = [
        Series("measured", (measured / total).tolist()),
        Series("cone model", (predicted / total).tolist(), dashed=True),
    ]
    written = cache[f"blocks.{block}.hook_attn_out"].norm(dim=-1).square().mean(0)
    of_p0[block] = [float(one[0] / one[8:].mean()) for one in (measured, written)]
title = "Output of the heads, and prediction of the cone model"
figure = trajectories(panels, positions, title, "position", ["squared norm (values: 1)"] * 2)
page.show(figure, "squared norm of the attention output by position, measured and predicted")
for block, (of_heads, after_w_o) in of_p0.items():
    ratios = f"{of_heads:.2f} for the heads' output, {after_w_o:.2f} after the output matrix"
    print(f"block {block}, squared norm at P0 over that from position 8 on: {ratios}")

# %% [markdown]
# Block 0 agrees with the model. P0's squared norm is five times that of later positions (2.3 times after the output
# matrix, where heads can cancel), and one cosine per head predicts 86 % of the variance. At late positions the
# prediction is a quarter too low, because tokens that are attended to together are more alike than random ones. Block
# 1 does not agree. P0's norm is *not* larger there, and the prediction is worse than a constant ($R^2 < 0$).
#
# **Claim C4**, [`Recognition`](../p0circuit/experiments/paper/c04_recognition.py), is about both blocks, because the
# paper speaks of both, and its threshold was fixed before measuring. So the verdict on this model is *not
# reproduced*:

# %%
from p0circuit.experiments import Recognition

recognition = Recognition().run(lm, prompts)
print_verdict(recognition)

# %% [markdown]
# **Why?** One assumption fails: the values do not have the same norm everywhere. Look at the values that block 1
# reads.

# %%
rows = []
for block in (0, 1):
    norms = cache[f"blocks.{block}.attn.hook_v"].norm(dim=-1).mean((0, 2))  # [position]
    measured_norms = recognition.metrics[
        f"variance_explained_with_measured_norms_block_{block}"
    ]
    rows.append(
        (block, float(norms[0] / norms[8:].mean()), explained[block], measured_norms.value)
    )
columns = [
    "block",
    "|value| at P0 / at others",
    "R² of the cone",
    "R² with the values' own norms",
]
page.show(pd.DataFrame(rows, columns=columns))

# %% [markdown]
# When block 1 reads P0, block 0 has already changed the stream there, and P0's value is *shorter* than the others. A
# short unmixed vector can have the same norm as a mixture of longer ones. With the measured norms of the values the
# prediction is good again. So mixing does what the model says; only the assumption of equal norms fails in block 1.
# In this model **recognition happens in block 0**, and block 1 works on its result.
#
# ## 4. Cause or coincidence? Editing the mask
#
# So far we know that P0 is pure and that P0 is a sink. To show that purity causes the sink we need an intervention.
# If attending to itself alone is what matters, then *any* position that does so in blocks 0 and 1 should become a
# sink.
#
# ### Exercise 2.2
#
# Given patterns of shape `[batch, head, query, key]`, return patterns in which query `t` attends to itself alone, in
# all heads and samples, and everything else is unchanged.


# %%
from p0circuit.course.checks import check_alone


def my_edit(pattern, t):
    """Patterns [batch, head, query, key] in which query t attends to itself alone."""
    ...


check_alone(my_edit)

# %% [markdown]
# <details>
# <summary>Solution 2.2</summary>
#
# ```python
# def my_edit(pattern, t):
#     edited = pattern.clone()
#     edited[:, :, t, :] = 0
#     edited[:, :, t, t] = 1
#     return edited
# ```
#
# </details>
#
# In TransformerLens an intervention is a *hook*: a function that receives an activation and returns its replacement.
# We add the edit to the patterns of blocks 0 and 1 (`attending_to_itself` is the package's answer to the exercise)
# and read the patterns of later layers, all in one run.

# %%
from p0circuit.interventions.edits import attending_to_itself

t = 16


def alone(pattern, hook):
    return attending_to_itself(pattern, torch.full((len(pattern),), t))


def excess(position, hooks):
    """The excess score of a position over position 8 in the sink heads, per prompt."""
    patterns = {}

    def read(pattern, hook):
        patterns[hook.name] = pattern

    layers = {layer for layer, _ in sink.heads}
    reads = [(f"blocks.{layer}.attn.hook_pattern", read) for layer in layers]
    with torch.no_grad():
        lm.run_with_hooks(half.ids, fwd_hooks=hooks + reads)
    excess_scores = []
    for layer, head in sink.heads:
        pattern = patterns[f"blocks.{layer}.attn.hook_pattern"][:, head]
        # Only queries at or after a position can see it.
        excess_scores.append(
            pattern[:, position:, position].mean(-1) - pattern[:, 8:, 8].mean(-1)
        )
    return torch.stack(excess_scores).mean(0)


edits = [(f"blocks.{block}.attn.hook_pattern", alone) for block in (0, 1)]
rows = [
    (name, float(excess(0, hooks).mean()), float(excess(t, hooks).mean()))
    for name, hooks in (("clean", []), (f"{t} attends to itself alone", edits))
]
columns = ["run", "excess score of P0", f"excess score of position {t}"]
page.show(pd.DataFrame(rows, columns=columns))
ratio = rows[1][2] / rows[1][1]
print(f"position {t} has {ratio:.2f} of the excess score that P0 still has")

# %% [markdown]
# Position 16 holds an ordinary token. It now gets most of the attention that P0 gets, and P0 gets less than before:
# they compete. Here is one prompt with the edit; look at the columns of both positions in the sink heads.

# %%
from p0circuit.experiments.paper.c01_sink_map import view_heads
from p0circuit.interventions.attention_edits import attend_to_self_only

one = half.subset([0])
intervention = attend_to_self_only(
    lm, one, ["attn.0", "attn.1"], offset=t
)  # the same edit, from the package
title = f"Sink heads while position {t} attends to itself alone in blocks 0 and 1"
page.show(view_heads(lm, one, sink.heads, title, [intervention]))

# %% [markdown]
# **Claim C5**, [`Structure`](../p0circuit/experiments/paper/c05_structure.py), tests this at several positions and in
# the other direction as well (P0 gets the mixture that position $t$ reads, and stops being a sink), with controls.

# %%
from p0circuit.experiments import Structure

structure = Structure().run(lm, prompts)
page.show(
    structure.figures["surgery"],
    "edited attention patterns and matched statistics, with controls",
)
print_verdict(structure)

# %% [markdown]
# Two lines of this figure are worth a second look: *statistics of P0* and *norm of P0*. There position $t$ keeps its
# own mixed attention output, scaled to the norm (or mean and variance) of P0's. If the next MLP read only the norm,
# as the paper says, this would be enough. It is not: hardly any sink appears. In the other direction P0 loses a third
# of its sink when its output is scaled down. So in `p0-nano` being unmixed is the cause. The norm is one of its
# effects, but not the one that the next step reads most. (A circuit that reads only the norm can be built: notebook
# [05](05_build_a_sink.ipynb).)
#
# ## 5. When every position is pure
#
# The signal has a limit. If all tokens are the same, all values are the same, and mixing changes nothing: the
# attention output is the same at every position. That is why one repeated token has no sink (claim C11,
# [`Limits`](../p0circuit/experiments/paper/c11_limits.py)):

# %%
token = int(half.ids[0, 0])
repeated = torch.full((1, length), token)
with torch.no_grad():
    _, same = lm.run_with_cache(repeated, names_filter="blocks.0.hook_attn_out")
norms = same["blocks.0.hook_attn_out"][0].norm(dim=-1)
print(f"norm of block 0's attention output, one token {length} times:")
print(np.round(norms[[0, 1, 8, 63]].numpy(), 4), "at positions 0, 1, 8 and 63")

# %% [markdown]
# P0 is recognised. The difference between "unmixed" and "mixed" is a factor of about two. How it becomes a vector
# with eight times the norm of all others is the subject of [03](03_amplification.ipynb).

# %%
page.key_figures(
    variance_explained_by_the_cone_block_0=explained[0],
    variance_explained_by_the_cone_block_1=explained[1],
    squared_norm_over_others_block_0=of_p0[0][1],
    squared_norm_over_others_block_1=of_p0[1][1],
    t_over_p0_when_alone=ratio,
    p0_excess=rows[0][1],
)
