"""Random batches in every spelling, through every entry, compared with each row run alone.

The definition of everything here is one plain forward of one row, unpadded and uncut, with the
row's own edits.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from hooked_hybrid import HookedHybrid
from tests.models import D_VOCAB
from tests.seams.edits import Edit, draw_edits, hooks_of

TOLERANCE = 3e-5
"""Of the largest entry: sums in other orders, in up to 140 positions and under edits."""
LONG = 10**6
PAD, N_SPECIAL = 0, 4
"""Of the tokenizer: the padding token, and how many tokens are not words."""


def assert_close(got: Tensor, wanted: Tensor, what: str, of: Tensor | None = None) -> None:
    """Fail unless two tensors agree to the rounding of what they were computed from, `of`."""
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)}, not {tuple(wanted.shape)}"
    if not wanted.numel():
        return
    largest = max(float((wanted if of is None else of).detach().abs().max()), 1e-6)
    apart = float((got.detach() - wanted.detach()).abs().max())
    assert apart <= TOLERANCE * largest, f"{what}: {apart / largest:.2g} of the largest entry"


@dataclass
class DrawnBatch:
    """Rows of tokens, each after a history of its own, and one spelling of them.

    `input` is what is passed: `tokens`, or the texts that become them. `places[r]` are the columns
    of row r's new tokens.
    """

    histories: list[list[int]]
    rows: list[list[int]]
    input: Any
    tokens: Tensor
    options: dict[str, Any]
    places: list[range]
    edits: list[Edit]
    marked: list[bool]

    @property
    def is_packed(self) -> bool:
        """Whether all rows stand in one, as documents."""
        return "segment_ids" in self.options

    @property
    def fwd_hooks(self) -> list[Any]:
        """The edits, for the batch."""
        return hooks_of(self.edits, self.marked)

    def alone(self, model: HookedHybrid, row: int, name: str | None = None) -> tuple[Tensor, Any]:
        """Return logits and, with a name, one cached value of a row's new tokens, run alone."""
        whole = torch.tensor([[*self.histories[row], *self.rows[row]]])
        seen_as = 0 if self.is_packed else row
        with model.hooks(hooks_of(self.edits, [False] * len(self.edits), seen_as)):
            if name is None:
                return model(whole)[0, len(self.histories[row]) :], None
            logits, cache = model.run_with_cache(whole, names_filter=name)
        return logits[0, len(self.histories[row]) :], cache[name]


def draw_batch(random: Random, model: HookedHybrid) -> DrawnBatch:
    """Draw rows, what they continue from, a spelling and edits."""
    n_rows = random.choice([1, 1, 2, 3, 4])
    longest = random.choice([2, 5, 12, 40, 70])
    spelling = random.choice(["equal", "left", "right", "both", "packed", "unmasked", "texts"])
    continues = spelling != "packed" and random.random() < 0.5

    def row(n: int) -> list[int]:
        return [random.randrange(N_SPECIAL, D_VOCAB) for _ in range(n)]

    lengths = [random.randint(1, longest) for _ in range(n_rows)]
    lengths = [lengths[0]] * n_rows if spelling == "equal" else lengths
    rows = [row(n) for n in lengths]
    histories = [row(random.randint(1, longest)) if continues else [] for _ in rows]
    tokens, options, places = spelled(random, rows, spelling)
    if continues:
        options["state"] = read(model, random, histories)
    starts, stops = tuple(map(len, histories)), (LONG,) * n_rows
    if spelling == "packed":  # one row: documents are distinguished by their positions alone
        starts, stops = (0,), (LONG,)
    edits, marked = draw_edits(random, model, starts, stops)
    given: Any = tokens
    if spelling == "texts":
        given = [" ".join(f"w{token}" for token in row) for row in rows]
        given = given[0] if n_rows == 1 and random.random() < 0.5 else given
    return DrawnBatch(histories, rows, given, tokens, options, places, edits, marked)


