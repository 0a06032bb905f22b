"""Options of commands: groups, device maps from text, and what reaches a model and its workers."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid
from hooked_hybrid.commands.niah import model_card
from hooked_hybrid.commands.option_groups import make_command
from hooked_hybrid.commands.ray_options import workers_of
from hooked_hybrid.commands.run_options import Loading, RunOptions, device_map_of, memory_of
from tests.models import griffin_config, random_model


@dataclass(frozen=True)
class Shape:
    """Two options."""

    width: Annotated[int, typer.Option(help="Across.")] = 3
    height: Annotated[int, typer.Option(help="Up.")] = 4


def area_command() -> tuple[Any, list[tuple[Shape, bool]]]:
    calls: list[tuple[Shape, bool]] = []

    @make_command(height=7)
    def area(shape: Shape, loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
        """Take a shape."""
        calls.append((shape, loud))

    return area, calls


def test_fields_of_a_group_are_options_with_the_commands_defaults():
    area, calls = area_command()
    assert list(signature(area).parameters) == ["width", "height", "loud", "context"]
    app = typer.Typer()
    app.command()(area)
    assert CliRunner().invoke(app, []).exit_code == 0
    assert CliRunner().invoke(app, ["--width", "5", "--loud", "--height", "6"]).exit_code == 0
    assert calls == [(Shape(3, 7), False), (Shape(5, 6), True)]
    assert "Across." in CliRunner().invoke(app, ["--help"]).stdout


def test_a_command_is_called_from_python_too():
    area, calls = area_command()
    area(width=9)
    assert calls == [(Shape(9, 7), False)]


def test_a_default_of_no_option_is_refused():
    def area(shape: Shape) -> None: ...

    with pytest.raises(TypeError, match="has no option 'depth'"):
        make_command(depth=1)(area)


def test_device_maps_are_auto_json_or_a_file(tmp_path: Path):
    assert device_map_of("auto") == "auto"
    assert device_map_of('{"": 0, "blocks.3": "cpu"}') == {"": 0, "blocks.3": "cpu"}
    (tmp_path / "map.json").write_text('{"": "cpu"}')
    assert device_map_of(str(tmp_path / "map.json")) == {"": "cpu"}
    (tmp_path / "plan.json").write_text(json.dumps({"fits": True, "device_map": {"": "cuda:0"}}))
    assert device_map_of(str(tmp_path / "plan.json")) == {"": "cuda:0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no-such-file.json", "no-such-file.json: it cannot be read"),
        ("{broken", "is not JSON"),
        ('{"": null}', "give an object of parts and devices"),
        ('{"fits": false, "why_not": "too large"}', "a plan that does not fit: too large"),
    ],
)
def test_an_invalid_device_map_is_an_error_with_the_reason(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        device_map_of(text)


def test_memory_is_given_by_device():
    assert memory_of(["0=20GB", "cpu = 100GB"]) == {0: "20GB", "cpu": "100GB"}
    for wrong in ("20GB", "gpu=20GB", "0="):
        with pytest.raises(ValueError, match=f"--max-memory {wrong}: give such as"):
            memory_of([wrong])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RunOptions(device="meta", device_map="auto"), "--device meta and --device-map"),
        (RunOptions(max_memory=["cpu=1GB"]), "need --device-map"),
        (RunOptions(offload_folder=Path("here")), "need --device-map"),
        (RunOptions(device="toaster"), "--device toaster cannot be used here"),
    ],
)
def test_options_that_do_not_go_together(options: RunOptions, message: str):
    with pytest.raises(ValueError, match=message):
        options.load()


def test_quantised_and_placed_models_are_loaded_and_say_so(tmp_path: Path):
    threads = torch.get_num_threads()
    try:
        plain = RunOptions().load()
        small = RunOptions(quantize="int8").load()
        device_map = '{"": "cpu", "blocks.1": "disk"}'
        placed = RunOptions(device_map=device_map, offload_folder=tmp_path / "weights").load()
    finally:
        torch.set_num_threads(threads)
    assert plain.quantization is None and plain.placement is None
    assert model_card(small, "m")["large weights"] == "int8"
    n_parts = plain.cfg.n_layers + 3
    assert model_card(placed, "m")["parts by place"] == f"{n_parts - 1} on cpu, 1 on disk"
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(placed(tokens), plain(tokens))
        assert not torch.equal(small(tokens), plain(tokens))


def test_a_workers_loader_has_absolute_paths_and_all_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    loading = Loading("mine", "bfloat16", None, "auto", {"cpu": "1GB"}, "weights").anywhere()
    calls: list[dict[str, Any]] = []
    model = random_model(griffin_config("R"))

    def load(name: str, **options: Any) -> HookedHybrid:
        calls.append({**options, "name": name})
        return model

    monkeypatch.setattr(HookedHybrid, "from_pretrained", load)
    pickle.loads(pickle.dumps(loading))(device="cuda")
    assert calls == [
        {
            "name": str(tmp_path / "mine"),
            "dtype": torch.bfloat16,
            "device_map": "auto",
            "max_memory": {"cpu": "1GB"},
            "offload_folder": str(tmp_path / "weights"),
        }
    ]
    assert Loading("tiny-griffin", "float32").anywhere().name == "tiny-griffin"


def test_workers_on_gpus_load_there():
    workers = workers_of("local", 1, 1, None, "cpu", Loading("tiny-griffin", "float32"))
    assert workers.load.keywords == {"device": "cuda"}  # type: ignore[union-attr]
