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
# # The sink in five cells
#
# In most language models most attention heads give most of their attention to **position zero** (P0), whatever token
# stands there (Mistral-7B is an exception, see [01](01_meet_the_sink.ipynb)). Peng et al.
# ([arXiv 2603.06591](https://arxiv.org/abs/2603.06591)) explain this *attention sink* by a circuit of two steps, and this
# course takes it apart and puts it together again:
#
# | step | what happens | where you can do it yourself |
# | --- | --- | --- |
# | the **sink** | later heads attend to P0, which tells them next to nothing | [01](01_meet_the_sink.ipynb) |
# | **recognition** | the causal mask lets P0 attend to itself alone: its attention output is never mixed | [02](02_recognition.ipynb) |
# | **amplification** | the first MLPs turn that into a long vector in one fixed direction | [03](03_amplification.ipynb) |
# | the **path** | keys made from it draw the queries of the sink heads | [04](04_patching_the_circuit.ipynb) |
# | all of it | the same circuit, built weight by weight | [05](05_build_a_sink.ipynb) |
# | **emergence** | when it forms in training, and what that tells | [06](06_emergence.ipynb) |
# | your own model | the same questions to another architecture, and to a run while it trains | [07](07_bring_your_own_model.ipynb) |
# | **practice** | caches, int8, pruning, prompts: what to do about it | [08](08_practice.ipynb) |
# | the report | all of its figures, in the order of the paper | [90](90_paper_figures.ipynb) |
#
# Here is the whole story in five cells, on `p0-nano`: a Llama of 0.9 million parameters, trained on Python source,
# that comes with this repository. Nothing is downloaded.
#
# Each notebook begins with the two cells below: what can be set (by hand, or by
# `p0circuit notebooks run 00 -p model wired`), and what has to be there.

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

# %% [markdown]
# ## 1. A model and something to read
#
# `lm` is a TransformerLens model, loaded *raw*: no weights folded or centred, because norms are what this is about. The
# prompts are crops of Python code that the model has not seen, without a BOS token: position zero holds whatever token
# the crop begins with.

# %%
from p0circuit.course.page import Page, open_model, read_prompts

page = Page(out)
lm = open_model(model)
prompts = read_prompts(lm, samples, seed)
print(lm.cfg.n_layers, "layers of", lm.cfg.n_heads, "heads")
print(prompts.n, "prompts of", prompts.length, "tokens")

# %% [markdown]
# ## 2. There is a sink
#
# The *sink score* of a head is the mean attention that queries give to P0. A head that attends to everything alike has
# a score of 0.07 here. One head of the last layer gives P0 half of its attention, another a third, and it matters little
# what the first token is: BOS, a word of the text, a token drawn at random. Only where *all* tokens are the same is P0
# nothing special. ([`SinkMap`](../p0circuit/experiments/paper/c01_sink_map.py) tests claim C1.)

# %%
from p0circuit.experiments import SinkMap

sink_map = SinkMap().run(lm, prompts)
page.show(sink_map.figures["map"], "sink scores of every head on five kinds of prompt")

# %% [markdown]
# ## 3. P0 is a long vector that always points the same way
#
# The residual stream at P0 is longer than that of the other positions from block 1 on, and its direction is nearly the
# same for every prompt: the first block still sees different tokens there, the last one sees "first".
# ([`NormDirection`](../p0circuit/experiments/exploratory/norm_direction.py) measures it.)

# %%
from p0circuit.experiments import NormDirection

norm_direction = NormDirection().run(lm, prompts)
page.show(norm_direction.figures["layers"], "norm and direction of the stream at position zero")

# %% [markdown]
# ## 4. Being alone is what makes it
#
# What is special about being first? The causal mask: P0 has nobody to attend to but itself. So we take the scissors to
# the attention patterns of blocks 0 and 1. Let position 16 attend to itself alone, as if it were first, and it becomes
# a sink too. Give P0 the mix of tokens that position 16 sees, and it stops being one. The *excess score* is what the sink
# heads give to a position beyond what they give to position 8, where nothing is special.
# ([`Structure`](../p0circuit/experiments/paper/c05_structure.py) tests claim C5.)

# %% tags=["cover"]
from p0circuit.course.page import sink_of
from p0circuit.experiments.sink_under_study import excess_scores
from p0circuit.figures.intervals import bars
from p0circuit.interventions.attention_edits import attend_to_self_only, copy_attention_row
from p0circuit.stats import bootstrap

# The sink heads are chosen on one half of the prompts; `sink.prompts` is the other half.
sink = sink_of(lm, prompts)
blocks = ["attn.0", "attn.1"]
surgeries = {
    "as it is": [],
    "16 alone": [attend_to_self_only(lm, sink.prompts, blocks, offset=16)],
    "P0 mixed": [copy_attention_row(lm, sink.prompts, blocks, donor=16)],
}
panels = {
    place: {
        name: bootstrap(excess_scores(lm, sink.prompts, sink.heads, offset, surgery))
        for name, surgery in surgeries.items()
    }
    for place, offset in (("Position zero", 0), ("Position 16", 16))
}
figure = bars(
    panels, "Attention to a position, beyond that to position 8", ["excess score"] * 2
)
for axis in figure.axes:
    axis.set_ylim(-0.05, 0.55)
page.show(figure, "excess scores of position zero and position 16 under mask surgery")

