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
# # Patching the circuit by hand
#
# Two methods of mechanistic interpretability, applied to the sink: **activation patching** (which components matter?)
# and **path patching** (which connections between them matter?). You do both by hand with TransformerLens hooks, then
# with the package, and check that the numbers agree. At the end you derive a **closed form** that gives the same
# result for the keys of P0 without running the model again.
#
# *About 15 minutes to read, and an hour with the exercises; three exercises. Before: [03](03_amplification.ipynb).
# After: [05](05_build_a_sink.ipynb).*

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

import pandas as pd
import torch

from p0circuit.course.page import Page, open_model, print_verdict, read_prompts, sink_of
from p0circuit.interventions.pairs import shifted_pair

page = Page(out)
lm = open_model(model)
prompts = read_prompts(lm, samples, seed)
sink = sink_of(lm, prompts)
layer, head = sink.heads[0]  # the sink head to look at
print(f"sink heads: {sink.heads}; looking at head {head} of layer {layer}")

# %% [markdown]
# ## 1. Two runs that differ in one thing
#
# A patch takes an activation from one run and puts it into another. Its meaning depends on how the two runs differ.
# We want to isolate *being first*, so:
#
# - **clean**: a prompt. Token $x$ is at P0.
# - **shifted**: the same prompt after $m = 8$ random tokens. The same token $x$, with the same continuation, is now
#   at position $m$ instead of first.
#
# | | position 0 | 1 | … | $m$ | $m+1$ | … |
# | --- | --- | --- | --- | --- | --- | --- |
# | clean | **x** | y | … | | | |
# | shifted | random | random | … | **x** | y | … |

# %%
m = 8
clean_prompts = sink.prompts.subset(slice(0, 16))
pair = shifted_pair(lm, clean_prompts, m, seed)
clean_ids, shifted_ids = pair.clean.ids, pair.shifted.ids
assert torch.equal(clean_ids[:, 0], shifted_ids[:, m])


def run(ids, hooks=()):
    """The attention of our sink head, [prompt, query, key], with the given hooks."""
    cache = {}

    def read(pattern, hook):
        cache["pattern"] = pattern[:, head].clone()

    pattern_of_layer = f"blocks.{layer}.attn.hook_pattern"
    with torch.no_grad():
        lm.run_with_hooks(ids, fwd_hooks=[*hooks, (pattern_of_layer, read)])
    return cache["pattern"]


def score(pattern, position=0):
    """The sink score of a position: mean attention of the queries that can see it, per prompt."""
    return pattern[:, position:, position].mean(-1)


clean = score(run(clean_ids)).mean()
shifted = score(run(shifted_ids), m).mean()
print(f"attention of the head to x: {clean:.3f} at position 0, {shifted:.3f} at position {m}")

# %% [markdown]
# ## 2. Activation patching
#
# **Noising**: take the output of a component at $x$ in the shifted run, put it in at P0 of the clean run, and see how
# much of the sink is lost. If the sink is lost, the component is *necessary*. (**Denoising** is the other direction:
# the clean value goes into the shifted run at $m$. If a sink appears there, the component is *sufficient*.)
#
# The patch is a hook.
#
# ### Exercise 4.1
#
# Write it: `activation` has the shape `[batch, pos, d_model]`, `values` has the shape `[batch, d_model]`.
# TransformerLens calls the hook with the activation and the hook point, and continues with what the hook returns.


# %%
from p0circuit.course.checks import check_patch_hook


def my_patch(activation, hook, values):
    """The activation with the given values at P0."""
    raise NotImplementedError


check_patch_hook(my_patch)

# %% [markdown]
# <details>
# <summary>Solution 4.1</summary>
#
# ```python
# def my_patch(activation, hook, values):
#     activation[:, 0] = values
#     return activation
# ```
#
# </details>
#
# Now patch every attention layer and MLP below the sink head, one at a time and in both directions. `put(position,
# values)` makes such a hook for any position.

# %%
from p0circuit.course.checks import put

with torch.no_grad():
    _, clean_cache = lm.run_with_cache(clean_ids)
    _, shifted_cache = lm.run_with_cache(shifted_ids)

