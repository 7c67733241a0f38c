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
# # Emergence: when the sink emerges in training
#
# So far we have studied a finished model. This notebook is about *training*: when does the sink emerge, is it
# concentrated in the first two blocks, does it predict the remaining loss, and can training make it emerge earlier?
# The paper answers all four questions with yes: the first three from the trace of one large mixture of experts, the
# last from dense models with about a billion parameters. Here each question gets a threshold, fixed before anything
# was measured, and is tested on several small runs and seeds. **None of the four claims is reproduced as stated**,
# and the reasons are more informative than the verdicts.
#
# *About 15 minutes; two questions. Before: [05](05_build_a_sink.ipynb). After: [07](07_bring_your_own_model.ipynb).*

# %% tags=["parameters"]
model = "p0-nano"  # the run to measure here: a shipped model, or a directory of checkpoints
samples = 128  # prompts of 64 tokens
seed = 0  # of the prompts
runs = None  # a directory of traces, <variant>-<seed>.csv; None for the shipped ones
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
import pandas as pd
import torch

from p0circuit.course.page import Page, open_model, print_verdict, read_prompts
from p0circuit.figures.training import trace_panels
from p0circuit.training.runs import as_trained, of_variant, shipped_runs

page = Page(out)
# Each run once, on prompts that begin like its training rows.
traces = as_trained(shipped_runs(pathlib.Path(runs) if runs else None))
print(len(traces), "runs:", ", ".join(run.name for run in traces))

# %% [markdown]
# ## 1. What a row of a trace contains
#
# A training run saves checkpoints, spaced about evenly on a logarithmic scale, because most changes happen early. A
# *trace* measures each of them on the same prompts. A row contains what you measured in notebooks
# [01](01_meet_the_sink.ipynb) to [03](03_amplification.ipynb), and two more quantities: how well the best head does
# *induction* (in a repeated sequence of random tokens, its attention to the token after the previous occurrence), and
# the *concentration* of section 6.
#
# `p0-nano` comes with its 16 checkpoints. Here is every third of them, including the last:

# %%
from p0circuit.training.checkpoint_measurement import measure_checkpoint
from p0circuit.training.checkpoints import checkpoints_of
from p0circuit.training.trace import Trace

rows = []
for step in checkpoints_of(model)[::-3][::-1]:
    lm = open_model(model, checkpoint=step)
    prompts = read_prompts(lm, samples, seed)
    rows.append({"step": step, **measure_checkpoint(lm, prompts)})
live = Trace(model, rows, length=prompts.length)
columns = [
    "step",
    "loss",
    "excess",
    "norm_ratio",
    "direction_consistency",
    "concentration_causal",
    "induction_score",
]
page.show(live.to_dataframe()[columns])
print("sink heads at the end:", *(f"{layer}.{head}" for layer, head in live.heads))

# %% [markdown]
# One column depends on the end of the run: `excess` follows the heads that are sinks *at the last checkpoint*,
# selected on the first half of the prompts and measured on the second. A head that is a sink only for some time does
# not count.
#
# The package ships such tables for every run of this project, one row per checkpoint
# ([`data/traces`](../data/traces/README.md)). The table of `p0-nano` was measured on another text, so its loss is
# lower; all other curves agree with what you have just measured. (`p0circuit trace p0-nano` measures it again, and
# `p0circuit trace ./my-run` does the same for a run of yours.)

# %%
tables = {
    f"{run.name} (shipped)": run.table
    for run in traces
    if run.name in (str(model), f"{model}-0")
}
figure = trace_panels(tables | {"measured here": live.to_dataframe()}, live.formation_step)
page.show(figure, "the training of p0-nano, measured here and as shipped")

