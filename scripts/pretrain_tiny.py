"""Make `iapt/tiny`: the tokenizer and the small Llama that the default run (`backbone=tiny`) adapts.

What: a byte-level BPE tokenizer in which every word of the toy world is one token, and a LlamaForCausalLM of about
three quarters of a million parameters, pretrained on the instructed tasks of `scripts/tiny_corpus.py`, which are
made as they are used.

How it gets there on a CPU: the loss is weighted to the answers (the words of a random world cannot be predicted,
only read), the lexicon comes before the texts and comparing before inverting, many questions share a text, and Muon
trains the matrices. Comparing appears late and at once, so the probe accuracies are printed, not the loss alone. One
document is one sequence: nothing is packed, so that what stands before a text is never another document. Positions
need no random start: rotary attention sees distances only.

How to run (on a GPU, bf16 autocast is used):

    python scripts/pretrain_tiny.py --out iapt/tiny --minutes 28 --threads 1

`--minutes` ends a run by the clock, with the learning rate and the curriculum following the clock; with `--steps`
instead, a run is repeatable. Every `--save-minutes` the folder is replaced by the current weights. The last thing
printed is what `iapt/tiny/TRAINING.md` records.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `iapt` and this folder, from any checkout
import tiny_corpus

PAD, EOS = "<pad>", "<eos>"
# How many of the tokens outside answers enter the loss, and with what weight.
OTHER_KEPT, OTHER_WEIGHT = 0.1, 0.1


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with pad and eos and no bos; `add_special_tokens` adds nothing.

    `add_prefix_space`: the first word of a string is the same token as the same word inside a sentence.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(tiny_corpus.vocabulary(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


class Encoder:
    """Documents to (ids, is-answer) pairs; answers are the bracketed parts and the end."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, document: str) -> tuple[list[int], list[bool]]:
        """Token by token what the tokenizer makes of the document without its brackets."""
        ids: list[int] = []
        answer: list[bool] = []
        inside = False
        # A word takes the space before it along, as the byte-level pre-tokenizer has it.
        for piece in re.findall(r"\w+|[^\w\s]", document):
            if piece in "[]":
                inside = piece == "["
                continue
            if piece not in self.known:
                text = self.tokenizer.encode(piece) if piece.isalnum() else self.tokenizer.encode(f"a{piece}")[1:]
                self.known[piece] = text
            ids += self.known[piece]
            answer += [inside] * len(self.known[piece])
        return [*ids, self.tokenizer.eos_token_id], [*answer, True]


Batch = tuple[torch.Tensor, torch.Tensor]


def collate(documents: list[tuple[list[int], list[bool]]], pad: int) -> Batch:
    """Right-padded ids and answer flags. Attention is causal, and pads never enter the loss: no mask."""
    width = max(len(ids) for ids, _ in documents)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in documents])
    flags = torch.tensor([answer + [False] * (width - len(answer)) for _, answer in documents])
    return ids, flags