# %% [markdown]
# ## 5. The circuit
#
# Path patching asks of every connection between components at P0: if only this one carried what it carries when the
# same token is *not* first, how much of the sink would go? What is left when the idle ones are erased is the circuit:
# block 0's attention tells MLP 0 that it was not mixed, MLPs 0 to 2 pass that on and amplify it, and the sink heads
# read it with their keys. Four prompts are patched here, to save time; with more the strong edges stay, and weak ones
# come and go. Notebook 04 patches edges by hand. ([`Circuit`](../p0circuit/experiments/exploratory/circuit.py) draws it.)

# %%
from p0circuit.experiments import Circuit, CircuitConfig

circuit = Circuit(CircuitConfig(samples=4)).run(lm, prompts)
page.show(circuit.figures["graph"], "the circuit of the sink, recovered by path patching")

# %% [markdown]
# ## What is established, and what is not
#
# The claims are tested by experiments whose thresholds were fixed before anything was measured. Of C1 to C12, the
# paper's on a trained model, ten are reproduced on `p0-nano` and two are not (1,024 prompts; `make reproduce` repeats it).
# Of the four about training (C13 to C16, on the traces of the shipped runs) none is reproduced as it is stated, and of the
# four about use (C17 to C20, on `p0-nano`) one:
#
# | claim | verdict | notebook |
# | --- | --- | --- |
# | [C1](../p0circuit/experiments/paper/c01_sink_map.py) the sink exists without BOS | reproduced | [01](01_meet_the_sink.ipynb) |
# | [C2](../p0circuit/experiments/paper/c02_bos_ablation.py) BOS is not needed | reproduced | [01](01_meet_the_sink.ipynb) |
# | [C3](../p0circuit/experiments/paper/c03_any_token.py) any token becomes a sink | reproduced | [01](01_meet_the_sink.ipynb) |
# | [C4](../p0circuit/experiments/paper/c04_recognition.py) recognition, as the cone model predicts | **not reproduced** | [02](02_recognition.ipynb) |
# | [C5](../p0circuit/experiments/paper/c05_structure.py) being alone suffices, and is needed | reproduced | [02](02_recognition.ipynb) |
# | [C6](../p0circuit/experiments/paper/c06_amplification.py) amplification by MLPs 0 and 1, by few neurons | **not reproduced** | [03](03_amplification.ipynb) |
# | [C7](../p0circuit/experiments/paper/c07_causal_path.py) the path: blocks 0 and 1, then the keys | reproduced | [04](04_patching_the_circuit.ipynb) |
# | [C8](../p0circuit/experiments/paper/c08_direction_or_norm.py) direction, not norm | reproduced | [03](03_amplification.ipynb) |
# | [C9](../p0circuit/experiments/paper/c09_content.py) content is irrelevant | reproduced | [03](03_amplification.ipynb) |
# | [C10](../p0circuit/experiments/paper/c10_key_side.py) it is the key, whatever the query | reproduced | [04](04_patching_the_circuit.ipynb) |
# | [C11](../p0circuit/experiments/paper/c11_limits.py) one repeated token breaks it | reproduced | [01](01_meet_the_sink.ipynb) |
# | [C12](../p0circuit/experiments/paper/c12_function.py) hiding P0 costs loss | reproduced | [90](90_paper_figures.ipynb) |
# | [C13](../p0circuit/experiments/training/c13_early.py) the sink forms early in training | **not reproduced** | [06](06_emergence.ipynb) |
# | [C14](../p0circuit/experiments/training/c14_concentration.py) it concentrates in blocks 0 and 1 | **not reproduced** | [06](06_emergence.ipynb) |
# | [C15](../p0circuit/experiments/training/c15_convergence.py) it tells how far training has come | **not reproduced** | [06](06_emergence.ipynb) |
# | [C16](../p0circuit/experiments/training/c16_methods.py) TNLM and Force-sink bring it earlier and higher | **not reproduced** | [06](06_emergence.ipynb) |
# | [C17](../p0circuit/experiments/deployment/c17_streaming.py) a cache must not drop P0 | reproduced | [08](08_practice.ipynb) |
# | [C18](../p0circuit/experiments/deployment/c18_quantisation.py) P0 kept in high precision halves the error of int8 | **not reproduced** | [08](08_practice.ipynb) |
# | [C19](../p0circuit/experiments/deployment/c19_dormant_heads.py) sink heads are dormant | **not reproduced** | [08](08_practice.ipynb) |
# | [C20](../p0circuit/experiments/deployment/c20_first_token.py) a neutral prefix takes the first token's power away | **not reproduced** | [08](08_practice.ipynb) |
#
# One thing to keep in mind: `p0-nano` was trained so that it would have a sink (half of its training rows begin with
# BOS and half with a random token, and nothing is predicted at P0; see
# [its card](../data/models/p0-nano/README.md)). That a sink *comes by itself* it cannot show. How a sink *works* it can.
#
# The last cell of every notebook prints its key figures.

# %%
page.key_figures(
    best_head=sink_map.metrics["best_head"].value,
    sink_rate=sink_map.metrics["sink_rate"].value,
    norm_ratio_after_block_1=norm_direction.metrics["norm_ratio_after_block_1"].value,
    p0_excess=panels["Position zero"]["as it is"].value,
    t_over_p0_when_alone=panels["Position 16"]["16 alone"].value
    / panels["Position zero"]["16 alone"].value,
    left_of_p0_by_mixing=panels["Position zero"]["P0 mixed"].value
    / panels["Position zero"]["as it is"].value,
)