# %% [markdown]
# ## 2. When has the sink emerged?
#
# "Early" needs a definition. Let $e_j$ be the excess score at checkpoint $j$ of $J$, and $n_j$ the number of tokens
# seen by then. The sink has emerged at the first checkpoint from which on the score stays above half of its final
# value:
#
# $$f = \min \left\{ j : e_i > \tfrac{1}{2}\, e_J \;\text{for all}\; i \ge j \right\}, \qquad \text{formation share} = \frac{n_f}{n_J} .$$
#
# If there is no sink at the end, none has emerged, and the share counts as 1. Checkpoints are far apart: the dashed
# line above is as precise as six of them allow, and the true step is between that checkpoint and the one before.
#
# Now all runs at once. `bos` is the baseline, trained as in the paper: a plain Llama with 0.9 million parameters
# whose training rows all begin with BOS. `tnlm` and `force-sink` are the subject of section 5, `moe` of section 4.
# `baseline` never saw BOS: its sink has hardly begun to emerge within these 9 million tokens (one of three seeds is
# just above the threshold for a sink; `tnlm-plain` is the same with the TNLM loss). `p0-nano` has a recipe that
# encourages a sink, and four times as many tokens. The table has three more architectures: `learned` (a GPT-2),
# `gated` (a gate on the output of each head) and `window` (a query sees only the last 32 keys, so most queries do not
# see P0: the paper's boundary case, where hardly any head is a sink).

# %%
from p0circuit.experiments import Early

early = Early().run(traces)
page.show(
    early.figures["training_curves"],
    "excess score, induction and loss along training, all runs",
)
columns = ["run", "formation_share", "not_before_share", "induction_share", "final_excess"]
page.show(early.tables["formation"][columns])
print_verdict(early)

# %% [markdown]
# **Claim C13**, [`Early`](../p0circuit/experiments/training/c13_early.py), asks for 20 % of the tokens in every seed.
# The BOS runs take 26 to 40 %. Two conclusions:
#
# - **A threshold as a share of tokens depends on the budget as much as on the circuit.** In tokens, the sink of these
#   runs emerges after two to four million. In a run of the paper's size that would be very early.
# - **The sink emerges together with other things.** In the BOS runs it emerges at the same checkpoint at which the
#   best head learns induction (`induction_share`, by the same rule). With Force-sink it emerges one checkpoint
#   *before* induction, in `p0-nano` long after it. So neither needs the other, and the order depends on the recipe.
#   (Xu, [arXiv 2606.02378](https://arxiv.org/abs/2606.02378), finds induction first in Pythia and OLMo.)
#
# ### Question 6.1
#
# How many tokens would the runs need so that *the same* sinks had emerged within 20 % of them?
#
# <details>
# <summary>Answer 6.1</summary>
#
# ```python
# for run in of_variant(traces, "bos"):
#     tokens = run["tokens"][run.formation]
#     print(f"{run.name}: emerged after {tokens:,.0f} tokens, a fifth of {5 * tokens:,.0f}")
# ```
#
# 12 to 19 million, if the sink emerged at the same number of tokens. That is not certain: a longer run has another
# learning rate at every step. Therefore the claim is judged on the budget that was fixed, not on one chosen
# afterwards.
#
# </details>
#
# ## 3. Stages, by a criterion
#
# The paper describes three stages: early, transitional, final. Looking at curves one always sees stages, so here a
# criterion decides. Take $q$ quantities (excess score, sink rate from layer 2 on, norm ratio, observed
# concentration), each divided by its standard deviation, and divide the $J$ checkpoints into $k + 1$ segments with
# one mean each. More segments always fit better, so the residual sum of squares $R_k$ is combined with a penalty:
#
# $$\text{minimise} \quad q J \ln \frac{R_k}{q J} + 2 k\,(q + 1) \ln (q J) .$$
#
# Every cut costs one position and $q$ means, and the penalty is doubled because the position is the best of many.

# %%
from p0circuit.experiments import Concentration

concentration = Concentration().run(traces)
stages = concentration.tables["stages"]
names = {
    run.name
    for variant in ("bos", "force-sink", "moe", "p0-nano", "baseline")
    for run in of_variant(traces, variant)[:1]
}
columns = [
    "run",
    "stage",
    "from_step",
    "to_step",
    "excess",
    "norm_ratio",
    "concentration_observed",
]
page.show(stages[stages["run"].isin(names)][columns])
counts = stages.groupby("run")["stage"].max()
print("number of stages:", ", ".join(f"{name} {count}" for name, count in counts.items()))

# %% [markdown]
# There are three or four stages in the BOS runs, three in `moe-0`, two with Force-sink and in `p0-nano`, and between
# one and four on plain text. So three stages are not a rule.
#
# ## 4. Dense model and mixture of experts
#
# `moe-0` is a small counterpart of the paper's mixture: 8 experts in the MLP of each block, of which a token uses 2,
# trained on the same rows as `bos-0`.