def batches(encode: Encoder, rng: random.Random, progress: float, count: int, tokens: int) -> list[Batch]:
    """`count` batches of about `tokens` tokens, of documents of like length, in random order."""
    pool = sorted(
        (encode(tiny_corpus.document(rng, progress)) for _ in range(count * tokens // 30)),
        key=lambda d: len(d[0]),
    )
    made: list[Batch] = []
    start = 0
    while start < len(pool):
        end = start
        while end < len(pool) and (end - start + 1) * len(pool[end][0]) <= tokens:
            end += 1
        made.append(collate(pool[start:end], encode.tokenizer.pad_token_id))
        start = end
    rng.shuffle(made)
    return made


def weighted_loss(model: LlamaForCausalLM, batch: Batch, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy on all answer tokens and a few of the others; the second value is the answers' alone."""
    ids, flags = batch
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets, answer = ids[:, 1:], flags[:, 1:]
    keep = answer | ((torch.rand(targets.shape, device=ids.device) < OTHER_KEPT) & (targets != pad))
    loss = F.cross_entropy(model.lm_head(hidden[keep]).float(), targets[keep], reduction="none")
    weight = torch.where(answer[keep], 1.0, OTHER_WEIGHT)
    return (loss * weight).sum() / answer.sum(), loss.detach()[answer[keep]].mean()


@torch.no_grad()
def probe(model: LlamaForCausalLM, encode: Encoder, device: torch.device, count: int = 256) -> dict[str, float]:
    """Share of the answer tokens that are the most likely ones, by kind of document."""
    result = {}
    for name, make in tiny_corpus.PROBES.items():
        rng = random.Random(12345)
        ids, flags = collate([encode(make(rng, False)) for _ in range(count)], encode.tokenizer.pad_token_id)
        ids, flags = ids.to(device), flags.to(device)
        flags = flags[:, 1:] & (ids[:, 1:] != encode.tokenizer.eos_token_id)
        guess = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        result[name] = round((guess == ids[:, 1:])[flags].float().mean().item(), 3)
    return result


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz steps, scaled to the size of an AdamW update.

    torch.optim.Muon does the same in bfloat16, one matrix at a time, which is far slower on a CPU; here the
    matrices of one shape are one batch.
    """

    def __init__(
        self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])  # Nesterov
                wide = p.shape[0] < p.shape[1]
                key = (max(p.shape), min(p.shape))
                shapes.setdefault(key, []).append((p.T if wide else p, update.T if wide else update))
            for (long, _), pairs in shapes.items():
                x = torch.stack([update for _, update in pairs])
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    gram = x.mT @ x
                    x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
                for (p, _), update in zip(pairs, x, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(update, alpha=-0.2 * math.sqrt(long) * group["lr"])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write beside the folder, then move file by file, so that a reader never finds half a model."""
    staging = out.with_name(f"{out.name}.new")
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    out.mkdir(parents=True, exist_ok=True)
    for file in staging.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone
        file.replace(out / file.name)
    shutil.rmtree(staging)


def main() -> None:
    """Train, saving as it goes, and print what TRAINING.md needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("iapt/tiny"))
    parser.add_argument("--minutes", type=float, default=40.0, help="end by the clock, unless --steps is given")
    parser.add_argument("--steps", type=int, help="end after so many steps (exactly repeatable)")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=768)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = make_tokenizer(args.vocab)
    encode = Encoder(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} vocabulary entries")

    # Muon orthogonalises the update of a matrix; embeddings and norms are none, and stay with AdamW.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, args.lr, betas=(0.9, 0.98), weight_decay=0.0),
        Muon(matrices, args.lr),
    ]

    began = saved = time.monotonic()
    step = seen = answers = 0
    losses: list[float] = []
    queue: list[Batch] = []
    while True:
        elapsed = time.monotonic() - began
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1:
            break
        if not queue:
            queue = batches(encode, rng, progress, 64, args.tokens)
        batch = queue.pop()
        scale = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
        batch = (batch[0].to(device), batch[1].to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, answer_loss = weighted_loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seen += int((batch[0] != tokenizer.pad_token_id).sum())
        answers += int(batch[1].sum())
        losses.append(answer_loss.item())
        if step % 100 == 0:
            recent = sum(losses[-100:]) / 100
            line = f"step {step} {elapsed:.0f}s progress {progress:.3f} tokens {seen:,} answer loss {recent:.4f}"
            if step % 250 == 0:
                line += f" {probe(model, encode, device)}"
            print(line, flush=True)
        if time.monotonic() - saved > 60 * args.save_minutes:
            saved = time.monotonic()
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)
    summary = {
        "command": "python " + " ".join(sys.argv),
        "hardware": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{args.threads} cores, {platform.machine()}",
        "seconds": round(time.monotonic() - began),
        "steps": step,
        "tokens": seen,
        "answer_tokens": answers,
        "answer_loss_last_200_steps": round(sum(losses[-200:]) / len(losses[-200:]), 4),
        "probes": probe(model, encode, device, 1000),
    }
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