components = [
    f"blocks.{block}.hook_{kind}_out" for block in range(layer) for kind in ("attn", "mlp")
]
noising, denoising = {}, {}
for name in components:
    patch = (name, put(0, shifted_cache[name][:, m]))
    noising[name] = float(score(run(clean_ids, [patch])).mean() - clean)
    patch = (name, put(m, clean_cache[name][:, 0]))
    denoising[name] = float(score(run(shifted_ids, [patch]), m).mean() - shifted)
rows = [(name, noising[name], denoising[name]) for name in components]
page.show(pd.DataFrame(rows, columns=["component", "noising: change", "denoising: change"]))

# %% [markdown]
# Read the columns separately. *Necessary*: with the shifted output of attention 0, MLP 0 or MLP 1, most of the sink
# is lost. The three losses add up to more than the whole sink, because each component needs the one before.
# *Sufficient*: MLP 1 alone makes a sink at position 8 that is nearly as strong as possible (see below), and so does
# MLP 2. Earlier components make a weaker one, because attention in later blocks is still mixed at that position.
#
# The package does the same for all nodes of a grid, in batches and with less computation. First, do the numbers
# agree?

# %% tags=["cover"]
from p0circuit.figures.maps import effect_maps
from p0circuit.interventions.activation_patching import patch
from p0circuit.interventions.metrics import sink_score_of

metric = sink_score_of([(layer, head)])
nodes = [f"{kind}.{block}" for block in range(layer) for kind in ("attn", "mlp")]
panels, largest = {}, 0.0
for direction, by_hand in (("noising", noising), ("denoising", denoising)):
    grid = patch(lm, pair, metric, nodes, direction)
    effect = grid.effect.mean(1)
    for node, value in zip(grid.nodes, effect.tolist(), strict=True):
        largest = max(largest, abs(value - by_hand[node.hook]))
    table = pd.DataFrame(
        {"layer": [node.layer for node in grid.nodes], "kind": [n.kind for n in grid.nodes]}
    )
    table["effect"] = effect.numpy()
    panels[direction] = table.pivot(index="layer", columns="kind", values="effect")
print(f"largest difference between the package and our hooks: {largest:.1e}")
page.show(
    effect_maps(panels, "One component at a time", "change of the sink score"),
    "effects of patching components",
)

# %% [markdown]
# ### All of blocks 0 and 1 together
#
# **Claim C7**, [`CausalPath`](../p0circuit/experiments/paper/c07_causal_path.py), says that attention and MLPs of
# blocks 0 and 1 at P0 are together necessary and sufficient. The largest possible effect is that of patching the
# *entire* stream at P0, before every block. So patch both, and divide.

# %%
blocks_0_and_1 = [name for name in components if name.startswith(("blocks.0.", "blocks.1."))]
streams = [f"blocks.{block}.hook_resid_pre" for block in range(lm.cfg.n_layers)]
change, shares = {}, {}
for nodes, names in (("blocks 0 and 1", blocks_0_and_1), ("whole stream", streams)):
    noise = [(name, put(0, shifted_cache[name][:, m])) for name in names]
    denoise = [(name, put(m, clean_cache[name][:, 0])) for name in names]
    change["noising", nodes] = float(score(run(clean_ids, noise)).mean() - clean)
    change["denoising", nodes] = float(score(run(shifted_ids, denoise), m).mean() - shifted)
for direction in ("noising", "denoising"):
    shares[direction] = change[direction, "blocks 0 and 1"] / change[direction, "whole stream"]
    total = change[direction, "whole stream"]
    print(f"{direction}: {shares[direction]:.3f} of the total effect of {total:+.3f}")

