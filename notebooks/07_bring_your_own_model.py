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
# # Bring your own model
#
# Everything in this course works with any causal language model. In this notebook you open a model of another
# architecture, measure its sink, test a claim on it, and see what happens when a claim does not apply. Then you train
# a model of your own, **watch its sink emerge during training**, and open the checkpoints.
#
# *About 15 minutes; no exercises. Before: [06](06_emergence.ipynb). After: [08](08_practice.ipynb).*
#
# To use your own model, set `model` below: a directory with `config.json` and `*.safetensors`, or a hub id. Only a
# hub id that is not yet in the hub's cache makes this notebook use the network.

# %% tags=["parameters"]
model = "learned-0"  # a shipped model, a local Hugging Face directory, or a hub id
samples = 128  # prompts of 64 tokens
seed = 0  # of the prompts, and of the training run
steps = 384  # of the training runs
out = None  # a directory for the figures, the key figures and the runs; None saves nothing

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

# %% [markdown]
# ## 1. Open it
#
# `learned-0` is a GPT-2: LayerNorm instead of RMSNorm, and *learned positions*, so that position zero can be
# recognised by its embedding and not only by the causal mask. `describe` returns the properties that the rest of the
# package uses, for any architecture; `backend` is the TransformerLens class that holds the model.

# %%
import tempfile

import numpy as np
import pandas as pd
import torch

from p0circuit.course.page import Page, open_model, read_prompts, try_claim
from p0circuit.models import ModelError, describe, load_model

page = Page(out)
lm = open_model(model)
prompts = read_prompts(lm, samples, seed)
about = describe(lm)
fields = [
    "name",
    "architecture",
    "backend",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "d_model",
    "n_ctx",
]
fields += ["positions", "window", "experts", "parallel_blocks"]
rows = [(field, str(getattr(about, field))) for field in fields]
page.show(pd.DataFrame(rows, columns=["field", "value"]))

# %% [markdown]
# ## 2. Which backend, and does it compute the same?
#
# Families that TransformerLens's `HookedTransformer` computes exactly are loaded as one; all others become a
# `TransformerBridge`, which adds hooks to the code of `transformers` itself. Both have the same hook names, and both
# keep *unprocessed weights*: no norm is folded into a weight, because norms are studied here. Every load compares the
# logits with those of `transformers`, and a model with different logits is refused.
#
# Here are four architectures with random weights, saved as ordinary model directories and opened again. In three of
# them several query heads share a key (*grouped-query attention*), so a sink head has its own queries but not its own
# keys.

# %%
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
scratch = tempfile.TemporaryDirectory()
small = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
configs = {
    "gpt2": transformers.GPT2Config(
        vocab_size=96, n_embd=48, n_layer=3, n_head=4, n_positions=128
    ),
    "qwen3": transformers.Qwen3Config(head_dim=12, **small),
    "gemma2": transformers.Gemma2Config(head_dim=12, sliding_window=16, **small),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **small
    ),
}
ids = torch.randint(96, (8, 64), generator=torch.Generator().manual_seed(seed))
rows = []
for name, config in configs.items():
    torch.manual_seed(seed)
    mine = transformers.AutoModelForCausalLM.from_config(config).eval()
    directory = pathlib.Path(scratch.name) / name
    mine.save_pretrained(directory)
    opened = open_model(directory)
    with torch.no_grad():
        logits, cache = opened.run_with_cache(ids)
        difference = float((logits - mine(ids).logits).abs().max())
    best = max(float(cache["pattern", layer][..., 0].mean((0, 2)).max()) for layer in range(3))
    info = describe(opened)
    rows.append(
        (name, info.backend, info.n_kv_heads, info.positions, info.experts, difference, best)
    )
columns = [
    "architecture",
    "backend",
    "kv heads",
    "positions",
    "experts",
    "logits differ by",
    "best head",
]
table = pd.DataFrame(rows, columns=columns)
page.show(table.assign(**{"logits differ by": table["logits differ by"].map("{:.0e}".format)}))

