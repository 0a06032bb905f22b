"""Reading documents to harvest from files and folders, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hooked_hybrid.options import refuse_ignored, show
from hooked_hybrid.outputs.foreign import (
    bare_name,
    one_line,
    parse_json,
    read_json,
    read_lines,
    read_text,
    require_plain_file,
)


def read_texts(source: str | Path, field: str | None = None) -> Iterator[str]:
    """Yield the documents of a file or a folder, in the order of names and lines.

    Args:
        source: a .txt file (one document), a .jsonl file (one a line), a folder of such files at
            any depth, or a folder that `datasets.Dataset.save_to_disk` wrote.
        field: of a line or a row, that contains the text; None is "text".

    Raises:
        ValueError: nothing is there, a field of .txt files alone, a file is neither, not UTF-8 or
            not JSON, a data set that names files elsewhere, the field or `pyarrow` is missing:
            before the first document if it can be found then, else at the document.

    Examples:
        >>> from pathlib import Path
        >>> from hooked_hybrid.harvest import read_texts
        >>> n = Path("texts.jsonl").write_text('{"text": "eat a sandwich"}')
        >>> list(read_texts("texts.jsonl"))
        ['eat a sandwich']
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"texts {source}: no such file or folder")
    if (source / "dataset_info.json").exists():
        if find_spec("pyarrow") is None:
            raise ValueError(
                f"texts {source} is a saved data set: pip install datasets to read it (or pyarrow)"
            )
        return _rows_of(source, field or "text")
    if (source / "dataset_dict.json").exists():
        splits = sorted(folder.name for folder in source.iterdir() if folder.is_dir())
        raise ValueError(f"texts {source} has parts: give the folder of one, {', '.join(splits)}")
    files = [source]
    if source.is_dir():
        found = (f for f in source.rglob("*") if f.suffix in _READERS and f.is_file())
        files = sorted(found, key=lambda file: file.relative_to(source).parts)
    if not files or files[0].suffix not in _READERS:
        raise ValueError(f"texts {source}: give a .txt or .jsonl file, or a folder of such files")
    if all(file.suffix == ".txt" for file in files):
        refuse_ignored("a .txt file is one document and has no fields", field=field)
    return (text for file in files for text in _read(file, field or "text"))


def _read(file: Path, field: str) -> Iterator[str]:
    try:
        yield from _READERS[file.suffix](file, field)
    except OSError as error:
        raise ValueError(f"texts {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"texts {file} is not UTF-8 ({error})") from error


def _whole(file: Path, field: str) -> Iterator[str]:  # noqa: ARG001  (a text has no fields)
    yield read_text(file, "utf-8-sig")


def _lines(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(read_lines(file, "utf-8-sig"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"texts {file}, line {number}")
        except ValueError as error:
            raise ValueError(str(error)) from None
        yield _text_of(row, field, f"{file}, line {number}")


def _rows_of(folder: Path, field: str) -> Iterator[str]:
    """Yield one column of a saved data set, from the Arrow files listed in its state.

    No other column is read: one of pictures would open the paths and URLs in it.
    """
    from pyarrow import ArrowException, ipc, memory_map, types

    number, is_text = 0, (types.is_string, types.is_large_string, types.is_string_view)
    for path in _arrow_files(folder):
        require_plain_file(path)
        try:
            with memory_map(str(path)) as file:
                schema = ipc.open_stream(file).schema
                at = schema.get_field_index(field)
                if at < 0 or not any(check(schema.types[at]) for check in is_text):
                    raise _no_text(f"{folder}, row {number}", field, schema.names)
                file.seek(0)
                options = ipc.IpcReadOptions(included_fields=[at])
                for batch in ipc.open_stream(file, options=options):
                    batch.validate(full=True)
                    for value in batch.column(0):
                        text = {field: value.as_py()}
                        yield _text_of(text, field, f"{folder}, row {number}")
                        number += 1
        except (ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            raise ValueError(f"texts {path} is damaged ({one_line(error)})") from error


def _arrow_files(folder: Path) -> list[Path]:
    """Return the files of a saved data set, which are in its folder.

    Raises:
        ValueError: its state is invalid, or lists files outside the folder.
    """
    path = folder / "state.json"
    try:
        state = read_json(path)
        names = [file["filename"] for file in state["_data_files"]]
        if state.get("_indices_data_files"):
            raise ValueError("its rows are selected by an indices file: save it anew")
        if not all(map(bare_name, names)):
            raise ValueError("it lists files outside the folder")
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        why = one_line(error)
        raise ValueError(f"texts {folder}: state.json is not of a data set ({why})") from error
    return [folder / name for name in names]


def _text_of(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if isinstance(row, dict) and field in row and not isinstance(text, str):
        raise ValueError(
            f"texts {where}: the field {field!r} holds {one_line(show(text))}, which is not text"
        )
    if not isinstance(text, str):
        raise _no_text(where, field, list(row) if isinstance(row, dict) else [])
    return text


def _no_text(where: str, field: str, names: Sequence[str]) -> ValueError:
    has = f"; it has {one_line(', '.join(map(str, names)))}" if names else ""
    return ValueError(f"texts {where}: no text in the field {field!r}{has}: give another field")


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {".txt": _whole, ".jsonl": _lines}
