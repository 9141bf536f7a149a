"""Which clang compiles for tinygrad's CPU device, and how."""
from __future__ import annotations
import functools, os, pathlib, shutil, subprocess
from tinygrad.runtime.support.compiler_cpu import ClangCompiler

@functools.cache
def newest(named:str|None=None) -> str|None:
  """The path of `named` ($CC) or else of the newest clang, which Debian calls clang-19. None if there is none."""
  names = [named] if named else [*(f"clang-{v}" for v in range(30, 13, -1)), "clang"]
  return next((path for name in names if (path := shutil.which(name))), None)

class Clang(ClangCompiler):
  """tinygrad's compiler with the newest clang, and without its warnings, which no user can act on."""
  def __init__(self, arch:list[str]):
    self.clang = newest(os.environ.get("CC")) or "clang"
    super().__init__(arch, f"compile_{pathlib.Path(self.clang).name}_obj")

  def compile(self, src:str) -> bytes:
    """C source -> an object file. -fno-math-errno: a square root is then one instruction."""
    flags = ["-c", "-x", "c", "-O2", "-w", "-fPIC", "-ffreestanding", "-nostdlib", "-fno-math-errno", "-fno-ident",
             f"--target={self.arch}-none-unknown-elf", *self.args]
    return subprocess.check_output([self.clang, *flags, "-", "-o", "-"], input=src.encode())
