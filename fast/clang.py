"""Which clang compiles for tinygrad's CPU device, and how."""
from __future__ import annotations
import contextlib, functools, hashlib, os, pathlib, shlex, shutil, sqlite3, subprocess, tempfile
from collections.abc import Iterator
from tinygrad.helpers import diskcache_get, diskcache_put
from tinygrad.runtime.support.compiler_cpu import ClangCompiler

@functools.cache
def newest(named:str|None=None) -> str|None:
  """The path of `named` ($CC) or, if that is another compiler, of the newest clang, which Debian calls clang-19. None
  if there is none."""
  # conda and cluster modules set $CC to gcc; macOS's clang is called cc as well
  if named and "clang" not in os.path.basename(named) and (path := shutil.which(named)):
    if b"clang" not in subprocess.run([path, "--version"], capture_output=True).stdout: named = None
  names = [named] if named else [*(f"clang-{v}" for v in range(30, 13, -1)), "clang"]
  return next((path for name in names if (path := shutil.which(name))), None)

class Clang(ClangCompiler):
  """tinygrad's compiler with the newest clang, and without its warnings, which no user can act on."""
  later:dict[str, Clang]|None = None  # inside of `together`: the sources that are still to be compiled, by which

  def __init__(self, arch:list[str]):
    self.clang = newest(os.environ.get("CC")) or "clang"
    super().__init__(arch)
    # -fno-math-errno: a square root is then one instruction
    self.flags = ["-c", "-x", "c", "-O2", "-w", "-fPIC", "-ffreestanding", "-nostdlib", "-fno-math-errno", "-fno-ident",
                  f"--target={self.arch}-none-unknown-elf", *self.args]
    # the cache on the disk may be another processor's, and it outlives an upgrade of clang
    self.fingerprint = f"clang_{hashlib.sha256(said(self.clang, *self.flags).encode()).hexdigest()}"
    if self.cachekey: self.cachekey = self.fingerprint

  def compile(self, src:str) -> bytes:
    """C source -> an object file."""
    return subprocess.check_output([self.clang, *self.flags, "-", "-o", "-"], input=src.encode())

  def compile_cached(self, src:str) -> bytes:
    if Clang.later is None or self.cachekey is None:
      try: return super().compile_cached(src)
      except sqlite3.Error: return self.compile(src)  # the cache cannot be written
    if (found := diskcache_get(self.cachekey, src)) is None: Clang.later[src] = self
    return found or b""

  def compile_all(self, sources:list[str]) -> dict[str, bytes]:
    """Several sources with one start of clang, which takes longer than most kernels do. `clang -c` would start anew for
    each file; `clang -cc1`, which it starts with the flags that -### prints, does not. Where that fails: one by one."""
    found:dict[str, bytes] = {}
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
      files = [pathlib.Path(folder, f"{i}.c") for i in range(len(sources))]
      for f, src in zip(files, sources): f.write_text(src)
      start = cc1(self.clang, *self.flags)
      if len(files) > 1 and start: subprocess.run([*start, "-x", "c", *files], capture_output=True)
      made = [f.with_suffix(".o") for f in files]
      found = {src: f.read_bytes() for f, src in zip(made, sources) if f.exists()}
    found |= {src: self.compile(src) for src in sources if src not in found}
    with contextlib.suppress(sqlite3.Error):
      for src, lib in found.items(): diskcache_put(self.cachekey, src, lib)
    return found

@functools.cache
def said(*command:str) -> str:
  """What the command `clang -c` says of itself: its version, and all flags, with the processor's features."""
  try: return subprocess.run([*command, "-###", os.devnull, "-o", "-"], capture_output=True, text=True, cwd="/").stderr
  except OSError: return ""

def cc1(*command:str) -> list[str]:
  """What the command `clang -c` starts, up to the names of its files; [] if it does not say."""
  words = shlex.split(said(*command).strip().rpartition("\n")[2])
  return words[:words.index("-o")] if "-cc1" in words and "-o" in words else []

@contextlib.contextmanager
def together() -> Iterator[dict[str, Clang]]:
  """Inside of it no Clang with a cache compiles: the dict takes the sources that the cache lacks, for `compile_all`."""
  Clang.later = {}
  try: yield Clang.later
  finally: Clang.later = None
