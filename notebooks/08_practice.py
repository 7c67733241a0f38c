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
# # Practice: what should I do about it?
#
# Heads that look at the first token are no curiosity once a model is *used*: a cache that forgets its oldest tokens
# forgets P0 first, an int8 grid has to make room for its outlier, and whoever prunes heads or chooses a prompt meets it
# again. Here each of these is measured: four claims (thresholds fixed before), eight remedies side by side, and at the
# end one call that says it all for a model of yours. One of the four claims is reproduced on `p0-nano`, three are not; what
# comes out instead is told where it does.
#
# *About 15 minutes; one question. Before: [07](07_bring_your_own_model.ipynb). Everything here is measured with few
# prompts, to keep it short; `p0circuit reproduce p0-nano` takes eight times as many.*

# %% tags=["parameters"]
model = "p0-nano"  # a shipped model, a local Hugging Face directory, or a hub id
other = "bos-0"  # one more, for comparison at the end
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
import pandas as pd
import torch

from p0circuit.course.page import Page, open_model, print_advice, print_verdict, read_prompts

page = Page(out)
lm = open_model(model)
prompts = read_prompts(lm, samples, seed)

# %% [markdown]
# ## 1. A cache that forgets
#
# To generate without end a model keeps the keys and values of the last $W$ tokens only, and sooner or later P0 drops out
# of that window. For a head that gave it the share $p_0$ of its attention, what is left is scaled up: from
# $z = \sum_i p_i v_i$ to
#
# $$\tilde z = \sum_{i > 0} \frac{p_i}{1 - p_0}\, v_i = \frac{z - p_0 v_0}{1 - p_0} .$$
#
# A head with $p_0 = 0.55$, and little in $v_0$, now says the same more than twice as loud. It was never trained to. The
# remedy (Xiao et al., [arXiv 2309.17453](https://arxiv.org/abs/2309.17453)) is to keep the first tokens in the cache
# beside the window, whatever they say.
#
# The experiment decodes with a window of 16 tokens, rotary positions counted inside the cache, and keeps none, one, two
# or four first tokens. The claim is about what P0 is worth *beyond what any early token is worth*: of the first four
# tokens each is dropped in turn, with the other three kept.

# %%
from p0circuit.experiments import Streaming, StreamingConfig

streaming = Streaming(StreamingConfig(other_samples=16, long_tokens=4096)).run(lm, prompts)
page.show(streaming.figures["costs"], "what it costs to drop each of the first tokens")
page.show(streaming.figures["positions"], "loss by position, with and without first tokens")
print_verdict(streaming)

# %% [markdown]
# **Claim C17**, [`Streaming`](../p0circuit/experiments/deployment/c17_streaming.py): dropping P0 costs about ten times what dropping its
# neighbours costs. Keeping that one token makes up for most of what the first four do. Keeping position 8 instead, an early
# token like any other, gains little.
#
# A window still costs more than full attention on rows of 64 tokens: there are things in the text that one has to have
# read. On the longer rows (right) it is the other way round. `p0-nano` was trained on 128 tokens, and behind that full
# attention breaks down while the window goes on. There, with a window four times as wide, the kept tokens are hardly worth
# anything: what they are worth is a matter of the window, too.
#
# ## 2. Int8 and the outlier
#
# Eight bits have 255 values. One grid for a whole tensor $X$, here one row of text at a time, is as coarse as its largest
# entry demands,
#
# $$\Delta = \frac{\max |X|}{127}, \qquad \hat x = \Delta \, \mathrm{round}(x / \Delta), \qquad \mathbb{E}(\hat x - x)^2 \approx \frac{\Delta^2}{12} ,$$
#
# and if that entry belongs to P0 all others pay for it. By hand, for the hidden layers of the MLPs: the relative error at
# all positions *but P0*, with P0 in the tensor and with P0 left out of it (kept in high precision).

# %%
half = prompts.split()[1]
names = [f"blocks.{layer}.mlp.hook_post" for layer in range(lm.cfg.n_layers)]
with torch.no_grad():
    _, cache = lm.run_with_cache(half.ids, names_filter=names)


def int8_error(x, largest):
    """The relative error of rows x [batch, pos, d], each on a grid that ends at its largest value [batch]."""
    grid = largest[:, None, None] / 127
    rounded = grid * (x / grid).round()
    return float(((rounded - x).norm(dim=(1, 2)) / x.norm(dim=(1, 2))).mean())


