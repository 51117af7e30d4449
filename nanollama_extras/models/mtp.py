"""The multi-token-prediction head of Qwen3.5 and Qwen3-Next as a source of drafts (`--lookup mtp`).

Adds       `Head`: a block of the model's file that guesses the token after the next one, and
           `HeadDrafter`, which asks it. The block runs again on its own output for each further
           guess. It reads every text along with the model, into keys and values of its own, which
           are one more layer of the model's cache.
Seam       answers.lookup makes the `Head`, which puts itself into a models.delta_net decoder.
           Imports answers.lookup, for the length of drafts, the layer of models.delta_net, and a
           limit of models.recurrent.
Source     https://arxiv.org/abs/2404.19737 (multi-token prediction)
           https://github.com/vllm-project/vllm (vllm/model_executor/models/qwen3_5_mtp.py)
Remove     delete this file; `--lookup mtp` then says that it needs it.

    state of token t, after the model's last norm -- norm --+
                                                            +-- fc -- layer -- norm -- lm_head
    embedding of token t + 1 ----------------------- norm --+                     |
                                               state of token t + 1 <-------------+    token t + 2

A wrong guess costs time only: the engine verifies them. So the block may lack the state of a token
that came from the cache; it then sees a key of an earlier text in its place.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import weakref
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanollama import DRAFT_ROWS, Batch, RequestError, keep_8_bits, make_norm
from nanollama_extras.answers.lookup import Pace
from nanollama_extras.models.delta_net import DeltaNetLayer
from nanollama_extras.models.recurrent import MOST_GUESSES

if TYPE_CHECKING:
    from nanollama import Checkpoint, Engine, KVCache, ModelConfig, Sequence, Weights
    from nanollama_extras.models.delta_net import DeltaNetDecoder


# Type of device -> most rows of a step with drafts, and the least probability that all guesses of a
# draft are right. Native kernels on the CPU multiply two to four rows in nearly the time of two, so
# a guess must be right in most cases, and further rows cost more than they save.
LIMITS = {"cpu": (4, 0.6)}
OTHER_LIMITS = (DRAFT_ROWS, 0.0)


class States(NamedTuple):
    """The model's states (n, C) of a slot's tokens `ids`, from position `start` on."""

    start: int
    ids: list[int]
    states: Tensor

    def until(self, stop: int) -> States:
        """Those before position `stop`, or none if they do not reach it."""
        num = stop - self.start if self.start <= stop <= self.start + len(self.ids) else 0
        return States(stop - num, self.ids[:num], self.states[:num])


class Piece(NamedTuple):
    """States (n, C) of a slot from position `start` on, each with the token after its own."""

    slot: int
    start: int
    next_ids: list[int]
    states: Tensor


class HeadDrafter(Pace):
    """Drafts the tokens that the head guesses; see `Head.draft_all`."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.num_tokens = 0  # of the text that `guesses` follow
        self.num_wanted = 0
        self.guesses: list[int] = []
        self.likelihood = 1.0  # that all of them are right

    def draft(self, seq: Sequence, most: int) -> list[int]:
        """As Pace.draft; the first sequence of a step has the head guess for all."""
        most = min(most, self.head.share())
        if most > 0 and self.num_tokens != len(seq.token_ids):
            self.head.draft_all(most)
        return super().draft(seq, most)

    def guess(self, tokens: list[int], most: int) -> list[int]:
        return self.guesses[:most] if self.num_tokens == len(tokens) else []

    def begin(self, seq: Sequence, most: int) -> int:
        """Forget the guesses, unless they follow the sequence -> how many new ones are wanted"""
        if self.num_tokens == len(seq.token_ids):
            return 0
        self.num_tokens, self.guesses, self.likelihood = len(seq.token_ids), [], 1.0
        self.num_wanted = self.length(seq, most)
        return self.num_wanted

    def take(self, token_id: int, probability: float, least: float) -> bool:
        """Add a guess, unless the draft would be right with a probability below `least` -> whether
        another guess is wanted"""
        self.likelihood *= probability
        if self.likelihood >= least:
            self.guesses.append(token_id)
            return len(self.guesses) < self.num_wanted
        if not self.guesses:  # as after a wrong guess, the next one may have to wait
            self.learn(1, 0, self.num_tokens + 1)
        return False


