"""What compression costs: codecs alone, chosen together, in series, and ternary training.

    python -m benchmarks.compression --model FOLDER [--only matrix alone portfolio serial shrunk qat] [--seeds 0 1 2]

Rows go into compression.jsonl, and the page is written from them. Matrix: W of N(0, 1), 768 × 768, and H with a
spectrum of 1 / n; proxy is tr(E H Eᵀ) / tr(W H Wᵀ). Alone: one codec on all weights of the model, embedding included.
Portfolio: `forge-fit compress` with its default codecs. Both are judged by the loss on blocks of 256 tokens of packages
that the model has not seen (rich, networkx, click, jsonargparse, json, collections), with statistics from 64 blocks of
other packages. Serial: the chain of four codecs on one matrix. Shrunk: no codec, all weights of the blocks times one
number. QAT: 100 steps of 8 × 256 tokens of the standard library
with AdamW, learning rate 5e-4, with `TernaryQAT`'s forward pass and without.
"""

import argparse
import math
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import FOLDER, cpu_name, interval, keep, of_rows, stored, table
from forge_lightning.compression.codecs import (
    GPTQ,
    VPTQ,
    Codec,
    EntropyGPTQ,
    Hyper,
    Packed,
    RoundToNearest,
    SeedLM,
    Ternary,
    decode,
    in_series,
    proxy_error,
    relative_error,
)
from forge_lightning.compression.compressor import Compressor, Data, Stage, sequence_losses
from forge_lightning.compression.gate import Gate, upper_bound
from forge_lightning.compression.ternary_forward import TernaryForward

ROWS, OUT = FOLDER / "compression.jsonl", FOLDER / "compression.md"
STANDARD, INSTALLED = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
HELD_OUT = [*(INSTALLED / name for name in ("rich", "networkx", "click", "jsonargparse")),
            *(STANDARD / name for name in ("json", "collections"))]  # fmt: skip
_OTHERS = (
    "lm_eval sacrebleu jedi nltk pip wandb sympy narwhals pydantic tornado numba scipy sphinx mpmath pyarrow requests"
)
CALIBRATION = [INSTALLED / name for name in _OTHERS.split()]
TRAINING = [STANDARD / name for name in ("json", "http", "email", "logging", "unittest", "asyncio")]
LENGTH = 256

_ALONE: list[Codec] = [
    EntropyGPTQ(3.0),
    EntropyGPTQ(4.0),
    GPTQ(3, 128),
    GPTQ(4, 128),
    RoundToNearest(3, 128),
    RoundToNearest(4, 128),
    VPTQ(2, 64),
    VPTQ(2, 16, 16),
    Hyper(128),
    Ternary(),
    SeedLM(4),
]


