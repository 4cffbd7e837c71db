"""Train a small byte-level language model whose only mixer of positions is a layer that `chunkc build` emitted.

    chunkc build specs/gated_linear_attention.spec -o build/demo
    python examples/train_bytes.py

The text is what every Python has: the standard library's sources and the topics of `help()`. Whole files are held out.
Passes (exit code 0) if the model's loss on them is below that of a bigram model counted on the training text, and if
the emitted `step()` gives what the parallel form gives.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256
LENGTH = 128  # bytes in a training sequence
HELD_OUT = 20  # one file in so many is held out
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
NATS_TO_BITS = 1 / math.log(2)


def corpus() -> tuple[Tensor, Tensor]:
    """The training and the held-out bytes, split by whole files and topics."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in root.rglob("*.py") if not LEFT_OUT.intersection(p.relative_to(root).parts))
    texts = [p.read_bytes() for p in paths if not p.name.startswith("_sysconfigdata")]
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    texts += [topics[name].encode() for name in sorted(topics)]
    held = b"".join(texts[HELD_OUT // 2 :: HELD_OUT])
    train = b"".join(text for n, text in enumerate(texts) if n % HELD_OUT != HELD_OUT // 2)
    return as_tensor(train), as_tensor(held)


def as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes [N, LENGTH] from each start, and the byte after each of them."""
    at = starts[:, None] + torch.arange(LENGTH + 1)
    found = text[at].long()
    return found[:, :-1], found[:, 1:]


def spread(text: Tensor, count: int) -> Tensor:
    """Starts of `count` windows, evenly spaced over the text."""
    return torch.linspace(0, len(text) - LENGTH - 1, count, dtype=torch.float64).long()


def counted_bits(train: Tensor, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Bits a byte that a unigram and a bigram model, counted on `train`, take for each `y` after its `x`."""
    pairs = train[:-1].long() * BYTES + train[1:].long()
    counts = torch.bincount(pairs, minlength=BYTES * BYTES).double().view(BYTES, BYTES)
    unigram = (counts.sum(0) + 1) / (counts.sum() + BYTES)
    bigram = (counts + unigram) / (counts.sum(1, keepdim=True) + 1)  # a pair never seen falls back to the unigram
    return -unigram[y].log2().mean().item(), -bigram[x, y].log2().mean().item()


class Block(nn.Module):
    """The emitted layer, then a map of each position by itself; both residual, both after a norm."""

    mixer: Any

    def __init__(self, mixer: nn.Module, d_model: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.before_mixer = nn.RMSNorm(d_model)
        self.each = nn.Sequential(
            nn.RMSNorm(d_model), nn.Linear(d_model, 2 * d_model), nn.GELU(), nn.Linear(2 * d_model, d_model)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.before_mixer(x))
        y: Tensor = x + self.each(x)
        return y

    def read(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Many positions in parallel, from a state to a state."""
        y, state = self.mixer(self.before_mixer(x), state=state)
        x = x + y
        return x + self.each(x), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One position."""
        y, state = self.mixer.step(self.before_mixer(x), state)
        x = x + y
        return x + self.each(x), state


class ByteModel(nn.Module):
    """Bytes [B, T] to scores of the next byte [B, T, 256]. Nothing but the mixers sees more than one position."""

    def __init__(self, mixer: Any, d_model: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, d_model)
        self.blocks = [Block(mixer(d_model=d_model, heads=4), d_model) for _ in range(layers)]
        self.weights = nn.ModuleList(self.blocks)  # so that PyTorch finds them
        self.head = nn.Sequential(nn.RMSNorm(d_model), nn.Linear(d_model, BYTES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x)
        return scores

    def init_state(self, batch: int) -> list[Any]:
        return [block.mixer.init_state(batch) for block in self.blocks]

    def read(self, x: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        return self._through("read", x, states)

    def step(self, x: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """One byte of each sequence [B] to scores [B, 256] and the next states."""
        return self._through("step", x, states)

    def _through(self, verb: str, x: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        x = self.embed(x)
        after = []
        for block, state in zip(self.blocks, states):
            x, state = getattr(block, verb)(x, state)
            after.append(state)
        return self.head(x), after


class Progress:
    """One line on a terminal, redrawn; elsewhere a plain line for every tenth of the way."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.shown = -1

    def show(self, done: float, text: str) -> None:
        if self.live:
            bar = "#" * round(24 * done)
            self.stream.write(f"\r[{bar:.<24}] {done:4.0%}  {text}\x1b[K" + ("\n" if done >= 1 else ""))
        elif int(10 * done) > self.shown:
            self.shown = int(10 * done)
            self.stream.write(f"{done:4.0%}  {text}\n")
        self.stream.flush()


@torch.no_grad()
def held_out_bits(model: ByteModel, x: Tensor, y: Tensor) -> float:
    batches = zip(torch.split(x, 32), torch.split(y, 32))
    losses = [F.cross_entropy(model(a).flatten(0, 1), b.flatten()) * len(a) for a, b in batches]
    return float(torch.stack(losses).sum()) / len(x) * NATS_TO_BITS


def train(
    model: ByteModel, text: Tensor, held: tuple[Tensor, Tensor], batch: int, seconds: float, device: torch.device
) -> list[tuple[int, float, float]]:
    """Train for so many seconds; (step, training bits, held-out bits), measured every twentieth of the way."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    chance = torch.Generator().manual_seed(0)
    few = held[0][:: len(held[0]) // 64], held[1][:: len(held[1]) // 64]
    progress = Progress(sys.stderr)
    curve: list[tuple[int, float, float]] = []
    recent: list[Tensor] = []
    step, done, start = 0, 0.0, time.perf_counter()
    while done < 1:
        for group in optimizer.param_groups:  # warm up, then half a cosine down, by the clock
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        x, y = windows(text, torch.randint(len(text) - LENGTH, (batch,), generator=chance))
        loss = F.cross_entropy(model(x.to(device)).flatten(0, 1), y.to(device).flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent.append(loss.detach())
        if len(recent) == 8:  # also bounds how far the clock may run ahead of a GPU
            bits = torch.stack(recent).mean().item() * NATS_TO_BITS
            recent.clear()
            if not math.isfinite(bits):
                raise SystemExit(f"failed: the loss is {bits} at step {step}")
            done = min(1.0, (time.perf_counter() - start) / seconds)
            if done * 20 >= len(curve):
                curve.append((step, bits, held_out_bits(model, *few)))
            left = max(0.0, seconds * (1 - done))
            progress.show(done, f"step {step}  {bits:.2f} bits/byte  held out {curve[-1][2]:.2f}  {left:.0f} s left")
    return curve


@torch.no_grad()
def step_difference(model: ByteModel, x: Tensor) -> float:
    """The largest difference between the scores by `step()` and those in parallel, as a share of the largest score."""
    parallel = model(x)
    states = model.init_state(len(x))
    scores = []
    for t in range(x.shape[1]):
        score, states = model.step(x[:, t], states)
        scores.append(score)
    return float((torch.stack(scores, 1) - parallel).abs().max() / parallel.abs().max())


@torch.no_grad()
def sample(model: ByteModel, prompt: bytes, length: int, device: torch.device) -> str:
    """The prompt, read in parallel, and so many bytes more, one `step()` each."""
    chance = torch.Generator().manual_seed(0)
    scores, states = model.read(as_tensor(prompt).long()[None].to(device), model.init_state(1))
    score = scores[:, -1]
    found = bytearray(prompt)
    for _ in range(length):
        byte = torch.multinomial((score / 0.7).softmax(-1).cpu(), 1, generator=chance)[:, 0]
        found.append(int(byte))
        score, states = model.step(byte.to(device), states)
    return "".join(chr(byte) if 32 <= byte < 127 or byte == 10 else "?" for byte in found)  # no control codes


def plot(curve: Sequence[tuple[int, float, float]], lines: dict[str, float], path: Path) -> bool:
    """The loss curve as a PNG; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    steps = [step for step, _, _ in curve]
    axes.plot(steps, [bits for _, bits, _ in curve], label="training")
    axes.plot(steps, [bits for _, _, bits in curve], label="held out")
    for name, bits in lines.items():
        axes.axhline(bits, color="grey", linestyle="--" if name == "bigram" else ":", label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="bits/byte", ylim=(0, max(*lines.values()) + 0.5))
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="how long to train (%(default)g)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s here")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="holds the package; takes loss.png")
    options = parser.parse_args()
    if not options.seconds > 0:
        parser.error("--seconds must be positive")
    device = torch.device(options.device)

    sys.path.insert(0, str(options.out.resolve()))
    mixer = importlib.import_module("gated_linear_attention").GatedLinearAttention
    torch.manual_seed(0)
    text, held_text = corpus()
    x, y = windows(held_text, spread(held_text, 512))
    unigram, bigram = counted_bits(text, x, y)
    model = ByteModel(mixer, d_model=128, layers=2).to(device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(text) / 1e6:.1f} MB to train on, {len(held_text) / 1e6:.1f} MB held out; {size:,} weights; {device}")

    held = x.to(device), y.to(device)
    batch = 8 if device.type == "cpu" else 64
    curve = train(model, text, held, batch, options.seconds, device)
    model.eval()
    bits = held_out_bits(model, *held)
    difference = step_difference(model, held[0][:4])
    allowed = 1e-3 if device.type == "cpu" else 2e-2
    print(f"\n{sample(model, b'def ', 400, device)}\n")

    print(f"held-out bits/byte: unigram {unigram:.3f}, bigram {bigram:.3f}, this model {bits:.3f}")
    print(f"step by step against parallel: {difference:.1e} of the largest score (at most {allowed:.0e})")
    picture = options.out / "loss.png"
    drawn = plot(curve, {"unigram": unigram, "bigram": bigram}, picture)
    print(f"loss curve: {picture}" if drawn else "no loss curve: matplotlib is not installed")
    failed = []
    if not bits < bigram:
        failed.append("the model does not beat the bigram model")
    if not difference <= allowed:
        failed.append("step() and the parallel form differ")
    for reason in failed:
        print(f"failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