class Head:
    """The block, and the states that it has not read yet: those of each slot's last token, and of
    guesses after it, whose next tokens are not known."""

    most_drafted = 3  # each guess reads the model's output matrix once more

    def __init__(self, engine: Engine) -> None:
        """Raises CheckpointError for a tensor that is missing or of another shape."""
        decoder = cast("DeltaNetDecoder", engine.decoder)
        config, weights = decoder.config, block_weights(decoder.weights)
        C, own = config.n_embd, block_config(config, weights)
        self.fc = weights.linear({"model.fc": C}, 2 * C)
        self.embedding_norm, self.state_norm, self.norm = (
            make_norm(own, weights, f"model.{name}", C)
            for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        )
        self.layer = DeltaNetLayer(own, weights, 0)
        self.layer.self_attn.index = len(config.windows)  # in the cache of the model
        windows, ropes = (*config.windows, None), (*config.layer_ropes, 0)
        decoder.config = dataclasses.replace(config, windows=windows, layer_ropes=ropes)
        decoder.head, decoder.is_recordable = self, False
        self.engine = weakref.ref(engine)
        self.unread: dict[int, States] = {}  # by slot

    def new_drafter(self) -> HeadDrafter:
        return HeadDrafter(self)

    def share(self) -> int:
        """The longest draft of each sequence that runs."""
        engine = self.engine()
        assert engine
        num_rows, _ = LIMITS.get(engine.decoder.device.type, OTHER_LIMITS)
        return num_rows // max(len(engine.scheduler.running), 1) - 1

    def observe(
        self, decoder: DeltaNetDecoder, batch: Batch, cache: KVCache, hidden: Tensor
    ) -> None:
        """Read the states of a step, `hidden` (N, C) before the model's last norm, as far as the
        tokens after them are known."""
        engine = self.engine()
        if engine is None or engine.cache is not cache:  # a program runs the decoder by itself
            return
        states, ids = decoder.norm(hidden), batch.token_ids.tolist()
        pieces = []
        for span in batch.spans:
            rows = slice(span.row, span.row + span.num_new)
            start, known_ids, known = self.earlier(span.slot, span.start, states)
            known_ids, known = known_ids + ids[rows], torch.cat((known, states[rows]))
            num_guesses = max(0, min(span.num_rows, span.num_new, MOST_GUESSES + 1) - 1)
            num = len(known_ids) - 1 - num_guesses
            if num:
                pieces.append(Piece(span.slot, start, known_ids[1 : num + 1], known[:num]))
            self.unread[span.slot] = States(start + num, known_ids[num:], known[num:].clone())
        if pieces:
            self.read(decoder, cache, pieces)

    def earlier(self, slot: int, stop: int, like: Tensor) -> States:
        """The unread states of a slot before position `stop`; `like` has the width of a state."""
        return self.unread.get(slot, States(0, [], like[:0])).until(stop)

    def read(self, decoder: DeltaNetDecoder, cache: KVCache, pieces: list[Piece]) -> Tensor:
        """Run the block -> its states (N, C), of all pieces end to end"""
        work = [(piece.slot, piece.start, piece.next_ids, 1) for piece in pieces]
        batch = Batch(work, decoder.device, decoder.row_tile)
        states = torch.cat([piece.states for piece in pieces])
        states = F.pad(states, (0, 0, 0, len(batch.token_ids) - len(states)))
        for piece in pieces:
            cache.reserve(piece.slot, piece.start + len(piece.next_ids))
        embedded = decoder.embed_tokens.rows(batch.token_ids, decoder.config.embed_scale)
        x = self.fc(torch.cat((self.embedding_norm(embedded), self.state_norm(states)), dim=1))
        rotation = decoder.rotations(batch, cache)[0]
        return self.norm(self.layer(x, rotation, cache, batch))

    def draft_all(self, most: int) -> None:
        """Draft at most `most` tokens for every sequence that decodes: each pass reads the matrices
        once for all of them."""
        engine = self.engine()
        assert engine
        decoder = cast("DeltaNetDecoder", engine.decoder)
        _, least = LIMITS.get(decoder.device.type, OTHER_LIMITS)
        drafters, pieces = [], []
        for seq in engine.scheduler.running:
            drafter, piece = seq.drafter, self.next_piece(seq)
            if piece and isinstance(drafter, HeadDrafter) and drafter.begin(seq, most):
                self.unread[seq.slot] = States(seq.num_computed, [], piece.states[:0])
                drafters.append(drafter)
                pieces.append(piece)
        while pieces:
            ends = itertools.accumulate(len(piece.next_ids) for piece in pieces)
            states = self.read(decoder, engine.cache, pieces)[[end - 1 for end in ends]]
            found = zip(*likeliest(decoder.lm_head(states).float()))
            going = []
            for drafter, piece, state, guess in zip(drafters, pieces, states.split(1), found):
                if drafter.take(*guess, least):
                    at = piece.start + len(piece.next_ids)
                    going.append((drafter, Piece(piece.slot, at, [guess[0]], state)))
            drafters, pieces = [d for d, _ in going], [piece for _, piece in going]

    def next_piece(self, seq: Sequence) -> Piece | None:
        """What the block reads to guess the tokens after a sequence that decodes."""
        if seq.num_generated == 0 or seq.num_computed != len(seq.token_ids) - 1:
            return None
        unread = self.unread[seq.slot].until(seq.num_computed)
        next_ids = [*unread.ids[1:], seq.token_ids[-1]]
        return Piece(seq.slot, unread.start, next_ids, unread.states) if unread.ids else None


