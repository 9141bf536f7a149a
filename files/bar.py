"""A bar on stderr for what takes long."""
from __future__ import annotations
import shutil, sys, time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

def progress(items:Iterable[T], desc:str, total:int=0, weigh:Callable[[T], int]=lambda item: 1) -> Iterator[T]:
  """Yields the items and shows on stderr how far they are: a bar on a terminal, elsewhere a line every few seconds.
  total: the sum of weigh(item) over all items, 0 if unknown."""
  tty, done, shown, begun = sys.stderr.isatty(), 0, time.monotonic(), False
  try:
    for item in items:
      yield item
      done, now = done + weigh(item), time.monotonic()
      if now - shown < (0.2 if tty else 5): continue
      shown, begun, part = now, True, min(1, done / total) if total else 0
      bar = f"[{'#' * int(20 * part):20}] {part:4.0%}" if total else f"{done:,}"
      text = f"{bar} {desc}"[:shutil.get_terminal_size().columns - 1]
      print(f"\r\033[K{text}" if tty else text, end="" if tty else "\n", file=sys.stderr, flush=True)
  finally:
    if tty and begun: print("\r\033[K", end="", file=sys.stderr, flush=True)
