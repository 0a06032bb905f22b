"""Models in several places: the same bits as in one, every hook live, and plans that can be kept.

This machine may have no GPU. Values are compared where blocks lie on the disk and run on the CPU;
that everything of a layer is on its layer's device is shown with the meta device as the second one;
what needs two GPUs is skipped without them.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.accounting.plan import Machine
from hooked_hybrid.accounting.plan.planner import Planner
from hooked_hybrid.accounting.plan.planning import plan
from hooked_hybrid.accounting.plan.working import Sizes
from hooked_hybrid.hooks.marks import watcher
from hooked_hybrid.model.folding import fold_ln
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.placement import place, resolve
from hooked_hybrid.network.placement.offload import OffloadFolder
from hooked_hybrid.runs.identity.model import model_identity
from tests.models import CONFIGS, random_tokens, relative, tiny_model
from tests.tolerances import FP32_PARITY

GB = 10**9
MAPS: dict[str, dict[str, str | int | torch.device]] = {
    "disk": {"": "disk"},
    "some": {"": "cpu", "blocks.1": "disk", "blocks.2": "disk"},
}
NAMES = ["griffin", "jamba"]


@cache
def whole(name: str) -> HookedHybrid:
    return tiny_model(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def placed(folder: Path) -> dict[tuple[str, str], HookedHybrid]:
    """Return every tiny model in every map."""
    return {
        (name, kind): place(tiny_model(name), device_map, folder)
        for name in NAMES
        for kind, device_map in MAPS.items()
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "jamba"
    whole("jamba").save_pretrained(path, max_shard_size=20_000)
    return path


# --- maps -------------------------------------------------------------------------------------


def test_a_map_names_each_part_by_the_longest_name_that_fits():
    cfg = CONFIGS["jamba"]
    places = resolve(cfg, {"": "cpu", "blocks": "disk", "blocks.2": "meta"})
    assert [p.name for p in places.values()] == [
        "cpu",
        "disk",
        "disk",
        "meta",
        "disk",
        "cpu",
        "cpu",
    ]
    assert {str(p.runs_on) for n, p in places.items() if n.startswith("blocks")} == {"meta"}
    tied = resolve(CONFIGS["griffin"], {"": "disk", "unembed": "cpu"})
    assert tied["unembed"] == tied["embed"]
    numbered = resolve(cfg, {"": "cpu", "blocks.1": "cpu:0"})  # tensors say "cpu"
    assert {place.device for place in numbered.values()} == {torch.device("cpu")}


def test_blocks_kept_elsewhere_run_on_the_accelerator_of_the_part_before_them(monkeypatch: Any):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    places = resolve(
        CONFIGS["jamba"], {"": 0, "blocks.1": 1, "blocks.2": "disk", "blocks.3": "cpu"}
    )
    assert [str(places[f"blocks.{i}"].runs_on) for i in range(4)] == ["cuda:0", *["cuda:1"] * 3]
    names = [place.name for place in places.values()]
    assert names == ["cuda:0", "cuda:0", "cuda:1", "disk", "cpu", "cuda:0", "cuda:0"]
    first = resolve(CONFIGS["jamba"], {"": "cpu", "blocks.2": 1})
    assert {str(first[f"blocks.{i}"].runs_on) for i in range(4)} == {"cuda:1"}
    with pytest.raises(ValueError, match="this machine has 2 GPUs"):
        resolve(CONFIGS["jamba"], {"": 2})
    tied = resolve(CONFIGS["griffin"], {"": "cpu", "unembed": 0})  # which has no weights there
    assert {str(place.runs_on) for place in tied.values()} == {"cpu"}


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"blocks": "cpu"}, "gives embed no place"),
        ({"": "cpu", "blocks.4": "cpu"}, "'blocks.4'; its names are"),
        ({"": "cpu", "blocks.1.mlp": "disk"}, "a block stays whole"),
        ({"": "floppy"}, "'floppy': give a device"),
        ({"": "xla"}, "'xla', which this machine or this build of torch does not have"),
        ({"": "privateuseone"}, "'privateuseone', which this machine"),
        ({"": "cpu", "unembed": "meta"}, "run on cpu, meta: give them one device"),
    ],
)
def test_a_map_that_cannot_be_is_refused_with_the_remedy(device_map: Any, message: str):
    with pytest.raises(ValueError, match=message):
        resolve(CONFIGS["jamba"], device_map)


# --- the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_cache_and_generation_are_those_of_one_device(placed: Any, name: str, kind: str):
    one, several, tokens = whole(name), placed[name, kind], random_tokens(n_pos=12)
    wanted, kept = one.run_with_cache(tokens, names_filter=lambda _: True)
    got, cached = several.run_with_cache(tokens, names_filter=lambda _: True)
    assert torch.equal(got, wanted) and cached.keys() == kept.keys()
    assert all(torch.equal(cached[hook], kept[hook]) for hook in kept)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    outs = []
    for model in (one, several):
        _, state = model(tokens, attention_mask=mask, return_type=None, return_state=True)
        state = state.fork(2)[[0, 3, 2]]
        outs.append(
            model.generate(
                tokens[[0, 1, 1], :4],
                4,
                state=state,
                generation_hooks=interventions.keep_top_heads(1),
                names_filter=True,
                return_type="output",
                verbose=False,
            )
        )
    assert torch.equal(outs[0].tokens, outs[1].tokens) and outs[0].state == outs[1].state
    assert torch.equal(outs[0].logprobs, outs[1].logprobs)
    assert all(torch.equal(outs[0].cache[hook], outs[1].cache[hook]) for hook in outs[0].cache)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_at_every_hook_point_acts_as_on_one_device(placed: Any, name: str):
    one, several, tokens = whole(name), placed[name, "some"], random_tokens(batch=1, n_pos=4)
    plain = one(tokens)
    of_these = ("hook_embed", "blocks.1.", "blocks.2.", "ln_final", "unembed")  # every kind
    for hook_name, point in one.hook_dict.items():
        if point.is_integer or not hook_name.startswith(of_these):
            continue

        def edit(value: Tensor, hook: HookPoint) -> Tensor:
            return value * 0.5 - (0.1 if str(hook.name).endswith("log_decay") else 0.0)

        wanted = one.run_with_hooks(tokens, fwd_hooks=[(hook_name, edit)])
        assert torch.equal(several.run_with_hooks(tokens, fwd_hooks=[(hook_name, edit)]), wanted)
        assert not torch.equal(wanted, plain)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_every_hook_are_those_of_one_device(placed: Any, name: str):
    tokens = random_tokens(n_pos=6)
    _, kept = whole(name).run_with_cache(tokens, incl_bwd=True)
    _, cached = placed[name, "some"].run_with_cache(tokens, incl_bwd=True)
    assert cached.keys() == kept.keys() and any(key.endswith("_grad") for key in kept)
    assert all(torch.equal(cached[key], kept[key]) for key in kept)


def test_a_long_prompt_brings_each_block_once_and_gives_the_same(placed: Any, monkeypatch: Any):
    one, several = whole("jamba"), placed["jamba", "disk"]
    tokens = random_tokens(batch=1, n_pos=1030)
    starts: dict[str, list[tuple[str, int]]] = {"one": [], "several": []}

    def run(model: HookedHybrid, key: str) -> Any:
        @interventions.per_position
        def look(value: Tensor, hook: HookPoint) -> None:
            starts[key].append((str(hook.name), int(hook.run.query_pos[0, 0])))

        with torch.no_grad(), model.hooks([(lambda n: n.endswith("resid_pre"), look)]):
            return model(tokens, return_state=True)

    (wanted, state), (got, after) = run(one, "one"), run(several, "several")
    assert torch.equal(got, wanted) and after == state
    assert sorted(starts["one"]) == sorted(starts["several"])
    assert [at for _, at in starts["one"][:4]] == [0] * 4  # a piece after another
    assert starts["several"][:3] == [("blocks.0.hook_resid_pre", at) for at in (0, 512, 1024)]


# --- where things are -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["griffin", "jamba-dense-ends-in-attention"])
def test_stream_state_and_runs_are_on_the_device_of_their_layer(name: str):
    model, seen = tiny_model(name), set()
    ends: dict[str, str | int | torch.device] = dict.fromkeys(
        ("embed", "ln_final", "unembed"), "cpu"
    )
    place(model, {**ends, "blocks": "meta", "blocks.0": "cpu"})  # its weights are brought
    assert model.device.type == "cpu" and {d.type for d in model.layer_devices} == {"meta"}
    assert {p.device.type for p in model.blocks[0].parameters()} == {"cpu"}

    @watcher
    def look(value: Tensor, hook: HookPoint) -> None:
        found = {value.device, hook.run.query_pos.device, hook.run.rows.device}
        assert found == {torch.device("cpu" if hook.name == "hook_embed" else "meta")}
        seen.add(hook.name)

    tokens, hooks = random_tokens(n_pos=6), [(lambda n: True, look)]
    with torch.no_grad(), model.hooks(hooks):
        _, state = model.run_layout(tokens, lay_out(tokens, None, None, None), None, None)
        new = tokens[:, :1]
        _, state = model.run_layout(new, lay_out(new, state, None, None), state, None)
    assert seen == {n for n in model.hook_dict if not n.startswith(("ln_final", "unembed"))}
    assert {t.device.type for b in state.blocks for t in vars(b).values()} == {"meta"}
    assert state.next_pos.device.type == "cpu" and state.next_pos.tolist() == [7, 7]
    assert state.fork(2)[[0, 3]].blocks[1].__dict__.keys() == state.blocks[1].__dict__.keys()
    moved = whole(name)(tokens, return_state=True)[1].to(model.layer_devices)
    assert {t.device.type for b in moved.blocks for t in vars(b).values()} == {"meta"}
    assert moved.next_pos.device.type == "cpu"
    with pytest.raises(ValueError, match="use state.to\\(model.layer_devices\\)"):
        model(new, state=whole(name)(tokens, return_state=True)[1])
    with pytest.raises(ValueError, match="1 devices for a state of"):
        state.to([torch.device("cpu")])


# --- who reads weights ------------------------------------------------------------------------


def test_weights_on_the_disk_are_read_like_any_others(placed: Any, tmp_path: Path):
    one, several = whole("jamba"), placed["jamba", "disk"]
    assert model_identity(several) == model_identity(one)
    assert torch.equal(several.W_Q.weight, one.W_Q.weight)
    assert torch.equal(several.stack("mixer.A_log").weight, one.stack("mixer.A_log").weight)
    assert not any(p.is_meta or p.requires_grad for p in several.parameters())
    several.save_pretrained(tmp_path / "saved")
    again = HookedHybrid.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(p, dict(one.named_parameters())[n]) for n, p in again.named_parameters())


def test_a_placed_model_is_not_moved_converted_or_copied(placed: Any):
    model = placed["griffin", "some"]
    for move in (lambda: model.to("cpu"), lambda: model.half(), lambda: model.double()):
        with pytest.raises(RuntimeError, match="placed by a device_map"):
            move()
    with pytest.raises(TypeError, match="not copied or pickled"):
        copy.deepcopy(model)
    with pytest.raises(ValueError, match="placed already"):
        place(model, {"": "cpu"})
    folded, _ = fold_ln(model)  # all on the CPU: a copy in memory
    assert folded.placement is None and relative(
        folded(random_tokens()), model(random_tokens())
    ) < (FP32_PARITY)
    spread = place(tiny_model("griffin"), {"": "cpu", "blocks.1": "meta"})
    with pytest.raises(ValueError, match="lies on several devices"):
        fold_ln(spread)


def test_files_of_a_model_in_memory_leave_with_it(folder: Path, placed: Any):
    assert placed and not list(folder.iterdir())


# --- loading ----------------------------------------------------------------------------------


def test_a_checkpoint_on_the_disk_is_written_once_and_used_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any
):
    tokens, folder = random_tokens(n_pos=6), tmp_path / "offload"
    options: dict[str, Any] = {"device_map": MAPS["some"], "offload_folder": folder}
    first = HookedHybrid.from_pretrained(checkpoint, **options)
    assert torch.equal(first(tokens), whole("jamba")(tokens))
    assert first.placement is not None and first.placement.device_map["blocks.1"] == "disk"
    (own,) = folder.iterdir()
    names = {path.name for path in own.iterdir()}
    assert names == {
        n for n, _ in first.named_parameters() if n.startswith(("blocks.1", "blocks.2"))
    }
    cut = own / "blocks.1.attn.q.weight" if "blocks.1.attn.q.weight" in names else own / min(names)
    cut.write_bytes(cut.read_bytes()[:-4])  # as no interrupted load leaves it
    (own / ".blocks.2.ln1.weight.4194303.tmp").write_bytes(b"left by a process that was killed")
    written: list[str] = []
    write = OffloadFolder.write
    monkeypatch.setattr(
        OffloadFolder,
        "write",
        lambda self, name, *rest: (written.append(name), write(self, name, *rest)),
    )
    again = HookedHybrid.from_pretrained(checkpoint, **options)
    assert torch.equal(again(tokens), whole("jamba")(tokens))
    assert written == [cut.name] and {path.name for path in own.iterdir()} == names
    narrow = HookedHybrid.from_pretrained(checkpoint, dtype=torch.bfloat16, **options)
    assert narrow.dtype is torch.bfloat16 and len(list(folder.iterdir())) == 2


def test_a_load_cut_off_leaves_nothing_that_bears_a_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any
):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    with monkeypatch.context() as patched:
        patched.setattr("hooked_hybrid.network.placement.offload._make_room", full)
        with pytest.raises(OSError, match="cannot be written .No space left"):
            HookedHybrid.from_pretrained(checkpoint, **options)
    assert not [p for folder in (tmp_path / "offload").iterdir() for p in folder.iterdir()]
    usage = type("Usage", (), {"free": 10})
    with monkeypatch.context() as patched:
        patched.setattr(
            "hooked_hybrid.network.placement.offload.shutil.disk_usage", lambda _: usage
        )
        with pytest.raises(OSError, match="would take .* GB more"):
            HookedHybrid.from_pretrained(checkpoint, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": {"": "disk"}}, "puts embed on the disk: say where with offload_folder"),
        ({"device_map": "balanced"}, "give 'auto', or a dict"),
        ({"device_map": torch.device("cpu")}, "give 'auto', or a dict"),
        ({"device_map": {"": "cpu"}, "device": "meta"}, "and a device_map: give one of them"),
        ({"max_memory": {"cpu": "1GB"}}, "need device_map"),
        ({"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GB"}}, "for device_map='auto'"),
        ({"device_map": {"": "cpu"}, "offload_folder": "x"}, "puts nothing on the disk"),
        ({"device_map": "auto", "max_memory": {9: "1GB"}}, "max_memory names 9"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "'much' is not a size"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    checkpoint: Path, options: Any, message: str, unchecked: None
):
    with pytest.raises(ValueError, match=message):
        HookedHybrid.from_pretrained(checkpoint, **options)


def test_auto_fills_memory_first_and_says_what_is_missing(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any
):
    short = partial(plan, lengths=(4,))  # so that weights are most of what is needed
    monkeypatch.setattr("hooked_hybrid.accounting.plan.planning.plan", short)
    sizes = Sizes(CONFIGS["jamba"], torch.float32, on_cpu=True)
    planner = Planner(sizes, Machine((), GB), 4)
    needed = planner.usage(range(4), range(0), is_first=True).total
    load = partial(HookedHybrid.from_pretrained, checkpoint, device_map="auto")
    assert load(max_memory={"cpu": needed}).placement is None
    with pytest.raises(MemoryError, match="do not fit: the CPU offers .* offload_folder="):
        load(max_memory={"cpu": needed - 1})
    found = load(max_memory={"cpu": needed - 1}, offload_folder=tmp_path)
    assert found.placement is not None
    assert [found.placement.device_map[f"blocks.{i}"] for i in range(4)] == ["cpu"] * 2 + [
        "disk"
    ] * 2
    tokens = random_tokens(n_pos=5)
    assert torch.equal(found(tokens), whole("jamba")(tokens))


# --- with GPUs --------------------------------------------------------------------------------

n_gpus = torch.cuda.device_count()


@pytest.mark.skipif(n_gpus < 1, reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_blocks_brought_to_a_gpu_compute_what_they_do_there(name: str, tmp_path: Path):
    tokens = random_tokens(n_pos=12)
    one = tiny_model(name).to("cuda:0")
    several = place(tiny_model(name), {"": 0, "blocks.1": "cpu", "blocks.2": "disk"}, tmp_path)
    assert torch.equal(several(tokens), one(tokens))
    wanted = one.generate(tokens, 5, verbose=False, stop_at_eos=False)
    assert torch.equal(several.generate(tokens, 5, verbose=False, stop_at_eos=False), wanted)
    assert {p.device.type for p in several.blocks[1].parameters()} == {"cpu"}


@pytest.mark.skipif(n_gpus < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_two_gpus_give_what_one_does(name: str):
    tokens = random_tokens(n_pos=12)
    one = tiny_model(name).to("cuda:0")
    several = place(tiny_model(name), {"": 0, "blocks.1": 1, "blocks.3": 1})
    wanted, kept = one.run_with_cache(tokens)
    got, cached = several.run_with_cache(tokens)
    assert torch.equal(got, wanted)
    assert all(torch.equal(cached[hook].to(0), kept[hook]) for hook in kept)
    assert cached["resid_pre", 1].device == torch.device("cuda:1")
    hooks = interventions.keep_top_heads(1)
    outs = [
        m.generate(
            tokens, 5, fwd_hooks=hooks, names_filter=True, return_type="output", verbose=False
        )
        for m in (one, several)
    ]
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    assert all(torch.equal(outs[1].cache[h].to(0), outs[0].cache[h]) for h in outs[0].cache)