def likeliest(scores: Tensor) -> tuple[list[int], list[float]]:
    """The likeliest token of each row of scores (n, V), and its probability."""
    if scores.device.type != "cpu":
        probabilities, best = scores.softmax(dim=1).max(dim=1)
        return best.tolist(), probabilities.tolist()
    rows = scores.numpy()  # torch would wake its threads, which then take a core from the kernels
    shares = 1 / np.exp(rows - rows.max(axis=1, keepdims=True)).sum(axis=1)
    return rows.argmax(axis=1).tolist(), shares.tolist()


def block_weights(weights: Weights) -> Weights:
    """The tensors of the head, named as those of a model with one layer."""
    own = copy.copy(weights)
    named = {name: each for name, each in weights.tensors.items() if name.startswith("mtp.")}
    own.tensors = {name.replace("mtp", "model", 1): each for name, each in named.items()}
    own.source, own.sensitive = f"{weights.source}: MTP head", keep_8_bits(own.tensors)
    own.adapter = None  # which has the same names for layers of the model
    return own


def block_config(config: ModelConfig, weights: Weights) -> ModelConfig:
    """The config of a model with one layer, which is that of the head."""
    experts = config.experts
    if experts:
        mixtures = {0} if "model.layers.0.mlp.gate.weight" in weights.tensors else ()
        experts = dataclasses.replace(experts, layers=frozenset(mixtures))
    one = dataclasses.replace(config, n_layers=1, windows=(None,), layer_ropes=(0,))
    return dataclasses.replace(one, experts=experts)


def with_head(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose head takes memory, too. Raises RequestError if it has none that is known
    here."""
    if "mtp.fc.weight" not in checkpoint.tensors or "delta_net" not in checkpoint.config.own:
        needed = "--lookup mtp needs the multi-token-prediction head of a Qwen3.5 or Qwen3-Next"
        remedy = "--lookup N drafts from the text so far"
        raise RequestError(f"{checkpoint.path}: {needed}, which is not in it; {remedy}", "lookup")
    tensors = {
        name: dataclasses.replace(each, stays=each.stays and not name.startswith("mtp."))
        for name, each in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)
