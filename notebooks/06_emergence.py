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
# # Emergence: when the circuit forms, and what that tells
#
# So far a finished model was taken apart. This notebook goes through *training*: when does the sink appear, does it
# settle in the first two blocks, does it tell how far training has come, and can training make it come earlier? The
# paper answers all four with yes, the first three from the trace of one large mixture of experts, the last from dense
# models of about a billion parameters. Here are the same questions with a threshold each, fixed before anything was measured, over several small runs and seeds. **None of the four is reproduced
# as it is stated**, and each misses for a reason that is worth more than the verdict.
#
# *About 15 minutes; two questions. Before: [05](05_build_a_sink.ipynb). After: [07](07_bring_your_own_model.ipynb).*

# %% tags=["parameters"]
model = "p0-nano"  # the run to measure here: a shipped model, or a directory of checkpoints
samples = 128  # prompts of 64 tokens
seed = 0  # of the prompts
runs = None  # a directory of traces, <variant>-<seed>.csv; None takes those that are shipped
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
import pandas as pd
import torch

from p0circuit.course.page import Page, open_model, print_verdict, read_prompts
from p0circuit.figures.training import trace_panels
from p0circuit.training.runs import as_trained, of_variant, shipped_runs

page = Page(out)
# Each run once, on prompts that begin as its training rows did.
traces = as_trained(shipped_runs(pathlib.Path(runs) if runs else None))
print(len(traces), "runs:", ", ".join(run.name for run in traces))

# %% [markdown]
# ## 1. How a row of a trace is made
#
# A training run leaves checkpoints, about as dense on a logarithmic scale as they can be: most happens early. A *trace*
# measures each of them on the same prompts. A row is what you measured in notebooks [01](01_meet_the_sink.ipynb) to
# [03](03_amplification.ipynb), and two things more: how well the best head does *induction* (in random tokens said twice,
# its attention to what followed the same token before), and the *concentration* that section 6 is about.
#
# `p0-nano` comes with its 16 checkpoints. Here is every third of them, the last one included:

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
shown = [
    "step",
    "loss",
    "excess",
    "norm_ratio",
    "direction_consistency",
    "concentration_causal",
    "induction_score",
]
page.show(live.to_dataframe()[shown])
print("heads that are sinks at the end:", *(f"{layer}.{head}" for layer, head in live.heads))

# %% [markdown]
# One column depends on the future: `excess` follows the heads that are sinks *at the end*, chosen on the first half of the
# prompts and measured on the second. A head that is a sink for a while and none later does not count.
#
# The package ships such tables for every run of this project, one line per checkpoint
# ([`data/traces`](../data/traces/README.md)). That of `p0-nano` was measured on another text, so its loss lies lower; all
# else lies on top of what you have just measured. (`p0circuit trace p0-nano` makes it anew, and
# `p0circuit trace ./my-run` does the same for a run of yours.)

# %%
tables = {
    f"{run.name} (shipped)": run.table
    for run in traces
    if run.name in (str(model), f"{model}-0")
}
figure = trace_panels(tables | {"measured here": live.to_dataframe()}, live.formation_step)
page.show(figure, "the development of p0-nano, measured here and as shipped")

