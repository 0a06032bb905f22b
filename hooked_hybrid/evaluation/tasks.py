"""Tasks of lm-eval by name: single tasks of groups and tags, with their data if available."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from hooked_hybrid.evaluation import OWN_TASKS
from hooked_hybrid.outputs.foreign import one_line

DOCUMENTS_READ = 50_000
"""Documents of a split that a task's hash covers: a few seconds."""
Source = tuple[str, str, str]


@dataclass(frozen=True)
class Loaded:
    """A task whose data is in memory."""

    name: str
    task: Any

    def prepared(self, num_fewshot: int | None, seed: int) -> Any:
        """Return the task with its few-shot examples set as in lm-eval's own program.

        A task that is configured with 0 examples keeps 0.
        """
        own = self.task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            self.task.set_config(key="num_fewshot", value=num_fewshot or 0)
        self.task.set_fewshot_seed(seed=seed)
        return self.task

    @property
    def n_fewshot(self) -> int:
        """Examples before each question, by the task's own setting."""
        return int(self.task.get_config("num_fewshot") or 0)

    def hash(self, num_fewshot: int | None, seed: int, limit: int | float | None) -> str:
        """Return a short hash of the task: its config, its documents and those of the examples.

        Functions are hashed by their source. The first `DOCUMENTS_READ` documents are hashed, and
        none beyond `limit` if it is a number.
        """
        task = self.prepared(num_fewshot, seed)
        most = limit if isinstance(limit, int) else None
        digest = hashlib.sha256(_as_text(task.dump_config()).encode())
        splits = [(task.eval_docs, most)]
        splits += [(task.fewshot_docs(), None)] if task.get_config("num_fewshot") else []
        for documents, wanted in splits:
            n_documents = len(documents) if hasattr(documents, "__len__") else "?"
            digest.update(f"\n{n_documents}".encode())
            for document in islice(documents, min(wanted or DOCUMENTS_READ, DOCUMENTS_READ)):
                digest.update(_as_text(document).encode())
        return digest.hexdigest()[:16]


def source_of(cfg: Mapping[str, Any]) -> Source:
    """Return the part of a config that identifies the data set of a task.

    Subsets of a repository are cached together: if one is in the cache, `datasets` reports that the
    others are not, instead of that the repository cannot be reached.
    """
    files = json.dumps(cfg.get("dataset_kwargs"), sort_keys=True, default=str)
    own = str(cfg.get("task")) if cfg.get("dataset_path") is None else ""
    return str(cfg.get("dataset_path")), files, own


class TaskSource:
    """Tasks by the names given.

    Args:
        names: of tasks, groups or tags.
        include_path: folder of further tasks. lm-eval's own are searched (which takes half a
            minute) only if a name is not found there or among this library's.

    Raises:
        ValueError: an unknown name, or no name.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        from lm_eval.tasks import TaskManager

        if not names:
            raise ValueError("no task to run: give --tasks glue, or another name")
        if include_path is not None and not include_path.is_dir():
            raise ValueError(f"--include-path {include_path}: no such folder")
        folders = [str(p) for p in (OWN_TASKS, include_path) if p is not None]
        self.manager = TaskManager(include_path=folders, include_defaults=False)
        if not all(name in self.manager.task_index for name in names):
            self.manager = TaskManager(include_path=folders)
        known = self.manager.all_tasks
        if unknown := [name for name in names if name not in self.manager.task_index]:
            near = get_close_matches(unknown[0], known, 4, 0.5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(f"no task, group or tag named {unknown[0]!r}{hint}")
        self.groups: dict[str, tuple[str, ...]] = {n: tuple(self._leaves(n)) for n in names}
        self.leaves = list(dict.fromkeys(leaf for found in self.groups.values() for leaf in found))
        self._unreachable: dict[Source, str] = {}

    def sets_no_examples(self, name: str) -> bool:
        """Whether a task's file sets 0 examples, which overrides the options."""
        return (self.manager.task_index[name].cfg or {}).get("num_fewshot") == 0

    def load(self, name: str) -> Loaded | str:
        """Return a task with its data, or the reason why it is not available.

        If a data set cannot be reached, no other task tries it again, as each try takes half a
        minute.
        """
        source = source_of(self.manager.task_index[name].cfg or {})
        if source not in self._unreachable:
            try:
                return Loaded(name, self.manager.load([name])["tasks"][name])
            except Exception as error:  # whatever a loader raises, the other tasks continue
                reason = one_line(f"{type(error).__name__}: {error}", 300)
                if not isinstance(error, ConnectionError):
                    return reason
                self._unreachable[source] = reason
        return self._unreachable[source]

    def _leaves(self, name: str) -> list[str]:
        """Return the single tasks of a name; a group with its own configs is an error."""
        entry = self.manager.task_index[name]
        if entry.kind.name == "TAG":
            return sorted(entry.tags)
        if entry.kind.name != "GROUP":
            return [name]
        members = (entry.cfg or {}).get("task") or []
        members = [members] if isinstance(members, str) else members
        if not all(isinstance(member, str) for member in members):
            raise ValueError(f"{name!r} is a group with configs of its own: name its tasks instead")
        return list(dict.fromkeys(leaf for member in members for leaf in self._leaves(member)))


def _as_text(value: Any) -> str:
    """Return a config or document as text that is the same in every process."""
    text = json.dumps(value, sort_keys=True, default=_unknown_as_text)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _unknown_as_text(value: Any) -> str:
    if isinstance(value, set | frozenset):
        return repr(sorted(map(repr, value)))
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return repr(value)