# %% [markdown]
# The last column is the highest sink score of any head. Uniform attention gives 0.074, and the highest of twelve
# random heads is hardly above that: random weights have no sink. A model that cannot be opened correctly is refused,
# with the reason and a solution:

# %%
unfinished = pathlib.Path(scratch.name) / "unfinished"
unfinished.mkdir()
config.save_pretrained(unfinished)
for name, checkpoint in ((unfinished, None), ("p0-nano", 3)):
    try:
        load_model(name, checkpoint=checkpoint)
    except ModelError as reason:
        print("-", str(reason).replace(scratch.name, "..."))

# %% [markdown]
# ## 3. Its sink
#
# As in notebook [01](01_meet_the_sink.ipynb): the sink score of every head, on five kinds of prompt.

# %%
from p0circuit.experiments import BosAblation, DirectionOrNorm, Experts, SinkMap

sink_map = SinkMap().run(lm, prompts)
page.show(sink_map.figures["map"], "sink scores of every head on five kinds of prompt")

# %% [markdown]
# `learned-0` has almost none: uniform attention gives 0.07, and its best head has 0.12. On one repeated token, where
# `p0-nano` has no sink at all, its scores are nearly the same: with learned positions equal tokens still differ. And
# BOS, a token that it has never seen in training, attracts one head of layer 0 nearly twice as much.
#
# ## 4. A claim, and what "not applicable" looks like
#
# Three experiments on this model. C2 compares the highest heads after BOS with the same heads without BOS. C8 needs a
# sink above block 1, and a model may have none; then the claim can be neither reproduced nor not reproduced, and the
# experiment raises `NotApplicable` with the reason and the numbers. The last experiment is about mixtures of experts.

# %%
claims = {
    kind.id: try_claim(kind(), lm, prompts) for kind in (BosAblation, DirectionOrNorm, Experts)
}

# %% [markdown]
# *Not reproduced* is a result about a model: here, that the token at P0 does matter. It is a weak result, because C2
# compares the highest heads whether they are sinks or not, and this model has almost no sink. *Not applicable* is not
# a result. A report keeps the two apart.
#
# ## 5. A training run of your own, monitored
#
# Now we train two models, in half a minute. On text it takes millions of tokens until a sink emerges (notebook
# [06](06_emergence.ipynb)). A task on which a head usually has nothing to do is faster: **backcopy**, after the
# Bigram-Backcopy task of Guo et al. ([arXiv 2410.13835](https://arxiv.org/abs/2410.13835)), with tokens drawn
# uniformly instead of from bigrams. After a *trigger*, the token before the trigger is repeated. Everything else is
# random, so a head that copies needs another target for its attention most of the time.
#
# In one run every row begins with BOS, in the other with a random token. Nothing else differs.

# %%
VOCAB, TRIGGERS, LENGTH, ROWS = 64, 8, 64, 16  # token 0 is BOS, tokens 1 to 8 are triggers


def backcopy(rng, rows=ROWS, bos=True):
    """Rows [rows, LENGTH] of the task."""
    ids = rng.integers(1, VOCAB, (rows, LENGTH))
    if bos:
        ids[:, 0] = 0
    for t in range(2, LENGTH):
        copies = (ids[:, t - 1] <= TRIGGERS) & (ids[:, t - 2] > 0)
        ids[copies, t] = ids[copies, t - 2]
    return torch.from_numpy(ids)


# %% [markdown]
# The model is a small Llama with grouped queries, made with `transformers`. The monitor adds two lines to the loop:
# one creates it, one calls it after every step. It reads the training model directly, without a conversion, and does
# not change weights, gradients or random states. Its prompts should begin like the training rows; by default it uses
# random tokens.

# %%
from p0circuit import P0Monitor
from p0circuit.prompts import from_ids