def spelled(
    random: Random, rows: list[list[int]], spelling: str
) -> tuple[Tensor, dict[str, Any], list[range]]:
    """Return tokens, the options that say what they are, and where each row's tokens stand."""
    if spelling == "equal":
        return torch.tensor(rows), {}, [range(len(row)) for row in rows]
    if spelling == "packed":
        ends = [sum(map(len, rows[: i + 1])) for i in range(len(rows))]
        places = [range(end - len(row), end) for row, end in zip(rows, ends, strict=True)]
        ids = [i + 1 for i, row in enumerate(rows) for _ in row]
        flat = [token for row in rows for token in row]
        n_left, n_right = random.choice([(0, 0), (2, 0), (0, 3)])
        tokens = torch.tensor([[0] * n_left + flat + [0] * n_right])
        segments = torch.tensor([[0] * n_left + ids + [0] * n_right])
        moved = [range(p.start + n_left, p.stop + n_left) for p in places]
        return tokens, {"segment_ids": segments}, moved
    width = max(map(len, rows)) + (0 if spelling == "texts" else random.choice([0, 0, 1, 5]))
    tokens, mask = torch.randint(3, D_VOCAB, (len(rows), width)), torch.zeros(len(rows), width)
    if spelling in ("unmasked", "texts"):
        tokens.fill_(PAD)
    places, side = [], random.choice(["left", "right"])
    for i, row in enumerate(rows):
        room = width - len(row)
        where = random.choice(["left", "right"]) if spelling == "unmasked" else spelling
        where = side if where == "texts" else where
        first = {"left": room, "right": 0, "both": random.randint(0, room)}[where]
        tokens[i, first : first + len(row)] = torch.tensor(row)
        mask[i, first : first + len(row)] = 1
        places.append(range(first, first + len(row)))
    if spelling == "unmasked":  # padding is known by its token
        return tokens, {}, places
    if spelling == "texts":
        return tokens, {"prepend_bos": False, "padding_side": side}, places
    return tokens, {"attention_mask": mask.long()}, places


def read(model: HookedHybrid, random: Random, rows: list[list[int]]) -> Any:
    """Return the state after some rows, read in any spelling that keeps them rows."""
    tokens, options, _ = spelled(random, rows, random.choice(["left", "right", "both", "unmasked"]))
    return model(tokens, return_type=None, return_state=True, **options)[1]


def check_forward(random: Random, model: HookedHybrid) -> None:
    """Compare logits, losses and the state after with each row alone."""
    batch = draw_batch(random, model)
    return_type = random.choice(["logits", "loss", "both", None])
    options = dict(batch.options, return_type=return_type)
    n_pos = batch.tokens.shape[1]
    keep = None
    if return_type == "logits" and random.random() < 0.4:
        keep = options["logits_to_keep"] = random.randint(1, n_pos)
    if return_type in ("loss", "both"):
        if n_pos < 2:
            return
        options["loss_per_token"] = random.random() < 0.5
    options["return_state"] = not batch.is_packed or random.random() < 0.5
    out = model.run_with_hooks(batch.input, fwd_hooks=batch.fwd_hooks, **options)
    out, state = out if options["return_state"] else (out, None)
    alone = [batch.alone(model, r)[0] for r in range(len(batch.rows))]
    if return_type is None:
        assert out is None
    elif return_type in ("logits", "both"):
        check_logits(batch, out[0] if return_type == "both" else out, alone, keep)
    if return_type in ("loss", "both"):
        loss = out[1] if return_type == "both" else out
        check_loss(batch, loss, alone, options["loss_per_token"])
    if state is not None and not batch.is_packed:
        check_state(random, model, batch, state)


def check_logits(batch: DrawnBatch, logits: Tensor, alone: list[Tensor], keep: int | None) -> None:
    """Compare the logits that were kept, where a token stands."""
    n_pos = batch.tokens.shape[1]
    first = 0 if keep is None else n_pos - keep
    assert logits.shape[1] == n_pos - first
    for r, place in enumerate(batch.places):
        row = 0 if batch.is_packed else r
        kept = [(c, i) for i, c in enumerate(place) if c >= first]
        if kept:
            columns, indices = map(list, zip(*kept, strict=True))
            got = logits[row, [c - first for c in columns]]
            assert_close(got, alone[r][indices], f"logits of row {r}")


