r"""
A small transformer language model
==================================

**Question.** Can predictive coding train a transformer, whose layers are attention, normalisation and
residual streams?

The text ships with Python: the reference manual that ``help()`` shows. The model predicts each
character from those before it. It has four items, and so three hidden beliefs, each about the
residual stream of all positions:

.. math::

   \mathrm{embed} \;|\; x + A(x) + M(x + A(x)) \;|\; x + A(x) + M(x + A(x)) \;|\; \mathrm{read\ out}

and Strict relaxes them on the energy

.. math::

   F(v) = \sum_{\mathrm{characters}} -\log p(\mathrm{character} \mid v_3)
          + \tfrac12 \sum_{l=1}^{3} \lVert f_l(v_{l-1}) - v_l \rVert^2 .

The loss *sums* over the characters, so that each of them weighs 1 against the errors of its own
positions; with a mean it would weigh the less the larger the batch is.
"""

import copy
import math
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from torch2pc import PCInfer

STEPS = 150  # short: 2
BATCH, CONTEXT, WIDTH = 8, 48, 64

text = "\n".join(topics[name] for name in sorted(topics))
letters = sorted(set(text))
codes = torch.tensor([letters.index(character) for character in text])
train_codes, test_codes = codes[: 9 * len(codes) // 10], codes[9 * len(codes) // 10 :]
print(f"{len(text)} characters, {len(letters)} different ones")


def batches(source: Tensor, count: int, seed: int):
    """``count`` pairs of stretches of the text, X and what follows each of its characters."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(source) - CONTEXT, (BATCH,), generator=generator)
        stretches = torch.stack([source[start : start + CONTEXT + 1] for start in starts])
        yield stretches[:, :-1], stretches[:, 1:]


# %%
# The model
# ---------
# One thing is made for predictive coding in it: the embeddings are three times as large as usual. Layer
# normalisation divides by the size of what it is given, so that the Jacobian of a block is closer to 1.
# Relaxation is stable only for eta below 2 over the energy's largest curvature, which
# grows as the square of the Jacobians; with embeddings of the usual size and eta = 0.1 the beliefs of
# this network blow up after some tens of steps.


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letter = nn.Embedding(len(letters), WIDTH)
        self.place = nn.Parameter(0.1 * torch.randn(CONTEXT, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * (self.letter(x) + self.place[: x.shape[1]])


class Block(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


torch.manual_seed(0)
start = nn.Sequential(
    Embedding(),
    Block(),
    Block(),
    nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(letters))),
)


def LossFun(logits: Tensor, Y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), Y.flatten(), reduction="sum")


# %%
# Training
# --------
# X holds integers: the first item is an embedding, and the input is clamped in any case. With
# eta = 0.1 and n = 12, 9% of the gradient arrives at the embedding, which is enough for Adam.


@torch.no_grad()
def bits_per_character(model: nn.Sequential) -> float:
    """On stretches of the part of the text that is not trained on."""
    losses = [LossFun(model(X), Y) for X, Y in batches(test_codes, 40, seed=1)]
    return (sum(losses) / (40 * BATCH * CONTEXT * math.log(2))).item()


def train(ErrType: str) -> tuple[list[float], nn.Sequential]:
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    bits = []
    for X, Y in batches(train_codes, STEPS, seed=0):
        result = PCInfer(model, LossFun, X, Y, ErrType, eta=0.1, n=12)
        optimizer.step()
        bits.append(result.Loss.item() / (Y.numel() * math.log(2)))
    return bits, model


frequencies = torch.bincount(train_codes).double() / len(train_codes)
entropy = -(frequencies * frequencies.clamp(min=1e-12).log2()).sum().item()
print(f"letters by their frequency alone: {entropy:.2f} bits a character")
figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
trained = {}
for ErrType, style in {"Exact": "-", "FixedPred": "--", "Strict": "-."}.items():
    bits, trained[ErrType] = train(ErrType)
    held_out = bits_per_character(trained[ErrType])
    print(f"{ErrType:10} {held_out:.2f} bits a character on the held-out text")
    axes.plot(torch.tensor(bits).unfold(0, min(10, STEPS), 1).mean(1), style, label=ErrType)
axes.axhline(entropy, color="0.6", linewidth=1, label="frequencies alone")
axes.set(xlabel="training step", ylabel="bits a character, mean over 10 steps")
axes.legend()
plt.show()

# %%
# What it writes
# --------------
# After so few steps not much: the lengths of words, and which letters follow which.


@torch.no_grad()
def continued(model: nn.Sequential, beginning: str, length: int) -> str:
    generator = torch.Generator().manual_seed(0)
    written = [letters.index(character) for character in beginning]
    for _ in range(length):
        logits = model(torch.tensor([written[-CONTEXT:]]))[0, -1]
        written.append(int(torch.multinomial((logits / 0.7).softmax(0), 1, generator=generator)))
    return "".join(letters[code] for code in written)


print(continued(trained["Strict"], "The ", 200))

# %%
# **Conclusion.** Attention, softmax and layer normalisation have displacement rules as ReLU has, and a
# residual block is a layer like any other. After
# as many steps, Exact and FixedPred are at 3.33 bits a character on the held-out text and Strict, whose
# loss is heavy enough to move its beliefs far, is at 3.44; and it pays n passes for each step. (The
# manual differs from one version of Python to the next, and the last digits with it.)
