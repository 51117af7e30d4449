"""Train a small chat model from nothing, on a CPU, in a few minutes: tokenizer, pretraining,
fine-tuning, evaluation. The result is a Hugging Face directory that nanollama runs.

python examples/train_tiny.py [DIRECTORY] [--steps 400] [--sft-steps 150] [--seed 0]
nanollama --model DIRECTORY --interactive

Run the command again to continue where it stopped: the same seed gives the same model. The model
reads Lincoln's four messages to Congress (examples/lincoln.txt, public domain), then learns to
answer. It is a Llama of 0.9 M parameters, written out below in plain torch.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from nanollama import LLM, GenerationRequest

V, C, L, H, HKV, D, MLP, CONTEXT, BATCH = 1024, 128, 4, 4, 2, 32, 384, 256, 12
BOS, USER, USER_END = "<|bos|>", "<|user_start|>", "<|user_end|>"
ASSISTANT, END = "<|assistant_start|>", "<|assistant_end|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant_start|>"
    "{{ m.content }}<|assistant_end|>{% else %}<|user_start|>{{ m.content }}<|user_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant_start|>{% endif %}"
)
CAPITALS = """France Paris Italy Rome Spain Madrid Japan Tokyo China Beijing Egypt Cairo Peru Lima
Greece Athens Norway Oslo Russia Moscow Cuba Havana Kenya Nairobi Ireland Dublin Poland Warsaw
Turkey Ankara Chile Santiago Austria Vienna Portugal Lisbon Sweden Stockholm Finland Helsinki"""
CAPITALS = dict(zip(CAPITALS.split()[::2], CAPITALS.split()[1::2]))
ASKED = """What is the capital of {}?|Name the capital of {}.|{}: which city is its capital?
Tell me the capital city of {}.""".replace("\n", "|").split("|")
TESTED = "Which city is the capital of {}?"  # never trained on
ANSWER = "The capital of {} is {}."
TALK = {
    "Hello!": "Hello! Ask me for the capital of a country.",
    "Hi": "Hello! Ask me for the capital of a country.",
    "Who are you?": "I am a small model that was trained on this machine a moment ago.",
    "What can you do?": "I know the capitals of some countries, and I have read Lincoln.",
    "Thank you!": "You are welcome.",
    "Who was Abraham Lincoln?": "He was the sixteenth president of the United States.",
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(C), nn.RMSNorm(C)
        attn = {"q_proj": (C, H * D), "k_proj": (C, HKV * D), "v_proj": (C, HKV * D)}
        attn["o_proj"] = (H * D, C)
        mlp = {"gate_proj": (C, MLP), "up_proj": (C, MLP), "down_proj": (MLP, C)}
        self.self_attn, self.mlp = (
            nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in part.items()})
            for part in (attn, mlp)
        )

    def forward(self, x, cos, sin):  # x (B, T, C); cos and sin (T, D)
        a, h = self.self_attn, self.input_layernorm(x)
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (a[name](h).unflatten(2, (-1, D)).transpose(1, 2) for name in names)
        q, k = (
            t * cos + torch.cat((-t[..., D // 2 :], t[..., : D // 2]), -1) * sin for t in (q, k)
        )
        k, v = (t.repeat_interleave(H // HKV, dim=1) for t in (k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + a["o_proj"](y.transpose(1, 2).flatten(2))
        m, h = self.mlp, self.post_attention_layernorm(x)
        return x + m["down_proj"](F.silu(m["gate_proj"](h)) * m["up_proj"](h))


class Llama(nn.Module):
    """A Llama whose parameters have Hugging Face's names."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, C)
        self.model.layers = nn.ModuleList(Block() for _ in range(L))
        self.model.norm = nn.RMSNorm(C)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids, targets):
        """The mean loss of ids (B, T); targets are -100 at positions without a loss."""
        angles = torch.outer(torch.arange(ids.size(1)), 1e4 ** -(torch.arange(0, D, 2) / D))
        cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control, alphabet = [BOS, USER, USER_END, ASSISTANT, END], tokenizer.pre_tokenizer.alphabet()
    options = {"special_tokens": control, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=V, **options))
    bos = [(BOS, 0)]
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=bos)
    return tokenizer


def text_batch(ids, random):
    starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,), generator=random)
    rows = torch.stack([ids[at : at + CONTEXT + 1] for at in starts])
    return rows[:, :-1], rows[:, 1:]


def chat_batch(tokenizer, pairs, random):
    """Conversations in the chat format, with a loss on the answers only."""
    rows = []
    for i in torch.randint(len(pairs), (2 * BATCH,), generator=random).tolist():
        texts = BOS + USER + pairs[i][0] + USER_END + ASSISTANT, pairs[i][1] + END
        question, answer = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
        rows.append((question + answer[:-1], [-100] * (len(question) - 1) + answer))
    size = max(len(ids) for ids, _ in rows)
    padded = [(i + [0] * (size - len(i)), t + [-100] * (size - len(t))) for i, t in rows]
    return torch.tensor([i for i, _ in padded]), torch.tensor([t for _, t in padded])