llama = transformers.LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=0,
)
every = max(1, steps // 32)  # steps between two readings
save_at = {0, *(every * 2**doublings for doublings in range(6))}


def train(run, bos):
    """Train on backcopy; save checkpoints and readings in `run`; return model and losses."""
    torch.manual_seed(seed)
    mine = transformers.LlamaForCausalLM(llama)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=5e-3, weight_decay=0.1)
    monitor = P0Monitor(probes[run.name], every=every, csv=run / "p0.csv")
    rng, losses = np.random.default_rng(seed), []
    for step in range(steps + 1):
        monitor.step(mine, step)
        if step in save_at:
            mine.save_pretrained(run / f"checkpoint-{step}")
        ids = backcopy(rng, bos=bos)
        loss = mine(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{run.name}: {monitor.status}")
    return mine, losses


starts = {"after BOS": True, "random first": False}
probes = {
    name: from_ids(backcopy(np.random.default_rng(10_000 + seed), 64, bos))
    for name, bos in starts.items()
}
runs = {name: pathlib.Path(out or scratch.name) / "runs" / name for name in starts}
trained = {name: train(runs[name], bos) for name, bos in starts.items()}

# %% [markdown]
# Readings are written to a CSV file as they are made (and, with a Trainer or Lightning, to its loggers). *Excess* is
# the attention of the highest heads to P0 minus that to position 8. A reading is *above* the threshold (dashed) if it
# is more than twice the value of uniform attention. The sink has emerged when three readings in a row are above; a
# circle marks the first of them.

# %% tags=["cover"]
from p0circuit.figures.training import TrainingCurve, training_curves
from p0circuit.sink import least_excess

lines = []
for name, run in runs.items():
    readings = pd.read_csv(run / "p0.csv")
    losses = trained[name][1]
    readings["tokens"] = readings["step"] * ROWS * LENGTH
    readings["loss"] = [np.mean(losses[max(0, at - 5) : at + 5]) for at in readings["step"]]
    formation_step = readings["formation_step"].iloc[-1]
    formation = None
    if not pd.isna(formation_step):
        formation = int((readings["step"] == formation_step).argmax())
    lines.append(TrainingCurve(name, name, readings, formation))
panels = {
    "Loss": ("loss", "nats per token"),
    "Highest heads": ("excess", "excess score"),
    "Norm ratio after block 1": ("norm_ratio", "P0 over median"),
}
figure = training_curves(panels, lines, "Two runs, measured by the monitor")
figure.axes[1].axhline(least_excess(LENGTH), color="0.5", linewidth=0.8, linestyle="--")
page.show(figure, "loss, excess score and norm ratio of two runs in training")

# %% [markdown]
# Both models learn the task. After BOS a sink emerges within a few hundred steps and takes most of the attention of
# the highest heads. After a random token it has only begun to emerge by then (whether its last readings are above the
# dashed line differs from machine to machine). P0 has no large norm in either. So this is *not* the circuit of the
# paper, which needs no BOS. It is the simplest way to a sink: a key that the embedding of one token already has in
# layer 0. (The paper's circuit needs text, depth and time; `bos-0`, trained on text after BOS, has a sink that
# depends on the token, too.)
#
# With the `Trainer` of `transformers` the monitor is one line, `monitor.attach(trainer)`, and the readings appear in
# the Trainer's log and in its integrations (TensorBoard, W&B). With Lightning it is
# `Trainer(callbacks=[monitor.lightning()])`. Here the Trainer continues the first model for ten steps.

# %%
trainer = transformers.Trainer(
    trained["after BOS"][0],
    transformers.TrainingArguments(
        output_dir=scratch.name,
        max_steps=10,
        learning_rate=1e-3,
        per_device_train_batch_size=ROWS,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=[
        {"input_ids": row, "labels": row}
        for row in backcopy(np.random.default_rng(30_000 + seed), 10 * ROWS)
    ],
)
trainer.remove_callback(transformers.PrinterCallback)
P0Monitor(probes["after BOS"], every=5).attach(trainer)
trainer.train()
logged = [line for line in trainer.state.log_history if "p0/excess" in line]
page.show(pd.DataFrame(logged)[["step", "p0/excess", "p0/sink_rate", "p0/norm_ratio"]])

# %% [markdown]
# ## 6. The checkpoints of the run
#
# The Trainer saves a run in folders `checkpoint-N`, and `p0circuit trace ./my-run` reads them: every checkpoint is
# opened as in section 1 and measured on the same rows. The monitor measured the same models during training. The two
# use different code and have to agree.

# %%
from p0circuit.figures.training import trace_panels
from p0circuit.training.checkpoints import checkpoints_of
from p0circuit.training.trace import trace

run, probe = runs["after BOS"], probes["after BOS"]
checkpoints = [step for step in checkpoints_of(run) if step in save_at]
traced = trace(run, lambda _: probe, checkpoints, load=lambda step: open_model(run, step))
figure = trace_panels({run.name: traced.to_dataframe()}, traced.formation_step)
page.show(figure, "the trace of the run, from its checkpoints")
both = traced.to_dataframe().merge(
    lines[0].table, on="step", suffixes=(" (trace)", " (monitor)")
)
sides = [
    f"{name} ({side})" for name in ("sink_rate", "norm_ratio") for side in ("trace", "monitor")
]
page.show(both[["step", *sides]])

# %% [markdown]
# Last, a causal question about the trained model: does its sink depend on the position or on the token? On new rows
# of the task, replace BOS by another token; or put BOS at position 16, where it never was in training.

# %%
from p0circuit.experiments.sink_under_study import excess_scores
from p0circuit.figures.intervals import bars
from p0circuit.stats import bootstrap

last = open_model(run, checkpoints[-1])
rng = np.random.default_rng(20_000 + seed)
as_trained, without = backcopy(rng, samples), backcopy(rng, samples, bos=False)
moved = without.clone()
moved[:, 16] = 0
heads = traced.heads
scores = {
    "BOS at P0": excess_scores(last, from_ids(as_trained), heads),
    "another at P0": excess_scores(last, from_ids(without), heads),
    "BOS at 16": excess_scores(last, from_ids(moved), heads, offset=16),
}
left = {name: bootstrap(values) for name, values in scores.items()}
figure = bars({"Attention to the position": left}, "Position or token?", ["excess score"])
page.show(
    figure, "excess score of BOS at position zero, of another token there, of BOS elsewhere"
)

# %%
own = try_claim(DirectionOrNorm(), last, from_ids(as_trained))

# %% [markdown]
# The sink depends on the token, wherever it is. C8 is not applicable again, for a different reason: this sink is in
# layer 0, so an intervention on P0's stream after block 1 cannot reach it.
#
# ## 7. From here on: the command line
#
# ```shell
# p0circuit sink ./my-model --json                 # the numbers of section 3
# p0circuit reproduce ./my-model --text ./my-texts # every claim with its controls, and a report
# p0circuit advise ./my-model --text ./my-texts    # what it means for someone who uses the model
# p0circuit trace ./my-run                         # section 6, and resumable
# p0circuit sweep --models ./a,./b --checkpoints 0,400 --experiments C1,C8 --workers 2 # on Ray
# p0circuit trace ./my-moe-run --device-map auto --dtype bfloat16 # larger than one device
# ```
#
# Every command accepts a hub id instead of a directory (`p0circuit sink EleutherAI/pythia-160m --checkpoint 1000`);
# its checkpoints are revisions. A model that is larger than one device is spread over GPUs, CPU memory and disk, and
# the command reports the memory that it needs before it loads anything: see [the
# README](../README.md#larger-than-one-device). Code that comes with a model is never run. What the sink means for
# someone who *uses* a model is the subject of [08](08_practice.ipynb).

# %%
scratch.cleanup()
figures = {
    "largest_difference_of_logits": table["logits differ by"].max(),
    "best_head": sink_map.metrics["best_head"].value,
    "sink_rate": sink_map.metrics["sink_rate"].value,
    "final_excess_behind_bos": lines[0].table["excess"].iloc[-1],
    "final_excess_random_first": lines[1].table["excess"].iloc[-1],
    "monitor_and_trace_apart": (both[sides[0]] - both[sides[1]]).abs().max(),
    **{f"excess_{name.lower().replace(' ', '_')}": one.value for name, one in left.items()},
}
if (bos := claims["bos-ablation"]) is not None:
    name = "score_without_over_with_bos"
    figures[name] = bos.metrics[name].value
page.key_figures(**figures)
