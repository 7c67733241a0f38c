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
# # Meet the sink
#
# What an attention sink looks like, how it is measured, and how far it depends on the BOS token (not much, in this
# model). At the end you will have computed by hand the two standard measures: the **sink score** of a head and the
# **sink rate** of a model.
#
# *About 10 minutes; three exercises. Before: [00](00_tour.ipynb). After: [02](02_recognition.ipynb).*

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
import torch

from p0circuit.course.page import Page, metrics_table, open_model, print_verdict, read_prompts

page = Page(out)
lm = open_model(model)
prompts = read_prompts(lm, samples, seed)
n_layers, n_heads = lm.cfg.n_layers, lm.cfg.n_heads

# %% [markdown]
# ## 1. Look at it
#
# An attention pattern gives, for every query position $t$ (a row) and key position $i \le t$ (a column), the share of
# attention that the query gives to the key:
#
# $$A_{t,i} = \frac{e^{s_{t,i}}}{\sum_{j \le t} e^{s_{t,j}}}, \qquad s_{t,i} = \frac{q_t \cdot k_i}{\sqrt{d_\text{head}}}$$
#
# Every row adds up to 1: a head cannot attend to nothing. Below are all heads of the first and the last layer, on the
# beginning of one prompt. **Click a token** to see where it attends; click the picture of a head to enlarge it. A
# sink is a *column*: look for heads whose first column is dark from top to bottom.

# %%
from p0circuit.experiments.paper.c01_sink_map import view_heads

viewed_heads = [(layer, head) for layer in (0, n_layers - 1) for head in range(min(n_heads, 4))]
title = "Attention of the first and the last layer on one prompt"
page.show(view_heads(lm, prompts.subset([0]), viewed_heads, title))

# %% [markdown]
# In the last layer of `p0-nano` two heads, 3.1 and 3.2, attend to the first token from nearly every position. In
# layer 0 no head does.
#
# ## 2. Measure it: the sink score
#
# The sink score of a head (Gu et al., [arXiv 2410.10781](https://arxiv.org/abs/2410.10781)) is the mean attention
# that all queries, the first one included, give to P0, that is key 0:
#
# $$\alpha_0 = \frac{1}{T} \sum_{t=0}^{T-1} A_{t,0}$$
#
# ### Exercise 1.1
#
# Write a function of the pattern of a layer, of shape `[head, query, key]`, that returns one score per head.


# %%
from p0circuit.course.checks import check_sink_score


def my_sink_score(pattern):
    """The sink scores [head] of patterns [head, query, key]."""
    ...


check_sink_score(my_sink_score)

# %% [markdown]
# <details>
# <summary>Solution 1.1</summary>
#
# ```python
# def my_sink_score(pattern):
#     return pattern[:, :, 0].mean(-1)
# ```
#
# All heads, all queries, key 0; then the mean over queries. The first query can attend only to itself and always
# gives 1. Therefore even a head that ignores P0 has a score above 0.
#
# </details>
#
# On the model: run the prompts once, cache the pattern of every layer (`blocks.{layer}.attn.hook_pattern` in
# TransformerLens), and compute the scores. `sink_score` is the package's answer to the exercise, for a batch of
# prompts. `record` does the same inside the hooks, so that no pattern has to be cached.

# %%
from p0circuit.recording.quantities import SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.sink import sink_score

names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(n_layers)]
with torch.no_grad():
    _, cache = lm.run_with_cache(prompts.ids, names_filter=names)
scores = torch.stack([sink_score(cache[name], prompts.p0) for name in names], dim=1)

recorded = record(lm, prompts, SINK_SCORE)
print("scores of shape [prompt, layer, head]:", list(scores.shape))
print(f"largest difference from `record`: {float((scores - recorded).abs().max()):.1e}")
for layer, row in enumerate(scores.mean(0)):
    print(f"layer {layer}:", " ".join(f"{score:.2f}" for score in row.tolist()))