# %% [markdown]
# ## 2. When has it formed?
#
# "Early" is no number. Let $e_j$ be the excess score at checkpoint $j$ of $J$, and $n_j$ the tokens seen by then. The sink
# has formed at the first checkpoint from which the score stays above half of what it will be:
#
# $$f = \min \left\{ j : e_i > \tfrac{1}{2}\, e_J \;\text{for all}\; i \ge j \right\}, \qquad \text{formation share} = \frac{n_f}{n_J} .$$
#
# If there is no sink at the end, none has formed, and the share counts as 1. Checkpoints are far apart: the dashed line
# above is the best that six of them can say, and the true moment lies between the one found and the one before it.
#
# Now all runs at once. `bos` is the control of the paper's own training: a plain Llama of 0.9 million parameters whose
# training rows all begin with BOS. `tnlm` and `force-sink` are section 5, `moe` is section 4. `baseline` never saw BOS: its
# sink has hardly begun within these 9 million tokens (one of three seeds is just above what counts as one; `tnlm-plain` is
# the same with the TNLM loss). `p0-nano` has a recipe that encourages a sink, and four times the tokens. The table has
# three more architectures: `learned` (a GPT-2), `gated` (a gate on what each head says) and `window` (a query sees the last
# 32 keys only, so that most do not see P0: the paper's boundary case, and hardly a head is a sink there).

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
# **Claim C13**, [`Early`](../p0circuit/experiments/training/c13_early.py), asks for 20 % of the tokens in every seed. The BOS runs
# take 26 to 40 %. Two things to take along:
#
# - **A threshold in shares is about the budget as much as about the circuit.** In tokens, the sink of these runs is there
#   after two to four million. A run of the paper's size would call that instantly.
# - **The sink does not come alone.** In the BOS runs it forms at the very checkpoint at which the best head learns
#   induction (`induction_share`, by the same rule). With Force-sink it comes one checkpoint *before* induction, in
#   `p0-nano` long after it. Neither needs the other, then, and the order is a matter of the recipe. (Xu,
#   [arXiv 2606.02378](https://arxiv.org/abs/2606.02378), finds induction first in Pythia and OLMo.)
#
# ### Question 6.1
#
# How many tokens would the runs need so that *the same* sinks had formed within 20 % of them?
#
# <details>
# <summary>Answer 6.1</summary>
#
# ```python
# for run in of_variant(traces, "bos"):
#     tokens = run["tokens"][run.formation]
#     print(f"{run.name}: formed by {tokens:,.0f}, a fifth of {5 * tokens:,.0f} tokens")
# ```
#
# 12 to 19 million, if formation stayed where it is. It need not: a longer run has another learning rate at every step.
# That is why the claim is judged on the budget that was fixed, and not on one chosen afterwards.
#
# </details>
#
# ## 3. Stages, without looking
#
# The paper sees three stages: early, transitional, final. Whoever looks at curves sees stages; so let a criterion look.
# Take $q$ quantities (excess score, sink rate from layer 2 on, norm ratio, observed concentration), each divided by its
# standard deviation, and cut the $J$ checkpoints in $k + 1$ segments with a mean each. More cuts always fit better; what
# is left over, $R_k$, has to pay for them:
#
# $$\text{minimise} \quad q J \ln \frac{R_k}{q J} + 2 k\,(q + 1) \ln (q J) .$$
#
# Every cut costs a place and $q$ means, twice over, because its place is the best of many.

# %%
from p0circuit.experiments import Concentration