# %% [markdown]
# The share is complete: whether a position is P0 is decided when block 1 is done. (MLP 2 writes most of the vector,
# as notebook [03](03_amplification.ipynb) showed, but it only responds to what it reads from blocks 0 and 1.)
#
# A share above 1 is no mistake. Patching the entire stream also brings in the other run's output of attention 2,
# which slightly counteracts the rest (+0.011 in the table below); patching blocks 0 and 1 alone does not. If
# attention 2 is patched with them, the share is 1.
#
# ## 3. Path patching
#
# In activation patching everything downstream may change: patch MLP 0, and MLP 1, MLP 2 and the head all respond.
# Which of these connections carry the effect? An **edge** goes from a sender to one input of a receiver: Q, K or V of
# a head, or an MLP. Path patching (Wang et al., [arXiv 2211.00593](https://arxiv.org/abs/2211.00593)) changes the
# value along one edge and nothing else:
#
# 1. **Patch the sender.** Run the clean prompt with the sender's new value, and freeze everything computed after it
#    (attention and MLPs of later blocks) at its clean value.
# 2. **Read the receiver's input.** Cache it from that run: here the *key* of our head at P0.
# 3. **Patch the receiver.** Run the clean prompt again with only this key changed, and measure.
#
# Take the edge from the MLP of block 1 to the key of our sink head.

# %%
from p0circuit.interventions.closed_form import key_hook, query_hook

sender = "blocks.1.hook_mlp_out"
key = key_hook(lm, layer)  # keys as they enter the scores, after the rotation if there is one

# 1. Patch the sender and freeze what comes later. P0 is enough: nothing else reaches its key.
hooks = [(sender, put(0, shifted_cache[sender][:, m]))]
for name in components[components.index(sender) + 1 :]:
    hooks.append((name, put(0, clean_cache[name][:, 0])))

# 2. Read the receiver's input: the key of our head at P0.
receiver_input = {}


def read_key(keys, hook):
    receiver_input["key"] = keys[:, 0, head].clone()


run(clean_ids, [*hooks, (key, read_key)])


# 3. Patch the receiver: the clean run with only this key changed.
def patch_key(keys, hook):
    keys[:, 0, head] = receiver_input["key"]
    return keys


edge_by_hand = float(score(run(clean_ids, [(key, patch_key)])).mean() - clean)
print(f"sink score of head {layer}.{head}: {clean:.4f}")
print(f"effect of the edge: {edge_by_hand:+.4f}")
print(f"effect of the whole component (section 2): {noising[sender]:+.4f}")

# %% [markdown]
# The direct edge is a small part of the effect of MLP 1; most of its effect goes through MLP 2. Now the package on
# the same edge, and on all other edges into Q, K and V of this head:

# %%
from p0circuit.interventions.path_patching import path_patch

# The senders are embed, attn.0, mlp.0, … of all blocks before the receivers.
receivers = [f"attn.{layer}.{head}.{part}" for part in "qkv"]
edges = path_patch(lm, pair, metric, receivers)
table = edges.to_dataframe()
package = table.set_index(["sender", "receiver"])["effect"]["mlp.1", f"attn.{layer}.{head}.k"]
print(f"mlp.1 into K: by hand {edge_by_hand:+.6f}, package {package:+.6f}")
page.show(table.head(8))

# %% [markdown]
# The whole effect enters through K. (An edge into Q at P0 cannot matter in any model, since P0's own query sees only
# P0. V changes what the head reads, not where it attends. So this result is weak by itself; `CausalPath` also
# measures the stronger form, with the entire stream into Q of all later queries.)
#
# ### Exercise 4.2
#
# Patch an edge yourself: from an MLP into the key of the *other* sink head, with one block between the two. The cell
# below names both. Give the mean change of that head's sink score. You can copy the three steps from above; note that
# `run` looks at `head`.

# %%
from p0circuit.course.checks import check_edge
from p0circuit.interventions.pairs import patch_values

other = sink.heads[-1]
edge_sender = f"mlp.{other[0] - 2}"
print(f"the edge from {edge_sender} into K of head {other[0]}.{other[1]}")

my_effect = None

values = patch_values(lm, pair, [edge_sender])
check_edge(my_effect, lm, pair.clean, values, edge_sender, other)