rows = []
for layer, name in enumerate(names):
    whole, others = cache[name], cache[name][:, 1:]  # without P0
    peak, peak_of_others = whole.abs().amax((1, 2)), others.abs().amax((1, 2))
    row = layer, float((peak / peak_of_others).mean())
    rows.append((*row, int8_error(others, peak), int8_error(others, peak_of_others)))
columns = ["MLP", "grid is coarser by", "error with P0 in", "with P0 kept out"]
by_hand = pd.DataFrame(rows, columns=columns)
page.show(by_hand)

# %% [markdown]
# In block 0 P0 does no harm. In the block whose MLP writes the outlier (notebook [03](03_amplification.ipynb)) the hidden
# layer at P0 is nine times larger than anywhere else, and the other positions are off by 0.4 of their size; without P0 by
# less than a tenth of it. Now for the inputs of all matrix products, and what that does to the loss:

# %% tags=["cover"]
from p0circuit.experiments import Quantisation, QuantisationConfig

quantisation = Quantisation(QuantisationConfig(samples=64)).run(lm, prompts)
page.show(quantisation.figures["inputs"], "error of int8 inputs by block, P0 in and kept")
page.show(quantisation.figures["loss"], "what int8 adds to the loss")
print_verdict(quantisation)

# %% [markdown]
# **Claim C18**, [`Quantisation`](../p0circuit/experiments/deployment/c18_quantisation.py), is a close call: with P0 kept in high precision
# about half of the error is left, where it was asked that *at most* half is left beyond doubt. (`p0circuit
# reproduce p0-nano` has 0.54, on other text.) The mean is over all inputs, and three blocks of four have no outlier to speak
# of. In use the gain is larger: five sixths of the loss that int8 adds are gone. The cheapest cure is another one, though:
# **one grid per token**, so that nobody pays for P0. Another position kept in high precision (the control) does nothing.
#
# All that is about grids that are made for the row at hand. A grid that was *calibrated*, on other rows and for good, adds
# twice the loss (last two lines of the figure), and keeping P0 takes only a third of that away: in a few texts the second
# token is as large as P0, and the grid has to hold it. This was added after the verdict and has no part in it.
#
# ## 3. Are sink heads dormant?
#
# If a head gives all of its attention to P0, and P0 says nothing ($v_0 \approx 0$), then $z = p_0 v_0 + \dots \approx 0$: the
# head rests, and may as well be cut. In large models some heads can be (Sandoval-Segura et al.,
# [arXiv 2504.03889](https://arxiv.org/abs/2504.03889)). The test: zero heads one after the other, the strongest sink
# first, and see how many can go before the loss has grown by 1 %. Beside it random orders, and the order of how little a
# head writes.

# %%
from p0circuit.experiments import DormantHeads, DormantHeadsConfig

config = DormantHeadsConfig(samples=32, domain_samples=16, domain_orders=2)
dormant = DormantHeads(config).run(lm, prompts)
page.show(dormant.figures["curves"], "loss with heads zeroed in three orders")
print_verdict(dormant)

# %% [markdown]
# **Claim C19**, [`DormantHeads`](../p0circuit/experiments/deployment/c19_dormant_heads.py), fails clearly. The strongest sink head is the
# *wrong* one to cut: without it the loss grows by several per cent. About half of its attention goes elsewhere, and that is
# what it lives on; a mean over prompts of about half is not rest but a head that works half of the time. And a model of 16
# heads has none to spare: no order gets as far as a second head. Do not prune by sink score before you have measured.
#
# ## 4. Does it matter what stands first?
#
# Put other tokens in the first place of a text, and look at what happens to the loss of predictions at least eight
# positions later, $\ell(x)$ for the token $x$. Their spread is
#
# $$\sigma = \sqrt{\operatorname{Var}_x \, \ell(x)} , \qquad \text{spread left} = \frac{\sigma_\text{behind a prefix}}{\sigma_\text{without}} .$$
#
# The idea of the claim: whatever stands first is turned into the register, with consequences for everybody; a neutral
# token in front (a newline, BOS, or a vector trained for it) takes that job, and the text's own tokens are all alike.

# %%
from p0circuit.experiments import FirstToken, FirstTokenConfig

first_token = FirstToken(FirstTokenConfig(samples=32)).run(lm, prompts)
page.show(first_token.figures["spread"], "spread of the loss over first tokens, by prefix")
page.show(first_token.figures["recall"], "recall of tokens by where they stood")
print_verdict(first_token)

