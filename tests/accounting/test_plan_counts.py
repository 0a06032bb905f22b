"""What a plan counts, by hand: the bytes of each part, and how splits, sizes and changes add up."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from hooked_hybrid.accounting.plan.changes import (
    _largest,
    _narrower,
    _of_gpus,
    _size,
    _smallest,
    changes,
)
from hooked_hybrid.accounting.plan.machine import (
    ANY_DISK,
    Machine,
    gpus_of,
    show_size,
    size_of,
    this_machine,
)
from hooked_hybrid.accounting.plan.planner import Planner
from hooked_hybrid.accounting.plan.planning import plan
from hooked_hybrid.accounting.plan.split import Split, Usage
from hooked_hybrid.accounting.plan.stored import Stored
from hooked_hybrid.accounting.plan.working import Sizes
from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    MambaConfig,
    MixerConfig,
    MoEConfig,
    RGLRUConfig,
    RotaryConfig,
)
from hooked_hybrid.network.costs import Piece
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.network.mlps import mlp_of
from hooked_hybrid.presets import configs as presets

BF16, FP32, FP64 = 2, 4, 8
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12


def working(cfg: Any, d_model: int, *piece: Any) -> int:
    part = mixer_of(cfg) if isinstance(cfg, MixerConfig) else mlp_of(cfg)
    return part.working_bytes(cfg, d_model, Piece(*piece))


# --- values of a block, in bytes ------------------------------------------------------------------


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize(("width", "wide"), [(BF16, 4), (FP32, 4), (FP64, 8)])
def test_the_rg_lru_holds_eight_values_and_four_wide_ones_of_a_channel(
    on_cpu: bool, width: int, wide: int
):
    """Of 3 rows of 5 positions with 7 channels; and what is written, 11 numbers."""
    found = working(RGLRUConfig(7, 1), 11, 3, 5, 5, width, on_cpu)
    assert found == 15 * (7 * (8 * width + 4 * wide) + 11 * width)


@pytest.mark.parametrize(("on_cpu", "act", "copies"), [
    (False, "silu", 2), (True, "silu", 2), (True, "gelu_tanh", 2), (False, "gelu_tanh", 3),
])  # fmt: skip
def test_a_gated_mlp_holds_two_branches_or_three(on_cpu: bool, act: Any, copies: int):
    found = working(GatedMLPConfig(13, act), 11, 3, 5, 5, BF16, on_cpu)
    assert found == 15 * (copies * 13 + 11) * 2


def test_mamba_holds_two_chunks_of_states_and_on_a_cpu_no_larger_ones_than_a_cache_holds():
    cfg = MambaConfig(d_inner=7, d_state=3, dt_rank=2)
    own = 15 * 7 * (3 * BF16 + 4 * 4) + 15 * 11 * BF16
    assert working(cfg, 11, 3, 5, 5, BF16, True) == own + 2 * 3 * 5 * 7 * 3 * 4
    long = 3 * 50 * 7 * (3 * BF16 + 4 * 4) + 3 * 50 * 11 * BF16  # chunks are of 32 positions
    assert working(cfg, 11, 3, 50, 50, BF16, False) == long + 2 * 3 * 32 * 7 * 3 * 4
    large = MambaConfig(d_inner=2**15, d_state=16, dt_rank=2)
    own = 32 * 2**15 * (7 * FP32) + 32 * 11 * FP32
    assert working(large, 11, 1, 32, 32, FP32, False) == own + 2 * 32 * 2**15 * 16 * 4
    assert working(large, 11, 1, 32, 32, FP32, True) == own + 2 * 2**19 * 4


def test_experts_run_one_at_a_time_on_a_cpu_and_all_chosen_ones_together_elsewhere():
    cfg = MoEConfig(n_experts=6, n_chosen=2, d_mlp=13)
    routed, inputs = 15 * 6 * (BF16 + 4), 15 * 11 * BF16 * 3
    on_cpu = routed + inputs + 15 * (2 * 13 + 2 * 11) * BF16
    assert working(cfg, 11, 3, 5, 5, BF16, True) == on_cpu
    elsewhere = routed + inputs + 2 * 15 * (3 * 13 + 2 * 11) * BF16
    assert working(cfg, 11, 3, 5, 5, BF16, False) == elsewhere


HEADS = AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8)
WINDOWED = AttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, n_keys=9)
ROTATED = AttentionConfig(4, 2, 8, rotary=RotaryConfig(4))
ONE_KV = AttentionConfig(n_heads=4, n_kv_heads=1, d_head=8)


@pytest.mark.parametrize(
    ("cfg", "piece", "own", "scores"),
    [
        # 10 queries after 20 tokens: 3 x 32 of queries, 2 x 16 of keys and values, 11 written.
        (HEADS, (1, 10, 30, FP32), 10 * 139 * 4, 10 * 30 * 4 * 2 * 4),
        # In 16 bits products copy 30 keys and values, and a softmax has two more in fp32.
        (HEADS, (1, 10, 30, BF16), 10 * 139 * 2, 10 * 30 * 4 * 12 + 2 * 30 * 16 * 2),
        (ROTATED, (1, 10, 30, FP32), 10 * (139 + 96) * 4, 10 * 30 * 4 * 2 * 4),
        # The keys of a window are there until those to keep are picked: 8 before and 10 new.
        (WINDOWED, (1, 10, 30, FP32), 10 * 139 * 4 + 2 * 18 * 16 * 4, 10 * 18 * 4 * 2 * 4),
        # 100 queries are read 64 at a time: 64 + 8 keys.
        (WINDOWED, (1, 100, 300, FP32), 100 * 139 * 4 + 2 * 108 * 16 * 4, 64 * 72 * 4 * 2 * 4),
        # Rows that may be padded see all 108 keys; scores once more, a mask, and copied keys.
        (
            WINDOWED,
            (2, 100, 300, FP32),
            200 * 139 * 4 + 2 * 216 * 16 * 4,
            2 * 64 * 108 * (4 * (2 * 4 + 2 * 4 + 1) + 11) + 2 * 216 * 16 * 4,
        ),
        (
            HEADS,
            (2, 10, 30, BF16),
            20 * 139 * 2 + 2 * 60 * 16 * 2,
            2 * 10 * 30 * (4 * (12 + 2) + 11) + 2 * 60 * 16 * 2,
        ),
        (
            ONE_KV,  # whose keys need no copy
            (2, 10, 30, FP32),
            20 * (96 + 16 + 11) * 4 + 2 * 60 * 8 * 4,
            2 * 10 * 30 * (4 * (2 * 4 + 2 * 4 + 1) + 11),
        ),
    ],
)
def test_attention_on_a_cpu_holds_scores_of_one_block_of_queries(
    cfg: AttentionConfig, piece: tuple[int, ...], own: int, scores: int
):
    assert working(cfg, 11, *piece, True) == own + scores


def test_a_model_is_counted_part_by_part():
    """Two RG-LRU layers in fp32 on a CPU, 2 rows of 10 tokens."""
    cfg = presets.griffin("RR", d_model=8, d_rnn=12, d_mlp=20, d_vocab=50, n_heads=1)
    sizes = Sizes(cfg, torch.float32, 2, on_cpu=True)
    mixer = 20 * (12 * 12 + 8) * 4
    mlp = 20 * (2 * 20 + 8) * 4
    stream, token = 20 * 8, 10 * 8
    assert mixer > mlp
    assert sizes.working(0, 10) == mixer + stream * 5 * 4 + 20 * token
    assert sizes.ends(10) == 2 * 50 * 7 * 4  # logits of one position a row
    assert sizes.ends(500) == 2 * 1000 * 8 * 4  # embedded tokens, twice
    assert sizes.streams(10) == 20 * 8 * 4
    assert sizes.state(1, 10) == 2 * (3 * 12 + 12) * 4 == sizes.beside_state(1, 10)
    assert sizes.of_rows(5).state(1, 10) == 5 * 48 * 4 and sizes.batch == 2
    assert sizes.weights["embed"] == 50 * 8 * 4 and sizes.weights["unembed"] == 0
    assert sizes.loading("embed") == 50 * 8 * 4
    assert Sizes(cfg, torch.float32, 2).loading("embed") == 0


def test_products_in_16_bits_are_counted_in_fp32_from_16_rows_on_a_cpu():
    """The largest matrix is 20 x 8, and 28 numbers of each token with it."""
    cfg = presets.griffin("R", d_model=8, d_rnn=2, d_mlp=20, d_vocab=9, n_heads=1)
    few, many = (Sizes(cfg, torch.bfloat16, 1, True)._piece(n).n for n in (15, 16))
    sizes, stored = Sizes(cfg, torch.bfloat16, 1, True), Stored(matrix=160, sides=28)
    assert sizes._widening(stored, few) == 0
    assert sizes._widening(stored, many) == 4 * (160 + 16 * 28)
    assert Sizes(cfg, torch.float32, 1, True)._widening(stored, 16) == 0
    assert Sizes(cfg, torch.bfloat16, 1, False)._widening(stored, 16) == 0
    assert sizes._stored["blocks.0"].matrix == 160 and sizes._stored["blocks.0"].sides == 28


def test_rotary_angles_are_kept_with_the_streams():
    cfg = presets.griffin("RA", d_model=8, d_head=8, d_rnn=8, d_vocab=50, n_heads=1)
    angles = 2 * 4  # sines and cosines of half the channels
    assert Sizes(cfg, torch.bfloat16, 3).streams(10) == 30 * (8 + angles) * 2


@pytest.mark.parametrize(
    ("n_keys", "length", "spare"),
    [
        (None, 100, 1 + 64),  # nothing leaves; the first step makes room for 64 keys
        (None, 800, 1 + 100),  # or for an eighth of those there are
        (41, 100, 1 + 64),  # 40 kept of 100: cut out of the others
        (81, 100, 20 + 65),  # 80 kept: the 20 gone are still in view
        (401, 700, 300 + 300),  # as many as are gone
    ],
)
def test_keys_beside_a_state_are_those_of_the_piece_and_room_for_steps(
    n_keys: int | None, length: int, spare: int
):
    cfg = presets.griffin("A", d_model=8, d_head=8, d_vocab=50, n_heads=1, n_keys=n_keys)
    sizes, a_key = Sizes(cfg, torch.bfloat16, 3), 8 * 2 * 2 + 8
    kept = length if n_keys is None else n_keys - 1
    assert sizes.state(0, length) == 3 * kept * a_key
    assert sizes.beside_state(0, length) == 3 * (kept + spare) * a_key


def test_quantising_is_counted_as_torchao_does_it():
    weight = torch.nn.Parameter(torch.empty(3, 20, 10, dtype=torch.bfloat16))
    nf4, int8, plain = Stored(), Stored(), Stored()
    nf4.add_quantized(weight, 400, "nf4")
    assert (nf4.bytes, nf4.largest, nf4.d_out) == (400, 1200, 20)
    assert nf4.to_multiply == 200 * (8 + 3 * 2)
    assert nf4.to_quantize == 200 * (8 + 4 * 2) + 2 * 16 * 2 * 200
    int8.add_quantized(weight, 700, "int8")
    assert (int8.to_multiply, int8.to_quantize) == (200 * 2, 200 * (8 + 4 * 2))
    plain.add_plain(weight)
    plain.add_plain(torch.nn.Parameter(torch.empty(5, dtype=torch.float32)))
    assert plain == Stored(bytes=1220, largest=1200, matrix=200, sides=30)
    assert not any(vars(Stored()).values())
    large = torch.nn.Parameter(torch.empty(2**11, 2**10, dtype=torch.bfloat16, device="meta"))
    nf4.add_quantized(large, 9, "nf4")
    assert nf4.to_quantize == 2**21 * 16 + 2 * 16 * 2 * 2**20  # a chunk at a time


def test_loading_counts_the_plain_tensor_where_one_is_made_or_quantised():
    cfg = presets.griffin("R", d_model=8, d_rnn=8, d_vocab=9, n_heads=1)
    for on_cpu in (False, True):
        sizes = Sizes(cfg, torch.bfloat16, 1, on_cpu)
        sizes._stored = {"a": Stored(largest=100), "b": Stored(largest=100, to_quantize=7)}  # type: ignore[assignment, misc]
        assert [sizes.loading(part) for part in "ab"] == [100 * on_cpu, 100 * on_cpu + 107]


# --- splits ---------------------------------------------------------------------------------------


def test_a_split_says_which_blocks_are_where():
    split = Split((0, 3, 0, 2), on_cpu=2, on_disk=1, first=1)
    assert [split.blocks(k) for k in range(4)] == [
        range(0, 0), range(0, 3), range(3, 3), range(3, 5),
    ]  # fmt: skip
    assert split.kept_elsewhere == range(5, 8) and split.last == 3
    assert [split.uses(k) for k in range(4)] == [False, True, False, True]
    nothing = Split((0, 0), on_disk=4, first=1)
    assert Split((3,)) == Split((3,), 0, 0, 0) and not Split((3,)).kept_elsewhere
    assert nothing.last == 1 and [nothing.uses(k) for k in range(2)] == [False, True]


def test_a_device_holds_what_loading_or_running_takes_beside_weights_and_context():
    used = Usage(weights=100, brought=1, state=20, working=300, loading=4000, context=50_000)
    assert used.running == 321 and used.total == 54_100
    assert Usage(weights=100, brought=1, state=20, working=300, loading=4).total == 421
    assert not any(vars(Usage()).values()) and Usage(loading=7).total == 7


CFG = presets.jamba("MA" * 2, d_model=16, d_vocab=40, n_heads=2, n_kv_heads=1, n_experts=2)


def test_a_usage_is_the_sum_of_its_blocks_and_the_largest_of_what_takes_turns():
    sizes = Sizes(CFG, torch.float32, 1)
    planner = Planner(sizes, Machine((GB, GB), GB), 20)
    block = [sizes.weights[f"blocks.{i}"] for i in range(4)]
    ends = sum(sizes.weights[part] for part in ("embed", "ln_final", "unembed"))
    state, beside = ([f(i, 20) for i in range(4)] for f in (sizes.state, sizes.beside_state))
    work = [sizes.working(i, 20) for i in range(4)]
    used = planner.usage(range(0, 2), range(3, 4), is_first=True)
    assert used.weights == block[0] + block[1] + ends and used.brought == block[3]
    assert used.state == state[0] + state[1] + state[3]
    most = max(work[0], work[1], work[3], sizes.ends(20)) + sizes.streams(20)
    assert used.working == most + beside[0] + beside[1] + beside[3]
    assert used.context == 10**9
    other = planner.usage(range(1, 3), range(0), is_first=False)
    assert other.weights == block[1] + block[2] and other.brought == 0
    assert other.working == max(work[1:3]) + beside[1] + beside[2]
    all_turn = planner.usage(range(1, 3), range(0), is_first=False, brings=True)
    assert all_turn.working == other.working + sizes.streams(20)
    on_cpu = Planner(Sizes(CFG, torch.float32, 1, True), Machine((), GB), 20)
    found = on_cpu.usage(range(4), range(0), is_first=True)
    assert found.context == 0 and found.loading == max(
        on_cpu.sizes.loading(part) for part in on_cpu.sizes.weights
    )


def planner_of(*gpus: int, cpu: int = 0, disk: int | None = None) -> Planner:
    return Planner(Sizes(CFG, torch.float32, 1), Machine(gpus, cpu, disk), 20)


def test_blocks_fill_as_few_devices_as_hold_them_to_the_byte():
    whole = planner_of(GB).usage(range(4), range(0), is_first=True).total
    assert planner_of(whole).find() == Split((4,))
    assert planner_of(whole, whole).find() == Split((4, 0))
    assert planner_of(whole - 1).find() is None
    first = planner_of(GB).usage(range(3), range(0), is_first=True).total
    last = planner_of(GB).usage(range(3, 4), range(0), is_first=False).total
    assert first < whole and planner_of(first, last).find() == Split((3, 1))
    assert planner_of(first, last - 1).find() is None
    two = planner_of(whole - 1, whole - 1).find()
    assert two == Split((2, 2))  # evenly
    assert planner_of(whole - 1, whole - 1).find(evenly=False) == Split((3, 1))


def test_what_no_device_holds_goes_to_the_cpu_and_then_to_the_disk_to_the_byte():
    weights = [Sizes(CFG, torch.float32, 1).weights[f"blocks.{i}"] for i in range(4)]
    room = planner_of(GB).usage(range(1), range(1, 4), is_first=True).total
    rest = sum(weights[1:])
    assert planner_of(room, cpu=rest).find() == Split((1,), on_cpu=3)
    assert planner_of(room, cpu=rest - 1).find() is None
    assert planner_of(room, cpu=rest - 1, disk=weights[3]).find() == Split((1,), 2, 1)
    assert planner_of(room, cpu=rest - 1, disk=weights[3] - 1).find() is None
    assert planner_of(room, disk=rest).find() == Split((1,), 0, 3)
    assert planner_of(room - 1, cpu=rest).find() != Split((1,), on_cpu=3)
    room = planner_of(GB).usage(range(0), range(4), is_first=True).total  # none of them
    assert planner_of(room, cpu=rest + weights[0]).find() == Split((0,), on_cpu=4)
    assert planner_of(room - 1, cpu=rest + weights[0]).find() is None


# --- sizes in words, and the smallest changes -----------------------------------------------------


@pytest.mark.parametrize(
    ("n_bytes", "said"),
    [
        (0, "0 B"), (999, "999 B"), (KB, "1 KB"), (99_960, "100 KB"), (100 * KB, "100 KB"),
        (123_456, "123 KB"), (12_345, "12.3 KB"), (MB, "1 MB"), (999 * MB, "999 MB"), (GB, "1 GB"),
        (99_600 * KB, "99.6 MB"),
        (1500 * MB, "1.5 GB"), (TB, "1 TB"), (2500 * TB, "2500 TB"),
    ],
)  # fmt: skip
def test_bytes_are_shown_in_decimal_units_with_three_digits(n_bytes: int, said: str):
    assert show_size(n_bytes) == said


def test_sizes_are_read_in_decimal_and_binary_units():
    read = {"40GB": 40 * GB, "1.5TB": 1500 * GB, "512 MiB": 2**29, "1kib": 1024, "7B": 7}
    read |= {"2KB": 2000, "3MB": 3 * MB, "1GiB": 2**30, "1TiB": 2**40}
    assert {text: size_of(text) for text in read} == read
    assert gpus_of("2x1GB, 3GB,1x5B") == (GB, GB, 3 * GB, 5)
    assert len(gpus_of("1024x1B")) == 1024
    for wrong in ("40", "0GB", "1025x1B", "0x1GB", "x1GB", "-1x1GB"):
        with pytest.raises(ValueError, match="give"):
            gpus_of(wrong)


def test_a_machine_computes_on_gpus_that_have_room_or_else_on_its_cpu():
    machine = Machine((5, 0, 7), 9)
    assert machine.devices == (("cuda:0", 5), ("cuda:2", 7)) and not machine.is_uniform
    assert Machine((), 9).devices == (("cpu", 9),)
    assert machine.with_gpus(2, 4) == Machine((4, 4), 9) and machine.with_gpus(2, 4).is_uniform
    assert Machine((0,), 0, 0).gpus == ()
    for wrong in ({"gpus": (-1, 5)}, {"cpu": -1}, {"disk": -1}):
        with pytest.raises(ValueError, match="a memory of -1 bytes"):
            Machine(**wrong)


@pytest.mark.parametrize("least", [4, 5, 9, 63, 64])
def test_the_smallest_number_that_fits_is_found(least: int):
    assert _smallest(lambda n: n >= least, 3, 64) == least
    assert _largest(lambda n: n < least, 65) == least - 1


def test_where_no_number_fits_none_is_found():
    assert _smallest(lambda n: n >= 65, 3, 64) is None
    assert _smallest(lambda n: True, 64, 64) is None
    assert _largest(lambda n: n < 1, 9) is None
    assert _largest(lambda n: True, 1) is None
    assert _largest(lambda n: n < 2, 2) == _largest(lambda n: n < 2, 9) == 1
    assert _narrower(None) == ("int8", "nf4") and _narrower("int8") == ("nf4",)
    assert _narrower("nf4") == ()


def test_changes_that_would_do_are_the_smallest_by_trying_all(monkeypatch: pytest.MonkeyPatch):
    """Of a model of some 3.5 GB, for a GPU of 2.5 GB of which CUDA takes one."""
    monkeypatch.setattr("hooked_hybrid.accounting.plan.changes.SCHEMES", ())
    cfg = presets.jamba("MA" * 4, d_model=2048, d_mlp=8192, d_vocab=99, n_heads=4, n_experts=4)
    machine = Machine((2500 * MB,))
    found = plan(cfg, machine, (64,), 1, torch.float32)
    assert not found.fits

    def fits(changed: Machine, length: int = 64) -> bool:
        return Planner(found.sizes, changed, length).fits()

    n = next(n for n in range(2, 9) if fits(machine.with_gpus(n, 2500 * MB)))
    size = next(n for n in range(3, 99) if fits(Machine((n * GB,))))
    cpu = next(n for n in range(1, 99) if fits(Machine(machine.gpus, n * GB)))
    assert {c.option: c.to_load for c in found.changes} == {
        f"--gpus {n}x2500MB": f"{n} GPUs of 2.5 GB",
        f"--gpus 1x{size}GB": f"1 x {size} GB of GPU memory",
        f"--cpu {cpu}GB": f"{cpu} GB of CPU memory",
        "--disk": "offload_folder=",
    }
    assert fits(Machine(machine.gpus, 0, 2**60)) and not fits(machine, 1)
    assert not plan(cfg, machine, (64,), 1, torch.bfloat16).fits
    assert list(changes(found.sizes, found.machine, max(found.lengths))) == list(found.changes)


def test_more_gpus_and_larger_ones_are_tried_up_to_64_and_to_a_million_gigabytes():
    machine = Machine((40 * GB, 40 * GB))

    def options(fits: Any) -> list[tuple[str, str | None]]:
        return [tuple(change) for change in _of_gpus(machine, fits)]  # type: ignore[misc]

    assert options(lambda m: len(m.gpus) >= 64) == [("--gpus 64x40GB", "64 GPUs of 40 GB")]
    assert options(lambda m: len(m.gpus) >= 65) == []
    assert options(lambda m: m.gpus[0] >= 2**20 * GB) == [
        ("--gpus 2x1048576GB", "2 x 1048576 GB of GPU memory")
    ]
    assert options(lambda m: m.gpus[0] > 2**20 * GB) == []
    assert [*_of_gpus(Machine((GB, 2 * GB)), lambda m: True)] == []
    assert [_size(n) for n in (3 * GB, 1500 * MB, 7, MB + 1)] == [
        "3GB", "1500MB", "7B", "1000001B",
    ]  # fmt: skip


def test_this_machine_is_what_is_allowed_of_it(monkeypatch: pytest.MonkeyPatch):
    free: dict[Any, int] = {0: 5 * GB, 1: 6 * GB, "cpu": 7 * GB}
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: free)
    assert this_machine(None, False) == Machine((5 * GB, 6 * GB), 7 * GB, None)
    assert this_machine({1: "2GB", "cpu": 3}, True) == Machine((0, 2 * GB), 3, ANY_DISK)
    assert this_machine({"cpu": "1KB"}, False) == Machine((), 1000)
    assert this_machine({0: 9}, False) == Machine((9,), 0)
    with pytest.raises(ValueError, match="max_memory names 2; this machine has 0, 1, 'cpu'"):
        this_machine({2: 1}, False)
    monkeypatch.setitem(sys.modules, "accelerate.utils", None)
    with pytest.raises(ImportError, match=r"hooked-hybrid\[offload\]"):
        this_machine(None, False)


def test_a_plan_is_made_for_the_longest_of_its_lengths():
    found = plan(CFG, Machine((), GB), (30, 20, 30), 2, torch.float32)
    assert found.lengths == (20, 30) and found.split == Split((4,)) and found.fits
    assert found.sizes.on_cpu and not plan(CFG, Machine((GB * 9,)), (5,)).sizes.on_cpu
    by_length = [found.usages(length)[0] for length in (20, 30)]
    assert by_length[0].state < by_length[1].state == found.whole.state
    assert list(found.require()) == [
        "embed", *(f"blocks.{i}" for i in range(4)), "ln_final", "unembed",
    ]  # fmt: skip
    assert plan(CFG, Machine((), GB), (1,), 1).lengths == (1,)
    assert plan(CFG, Machine((), GB)).lengths == (2048,)
    for wrong in ({"lengths": ()}, {"lengths": (0, 5)}, {"batch": 0}):
        with pytest.raises(ValueError, match="give 1 or more of each"):
            plan(CFG, Machine((), GB), **wrong)


@pytest.mark.parametrize(
    ("machine", "beside"),
    [
        (Machine((1, 2), 5), "2 GPUs offer 3 B, with 5 B of CPU memory and nothing on the disk"),
        (Machine((0, 2), 5), "the GPU offers 2 B, with 5 B of CPU memory and nothing"),
        (Machine((), 5), "the CPU offers 5 B, with nothing on the disk"),
        (Machine((), 5, ANY_DISK), "the CPU offers 5 B, with room on the disk"),
        (Machine((), 5, 7), "the CPU offers 5 B, with 7 B on the disk"),
    ],
)
def test_why_a_model_has_no_place_names_what_there_is(machine: Machine, beside: str):
    found = plan(CFG, machine, (20,), 3, torch.float32)
    assert found.why_not.endswith(beside) or beside in found.why_not
    whole = found.whole
    assert whole.weights == sum(found.sizes.weights.values())
    assert f"weights of {show_size(whole.weights)}, and for 3 x 20 tokens" in found.why_not
    assert (
        f"a state of {show_size(whole.state)} and {show_size(whole.working)} to work"
        in found.why_not
    )
    assert ("to load it in" in found.why_not) == (whole.loading > whole.running)
    assert found.remedy([]) == "No single change will do"
    assert found.remedy(["a", "b"]) == "It would fit with a, or b"


def test_changes_are_for_the_longest_length_of_a_plan(monkeypatch: pytest.MonkeyPatch):
    """Of a model whose keys and values take 520 bytes a token: 4 million of them take 2 GB."""
    monkeypatch.setattr("hooked_hybrid.accounting.plan.changes.SCHEMES", ())
    cfg = presets.griffin("A", d_model=8, d_head=64, d_vocab=99, n_heads=1, n_keys=None)
    found = plan(cfg, Machine((), GB), (64, 4_000_000), 1, torch.float32)
    assert not found.fits and found.sizes.state(0, 4_000_000) == 4_000_000 * 520

    def fits(gb: int, length: int) -> bool:
        return Planner(found.sizes, Machine((), gb * GB), length).fits()

    said = dict(change.option.split(" ") for change in found.changes if " " in change.option)
    length = int(said["--lengths"])
    assert fits(1, length) and not fits(1, length + 1) and length > 10**5
    assert said["--cpu"] == f"{next(n for n in range(2, 99) if fits(n, 4_000_000))}GB"
    assert "--batch" not in said  # one row is the fewest
    assert "--disk" not in {change.option for change in found.changes}  # it holds weights alone
    rows = plan(cfg, Machine((), GB), (400_000,), 9, torch.float32)
    (batch,) = (int(c.option.split(" ")[1]) for c in rows.changes if "--batch" in c.option)
    for n, does in ((batch, True), (batch + 1, False)):
        assert plan(cfg, Machine((), GB), (400_000,), n, torch.float32).fits == does


@pytest.mark.parametrize(
    ("fitting", "said"),
    [(("int8", "nf4"), ["--quantize int8"]), (("nf4",), ["--quantize nf4"]), ((), [])],
)
def test_of_schemes_that_would_do_the_least_narrow_is_named(
    monkeypatch: pytest.MonkeyPatch, fitting: tuple[str, ...], said: list[str]
):
    class Fits:
        def __init__(self, sizes: Sizes, machine: Machine, length: int) -> None:
            self.scheme = sizes.quantize

        def fits(self) -> bool:
            return self.scheme in fitting

    found = plan(CFG, Machine((), 5), (20,))
    monkeypatch.setattr("hooked_hybrid.accounting.plan.changes.Planner", Fits)
    assert [
        change.option for change in changes(found.sizes, found.machine, max(found.lengths))
    ] == said