# %% [markdown]
# ## 3. Compare it with a baseline
#
# Is a score of 0.52 high? Compare it with a head that has no preference and attends uniformly to all tokens it can
# see.
#
# ### Exercise 1.2
#
# What is the sink score of a head whose attention is uniform over the tokens it can see, on prompts of 64 tokens? Give
# a number (three digits are enough).

# %%
from p0circuit.course.checks import check_uniform_score

my_uniform_score = None

check_uniform_score(my_uniform_score, prompts.length)

# %% [markdown]
# <details>
# <summary>Solution 1.2</summary>
#
# ```python
# my_uniform_score = sum(1 / (t + 1) for t in range(64)) / 64
# ```
#
# Query $t$ sees $t + 1$ tokens and gives each $1/(t+1)$. The mean over queries is $H_T / T$ with the harmonic number
# $H_{64} = 4.74$: a score of 0.074. All heads of layers 0 and 1 are near this value or below it.
#
# </details>
#
# A second baseline is another position. The score of key $k$ is the mean over the queries that see it. The **excess
# score** $e$ is the score of P0 minus that of position 8, where nothing is special:
#
# $$\alpha_k = \frac{1}{T - k} \sum_{t \ge k} A_{t,k}, \qquad e = \alpha_0 - \alpha_8 .$$

# %%
from p0circuit.recording.quantities import score_at

control = record(lm, prompts, score_at(8))
best = divmod(int(scores.mean(0).argmax()), n_heads)
to_p0, to_8 = (float(one[:, best[0], best[1]].mean()) for one in (scores, control))
print(f"best head {best[0]}.{best[1]}")
print(f"  to position zero: {to_p0:.3f}")
print(f"  to position 8:    {to_8:.3f}")
print(f"  excess score:     {to_p0 - to_8:.3f}")

# %% [markdown]
# Two more definitions. **Sink heads** are the heads with a mean score above 0.3 on one half of the prompts (the three
# highest if there are none). There **is a sink** if the 95 % interval of their mean excess score on the *other* half
# is above 0.076, which is twice the value of uniform attention. Two halves are needed because the highest of many
# heads looks higher than it is on the prompts that selected it.

# %% [markdown]
# ## 4. Measure a model: the sink rate
#
# The sink rate is the share of heads whose score is above a threshold $\epsilon$, counted in every sample and then
# averaged over samples:
#
# $$\text{Sink}_0^\epsilon = \frac{1}{N} \sum_{n} \frac{1}{L H} \sum_{l,h} \mathbb{1}\left[\alpha_0^{(n,l,h)} > \epsilon\right], \qquad \epsilon = 0.3$$
#
# `Sink[2:]` counts layers from 2 on. (Published figures at $T = 64$: 99 % for Llama-3-8B, 18 % for a model of 60 million
# parameters that Gu et al. trained.)
#
# ### Exercise 1.3
#
# Write a function of scores of shape `[sample, layer, head]` and a threshold `eps`.


# %%
from p0circuit.course.checks import check_sink_rate


def my_sink_rate(scores, eps):
    """The sink rate, one number, of scores [sample, layer, head]."""
    ...


check_sink_rate(my_sink_rate)

# %% [markdown]
# <details>
# <summary>Solution 1.3</summary>
#
# ```python
# def my_sink_rate(scores, eps):
#     return (scores > eps).float().mean()
# ```
#
# All samples have the same number of heads, so one mean over everything equals the mean of the samples' shares.
# Threshold and mean can *not* be exchanged: `(scores.mean(0) > eps)` asks whether a head is a sink on average, and
# loses on how many prompts it is one.
#
# </details>

# %%
from p0circuit.sink import sink_rate

rate, rate_of_8 = (float(sink_rate(one, from_layer=2).mean()) for one in (scores, control))
print(f"Sink[2:] of position zero: {rate:.3f}, of position 8: {rate_of_8:.3f}")

# %% [markdown]
# **Claim C1**, tested by [`SinkMap`](../p0circuit/experiments/paper/c01_sink_map.py): the sink exists without BOS,
# and P0 has a far higher sink rate than another position. The experiment runs five kinds of prompt; ours is the
# first.

# %% tags=["cover"]
from p0circuit.experiments import SinkMap

