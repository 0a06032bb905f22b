"""Tasks of lm-eval by name: single ones out of groups and tags, and whether their data is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hooked_hybrid.evaluation import OWN_TASKS


@dataclass(frozen=True)
class Loaded:
    """A task whose data is in memory."""

    name: str
    task: Any

    def prepared(self, num_fewshot: int | None, seed: int) -> Any:
        """Return the task with its few-shot examples set as lm-eval's own program sets them.

        A task that sets 0 examples itself keeps them.
        """
        own = self.task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            self.task.set_config(key="num_fewshot", value=num_fewshot or 0)
        self.task.set_fewshot_seed(seed=seed)
        return self.task


class TaskSource:
    """Tasks by the names that were asked for.

    Args:
        names: of tasks, groups or tags.
        include_path: folder of further tasks. lm-eval's own are only looked through (which takes
            half a minute) where a name is not found there or among this library's.

    Raises:
        ValueError: an unknown name, or none.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None = None) -> None:
        from lm_eval.tasks import TaskManager

        if not names:
            raise ValueError("no task to run: give --tasks glue, or another name")
        if include_path is not None and not include_path.is_dir():
            raise ValueError(f"--include-path {include_path}: there is no such folder")
        folders = [str(p) for p in (OWN_TASKS, include_path) if p is not None]
        self.manager = TaskManager(include_path=folders, include_defaults=False)
        if not all(name in self.manager.task_index for name in names):
            self.manager = TaskManager(include_path=folders)
        known = self.manager.all_tasks
        if unknown := [name for name in names if name not in self.manager.task_index]:
            near = get_close_matches(unknown[0], known, 4, 0.5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(f"no task, group or tag is called {unknown[0]!r}{hint}")
        self.groups: dict[str, tuple[str, ...]] = {n: tuple(self._leaves(n)) for n in names}
        self.leaves = list(dict.fromkeys(leaf for found in self.groups.values() for leaf in found))
        self._unreachable: dict[str, str] = {}

    def load(self, name: str) -> Loaded | str:
        """Return a task with its data, or why it cannot be had.

        Where a data set cannot be reached, no other task asks for it again: each try takes half a
        minute.
        """
        path = str((self.manager.task_index[name].cfg or {}).get("dataset_path"))
        if path not in self._unreachable:
            try:
                return Loaded(name, self.manager.load([name])["tasks"][name])
            except Exception as error:  # whatever a loader raises, the other tasks go on
                text = " ".join(str(error).split())
                reason = f"{type(error).__name__}: {text}"[:300]
                if not isinstance(error, ConnectionError):
                    return reason
                self._unreachable[path] = reason
        return self._unreachable[path]

    def _leaves(self, name: str) -> list[str]:
        """Return the single tasks of a name; a group that brings configs of its own stays whole."""
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


__all__ = ["Loaded", "TaskSource"]
