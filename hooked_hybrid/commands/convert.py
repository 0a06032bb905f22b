"""`python -m weights_conversion SOURCE TARGET`: any checkpoint, as transformers loads it."""

from __future__ import annotations

import argparse
import sys

import torch

from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.outputs.foreign import printable
from weights_conversion import check

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Convert, or check, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m weights_conversion",
        description="Convert a checkpoint (hub id, directory, Google .pt) to a directory that "
        "transformers loads.",
        epilog="example: python -m weights_conversion 2b.pt recurrentgemma-2b --dtype bfloat16",
    )
    parser.add_argument("source", help="hub id, save_pretrained directory, or Google .pt file")
    parser.add_argument("target", nargs="?", help="new directory to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights")
    parser.add_argument(
        "--n-keys", type=int, help="keys a query sees, itself included; not stored in a .pt (2049)"
    )
    parser.add_argument(
        "--n-heads",
        type=int,
        help="heads, for a .pt without a recurrent layer, which would give them",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--adapter", help="directory or hub id of a LoRA adapter, merged")
    parser.add_argument(
        "--ignore-config-key",
        action="append",
        default=[],
        metavar="NAME",
        help="setting of config.json to ignore; several by commas, or one by one",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check the names and shapes of all tensors, without reading or writing any",
    )
    args = parser.parse_args(arguments)
    if not args.check and args.target is None:
        parser.error("give a directory to write, or --check")
    given = {"n_keys": args.n_keys, "n_heads": args.n_heads}
    ignored = [name.strip() for names in args.ignore_config_key for name in names.split(",")]
    how = {"adapter": args.adapter, "ignore_config_keys": ignored}
    overrides = {name: value for name, value in given.items() if value is not None}
    try:
        if args.check:
            print(check(args.source, args.revision, **how, **overrides))
        else:
            dtype = DTYPES[args.dtype]
            model = HookedHybrid.from_pretrained(
                args.source, dtype, revision=args.revision, **how, **overrides
            )
            model.save_pretrained(args.target)
            print(f"wrote {args.target}")
    except (OSError, TypeError, ValueError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
