"""Train the demo model: `python -m llmsqueeze.demo.train [--out DIR]`.

The committed model took 642 s on one thread of a busy machine with two cores. Its perplexity on the evaluation text,
in windows of `<s>` and 255 tokens, is 3.0449 in bfloat16.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.demo.stories import evaluation_text, stories

SEED = 7
TOKENIZER_SEED = 303
FIRST_TRAINING_SEED = 1_000_000
SPECIAL = ("<unk>", "<s>", "</s>")
VOCABULARY = 640
WINDOW = 256
ROWS = 8
STEPS = 3600
WARM_UP = 100
PEAK_RATE = 3e-3


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the stories' whole words, with single bytes for other text; it puts `<s>` in front."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "\n\n".join(stories(TOKENIZER_SEED, 3000))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Counter(word for word, _ in split.pre_tokenize_str(text))
    common = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    pieces = [*SPECIAL, *letters, *common][:VOCABULARY]
    # one word outscores any way to spell it
    scores = [(piece, -1.0 if len(piece) > 1 else -10.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def batch(tokenizer: PreTrainedTokenizerFast, step: int) -> torch.Tensor:
    """Rows of `<s>` and fresh stories, [ROWS, WINDOW]; every other row starts in the middle of a story."""
    fresh = stories(FIRST_TRAINING_SEED + step, 4 * ROWS)
    texts = ["\n\n".join(fresh[4 * row : 4 * row + 4]) for row in range(ROWS)]
    rows = []
    for row, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        start = (row // 2 * 7) % (len(ids) - WINDOW) if row % 2 else 0
        rows.append([tokenizer.bos_token_id, *ids[start : start + WINDOW - 1]])
    return torch.tensor(rows)


def rate(step: int, steps: int) -> float:
    """The learning rate: a linear warm-up, then half a cosine down to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return PEAK_RATE * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """The trained model, in float32."""
    torch.manual_seed(SEED)
    model = build_model(tokenizer)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    begun = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        ids = batch(tokenizer, step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.monotonic() - begun:.0f} s",
                flush=True,
            )
    return model


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Perplexity on the evaluation text, in windows of `<s>` and WINDOW - 1 tokens."""
    ids = torch.tensor(tokenizer(evaluation_text(), add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1)
    rows = torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)
    losses = [model(part, labels=part).loss.item() * len(part) for part in torch.split(rows, ROWS)]
    return math.exp(sum(losses) / len(rows))


def main() -> None:
    """Train the demo model and save it."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="the folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    arguments = parser.parse_args()
    begun = time.monotonic()
    # the matrices are small: a second thread gains little, and loses much if other work shares the cores
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = train(tokenizer, arguments.steps).bfloat16()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"held-out perplexity {perplexity(model, tokenizer):.4f}; {time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