sink_map = SinkMap().run(lm, prompts)
page.show(sink_map.figures["map"], "sink scores of every head on five kinds of prompt")
print_verdict(sink_map)

# %% [markdown]
# The last panel shows a limit of the circuit. If *all* tokens are the same, P0 does not differ from any other
# position (with rotary positions; learned ones keep a difference, see [07](07_bring_your_own_model.ipynb)), and there
# is no sink (claim C11, [`Limits`](../p0circuit/experiments/paper/c11_limits.py)). Notebook
# [02](02_recognition.ipynb) explains why.
#
# ## 5. Is it BOS?
#
# Most models are trained with a BOS token first, so the sink might be something that they learned about *that token*.
# The test is simple: the same text with and without BOS. Without BOS, P0 holds whatever token the text begins with.

# %%
from p0circuit.experiments import BosAblation, NotApplicable

try:
    bos = BosAblation().run(lm, prompts)
    page.show(bos.figures["bars"], "sink rate and loss with and without BOS")
    metrics = [
        "score_without_over_with_bos",
        "score_of_position_8_without_bos",
        "loss_difference",
    ]
    page.show(metrics_table(bos, metrics))
    print_verdict(bos)
except NotApplicable as reason:  # a model without a BOS token
    bos = None
    print(reason)

# %% [markdown]
# **Claim C2**, [`BosAblation`](../p0circuit/experiments/paper/c02_bos_ablation.py): without BOS the sink heads keep
# more than four fifths of their score. (This model was trained with and without BOS. The paper has a boundary case:
# in Mistral-7B the sink falls from 87 % to 2 % without BOS. Its authors attribute this to pre-training with a sliding
# window.)
#
# If *any* token can be a sink (**claim C3**, [`AnyToken`](../p0circuit/experiments/paper/c03_any_token.py) tries all
# 1,024 of them), we can choose one. Put the same token first in all prompts and leave the rest unchanged:

# %%
import pandas as pd

first_tokens = torch.randperm(lm.cfg.d_vocab, generator=torch.Generator().manual_seed(seed))[:8]
rows = []
for token in first_tokens.tolist():
    ids = prompts.ids.clone()
    ids[:, 0] = token
    with torch.no_grad():
        _, cache = lm.run_with_cache(ids, names_filter=names[best[0]])
    score = float(cache[names[best[0]]][:, best[1], :, 0].mean())
    rows.append((repr(lm.tokenizer.decode([token])) if lm.tokenizer else token, score))
columns = ["token at position zero", f"score of head {best[0]}.{best[1]}"]
page.show(pd.DataFrame(rows, columns=columns))

# %% [markdown]
# ## 6. Attention to P0 reads almost nothing
#
# If half of a head's attention goes to one token, does that token dominate the output? No: its *value* vector is
# short. A sink head reads almost nothing at P0, so attending there is a way of doing nothing (Guo et al., [arXiv
# 2410.13835](https://arxiv.org/abs/2410.13835), call it value-state drain). An intervention confirms that this value
# is not needed: [`Mitigations`](../p0circuit/experiments/deployment/mitigations.py) sets P0's value to zero in the
# sink heads, and the loss hardly changes (notebook [08](08_practice.ipynb)).

# %%
from p0circuit.recording.quantities import VALUE_NORM_RATIO

drain = record(lm, prompts, VALUE_NORM_RATIO).mean(0)
print("norm of P0's value over the median of the other positions':")
for layer, row in enumerate(drain):
    print(f"layer {layer}:", " ".join(f"{ratio:.2f}" for ratio in row.tolist()))

# %% [markdown]
# So P0 receives the attention that a head does not need elsewhere. How does a head *recognise* P0, when any token can
# be there and nothing says "first"? That is the next notebook.

# %%
page.key_figures(
    best_head=to_p0,
    sink_rate_from_layer_2=rate,
    sink_rate_of_position_8=rate_of_8,
    sink_rate_random_tokens=sink_map.metrics["sink_rate_random_tokens"].value,
    **(
        {"score_without_over_with_bos": bos.metrics["score_without_over_with_bos"].value}
        if bos
        else {}
    ),
)