# %% tags=["cover"]
tables = {
    run.name: run.table for variant in ("bos", "moe") for run in of_variant(traces, variant)[:1]
}
page.show(trace_panels(tables), "a dense model and a mixture of experts along training")

# %% [markdown]
# The mixture's sink emerges at the same checkpoint (26 % of the tokens), ends higher, and has a far larger outlier:
# P0 has 23 times the norm of the other positions, against 4 times in `bos-0`. (This is one seed: whether mixtures
# always do this is open.)
#
# Which experts make it? P0 is *routed*, like every token. Its stream is the same in every text, so it is always
# routed to the same experts. Su et al. ([arXiv 2507.23279](https://arxiv.org/abs/2507.23279)) found that a small
# number of *super experts* in the first layers write the outlier.
# [`Experts`](../p0circuit/experiments/exploratory/experts.py) removes, at P0 or everywhere, the experts that write
# most there, one at a time and together, and random experts of the same blocks for comparison.

# %%
from p0circuit.experiments import Experts, ExpertsConfig

mixture = open_model("moe-0")
quick = ExpertsConfig(alone=4, samples=24, most=4, draws=4)
experts = Experts(quick).run(mixture, read_prompts(mixture, samples, seed))
page.show(
    experts.figures["routing"],
    "routing of P0 and of all other positions, and the experts that write at P0",
)
page.show(experts.figures["removed"], "sink, norm and loss with experts removed")
columns = ["layer", "expert", "norm_at_p0", "where", "excess_left", "norm_ratio", "loss_added"]
page.show(experts.tables["alone"][columns])

# %% [markdown]
# There are two super experts with different effects. Expert 3 of block 1 writes *nearly all of the norm*, 490 units
# of it. Without it P0 has about twice the norm of the others, a small outlier, **and most of the sink is still
# there**. Expert 0 of block 0 writes an eighth of that norm, and the sink depends on it: without it 0.3 of the sink
# is left, without both almost nothing, while random experts of the same blocks can be removed. So most of the outlier
# is not needed: the keys of sink heads read a direction, and after the norm a very long vector in that direction is
# no different from a moderate one. (What `Norm(x)` shows of `x` is its direction: notebook
# [03](03_amplification.ipynb).)
#
# %% [markdown]
# ## 5. Training for a sink: TNLM and Force-sink
#
# The second version of the paper has two methods without extra parameters:
#
# - **TNLM**: the prediction at P0 is left out of the loss, so that this position is free to be a register: $L =
#   \frac{1}{T-1} \sum_{t=1}^{T-1} \ell_t$ instead of $\frac{1}{T} \sum_{t=0}^{T-1} \ell_t$.
# - **Force-sink**: before both norms of every block P0 keeps only $k$ of the $d$ channels, and all other positions
#   keep only the other $d - k$ (here $k = 8$ of 128). So P0 is marked in every block by construction.
#
# Each was trained with three seeds and is compared with the BOS run of the same seed. With $n$ pairs, mean difference
# $\delta$ and standard deviation $s$, Student's interval is
#
# $$\delta \pm t_{n-1} \frac{s}{\sqrt{n}}, \qquad t_2 = 4.30 \; (95\,\%) .$$
#
# With three seeds the interval is wide.

# %%
from p0circuit.course.page import metrics_table
from p0circuit.experiments import Methods

methods = Methods().run(traces)
page.show(methods.figures["methods"], "training methods: sink, loss, and sink against outlier")
page.show(metrics_table(methods))
print_verdict(methods)

