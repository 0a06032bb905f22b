"""`PretrainedModel`: from a published checkpoint, and to a folder that transformers loads."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from hooked_hybrid.model.language_model import LanguageModel
from hooked_hybrid.network.weights.quantization import Only
from hooked_hybrid.options import refuse_ignored
from hooked_hybrid.text.text import as_tokenizer

if TYPE_CHECKING:
    from hooked_hybrid.accounting.plan.machine import MaxMemory
    from hooked_hybrid.network.placement.places import DeviceMap, Place

# What reads checkpoints is imported where it is used: it brings `tokenizers`, `jinja2` and more.
P = TypeVar("P", bound="PretrainedModel")


class PretrainedModel(LanguageModel):
    """A language model that is loaded from checkpoints, and saved as one."""

    @classmethod
    def from_pretrained(
        cls: type[P],
        name_or_path: str | os.PathLike[str],
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: Any = None,
        revision: str | None = None,
        device_map: DeviceMap | Literal["auto"] | None = None,
        max_memory: MaxMemory | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        quantize: str | Any | None = None,
        quantize_only: Only | None = None,
        adapter: str | os.PathLike[str] | Literal[False] | None = None,
        ignore_config_keys: Collection[str] = (),
        **config_overrides: Any,
    ) -> P:
        """Load a checkpoint.

        Args:
            name_or_path: a Hugging Face hub id, a `save_pretrained` directory (safetensors or
                `pytorch_model.bin`, sharded or not), or one of Google's `.pt` files, or a
                directory that holds one.
            dtype: of the parameters; the files may hold another.
            device: where the parameters go.
            tokenizer: a Hugging Face tokenizer, or a folder that holds one, used instead of the
                checkpoint's own.
            revision: branch, tag or commit on the hub.
            device_map: for a model larger than a device: where each part goes, by name (`"embed"`,
                `"blocks.3"`, ...; `"blocks"` means all blocks, `""` everything), on a device,
                "cpu" or "disk"; or "auto". See `placement.resolve`; instead of `device`.
            max_memory: for "auto": bytes, or such as "20GB", by number of a GPU and for "cpu";
                None takes what is free.
            offload_folder: of what goes to the disk. It is kept, and used again for the same
                checkpoint and dtype.
            quantize: "int8", "nf4" (4 bits) or a weight-only config of torchao: large weights are
                quantised as they are read, see `quantized`.
            quantize_only: names of weights (`quantized.quantizable`), or a predicate on them.
            adapter: directory or hub id of a LoRA adapter that peft saved, merged into the weights
                as they are read; False leaves out one in the same folder.
            ignore_config_keys: settings of `config.json` to be taken as not there, where you know
                that they change nothing.
            config_overrides: `n_keys`, `logits_soft_cap`, ...; see `HybridConfig.with_overrides`.

        Raises:
            weights_conversion.CheckpointError: what is wrong with the checkpoint, by name.
            ValueError: a device map that cannot be, or weights that cannot be quantised so.
            MemoryError: "auto", and no room; it says what is missing.
            OSError: `offload_folder` cannot be written, or its disk is full.

        Warns:
            UserWarning: settings that are not used (of `generation_config.json`, of programs that
                add their own to `config.json`), or weights of an earlier saving in the same folder.

        Examples:
            >>> model = HookedHybrid.from_pretrained("tiny-griffin", n_keys=None)  # no window
            >>> model.cfg.layers[2].mixer.n_keys is None
            True
        """
        from hooked_hybrid.network.placement.homes import plan_homes
        from hooked_hybrid.network.placement.offload import identity_of
        from hooked_hybrid.text.tokenizer import read_tokenizer
        from weights_conversion.adapters import adapter_files
        from weights_conversion.content import adapter_of, read_content
        from weights_conversion.errors import CheckpointError
        from weights_conversion.filling import as_dtype, fill, make_empty
        from weights_conversion.sources import open_checkpoint

        _refuse_mixed_places(device, device_map, max_memory, offload_folder)
        if quantize is None and quantize_only is not None:
            raise ValueError("quantize_only needs quantize: give quantize='int8'")
        tokenizer, dtype = as_tokenizer(tokenizer), as_dtype(dtype)
        checkpoint = open_checkpoint(name_or_path, revision)
        merged = adapter_of(checkpoint, adapter)
        content = read_content(checkpoint, config_overrides, merged, ignore_config_keys)
        model = make_empty(cls, content, dtype)
        places = _plan_places(
            model, device, device_map, max_memory, offload_folder, quantize, quantize_only
        )
        identity = None
        if offload_folder is not None:
            of_adapter = [] if merged is None else adapter_files(merged)
            identity = identity_of([*checkpoint.files(), *of_adapter], dtype)
        homes = plan_homes(
            model,
            places,
            offload_folder=offload_folder,
            identity=identity,
            quantize=quantize,
            quantize_only=quantize_only,
            is_planned=device_map == "auto",
        )
        try:
            model.tokenizer = read_tokenizer(checkpoint.folder) if tokenizer is None else tokenizer
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        return fill(model, content, homes)

    @classmethod
    def from_hf(
        cls: type[P],
        hf_model: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tokenizer: Any = None,
        ignore_config_keys: Collection[str] = (),
        **config_overrides: Any,
    ) -> P:
        """Copy a `transformers` model that is in memory; dtype and device default to its own.

        A compiled or parallel model is taken as the one inside. A model with an adapter must be
        merged first (`merge_and_unload()`). Its `generation_config` gives the end tokens.

        Args:
            hf_model: a causal model, or one without its head where that is the embedding.
            dtype, device: of the copy.
            tokenizer: for text.
            ignore_config_keys, config_overrides: as `from_pretrained` takes them.

        Raises:
            weights_conversion.CheckpointError: what is wrong with the model, by name.

        Examples:
            >>> from transformers import AutoModelForCausalLM
            >>> model.save_pretrained("in_their_format")
            >>> theirs = AutoModelForCausalLM.from_pretrained("in_their_format")
            >>> ours = HookedHybrid.from_hf(theirs)
            >>> torch.equal(ours(tokens), model(tokens))
            True
        """
        from hooked_hybrid.network.placement.homes import plan_homes
        from hooked_hybrid.network.placement.places import everywhere
        from weights_conversion.content import content_of
        from weights_conversion.families import family_of_config
        from weights_conversion.filling import fill, make_empty
        from weights_conversion.sources import MemorySource

        tokenizer = as_tokenizer(tokenizer)
        while not hasattr(hf_model, "config") and isinstance(
            inner := getattr(hf_model, "module", None), nn.Module
        ):
            hf_model = inner  # of DataParallel
        config = hf_model.config.to_dict()
        family = family_of_config(config)
        generation = getattr(hf_model, "generation_config", None)
        generation = None if generation is None else generation.to_dict()
        cfg = family.read(config, config_overrides, ignore_config_keys, generation)
        dtype = hf_model.dtype if dtype is None else dtype
        device = hf_model.device if device is None else device
        content = content_of(family, cfg, MemorySource(hf_model.state_dict()))
        model = make_empty(cls, content, dtype)
        model.tokenizer = tokenizer
        return fill(model, content, plan_homes(model, everywhere(cfg, device)))

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        max_shard_size: int = 5_000_000_000,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write a directory that `transformers` and `from_pretrained` load, whole or not at all.

        Args:
            directory: a new or an empty one, or with `overwrite` one that holds a checkpoint.
            max_shard_size: bytes in one file; a larger model is sharded.
            overwrite: replace a checkpoint, tokenizer included, once the new one is written; the
                old one is there until then. Other files, such as a README.md, are kept. Needs room
                on the disk for both.

        Raises:
            FileExistsError: the directory is not empty; with `overwrite`, it holds no checkpoint,
                or a folder or a link besides.
            OSError: it cannot be written; an old checkpoint is as it was.

        Examples:
            >>> model.save_pretrained("copy_of_tiny")
            >>> same = HookedHybrid.from_pretrained("copy_of_tiny")
            >>> torch.equal(same(tokens), model(tokens))
            True
        """
        from weights_conversion.save import save

        save(self, directory, max_shard_size, self.tokenizer, overwrite)