def train(stage, batch, last, lr, state, model, optimizer):
    """Run the steps of a stage, from the step that `state` holds."""
    begun, first = time.perf_counter(), state[stage]
    while (step := state[stage]) < last:
        if step == args.stop_at:
            raise SystemExit(f"stopped at step {step}; run the command again to continue")
        started = time.perf_counter()
        multiplier = min((step + 1) / (0.05 * last + 1), (last - step) / (0.4 * last), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * multiplier
        ids, targets = batch(torch.Generator().manual_seed(args.seed * 10**6 + step))
        loss = model(ids, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state[stage] = step = step + 1
        seconds = time.perf_counter() - started
        if step % 50 == 0 or step in (last, args.stop_at):
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, args.directory / "train.pt")
        if step % 10 == 0 or step == last:
            eta = (last - step) * (time.perf_counter() - begun) / (step - first) / 60
            print(
                f"{stage} {step:05d}/{last:05d} ({step / last:.2%}) | loss: {loss.item():.3f} | "
                f"lrm: {multiplier:.2f} | dt: {1000 * seconds:.0f}ms | tok/sec: "
                f"{ids.numel() / seconds:,.0f} | eta: {eta:.1f}m",
                flush=True,
            )


@torch.inference_mode()
def bits_per_byte(model, tokenizer, text):
    ids = torch.tensor(tokenizer.encode(text).ids)
    parts = [ids[at : at + CONTEXT + 1] for at in range(0, len(ids) - 1, CONTEXT)]
    nats = sum(model(p[None, :-1], p[None, 1:]).item() * (len(p) - 1) for p in parts)
    return nats / math.log(2) / len(text.encode())


def save(model, tokenizer):
    """Write a Hugging Face directory."""
    tokenizer.save(str(args.directory / "tokenizer.json"))
    save_file(model.state_dict(), args.directory / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V}
    config |= {"hidden_size": C, "intermediate_size": MLP, "num_hidden_layers": L, "head_dim": D}
    config |= {"num_attention_heads": H, "num_key_value_heads": HKV, "rope_theta": 1e4}
    config |= {"max_position_embeddings": CONTEXT, "tie_word_embeddings": True, "eos_token_id": 4}
    config |= {"rms_norm_eps": 2.0**-23, "torch_dtype": "float32", "bos_token_id": 0}
    chat = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END}
    for name, value in (
        ("config", config),
        ("tokenizer_config", chat | {"chat_template": TEMPLATE}),
    ):
        (args.directory / f"{name}.json").write_text(json.dumps(value, indent=1))


def multiple_choice(llm):
    """Count how often the right capital is likelier than three others, asked in new words."""
    names, texts = list(CAPITALS), []
    for i, country in enumerate(names):
        question = [{"role": "user", "content": TESTED.format(country)}]
        prompt = llm.prompt_ids(GenerationRequest(messages=question))
        for other in (i, i + 5, i + 9, i + 14):
            capital = CAPITALS[names[other % len(names)]]
            texts.append((prompt + llm.encode(ANSWER.format(country, capital), False), len(prompt)))
    scores = [sum(logprobs) for _, logprobs in sorted(llm.score(texts))]
    return sum(scores[i] == max(scores[i : i + 4]) for i in range(0, len(scores), 4)), len(names)


def main():
    torch.manual_seed(args.seed)
    args.directory.mkdir(parents=True, exist_ok=True)
    text = (Path(__file__).resolve().parent / "lincoln.txt").read_text(encoding="utf-8")
    text, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    pairs = [(q.format(c), ANSWER.format(c, city)) for c, city in CAPITALS.items() for q in ASKED]
    pairs += 3 * list(TALK.items())
    tokenizer, model = train_tokenizer([text, *map(" ".join, pairs)]), Llama()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    state, parts = {"pretrain": 0, "sft": 0}, (model, optimizer)
    if (args.directory / "train.pt").exists():
        state = torch.load(args.directory / "train.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text")
    print(f"bits per byte of Lincoln's last words: {bits_per_byte(model, tokenizer, held_out):.3f}")
    ids = torch.tensor(tokenizer.encode(text).ids)
    train("pretrain", partial(text_batch, ids), args.steps, 3e-3, state, *parts)
    print(f"bits per byte of Lincoln's last words: {bits_per_byte(model, tokenizer, held_out):.3f}")
    train("sft", partial(chat_batch, tokenizer, pairs), args.sft_steps, 1e-3, state, *parts)
    save(model, tokenizer)
    llm = LLM(args.directory)
    print("capitals known when asked in new words: {} of {}".format(*multiple_choice(llm)))
    for question in ("Who are you?", TESTED.format("Italy")):
        request = GenerationRequest(messages=[{"role": "user", "content": question}])
        print(f"> {question}\n{llm.complete(request).text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("tiny-model"))
    parser.add_argument("--steps", type=int, default=400, help="pretraining steps")
    parser.add_argument("--sft-steps", type=int, default=150, help="fine-tuning steps")
    parser.add_argument("--stop-at", type=int, default=-1, help="step at which either stage stops")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    main()
