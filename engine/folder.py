"""A run's folder: who has it, its log, and going on where it stopped."""
import contextlib, fcntl
from collections.abc import Iterator
from pathlib import Path

@contextlib.contextmanager
def claim(folder:Path) -> Iterator[None]:
  """Makes the folder, and keeps every other program that claims it out until this one ends, however it ends.

  OSError if the folder cannot be written or another has it. Where the file system knows no locks, none is kept out."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder/".lock", "wb")  # noqa: SIM115
  except OSError as e: raise OSError(f"cannot write {folder}: {e.strerror or e}") from e
  with lock:
    try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise OSError(f"{folder} is in use by another program: wait for its end, or name another") from None
    except OSError: pass
    yield