# %% [markdown]
# **Claim C16**, [`Methods`](../p0circuit/experiments/training/c16_methods.py), says that both methods make the sink
# earlier and stronger. Force-sink does: the sink emerges earlier, by an eighth of the run's tokens, and ends a
# quarter higher, and both intervals exclude 0. TNLM does neither: in one seed the sink was earlier, in one later, in
# one the same. At this size it changes little to leave one of 127 predictions out of the loss, except for the
# **outlier**: the norm ratio is larger in every seed.
#
# A note on "higher": the score is the mean over the sink heads of a run, however many there are. The *sink rate*
# counts them, and its increase with Force-sink has an interval that includes 0 (`force_sink_sink_rate_difference`).
#
# Look at the right panel. Force-sink has a stronger sink than `bos` with a smaller outlier (with three seeds the
# interval of *that* difference includes 0). `moe-0` has the strongest sink and the largest outlier. So one does not
# measure the other: a sink does not consist of a massive activation. The paper says so too, and you have just removed
# one.
#
# No difference in loss is detectable. None of these methods has made a better model at this size.
#
# ### Question 6.2
#
# TNLM's three differences in the share of tokens are 0.15, -0.15 and 0. Suppose that their mean were -0.1: how small
# would their standard deviation have to be for the interval to exclude 0?
#
# <details>
# <summary>Answer 6.2</summary>
#
# ```python
# from scipy.stats import t
#
# print(f"standard deviation below {0.1 * 3**0.5 / t.ppf(0.975, 2):.3f}")
# ```
#
# Below 0.040, which is less than a third of the distance between two checkpoints. With three seeds and checkpoints
# this far apart, only a large effect that is the same in every seed can be detected.
#
# </details>
#
# ## 6. Where is it? Observed and causal concentration
#
# "Concentrated in the first two blocks" can be read off the norms, or tested by intervention. *Observed
# concentration* is the share of the growth of P0's norm along the layers (in logarithms, from the embedding to the
# maximum) that blocks 0 and 1 write,
#
# $$C_\text{obs} = \frac{\ln |x_2| - \ln |x_0|}{\max_l \ln |x_l| - \ln |x_0|} .$$
#
# *Causal concentration* removes what these blocks know about being first. Replace P0's stream after block 1 by that
# of the shifted run ([04](04_patching_the_circuit.ipynb)), in which *the same token* is at position 8, and measure
# how much of the sink rate is lost:
#
# $$C_\text{causal} = 1 - \frac{\mathrm{Sink}[2{:}] \;\text{with}\; x_2 \;\text{of the shifted run}}{\mathrm{Sink}[2{:}]} .$$

# %%
page.show(
    concentration.figures["training_curves"], "causal and observed concentration along training"
)
page.show(metrics_table(concentration))
print_verdict(concentration)

# %% [markdown]
# **Claim C14**, [`Concentration`](../p0circuit/experiments/training/c14_concentration.py), is where the two differ.
# By the norms the concentration of the BOS runs is almost complete: 0.96. By intervention it is 0.05. (The trend is
# "significant": it rises in every seed, from nothing to 0.05. A small $p$ says that something rises, not that it is
# large.) In `p0-nano` it is the other way round: 0.68 observed, since block 2 still adds a lot, and 1.00 causal.
#
# If the first two blocks of a BOS run do not encode being first, what do they encode? Two direct tests: compare P0's
# stream after block 1 with that of the same token at position 8; and put BOS in the *middle* of plain text, at
# position 16, which is not first.

# %%
from p0circuit.experiments.sink_under_study import excess_scores, studied_sink
from p0circuit.interventions.pairs import shifted_pair, values_at
from p0circuit.models import list_models
from p0circuit.prompts import bos_id, from_ids
from p0circuit.recording.quantities import SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.training.checkpoint_measurement import causal_concentration

position, rows = 16, {}
names = [entry.name for entry in list_models()]
for name in [name for name in ("bos-0", "moe-0", "force-sink-0", "p0-nano") if name in names]:
    lm = open_model(name)
    plain = read_prompts(lm, samples, seed)
    # Prompts without BOS if the model has a sink there, otherwise after BOS.
    sink = studied_sink(lm, plain, in_either_condition=True)
    condition = sink.condition
    pair = shifted_pair(lm, sink.prompts, 8, seed)
    (first,) = values_at(lm, pair.clean, ["resid_post.1"]).values()
    (ninth,) = values_at(lm, pair.shifted, ["resid_post.1"], pair.position).values()
    moved = plain.split()[1].ids.clone()
    moved[:, position] = bos_id(lm)
    clean = record(lm, sink.prompts, SINK_SCORE).double()
    rows[name] = {
        "prompts": condition,
        "cosine, first and ninth": float(torch.cosine_similarity(first, ninth).mean()),
        "causal concentration": causal_concentration(lm, sink.prompts, clean),
        "excess of P0": sink.excess.value,
        f"excess of BOS at {position}": float(
            excess_scores(lm, from_ids(moved), sink.heads, position).mean()
        ),
    }
page.show(pd.DataFrame([{"run": name, **row} for name, row in rows.items()]))

