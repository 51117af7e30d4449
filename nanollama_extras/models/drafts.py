"""Drafts of a small model (`--draft MODEL`, DRAFT in a Modelfile), which the model verifies.

Adds       `Drafts`: the small model, with a cache of its own, which guesses for all sequences of a
           step together; `ModelDrafter`, the drafter of one sequence.
Seam       LLM calls `attach`, which gives its engine a maker of drafters.
           Imports answers.lookup, for texts that repeat themselves, and answers.gains, for the
           lengths of drafts.
Source     https://arxiv.org/abs/2211.17192 (speculative decoding)
Remove     delete this file and answers/gains.py; --draft then says that it needs them.

Each sequence has a shadow, which runs in the small model's engine: the same tokens, and guesses
after them. A guess is drawn as the model draws its token there: with the same parameters,
penalties, constraint and random number. So two models that agree draw the same at any temperature.

    sequence   [ prompt | answer ................ | last token ]
    shadow     [ read in the small model | unread | last token ] guess 1, guess 2, ..

A long text is read piece by piece, a piece in each step, once an answer is long enough to repay it.
"""

from __future__ import annotations

import dataclasses
import re
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanollama import (
    DRAFT_ROWS,
    LLM,
    REPEATED,
    EngineConfig,
    NanollamaError,
    Sequence,
    UsageError,
    common_prefix,
    excerpt,
    log,
)
from nanollama_extras.answers.gains import Gains, Odds, Plan
from nanollama_extras.answers.lookup import PromptLookup

if TYPE_CHECKING:
    from nanollama import DistinctTokens, Engine, Row, Tokenizer

MOST_DRAFTED = DRAFT_ROWS - 1
READ_TOKENS = 256  # of long texts, in a step
NEW_TOKENS = 2  # unread ones after a draft that was all right
FEW_TOKENS = 32  # unread ones, which the first pass of a draft may read
SOON = 32  # tokens that an answer is expected to go on for, or as many as it has
LONG_MATCH = 5  # tokens: where as many occurred before, what followed them is the better guess
LOOKUP = 8  # tokens of a draft from the text so far, unless --lookup says it
PADDING = re.compile(r"\[PAD\d+\]")  # names of unused ids in GGUF files


def attach(llm: LLM, config: EngineConfig) -> None:
    """Let the small model of `config.draft` draft for a model. Raises UsageError for one with
    another vocabulary, or with layers whose state cannot be cut, and other NanollamaErrors where it
    cannot be loaded."""
    name = str(config.draft)
    if config.lookup == "mtp":
        raise UsageError("--draft and --lookup mtp exclude each other; give one of them", "draft")
    own: Any = dict.fromkeys(("draft", "record", "prompt_cache"))
    own |= {"lookup": 0, "parallel": llm.engine.num_slots}
    own["prefill_chunk"] = max(READ_TOKENS, config.prefill_chunk)
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | own
    small = LLM(name, **options)
    target = str(llm.checkpoint.path)
    check_vocabulary(name, small.tokenizer, target, llm.tokenizer)
    if small.config.state_bytes:
        reason = "its layers keep a state, which wrong guesses cannot be taken out of"
        raise UsageError(f"--draft {name}: {reason}; take a model of attention layers", "draft")
    sizes = small.checkpoint.num_bytes, llm.checkpoint.num_bytes
    if sizes[0] > sizes[1]:
        log.warning(f"--draft {name} is larger than {target}; its drafts will hardly gain time")
    log.debug(f"drafts: {name}, {small.engine.decoder.kernels}")
    Drafts(small.engine, sizes[0] / max(sizes[1], 1)).attach(llm.engine, config)


def check_vocabulary(name: str, own: Tokenizer, target: str, wanted: Tokenizer) -> None:
    """Raises UsageError, with the first difference, unless the tokens are the same."""
    mine, theirs = map(words_of, (own, wanted))
    pairs = ((i, mine.get(i), theirs.get(i)) for i in sorted({*mine, *theirs}))
    difference = next((pair for pair in pairs if pair[1] != pair[2]), None)
    if difference is None:
        return
    at, a, b = difference
    has = [f"{excerpt(word)} in" if word is not None else "missing in" for word in (a, b)]
    problem = f"its vocabulary of {len(mine)} tokens is not that of {target}, of {len(theirs)}"
    detail = f"token {at} is {has[0]} {name} and {has[1]} {target}"
    raise UsageError(f"--draft {name}: {problem}: {detail}", "draft")