concentration = Concentration().run(traces)
stages = concentration.tables["stages"]
wanted = {
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
page.show(stages[stages["run"].isin(wanted)][columns])
counts = stages.groupby("run")["stage"].max()
print("number of stages:", ", ".join(f"{name} {count}" for name, count in counts.items()))

# %% [markdown]
# Three or four stages in the BOS runs, three in `moe-0`, two with Force-sink and in `p0-nano`, and anything from one to four
# on plain text: three is not a law.
#
# ## 4. Dense beside mixture of experts
#
# `moe-0` is the small counterpart of the paper's mixture: 8 experts in the MLP of each block, 2 of them used by a token, on
# the very rows of `bos-0`.

# %% tags=["cover"]
beside = {
    run.name: run.table for variant in ("bos", "moe") for run in of_variant(traces, variant)[:1]
}
page.show(trace_panels(beside), "a dense model and a mixture of experts along training")

# %% [markdown]
# The mixture's sink forms at the same checkpoint (26 % of the tokens), ends higher, and has a far larger outlier: P0 is 23
# times as long as the others, against 4 times in `bos-0`. (One seed: whether mixtures always do that is open.)
#
# Which experts make it? P0 is *routed*, like every token; and since its stream is the same in every text, it is always
# routed alike. Su et al. ([arXiv 2507.23279](https://arxiv.org/abs/2507.23279)) found that a few *super experts* of the
# first layers write the outlier. [`Experts`](../p0circuit/experiments/exploratory/experts.py) takes away, at P0 or everywhere, those
# that write most there, one by one and together, and random ones of the same blocks for comparison.

# %%
from p0circuit.experiments import Experts, ExpertsConfig

mixture = open_model("moe-0")
quick = ExpertsConfig(alone=4, samples=24, most=4, draws=4)
experts = Experts(quick).run(mixture, read_prompts(mixture, samples, seed))
page.show(
    experts.figures["routing"], "where P0 and all others are routed, and who writes at P0"
)
page.show(experts.figures["removed"], "sink, norm and loss without some experts")
columns = ["layer", "expert", "norm_at_p0", "where", "excess_left", "norm_ratio", "loss_added"]
page.show(experts.tables["alone"][columns])

# %% [markdown]
# There are two super experts, and they do different things. Expert 3 of block 1 writes *nearly all of the norm*, 490 units of
# it. Without it P0 is about twice as long as the others, like any small outlier, **and most of the sink is still there**.
# Expert 0 of block 0 writes an eighth of that, and it is the one the sink hangs on: without it 0.3 is left, without both
# next to nothing, while random experts of the same blocks can go. So the outlier is mostly excess: what the keys of sink
# heads read is a direction, and after the norm a large vector in that direction says no more than a moderate one. (What
# `Norm(x)` sees of `x` is its direction: notebook [03](03_amplification.ipynb).)
#
# %% [markdown]
# ## 5. Training for a sink: TNLM and Force-sink
#
# The second version of the paper has two recipes without extra parameters:
#
# - **TNLM**: the prediction made at P0 is left out of the loss, so that this position is free to be a register:
#   $L = \frac{1}{T-1} \sum_{t=1}^{T-1} \ell_t$ in place of $\frac{1}{T} \sum_{t=0}^{T-1} \ell_t$.
# - **Force-sink**: before the two norms of every block P0 keeps $k$ of the $d$ channels and all other positions keep the other $d - k$ (here
#   $k = 8$ of 128). P0 is told apart by construction, in every block.
#
# Each was trained with three seeds and held against the BOS run of the same seed. With $n$ pairs that differ by $\delta$
# on average, with standard deviation $s$, Student's interval is
#
# $$\delta \pm t_{n-1} \frac{s}{\sqrt{n}}, \qquad t_2 = 4.30 \; (95\,\%) .$$
#
# Three seeds are few, and the interval says so.

# %%
from p0circuit.course.page import metrics_table
from p0circuit.experiments import Methods

methods = Methods().run(traces)
page.show(methods.figures["methods"], "training methods: sink, loss, and sink against outlier")
page.show(metrics_table(methods))
print_verdict(methods)

# %% [markdown]
# **Claim C16**, [`Methods`](../p0circuit/experiments/training/c16_methods.py), wants both methods to be earlier and higher. Force-sink
# is, beyond doubt: the sink forms earlier, by an eighth of the run's tokens, and ends a quarter higher. TNLM is neither: in one
# seed it was earlier, in one later, in one the same. At this size leaving one of 127 predictions out of the loss
# changes little, except for the **outlier**: its norm ratio is larger in every seed.
#
# A word of care about "higher": the score is that of a run's own sink heads, few or many. The *sink rate*, which counts
# them, is not beyond doubt higher with Force-sink (`force_sink_sink_rate_difference`).
#
# Look at the panel on the right. Force-sink has more sink than `bos` at a smaller outlier (over three seeds *that*
# difference is not beyond doubt), `moe-0` the most sink and the largest outlier: the one does not measure the other. A
# massive activation is not what a sink is made of. The paper says so too, and you have just taken one away.
#
# No difference in loss can be told. None of this has made a better model of this size.
#
# ### Question 6.2
#
# TNLM's three differences in the share of tokens are 0.15, -0.15 and 0. Suppose that their mean were -0.1: how small
# would their standard deviation have to be for the interval to leave out 0?
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
# Below 0.040, less than a third of the distance from one checkpoint to the next. With three seeds and checkpoints this far
# apart only a large effect that is the same in every seed can be told.
#
# </details>
#
# ## 6. Where does it live? Observed against causal
#
# "Concentrated in the first two blocks" can be read off the norms, or found out by intervention. *Observed*: of the
# growth of P0's norm along the layers (in logarithms, from the embedding to the maximum), the share that blocks 0 and 1
# write,
#
# $$C_\text{obs} = \frac{\ln |x_2| - \ln |x_0|}{\max_l \ln |x_l| - \ln |x_0|} .$$
#
# *Causal*: take away what these blocks know of being first. Replace P0's stream after block 1 by that of the shifted run
# ([04](04_patching_the_circuit.ipynb)), in which *the same token* stands at position 8, and see how much of the sink rate
# goes:
#
# $$C_\text{causal} = 1 - \frac{\mathrm{Sink}[2{:}] \;\text{with}\; x_2 \;\text{of the shifted run}}{\mathrm{Sink}[2{:}]} .$$

# %%
page.show(
    concentration.figures["training_curves"], "causal and observed concentration along training"
)
page.show(metrics_table(concentration))
print_verdict(concentration)

# %% [markdown]
# **Claim C14**, [`Concentration`](../p0circuit/experiments/training/c14_concentration.py), is where the two part. By the norms the
# BOS runs are as concentrated as can be: 0.96. By intervention it is 0.05. (And the trend is "significant": it goes up in
# every seed, from nothing to 0.05. A small $p$ says that something rises, not that there is much of it.) In `p0-nano` it
# is the other way round: 0.68 observed, since block 2 still adds a lot, and 1.00 causal.
#
# What does a BOS run have in its first two blocks, if not the knowledge of being first? Ask it directly. Compare P0's
# stream after block 1 with that of the same token at position 8; and put BOS in the *middle* of plain text, at position
# 16, where nothing is first.

# %%
from p0circuit.experiments.sink_under_study import excess_scores, studied_sink
from p0circuit.interventions.pairs import shifted_pair, values_at
from p0circuit.models import list_models
from p0circuit.prompts import bos_id, from_ids
from p0circuit.recording.quantities import SINK_SCORE
from p0circuit.recording.record import record
from p0circuit.training.checkpoint_measurement import causal_concentration

place, rows = 16, {}
names = [entry.name for entry in list_models()]
for name in [name for name in ("bos-0", "moe-0", "force-sink-0", "p0-nano") if name in names]:
    lm = open_model(name)
    plain = read_prompts(lm, samples, seed)
    # The sink heads, and text in which there is a sink: as it is if there is one, else behind BOS.
    found = studied_sink(lm, plain, in_either_condition=True)
    condition = found.condition
    pair = shifted_pair(lm, found.prompts, 8, seed)
    (first,) = values_at(lm, pair.clean, ["resid_post.1"]).values()
    (ninth,) = values_at(lm, pair.shifted, ["resid_post.1"], pair.position).values()
    moved = plain.split()[1].ids.clone()
    moved[:, place] = bos_id(lm)
    clean = record(lm, found.prompts, SINK_SCORE).double()
    rows[name] = {
        "prompts": condition,
        "cosine, first and ninth": float(torch.cosine_similarity(first, ninth).mean()),
        "causal concentration": causal_concentration(lm, found.prompts, clean),
        "excess of P0": found.excess.value,
        f"excess of BOS at {place}": float(
            excess_scores(lm, from_ids(moved), found.heads, place).mean()
        ),
    }
page.show(pd.DataFrame([{"run": name, **row} for name, row in rows.items()]))

# %% [markdown]
# There it is. In `bos-0` the stream of BOS after block 1 is the same wherever BOS stands (cosine 0.99), so nothing is lost
# when the one is put in the place of the other. And **the sink goes where BOS goes**: in the middle of a text it draws
# nearly as much attention as in front. This model has not learnt to see which position is first. It has learnt a token.
# Both come down to the same thing as long as every text begins with BOS, and no observation of such texts can tell
# them apart; the norm of P0 grows in blocks 0 and 1 in either case. The intervention can.
#
# In `force-sink-0` BOS in the middle draws nothing: what makes its sink is the place, by construction. (The third seed has
# a causal share of 0.32 only: there blocks 2 and 3, which know the place as well, make up for the first two.) `p0-nano`, half of
# whose training rows had a random token in front, has learnt both: it sees the place (the same token looks different
# there), and BOS is a sink of its own.
#
# So a lesson for anyone who watches a run: a concentration that is observed says where the norm is written. What the sink
# hangs on is a question for an intervention.
#
# ## 7. Does it tell how far training has come?
#
# The paper proposes the circuit as a signal of convergence. While a model trains *everything* moves with the step, so
# the signal has to say more than the step does. The test: the remaining loss $r_j = \ell_j - \ell_J$ of a run whose seed
# is held out is predicted twice,
#
# $$\hat r_j = \bar r_j \qquad \text{and} \qquad \hat r_j = \bar r_j + \beta \cdot (c_j - \bar c_j) ,$$
#
# where bars are means over the *other* seeds at the same step, $c$ is the circuit as far as it is known at that step (sink
# rate from layer 2 on, logarithm of the norm ratio), and $\beta$ is fitted on the other seeds.

# %%
from p0circuit.experiments import Convergence

convergence = Convergence().run(traces)
page.show(
    convergence.figures["predictions"], "what the circuit adds to the step as a predictor"
)
page.show(metrics_table(convergence))
print_verdict(convergence)

# %% [markdown]
# **Claim C15**, [`Convergence`](../p0circuit/experiments/training/c15_convergence.py), misses: with the circuit the error is the same
# 0.032 nats as without. A run with more of a sink than its sisters at the same step tends to have less loss still to go (the
# cloud on the right leans), but not beyond doubt over three seeds (`partial_correlation`), and not by enough to predict a
# seed that was held out. The sink tells where a run stands about as well as the step counter does, and nothing on top.
#
# ## What is established, and what is not
#
# | claim | asked for | measured | what we learnt |
# | --- | --- | --- | --- |
# | [C13](../p0circuit/experiments/training/c13_early.py) early | within 20 % of the tokens | 26 to 40 % | after 2 to 4 million tokens, together with induction |
# | [C14](../p0circuit/experiments/training/c14_concentration.py) concentration | causal share rises to 0.8 | rises, to 0.05 | the sink of BOS runs hangs on the token; norms do not show it |
# | [C15](../p0circuit/experiments/training/c15_convergence.py) convergence | better than the step alone | -0.0004 [-0.013, 0.012] nats: nothing | what a sink says of the loss, the step says too |
# | [C16](../p0circuit/experiments/training/c16_methods.py) methods | TNLM and Force-sink earlier and higher | Force-sink is, TNLM is not | sink and outlier are two things |
#
# These runs have 0.9 to 2.5 million parameters and 9 million tokens: three to five orders of magnitude below the paper's. What
# fails here may hold there. What is *not* a matter of size is that observed and causal concentration are different
# questions.
#
# To watch a run of your own there are two ways: `p0circuit trace ./my-run` for checkpoints that are there already, and
# `P0Monitor` ([README](../README.md)) while it trains.

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
    excess_of_bos_in_the_middle=rows["bos-0"][f"excess of BOS at {place}"],
    error_difference=convergence.metrics["error_difference"].value,
    force_sink_excess_difference=methods.metrics["force_sink_excess_difference"].value,
    tnlm_excess_difference=methods.metrics["tnlm_excess_difference"].value,
)