def blocks(model: str, folders: list[Path], number: int) -> Tensor:
    """Blocks of tokens, as many of each folder, spread over its files."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    each, found = math.ceil(number / len(folders)), []
    for folder in folders:
        ids: list[int] = []
        for path in sorted(folder.rglob("*.py")):
            if "/test" not in str(path.relative_to(folder)):
                text = path.read_text(errors="ignore")
                ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if len(ids) > 3 * each * LENGTH:
                break
        rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH], dtype=torch.long).view(-1, LENGTH)
        found.append(rows[:: max(1, len(rows) // each)][:each])
    return torch.cat(found)[:number]


def batches(rows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in rows.split(8)]


def network(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def data(model: str) -> Data:
    held = blocks(model, HELD_OUT, 192)
    tuning = held[0::3]
    judged = torch.cat([held[1::3], held[2::3]])
    return Data(batches(blocks(model, CALIBRATION, 64)), batches(tuning), batches(judged))


def matrix() -> None:
    weight = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(torch.randn(768, 768, generator=torch.Generator().manual_seed(1))).Q
    hessian = basis @ torch.diag(1 / torch.arange(1.0, 769)) @ basis.T
    whole = proxy_error(weight, torch.zeros_like(weight), hessian)
    others = [EntropyGPTQ(2.0), EntropyGPTQ(5.0), GPTQ(2, 128), GPTQ(5, 128), VPTQ(4, 256), VPTQ(4, 256, 256)]
    codecs = [*_ALONE, *others, Hyper(256), Hyper(128, entropy=False), SeedLM(3)]
    for codec in codecs:
        begun = time.process_time()
        packed = codec.encode(weight, hessian)
        encoded = time.process_time()
        decoded = decode(packed)
        row = {"encode": encoded - begun, "decode": time.process_time() - encoded}
        row |= {"bits": packed.bits_per_weight, "relative": relative_error(weight, decoded)}
        keep(
            ROWS,
            {"part": "matrix", "codec": codec.label, "proxy": proxy_error(weight, decoded, hessian) / whole, **row},
        )


def alone(model: str) -> None:
    given = data(model)
    work = Compressor(network(model), given, None)
    before = sequence_losses(work.model, given.held_out)
    work.run([Stage(codecs=_ALONE)])
    tensors = work.stages[-1]["tensors"]
    for place, codec in enumerate(_ALONE):
        rows = {name: row["candidates"][place] for name, row in tensors.items()}
        for name, row in rows.items():
            work.matrices[name].write(decode(work._memory[0, name, place]))
            assert row["codec"] == codec.label
        difference = sequence_losses(work.model, given.held_out) - before
        count = sum(work.matrices[name].param.numel() for name in rows)
        row = {"bits": 8 * sum(each["num_bytes"] for each in rows.values()) / count}
        row |= {"expected": sum(each["expected_loss"] for each in rows.values())}
        row |= {"loss": float(difference.mean()), "upper": upper_bound(difference)}
        spent = sum(each["cpu_seconds"] for each in rows.values())
        keep(ROWS, {"part": "alone", "codec": codec.label, "cpu": spent, **row})


def portfolio(model: str) -> None:
    given = data(model)
    with tempfile.TemporaryDirectory() as folder:  # what is encoded once is read again
        for rise, bits in ((0.02, None), (0.005, None), (None, 3.2)):
            begun = time.process_time()
            work = Compressor(network(model), given, Gate(max_rel_ppl=rise or 0.02), folder=Path(folder))
            accepted = work.run([Stage(target_bits=bits)])
            what = f"{bits} bits" if bits else f"perplexity + {rise:.1%}"
            _keep_portfolio(work, what, accepted, time.process_time() - begun)


def _keep_portfolio(work: Compressor, what: str, accepted: bool, spent: float) -> None:
    stage = work.stages[-1]
    bits = stage["bits_per_weight"]
    small = work.num_weights - sum(work.matrices[name].param.numel() for name in stage["tensors"])
    whole = (bits * (work.num_weights - small) + 16 * small) / work.num_weights
    verdict = stage["verdict"]
    row = {"budget": what, "accepted": accepted, "bits": whole, "loss": verdict["mean"], "upper": verdict["upper"]}
    keep(ROWS, {"part": "portfolio", "cpu": spent, **row})


def serial(model: str) -> None:
    given = data(model)
    work = Compressor(network(model), given, None)
    name = "model.layers.3.mlp.up_proj.weight"
    known = work._statistics([work.matrices[name]])[name]
    weight = work.matrices[name].read()
    whole = known.error(weight, torch.zeros_like(weight))
    vptq, lattice = VPTQ(2, 16, 16), Hyper(256, entropy=False)
    chains: dict[str, list[Codec]] = {
        "VPTQ": [vptq],
        "SeedLM, VPTQ": [SeedLM(4), vptq],
        "SeedLM, VPTQ, Hyper": [SeedLM(4), vptq, lattice],
        "Ternary": [Ternary()],
        "Ternary, SeedLM, VPTQ, Hyper": [Ternary(), SeedLM(4), vptq, lattice],
        "EntropyGPTQ": [EntropyGPTQ(4.0)],
    }
    for what, codecs in chains.items():
        packed: Packed = in_series(codecs, weight, known.hessian, known.row_weights)
        decoded = decode(packed)
        row = {"bits": packed.bits_per_weight, "relative": relative_error(weight, decoded)}
        keep(ROWS, {"part": "serial", "chain": what, "proxy": known.error(weight, decoded) / whole, **row})


def shrunk(model: str) -> None:
    texts = {"unseen packages": data(model).held_out, "standard library": batches(blocks(model, TRAINING, 64))}
    changed = network(model)
    weights = [part.weight for part in changed.model.layers.modules() if isinstance(part, torch.nn.Linear)]
    originals = [weight.detach().clone() for weight in weights]
    before = {name: sequence_losses(changed, text) for name, text in texts.items()}
    for factor in (0.98, 0.95, 0.9):
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(factor * original)
        for name, text in texts.items():
            difference = float((sequence_losses(changed, text) - before[name]).mean())
            keep(ROWS, {"part": "shrunk", "factor": factor, "text": name, "loss": difference})


def qat(model: str, seeds: list[int], steps: int = 100) -> None:
    rows = blocks(model, TRAINING, 1800)
    held_out = data(model).held_out
    for seed in seeds:
        for is_ternary in (False, True):
            trained = network(model)
            before = float(sequence_losses(trained, held_out).mean())
            if is_ternary:
                share = torch.ones(())
                for layer in trained.model.layers.modules():
                    if isinstance(layer, torch.nn.Linear):
                        vars(layer)["forward"] = TernaryForward(layer, share, 8)
            untrained = float(sequence_losses(trained, held_out).mean())
            begun = time.process_time()
            _train(trained, rows, seed, steps)
            row = {"seed": seed, "ternary": is_ternary, "before": before, "untrained": untrained, "steps": steps}
            spent = time.process_time() - begun
            keep(ROWS, {"part": "qat", "after": float(sequence_losses(trained, held_out).mean()), "cpu": spent, **row})


def _train(model: Any, rows: Tensor, seed: int, steps: int) -> None:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1.0, (step + 1) / 10)
        batch = rows[order[[(8 * step + place) % len(rows) for place in range(8)]]]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def report() -> None:
    rows = stored(ROWS)
    names = ("matrix", "alone", "portfolio", "serial", "shrunk", "qat")
    parts = {name: [row for row in rows if row["part"] == name] for name in names}
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    head = of_rows("python -m benchmarks.compression --model FOLDER", rows)
    text = [f"# What compression costs\n\n{head}\n{about}\n", "## One matrix\n"]
    columns = ["codec", "bits a weight", "relative error", "proxy", "encode, CPU s", "decode, CPU ms"]
    text.append(table(columns, [_matrix_line(row) for row in sorted(parts["matrix"], key=_bits)]))
    text.append("## One codec on the whole model\n")
    columns = ["codec", "bits a weight", "rise of the loss, nats", "95 % bound", "expected", "CPU s"]
    text.append(table(columns, [_alone_line(row) for row in sorted(parts["alone"], key=_bits)]))
    text.append("## The default portfolio\n")
    text.append("A budget of loss is its own gate; one of bits has a gate of 2 %. Only the first run encodes.\n")
    columns = ["budget", "gate", "bits a parameter", "rise of the loss, nats", "95 % bound", "perplexity", "CPU s"]
    text.append(table(columns, [_portfolio_line(row) for row in parts["portfolio"]]))
    text.append("## In series\n\nOne matrix, `model.layers.3.mlp.up_proj`.\n")
    lines = [
        [row["chain"], f"{row['bits']:.2f}", f"{row['relative']:.3f}", f"{row['proxy']:.5f}"] for row in parts["serial"]
    ]
    text.append(table(["chain", "bits a weight", "relative error", "proxy"], lines))
    text.append("## Shrunk weights, without a codec\n")
    lines = [[f"{row['factor']}", row["text"], f"{row['loss']:+.4f}"] for row in parts["shrunk"]]
    text.append(table(["factor", "text", "rise of the loss, nats"], lines))
    text.append("## Ternary training\n")
    columns = ["training", "loss without training", f"after {parts['qat'][0]['steps']} steps", "CPU s", "seeds"]
    lines = []
    for is_ternary, name in ((False, "plain"), (True, "ternary")):
        found = [row for row in parts["qat"] if row["ternary"] == is_ternary]
        after, spent = [row["after"] for row in found], sum(row["cpu"] for row in found) / len(found)
        lines.append([name, f"{found[0]['untrained']:.3f}", interval(after), f"{spent:.0f}", str(len(found))])
    text.append(table(columns, lines))
    OUT.write_text("\n".join(text))


def _bits(row: dict[str, Any]) -> float:
    return float(row["bits"])


def _matrix_line(row: dict[str, Any]) -> list[str]:
    errors = [f"{row['bits']:.3f}", f"{row['relative']:.4f}", f"{row['proxy']:.5f}"]
    return [f"`{row['codec']}`", *errors, f"{row['encode']:.1f}", f"{1000 * row['decode']:.0f}"]


def _alone_line(row: dict[str, Any]) -> list[str]:
    losses = [f"{row[name]:.4f}" for name in ("loss", "upper", "expected")]
    return [f"`{row['codec']}`", f"{row['bits']:.3f}", *losses, f"{row['cpu']:.0f}"]


def _portfolio_line(row: dict[str, Any]) -> list[str]:
    gate = "accepted" if row["accepted"] else "refused"
    losses = [f"{row['loss']:.4f}", f"{row['upper']:.4f}", f"{math.expm1(row['upper']):+.2%}"]
    return [row["budget"], gate, f"{row['bits']:.2f}", *losses, f"{row['cpu']:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model of Python")
    parser.add_argument("--only", nargs="*", default=["matrix", "alone", "portfolio", "serial", "shrunk", "qat"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(cpu_name())
    runs = {
        "matrix": matrix,
        "alone": lambda: alone(args.model),
        "portfolio": lambda: portfolio(args.model),
        "serial": lambda: serial(args.model),
        "shrunk": lambda: shrunk(args.model),
        "qat": lambda: qat(args.model, args.seeds),
    }
    for part in args.only:
        runs[part]()
    report()


if __name__ == "__main__":
    main()
