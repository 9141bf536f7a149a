"""Which clang compiles for tinygrad's CPU device, and how."""
from __future__ import annotations
import contextlib, functools, os, pathlib, shlex, shutil, subprocess, tempfile
from collections.abc import Iterator
from tinygrad.helpers import diskcache_get, diskcache_put
from tinygrad.runtime.support.compiler_cpu import ClangCompiler

@functools.cache
def newest(named:str|None=None) -> str|None:
  """The path of `named` ($CC) or else of the newest clang, which Debian calls clang-19. None if there is none."""
  names = [named] if named else [*(f"clang-{v}" for v in range(30, 13, -1)), "clang"]
  return next((path for name in names if (path := shutil.which(name))), None)

class Clang(ClangCompiler):
  """tinygrad's compiler with the newest clang, and without its warnings, which no user can act on."""
  later:dict[str, Clang]|None = None  # inside of `together`: the sources that are still to be compiled, by which

  def __init__(self, arch:list[str]):
    self.clang = newest(os.environ.get("CC")) or "clang"
    super().__init__(arch, f"compile_{pathlib.Path(self.clang).name}_obj")
    # -fno-math-errno: a square root is then one instruction
    self.flags = ["-c", "-x", "c", "-O2", "-w", "-fPIC", "-ffreestanding", "-nostdlib", "-fno-math-errno", "-fno-ident",
                  f"--target={self.arch}-none-unknown-elf", *self.args]

  def compile(self, src:str) -> bytes:
    """C source -> an object file."""
    return subprocess.check_output([self.clang, *self.flags, "-", "-o", "-"], input=src.encode())

  def compile_cached(self, src:str) -> bytes:
    if Clang.later is None or self.cachekey is None: return super().compile_cached(src)
    if (found := diskcache_get(self.cachekey, src)) is None: Clang.later[src] = self
    return found or b""

  def compile_all(self, sources:list[str]) -> dict[str, bytes]:
    """Several sources with one start of clang, which takes longer than most kernels do. `clang -c` would start anew for
    each file; `clang -cc1`, which it starts with the flags that -### prints, does not. Where that fails: one by one."""
    with tempfile.TemporaryDirectory() as folder:
      files = [pathlib.Path(folder, f"{i}.c") for i in range(len(sources))]
      for f, src in zip(files, sources): f.write_text(src)
      start = cc1(self.clang, *self.flags)
      if len(files) > 1 and start: subprocess.run([*start, "-x", "c", *files], capture_output=True)
      made = [f.with_suffix(".o") for f in files]
      found = {src: f.read_bytes() if f.exists() else self.compile(src) for f, src in zip(made, sources)}
    for src, lib in found.items(): diskcache_put(self.cachekey, src, lib)
    return found

@functools.cache
def cc1(*command:str) -> list[str]:
  """What the command `clang -c` starts, up to the names of its files; [] if it does not say."""
  said = subprocess.run([*command, "-###", os.devnull, "-o", "-"], capture_output=True, text=True).stderr
  words = shlex.split(said.strip().rpartition("\n")[2])
  return words[:words.index("-o")] if "-cc1" in words and "-o" in words else []

@contextlib.contextmanager
def together() -> Iterator[dict[str, Clang]]:
  """Inside of it nothing is compiled that is not in the cache: the dict takes these sources, for `compile_all`."""
  Clang.later = {}
  try: yield Clang.later
  finally: Clang.later = None