# %% [markdown]
# <details>
# <summary>Solution 4.2</summary>
#
# ```python
# layer_2, head_2 = other
# sender_2 = f"blocks.{layer_2 - 2}.hook_mlp_out"
# between = [f"blocks.{layer_2 - 1}.hook_{kind}_out" for kind in ("attn", "mlp")]
# key_2 = key_hook(lm, layer_2)
# receiver_input_2, scores_2 = {}, []
#
#
# def read_key_2(keys, hook):
#     receiver_input_2["key"] = keys[:, 0, head_2].clone()
#
#
# def patch_key_2(keys, hook):
#     keys[:, 0, head_2] = receiver_input_2["key"]
#     return keys
#
#
# def read_2(pattern, hook):
#     scores_2.append(float(pattern[:, head_2, :, 0].mean()))
#
#
# pattern_2 = (f"blocks.{layer_2}.attn.hook_pattern", read_2)
# send_2 = [(sender_2, put(0, shifted_cache[sender_2][:, m]))]
# send_2 += [(name, put(0, clean_cache[name][:, 0])) for name in between]
# with torch.no_grad():
#     lm.run_with_hooks(clean_ids, fwd_hooks=[*send_2, (key_2, read_key_2)])
#     lm.run_with_hooks(clean_ids, fwd_hooks=[pattern_2])
#     lm.run_with_hooks(clean_ids, fwd_hooks=[(key_2, patch_key_2), pattern_2])
# my_effect = scores_2[1] - scores_2[0]
# ```
#
# Attention and MLP of the block between have to be frozen. Otherwise they would carry the effect as well, and in
# `p0-nano` they carry nearly all of it: of the effect of -0.210 that MLP 1 has on this head, the edge carries -0.014.
#
# </details>
#
# ## 4. The closed form
#
# Each edge needs two runs of the model. For edges into K at P0 there is a cheaper way, because of two facts.
#
# **P0's stream does not depend on the other tokens.** P0 attends only to itself. So whatever is patched in its
# stream, its new key $k_0'$ can be computed from a prompt of one token.
#
# **A new key of P0 changes one score per query.** Let $s_t = q_t \cdot k_0 / \sqrt{d}$ be the score that query $t$
# gives to P0. In the patched run neither the query nor the other keys change; only this score does:
#
# $$s_t' = s_t + \frac{q_t \cdot (k_0' - k_0)}{\sqrt{d}} .$$
#
# So all other scores of a query can be summarised by one number, $Z_t$, which comes from one clean run. With it, the
# attention to P0 is a function of $s_t - Z_t$ alone, and every edge needs one product and this function.
#
# ### Exercise 4.3
#
# Find $Z_t$ and the function, and write the attention to P0 as a function of scores: `score` holds the scores of P0,
# `[query]`, and `others` those of all other keys, `[query, key]`, with `-inf` for keys that a query cannot see.


# %%
from p0circuit.course.checks import check_closed_form


def my_closed_form(score, others):
    """Attention to P0, [query], from its scores and those of other keys, [query, key]."""
    ...


check_closed_form(my_closed_form)

# %% [markdown]
# <details>
# <summary>Solution 4.3</summary>
#
# ```python
# def my_closed_form(score, others):
#     return torch.sigmoid(score - others.logsumexp(-1))
# ```
#
# With $Z_t = \log \sum_{0 < j \le t} e^{s_{t,j}}$ the softmax is
#
# $$A_{t,0} = \frac{e^{s_t}}{e^{s_t} + \sum_{0 < j \le t} e^{s_{t,j}}} = \frac{e^{s_t}}{e^{s_t} + e^{Z_t}} = \frac{1}{1 + e^{-(s_t - Z_t)}} = \sigma(s_t - Z_t) ,$$
#
# and after the patch $A_{t,0}' = \sigma(s_t' - Z_t)$, exactly. The first query sees no other key: its `logsumexp` is
# $-\infty$, and the sigmoid of $+\infty$ is 1, as it has to be.
#
# </details>
#
# On our edge: the new key was read in step 2, and everything else is in the clean cache. `log_partition` and
# `attention_from_score` are the package's answer to the exercise.

# %%
from p0circuit.interventions.closed_form import attention_from_score, log_partition

# Scores are [prompt, query, key], and already divided by the root of d.
scores_of_head = clean_cache[f"blocks.{layer}.attn.hook_attn_scores"][:, [head]]
query = clean_cache[query_hook(lm, layer)][:, :, head]  # [prompt, query, d_head]
old_key = clean_cache[key][:, 0, head]