def _refuse_mixed_places(
    device: torch.device | str,
    device_map: DeviceMap | Literal["auto"] | None,
    max_memory: MaxMemory | None,
    offload_folder: str | os.PathLike[str] | None,
) -> None:
    """Refuse options that need a device map."""
    if device_map is None and (max_memory is not None or offload_folder is not None):
        raise ValueError("max_memory and offload_folder need device_map: give device_map='auto'")
    if device_map is not None and torch.device(device).type != "cpu":
        raise ValueError(f"device={str(device)!r} and a device_map: give one of them")


def _plan_places(
    model: LanguageModel,
    device: torch.device | str,
    device_map: DeviceMap | Literal["auto"] | None,
    max_memory: MaxMemory | None,
    offload_folder: str | os.PathLike[str] | None,
    quantize: str | Any | None,
    quantize_only: Only | None,
) -> dict[str, Place]:
    """Return where each part goes: all to one device, by the map given, or by that of a plan.

    Raises:
        ValueError: a map that cannot be, or options that it leaves without effect.
        MemoryError: there is no plan; says what would do.
    """
    from hooked_hybrid.network.placement.places import everywhere, resolve

    if device_map is None:
        return everywhere(model.cfg, device)
    if device_map != "auto":
        if max_memory is not None:
            raise ValueError("max_memory is for device_map='auto'; a dict says all there is to say")
        return resolve(model.cfg, device_map)
    if quantize is not None:
        refuse_ignored(
            "quantised weights stay where they run, none on the disk",
            offload_folder=offload_folder,
        )
    from hooked_hybrid.accounting.plan.machine import this_machine
    from hooked_hybrid.accounting.plan.planning import plan as plan_of

    machine = this_machine(max_memory, offload_folder is not None)
    found = plan_of(
        model.cfg, machine, dtype=model.dtype, quantize=quantize, quantize_only=quantize_only
    )
    if found.fits:
        return resolve(model.cfg, found.device_map)
    would_do = [change.to_load for change in found.changes if change.to_load is not None]
    raise MemoryError(f"{found.why_not}. {found.remedy(would_do)}")
