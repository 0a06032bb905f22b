"""`hooked-hybrid harvest`: activations of a data set, in shards for autoencoder trainers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hooked_hybrid.commands.option_groups import make_command
from hooked_hybrid.commands.run_options import RunOptions
from hooked_hybrid.evaluation.forms import form_of
from hooked_hybrid.harvest.harvesting import harvest as run_harvest
from hooked_hybrid.harvest.reading import HarvestedActivations
from hooked_hybrid.harvest.running import hooks_to_keep
from hooked_hybrid.harvest.shards import INDEX
from hooked_hybrid.harvest.texts import read_texts
from hooked_hybrid.hooks.names import HookNameError

Texts = Annotated[
    Path,
    typer.Option(
        help="A .txt (one document), a .jsonl (one a line), a folder of these, or a data set that "
        "`datasets` saved: --texts wiki.jsonl."
    ),
]
Hooks = Annotated[
    list[str],
    typer.Option(
        "--hook",
        help="Hook point or pattern: --hook 'blocks.*.hook_resid_post',hook_embed,z2.",
    ),
]
Field = Annotated[
    str | None,
    typer.Option(
        help="Field of a line with the text: --field content.",
        show_default="text",
        rich_help_panel="More options",
    ),
]
NDocuments = Annotated[
    int | None,
    typer.Option(
        help="Use only this many documents: --n-documents 1000.", min=1, show_default="all"
    ),
]
ContextLength = Annotated[
    int, typer.Option(help="Most tokens of a context: --context-length 1024.", min=1)
]
BatchSize = Annotated[int, typer.Option(help="Contexts of a forward: --batch-size 32.", min=1)]
WrittenDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        "--write",
        help="Dtype of the values in the shards: --write bfloat16.",
        show_default="--dtype",
        rich_help_panel="More options",
    ),
]
ShardMegabytes = Annotated[
    int,
    typer.Option(
        help="Approximate size of a shard: --shard-megabytes 2048.",
        min=1,
        rich_help_panel="More options",
    ),
]
PrependBos = Annotated[
    bool | None,
    typer.Option(
        "--prepend-bos/--no-prepend-bos",
        help="Begin every context with BOS.",
        show_default="the tokenizer's default",
        rich_help_panel="More options",
    ),
]
KeepSpecial = Annotated[
    bool,
    typer.Option(
        "--keep-special",
        help="Write the rows of BOS, EOS and padding tokens too.",
        rich_help_panel="More options",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Put the contexts in random order: --seed 0.", show_default="order of the documents"
    ),
]
K = Annotated[
    int | None,
    typer.Option(
        "--k",
        help="Keep only this many heads in each attention layer: --k 2.",
        min=0,
        show_default="all",
    ),
]


@make_command(out=Path("results/harvest"))
def harvest(
    texts: Texts,
    hook: Hooks,
    run: RunOptions,
    field: Field = None,
    n_documents: NDocuments = None,
    context_length: ContextLength = 512,
    batch_size: BatchSize = 8,
    write: WrittenDtype = None,
    shard_megabytes: ShardMegabytes = 512,
    prepend_bos: PrependBos = None,
    keep_special: KeepSpecial = False,
    seed: Seed = None,
    k: K = None,
) -> None:
    """Activations of a data set, in safetensors shards that trainers of autoencoders read.

    Each shard holds every hook point's values, a row for each token, with the token, its document
    and its position; index.json lists them. It may be stopped at any time and continued by the same
    command with --resume, with the same bytes.

    Example: hooked-hybrid harvest --texts wiki.jsonl --hook 'blocks.*.hook_resid_post'
    --out results/wiki
    """
    with run.started() as workers:
        documents = islice(read_texts(texts, field), n_documents)
        model = run.load()
        try:
            names = hooks_to_keep(model, hook)
        except HookNameError as error:
            raise ValueError(f"--hook: {error}") from None
        harvested = run_harvest(
            model,
            documents,
            names,
            run.out,
            context_length=context_length,
            batch_size=batch_size,
            dtype=write,
            shard_bytes=shard_megabytes * 2**20,
            prepend_bos=prepend_bos,
            drop_special=not keep_special,
            seed=seed,
            fwd_hooks=form_of(k).hooks(model.cfg) if k is not None else (),
            resume=run.resume,
            workers=workers,
        )
        show(harvested)


def show(harvested: HarvestedActivations) -> None:
    """Print the files and their contents."""
    console = Console()
    shown = Table(
        title=f"{len(harvested):,} tokens in {len(harvested.paths)} shards",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    for heading in ("hook point", "shape", "dtype", "mean norm"):
        shown.add_column(heading, justify="left" if heading == "hook point" else "right")
    for name, said in harvested.index["hooks"].items():
        norm = said["mean_norm"]
        shape = " x ".join(map(str, said["shape"]))
        shown.add_row(name, shape, said["dtype"], "" if norm is None else f"{norm:.4g}")
    console.print(shown)
    path = harvested.folder / INDEX
    console.print(f"   index  {path}", markup=False, highlight=False, soft_wrap=True)