s, z = (
    scores_of_head[..., 0],
    log_partition(scores_of_head, pair.clean.p0),
)  # [prompt, 1, query]
change_of_key = receiver_input["key"] - old_key
moved = torch.einsum("bqd,bd->bq", query, change_of_key) / math.sqrt(lm.cfg.d_head)
all_see_p0 = torch.ones_like(s, dtype=torch.bool)
closed_clean, closed_patched = (
    attention_from_score(one, z, all_see_p0).mean() for one in (s, s + moved[:, None])
)
edge_closed = float(closed_patched - closed_clean)
print(f"clean sink score: closed form {closed_clean:.6f}, model {clean:.6f}")
print(f"effect of the edge: closed form {edge_closed:+.6f}, hooks {edge_by_hand:+.6f}")

# %% [markdown]
# The package does this for all senders and all heads of all layers at once. On the clean run it checks whether the
# model's attention has this form (`error`).

# %%
from p0circuit.figures.style import new_figure
from p0circuit.interventions.nodes import components as all_components
from p0circuit.interventions.own_scores import edges_into_keys

with_heads = all_components(lm, range(layer), heads=True)
new_values = patch_values(lm, pair, with_heads)
into_keys = edges_into_keys(lm, pair.clean, with_heads, new_values)
effects = into_keys.effect.mean(1)  # [sender, layer, head]
print(f"{effects.numel()} edges by {into_keys.method}; error {into_keys.error:.0e}")

figure, axes = new_figure(5.6, 3.6)
axis, largest = axes[0, 0], float(effects.abs().max())
image = axis.imshow(
    effects.flatten(1), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto"
)
axis.grid(False)
axis.set_yticks(range(len(with_heads)), [str(one) for one in with_heads])
axis.set_xticks(
    range(0, effects[0].numel(), lm.cfg.n_heads),
    [f"layer {one}" for one in range(lm.cfg.n_layers)],
    ha="left",
)
axis.set(
    title="Edges into the keys of P0",
    xlabel="receiver: heads of each layer",
    ylabel="sender at P0",
)
bar = figure.colorbar(image)
bar.set_label("change of the head's sink score", size=8)
bar.ax.tick_params(labelsize=8)
page.show(figure, "effects of all edges into the keys of P0")

# %% [markdown]
# ## 5. The circuit
#
# Do the same for every input of every component (Q, K, V and MLPs), keep the edges that change the sink by at least 5
# %, and of those the ones that lead to the sink heads: this is the circuit.
# [`Circuit`](../p0circuit/experiments/exploratory/circuit.py) draws it, and `CausalPath` gives the verdict on C7,
# here with a small number of prompts. (This graph uses eight prompts and the one of the tour four, and they differ:
# effects are means over prompts, so an edge near the threshold can be on either side of it. All edges of the tour are
# here, too.)

# %%
from p0circuit.experiments import CausalPath, CausalPathConfig, Circuit, CircuitConfig

circuit = Circuit(CircuitConfig(samples=8)).run(lm, prompts)
page.show(circuit.figures["graph"], "the circuit of the sink, recovered by path patching")

path = CausalPath(CausalPathConfig(samples=24, runs=768)).run(lm, prompts)
page.show(
    path.figures["shares"],
    "shares of blocks 0 and 1, and of Q, K and V, in the effect on the sink",
)
print_verdict(path)

# %% [markdown]
# Why does one key attract *every* query? Because the sink heads' queries have a large component in common, and P0's
# key is aligned with it. **Claim C10**, [`KeySide`](../p0circuit/experiments/paper/c10_key_side.py), replaces all
# queries of a head by their mean; nearly all of P0's lead in the scores remains.

# %%
from p0circuit.experiments import KeySide

key_side = KeySide().run(lm, prompts)
print_verdict(key_side)

# %% [markdown]
# You have patched a circuit by hand. If you understand a circuit, you should be able to build it:
# [05](05_build_a_sink.ipynb).

# %%
page.key_figures(
    clean_score=float(clean),
    effect_of_mlp_1=noising["blocks.1.hook_mlp_out"],
    share_of_blocks_0_1_in_noising=shares["noising"],
    share_of_blocks_0_1_in_denoising=shares["denoising"],
    edge_by_hand=edge_by_hand,
    edge_by_closed_form=edge_closed,
    query_independent_share=key_side.metrics["query_independent_share"].value,
)