def check_loss(batch: DrawnBatch, loss: Tensor, alone: list[Tensor], per_token: bool) -> None:
    """Compare the loss with the negative log-probabilities of each row's next tokens."""
    packed = batch.is_packed
    wanted = torch.zeros(1 if packed else len(batch.rows), batch.tokens.shape[1] - 1)
    n = 0
    for r, (row, place) in enumerate(zip(batch.rows, batch.places, strict=True)):
        logprobs = log_softmax(alone[r], dim=-1)
        for i in range(len(row) - 1):
            wanted[0 if packed else r, place[i]] = -logprobs[i, row[i + 1]]
            n += 1
    assert_close(loss, wanted if per_token else wanted.sum() / max(n, 1), "loss")


def check_state(random: Random, model: HookedHybrid, batch: DrawnBatch, state: Any) -> None:
    """Continue from the state, without hooks, and compare with a run whose new part is unedited."""
    n_new = random.randint(1, 6)
    following = torch.randint(3, D_VOCAB, (len(batch.rows), n_new))
    after = model(following, state=state)
    for r, row in enumerate(batch.rows):
        before = [*batch.histories[r], *row]
        stops = tuple(len(h) + len(n) for h, n in zip(batch.histories, batch.rows, strict=True))
        edits = [Edit(e.name, e.starts, stops, r) for e in batch.edits]
        whole = torch.tensor([[*before, *following[r].tolist()]])
        with model.hooks(hooks_of(edits, [False] * len(edits))):
            wanted = model(whole)[0, len(before) :]
        assert_close(after[r], wanted, f"continuing row {r}")


def check_cache(random: Random, model: HookedHybrid) -> None:
    """Compare one cached value, whole or sliced by positions, with each row alone."""
    batch = draw_batch(random, model)
    name = random.choice([n for n, p in model.hook_dict.items() if {"pos", "query"} & set(p.axes)])
    n_pos, options = batch.tokens.shape[1], dict(batch.options)
    picked: list[int] | None = None
    if random.random() < 0.5:
        picked = draw_positions(random, batch)
        is_run = picked == list(range(picked[0], picked[-1] + 1))
        options["pos_slice"] = slice(picked[0], picked[-1] + 1) if is_run else list(picked)
    if random.random() < 0.3:
        options["device"] = "cpu"
    with model.hooks(batch.fwd_hooks):
        logits, cache = model.run_with_cache(batch.input, names_filter=name, **options)
    value, point = cache[name], model.hook_dict[name]
    columns = list(range(n_pos)) if picked is None else picked
    dim = point.pos_dim
    assert value.shape[dim] == len(columns), f"{name}: {value.shape[dim]} of {len(columns)}"
    for r, place in enumerate(batch.places):
        row = 0 if batch.is_packed else r
        wanted_logits, wanted = batch.alone(model, r, name)
        assert_close(logits[row, list(place)], wanted_logits, f"logits of row {r}")
        before = len(batch.histories[r])
        kept = [(columns.index(c), before + i) for i, c in enumerate(place) if c in columns]
        if batch.is_packed and name.endswith("ssm_decay"):
            kept = [(a, b) for a, b in kept if b]  # a document's first is 0: nothing stands before
        if not kept:
            continue
        at, positions = map(list, zip(*kept, strict=True))
        got = value[row].index_select(dim - 1, torch.tensor(at))
        want = wanted[0].index_select(dim - 1, torch.tensor(positions))
        if "key" in point.axes:
            if "state" in options:
                continue  # its columns are the state's keys first: compared by the generations
            got, want = got[..., list(place)], want[..., before:]
            if name.endswith("attn_scores"):  # hidden keys hold the lowest value of all
                is_low = want < -1e30
                assert torch.equal(got < -1e30, is_low), f"{name}: another mask"
                got, want = got.masked_fill(is_low, 0), want.masked_fill(is_low, 0)
        assert_close(got.float(), want.float(), f"{name} of row {r}")


def draw_positions(random: Random, batch: DrawnBatch) -> list[int]:
    """Draw columns: a run of any, or some that hold a token in every row."""
    n_pos = batch.tokens.shape[1]
    first = random.randrange(n_pos)
    run = list(range(first, random.randint(first + 1, n_pos)))
    ends = [(p.start, p.stop) for p in batch.places]
    starts, stops = zip(*ends, strict=True)
    full = range(min(starts), max(stops)) if batch.is_packed else range(max(starts), min(stops))
    if not full or random.random() < 0.5:
        return run
    return sorted(random.sample(full, random.randint(1, len(full))))