# %% [markdown]
# In `bos-0` the stream of BOS after block 1 is the same wherever BOS is (cosine 0.99), so replacing one by the other
# loses nothing. And **the sink moves with BOS**: in the middle of a text BOS attracts nearly as much attention as at
# the beginning. This model has not learnt to recognise the first position. It has learnt a token. As long as every
# text begins with BOS the two are equivalent, and no observation of such texts can distinguish them; the norm of P0
# grows in blocks 0 and 1 in either case. The intervention distinguishes them.
#
# In `force-sink-0` BOS in the middle attracts nothing: by construction the position makes its sink. (The third seed
# has a causal concentration of only 0.32: there blocks 2 and 3, which also have the position, compensate for the
# first two.) Half of the training rows of `p0-nano` began with a random token, and it has learnt both: its stream
# depends on the position (the same token differs there), and BOS is a sink of its own.
#
# The lesson for monitoring a training run: observed concentration says where the norm is written. What the sink
# depends on needs an intervention.
#
# ## 7. Does it predict the remaining loss?
#
# The paper proposes the circuit as a signal of convergence. While a model trains *everything* changes with the step,
# so the signal has to contain more information than the step. The test: the remaining loss $r_j = \ell_j - \ell_J$ of
# a run whose seed is held out is predicted in two ways,
#
# $$\hat r_j = \bar r_j \qquad \text{and} \qquad \hat r_j = \bar r_j + \beta \cdot (c_j - \bar c_j) ,$$
#
# where bars are means over the *other* seeds at the same step, $c$ is the state of the circuit at that step (sink
# rate from layer 2 on, logarithm of the norm ratio), and $\beta$ is fitted on the other seeds.

# %%
from p0circuit.experiments import Convergence

convergence = Convergence().run(traces)
page.show(
    convergence.figures["predictions"],
    "remaining loss predicted by the step, and by step and circuit",
)
page.show(metrics_table(convergence))
print_verdict(convergence)

# %% [markdown]
# **Claim C15**, [`Convergence`](../p0circuit/experiments/training/c15_convergence.py), is not reproduced: the error
# with the circuit is the same 0.032 nats as without. At the same step, a run with a stronger sink than the other
# seeds tends to have less remaining loss (the points on the right have a slope), but with three seeds the interval
# includes 0 (`partial_correlation`), and it is not enough to predict a held-out seed. The sink says about as much
# about the state of a run as the step counter does, and nothing more.
#
# ## What is established, and what is not
#
# | claim | asked for | measured | what we learnt |
# | --- | --- | --- | --- |
# | [C13](../p0circuit/experiments/training/c13_early.py) early | within 20 % of the tokens | 26 to 40 % | the sink emerges after 2 to 4 million tokens, together with induction |
# | [C14](../p0circuit/experiments/training/c14_concentration.py) concentration | causal concentration rises to 0.8 | rises to 0.05 | the sink of BOS runs depends on the token; norms do not show it |
# | [C15](../p0circuit/experiments/training/c15_convergence.py) convergence | better than the step alone | -0.0004 [-0.013, 0.012] nats: no difference | the sink predicts no more of the loss than the step does |
# | [C16](../p0circuit/experiments/training/c16_methods.py) methods | TNLM and Force-sink earlier and higher | Force-sink is, TNLM is not | sink and outlier are separate |
#
# These runs have 0.9 to 2.5 million parameters and 9 million tokens: three to five orders of magnitude less than the
# paper's. What fails here may hold there. What does *not* depend on size is that observed and causal concentration
# are different quantities.
#
# There are two ways to follow a run of your own: `p0circuit trace ./my-run` for existing checkpoints, and `P0Monitor`
# ([README](../README.md)) during training.

# %%
page.key_figures(
    excess_at_the_end=live.excess[-1],
    causal_at_the_end=live.rows[-1]["concentration_causal"],
    latest_formation_share=early.metrics["latest_formation_share"].value,
    observed_final=concentration.metrics["observed_final"].value,
    causal_final=concentration.metrics["causal_final"].value,
    excess_left_without_4_experts=experts.metrics[
        "excess_left_without_4_top_experts_at_p0"
    ].value,
    causal_of_bos_0_here=rows["bos-0"]["causal concentration"],
    excess_of_bos_in_the_middle=rows["bos-0"][f"excess of BOS at {position}"],
    error_difference=convergence.metrics["error_difference"].value,
    force_sink_excess_difference=methods.metrics["force_sink_excess_difference"].value,
    tnlm_excess_difference=methods.metrics["tnlm_excess_difference"].value,
)