# %% [markdown]
# **Claim C20**, [`FirstToken`](../p0circuit/experiments/deployment/c20_first_token.py), comes out the wrong way round: behind a prefix
# the spread *grows*. What the claim overlooks is the other half of the job: P0 forgets what it was. Without a prefix the
# first token becomes "first", and which token it was hardly reaches anybody. Behind a prefix it is a token like any other
# and has its content back, with its effect on what follows.
#
# The second figure shows that from the other side. Tokens at the very start are **recalled worse** than tokens in the
# middle, by more than a nat each; with a prefix, and most of all with BOS, much of that difference is gone. So a prefix
# *does* help, if not with what the claim says: it gives the first word of the text back to the text.
#
# ### Question 8.1
#
# Is the sensitivity to the first token special at all, or would any token do as much?
#
# <details>
# <summary>Answer 8.1</summary>
#
# ```python
# print(first_token.metrics["spread_of_first_over_middle_token"])
# ```
#
# About 1.2: a token in the middle, varied in the same way and seen from the same distance, makes nearly the same spread.
# On this model what stands first has no special power over the loss of others.
#
# </details>
#
# ## 5. Mitigations, side by side
#
# What can be done without training, on the same rows: put something in front; hide P0's key from the sink heads, or zero
# its value; give the softmax somewhere else to go, an extra logit of zero,
#
# $$p_i = \frac{e^{s_i}}{1 + \sum_j e^{s_j}} ;$$
#
# or let the cache forget, with and without the first tokens kept.

# %%
from p0circuit.experiments import Mitigations, MitigationsConfig

config = MitigationsConfig(samples=32, int8_samples=16, spread_samples=16)
remedies = Mitigations(config).run(lm, prompts)
page.show(
    remedies.figures["side-by-side"], "eight remedies and what becomes of five quantities"
)

# %% [markdown]
# Read it by rows ([`Mitigations`](../p0circuit/experiments/deployment/mitigations.py)):
#
# - **P0's value zeroed** changes nearly nothing, **P0's key hidden** costs loss. What P0 *says* does not matter, that
#   attention can *go* there does.
# - **An extra zero logit** in the sink heads does nothing to a trained model: a 1 more in a sum that is large already. In
#   *all* heads it takes the outlier away, and half of the int8 error, for some loss and about four times the spread.
# - **A register** in front, trained in seconds on the frozen model, is the only one with less loss *and* a smaller outlier
#   here. One that was trained on another text (the table in the [README](../README.md)) kept the outlier: see what it does
#   on yours.
# - **A window** costs, and more than half of that is made up for by keeping four tokens.
#
# ## 6. Advice
#
# All of it in one call: `p0circuit.advise(model, prompts)`, or `p0circuit advise MODEL --text FILE` in a shell. Every
# answer has its interval, and where the interval is on both sides of a limit the answer is "cannot tell": one first token may
# be enough for a window, and since it may as well not be, the answer is the next number that is.

# %%
from p0circuit import advise

advice = advise(lm, prompts)
print_advice(advice)

# %% [markdown]
# And a model whose sink hangs on BOS, as notebook [06](06_emergence.ipynb) found out: all of its training rows began
# with it.

# %%
lm_other = open_model(other)
advice_other = advise(lm_other, read_prompts(lm_other, samples, seed))
answers = {
    found.model: {one.topic: one.verdict for one in found.statements[1:]}
    for found in (advice, advice_other)
}
page.show(pd.DataFrame(answers).rename_axis("question").reset_index())
on_bos = next(one for one in advice_other.statements if "BOS" in one.topic)
print(f"{on_bos.topic} {on_bos.text}")
print("->", on_bos.advice)

# %% [markdown]
# So, in short:
#
# - Keep the first tokens in every cache. It costs a few cache entries.
# - Give a model the BOS it was trained with, before every text and every chunk of a long one.
# - In int8 use a grid per token, or keep P0 in high precision.
# - Prune no head because it looks at P0.
# - And measure: the answers of two models of the same size, corpus and tokenizer differ.

# %%
page.key_figures(
    dropping_p0_beyond_5_times_another=streaming.metrics[
        "dropping_p0_beyond_5_times_another"
    ].value,
    int8_error_by_hand=by_hand["error with P0 in"].max(),
    error_left_with_p0_kept=quantisation.metrics["error_left_with_p0_kept"].value,
    heads_in_sink_order=dormant.metrics["heads_in_sink_order"].value,
    spread_left_with_neutral_prefix=first_token.metrics[
        "spread_left_with_neutral_prefix"
    ].value,
    loss_added_by_hiding_p0=remedies.metrics["loss_added_by_p0s_key_hidden"].value,
    loss_without_sink=advice.loss_without_sink.value if advice.loss_without_sink else 0.0,
    hangs_on_bos=float(advice.bos_dependent is True),
    other_hangs_on_bos=float(advice_other.bos_dependent is True),
)
