"""One atomic write for every file of the project: checkpoints, logs, pictures, downloads."""
import contextlib, fcntl, functools, json, os, secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

@contextlib.contextmanager
def atomic(path:str|os.PathLike) -> Iterator[BinaryIO]:
  """A binary file, open for writing and reading, that gets its name when all is written and on the disk: whatever
  happens, `path` is the whole new file or what it was before. Makes the folder.

  OSError if the place cannot be written."""
  target, temporary = Path(os.path.realpath(path)), None  # through a link, which stays
  try:
    if target.exists() and not target.is_file(): raise OSError("it is not a regular file")
    if target.parent.is_file(): raise OSError(f"{target.parent} is a file, not a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    with create(target.parent) as f:
      temporary = f.name
      yield f
      f.flush()
      os.fsync(f.fileno())
      os.replace(temporary, target)  # before the lock is gone
  except OSError as e: raise OSError(f"cannot write {path}: {e.strerror or e}") from e
  finally:
    if temporary:
      with contextlib.suppress(OSError): os.unlink(temporary)

def write_json(path:str|os.PathLike, value:object):
  with atomic(path) as f: f.write(json.dumps(value, indent=1, default=float).encode() + b"\n")

def create(folder:Path) -> BinaryIO:
  """A new temporary file, locked for as long as it is open, so that `sweep` knows it is in use."""
  while True:
    f = open(folder/f".{secrets.token_hex(8)}.tmp", "x+b")  # noqa: SIM115
    with contextlib.suppress(OSError): fcntl.flock(f, fcntl.LOCK_EX)
    if os.fstat(f.fileno()).st_nlink: return f
    f.close()  # swept away before it was locked

@functools.cache  # once a program and folder is enough
def sweep(folder:Path) -> None:
  """Removes the temporary files of killed programs. Where the file system knows no locks, they stay."""
  for path in folder.glob("." + 16 * "[0-9a-f]" + ".tmp"):
    with contextlib.suppress(OSError), open(path, "r+b") as f:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
      path.unlink()