def words_of(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens of a vocabulary by id, without those that only pad it; none without a text."""
    if not tokenizer.num_tokens:
        return {}
    ids = tokenizer._tokenizer.get_vocab()
    words = {i: word.partition(REPEATED)[0] for word, i in ids.items()}
    return {i: word for i, word in words.items() if not PADDING.fullmatch(word)}


Members = list[tuple[Sequence, "ModelDrafter"]]


class Guess(NamedTuple):
    token_id: int
    likelihood: float  # in the small model


class ModelDrafter:
    """Guesses of one sequence: those of the small model or, where the text repeats itself at length
    or the small model is not worth its time, what followed the same tokens before."""

    def __init__(self, drafts: Drafts) -> None:
        self.drafts, self.lookup = drafts, PromptLookup()
        self.odds = Odds(drafts.gains.odds)
        self.shadow: Sequence | None = None
        self.num_same = 0  # leading tokens that the shadow shares with the sequence
        self.retry_at = 0  # tokens, before which no other shadow is asked for
        self.is_unfit = False  # the small model cannot read this text
        self.is_paid = False  # for a trial, which may read the text
        self.num_tokens = 0  # of the text that all of the following is about
        self.guesses: list[Guess] = []
        self.chosen: list[int] = []  # those of them that the model verifies
        self.copied: list[int] = []  # what is verified if there are none: from the text so far
        self.room = 0
        self.likelihood, self.chance = 1.0, 1.0  # as in gains.Going

    def draft(self, seq: Sequence, most: int) -> list[int]:
        """At most `most` guesses; the first sequence of a step has all of them made."""
        if self.num_tokens != len(seq.token_ids):
            self.drafts.draft_all(most)
        draft = (self.chosen or self.copied)[:most]
        return draft[: seq.constraint.num_valid(draft)] if draft and seq.constraint else draft

    def learn(self, num_drafted: int, num_accepted: int, num_tokens: int) -> None:
        if self.chosen:
            return
        self.lookup.learn(num_drafted, num_accepted, num_tokens)
        for place in range(min(num_accepted + 1, num_drafted)):
            self.drafts.copy_odds.note(self.copy_likelihood, place < num_accepted)

    def begin(self, seq: Sequence, most: int) -> None:
        """Learn from what came after the last guesses, and look the text's end up."""
        came = seq.token_ids[self.num_tokens :]
        for guess, token_id in zip(self.guesses, came):
            self.odds.note(guess.likelihood, guess.token_id == token_id)
            if guess.token_id != token_id:
                break
        self.num_tokens, self.guesses, self.chosen = len(seq.token_ids), [], []
        self.likelihood, self.chance = 1.0, self.odds.chance()
        small = self.drafts.small
        length = min(seq.max_length, small.n_ctx)
        self.room = min(most, MOST_DRAFTED, length - self.num_tokens - 1)
        self.copied = self.lookup.draft(seq, min(most, self.drafts.most_copied))

    @property
    def copy_likelihood(self) -> float:
        """By the number of tokens before the copied ones that occurred before."""
        return self.lookup.num_matched / (self.lookup.MAX_MATCH + 1)

    @property
    def is_repeating(self) -> bool:
        """Whether the text's end occurred before at such length that this is the better guess."""
        return bool(self.copied) and self.lookup.num_matched >= LONG_MATCH

    def can_guess(self, seq: Sequence) -> bool:
        """Whether the shadow follows the sequence, with room for a guess."""
        if self.is_repeating or self.room < 1 or self.is_unfit:
            return False
        if self.shadow is None and self.num_tokens >= self.retry_at:
            self.retry_at = self.num_tokens + 16
            self.is_unfit = not self.drafts.reads(seq.token_ids)
            self.shadow = None if self.is_unfit else self.drafts.new_shadow(seq)
        return self.shadow is not None and self.follow(seq)

    def follow(self, seq: Sequence) -> bool:
        """Give the shadow the sequence's tokens, and cut its guesses -> whether it can read them"""
        shadow, ids, same = self.shadow, seq.token_ids, self.num_same
        assert shadow
        same += common_prefix(shadow.token_ids[same:], ids[same:])
        self.is_unfit = not self.drafts.reads(ids[same:])
        if self.is_unfit:
            return False
        del shadow.token_ids[same:]
        shadow.token_ids += ids[same:]
        self.num_same = len(ids)
        shadow.num_computed = min(shadow.num_computed, same, len(ids) - 1)
        self.drafts.renew(shadow)
        return True

    @property
    def num_unread(self) -> int:
        assert self.shadow
        return len(self.shadow.token_ids) - self.shadow.num_computed

    def prepare(self, seq: Sequence) -> None:
        """Have the shadow draw as the sequence would."""
        assert self.shadow
        self.shadow.distinct = copy_of(seq.distinct)
        self.shadow.constraint = seq.constraint.copy() if seq.constraint else None

    def take(self, row: Row, plan: Plan, is_trial: bool) -> bool:
        """Add a guess drawn from logits (V,) -> whether another one may follow"""
        shadow = self.shadow
        assert shadow
        try:
            token_id = int(row.argmax()) if shadow.params.sampler else shadow.choose(row)
        except NanollamaError:  # damaged weights, or a form of answers that cannot go on
            return False
        guess = Guess(token_id, likelihood_of(row, token_id))
        self.guesses.append(guess)
        self.likelihood *= self.odds.chance(guess.likelihood)
        if not is_trial and not plan.is_worth_a_row(self.likelihood):
            return False
        self.chosen.append(token_id)
        plan.add(self.likelihood)
        shadow.token_ids.append(token_id)
        if shadow.constraint:
            shadow.constraint.push(token_id)
        is_last = token_id in self.drafts.small.end_ids and not shadow.params.ignore_eos
        is_last = is_last or bool(shadow.constraint and shadow.constraint.is_done)
        return not is_last and len(self.chosen) < self.room and self.drafts.reads([token_id])


def copy_of(distinct: DistinctTokens) -> DistinctTokens:
    """Distinct tokens to which those of guesses may be added."""
    new = type(distinct)()
    new.known, new.num_read, new.ids = set(distinct.known), distinct.num_read, distinct.ids
    return new


def likelihood_of(row: Row, token_id: int) -> float:
    """The probability of a token under logits (V,), at temperature 1."""
    best = row.max()
    return float(np.exp(row[token_id] - best) / np.exp(row - best).sum())


class Drafts:
    """The small model, and what its guesses gain."""

    most_copied = LOOKUP

    def __init__(self, small: Engine, ratio: float) -> None:
        """`ratio`: of its bytes to the model's."""
        self.small, self.gains = small, Gains(ratio)
        self.engine: weakref.ref[Engine]
        self.n_vocab = 0  # of the model
        self.pairs: list[tuple[Sequence, Sequence]] = []  # with their shadows
        self.num_trials = 0
        self.copy_odds = Odds()
        self.clock = time.perf_counter

    def attach(self, engine: Engine, config: EngineConfig) -> None:
        """Draft for the sequences of an engine."""
        self.engine, self.n_vocab = weakref.ref(engine), engine.n_vocab
        self.most_copied = int(config.lookup) or LOOKUP
        # layers with a window keep room for the tokens of the longest step
        most = max(int(config.lookup), min(MOST_DRAFTED, config.prefill_chunk - 1))
        engine.scheduler.lookup = most
        engine.new_drafter = lambda: ModelDrafter(self)

    def reads(self, token_ids: list[int]) -> bool:
        """Whether these are tokens of the small model; an image has vectors of the model's."""
        return all(type(i) is int and i < self.small.n_vocab for i in token_ids)

    def new_shadow(self, seq: Sequence) -> Sequence | None:
        """A shadow in a slot of the small model; None where all are taken, or another one reads the
        same text."""
        small = self.small
        shadow = Sequence(seq.index, list(seq.token_ids), seq.params, seq.text)
        shadow.num_prompt, shadow.seed = seq.num_prompt, seq.seed
        small.scheduler.add(shadow)
        admitted = small.scheduler.admit()
        if admitted is None:
            small.scheduler.waiting.clear()
            return None
        small.cache.start(admitted[1], shadow.slot, shadow.num_cached, shadow.token_ids)
        shadow.num_computed = shadow.num_cached
        self.pairs.append((seq, shadow))
        return shadow

    def renew(self, shadow: Sequence) -> None:
        """Let a shadow read its text again, if it has outgrown what was read."""
        cache, ids = self.small.cache, shadow.token_ids
        if cache.outgrown(shadow.slot, len(ids)):
            cache.start(shadow.slot, shadow.slot, 0, ids)
            shadow.num_computed = 0

    def retire(self) -> None:
        """Free the slots of sequences that have ended; what they read stays."""
        for seq, shadow in self.pairs:
            if seq.finish_reason:
                self.small.scheduler.retire(shadow)
        self.pairs = [pair for pair in self.pairs if not pair[0].finish_reason]

    def draft_all(self, most: int) -> None:
        """Draft at most `most` tokens for every sequence that decodes."""
        engine = self.engine()
        assert engine
        started, gains = self.clock(), self.gains
        gains.begin_step(engine.stats)
        self.retire()
        members: Members = []
        for seq in engine.scheduler.running:
            is_decoding = seq.num_generated and seq.num_computed == len(seq.token_ids) - 1
            if is_decoding and isinstance(seq.drafter, ModelDrafter):
                seq.drafter.begin(seq, most)
                members.append((seq, seq.drafter))
        if gains.must_measure(len(members)):
            for _, drafter in members:
                drafter.copied = []
        else:
            plan = Plan(gains, len(members), len(members))
            for _, drafter in members:
                if drafter.is_repeating:
                    self.weigh(drafter, plan)
            going, num_trial = self.choose(members, plan, most)
            self.guess(going, plan, num_trial)
            for _, drafter in members:
                if not (drafter.chosen or drafter.is_repeating):
                    self.weigh(drafter, plan)
        gains.end_draft(len(members), self.clock() - started)

    def weigh(self, drafter: ModelDrafter, plan: Plan) -> None:
        """Keep as many copied tokens as are worth verifying, or one for a trial."""
        chance, likelihood, num = self.copy_odds.chance(drafter.copy_likelihood), 1.0, 0
        while num < len(drafter.copied):
            likelihood *= chance
            if not plan.is_worth_a_row(likelihood) and (num or not self.gains.pay(plan.row_s())):
                break
            plan.add(likelihood)
            num += 1
        del drafter.copied[num:]

    def choose(self, members: Members, plan: Plan, most: int) -> tuple[Members, int]:
        """The sequences to guess for, and the number of guesses of a trial, else 0; texts that must
        be read first are read on."""
        able = [(seq, drafter) for seq, drafter in members if drafter.can_guess(seq)]
        if not able:
            return [], 0
        drafters = [drafter for _, drafter in able]
        num, token_s = plan.longest(drafters, most)
        saved_s = plan.token_s - token_s
        behind = [(s, d) for s, d in able if d.num_unread > NEW_TOKENS]
        ready = [pair for pair in able if pair not in behind]
        worthy = [(s, d) for s, d in behind if d.is_paid or self.repays(s, d, saved_s)]
        self.read([d for _, d in worthy if d.num_unread > FEW_TOKENS])
        if num:
            return ready + [(s, d) for s, d in worthy if d.num_unread <= FEW_TOKENS], 0
        return self.trial(able, plan)

    def repays(self, seq: Sequence, drafter: ModelDrafter, saved_s: float) -> bool:
        """Whether reading a text pays where each further token then takes `saved_s` less."""
        num = min(max(seq.num_generated, SOON), seq.max_length - len(seq.token_ids))
        return saved_s * num > self.gains.reading_s(drafter.num_unread)

    def trial(self, able: Members, plan: Plan) -> tuple[Members, int]:
        """As `choose`, where drafts are not expected to gain: one sequence, if there is credit."""
        pair = min(able, key=lambda pair: pair[1].num_unread)
        drafter, num = pair[1], min(1 + self.num_trials % 3, pair[1].room)
        price_s = (num - 1) * self.gains.pass_s(1) + max(plan.row_s(num), 0.0)
        is_far = drafter.num_unread > FEW_TOKENS
        reading_s = self.gains.reading_s if is_far else self.gains.pass_s
        price_s += reading_s(drafter.num_unread)
        if is_far:
            drafter.is_paid = drafter.is_paid or self.gains.pay(price_s)
        elif self.gains.pay(price_s):
            self.num_trials += 1
            return [pair], num
        return [], 0

    def read(self, drafters: list[ModelDrafter]) -> None:
        """Read a piece of texts, but for their last tokens."""
        left, work, started = READ_TOKENS, [], self.clock()
        for drafter in drafters:
            num = min(left, drafter.num_unread - 1)
            if num and drafter.shadow:
                work.append((drafter.shadow, num))
                left -= num
        if work:
            self.small.forward(work)
            self.gains.note_pass(READ_TOKENS - left, self.clock() - started)
        for shadow, num in work:
            shadow.num_computed += num
        for drafter in drafters:
            drafter.is_paid = drafter.is_paid and drafter.num_unread > FEW_TOKENS

    def guess(self, going: Members, plan: Plan, num_trial: int) -> None:
        """Guess token after token for all these sequences, as long as it gains."""
        for seq, drafter in going:
            drafter.prepare(seq)
        drafters, num = [drafter for _, drafter in going], 0
        while drafters:
            started, num = self.clock(), num + 1
            work = [(drafter.shadow, drafter.num_unread) for drafter in drafters]
            logits: Any = self.small.forward(work)  # type: ignore[arg-type]
            num_read = sum(num_new for _, num_new in work)
            rows = [fitted(each[-1].numpy(), self.n_vocab) for each in logits]
            plan.spent_s += self.gains.pass_s(num_read)
            more = []
            for drafter, row, (shadow, num_new) in zip(drafters, rows, work):
                assert shadow
                shadow.num_computed += num_new
                if drafter.take(row, plan, bool(num_trial)):
                    more.append(drafter)
            self.gains.note_pass(num_read, self.clock() - started)
            drafters = [d for d in more if num < (num_trial or d.room)]
            if not num_trial and drafters:
                most = max(drafter.room - num for drafter in drafters)
                if not plan.longest(drafters, most)[0]:
                    break


def fitted(row: Row, n_vocab: int) -> Row:
    """Logits (V,) for another number of tokens, of which neither model uses the last ones."""
    lacking = n_vocab - len(row)
    return np.pad(row, (0, lacking), constant_values=-np.inf) if lacking > 0 else row[:n_vocab]
